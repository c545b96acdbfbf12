"""Resuming Megatron's distributed optimizer where only torch's Adam is there.

Megatron's own way of loading it counts on apex's or transformer-engine's Adam: on state that exists
before the first step, and on one step number for all parameters rather than one tensor each. Nor
does it write to weights that are float32 themselves.
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron.adaptor.patches import Patch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def patches() -> list[Patch]:
    """Return what is replaced in the distributed optimizer."""
    return [
        Patch(f"{_OPTIMIZER}.sharded_state_dict", sharded_state_dict),
        Patch(f"{_OPTIMIZER}.load_state_dict", load_state_dict),
        Patch(f"{_OPTIMIZER}._set_main_param_and_optimizer_states", set_states),
    ]


def sharded_state_dict(
    original: Callable[..., Any],
    optimizer: Any,
    model_sharded_state_dict: Any = None,
    is_loading: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Make state for a checkpoint to be loaded into, which torch's Adam has only later."""
    if is_loading and not _has_fused_adam() and not optimizer.optimizer.state:
        optimizer._init_optimizer_states_with_dummy_values()
    return original(optimizer, model_sharded_state_dict or {}, is_loading, *args, **kwargs)


def load_state_dict(original: Callable[..., Any], optimizer: Any, state_dict: Any) -> Any:
    """Load float32 weights, and a step number for each, which torch's Adam counts up."""
    with torch.no_grad():  # float32 weights are written to in place
        result = original(optimizer, state_dict)
    if not _has_fused_adam():
        for group in optimizer.optimizer.param_groups:
            for parameter in optimizer.optimizer.state.keys() & set(group["params"]):
                optimizer.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
    return result


@torch.no_grad()
def set_states(
    original: Callable[..., Any], optimizer: Any, model_param: Any, tensors: dict[str, Any]
) -> Any:
    """Leave out a step number that a checkpoint which can be resharded has once for all."""
    if not _has_fused_adam():
        tensors = {"step": None, **tensors}
    return original(optimizer, model_param, tensors)


def _has_fused_adam() -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return distrib_optimizer.HAVE_APEX_OR_TE
