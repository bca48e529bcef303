"""Evaluate a model on a set of prompts: generate, score, average over seeds and rows (docs/design.md#evaluation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltakd.data.encoding.images import RowImages, read_images
from deltakd.evaluation.scoring import METRICS, score
from deltakd.generation.decoding import Decoding
from deltakd.generation.generator import answer_budget, generate
from deltakd.generation.model_step import end_tokens, position_limit

Record = dict[str, Any]

#: Where a record's ``protocol`` says which words ROUGE compared, if they were not the default ones, and what was
#: stripped, if anything was.
ROUGE_WORDS, STRIP = "rouge_tokenizer", "strip"


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts with their references.

    Args:
        name: name of the set in results.
        row_ids: n distinct numbers ≥ 0, the rows in the data set; they fix the sampling noise.
        prompts: the rendered texts, for the record only.
        prompt_ids: their token ids, as the model gets them.
        references: at least one good answer to each prompt.
        scorer: the scorer of the answers, one of ``SCORERS``.
        rouge_tokenizer: the words that ROUGE compares.
        strip: a regular expression; what it matches in answers and references is not scored. Records keep it.
        asked: how the prompts were made (template, length limit), for the record only.
        cut: how many prompts were longer than the length limit, for the record only.
        tasks: each row's task, or None; empty: no row has one.
        images: of each row, or None; empty: no row has any.

    Raises:
        ValueError: the lengths differ, or a row id occurs twice.
    """

    name: str
    row_ids: list[int]
    prompts: list[str]
    prompt_ids: list[list[int]]
    references: list[tuple[str, ...]]
    scorer: str = "rouge"
    rouge_tokenizer: str = "default"
    strip: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    cut: int = 0
    tasks: list[str | None] = field(default_factory=list)
    images: list[RowImages | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        lengths = {key: len(getattr(self, key)) for key in ("row_ids", "prompts", "prompt_ids", "references")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The evaluation set {self.name!r} has lists of unequal length: {lengths}.")
        if len(set(self.row_ids)) != len(self.row_ids):
            raise ValueError(f"The evaluation set {self.name!r} repeats row ids: number each row once.")

    def __len__(self) -> int:
        return len(self.row_ids)

    def part(self, number: int, parts: int) -> EvaluationSet:
        """Return every ``parts``-th row, starting at row ``number``; the parts together make up the set."""
        rows = slice(number, None, parts)
        names = ("row_ids", "prompts", "prompt_ids", "references", "tasks", "images")
        lists = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **lists)

    def read_images(self, places: Sequence[int]) -> dict[str, Tensor] | None:
        """Return the tensors of the images of these rows; None: they have none."""
        return read_images((self.images[place], self.prompt_ids[place]) for place in places)

    @property
    def protocol(self) -> dict[str, Any]:
        """How prompts are made and answers scored, apart from decoding, as stored in each record."""
        protocol = {**self.asked, "scorer": self.scorer}
        if self.scorer == "rouge" and self.rouge_tokenizer != "default":
            # The default is not recorded, so that answers scored before there was a choice need not be scored anew.
            protocol[ROUGE_WORDS] = self.rouge_tokenizer
        if self.strip is not None:
            protocol[STRIP] = self.strip
        return protocol


def answer_set(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    eval_set: EvaluationSet,
    *,
    decoding: Decoding,
    seeds: Sequence[int],
    batch_size: int,
    vocab_size: int,
    pad_id: int,
    static_cache: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[int, list[Record]]:
    """Generate an answer to every prompt under every sampling seed.

    Args:
        model, decoding, seeds, batch_size, vocab_size, pad_id, static_cache, progress: see ``generate``.
        tokenizer: decodes the answers, without special tokens; its EOS ends them.
        eval_set: n prompts.

    Returns:
        For each seed n records, in the order of the set: ``row_id, prompt, prompt_tokens, reference`` (a list)``,
        output, output_tokens`` (EOS not counted)``, finished`` (False: the answer used up its tokens without EOS)``,
        seed, decoding`` (every option that shapes a text, including the seed and the EOS ids, not the batch size)``,
        protocol`` (template and length limit).

    Raises:
        ValueError: see ``generate``.
    """
    eos_ids = end_tokens(model, tokenizer)
    by_seed = generate(
        model,
        eval_set.prompt_ids,
        eval_set.row_ids,
        decoding=decoding,
        seeds=seeds,
        batch_size=batch_size,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        pad_id=pad_id,
        images=eval_set.read_images if eval_set.images else None,
        static_cache=static_cache,
        progress=progress,
    )
    budgets = [
        answer_budget(prompt, row_id, decoding.max_new_tokens, position_limit(model))
        for prompt, row_id in zip(eval_set.prompt_ids, eval_set.row_ids, strict=True)
    ]
    return {
        seed: [
            {
                **_asked(eval_set, i),
                "output": str(tokenizer.decode(answer, skip_special_tokens=True)),
                "output_tokens": len(answer),
                "finished": len(answer) < budgets[i],
                "seed": seed,
                "decoding": {**asdict(decoding), "seed": seed, "eos_ids": sorted(eos_ids)},
                "protocol": dict(eval_set.asked),
            }
            for i, answer in enumerate(answers)
        ]
        for seed, answers in zip(seeds, by_seed, strict=True)
    }


def evaluate_set(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, eval_set: EvaluationSet, **options: Any
) -> dict[int, list[Record]]:
    """Answer every prompt with ``answer_set``, and score the answers.

    Returns:
        The records of ``answer_set``, each with the metrics (per cent) of the set's scorer, which ``protocol`` names.

    Raises:
        ValueError: see ``answer_set`` and ``score``.
    """
    by_seed = answer_set(model, tokenizer, eval_set, **options)
    return {seed: scored(records, eval_set) for seed, records in by_seed.items()}


def scored(records: Sequence[Record], eval_set: EvaluationSet) -> list[Record]:
    """Return the records with the scores of the set's scorer, and no other scores.

    Raises:
        ValueError: see ``score``.
    """
    outputs = [record["output"] for record in records]
    scores = score(outputs, eval_set.references, eval_set.scorer, eval_set.rouge_tokenizer, eval_set.strip)
    return [
        {key: value for key, value in record.items() if key not in METRICS} | {"protocol": eval_set.protocol} | own
        for record, own in zip(records, scores, strict=True)
    ]


def _asked(eval_set: EvaluationSet, index: int) -> Record:
    """Return the set's part of a record; a stored result is reused only if it is the same."""
    task = eval_set.tasks[index] if eval_set.tasks else None
    images = eval_set.images[index] if eval_set.images else None
    # The prompt has the same tokens whatever its images show.
    shown = {} if images is None else {"images": images.digest.hex()}
    return (
        ({} if task is None else {"task": task})
        | shown
        | {
            "row_id": eval_set.row_ids[index],
            "prompt": eval_set.prompts[index],
            "prompt_tokens": len(eval_set.prompt_ids[index]),
            "reference": list(eval_set.references[index]),
        }
    )


def matches(records: Sequence[Record], eval_set: EvaluationSet, decoding: Decoding, seed: int) -> bool:
    """Return True if stored records answer exactly this question and need not be generated again.

    Compares the decoding options, the seed, and each row's id, prompt, prompt length and references, in order. The
    records do not name the *model* that answered: the caller keeps a file for each.
    """
    if len(records) != len(eval_set):
        return False
    options = {**asdict(decoding), "seed": seed}
    for index, record in enumerate(records):
        stored = record.get("decoding", {})
        if {key: value for key, value in stored.items() if key != "eos_ids"} != options:
            return False
        if any(record.get(key) != value for key, value in _asked(eval_set, index).items()):
            return False
    return True


def by_task(records_by_seed: Mapping[int, Sequence[Record]]) -> dict[str, dict[int, list[Record]]]:
    """Return task -> seed -> its records, in the order in which tasks first occur; empty if there are fewer than two.

    Rows without a task are in none.
    """
    tasks = dict.fromkeys(
        record["task"] for records in records_by_seed.values() for record in records if record.get("task") is not None
    )
    if len(tasks) < 2:
        return {}
    return {
        task: {
            seed: [record for record in records if record.get("task") == task]
            for seed, records in records_by_seed.items()
        }
        for task in tasks
    }


def summarise(records_by_seed: Mapping[int, Sequence[Record]]) -> dict[str, float]:
    """Average over sampling seeds within each row, then over rows.

    Args:
        records_by_seed: sampling seed -> scored records of the same rows.

    Returns:
        For each metric of the records its mean (per cent); ``<metric>_stderr``, the standard error over prompts: the
        sample standard deviation of the rows' averages over √n (0 for one row); and, with several sampling seeds,
        ``<metric>_seed_std``: the sample standard deviation of the seeds' means. Neither is the spread over training
        seeds. Also the mean of ``output_tokens``.

    Raises:
        ValueError: there are no records, or seeds cover different rows.
    """
    by_row = {seed: {record["row_id"]: record for record in records} for seed, records in records_by_seed.items()}
    if not by_row or not all(by_row.values()):
        raise ValueError(f"Seeds {sorted(by_row)} were given, not all with records: there is nothing to average.")
    first, *others = by_row
    row_ids = list(by_row[first])
    for seed in others:
        if by_row[seed].keys() != by_row[first].keys():
            differing = sorted(by_row[seed].keys() ^ by_row[first].keys())
            raise ValueError(
                f"Seeds {first} and {seed} cover different rows, such as {differing[:5]}: evaluate the missing ones."
            )
    summary: dict[str, float] = {}
    metrics = [name for name in METRICS if name in by_row[first][row_ids[0]]]
    for name in (*metrics, "output_tokens"):
        values_SR = np.array([[records[row][name] for row in row_ids] for records in by_row.values()], dtype=np.float64)
        means_R = values_SR.mean(axis=0)
        summary[name] = float(means_R.mean())
        if name in METRICS:
            summary[f"{name}_stderr"] = _standard_error(means_R)
            if len(by_row) > 1:
                summary[f"{name}_seed_std"] = float(values_SR.mean(axis=1).std(ddof=1))
    return summary


def _standard_error(values_R: np.ndarray) -> float:
    n = len(values_R)
    return float(values_R.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
