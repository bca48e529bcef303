"""A cache filled by log-probs in files: DistillKit's and Axolotl's formats, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltakd.cache import make_cache
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.models.roles import open_tokenizer
from deltakd.references.distillkit import CONFIG, Compression
from deltakd.training.run import run_training
from tests.tiny import World, save_model

K = 16
STORE = ("reference.store=topk", "reference.dtype=float32", "data.limit=12")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Far from uniform, so that errors would show."""
    return save_model(tmp_path_factory.mktemp("given") / "teacher", seed=3, width=24, initializer_range=0.4)


@pytest.fixture(scope="module")
def records(teacher: Path, world: World) -> list[dict[str, Any]]:
    """The rows with their tokens, and at each but the first the label and the most probable others."""
    settings = make_settings(compose_config("train", world.overrides(world.root, "sft", "data.limit=12")))
    sets = settings.data.load(open_tokenizer(settings.model, world.root / "none"))
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    found = []
    assert sets.val is not None
    for name, encoded in (("train", sets.train), ("val", sets.val)):
        lines = (world.root / f"{name}.jsonl").read_text().splitlines()
        for row in encoded:
            with torch.no_grad():
                log_probs_TV = model(torch.tensor([row.input_ids])).logits[0].float().log_softmax(-1)[:-1]
            labels_T = torch.tensor(row.input_ids[1:])
            ids = log_probs_TV.scatter(1, labels_T[:, None], torch.inf).topk(K).indices
            values = log_probs_TV.gather(1, ids)
            found.append(json.loads(lines[row.row_id]) | {"tokens": row.input_ids, "ids": ids, "values": values})
    return found


def axolotl_v1(one: dict[str, Any]) -> dict[str, Any]:
    positions = [
        [{"token": f"token_id:{token}", "logprob": value} for token, value in zip(ids, values, strict=True)]
        for ids, values in zip(one["ids"].tolist(), one["values"].tolist(), strict=True)
    ]
    return own(one) | {"llm_logprobs": [None, *positions]}


def axolotl_v2(one: dict[str, Any]) -> dict[str, Any]:
    return own(one) | {"logprobs": one["values"].tolist(), "target_token_ids": one["ids"].tolist()}


