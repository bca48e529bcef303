"""The tables of ``deltakd.plan``: the costs of a step in GiB, PFLOP, GB and hours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from deltakd.estimates.clusters import Case
from deltakd.estimates.costs import Need, Setting, memory, while_writing
from deltakd.estimates.work import (
    DISK,
    HIDDEN,
    HOST,
    Amount,
    between_ranks,
    operations,
    seconds,
    traffic,
    writing_operations,
    writing_seconds,
)

GIB = 2**30
#: Fraction of a GPU's memory available to tensors; CUDA context, NCCL and fragmentation take about the rest.
USABLE = 0.9
#: Terminal width from which the tables have space to spare; on narrower terminals the columns move together.
SPACIOUS = 110
#: Columns of the memory table -> prefixes of the needs' names.
_GROUPS = {
    "student": ("weights", "whole student", "gradients", "optimiser", "half-precision", "update"),
    "references": ("reference ", "heads of the"),
    "gathered": ("gathered", "buffers"),
    "activations": ("activations", "hidden states", "key-value", "logits", "whole teacher"),
    "loss": ("loss",),
}


@dataclass(frozen=True)
class Rates:
    """The rates and the length of a run, which turn work into hours.

    Args:
        tflops: TFLOP/s (10¹² per second) that a GPU really reaches; None: no hours.
        interconnect: GB/s (10⁹ bytes per second) that a GPU sends; None: sending costs no time.
        bandwidth: GB/s that a GPU reads from its memory; None: writing responses is bound by arithmetic alone.
        steps: optimiser steps in the run.
        tokens: positions in the run, over all GPUs; takes precedence over ``steps``. Neither: seconds per step only.
    """

    tflops: float | None = None
    interconnect: float | None = None
    bandwidth: float | None = None
    steps: int | None = None
    tokens: float | None = None

    @property
    def length(self) -> str:
        """The length of the run, in words."""
        return f"{self.tokens:,.0f} tokens" if self.tokens else f"{self.steps:,} steps" if self.steps else ""

    def step_seconds(self, setting: Setting) -> float:
        """Return the seconds of a step; requires ``tflops``."""
        assert self.tflops is not None
        return seconds(setting, self.tflops, self.interconnect, self.bandwidth)

    def hours(self, setting: Setting) -> float | None:
        """Return the hours of the whole run; None if its length is unknown."""
        steps = self.tokens / setting.tokens if self.tokens else self.steps
        return None if steps is None else steps * self.step_seconds(setting) / 3600


def show_setting(title: str, setting: Setting, rates: Rates, console: Console) -> None:
    """Print one run in detail: every part of its memory, operations and traffic."""
    layout = setting.layout
    console.print(f"[bold]{title}[/]: {layout.name} on {layout.ranks}, {setting.tokens:,} positions a step (estimates)")
    _say(_sizes(setting), console)
    needs = memory(setting)
    for device in dict.fromkeys(need.device for need in needs):
        there = [Amount(need.what, need.bytes / GIB) for need in needs if need.device == device]
        console.print(_parts(f"memory of a process, {device}, GiB", there))
    if setting.writing is not None:
        written = [Amount(need.what, need.bytes / GIB) for need in while_writing(setting)]
        console.print(_parts("of it, while responses are written, GiB (or less than the peak)", written))
    console.print(_parts("a step of a process, TFLOP", [Amount(w, a / 1e12) for w, a in operations(setting)]))
    sent = traffic(setting)
    if sent:
        console.print(_parts("bytes moved in a step of a process, GB", [Amount(w, a / 1e9) for w, a in sent]))
    if rates.tflops is None:
        console.print("Hours need a rate: --tflops, what a GPU really reaches.")
    else:
        hours = rates.hours(setting)
        whole = f"; {rates.length}: {hours:,.2f} h" if hours is not None else "; the run's length: --steps or --tokens"
        console.print(f"{_number(rates.step_seconds(setting))} s a step{whole}")
    if setting.writing is not None:
        _say(writing_sentence(setting, rates), console)


def writing_sentence(setting: Setting, rates: Rates) -> str:
    """Return what the responses of a step are, and their share of its operations and of its time."""
    writing = setting.writing
    assert writing is not None
    share = sum(part.amount for part in writing_operations(setting)) / sum(a for _, a in operations(setting))
    said = (
        f"Responses: {writing.responses:g} a step of a process, {writing.response:,} tokens each at the most, after "
        f"prompts of up to {writing.prompt:,}; {writing.batch} decoded together. They take {share:.0%} of the "
        "operations"
    )
    if rates.tflops is None:
        return said + "; of the time more, since decoding waits for memory."
    time = writing_seconds(setting, rates.tflops, rates.bandwidth) / rates.step_seconds(setting)
    without = "" if rates.bandwidth else ", or more: decoding waits for memory, and --bandwidth says how fast that is"
    return f"{said} and {time:.0%} of the time{without}."


def _say(sentence: str, console: Console) -> None:
    console.print(sentence, markup=False, highlight=False)


def _sizes(setting: Setting) -> str:
    """Return a paragraph on the models and rows behind the figures, and why these were chosen."""
    models = {"student": setting.student, **setting.references}
    named = ", ".join(f"{role} {_amount(skeleton.parameters)}" for role, skeleton in models.items())
    learnt = setting.student.trained
    trained = f"; trained: {_amount(learnt)}" if learnt < setting.student.parameters else ""
    return (
        f"Parameters: {named}{trained}. A micro-batch: {setting.positions // setting.row} rows of {setting.row:,} "
        "tokens. All rows are taken as full (data.max_length) and all tokens as trained: memory and work are those of "
        "the largest batch."
        + (
            f" Of the rows, each of the {setting.routed} pairs of teachers runs an equal share."
            if setting.routed > 1
            else ""
        )
    )


def _amount(count: int) -> str:
    size, unit = next(
        ((size, unit) for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if count >= size), (1, "")
    )
    return f"{count / size:,.3g}{unit}"


def _parts(title: str, parts: Iterable[Amount]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(min_width=44)
    table.add_column(justify="right", min_width=10)
    listed = list(parts)
    for what in dict.fromkeys(part.what for part in listed):
        table.add_row(what, _number(sum(part.amount for part in listed if part.what == what)))
    table.add_section()
    table.add_row("all together", _number(sum(part.amount for part in listed)))
    return table


def show_cases(
    title: str, cases: Sequence[Case], assumed: Sequence[str], gpu_memory: float, rates: Rates, console: Console
) -> None:
    """Print many settings side by side: the assumptions, a memory table, and a work table.

    Args:
        title: of the tables.
        cases: their rows.
        assumed: overrides that the command did not give.
        gpu_memory: GiB of a GPU.
        rates: for the hours.
        console: prints.
    """
    console.print(f"[bold]{title}[/]")
    # All cases use the same models; the one with cached references has not loaded them.
    _say(_sizes(max((case.setting for case in cases), key=lambda setting: len(setting.references))), console)
    if assumed:
        _say(f"Not given, so taken as usual for models of this size: {', '.join(assumed)}.", console)
    _say(
        f"On a GPU of {gpu_memory:g} GiB, what takes up to {USABLE:.0%} fits; up to 100% it is tight: CUDA, NCCL and "
        "fragmentation need the rest.",
        console,
    )
    console.print(_memory_table(cases, gpu_memory, console.width))
    console.print(_work_table(cases, rates, console.width))


def _memory_table(cases: Sequence[Case], gpu_memory: float, width: int) -> Table:
    table = _table("memory of a GPU at the peak, GiB", width)
    for name in ("GPUs", "strategy", "references"):
        table.add_column(name, justify="right" if name == "GPUs" else "left")
    for name in (*_GROUPS, "all", "fits", "RAM"):
        table.add_column(
            {"references": "refs.", "activations": "activ.", "gathered": "comm."}.get(name, name), justify="right"
        )
    for case, new in _with_breaks(cases):
        needs = memory(case.setting)
        on_gpu = [need for need in needs if need.device != "cpu"]
        total, ram = _gib(on_gpu), _gib(need for need in needs if need.device == "cpu")
        groups = [_gib(need for need in on_gpu if need.what.startswith(names)) for names in _GROUPS.values()]
        if new:
            table.add_section()
        table.add_row(
            str(case.gpus) if new else "",
            case.setting.layout.name,
            case.references,
            *(f"{size:,.1f}" if size else "" for size in groups),
            f"{total:,.1f}",
            fits(total, gpu_memory),
            ("<1" if ram < 1 else f"{ram:,.0f}") if ram else "",
        )
    return table


def fits(total: float, gpu_memory: float) -> str:
    """Return ``yes`` if ``total`` GiB fit, ``tight`` if too little is left for the libraries, else ``no``."""
    return "yes" if total <= USABLE * gpu_memory else "tight" if total <= gpu_memory else "no"


def _work_table(cases: Sequence[Case], rates: Rates, width: int) -> Table:
    table = _table("a step of a GPU", width)
    for name in ("GPUs", "strategy", "references"):
        table.add_column(name, justify="right" if name == "GPUs" else "left")
    local = any(part.what in (HOST, HIDDEN, DISK) for case in cases for part in traffic(case.setting))
    names = ["PFLOP", "references'", "GB sent", *(["GB RAM/disk"] if local else [])]
    hours = rates.tflops is not None
    for name in [*names, *(["seconds"] if hours else []), *(["hours"] if hours and rates.length else [])]:
        table.add_column(name, justify="right")
    for case, new in _with_breaks(cases):
        work, sent = operations(case.setting), traffic(case.setting)
        total, of_references = (
            sum(part.amount for part in parts)
            for parts in (work, [part for part in work if part.what.startswith("reference ")])
        )
        moved = between_ranks(sent)
        if new:
            table.add_section()
        row = [
            _number(total / 1e15),
            f"{of_references / total:.0%}" if of_references else "",
            _number(moved / 1e9) if moved else "",
        ]
        row += [_number((sum(part.amount for part in sent) - moved) / 1e9)] if local else []
        row += [_number(rates.step_seconds(case.setting))] if hours else []
        row += [f"{whole:,.1f}" for whole in [rates.hours(case.setting)] if whole is not None] if hours else []
        table.add_row(str(case.gpus) if new else "", case.setting.layout.name, case.references, *row)
    return table


def _table(title: str, width: int) -> Table:
    padding = (0, 1) if width >= SPACIOUS else (0, 0)
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=padding)


def _with_breaks(cases: Sequence[Case]) -> list[tuple[Case, bool]]:
    """Return each case, with True for the first of its number of GPUs."""
    return [(case, index == 0 or cases[index - 1].gpus != case.gpus) for index, case in enumerate(cases)]


def _gib(needs: Iterable[Need]) -> float:
    return sum(need.bytes for need in needs) / GIB


def _number(value: float) -> str:
    """Format to about three significant digits, and 0 as an empty text."""
    if value == 0:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
