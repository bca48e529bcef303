"""Files, run directories, progress and errors: used by every part of deltakd, dependent on none."""
