"""Rows with images, from the file to trained students and their answers, in two families of models."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from deltakd.data import ChatTemplate, Encoded, collate, encode_prompts, encode_rows, parse_row, read_rows
from deltakd.data.encoding.encode import encode_batch
from deltakd.data.encoding.image_reader import _opened, _reader_at, image_bytes, reader_beside
from deltakd.evaluation.answers import make_set
from deltakd.generation import Decoding, generate
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel
from deltakd.references.index import keys_of_batch, keys_of_set
from tests.vision import FAMILIES, draw, image_rows, save_vision_model, write_images

_DRAWN = io.BytesIO()
Image.effect_noise((40, 40), 64).save(_DRAWN, format="PNG")
PNG = _DRAWN.getvalue()
GREEDY = Decoding(do_sample=False, max_new_tokens=8)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    for family in FAMILIES:
        for seed, role in enumerate(("student", "teacher", "teacher_raw")):
            save_vision_model(root / f"{family}_{role}", seed=seed, family=family)
    return root


def opened(models: Path, family: str, role: str = "student") -> tuple[Any, Any]:
    path = models / f"{family}_{role}"
    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_tokens_of_the_processor(family: str, models: Path, tmp_path: Path) -> None:
    """The processor itself, given the rendered text and the images, makes the same ids."""
    _, tokenizer = opened(models, family)
    rows = read_rows(write_images(tmp_path / "images", 4))
    encoded = encode_rows(rows, ChatTemplate(tokenizer), tokenizer, max_length=200, max_prompt_length=180)
    assert encoded.counts["images"] == 4
    reader = reader_beside(tokenizer)
    for row, one in zip(rows, encoded, strict=True):
        assert row.messages is not None
        text = tokenizer.apply_chat_template(list(row.messages), tokenize=False)
        expected = reader._processor(images=[[_image(i) for i in row.images]], text=[text])["input_ids"][0]
        # The template's line break after the last turn is not trained.
        assert list(expected)[: len(one.input_ids)] == one.input_ids
        assert len(expected) - len(one.input_ids) <= 1
        assert reader.token_id in one.input_ids
        assert reader.token_id not in one.labels


def _image(image: str) -> Any:
    return _opened(image, image_bytes(image))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_row_says_alone_in_the_model_itself(family: str, models: Path, tmp_path: Path) -> None:
    """Hidden states of padded rows, some of text alone, give the logits of transformers' whole model on each row."""
    hf, tokenizer = opened(models, family)
    model = LanguageModel(hf, len(tokenizer))
    rows = read_rows(write_images(tmp_path / "images", 6, text_too=True))
    encoded = encode_rows(rows, ChatTemplate(tokenizer), tokenizer, max_length=200, max_prompt_length=180)
    batch = collate(list(encoded), 0, 0, 0)
    assert batch.images is not None
    with torch.no_grad():
        ours = model(batch).logits()
        alone, blind = [], []
        for one in encoded:
            ids = torch.tensor([one.input_ids])
            options: dict[str, Any] = {}
            if one.images is not None:
                reader, images = one.images.reader, one.images.images
                text = [reader.token * len(images)]
                options = dict(reader._processor(images=[list(map(_image, images))], text=text, return_tensors="pt"))
                options = {k: v for k, v in options.items() if k.startswith(("pixel", "image_", "batch_num"))}
                if "qwen" in family:
                    options["mm_token_type_ids"] = (ids == one.images.reader.token_id).long()
            valid = [t - 1 for t, label in enumerate(one.labels) if t and label != -100]
            alone.append(hf(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0, valid])
            blind.append(hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, valid])
    torch.testing.assert_close(ours, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (ours - torch.cat(blind)).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_of_transformers_alone(family: str, models: Path, tmp_path: Path) -> None:
    """Greedy answers, with prompts that join the batch later, against one full forward pass for each token."""
    hf, tokenizer = opened(models, family)
    rows = read_rows(write_images(tmp_path / "images", 5, text_too=True))
    template = ChatTemplate(tokenizer)
    prompts, _ = encode_prompts(rows, template, tokenizer, 180)
    model = LanguageModel(hf, len(tokenizer))

    class Data:
        template = "chat"
        max_prompt_length = 180

        def make_template(self, tokenizer: Any) -> Any:
            return ChatTemplate(tokenizer)

    data: Any = Data()
    asked = make_set("some", rows, data, tokenizer)
    eos = frozenset({tokenizer.eos_token_id})
    options: dict[str, Any] = {"decoding": GREEDY, "seeds": [0], "eos_ids": eos, "vocab_size": len(tokenizer)}
    answers = generate(
        hf, prompts, [row.id for row in rows], batch_size=2, pad_id=0, images=asked.read_images, **options
    )[0]
    for row, prompt, images, answer in zip(rows, prompts, asked.images, answers, strict=True):
        ids, said = list(prompt), []
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                one = collate([Encoded([*ids, 0], [-100] * len(ids) + [0], row.id, images=images)], 0, 0, 0)
                token = int(model(one).logits()[-1].argmax())
            if token in eos:
                break
            said.append(token)
            ids.append(token)
        assert said == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_images_from_start_to_export(
    family: str, models: Path, train: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    """Delta-KD with live references, LoRA, validation, answers, measures; the export reads images."""
    data = write_images(tmp_path / "train", 10)
    val = write_images(tmp_path / "val", 4, first=20)
    run = train(
        "delta_kd",
        *[f"model.{role}.path={models / f'{family}_{role}'}" for role in ("student", "teacher", "teacher_raw")],
        f"data.train={data}", f"data.val={val}", "data.template=chat", "data.max_length=200",
        "data.max_prompt_length=180", "data.batch_size=3", "trainer.max_steps=3", "model/lora=default",
        "evaluation=default", "evaluation.val_limit=3", "evaluation.decoding.max_new_tokens=4",
        "evaluation.measures.rows=3",
    )  # fmt: skip
    summary = run.read_summary()
    assert summary["meta"]["steps"] == 3
    assert "val/rougeL" in summary
    reader = _reader_at(str(run.student))
    assert reader.identity == _reader_at(str(models / f"{family}_student")).identity


def test_what_a_run_with_images_cannot_do_is_named_at_once(
    models: Path, train: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    data = write_images(tmp_path / "train", 6)
    other = save_vision_model(tmp_path / "other", seed=1, pixels=112)
    paths = [f"model.{role}.path={models / f'qwen2_vl_{role}'}" for role in ("student", "teacher", "teacher_raw")]
    base = [*paths, f"data.train={data}", "data.val=null", "data.template=chat", "data.max_length=200"]
    base += ["data.max_prompt_length=180", "trainer.max_steps=1"]
    with pytest.raises(ValueError, match=r"(?s)data.packing=false.*model.teacher.path=.* another image processor"):
        train("delta_kd", *base, "data.packing=true", f"model.teacher.path={other}", name="a")
    with pytest.raises(ValueError, match=r"rollout.engine=vllm is sent text alone; give rollout.engine=own"):
        train(
            "delta_kd", *base, "rollout=student", "rollout.engine=vllm", "rollout.vllm.url=http://127.0.0.1:1", name="c"
        )
    with pytest.raises(ValueError, match=r"an image in messages\[0\], which a plain template can't write"):
        train("delta_kd", *base, "data.template=alpaca", name="d")
    with pytest.raises(ValueError, match=r"\d+ tokens, \d+ of them for its images, which can't be cut"):
        train("delta_kd", *base, "data.max_prompt_length=16", name="e")


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen2_5_vl", {"image_processor": {"merge_size": 1}}, "has merge_size=1, and model.student needs 2"),
        ("idefics3", {"image_seq_len": 9}, "has image_seq_len=9, and model.student needs 4"),
        ("llava_onevision", {"num_image_tokens": 9}, "has num_image_tokens=9, and model.student needs 4"),
    ],
)
def test_a_processor_of_another_model_is_refused(
    family: str, change: dict[str, Any], said: str, models: Path, train: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    """Before weights load, instead of a shape that does not fit in the middle of a batch."""
    student = tmp_path / "student"
    shutil.copytree(models / f"{family}_student", student)
    file = student / "processor_config.json"
    settings = json.loads(file.read_text())
    for key, value in change.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(settings))
    data = write_images(tmp_path / "train", 3)
    chosen = [f"model.student.path={student}", f"data.train={data}", "data.val=null", "data.template=chat"]
    with pytest.raises(ValueError, match=said):
        train("sft", *chosen, "data.max_length=250", "data.max_prompt_length=240")


def test_rows_that_a_model_of_text_is_given_are_refused(train: Callable[..., RunDirectory], tmp_path: Path) -> None:
    data = write_images(tmp_path / "train", 3)
    with pytest.raises(ValueError, match=r"an image in messages\[0\]"):
        train("sft", f"data.train={data}", "data.val=null")


def test_a_missing_and_a_changed_image_are_named(models: Path, tmp_path: Path) -> None:
    _, tokenizer = opened(models, "qwen2_vl")
    source = write_images(tmp_path / "images", 2, first=1)
    options: dict[str, Any] = {"max_length": 200, "max_prompt_length": 180}
    encoded = encode_rows(read_rows(source), ChatTemplate(tokenizer), tokenizer, **options)
    draw(tmp_path / "images" / "1.png", "blue", (32, 52))
    draw(tmp_path / "images" / "1.png", "red", (32, 52))
    with pytest.raises(ValueError, match=r"an image has changed since its row was tokenised \(among .*1\.png"):
        collate([encoded[0]], 0, 0, 0)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"row 0 .*: the image .*1\.png can't be read: there is no such file"):
        encode_rows(read_rows(source), ChatTemplate(tokenizer), tokenizer, **options)


