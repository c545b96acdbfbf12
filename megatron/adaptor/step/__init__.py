"""A training or evaluation step, run by the executor."""
