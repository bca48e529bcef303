"""Shift preservation of whole runs on tiny models."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltakd.cache import make_cache
from deltakd.data import Encoded
from deltakd.evaluation.answer_tokens import Pieces
from deltakd.evaluation.preservation import FILE
from deltakd.evaluation.token_groups import END, PUNCTUATION, WORD_START
from deltakd.io.run_directory import RunDirectory
from deltakd.report import preservation_of
from deltakd.types import IGNORE_INDEX, ROLES, STUDENT, TEACHER
from tests.tiny import World, save_model, write_rows

Train = Callable[..., RunDirectory]


def repoint(run: RunDirectory, **paths: str | None) -> None:
    """Let the run's config name other models."""
    config = yaml.safe_load(run.config.read_text())
    for role, path in paths.items():
        config["model"][role]["path"] = path
    run.config.write_text(yaml.safe_dump(config))


def test_figures_of_a_run_that_learnt_its_shift(train: Train, world: World) -> None:
    """The raw student moved by the teacher's shift is what delta_kd aims at, so the correlation has to grow."""
    run = train("delta_kd", "trainer.max_steps=40", "loss.ce_weight=0", "optim.lr=0.02")
    figures = preservation_of(run, rows=100, views=2)
    assert figures.missing == []
    assert figures.overall is not None
    overall = figures.overall
    # All eight validation rows, each token of them once.
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    answers = [json.loads(line)["response"] for line in (world.root / "val.jsonl").read_text().splitlines()]
    expected_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in answers)
    assert (overall.rows, overall.tokens) == (8, expected_tokens)
    assert sum(group.tokens for group in figures.by_position.values()) == expected_tokens
    assert sum(group.tokens for group in figures.by_class.values()) == expected_tokens
    assert figures.by_class[END].tokens == figures.by_position["0"].tokens == 8
    # Lightning's validation computed the same mean with other code, from the weights before the export.
    summary = run.read_summary()
    assert overall.measures["nll"].mean == pytest.approx(summary["val/ce"], rel=1e-5)
    correlation = overall.measures["correlation"].mean
    assert correlation is not None
    # Of a student that went elsewhere it is about 0.
    assert correlation > 0.3
    # The view shows the first rows, whole.
    assert [row.row_id for row in figures.token_view] == [0, 1]
    for row, answer in zip(figures.token_view, answers, strict=False):
        assert "".join(token.text for token in row.tokens[:-1]) == answer
        assert row.prompt.endswith(f"{answer}>")
        for token in row.tokens:
            assert set(token.candidates) == set(ROLES)
            for pairs in token.candidates.values():
                probabilities = [p for _, p in pairs]
                assert len(pairs) == 5
                assert 0 < sum(probabilities) <= 1
                assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.parametrize(
    "extra",
    [
        (),
        pytest.param(("reference=cached", "reference.path={tmp}/cache"), marks=pytest.mark.slow),
        pytest.param(("model/lora=default",), marks=pytest.mark.slow),
    ],
    ids=["live", "cached", "lora"],
)
def test_the_report_shows_the_numbers_of_the_summary(
    train: Train, world: World, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """On the same rows by the same arithmetic; only the order in which float64 means are summed up differs."""
    extra = tuple(override.format(tmp=tmp_path) for override in extra)
    if "reference=cached" in extra:
        make_cache(world.overrides(tmp_path / "unused", "delta_kd", *extra))
    run = train("delta_kd", "evaluation.measures.rows=5", *extra)
    summary, overall = run.read_summary(), preservation_of(run).overall
    assert overall is not None
    counts = summary["meta"]["measured"]["val"]
    assert (overall.rows, overall.tokens) == (counts["rows"], counts["tokens"])
    assert overall.undefined == counts["tokens_without_shift"]
    shown = {name: estimate.mean or 0.0 for name, estimate in overall.measures.items()}
    in_summary = {
        "val/perplexity": math.exp(shown["nll"]),
        "val/kl_teacher": shown["kl_teacher"],
        "val/top1_agreement": 100 * shown["top1_agreement"],
        "val/shift_correlation": shown["correlation"],
    }
    assert in_summary == pytest.approx({name: summary[name] for name in in_summary}, rel=1e-12)
    # Asked for another number of rows, it gives that one.
    assert (preservation_of(run, rows=2).overall or overall).rows == 2


def test_a_run_that_measures_nothing_is_measured_where_rows_are_given(train: Train) -> None:
    run = train("sft", "trainer.max_steps=1")
    assert "has evaluation.measures.rows=0; --preservation ROWS measures it" in preservation_of(run).missing[0]
    assert preservation_of(run, rows=1).overall is not None


def test_a_student_that_did_not_move_and_what_is_measured_again(
    train: Train, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = train("sft", "trainer.max_steps=1")
    shutil.rmtree(run.student)
    shutil.copytree(world.root / "student_raw", run.student)
    still = preservation_of(run, rows=3, views=0)
    assert still.overall is not None
    assert still.overall.undefined == still.overall.tokens > 0
    assert still.overall.measures["correlation"].mean is None
    assert still.overall.measures["kl_teacher"].mean == pytest.approx(still.overall.measures["kl_raw"].mean)
    assert (still.overall.rows, still.token_view) == (3, [])

    def loads(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr("deltakd.evaluation.preservation.open_exported", loads)
        assert preservation_of(run, rows=3, views=0) == still
        # A teacher that was cleared away since then can't have changed.
        repoint(run, teacher=str(tmp_path / "gone"))
        assert preservation_of(run, rows=3, views=0) == still
        repoint(run, teacher=str(world.root / "teacher"))
        for options in ({"rows": 2, "views": 0}, {"rows": 3, "views": 1}):
            with pytest.raises(AssertionError, match="was loaded"):
                preservation_of(run, **options)
    repoint(run, teacher=str(save_model(tmp_path / "other_teacher", seed=9, width=24)))
    other = preservation_of(run, rows=3, views=0)
    assert other.measured_on[TEACHER] != still.measured_on[TEACHER]
    assert other.overall != still.overall
    save_model(run.student, seed=8)
    moved = preservation_of(run, rows=3, views=0)
    assert moved.measured_on[STUDENT] != other.measured_on[STUDENT]
    assert moved.overall is not None
    assert moved.overall.undefined == 0
    (run.path / FILE).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert preservation_of(run, rows=3, views=0) == moved
    assert f"{FILE} can't be read" in caplog.text


def test_what_is_missing_is_said(train: Train, world: World, tmp_path: Path) -> None:
    validation = write_rows(tmp_path / "val.jsonl", [{"instruction": "Repeat 1", "context": "cat", "response": "cat"}])
    run = train("sft", "trainer.max_steps=1", f"data.val={validation}")
    gone = tmp_path / "gone" / "student"
    repoint(run, teacher=None, teacher_raw=str(gone))
    validation.unlink()
    missing = preservation_of(run, rows=64).missing
    assert [sentence.split(":")[0] for sentence in missing] == ["teacher", "teacher_raw", "held-out rows"]
    assert str(gone) in missing[1]
    assert "val.jsonl" in missing[2]
    assert not (run.path / FILE).exists()
    write_rows(validation, [{"instruction": "Repeat 1", "context": "cat", "response": "cat"}])
    shorter = save_model(tmp_path / "short", seed=4, n_positions=4)
    repoint(run, teacher=str(world.root / "teacher"), teacher_raw=str(shorter))
    (sentence,) = preservation_of(run, rows=64).missing
    assert sentence.startswith("teacher_raw: ")
    assert "positions for 4 tokens" in sentence
    shutil.rmtree(run.student)
    assert "not a finished run" in preservation_of(run, rows=64).missing[0]
    with pytest.raises(ValueError, match="limit is 0"):
        preservation_of(run, rows=0)


def test_positions_begin_anew_with_every_answer(world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.root / "teacher")
    ids = tokenizer("a red cat")["input_ids"]
    row = Encoded([ids[0], *ids, ids[0], *ids], [IGNORE_INDEX, *ids, IGNORE_INDEX, *ids], 0)
    tokens = list(Pieces(tokenizer).answer(row))
    assert [token.position for token in tokens] == [*range(len(ids)), *range(len(ids))]
    assert [row.input_ids[token.index] for token in tokens] == [token.id for token in tokens] == [*ids, *ids]
    assert "".join(token.text for token in tokens) == "a red cat" * 2


def test_a_token_keeps_its_space_where_decoding_strips_it() -> None:
    """SentencePiece's way: a space at the start of a text belongs to no word."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "▁a", "▁red", "▁cat", "."])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert tokenizer.decode([3]) == "cat"
    pieces = Pieces(tokenizer)
    assert [pieces[i] for i in (3, 4, 0)] == [" cat", ".", "</s>"]
    assert [token.kind for token in pieces.answer(Encoded([4, 3, 4, 0], [4, 3, 4, 0], 0))] == [
        WORD_START,
        PUNCTUATION,
        END,
    ]
