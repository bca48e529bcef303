"""Sends a run's origin, answers and student to Weights & Biases, in addition to its numbers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from lightning.pytorch.loggers import Logger, WandbLogger
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, LoadedSets
from deltakd.evaluation import METRIC_TITLES, main_metric
from deltakd.evaluation.validation_answers import read_validation_answers
from deltakd.io.files import read_json_lines, write_text
from deltakd.models import ModelSettings
from deltakd.models.identity import model_fingerprint, model_identity, spec_of
from deltakd.references.content import data_identity
from deltakd.tracking.environment import environment, git_changes
from deltakd.tracking.redaction import redacted
from deltakd.types import STUDENT

#: Maximum rows and validation steps in a table of answers; W&B keeps every version of a table.
TABLE_ROWS = 32
TABLE_STEPS = 12
#: Suffixes of a student's files without weights.
_SMALL_SUFFIXES = (".json", ".md", ".jinja", ".txt", ".model")


@final
class RunWandbLogger(WandbLogger):
    """Lightning's logger, extended to origins, answers and the student.

    Its additions contain no home directories or secrets. Artifact files wait for their upload in the run directory,
    not in the user's home.

    Args:
        run: the W&B run.
        directory: the run directory.
        log_model: upload the exported student's weights, too.
    """

    def __init__(self, run: Any, directory: Path, log_model: bool) -> None:
        super().__init__(experiment=run)
        self.directory = directory
        self.with_weights = log_model
        self._origin: dict[str, Any] = {}

    def log_origin(self, origin: Mapping[str, Any]) -> None:
        """Log the environment, the checkout's changes, and the data and models that the run starts from (its lineage).

        Args:
            origin: result of :func:`origin_of`.
        """
        run = self.experiment
        self._origin = dict(origin)
        run.config.update(redacted({"environment": environment(), "origin": self._origin}), allow_val_change=True)
        changes = git_changes()
        if changes:
            path = Path(run.dir) / "diff.patch"
            write_text(path, redacted(changes))
            run.save(str(path), base_path=run.dir, policy="now")
        data = {key: value for key, value in origin["data"].items() if key != "data"}
        self._use("data", "dataset", {**data, "source": origin["data"]["data"]})
        for role, identity in origin["models"].items():
            version = identity["sha256"] or identity["commit"]
            self._use(f"model-{version[:12]}" if version else f"model-{role}", "fingerprint", _known(identity))

    def log_validation_answers(self, step: int) -> None:
        """Log the table ``val/answers``: prompts, references, and the answers at the validation steps side by side."""
        by_step = {k: records for k, records in read_validation_answers(self.directory).items() if k <= step}
        chosen = _spread(sorted(by_step), TABLE_STEPS)
        columns = {f"step {k}": [r["output"] for r in by_step[k][:TABLE_ROWS]] for k in chosen}
        self._table("val/answers", by_step[step], columns, step)

    def log_responses(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log the table ``rollout/responses``: the student's responses for an optimiser step.

        Args:
            records: as ``rollouts.samples.sample_record`` makes them.
            step: counted from 1.
        """
        import wandb

        columns = ["row_id", "prompt", "output", "output_tokens", "finished"]
        data = [[record[column] for column in columns] for record in records]
        table = wandb.Table(columns=["row", "prompt", "response", "tokens", "finished"], data=redacted(data))
        with self._staging():
            self.experiment.log({"rollout/responses": table, "trainer/global_step": step})

    def log_results(self, student: Path, scores: Mapping[str, float], step: int) -> None:
        """Log the final answers, and the exported student as an artifact of type ``model`` that says how it was made.

        Args:
            student: the student's directory.
            scores: scores of validation and evaluation.
            step: the last optimiser step.
        """
        self._log_evaluation_answers(step)
        self._log_student(student, scores)

    def _log_evaluation_answers(self, step: int) -> None:
        """Log a table ``<set>/answers`` for each evaluation set, the sampling seeds side by side."""
        sets: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for path in sorted((self.directory / "generations").glob("*_seed*.jsonl")):
            name, _, seed = path.stem.rpartition("_seed")
            sets.setdefault(name, {})[seed] = read_json_lines(path) or []
        for name, by_seed in sets.items():
            columns: dict[str, list[Any]] = {}
            for seed, records in by_seed.items():
                columns[f"output, seed {seed}"] = [record["output"] for record in records[:TABLE_ROWS]]
                metric = main_metric(records[0])
                columns[f"{METRIC_TITLES[metric]}, seed {seed}"] = [record[metric] for record in records[:TABLE_ROWS]]
            self._table(f"{name}/answers", next(iter(by_seed.values())), columns, step)

    def _log_student(self, student: Path, scores: Mapping[str, float]) -> None:
        sha256 = model_fingerprint(student)
        assert sha256 is not None
        metadata = redacted({"sha256": sha256, "weights": self.with_weights, "origin": self._origin, **scores})
        artifact = self._artifact(f"student-{self.experiment.id}", "model", metadata)
        for path in sorted(student.iterdir()):
            if self.with_weights or path.suffix in _SMALL_SUFFIXES:
                with self._staging():
                    artifact.add_file(str(path))
        self._send(artifact)
        # A later run that starts from this student logs the same name and content, so W&B links the two runs.
        self._send(self._fingerprint(f"model-{sha256[:12]}", "fingerprint", {"sha256": sha256, "commit": None}))

    def _table(self, key: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, list[Any]], step: int) -> None:
        import wandb

        asked = [[r["row_id"], r["prompt"], "\n---\n".join(r["reference"])] for r in rows[:TABLE_ROWS]]
        data = [[*row, *values] for row, *values in zip(asked, *columns.values(), strict=True)]
        table = wandb.Table(columns=["row", "prompt", "reference", *columns], data=redacted(data))
        with self._staging():
            self.experiment.log({key: table, "trainer/global_step": step})

    def _use(self, name: str, kind: str, content: Mapping[str, Any]) -> None:
        # Not run.use_artifact: it fails offline, and waits for the server online.
        self._send(self._fingerprint(name, kind, content), use_after_commit=True)

    def _fingerprint(self, name: str, kind: str, content: Mapping[str, Any]) -> Any:
        """Return an artifact of one small file; equal content is one version, whichever run sends it."""
        artifact = self._artifact(name, kind, redacted(dict(content)))
        with self._staging(), artifact.new_file("fingerprint.json") as file:
            file.write(json.dumps(redacted(dict(content)), indent=2, sort_keys=True))
        return artifact

    def _artifact(self, name: str, kind: str, metadata: dict[str, Any]) -> Any:
        import wandb

        return wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type=kind, metadata=metadata)

    def _send(self, artifact: Any, use_after_commit: bool = False) -> None:
        with self._staging():
            self.experiment._log_artifact(artifact, use_after_commit=use_after_commit)

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """Let W&B stage uploads in the run directory, unless WANDB_DATA_DIR is set."""
        if "WANDB_DATA_DIR" in os.environ:
            yield
            return
        os.environ["WANDB_DATA_DIR"] = str(self.directory / "wandb")
        try:
            yield
        finally:
            del os.environ["WANDB_DATA_DIR"]


def origin_of(
    models: ModelSettings,
    data: DataConfig,
    requires: Collection[str],
    tokenizer: PreTrainedTokenizerBase,
    sets: LoadedSets,
) -> dict[str, Any]:
    """Return the inputs of a run's result: ``data`` (fingerprints, counts), ``models`` (identity by role).

    Includes models that were read only through a reference cache.
    """
    specs = {role: spec_of(models, role) for role in sorted({STUDENT, *requires})}
    return {
        "data": data_identity(data, tokenizer, sets) | {"counts": sets.counts},
        "models": {role: model_identity(spec) for role, spec in specs.items() if spec is not None and spec.path},
    }


def wandb_of(loggers: Sequence[Logger]) -> RunWandbLogger | None:
    """Return the W&B logger; None if there is none or W&B is disabled."""
    found = (logger for logger in loggers if isinstance(logger, RunWandbLogger))
    return next((logger for logger in found if not logger.experiment.disabled), None)


def _known(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a model, wherever it is stored and however it is used."""
    return {"sha256": identity["sha256"], "commit": identity["commit"]}


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the steps, evenly spread, with the first and the last."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
