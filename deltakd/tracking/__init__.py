"""Records of a run: loggers, W&B, the model card, the environment."""
