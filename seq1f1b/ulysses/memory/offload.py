"""Activation recomputation that keeps a layer's input in host memory until it is computed again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_SMALLEST = 2**16
"""Elements below which a copy is not worth its latency."""


def offload_recomputation(model: Any) -> None:
    """Let every layer that transformers can recompute do so, with its input on the host.

    On a CPU, where inputs are on the host already, this is plain recomputation.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Module) and "_gradient_checkpointing_func" in vars(module):
            vars(module)["_gradient_checkpointing_func"] = offloaded_checkpoint


def offloaded_checkpoint(function: Any, *args: Any) -> Any:
    """Do what ``torch.utils.checkpoint.checkpoint`` does, with tensors in ``args`` on the host.

    Only they are saved here: what runs inside saves its own in checkpoint's way. Copies are made on
    the stream that computes, so that one never reads what another has not written.
    """
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, use_reentrant=False)


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.device]:
    if tensor.device.type != "cuda" or tensor.numel() < _SMALLEST:
        return tensor, tensor.device
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host, tensor.device


def _from_host(saved: tuple[Tensor, torch.device]) -> Tensor:
    tensor, device = saved
    return tensor.to(device, non_blocking=True)
