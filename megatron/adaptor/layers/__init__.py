"""Replacements inside the model: attention, positions, losses of layers, weight gradients."""
