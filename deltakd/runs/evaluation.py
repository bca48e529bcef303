"""Answers to the evaluation sets: generated, scored, written down; what is there already is not done again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, Row, encode_prompts
from deltakd.evaluation import (
    METRIC_TITLES,
    EvaluationSet,
    evaluate_set,
    matches,
    read_generations,
    scored,
    summarise,
    write_generations,
)
from deltakd.evaluation.text_measures import text_measures
from deltakd.runs.evaluation_config import Evaluation
from deltakd.runs.progress import current_display
from deltakd.runs.ranks import is_main_process
from deltakd.sharding import gathered, place

log = logging.getLogger(__name__)


def make_set(
    name: str, rows: Sequence[Row], data: DataConfig, tokenizer: PreTrainedTokenizerBase, scorer: str = "rouge"
) -> EvaluationSet:
    """Prompts exactly as training would tokenise them, with all their references.

    Args:
        name: of the set.
        rows: its rows.
        data: whose template and prompt length they get.
        tokenizer: the student's.
        scorer: of the answers.
    """
    template = data.make_template(tokenizer)
    prompt_ids, cut = encode_prompts(rows, template, tokenizer, data.max_prompt_length)
    if cut:
        log.warning("%d of %d prompts of %s were cut to %d tokens.", cut, len(rows), name, data.max_prompt_length)
    return EvaluationSet(
        name=name,
        row_ids=[row.id for row in rows],
        prompts=[str(tokenizer.decode(ids)) for ids in prompt_ids],
        prompt_ids=prompt_ids,
        references=[row.references for row in rows],
        scorer=scorer,
        asked={"template": data.template, "max_prompt_length": data.max_prompt_length},
    )


def pad_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """Any id that all models know will do under an attention mask: the tokenizer's own, if they do, else 0."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary else 0


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_set: EvaluationSet,
    evaluation: Evaluation,
    seed: int,
    vocabulary: int,
    show_progress: bool,
) -> list[dict[str, Any]]:
    """Generate and score the answers of one set under one sampling seed, behind a progress bar.

    Each rank answers every so many rows; samples do not depend on how many ranks there are, and all get all records.
    """
    rank, world_size = place()
    mine = eval_set.part(rank, world_size)
    with progress_bar(f"{eval_set.name} seed {seed}", len(mine), show_progress) as advance, torch.no_grad():
        records = evaluate_set(
            model,
            tokenizer,
            mine,
            decoding=evaluation.decoding,
            seed=seed,
            batch_size=evaluation.batch_size,
            vocab_size=vocabulary,
            pad_id=pad_id(tokenizer, vocabulary),
            progress=advance,
        )
    by_row = {record["row_id"]: record for part in gathered(records) for record in part}
    return [by_row[row_id] for row_id in eval_set.row_ids]


@contextmanager
def progress_bar(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; what it gives is called with the number of rows done so far.

    Where a display is shared by several runs, the progress goes there.
    """
    display = current_display()
    if display is not None:
        yield lambda done: display.progress(description, done, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)


def evaluate_sets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[EvaluationSet],
    evaluation: Evaluation,
    vocabulary: int,
    directory: Path,
    show_progress: bool = True,
) -> dict[str, float]:
    """Evaluate all sets under all seeds; each pair's file is written as soon as it is done.

    Args:
        directory: ``<set>_seed<k>.jsonl``; a file that answers the same question is used again. The main process
            reads and writes.

    Returns:
        ``<set>/<metric>``, ``<set>/<metric>_stderr`` and ``<set>/<metric>_seed_std`` in per cent, see ``summarise``;
        and ``<set>/<measure>`` of ``text_measures``.
    """
    metrics: dict[str, float] = {}
    for eval_set in sets:
        by_seed: dict[int, list[dict[str, Any]]] = {}
        for seed in evaluation.seeds:
            path = directory / f"{eval_set.name}_seed{seed}.jsonl"
            # A joint decision: all ranks answer, or all take what the main process has read.
            records = gathered(_stored(path, eval_set, evaluation, seed) if is_main_process() else None)[0]
            if records is None:
                if by_seed and not evaluation.decoding.do_sample:
                    # Greedy answers do not depend on a seed.
                    records = [_with_seed(record, seed) for record in next(iter(by_seed.values()))]
                else:
                    records = answer(model, tokenizer, eval_set, evaluation, seed, vocabulary, show_progress)
                if is_main_process():
                    write_generations(path, records)
            by_seed[seed] = records
        summary = summarise(by_seed) | text_measures(by_seed)
        metrics |= {f"{eval_set.name}/{name}": value for name, value in summary.items()}
    return metrics


def _stored(path: Path, eval_set: EvaluationSet, evaluation: Evaluation, seed: int) -> list[dict[str, Any]] | None:
    """The answers of a file, if they answer this question; scored anew where they were scored otherwise."""
    records = read_generations(path)
    if records is None or not matches(records, eval_set, evaluation.decoding, seed):
        return None
    if any(record.get("protocol") != eval_set.protocol for record in records):
        records = scored(records, eval_set)
        write_generations(path, records)
    return records


def _with_seed(record: dict[str, Any], seed: int) -> dict[str, Any]:
    return record | {"seed": seed, "decoding": record["decoding"] | {"seed": seed}}


def shown(metrics: Mapping[str, float]) -> str:
    """One line of the main scores, for the log: ± over prompts, and over sampling seeds where there are several."""
    main = [k for k in metrics if k.endswith(tuple(f"/{metric}" for metric in METRIC_TITLES))]
    return ", ".join(
        f"{k} {metrics[k]:.2f} ± {metrics.get(k + '_stderr', 0.0):.2f}"
        + (f" (std over seeds {metrics[k + '_seed_std']:.2f})" if k + "_seed_std" in metrics else "")
        for k in main
    )
