"""The CSV logger of a run."""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from pathlib import Path
from typing import final

from lightning.pytorch.loggers import CSVLogger

from deltakd.io.files import WriteError, replacing


@final
class RunCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` in the run directory; a resumed run continues the file.

    Lightning's own logger deletes the rows of an earlier process.

    Args:
        directory: the run directory.
        resume_step: keep rows up to this optimiser step; later ones belong to lost work.
    """

    def __init__(self, directory: Path, resume_step: int) -> None:
        path, former = directory / "metrics.csv", directory / "metrics.csv.former"
        if path.is_file():
            os.replace(path, former)
        kept = _read_metrics(former, resume_step)
        super().__init__(save_dir=directory, name="", version="", flush_logs_every_n_steps=20)
        with warnings.catch_warnings():
            # The directory holds checkpoints and config; the metrics are carried over below.
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer = self.experiment
        for row in kept:
            step = int(row.pop("step"))
            writer.log_metrics({k: float(v) for k, v in row.items() if v != ""}, step)
        self.save()
        former.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the rows so far; the file is complete at all times, and unchanged if the disk is full.

        Raises:
            WriteError: the rows could not be written.
        """
        writer = self.experiment
        if not writer.metrics:
            return
        path, keys = Path(writer.metrics_file_path), list(writer.metrics_keys)
        with replacing(path, "metrics") as partial:
            if path.is_file():
                shutil.copyfile(path, partial)
            writer.metrics_file_path = str(partial)
            try:
                super().save()
            except BaseException:
                writer.metrics_keys = keys
                raise
            finally:
                writer.metrics_file_path = str(path)

    def finalize(self, status: str) -> None:
        """Write the remaining rows; after a failed run, ignore write errors."""
        try:
            super().finalize(status)
        except WriteError:
            if status == "success":
                raise


def _read_metrics(path: Path, last_step: int) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step")]
    return [row for row in rows if int(row["step"]) <= last_step]
