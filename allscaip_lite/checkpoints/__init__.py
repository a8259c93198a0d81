"""Models in files: our own format, fairchem's checkpoints, and the model hub."""
