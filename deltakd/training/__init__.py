"""The training run: the step, the LightningModule, callbacks, and the fit."""
