"""Files, run directories, progress and errors: what every part may need, and what needs no part."""
