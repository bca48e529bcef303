"""Which pair of teachers judges a row: its task says (``model.routes``)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from deltakd.data.encoding.encoded_set import ANY_TASK, EncodedSet, RowTasks, pair_of
from deltakd.data.encoding.example_stream import ExampleStream, Stream
from deltakd.data.load import LoadedSets
from deltakd.data.sources.rows import Row
from deltakd.io.wording import listed

log = logging.getLogger(__name__)


def routed(sets: LoadedSets, routes: Mapping[str, int]) -> LoadedSets:
    """Return the sets with their rows' tasks and pairs of teachers.

    Args:
        sets: with their rows.
        routes: task -> number of the pair, from 1; ``*`` for all other rows.

    Raises:
        ValueError: names the tasks without a route, and the routes without a row to train on. Of a stream, only the
            first rows are known.
    """
    stream = sets.stream
    tasks = _tasks_of(sets.train) if stream is not None else [row.task for row in sets.train_rows]
    train = "data.train" if stream is None else f"the beginning of data.train ({len(tasks)} rows)"
    problems = _unrouted(train, tasks, routes) + _unrouted("data.val", [row.task for row in sets.val_rows], routes)
    unused = [task for task in routes if task not in tasks and task != ANY_TASK]
    if unused and not problems:
        said = (
            f"model.routes names {', '.join(unused)}, and no row of {train} has that task; the tasks there are "
            f"{listed(sorted({task for task in tasks if task})) or 'none'}"
        )
        if stream is None:
            problems.append(f"{said}: correct the route, or leave it out")
        else:
            log.warning("%s.", said)
    if problems:
        raise ValueError("\n".join(problems))
    val = None if sets.val is None else with_tasks(sets.val, sets.val_rows, routes)
    if stream is not None:
        first = replace(sets.train, tasks=_routed(sets.train.tasks, len(sets.train), routes))
        return sets._replace(train=first, val=val, stream=_routed_stream(stream, routes))
    return sets._replace(train=with_tasks(sets.train, sets.train_rows, routes), val=val)


def _routed_stream(stream: Stream, routes: Mapping[str, int]) -> Stream:
    def start(seed: int) -> ExampleStream[Any, Any]:
        examples = stream.start(seed)
        examples.routes = routes
        return examples

    return replace(stream, start=start)


def _tasks_of(encoded: EncodedSet) -> list[str | None]:
    """Return the task of each row."""
    tasks = encoded.tasks
    return [None] * len(encoded) if tasks is None else [tasks.names[number] for number in tasks.numbers]


def _routed(tasks: RowTasks | None, rows: int, routes: Mapping[str, int]) -> RowTasks:
    found = tasks or RowTasks(np.zeros(rows, np.int32), (None,), (None,))
    return replace(found, routes=tuple(pair_of(name, routes) for name in found.names))


def with_tasks(encoded: EncodedSet, rows: Iterable[Row], routes: Mapping[str, int] | None) -> EncodedSet:
    """Return a set with its rows' tasks; the set itself if no row has a task and rows are not routed.

    Args:
        encoded: the set.
        rows: the rows that it was made of.
        routes: as for ``routed``; None: rows are not routed.
    """
    tasks = {row.id: row.task for row in rows}
    names = tuple(dict.fromkeys(tasks.values()))
    if routes is None and names in ((), (None,)):
        return encoded
    places = {name: place for place, name in enumerate(names)}
    numbers = np.array([places[tasks[row]] for row in encoded.row_ids.tolist()], np.int32)
    return replace(encoded, tasks=RowTasks(numbers, names, tuple(pair_of(name, routes or {}) for name in names)))


def _unrouted(name: str, tasks: Iterable[str | None], routes: Mapping[str, int]) -> list[str]:
    if ANY_TASK in routes:
        return []
    without = Counter(task for task in tasks if task not in routes)
    none = without.pop(None, 0)
    found = []
    if without:
        shown = listed([f"{task} ({count} rows)" for task, count in without.most_common()])
        found.append(
            f"{name} has rows of tasks that model.routes lacks: {shown}; add them, or * for all other rows: "
            f"model.routes={{{', '.join(f'{task}: {pair}' for task, pair in routes.items())}, *: 1}}"
        )
    if none:
        found.append(
            f"{name} has {none} rows without a `task` (a text or a whole number), so model.routes does not say which "
            "teacher judges them; give them one (data.columns maps another column to it), or add '*' to model.routes"
        )
    return found