def distillkit(one: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": one["tokens"], "token_ids": one["ids"].tolist(), "top_values": one["values"].tolist()}


def own(one: dict[str, Any]) -> dict[str, Any]:
    return {name: one[name] for name in ("instruction", "context", "response")}


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def cache_of(world: World, path: Path, file: Path | str, *more: str, loss: str = "kd") -> dict[str, Any]:
    chosen = [f"reference.path={path}", f"reference.log_probs={file}", *STORE, *more]
    return make_cache([o for o in world.overrides(path, loss, *chosen) if not o.startswith("model.teacher")])


def shards(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("shard_*.safetensors")):
        found |= {f"{file.name}.{name}": value for name, value in load_file(file).items()}
    return found


@pytest.mark.parametrize("form", [axolotl_v1, axolotl_v2, distillkit])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_log_probs_of_each_format_fill_the_cache_that_the_loaded_teacher_fills(
    world: World,
    teacher: Path,
    records: list[dict[str, Any]],
    tmp_path: Path,
    form: Callable[[dict[str, Any]], dict[str, Any]],
    ending: str,
) -> None:
    file = written(tmp_path / f"given.{ending}", [form(one) for one in records])
    summary = cache_of(world, tmp_path / "given", file)
    assert summary["k"] == K
    loaded = [f"model.teacher.path={teacher}", f"reference.path={tmp_path / 'loaded'}", f"reference.k={K}", *STORE]
    make_cache(world.overrides(tmp_path / "loaded", "kd", *loaded))
    given, exact = shards(tmp_path / "given"), shards(tmp_path / "loaded")
    assert given.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(given[name].double(), value.double(), rtol=1e-4, atol=1e-4)


def test_a_training_reads_it_as_any_cache(world: World, records: list[dict[str, Any]], tmp_path: Path) -> None:
    cache_of(world, tmp_path / "cache", written(tmp_path / "given.jsonl", [distillkit(one) for one in records]))
    chosen = ("reference=cached", f"reference.path={tmp_path / 'cache'}", "data.limit=12")
    overrides = [o for o in world.overrides(tmp_path / "run", "kd", *chosen) if not o.startswith("model.teacher")]
    run_training(make_settings(compose_config("train", overrides)), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as table:
        losses = [float(row["train/loss"]) for row in csv.DictReader(table) if row.get("train/loss")]
    assert losses[-1] < losses[0]


def test_a_label_that_is_not_there_gets_an_equal_share_of_the_rest(
    world: World, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Against the formula in NumPy: log((1 − Σ p) / (V − k)); the least probable of the k tokens makes room."""
    without = []
    for one in records:
        # Every second position loses its label, which is first; the others lose their least probable token.
        kept = torch.arange(K - 1).repeat(len(one["ids"]), 1)
        kept[::2] += 1
        without.append(one | {name: one[name].gather(1, kept) for name in ("ids", "values")})
    cache_of(world, tmp_path / "cache", written(tmp_path / "given.jsonl", [distillkit(one) for one in without]))
    kept_NK = torch.cat([of for name, of in shards(tmp_path / "cache").items() if name.endswith(".teacher")]).double()
    assert kept_NK.shape[1] == K
    torch.testing.assert_close(kept_NK.exp().sum(1), torch.ones(len(kept_NK), dtype=torch.float64), atol=1e-5, rtol=0)
    expected = set()
    for one in without:
        rest_T = 1 - np.exp(one["values"].double().numpy()).sum(1)
        expected |= set(np.log(rest_T / (300 - (K - 1)))[::2].round(3).tolist())
    shares = [value for value in kept_NK[:, 0].numpy().round(3).tolist() if value in expected]
    assert 0.3 < len(shares) / len(kept_NK) < 0.7


def changed(field: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda one: one | {field: change(one[field])}


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        (distillkit, changed("top_values", lambda v: [[0.5, *one[1:]] for one in v]), "above 0 or not a number: 0.5"),
        (distillkit, changed("top_values", lambda v: [[-0.1] * K for _ in v]), "the probabilities add up to 14.4"),
        (distillkit, changed("token_ids", lambda v: [[300, *one[1:]] for one in v]), "token 300 is beyond the"),
        (distillkit, changed("token_ids", lambda v: [[*one[:-1], one[-2]] for one in v]), "a token occurs twice"),
        (distillkit, changed("token_ids", lambda v: v[:-1]), "not lists of equal length"),
        (
            distillkit,
            lambda one: {name: of if name == "input_ids" else of[:-2] for name, of in one.items()},
            "fewer pos",
        ),
        (
            distillkit,
            lambda one: {name: of if name == "input_ids" else [*of[1:], of[0]] for name, of in one.items()},
            "the positions are shifted",
        ),
        (
            axolotl_v2,
            lambda one: own(one) | {name: [*one[name][1:], one[name][0]] for name in ("logprobs", "target_token_ids")},
            "the positions are shifted",
        ),
        (
            distillkit,
            lambda one: {
                name: of if name == "input_ids" else [of[0][:9], *of[1:-1], of[-1][:9]] for name, of in one.items()
            },
            "k varies: positions of reference.log_probs have 9 to 16 tokens; give reference.k=9",
        ),
        (axolotl_v1, changed("llm_logprobs", lambda v: [*v, *v]), "positions have log-probs, and the row has"),
        (axolotl_v1, changed("llm_logprobs", lambda v: [None, [{"token": "a", "logprob": -1.0}]]), "is not an entry"),
        (axolotl_v1, changed("response", lambda v: "red moon " * 8), "have no log-probs: no record has"),
        (distillkit, lambda one: {"input_ids": one["input_ids"]}, "no log-probs in the fields input_ids"),
        (
            distillkit,
            lambda one: {"input_ids": [1], "packed_indices": [[1]], "exact_values": [[1.0]], "coeffs": [[1.0]]},
            "DistillKit's older compression",
        ),
    ],
)
def test_log_probs_that_do_not_fit_are_refused_by_record_or_row(
    world: World,
    records: list[dict[str, Any]],
    tmp_path: Path,
    form: Callable[[dict[str, Any]], dict[str, Any]],
    change: Callable[[dict[str, Any]], dict[str, Any]],
    said: str,
) -> None:
    file = written(tmp_path / "given.jsonl", [change(form(one)) for one in records])
    with pytest.raises(ValueError, match=r"reference\.(log_probs|k)") as caught:
        cache_of(world, tmp_path / "cache", file)
    assert said in str(caught.value)
    assert not list(tmp_path.glob("cache/shard_*"))


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("delta_kd", (), "reference.log_probs gives the teacher alone: without a raw partner it gives kd, not delta"),
        ("kd", ("reference.store=hidden",), "give reference.store=topk"),
        ("kd", ("loss.temperature=2",), "log-probs of reference.log_probs are those at temperature 1"),
        ("kd", ("reference.url=http://127.0.0.1:1",), "both give the teacher's log-probs; give one of them"),
        ("kd", ("reference.log_probs=absent.jsonl",), "reference.log_probs: "),
    ],
)
def test_what_files_can_not_give_is_said_before_they_are_read(
    world: World, tmp_path: Path, loss: str, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cache_of(world, tmp_path / "cache", world.root / "train.jsonl", *options, loss=loss)
    assert said in str(caught.value)


#: Two positions, as compressed by DistillKit at commit a61c2e7 from log-softmax(3 randn(1, 2, 50)), and as it
#: decompresses them: configuration, log-probs and ids in hexadecimal, log-probs.
RECORDED: list[tuple[dict[str, Any], str, str, list[list[float]]]] = [
    (
        {"d": 50, "k": 4, "exact_k": 4, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": True},
        "e01bffbe187eacbfd0cd4cbf804517bfe2e9c3bd68e821c07d850fc0d06f65bf",
        "b5775c253308",
        [[-0.4983, -1.8459, -2.6459, -3.2368], [-0.0957, -2.6255, -4.868, -5.7642]],
    ),
    (
        {
            "d": 50, "k": 12, "exact_k": 4, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, "sqrt"],
            "term_dtype": "float32", "residual_bins": [], "delta_encoding": False,
        },
        "ffbeecbf29c04fc0c2816bc0eac5b2be0debec3c70c417bec4bd28c09cc0b8c01116cfc0602cad3e50332dbdb3903abf",
        "b5775c34e7b1113a5825330845b9d000f76c",
        [
            [-0.498, -1.8438, -2.6406, -3.2344, -3.6798, -4.1483, -4.472, -4.7237, -4.9101, -5.034, -5.0967, -5.099],
            [-0.0957, -2.625, -4.875, -5.75, -6.4714, -6.9043, -6.9948, -7.0996, -7.2526, -7.467, -7.7495, -8.104],
        ],
    ),
    (
        {
            "d": 50, "k": 10, "exact_k": 2, "exact_dtype": "float16", "polynomial_terms": [0, 1],
            "residual_bins": [
                {"scale_dtype": "float16", "element_bits": 4, "num_elements": 3},
                {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
            ],
            "delta_encoding": False, "normalize_t": True,
        },
        "f9b762bfb4c53ac0c94918c05c28f950e06d933e001fae40c10b78aec08ca412c0ac2cf830c8570c3f00",
        "b5775c34e7b1113025330845b9d000f0",
        [
            [-0.4983, -1.8457, -2.6799, -3.2242, -3.7003, -4.2259, -4.5659, -4.618, -4.9579, -5.2978],
            [-0.0956, -2.625, -4.9414, -5.7795, -6.4718, -6.9825, -7.3098, -7.0888, -7.4161, -7.7434],
        ],
    ),
    (
        {
            "d": 70000, "k": 8, "exact_k": 1, "polynomial_terms": [0, 1, 2], "term_dtype": "float64",
            "residual_bins": [{"scale_dtype": "float32", "element_bits": 6, "num_elements": 7}],
        },
        "e01bffbe000000a0d2fcf3bf00000000c502d83f00000040ff40a3bf0eadca3b432aa1780d40"
        "e2e9c3bd000000002a3705c0000000800e1aeb3f000000c03338b1bfe8913d3cac0f224287c0",
        "00168005c003a001c000680038003c003100048004c0018000800088006c004e0010",
        [
            [-0.4983, -1.8464, -2.6468, -3.2342, -3.6902, -4.0528, -4.5642, -4.7864],
            [-0.0957, -2.6203, -4.8628, -5.766, -6.4594, -6.9849, -6.9913, -6.9947],
        ],
    ),
]  # fmt: skip
IDS = [[45, 23, 29, 28, 13, 14, 30, 49, 4, 19, 41, 24], [9, 19, 12, 8, 17, 27, 39, 16, 0, 15, 29, 44]]


@pytest.mark.parametrize(("config", "values", "ids", "expected"), RECORDED)
def test_distillkits_compression_is_read_as_distillkit_reads_it(
    config: dict[str, Any], values: str, ids: str, expected: list[list[float]]
) -> None:
    compression = Compression.of(config)
    packed, indices = (np.frombuffer(bytes.fromhex(text), np.uint8).reshape(2, -1) for text in (values, ids))
    assert packed.shape[1] == compression.log_prob_bytes
    assert compression.ids(indices).tolist() == [row[: compression.k] for row in IDS]
    # It returns values in exact_dtype: bfloat16 has 8 bits.
    np.testing.assert_allclose(compression.log_probs(packed), expected, atol=2e-3)


def compressed(one: dict[str, Any]) -> dict[str, Any]:
    """Four exact values a position, ids of 9 bits: the plainest compression, written by hand."""
    values, order = one["values"].sort(descending=True)
    ids = one["ids"].gather(1, order)[:, :4].tolist()
    bits = ["".join(f"{token:09b}" for token in of) for of in ids]
    return {
        "input_ids": one["tokens"],
        "compressed_logprobs": [list(of[:4].numpy().astype("<f4").tobytes()) for of in values],
        "bytepacked_indices": [[int(of[at : at + 8].ljust(8, "0"), 2) for at in range(0, 36, 8)] for of in bits],
    }


def test_compressed_files_need_the_configuration_beside_them(
    world: World, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    file = written(tmp_path / "files" / "part.parquet", [compressed(one) for one in records])
    with pytest.raises(ValueError, match=f"has no {CONFIG}"):
        cache_of(world, tmp_path / "cache", file)
    config: dict[str, Any] = {"d": 300, "k": 4, "exact_k": 4, "residual_bins": [], "delta_encoding": False}
    (tmp_path / "files" / CONFIG).write_text(yaml.safe_dump(config | {"k": 5, "exact_k": 5}))
    with pytest.raises(ValueError, match="it belongs to other files"):
        cache_of(world, tmp_path / "cache", file)
    (tmp_path / "files" / CONFIG).write_text(yaml.safe_dump(config))
    assert cache_of(world, tmp_path / "cache", tmp_path / "files")["k"] == 4
