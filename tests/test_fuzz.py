"""Whatever users write into a config or a data file: it is taken, or refused in words, and never a traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.data import AlpacaTemplate, ChatTemplate, encode_rows, parse_row, read_rows, read_texts, row_record
from deltakd.io.hub import hub_reachable
from tests import tiny
from tests.data.conftest import CHAT
from tests.tiny import World

ABSENT = object()
#: Configs whose keys are drawn: they differ in loss, data, reference, strategy and adapter.
BASES = {
    "teachers": ["logger=[csv,tensorboard,wandb]", "evaluation=default"],
    "text": ["data=text", "loss=sft", "strategy=deepspeed_zero2", "model.lora={r:4}", "callbacks=default"],
    "schedule": ["loss=taid", "strategy=fsdp", "evaluation=gsm8k"],
    "cached": ["loss=kd_plus_delta", "reference=cached", "reference.path=nowhere", "evaluation=minillm"],
}
#: Keys of a target of Hydra: they name code, which a test should not draw.
CODE = ("_target_", "_partial_", "_recursive_", "_convert_")

WORDS = [
    "",
    " ",
    "no",
    "true",
    "null",
    "auto",
    "1e-5",
    "a,b",
    "text",
    "a/b",
    "a/b:c",
    "x.jsonl",
    "~nobody/x.jsonl",
    "~",
    "\0",
    "x" * 5000,
    "\ud83d",
    "ä\n",
    "{x",
    "${nowhere}",
    "${seed}",
    "???",
    "(",
    "a{99999999999}",
    "cuda:x",
    "gpt2",
]
NUMBERS = [0, 1, -1, 2, 10**30, -(10**400), 0.5, -0.5, 1e308, 1e-320, float("nan"), float("inf")]
PLAIN = [None, True, False, *WORDS, *NUMBERS]
KEYS = ["a", "x", "path", "source", "model_type", "quant_method", "r", "start", "with_input", 1, True]


def draw_value(draw: random.Random, depth: int = 2) -> Any:
    """A plain value, or a list or mapping of some, or nothing at all."""
    kind = draw.random()
    if depth == 0 or kind < 0.65:
        return draw.choice(PLAIN)
    if kind < 0.7 and depth == 2:
        return ABSENT
    inner = [draw_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return inner if kind < 0.85 else {draw.choice(KEYS): one for one in inner}


def fuzz(examples: int) -> Any:
    """The same examples on every machine; a slow run draws many more of them."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def refusal(action: Callable[[], Any], given: Any = None) -> str | None:
    """What a user is told; None where all is well. Any other exception is a bug."""
    try:
        action()
    except ValueError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"a traceback for {given!r}") from error
    return None


# Hypothesis writes out the arguments of every example; a config has thousands of characters.
@dataclass(frozen=True)
class Base:
    """A composed config, its dotted keys, and what is said of it as it is."""

    node: dict[str, Any]
    keys: tuple[str, ...]
    refusal: str | None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"Base(of {len(self.keys)} keys)")