def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert _image(str(tmp_path / "a.jpg")).size == (10, 30)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "Pillow does not recognise it as an image"),
        ("text.png", b"hello", "Pillow does not recognise it as an image"),
        ("cut.png", PNG[:100], "image file is truncated"),
        ("a\0.png", None, "embedded null byte"),
    ],
)
def test_a_broken_image_is_named(name: str, content: bytes | None, reason: str, models: Path, tmp_path: Path) -> None:
    _, tokenizer = opened(models, "idefics3")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    parts = [{"type": "image", "image": str(tmp_path / name)}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    row = parse_row({"messages": turns}, "file:1", 0)
    with pytest.raises(ValueError, match=rf"row 0 \(file:1\): the image .* can't be read: {reason}"):
        encode_rows([row], ChatTemplate(tokenizer), tokenizer, max_length=200, max_prompt_length=180)


def test_image_tokens_are_never_cut_in_half(models: Path, tmp_path: Path) -> None:
    """At every limit a row keeps all of its image tokens, or is an error; dropped rows are counted."""
    _, tokenizer = opened(models, "qwen2_5_vl")
    rows = read_rows(write_images(tmp_path / "images", 3))
    token, kept = reader_beside(tokenizer).token_id, 0
    whole = encode_rows(rows, ChatTemplate(tokenizer), tokenizer, max_length=200, max_prompt_length=180)
    for limit in range(20, 60, 4):
        for one in whole:
            row = next(row for row in rows if row.id == one.row_id)
            options: dict[str, Any] = {"max_length": limit + 8, "max_prompt_length": limit}
            [outcome] = encode_batch([row], ChatTemplate(tokenizer), tokenizer, **options)
            if outcome.encoded is None:
                assert "which can't be cut" in str(outcome.problem)
            else:
                kept += 1
                assert outcome.encoded.input_ids.count(token) == one.input_ids.count(token)
    assert kept
    limits = {"max_length": int(whole.lengths.max()) - 1, "max_prompt_length": int(whole.lengths.max()) - 2}
    short = encode_rows(rows, ChatTemplate(tokenizer), tokenizer, overlong="drop", **limits)
    assert short.counts["dropped"] == 3 - len(short) > 0


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "has an image that is None"),
        ("https://example.org/a.png", "images are not fetched"),
        ("data:text/plain;base64,aGk=", "its bytes must follow 'data:image;base64,'"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, reason: str) -> None:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    with pytest.raises(ValueError, match=reason):
        parse_row({"messages": turns}, "file:1", 0)


