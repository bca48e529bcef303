"""Read, check (against training data and model) and record a run's evaluation sets before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deltakd.data import DataConfig, Overlap, OverlapSearch, Row
from deltakd.evaluation import EvaluationSet, find_scorer
from deltakd.evaluation.answers import make_set
from deltakd.evaluation.scoring import stripped
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.generation.model_step import positions_of
from deltakd.io.errors import ConfigError
from deltakd.io.wording import listed
from deltakd.models.vocabulary import head_rows, unknown_prompt_problems

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedSets:
    """Evaluation sets that passed all checks.

    Args:
        sets: in the order of the config.
        record: the full protocol, for ``summary.json``: prompts, decoding and scoring.
    """

    sets: list[EvaluationSet]
    record: dict[str, Any]


def read_checked_sets(
    evaluation: EvaluationSettings,
    deviations: Sequence[str],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
    train_rows: Sequence[Row] | None,
    val_rows: Sequence[Row] = (),
) -> CheckedSets:
    """Read every evaluation set; report all problems at once.

    References of the validation rows are checked, too: their answers are scored during training.

    Args:
        evaluation: the group ``evaluation``.
        deviations: its differences from the protocol that it names.
        data: gives template and prompt length if the evaluation sets none.
        tokenizer: the student's.
        model: the student's configuration.
        train_rows: the training rows; None if unknown or absent.
        val_rows: the rows that the student answers during training.

    Raises:
        ConfigError: lists every problem: unreadable files and rows, references that are missing, empty or without
            anything that their scorer compares, prompts that fill the model's context, rows that are also trained on.
    """
    asked = evaluation.prompts_of(data)
    positions = positions_of(model)
    problems = _reference_problems("val", val_rows[: evaluation.val_limit], evaluation.val_scorer, evaluation)
    search = None if train_rows is None else OverlapSearch(train_rows, data.cache_dir)
    sets, described = [], {}
    for name, entry in evaluation.sets.items():
        try:
            rows = evaluation.rows_of(name, data)
            one = make_set(name, rows, asked, tokenizer, evaluation.scorer_of(name), **evaluation.comparison)
        except ValueError as error:
            problems.append(f"evaluation.sets.{name}: {error}")
            continue
        overlaps = None if search is None else search.overlaps(rows)
        short = _short_of_room(one, positions, evaluation.decoding.max_new_tokens)
        problems += _reference_problems(name, rows, one.scorer, evaluation)
        problems += unknown_prompt_problems(
            f"evaluation set {name}", one.prompt_ids, one.row_ids, tokenizer, head_rows(model)
        )
        problems += _context_problems(one, positions, asked.max_prompt_length)
        if overlaps and evaluation.allow_overlap:
            log.warning("%s; evaluation.allow_overlap=true lets it pass.", _overlapping(name, len(rows), overlaps))
        elif overlaps:
            problems.append(
                f"{_overlapping(name, len(rows), overlaps)}; keep them out of training with "
                f"data.exclude=[{entry.source}], or evaluate all the same with evaluation.allow_overlap=true"
            )
        sets.append(one)
        described[name] = asdict(entry) | {
            "scorer": one.scorer,
            "limit": evaluation.limit_of(name),
            "rows": len(rows),
            "prompts_cut": one.cut,
            "prompts_short_of_room": len(short),
            "overlap": None if overlaps is None else _overlap_record(overlaps),
        }
    if problems:
        raise ConfigError(problems)
    return CheckedSets(sets, _record(evaluation, deviations, asked, tokenizer, described))


def _record(
    evaluation: EvaluationSettings,
    deviations: Sequence[str],
    asked: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Any],
) -> dict[str, Any]:
    if deviations:
        log.warning("The evaluation is not %s as published: %s.", evaluation.protocol, "; ".join(deviations))
    scorers = dict.fromkeys([evaluation.val_scorer, *(entry["scorer"] for entry in sets.values())])
    return {
        "protocol": evaluation.protocol,
        "deviations": list(deviations),
        "template": asked.template,
        "template_text": repr(asked.make_template(tokenizer)),
        "max_prompt_length": asked.max_prompt_length,
        "padding": "left",
        "strip_answers": asked.strip_answers,
        "columns": asked.columns,
        "seeds": list(evaluation.seeds),
        "decoding": asdict(evaluation.decoding),
        **evaluation.comparison,
        "scorers": {name: find_scorer(name, evaluation.rouge_tokenizer).description for name in scorers},
        "sets": dict(sets),
    }


def _reference_problems(name: str, rows: Sequence[Row], scorer: str, evaluation: EvaluationSettings) -> list[str]:
    """Return why answers to the rows can't be scored; warn of problems that only lower every method's scores."""
    reads = find_scorer(scorer, evaluation.rouge_tokenizer).reads
    # Numbers are compared with those of all references; ROUGE takes the best reference of a row.
    enough = any if scorer == "rouge" else all
    texts = {row.id: [stripped(text, evaluation.strip) for text in row.references] for row in rows}
    where = "the validation rows" if name == "val" else f"evaluation set {name}"
    gone = [row.id for row in rows if row.references and not any(text.strip() for text in texts[row.id])]
    if gone:
        return [
            f"{where}: of {len(gone)} of {len(rows)} rows evaluation.strip leaves nothing of the references (rows "
            f"{listed(gone)}): {evaluation.strip!r} matches all of them; give another expression, or "
            "evaluation.strip=null"
        ]
    bad = [row for row in rows if not enough(map(reads, texts[row.id]))]
    if not bad:
        return []
    told = f"{where}: {len(bad)} of {len(rows)} rows have "
    shown = f"(rows {listed([row.id for row in bad])})"
    if scorer == "final_number":
        key = "evaluation.scorer=rouge" if name == "val" else f"evaluation.sets.{name}={{source: ..., scorer: rouge}}"
        return [
            f"{told}a reference without a number {shown}, and it is scored by final_number; give references that end "
            f'in "#### <number>", or {key}'
        ]
    told += f"references in which ROUGE finds no word {shown}, so that every answer scores 0 there"
    in_all_scripts = find_scorer(scorer, "unicode").reads
    cured = sum(any(map(in_all_scripts, texts[row.id])) for row in bad)
    remedy = f"; evaluation.rouge_tokenizer=unicode reads {cured} of them, with other numbers than published ones"
    if cured and len(bad) == len(rows):
        return [f"{told}{remedy}"]
    log.warning("%s%s.", told, remedy if cured else "; exact match compares them")
    return []


def _context_problems(one: EvaluationSet, positions: int | None, limit: int) -> list[str]:
    full = _short_of_room(one, positions, 1)
    if not full:
        return []
    return [
        f"evaluation set {one.name}: {len(full)} of {len(one)} prompts are as long as the model's context of "
        f"{positions} tokens (rows {listed(full)}), so nothing can be generated; give evaluation.max_prompt_length "
        f"below {positions} (it is {limit}), or a model with more positions"
    ]


def _short_of_room(one: EvaluationSet, positions: int | None, tokens: int) -> list[int]:
    """Return the rows whose prompts leave room for fewer than ``tokens`` tokens."""
    if positions is None:
        return []
    return [row for row, ids in zip(one.row_ids, one.prompt_ids, strict=True) if len(ids) + tokens > positions]


def _overlapping(name: str, rows: int, overlaps: Sequence[Overlap]) -> str:
    exact = sum(overlap.exact for overlap in overlaps)
    pairs = [f"{overlap.row_id}={overlap.other_id}" for overlap in overlaps]
    return (
        f"evaluation set {name}: of {rows} rows {exact} are in the training data, and {len(overlaps) - exact} nearly "
        f"(its row = row of data.train: {listed(pairs)})"
    )


def _overlap_record(overlaps: Sequence[Overlap]) -> dict[str, list[tuple[int, int]]]:
    """Return pairs of row and training row, by kind."""
    return {
        kind: [(o.row_id, o.other_id) for o in overlaps if o.exact == is_exact]
        for kind, is_exact in (("exact", True), ("near", False))
    }
