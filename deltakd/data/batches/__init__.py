"""Which rows each optimiser step sees, as batches of tensors."""
