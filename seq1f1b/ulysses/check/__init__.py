"""Compare a model on one process with the same model on a group of ranks."""