def walk(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if key not in CODE:
            yield f"{prefix}{key}"
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")


@pytest.fixture(scope="module")
def bases(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Base]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        hub_reachable.cache_clear()
        made = []
        for name, overrides in BASES.items():
            run_dir = tmp_path_factory.mktemp(name) / "run"
            base = [o for o in world.overrides(run_dir, "delta_kd", *overrides) if name != "text" or keeps(o)]
            node: Any = OmegaConf.to_container(compose_config("train", base))
            made.append(Base(node, tuple(walk(node)), refusal(lambda node=node: make_settings(changed(node, {})))))
        yield made
    hub_reachable.cache_clear()


def keeps(override: str) -> bool:
    return not override.startswith(("data.template", "data.max_prompt_length"))


def changed(node: dict[str, Any], changes: Mapping[str, Any]) -> DictConfig:
    """A copy of a config with other values; a key that another change has taken away stays away."""
    node = copy.deepcopy(node)
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner: Any = node
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            if value is ABSENT:
                inner.pop(last, None)
            else:
                inner[last] = value
    return OmegaConf.create(node)


def check_config(bases: list[Base], seed: int) -> None:
    draw = random.Random(seed)
    base = draw.choice(bases)
    changes = {key: draw_value(draw) for key in draw.sample(base.keys, k=draw.choice([1, 1, 2]))}
    told = refusal(lambda: make_settings(changed(base.node, changes)), changes)
    # A base may have a problem of its own, such as a cache that is not there.
    named = told is None or told == base.refusal or any(key.rpartition(".")[2] in told for key in changes)
    assert named, (changes, told)


@fuzz(100)
@given(seed=st.integers(0, 2**32))
def test_any_value_of_any_key_is_taken_or_refused_by_name(bases: list[Base], seed: int) -> None:
    check_config(bases, seed)


@pytest.mark.slow
@fuzz(2000)
@given(seed=st.integers(0, 2**32))
def test_any_value_of_any_key_is_taken_or_refused_by_name_many_times(bases: list[Base], seed: int) -> None:
    check_config(bases, seed)


RAW = st.sampled_from(
    ["", "'", "[", "[1", "{a:", "{a:1}", "{a}", "a,b", "1,2", "range(1,3)", "interval(0,1)", "choice(a,b)", "glob(*)",
     "${", "${seed}", "${x", "'no'", "no", "9" * 5000, "\\", "a=b", "null", "[null]", "{a:{b:[1,{c:'x'}]}}", "!x", "@a",
     "x" * 300]
)  # fmt: skip


@pytest.mark.slow
@fuzz(250)
@given(data=st.data())
def test_any_override_is_taken_or_refused_in_words(
    bases: list[Base], world: World, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from([*bases[0].keys, "loss/divergence", "nowhere", "a.b", "", "hydra.run.dir"]))
    sign = data.draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    override = f"{sign}{key}={data.draw(RAW)}"
    overrides = world.overrides(tmp_path_factory.getbasetemp() / "raw", "delta_kd")
    told = refusal(lambda: make_settings(compose_config("train", [*overrides, override])))
    assert told is None or told.strip(), override


TEXTS = st.sampled_from(
    ["", " ", "ask", "</s>", "<|im_start|>", "\ud83d", "{x}", "é\u2028", "\0", "x" * 300]
) | st.text(max_size=5)
TURN_KEYS = st.sampled_from(["role", "content", "x", "type", "text", "function", "name", "arguments"])
ANYTHING = TEXTS | st.recursive(
    st.none() | st.booleans() | st.sampled_from([0, -1, 0.5, 10**400, float("nan")]) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TURN_KEYS, inner, max_size=2),
    max_leaves=3,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "observation", "function_call"])
CALLS = st.sampled_from([[{"function": {"name": "f", "arguments": "{}"}}], [{"name": "f", "arguments": {"x": None}}]])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=2)
EXTRAS: dict[str, st.SearchStrategy[Any]] = {
    "tool_calls": CALLS | ANYTHING,
    "reasoning_content": TEXTS | ANYTHING,
    "tool_call_id": TEXTS | ANYTHING,
    "name": TEXTS | ANYTHING,
    "weight": st.sampled_from([0, 1, 0.0, True, False, None, 2, "0"]) | ANYTHING,
}
TURN = st.fixed_dictionaries({"role": ROLES | ANYTHING, "content": TEXTS | PARTS | ANYTHING}, optional=EXTRAS)
SHARED_TURN = st.fixed_dictionaries({"from": ROLES | ANYTHING, "value": TEXTS | st.just('{"name": "f"}') | ANYTHING})
GOOD_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS | PARTS},
    optional={"tool_calls": CALLS, "weight": st.sampled_from([0, 1]), "reasoning_content": TEXTS},
)
TURNS = st.lists(GOOD_TURN, max_size=4) | st.lists(TURN | SHARED_TURN | ANYTHING, max_size=3)
TURNS |= TURNS.map(lambda turns: json.dumps(turns)) | ANYTHING
FIELDS = [
    "instruction", "question", "input", "context", "response", "output", "answer", "prompt", "category", "text", "z",
    "completion", "chosen", "label", "system", "system_prompt", "history", "tools",
]  # fmt: skip
TALKS = ["messages", "conversations", "conversation", "prompt", "completion", "chosen", "response"]
ASIDE: dict[str, st.SearchStrategy[Any]] = {
    "system": TEXTS | ANYTHING,
    "history": st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=2) | ANYTHING,
    "tools": st.just([{"name": "f"}]) | ANYTHING,
}
RECORD = (
    st.dictionaries(st.sampled_from(FIELDS), TEXTS | ANYTHING, max_size=4)
    | st.dictionaries(st.sampled_from(TALKS), TURNS, min_size=1, max_size=2)
    | st.fixed_dictionaries({"messages": TURNS}, optional=ASIDE)
    | st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional=ASIDE)
)

