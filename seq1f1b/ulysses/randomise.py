"""Models for a check: small, and with weights by which a fault anywhere shows."""

import torch
from torch import nn

MATRIX_STD, VECTOR_STD = 0.15, 0.1
"""At the usual 0.02 attention left within the shard would move the loss by 4e-5 only."""


def randomise(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give every parameter new values, the same for the same seed; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * MATRIX_STD)
            else:
                parameter.add_(noise * VECTOR_STD)
    return model
