"""Homes of model chunks in pinned host memory, on a machine with a GPU.

Megatron assumes that weights, gradients and optimizer states are on the GPU: it makes small tensors
for them there, compares names of types, and has kernels and NCCL for GPUs only. All that it does
between steps runs on the CPU instead, by torch and gloo. Without a GPU nothing is replaced.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import (
    local_multi_tensor_applier,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron.adaptor.cpu import device, gloo
from megatron.adaptor.patches import Attribute, Patch
from megatron.adaptor.reports.console import print_first

if TYPE_CHECKING:
    from megatron.adaptor.command_line.settings import Settings

_BUFFER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer"
_OPTIMIZER = "megatron.core.optimizer"
_NORMS = "megatron.training.utils.common_utils"
_BETWEEN_STEPS = (
    f"{_OPTIMIZER}:get_megatron_optimizer",
    f"{_OPTIMIZER}.optimizer:ChainedOptimizer.step",
    "megatron.core.utils:check_param_hashes_across_dp_replicas",
    "megatron.training.checkpointing:load_checkpoint",
    "megatron.training.checkpointing:save_checkpoint",
    f"{_NORMS}:calc_params_l2_norm",
)
_REASON = "weights, gradients and optimizer states of offloaded model chunks are on the CPU."
_WITHOUT_KERNELS = tuple(
    Attribute(target, value, _REASON)
    for target, value in (
        (f"{_OPTIMIZER}:USING_PYTORCH_OPTIMIZER", True),
        (f"{_OPTIMIZER}.distrib_optimizer:HAVE_APEX_OR_TE", False),
        (f"{_OPTIMIZER}.distrib_optimizer:USING_TE_OPTIMIZER", False),
        (f"{_OPTIMIZER}.distrib_optimizer:USING_APEX_OPTIMIZER", False),
        (f"{_OPTIMIZER}.optimizer:multi_tensor_applier", local_multi_tensor_applier),
        (f"{_OPTIMIZER}.optimizer:multi_tensor_scale_impl", local_multi_tensor_scale),
        (f"{_OPTIMIZER}.clip_grads:multi_tensor_applier", local_multi_tensor_applier),
        (f"{_OPTIMIZER}.clip_grads:l2_norm_impl", local_multi_tensor_l2_norm),
        (f"{_OPTIMIZER}.clip_grads:multi_tensor_scale_impl", local_multi_tensor_scale),
        (f"{_OPTIMIZER}.clip_grads:multi_tensor_scale_tensor_impl", None),
        (f"{_NORMS}:multi_tensor_applier", local_multi_tensor_applier),
        (f"{_NORMS}:multi_tensor_l2norm", local_multi_tensor_l2_norm),
    )
)
BACKENDS = "cpu:gloo,cuda:nccl"
"""Of torch's process groups: that of a tensor's device exchanges it."""


class OnHost(TorchFunctionMode):
    """Makes tensors on the CPU where the GPU is asked for, with the GPU's names of types.

    pinned: whether zeros are in pinned memory.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = dict(kwargs or {})
        if function is Tensor.cuda:
            return args[0]
        if function is Tensor.to and len(args) > 1:
            args = args[0], device.on_cpu(args[1]), *args[2:]
        if "device" in kwargs:
            kwargs["device"] = device.on_cpu(kwargs["device"])
            if self._pinned and function is torch.zeros:
                kwargs["pin_memory"] = True
        result = function(*args, **kwargs)
        if function is Tensor.type and isinstance(result, str):
            return device.cuda_name(result)
        return result


class Homes:
    """The replacements in Megatron while model chunks are offloaded from a GPU.

    settings: returns what the flags mean, once they are known.
    """

    def __init__(self, settings: "Callable[[], Settings | None]") -> None:
        self._settings = settings

    def prepare(self, args: argparse.Namespace) -> None:
        """Replace kernels of the GPU with torch's, and add gloo for tensors on the CPU.

        Before Megatron makes process groups; ``args`` are its validated arguments.
        """
        if not self._are_used():
            return
        for attribute in _WITHOUT_KERNELS:
            attribute.original()
            attribute.apply()
        if args.distributed_backend == "nccl":
            args.distributed_backend = BACKENDS
        gloo.prefer_loopback()
        gloo.share_device()
        if args.rank == 0:
            print_first(
                "> model chunks in pinned host memory: Adam, norms, checkpoints and collectives of "
                f"their weights run on the CPU; process groups: {args.distributed_backend}"
            )

    def patches(self) -> list[Patch]:
        """Return what is replaced where Megatron works on weights and gradients between steps."""
        return [
            Patch(f"{_BUFFER}.__init__", self.make_buffer),
            Patch(f"{_BUFFER}.scale_gradients", self.scale_gradients),
            Patch(f"{_OPTIMIZER}.optimizer:MegatronOptimizer.scale_loss", self.scale_loss),
            Patch("megatron.training.dist_signal_handler:get_device", self.get_device),
            *(Patch(target, self.on_host) for target in _BETWEEN_STEPS),
        ]

    def make_buffer(
        self, original: Callable[..., None], buffer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Make flat buffers of weights and gradients in pinned memory."""
        if not self._are_used():
            original(buffer, *args, **kwargs)
            return
        with OnHost(pinned=True):
            original(buffer, *args, **kwargs)

    def on_host(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``original`` on tensors of the CPU as if they were on the GPU."""
        if not self._are_used():
            return original(*args, **kwargs)
        with OnHost():
            return original(*args, **kwargs)

    def scale_gradients(
        self, original: Callable[..., None], buffer: Any, scaling_factor: Any
    ) -> None:
        """Move the factor from the GPU, where tokens are counted, to the gradients."""
        if isinstance(scaling_factor, Tensor):
            scaling_factor = scaling_factor.to(buffer.grad_data.device)
        original(buffer, scaling_factor)

    def scale_loss(self, original: Callable[..., Any], optimizer: Any, loss: Tensor) -> Any:
        """Scale a loss on the GPU by what the optimizer has on the CPU."""
        if not self._are_used():
            return original(optimizer, loss)
        return optimizer.get_loss_scale().item() * loss

    def get_device(self, original: Callable[..., Any], local_rank: int | None = None) -> Any:
        """Exchange signals on the CPU, where there is a backend for both devices."""
        return torch.device("cpu") if self._are_used() else original(local_rank)

    def _are_used(self) -> bool:
        settings = self._settings()
        return settings is not None and settings.offload_chunks > 0 and device.has_gpu()
