"""The training run: step, LightningModule, callbacks and fit."""
