"""Time that a study's runs took, and the expected time of the others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console

from deltakd.io.progress import in_minutes
from deltakd.io.run_directory import RunDirectory
from deltakd.studies.study_file import Job, Study


def seconds_of(directory: RunDirectory) -> float:
    """Return the seconds that a finished run took since its last start."""
    return float(directory.read_summary().get("meta", {}).get("seconds", 0.0))


def measured_seconds(jobs: Sequence[Job]) -> dict[str, list[float]]:
    """Return stage -> seconds that each of its finished runs took."""
    took: dict[str, list[float]] = {job.stage.name: [] for job in jobs}
    for job in jobs:
        if job.directory.finished:
            took[job.stage.name].append(seconds_of(job.directory))
    return took


def expected_minutes(jobs: Sequence[Job], measured: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Return run -> minutes: what finished runs of its stage took on average, else what the study says."""
    return {
        job.name: statistics.mean(measured[job.stage.name]) / 60 if measured[job.stage.name] else job.stage.minutes
        for job in jobs
    }


def say_estimate(jobs: Sequence[Job], measured: Mapping[str, Sequence[float]], console: Console) -> None:
    """Print the expected time of what is left, by stage and in all; nothing if nothing is left."""
    todo = [job for job in jobs if not job.directory.finished]
    if not todo:
        return
    expected = expected_minutes(todo, measured)
    known = [minutes for minutes in expected.values() if minutes is not None]
    unknown = len(todo) - len(known)
    total = in_minutes(sum(known)) if known else "for how long is not known"
    more = f", {unknown} of them of unknown length" if known and unknown else ""
    lines = [f"{len(todo)} of {len(jobs)} runs to do; {total}{more}."]
    names = list(dict.fromkeys(job.stage.name for job in todo))
    for stage in names if len(names) < len(todo) else ():
        own = [expected[job.name] for job in todo if job.stage.name == stage]
        each = own[0]
        how = "measured" if measured[stage] else "expected"
        time_each = "unknown" if each is None else f"{each * len(own):.0f} minutes ({each:.1f} each, {how})"
        lines.append(f"  {stage}: {len(own)} {'run' if len(own) == 1 else 'runs'}, {time_each}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def say_hours(study: Study, console: Console) -> None:
    """Print the time of all finished runs of the study, over all its starts, by stage and in all."""
    measured = measured_seconds([job for jobs in study.jobs.values() for job in jobs])
    hours = {stage: sum(seconds) / 3600 for stage, seconds in measured.items() if seconds}
    if not hours:
        return
    lines = ["Hours of finished runs (of an interrupted one, only since its last start):"]
    lines += [f"  {stage}: {each:.2f} (runs: {len(measured[stage])})" for stage, each in hours.items()]
    lines.append(f"  in all: {sum(hours.values()):.2f}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