def test_rows_that_differ_in_their_images_alone_have_keys_of_their_own(models: Path, tmp_path: Path) -> None:
    """The same words and sizes: a cache of references must not take one for the other."""
    _, tokenizer = opened(models, "qwen2_vl")
    for colour in ("red", "blue"):
        draw(tmp_path / f"{colour}.png", colour, (28, 28))
    asked = [{"type": "image", "image": None}, {"type": "text", "text": "what?"}]
    rows = []
    for image in ("red.png", "blue.png", None):
        parts = [asked[0] | {"image": str(tmp_path / image)}, asked[1]] if image else asked[1:]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "so"}]
        rows.append(parse_row({"messages": turns}, "", len(rows)))
    encoded = encode_rows(rows, ChatTemplate(tokenizer), tokenizer, max_length=200, max_prompt_length=180)
    assert encoded[0].input_ids == encoded[1].input_ids
    keys = keys_of_set(encoded)
    assert len({key.tobytes() for key in keys}) == 3
    assert (keys_of_batch(collate([encoded[1], encoded[2]], 0, 0, 0)) == keys[1:]).all()


def test_an_answer_holds_no_image() -> None:
    turns = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
    ]
    with pytest.raises(ValueError, match=r"\(assistant\) holds an image; only user turns may"):
        parse_row({"messages": turns}, "file:1", 0)


def test_the_same_question_on_another_image_is_another_task(tmp_path: Path) -> None:
    first, second = (json.loads(json.dumps(row).replace("colour 1", "colour 0")) for row in image_rows(tmp_path, 2))
    assert parse_row(first, "", 0).question != parse_row(second, "", 0).question
