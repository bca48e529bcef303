"""A study: stages in order, skipped when finished, refused when they are another config's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.io.errors import ConfigError
from deltakd.results.methods import make_methods
from deltakd.results.reading import find_runs
from deltakd.studies.job_configs import one_of_each_choice
from deltakd.studies.stages import run_study
from deltakd.studies.study_file import read_study
from tests.tiny import World

STAGES = ("teacher", "student")


@pytest.fixture
def folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    common = [
        *(o for o in world.overrides(tmp_path, "sft") if not o.startswith(("run_dir=", "loss=", "evaluation=none"))),
        "trainer.max_steps=3",
        f"evaluation.sets={{mine: {world.root / 'test.jsonl'}}}",
    ]
    content = {
        "name": "tiny",
        "overrides": common,
        "stages": {
            "teacher": {"minutes": 1, "overrides": ["loss=sft", f"model.student.path={world.root / 'teacher_raw'}"]},
            "student": {"minutes": 2, "overrides": ["loss=kd", "model.teacher.path=outputs/tiny/teacher/student"]},
        },
        "table": {"rows": {"the teacher": "teacher", "the student": "student"}, "columns": ["mine/rougeL", "val/loss"]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def run(folder: Path, *stages: str) -> str:
    output = io.StringIO()
    run_study(read_study(folder), Console(file=output, width=120), stages)
    return output.getvalue()


def change(folder: Path, stage: str, *overrides: str) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text())
    content["stages"][stage]["overrides"] += overrides
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def test_a_later_stage_starts_from_an_earlier_one_and_finished_stages_are_skipped(folder: Path) -> None:
    first = run(folder)
    assert "2 of 2 runs to do; about 3 minutes." in first
    assert "the teacher" in first
    assert "±" in first
    took = [json.loads(file.read_text())["meta"]["seconds"] for file in folder.glob("outputs/tiny/*/summary.json")]
    assert f"in all: {sum(took) / 3600:.2f}\n" in first
    summary = folder / "outputs" / "tiny" / "student" / "summary.json"
    shown = json.loads(summary.read_text())
    assert f"{shown['mine/rougeL']:.2f} ± {shown['mine/rougeL_stderr']:.2f}" in first
    before = summary.stat().st_mtime_ns
    second = run(folder)
    assert second.count("finished before") == 2
    assert summary.stat().st_mtime_ns == before
    assert first[first.index("┏") :] == second[second.index("┏") :]


def test_a_stage_may_generate_what_a_later_one_trains_on(folder: Path) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text())
    student = content["stages"].pop("student")["overrides"]
    ends = "evaluation.decoding={max_new_tokens:100}"
    content["stages"]["answers"] = {"command": "generate", "overrides": [*student, ends]}
    content["stages"]["seqkd"] = {"overrides": ["loss=sft", "data.train=outputs/tiny/answers/train.jsonl"]}
    del content["table"]["rows"]
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    first = run(folder)
    answers = json.loads((folder / "outputs" / "tiny" / "answers" / "summary.json").read_text())
    assert f"[2/3] answers: {answers['answered']} of {answers['prompts']} prompts answered" in first
    table = first[first.index("┏") :]
    assert "seqkd" in table
    assert "answers" not in table
    assert run(folder).count("finished before") == 3
    content["table"]["rows"] = {"x": "answers"}
    for command, said in (
        ("generate", "table.rows.x is stage 'answers', which does not exist or trains no model"),
        ("generat", "stages.answers.command is 'generat'; it must be train, generate, cache$"),
    ):
        content["stages"]["answers"]["command"] = command
        (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(ConfigError, match=said):
            run(folder)


def test_sweeps_are_runs_one_of_which_may_fail_and_stages_are_run_alone(folder: Path) -> None:
    change(folder, "student", "seed=1,2", "optim.lr=1e-2,-1")
    with pytest.raises(ConfigError, match=r"^stage teacher is not finished, and student reads it; give --stages"):
        run(folder, "student")
    first = run(folder, "teacher")
    assert "1 of 1 runs to do; about 1 minute." in first
    assert "the student" not in first
    with pytest.raises(
        ConfigError, match=r"2 of the 4 runs of stage student failed \(optim.lr=-1,seed=1: optim.lr is -1"
    ):
        run(folder, "student")
    done = ["optim.lr=0.01,seed=1", "optim.lr=0.01,seed=2"]
    students = folder / "outputs" / "tiny" / "student"
    assert sorted(path.parent.name for path in students.glob("*/summary.json")) == done
    change(folder, "student", "optim.lr=1e-2,1e-3")
    last = run(folder, "student")
    assert "2 of 4 runs to do" in last
    assert "less than a minute" in last  # by what the first two took, no more by the file
    assert last.count("finished before") == 2
    scores = [json.loads((students / name / "summary.json").read_text())["mine/rougeL"] for name in done]
    mean, error = sum(scores) / 2, abs(scores[0] - scores[1]) / 2
    row = next(line for line in last.splitlines() if "the student optim.lr=0.01" in line)
    assert f"{mean:.2f} ± {error:.2f}" in row
    methods = make_methods(find_runs([str(folder)]).runs, read_losses(CONF_DIR / "loss"), [])
    assert {method.label: method.seeds for method in methods} == {
        "the teacher": [0],
        "the student optim.lr=0.01": [1, 2],
        "the student optim.lr=0.001": [1, 2],
    }


def test_failed_runs_stop_only_the_stages_that_read_theirs(folder: Path) -> None:
    change(folder, "student", "optim.lr=1e-2,-1")
    content = yaml.safe_load((folder / "study.yaml").read_text())
    grandchild = ["loss=sft", "model.student.path='outputs/tiny/student/optim.lr=0.01/student'"]
    content["stages"] |= {
        "grandchild": {"overrides": grandchild},
        "its_own": {"overrides": ["loss=sft", "model.student.path=outputs/tiny/grandchild/student"]},
        "other": {"overrides": ["loss=kd", "model.teacher.path=outputs/tiny/teacher/student"]},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        run(folder)
    assert [problem[:66] for problem in caught.value.problems] == [
        "1 of the 2 runs of stage student failed (optim.lr=-1: optim.lr is ",
        "stage grandchild was not run, since it reads student",
        "stage its_own was not run, since it reads grandchild",
    ]
    made = {path.parent.name for path in folder.glob("outputs/tiny/**/summary.json")}
    assert made == {"teacher", "optim.lr=0.01", "other"}


def test_before_the_first_run_one_run_for_each_choice_is_composed(tmp_path: Path) -> None:
    sweeps = ["loss=kd,sft", "seed=1,2,3", "optim.lr=1e-3,3e-3"]
    content = {"name": "x", "stages": {name: {"overrides": sweeps} for name in ("one", "other")}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    chosen = one_of_each_choice(read_study(tmp_path).chosen([]))
    assert [(job.stage.name, job.overrides[:2]) for job in chosen] == [
        (stage, (loss, "seed=1")) for stage in ("one", "other") for loss in ("loss=kd", "loss=sft")
    ]


def test_the_runs_of_a_stage_are_those_of_hydras_sweeper(tmp_path: Path) -> None:
    sweeps = [
        "loss=kd,sft",
        "seed=range(0,3)",
        "optim.lr=1e-3,3e-3",
        "optim.lr=1e-3",
        "data.train=a/b.jsonl,'c,d.jsonl'",
    ]
    content = {"name": "x", "stages": {"all": {"minutes": 0.5, "overrides": sweeps}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    jobs = read_study(tmp_path).jobs["all"]
    (expected,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(sweeps), None)
    given = [[o for o in job.overrides if not o.startswith(("name=", "run_dir=", "resume="))] for job in jobs]
    assert [sorted(o.replace("1e-3", "0.001") for o in each) for each in given] == [sorted(each) for each in expected]
    assert jobs[1].name == "all/loss=kd,seed=0,data.train=c_d.jsonl"
    content["stages"]["all"]["overrides"] = ["optim.lr=interval(0,1)", "seed=1,2"]
    content["stages"]["bad"] = {"command": "cache", "overrides": ["seed=1,2"]}
    content["stages"]["same"] = {"overrides": ["data.train=a/b,'a b',a_b"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"(?s)names no single values.*a cache is one run.*two runs would be called"):
        read_study(tmp_path)
    quickstart = read_study(Path(__file__).parents[2] / "experiments" / "quickstart")
    with pytest.raises(ConfigError, match=r"--stages student: there is no such stage; the nearest is 'students'"):
        quickstart.chosen(["student"])


def test_a_stage_that_changed_is_refused(folder: Path) -> None:
    run(folder)
    text = (folder / "study.yaml").read_text().replace("- loss=kd", "- loss=kd\n    - loss.temperature=2")
    (folder / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"another config: loss.temperature \(1.0 there, 2 now\)"):
        run(folder)


def test_a_study_without_a_model_says_which_command_makes_it(folder: Path) -> None:
    text = (folder / "study.yaml").read_text().replace("outputs/tiny/teacher/student", "outputs/other/stage/student")
    (folder / "study.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"study other are not there yet .*: python -m deltakd.study experiments/other"
    ):
        run(folder)


def test_mistakes_in_the_file(folder: Path) -> None:
    content = {"stages": {"a": {"overides": []}}, "tabel": {}, "table": {"rows": {"x": "b"}}}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        read_study(folder)
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match=r"study.yaml does not exist; give a folder"):
        read_study(folder / "nowhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["is empty; give it stages: {first: {overrides: ["]),
        ("- a", ["holds ['a']; it must be a mapping with name, overrides, stages, table"]),
        ("name: x\n\tstages: 3", ["line 2, column 1: ", "indent with spaces: YAML takes no tabs"]),
        ("stages: {a: {}}\nstages: {b: {}}", ["line 2, column 1: the key 'stages' stands twice; remove one"]),
        ("stages: {a: 2026-02-30}", ["can't be read: day is out of range for month"]),
        ("stages: [a, b]", ["stages is ['a', 'b']; it must be a mapping of names: stages: {first: {"]),
        ("stages: {a: {}}\ntable: [a]", ["table is ['a']; it must be a mapping"]),
        ("stages: {a: loss=sft}", ["stages.a is 'loss=sft'; it must be a mapping with overrides, command, minutes"]),
        ("stages: {a/b: {}}", ["'a/b' can't be the name of a directory"]),
        ("stages: {a: {overrides: ['loss=(']}}", ["stage a: Error parsing override 'loss=('"]),
        (
            "name: 5\noverrides: loss=sft\nstages: {1: {command: trian, minutes: soon}, b: {overrides: [seed: 1]}}\n"
            "table: {rows: {2: b, x: 5}, columns: [1]}",
            [
                "name is 5; it must be text or null; to give these digits as text, write them in quotes",
                "overrides is 'loss=sft'; it must be a list (each text); write each override as text: [loss=sft,",
                "stages has the name 1, which YAML reads as int; write it in quotes",
                "stages.1.command is 'trian'; it must be train, generate, cache",
                "stages.1.minutes is 'soon'; it must be a finite number from 0 or null",
                "stages.b.overrides is [{'seed': 1}]; it must be a list (each text); write each override as text",
                "table.rows has the name 2, which YAML reads as int; write it in quotes",
                "table.rows is {'2': 'b', 'x': 5}; it must be a mapping (each value text); they are strings",
                "table.columns is [1]; it must be a list (each text); they are strings: write numbers",
            ],
        ),
    ],
    ids=lambda given: repr(given)[:20],
)
def test_a_file_of_another_shape_is_refused_in_words_all_at_once(text: str, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_study(tmp_path)
    told = str(caught.value)
    assert [part for part in said if part not in told] == [], told
    assert str(tmp_path / "study.yaml") in told


def test_a_stage_that_says_no_to_remote_code_in_quotes_is_refused(folder: Path) -> None:
    change(folder, "teacher", "model.trust_remote_code='no'")
    with pytest.raises(ConfigError, match=r"model.trust_remote_code is 'no'; it must be true or false"):
        run(folder)


def test_the_stages_are_one_group_to_wandb(folder: Path) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text())
    content["overrides"] = [o for o in content["overrides"] if not o.startswith("logger=")]
    content["overrides"] += ["logger=[csv,wandb]", "logger.wandb.mode=disabled"]
    content["stages"]["student"]["overrides"].append("logger.wandb.group=another")
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run(folder)
    stages = folder / "outputs" / "tiny"
    groups = [yaml.safe_load((stages / s / "config.yaml").read_text())["logger"]["wandb"]["group"] for s in STAGES]
    assert groups == ["tiny", "another"]
