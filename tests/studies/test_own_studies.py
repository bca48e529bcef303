"""The studies of this repository: every stage is composed and checked as if it were to run now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deltakd.config.build import make_answering_settings, make_caching_settings, make_settings
from deltakd.io.errors import ConfigError
from deltakd.studies.job_configs import compose_jobs, one_of_each_choice
from deltakd.studies.study_file import Study, check_keys, read_study

ROOT = Path(__file__).parents[2]
MAKE = {"train": make_settings, "cache": make_caching_settings, "generate": make_answering_settings}

#: What is said of a stage whose predecessors have not run: a model, a cache or data of theirs is absent.
UNMADE = re.compile(
    r"the models of the study \w+ are not there yet|"
    r"reference\.path=outputs/\S+ holds no cache of references|"
    r"model\.\w+\.\w+=outputs/\S+: no such directory|"
    r"(data|evaluation)\.[\w.]+: no such file: (outputs|\.\./shared)/"
)
MADE_BY_STAGE = re.compile(r"outputs/(?P<study>\w+)/(?P<stage>[\w.]+)")


def shards() -> list[object]:
    """Return a parameter for each study, and several for each long one; all but the quickstart are slow."""
    found = []
    for path in sorted(ROOT.glob("experiments/*/study.yaml")):
        stages = list(yaml.safe_load(path.read_text())["stages"])
        name, parts = path.parent.name, -(-len(stages) // 12)
        for part in range(parts):
            marks = [pytest.mark.slow] * (name != "quickstart")
            found.append(pytest.param(name, stages[part::parts], marks=marks, id=f"{name}-{part}"))
    return found


def unexpected(problem: str, study: Study, stage: str, readme: str) -> bool:
    """True unless a problem says that something is absent which an earlier stage, or a command in README.md, makes."""
    earlier = list(study.jobs)[: list(study.jobs).index(stage)]
    explained = [
        found[0] in readme or (found["study"] == study.name and found["stage"] in earlier)
        for found in MADE_BY_STAGE.finditer(problem)
    ]
    return not (UNMADE.match(problem) and all(explained))


@pytest.mark.parametrize(("name", "stages"), shards())
def test_every_stage_lacks_nothing_but_what_earlier_stages_make(
    name: str, stages: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing has run
    study = read_study(ROOT / "experiments" / name)
    readme = (ROOT / "experiments" / name / "README.md").read_text()
    jobs = study.chosen(stages)
    check_keys(jobs)
    # The first and the last of the runs that choose the same configs: their values are those at the ends.
    jobs = list({job.name: job for job in (*one_of_each_choice(jobs), *one_of_each_choice(jobs[::-1]))}.values())
    found = []
    for job in jobs:
        config = compose_jobs(study, [job])[job.name]
        assert config.run_dir == f"outputs/{study.name}/{job.name}"
        try:
            MAKE[job.stage.command](config)
        except ConfigError as error:
            found += [f"{job.name}: {one}" for one in error.problems if unexpected(one, study, job.stage.name, readme)]
    assert found == []
