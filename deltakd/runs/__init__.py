"""What entry points share: composing and checking a config, the run directory, training, evaluation, the summary."""
