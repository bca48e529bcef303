"""Answers to the evaluation sets: generated, scored, written down; what is there already is not done again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, Row, encode_prompts
from deltakd.distributed.ranks import is_main_process
from deltakd.distributed.sharding import gathered, place
from deltakd.evaluation import METRIC_TITLES, EvaluationSet, evaluate_set, matches, scored, summarise
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.evaluation.text_measures import text_measures
from deltakd.io.files import read_json_lines, write_json_lines
from deltakd.io.progress import progress_bar
from deltakd.models.tokenizers import pad_id

log = logging.getLogger(__name__)


def make_set(
    name: str,
    rows: Sequence[Row],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    scorer: str = "rouge",
    rouge_tokenizer: str = "default",
) -> EvaluationSet:
    """Prompts exactly as training would tokenise them, with all their references.

    Args:
        name: of the set.
        rows: its rows.
        data: whose template and prompt length they get.
        tokenizer: the student's.
        scorer: of the answers.
        rouge_tokenizer: the words that ROUGE compares.
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
        rouge_tokenizer=rouge_tokenizer,
        asked={"template": data.template, "max_prompt_length": data.max_prompt_length},
        cut=cut,
    )


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_set: EvaluationSet,
    evaluation: EvaluationSettings,
    seeds: Sequence[int],
    vocabulary: int,
    show_progress: bool,
) -> dict[int, list[dict[str, Any]]]:
    """Generate and score the answers of one set under some sampling seeds together, behind a progress bar.

    Each rank answers every so many rows; samples do not depend on how many ranks there are, and all get all records.
    """
    rank, world_size = place()
    mine = eval_set.part(rank, world_size)
    description = f"{eval_set.name} seed {', '.join(map(str, seeds))}"
    with progress_bar(description, len(mine) * len(seeds), show_progress) as advance, torch.no_grad():
        by_seed = evaluate_set(
            model,
            tokenizer,
            mine,
            decoding=evaluation.decoding,
            seeds=seeds,
            batch_size=evaluation.batch_size,
            vocab_size=vocabulary,
            pad_id=pad_id(tokenizer, vocabulary),
            progress=advance,
        )
    parts = gathered(by_seed)
    return {seed: _in_order([record for part in parts for record in part[seed]], eval_set) for seed in seeds}


def _in_order(records: list[dict[str, Any]], eval_set: EvaluationSet) -> list[dict[str, Any]]:
    by_row = {record["row_id"]: record for record in records}
    return [by_row[row_id] for row_id in eval_set.row_ids]


def evaluate_sets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[EvaluationSet],
    evaluation: EvaluationSettings,
    vocabulary: int,
    directory: Path,
    show_progress: bool = True,
) -> dict[str, float]:
    """Evaluate all sets under all seeds; the files of a set are written as soon as it is done.

    The seeds of a set that have no file yet are answered together, since they share their prompts: an interruption
    costs the answers to one set at most.

    Args:
        directory: ``<set>_seed<k>.jsonl``; a file that answers the same question is used again. The main process
            reads and writes.

    Returns:
        ``<set>/<metric>``, ``<set>/<metric>_stderr`` and ``<set>/<metric>_seed_std`` in per cent, see ``summarise``;
        and ``<set>/<measure>`` of ``text_measures``.
    """
    metrics: dict[str, float] = {}
    for eval_set in sets:
        by_seed = _stored(eval_set, evaluation, directory)
        missing = [seed for seed in evaluation.seeds if seed not in by_seed]
        if missing and by_seed and not evaluation.decoding.do_sample:
            # Greedy answers do not depend on a seed.
            made = {seed: [_with_seed(record, seed) for record in next(iter(by_seed.values()))] for seed in missing}
        elif missing:
            made = answer(model, tokenizer, eval_set, evaluation, missing, vocabulary, show_progress)
        else:
            made = {}
        if is_main_process():
            for seed, records in made.items():
                write_json_lines(_file(directory, eval_set, seed), records, "answers")
        by_seed |= made
        # Averages are of the seeds in their order, whichever were there before.
        in_order = {seed: by_seed[seed] for seed in evaluation.seeds}
        summary = summarise(in_order) | text_measures(in_order)
        metrics |= {f"{eval_set.name}/{name}": value for name, value in summary.items()}
    return metrics


def _stored(
    eval_set: EvaluationSet, evaluation: EvaluationSettings, directory: Path
) -> dict[int, list[dict[str, Any]]]:
    """The records of the seeds that are done, the same on all ranks: what the main process has read.

    Answers that were scored otherwise are scored anew.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for seed in evaluation.seeds if is_main_process() else ():
        path = _file(directory, eval_set, seed)
        records = read_json_lines(path)
        if records is None or not matches(records, eval_set, evaluation.decoding, seed):
            continue
        if any(record.get("protocol") != eval_set.protocol for record in records):
            records = scored(records, eval_set)
            write_json_lines(path, records, "answers")
        found[seed] = records
    stored: dict[int, list[dict[str, Any]]] = gathered(found)[0]
    return stored


def _file(directory: Path, eval_set: EvaluationSet, seed: int) -> Path:
    return directory / f"{eval_set.name}_seed{seed}.jsonl"


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
