"""Train a Hugging Face model on long sequences, by a recipe."""