#: As that of Gemma: roles must alternate, and there is no system.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + CHAT.split("{% for m in messages %}")[1]
)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def check_record(record: Any, path: Path, tokenizers: list[PreTrainedTokenizerFast]) -> None:
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    told = refusal(lambda: read_rows(str(path)), record)
    if told is not None:
        assert path.name in told
        return
    (row,) = read_rows(str(path))
    assert row == parse_row(record, "here", 0)
    # What a row holds comes back from its record, and goes into fingerprints.
    assert parse_row(row_record(row), "here", 0, need_response=False) == row
    assert json.loads(json.dumps(row_record(row), allow_nan=True)) == row_record(row) or "NaN" in json.dumps(record)
    for tokenizer in tokenizers:
        for template in (AlpacaTemplate(), ChatTemplate(tokenizer)):
            told = refusal(
                lambda template=template, tokenizer=tokenizer: encode_rows(
                    [row], template, tokenizer, max_length=200, max_prompt_length=100
                )
            )
            assert told is None or told.strip()


@pytest.fixture(scope="module")
def tokenizers() -> list[PreTrainedTokenizerFast]:
    return [tokenizer_with(CHAT), tokenizer_with(STRICT)]


@fuzz(200)
@given(record=RECORD | ANYTHING)
def test_any_record_is_a_row_or_refused_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: list[PreTrainedTokenizerFast], record: Any
) -> None:
    check_record(record, tmp_path_factory.getbasetemp() / "fuzzed.jsonl", tokenizers)


@pytest.mark.slow
@fuzz(3000)
@given(record=RECORD | ANYTHING)
def test_any_record_is_a_row_or_refused_with_its_place_many_times(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: list[PreTrainedTokenizerFast], record: Any
) -> None:
    check_record(record, tmp_path_factory.getbasetemp() / "fuzzed.jsonl", tokenizers)


CELLS = st.sampled_from(
    ["", "a", '"', '"a"', '"a\nb"', "NaN", "42", ",", ";", "\t", "\r", "\0", "\ud83d", "{", "[]", "x" * 300]
)
LINES = st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=4).map("\n".join)
FILES = LINES.map(lambda text: f"instruction,output\n{text}") | LINES | st.lists(RECORD, max_size=3).map(json.dumps)
FILES |= st.sampled_from(["PAR1", "ARROW1\0\0", "\ufeff", "null", "[[1]]", '{"data": [{}]}', '{}\n{"a": 1}'])
ENDINGS = ["jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow"]
ENDINGS += [f"{kind}.{end}" for kind in ("jsonl", "json", "csv", "tsv", "txt") for end in ("gz", "zst")]
COLUMN_MAPS = st.dictionaries(st.sampled_from(["instruction", "response", "text"]), CELLS, max_size=2)


def check_file(folder: Path, text: str, ending: str, squeezed: bool, columns: dict[str, str]) -> None:
    path = folder / f"fuzzed.{ending}"
    compression = {"gz": "gzip", "zst": "zstd"}.get(ending.rpartition(".")[2]) if squeezed else None
    with pa.output_stream(str(path), compression=compression) as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))
    try:
        for read in (read_rows, read_texts):
            told = refusal(lambda read=read: read(str(path), columns=columns), (text, columns))
            assert told is None or path.name in told
    finally:
        path.unlink()


@fuzz(200)
@given(text=FILES, ending=st.sampled_from(ENDINGS), squeezed=st.booleans(), columns=COLUMN_MAPS)
def test_any_file_under_any_name_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, text: str, ending: str, squeezed: bool, columns: dict[str, str]
) -> None:
    check_file(tmp_path_factory.getbasetemp(), text, ending, squeezed, columns)


@pytest.mark.slow
@fuzz(3000)
@given(text=FILES, ending=st.sampled_from(ENDINGS), squeezed=st.booleans(), columns=COLUMN_MAPS)
def test_any_file_under_any_name_is_read_or_refused_by_name_many_times(
    tmp_path_factory: pytest.TempPathFactory, text: str, ending: str, squeezed: bool, columns: dict[str, str]
) -> None:
    check_file(tmp_path_factory.getbasetemp(), text, ending, squeezed, columns)


def check_table(records: list[dict[str, Any]], path: Path) -> None:
    try:
        table = pa.Table.from_pylist(records)
        pa.parquet.write_table(table, path)
    # Arrow has types: most lists of drawn records are no table.
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return
    told = refusal(lambda: read_rows(str(path)), records)
    assert told is None or path.name in told


@fuzz(150)
@given(records=st.lists(RECORD, min_size=1, max_size=2))
def test_any_table_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    check_table(records, tmp_path_factory.getbasetemp() / "fuzzed.parquet")


@pytest.mark.slow
@fuzz(3000)
@given(records=st.lists(RECORD, min_size=1, max_size=2))
def test_any_table_is_read_or_refused_by_name_many_times(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]
) -> None:
    check_table(records, tmp_path_factory.getbasetemp() / "fuzzed.parquet")
