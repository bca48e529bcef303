"""Compare methods: scores with their spread, and paired differences to a baseline."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltakd.evaluation import MAIN_METRICS, METRIC_TITLES
from deltakd.results.methods import Method
from deltakd.results.protocol_groups import ProtocolGroup, group_by_protocol
from deltakd.results.statistics import PROMPTS, Difference, Spread, compare, spread

#: Metrics of generated answers -> titles.
METRIC_NAMES = {name: f"{title} (%)" for name, title in METRIC_TITLES.items()}


@dataclass(frozen=True)
class Score:
    """A method on a set, in per cent.

    Args:
        spread: mean and standard error, over training seeds or, for a single seed, over prompts.
        difference: to the baseline; None for the baseline itself, for references, and if prompts differ.
        best: True if it beats every other method with an interval that excludes 0.
        sampling_std: std of the sampling seeds' means, averaged over training seeds; None for a single sampling seed.
    """

    spread: Spread
    difference: Difference | None = None
    best: bool = False
    sampling_std: float | None = None


@dataclass(frozen=True)
class Row:
    """A method in a table.

    Args:
        method: the method, with runs of one protocol only.
        scores: set -> score; a set on which it was not evaluated is absent.
        mark: 1 for the first protocol of a mixed table, 2 for the next; None in a table of one protocol.
    """

    method: Method
    scores: dict[str, Score]
    mark: int | None = None

    @property
    def label(self) -> str:
        """The method's label, with its protocol's mark."""
        return self.method.label + (f" [{self.mark}]" if self.mark else "")


@dataclass(frozen=True)
class Comparison:
    """One table.

    Args:
        metric: one of METRIC_NAMES.
        sets: the columns: the sets scored by it.
        rows: references first.
        baseline: label of the row that others are compared with; None if nothing can be compared.
        protocol: how the models were evaluated, one sentence each.
        number: number of the protocol, if there are several.
    """

    metric: str
    sets: list[str]
    rows: list[Row]
    baseline: str | None
    protocol: list[str] = field(default_factory=list)
    number: int | None = None

    @property
    def title(self) -> str:
        """The metric's name, and the protocol's number if there are several."""
        return METRIC_NAMES[self.metric] + (f", protocol {self.number}" if self.number else "")

    @property
    def mixed(self) -> bool:
        """True if the rows have different protocols."""
        return any(row.mark for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """The meaning of ± and of the differences in this table."""
        rows = [row for row in self.rows if not row.method.role]
        scores = [score for row in rows for score in row.scores.values()]
        over = {score.spread.over for score in scores}
        notes = []
        if over == {PROMPTS}:
            notes.append(
                "± is one standard error over prompts, since there is one training seed; it says nothing of "
                "other training runs."
            )
        elif over:
            single = "; where there is one seed, over prompts." if PROMPTS in over else "."
            notes.append(f"± is one standard error over training seeds, after averaging over sampling seeds{single}")
        if any(score.sampling_std for row in self.rows for score in row.scores.values()):
            notes.append(self._about_sampling())
        differences = [score.difference for score in scores if score.difference]
        if differences:
            varied = {difference.over for difference in differences}
            notes.append(
                f"Differences to {self.baseline}: paired, with a 95 % t-interval over {' or '.join(sorted(varied))} in "
                "brackets, p two-sided with Holm's correction over the methods of a column."
            )
            if PROMPTS in varied:
                notes.append(
                    "Where a side has one training seed, the variance between training runs is not estimated: the "
                    "difference is one of two trained models."
                )
            notes.append(self._about_bold(any(score.best for score in scores)))
        if any(row.method.role for row in self.rows):
            notes.append("Models that others learnt from are listed above the line and are not compared.")
        return notes

    def _about_sampling(self) -> str:
        """Return the note on sampling seeds, without greedy answers, which are the same under all seeds."""
        spreads = {
            row.label: [f"{name} {score.sampling_std:.2f}" for name, score in row.scores.items() if score.sampling_std]
            for row in self.rows
        }
        said = "; ".join(f"{label}: {', '.join(of)}" for label, of in spreads.items() if of)
        return f"Standard deviation of the sampling seeds' means, averaged over training seeds: {said}."

    def _about_bold(self, any_best: bool) -> str:
        if self.mixed:
            return "Rows of different marks were asked differently, so that nothing is bold."
        if any_best:
            return "Bold: better than every other method, by an interval that excludes 0."
        return "Nothing is bold: in no column is a method better than every other by an interval that excludes 0."


#: A method, and its protocol's mark in a mixed table.
Member = tuple[Method, int | None]


def notes_once(tables: Sequence[Comparison]) -> list[tuple[Comparison, list[str]]]:
    """Return each table with its notes and protocol, without those that the previous table has, too."""
    shown: list[tuple[Comparison, list[str]]] = []
    before: list[str] = []
    for table in tables:
        notes = [*table.notes, *table.protocol]
        shown.append((table, [note for note in notes if note not in before]))
        before = notes
    return shown


def make_comparisons(methods: Sequence[Method], baseline: str | None, mixed: bool) -> list[Comparison]:
    """Return a table for each protocol and metric, or for each metric if protocols may be mixed.

    Args:
        methods: references first.
        baseline: label of a method; None: the first labelled ``sft`` or with this loss, else the first method.
        mixed: put runs of different protocols into one table, marked.

    Raises:
        ValueError: no method has the label ``baseline``.
    """
    known = [method.label for method in methods]
    if baseline is not None and baseline not in known:
        near = difflib.get_close_matches(baseline, known, n=1)
        hint = f"; the nearest one is {near[0]!r}" if near else ""
        raise ValueError(
            f"--baseline {baseline} is not a method of this comparison{hint}; there are: {', '.join(known)}."
        )
    groups = group_by_protocol([run for method in methods for run in method.finished])
    members = [_within(methods, group) for group in groups]
    tables: list[tuple[list[Member], list[str]]] = [
        ([(method, None) for method in of], group.describe()) for of, group in zip(members, groups, strict=True)
    ]
    if mixed and len(groups) > 1:
        marked: list[Member] = [(method, mark) for mark, of in enumerate(members, 1) for method in of]
        tables = [(sorted(marked, key=lambda member: member[0].role is None), _marked(groups))]
    return [
        replace(_comparison(metric, rows, described, baseline), number=number if len(tables) > 1 else None)
        for number, (rows, described) in enumerate(tables, 1)
        for metric in METRIC_NAMES
        if _is_shown([method for method, _ in rows], metric)
    ]


def _within(methods: Sequence[Method], group: ProtocolGroup) -> list[Method]:
    chosen = [replace(method, runs=[run for run in method.runs if run in group.runs]) for method in methods]
    return [method for method in chosen if method.runs]


def _marked(groups: Sequence[ProtocolGroup]) -> list[str]:
    first = groups[0]
    described = [f"[1] {sentence}" for sentence in first.describe()]
    for mark, group in enumerate(groups[1:], 2):
        described += [f"[{mark}] {sentence}." for sentence in group.differs_from(first) or group.describe()]
    return described


def _is_shown(methods: Sequence[Method], metric: str) -> bool:
    """True for a main metric that scores some set, and for another one unless it is 0 everywhere."""
    if metric in MAIN_METRICS:
        return bool(_sets(methods, metric))
    return any(bool(m.scores(name, metric).any()) for m in methods for name in _sets([m], metric))


def _sets(methods: Sequence[Method], metric: str) -> list[str]:
    """Return the sets that the metric scores."""
    names = [name for method in methods for run in method.finished for name in run.answers if run.has(name, metric)]
    return list(dict.fromkeys(names))


def _comparison(metric: str, members: Sequence[Member], protocol: list[str], baseline: str | None) -> Comparison:
    rows = [Row(method, {}, mark) for method, mark in members]
    base = _baseline(rows, baseline)
    sets = _sets([method for method, _ in members], metric)
    for name in sets:
        # In a mixed table other rows may be scored by another scorer on this set.
        answered = [row for row in rows if any(run.has(name, metric) for run in row.method.evaluated(name))]
        compared = _comparable(answered, base, name)
        differences = _differences(compared, base, name, metric)
        best = None if any(row.mark for row in compared) else _best(compared, name, metric)
        for row in answered:
            row.scores[name] = Score(
                spread(row.method.scores(name, metric)),
                differences.get(row.label),
                best=row.label == best,
                sampling_std=row.method.sampling_std(name, metric),
            )
    return Comparison(metric, sets, rows, base.label if base and len(rows) > 1 else None, protocol)


def _baseline(rows: Sequence[Row], wanted: str | None) -> Row | None:
    if wanted is not None:
        return next((row for row in rows if row.method.label == wanted), None)
    methods = [row for row in rows if not row.method.role] or list(rows)
    return next(
        (row for row in methods if "sft" in (row.method.label, row.method.loss)), methods[0] if methods else None
    )


def _comparable(answered: Sequence[Row], base: Row | None, name: str) -> list[Row]:
    """Return the rows that answered the same prompts as the baseline, without references, which are larger models."""
    if base is None or base not in answered:
        return []
    return [
        row
        for row in answered
        if row is base or (not row.method.role and row.method.row_ids(name) == base.method.row_ids(name))
    ]


def _differences(compared: Sequence[Row], base: Row | None, name: str, metric: str) -> dict[str, Difference]:
    if base is None or len(compared) < 2:
        return {}
    scores = {row.label: row.method.scores(name, metric) for row in compared}
    seeds = {row.label: [run.seed for run in row.method.evaluated(name)] for row in compared}
    return {difference.method: difference for difference in compare(scores, seeds, base.label)}


def _best(compared: Sequence[Row], name: str, metric: str) -> str | None:
    """Return the label of the row that beats all others, if one does."""
    if len(compared) < 2:
        return None
    best = max(compared, key=lambda row: row.method.scores(name, metric).mean())
    others = _differences(compared, best, name, metric)
    return best.label if all(difference.high < 0 for difference in others.values()) else None
