"""Short names for the keys that every run sets, for ``deltakd init student=...`` and ``distill(student=...)``."""

from __future__ import annotations

#: Short name -> key of the config.
SHORT_NAMES = {
    "name": "name",
    "student": "model.student.path",
    "teacher": "model.teacher.path",
    "teacher_raw": "model.teacher_raw.path",
    "student_raw": "model.student_raw.path",
    "loss": "loss",
    "delta_weight": "delta_weight",
    "data": "data.train",
    "val": "data.val",
    "val_size": "data.val_size",
    "sets": "data.sets",
    "template": "data.template",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "batch_size": "data.batch_size",
    "lr": "optim.lr",
    "max_steps": "trainer.max_steps",
    "max_epochs": "trainer.max_epochs",
    "seed": "seed",
    "run_dir": "run_dir",
}
