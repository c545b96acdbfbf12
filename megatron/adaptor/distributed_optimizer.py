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
        Patch(
            f"{_OPTIMIZER}.sharded_state_dict",
            ("model_sharded_state_dict", "is_loading"),
            "makes state for a checkpoint to be loaded into, which torch's Adam has only later",
            _with_state,
        ),
        Patch(
            f"{_OPTIMIZER}.load_state_dict",
            ("state_dict",),
            "loads float32 weights, and a step number for each, which torch's Adam counts up",
            _with_own_steps,
        ),
    ]


def _with_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def sharded_state_dict(
        self: Any,
        model_sharded_state_dict: Any = None,
        is_loading: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if is_loading and not _has_fused_adam() and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, model_sharded_state_dict or {}, is_loading, *args, **kwargs)

    return sharded_state_dict


def _with_own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_state_dict(self: Any, state_dict: Any) -> Any:
        with torch.no_grad():  # float32 weights are written to in place
            result = original(self, state_dict)
        if not _has_fused_adam():
            for group in self.optimizer.param_groups:
                for parameter in self.optimizer.state.keys() & set(group["params"]):
                    self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
        return result

    return load_state_dict


def _has_fused_adam() -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return distrib_optimizer.HAVE_APEX_OR_TE
