"""What students wrote while they trained: the responses that on-policy runs keep after each validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltakd.results.methods import Method
from deltakd.results.reading import Run
from deltakd.rollouts.samples import read_samples

#: Steps of a run that are shown, evenly spaced, the first and the last among them.
STEPS = 4
#: Responses shown of a step.
RESPONSES = 6

_KEYS = {"row_id": int, "prompt": str, "output": str, "output_tokens": int, "finished": bool}


@dataclass(frozen=True)
class Response:
    """A response of the student to a prompt of its training data.

    Args:
        row_id: the row of the prompt.
        prompt, text: as they were; foreign text.
        tokens: of the response, with the EOS that ended it.
        finished: True if the student ended it; False if it used up its tokens.
    """

    row_id: int
    prompt: str
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Step:
    """Some responses of an optimiser step, and how many of all that are kept ended by themselves."""

    number: int
    responses: list[Response]
    finished: int
    kept: int


@dataclass(frozen=True)
class Responses:
    """The responses of a run, over its steps.

    Args:
        label: of its method.
        path: of the run; foreign text.
        seed: of the run.
        steps: the first, the last, and some between them.
        kept: number of steps whose responses the run directory has.
    """

    label: str
    path: str
    seed: int
    steps: list[Step]
    kept: int


def responses_of(methods: Sequence[Method]) -> tuple[list[Responses], list[str]]:
    """Return what each on-policy run kept, in the order of the methods, and a sentence for each that can't be read."""
    found: list[Responses] = []
    problems: list[str] = []
    for method in methods:
        for run in method.runs:
            try:
                read = _read(method.label, run)
            except (OSError, ValueError) as error:
                problems.append(f"{run.path}: the responses of its student can't be read ({error}): they are left out.")
                continue
            if read is not None:
                found.append(read)
    return found, problems


def _read(label: str, run: Run) -> Responses | None:
    """Return the responses of a run; None if it kept none. Raises ValueError if a file is damaged."""
    kept = {step: [_response(record) for record in records] for step, records in read_samples(run.path).items()}
    kept = {step: records for step, records in kept.items() if records}
    if not kept:
        return None
    numbers = list(kept)
    places = np.unique(np.linspace(0, len(numbers) - 1, min(STEPS, len(numbers))).round().astype(int))
    steps = [_step(numbers[place], kept[numbers[place]]) for place in places]
    return Responses(label, str(run.path), run.seed, steps, len(kept))


def _step(number: int, kept: Sequence[Response]) -> Step:
    return Step(number, list(kept[:RESPONSES]), sum(response.finished for response in kept), len(kept))


def _response(record: Any) -> Response:
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in _KEYS.items()):
        raise ValueError(f"a record in rollouts/ is not a response: {record!s:.60}")
    return Response(
        record["row_id"], record["prompt"], record["output"], record["output_tokens"], bool(record["finished"])
    )
