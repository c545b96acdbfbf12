"""Which settings to choose for a model on a cluster."""
