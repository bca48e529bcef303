"""Generate, score and store answers to the evaluation sets; stored answers are reused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, Row, encode_prompts
from deltakd.data.encoding.images import row_images
from deltakd.distributed.ranks import is_main_process
from deltakd.distributed.sharding import gathered, place
from deltakd.evaluation import METRIC_TITLES, EvaluationSet, by_task, evaluate_set, matches, scored, summarise
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
    strip: str | None = None,
) -> EvaluationSet:
    """Return prompts tokenised exactly as in training, with all their references.

    Args:
        name: name of the set.
        rows: its rows.
        data: gives the template and the maximum prompt length.
        tokenizer: the student's.
        scorer: scores the answers.
        rouge_tokenizer: the words that ROUGE compares.
        strip: as in ``EvaluationSet``.
    """
    template = data.make_template(tokenizer)
    prompt_ids, cut = encode_prompts(rows, template, tokenizer, data.max_prompt_length)
    images = [row_images(row, tokenizer) for row in rows]
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
        strip=strip,
        asked={"template": data.template, "max_prompt_length": data.max_prompt_length},
        cut=cut,
        tasks=[row.task for row in rows],
        images=images if any(images) else [],
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
    """Generate and score the answers to one set under all given sampling seeds at once, with a progress bar.

    Rows are split among the ranks, and every rank gets all records. Samples do not depend on the number of ranks.
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
            static_cache=evaluation.static_cache,
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
    """Evaluate all sets under all seeds; write the files of each set as soon as it is done.

    Seeds without a file are answered together, since they share their prompts. An interruption costs at most the
    answers to one set.

    Args:
        directory: holds ``<set>_seed<k>.jsonl``; a file that answers the same question is reused. Only the main
            process reads and writes.

    Returns:
        ``<set>/<metric>``, ``<set>/<metric>_stderr`` and ``<set>/<metric>_seed_std`` in per cent (see ``summarise``),
        and ``<set>/<measure>`` of ``text_measures``; if a set has several tasks, the same of each as
        ``<set>/<task>/...``.
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
        # Average in the order of the seeds, whichever were stored before.
        in_order = {seed: by_seed[seed] for seed in evaluation.seeds}
        summary = summarise(in_order) | text_measures(in_order)
        metrics |= {f"{eval_set.name}/{name}": value for name, value in summary.items()}
        for task, some in by_task(in_order).items():
            scores = summarise(some) | text_measures(some)
            metrics |= {f"{eval_set.name}/{task}/{name}": value for name, value in scores.items()}
    return metrics


def _stored(
    eval_set: EvaluationSet, evaluation: EvaluationSettings, directory: Path
) -> dict[int, list[dict[str, Any]]]:
    """Return the stored records by seed, as the main process read them; the same on all ranks.

    Answers stored under another scoring protocol are scored again.
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
    """Return the scores in one line for the log: ± over prompts, std over sampling seeds if there are several."""
    main = [k for k in metrics if k.endswith(tuple(f"/{metric}" for metric in METRIC_TITLES))]
    return ", ".join(
        f"{k} {metrics[k]:.2f} ± {metrics.get(k + '_stderr', 0.0):.2f}"
        + (f" (std over seeds {metrics[k + '_seed_std']:.2f})" if k + "_seed_std" in metrics else "")
        for k in main
    )
