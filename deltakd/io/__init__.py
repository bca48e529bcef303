"""Files, run directories, progress and errors: used by every part of deltakd, but dependent on none."""
