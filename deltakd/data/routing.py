"""Which pair of teachers judges a row: its task says (``model.routes``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from deltakd.data.encoding.encoded_set import EncodedSet, RowTasks
from deltakd.data.load import LoadedSets
from deltakd.data.sources.rows import Row
from deltakd.io.wording import listed

#: The route of rows without a task, and of tasks without a route of their own.
ANY_TASK = "*"


def routed(sets: LoadedSets, routes: Mapping[str, int]) -> LoadedSets:
    """Return the sets with their rows' tasks and pairs of teachers.

    Args:
        sets: with their rows.
        routes: task -> number of the pair, from 1; ``*`` for all other rows.

    Raises:
        ValueError: names the tasks without a route, and the routes without a row to train on.
    """
    problems = [
        problem
        for name, rows in (("data.train", sets.train_rows), ("data.val", sets.val_rows))
        for problem in _unrouted(name, rows, routes)
    ]
    asked = {row.task for row in sets.train_rows}
    unused = [task for task in routes if task not in asked and task != ANY_TASK]
    if unused and not problems:
        problems.append(
            f"model.routes names {', '.join(unused)}, and no row of data.train has that task; the tasks there are "
            f"{listed(sorted(task for task in asked if task)) or 'none'}: correct the route, or leave it out"
        )
    if problems:
        raise ValueError("\n".join(problems))
    val = None if sets.val is None else with_tasks(sets.val, sets.val_rows, routes)
    return sets._replace(train=with_tasks(sets.train, sets.train_rows, routes), val=val)


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
    given = routes or {}
    pairs = tuple(given.get(ANY_TASK if name is None or name not in given else name) for name in names)
    return replace(encoded, tasks=RowTasks(numbers, names, pairs))


def _unrouted(name: str, rows: Sequence[Row], routes: Mapping[str, int]) -> list[str]:
    if ANY_TASK in routes:
        return []
    without = Counter(row.task for row in rows if row.task not in routes)
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
            f"{name} has {none} rows without a `task`, so model.routes does not say which teacher judges them; give "
            "them one (data.columns maps another column to it), or add '*' to model.routes"
        )
    return found
