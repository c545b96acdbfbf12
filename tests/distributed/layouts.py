"""How the ranks of a test are dealt out over Megatron's kinds of parallelism."""

from dataclasses import dataclass
from typing import Any

_made: dict["Layout", dict[str, Any]] = {}
_untouched: dict[str, Any] = {}


@dataclass(frozen=True)
class Layout:
    """Ranks per kind of parallelism; data parallelism has those that are left."""

    stages: int = 1
    tensor: int = 1
    context: int = 1
    experts: int = 1

    def enter(self, num_chunks: int = 1) -> None:
        """Let Megatron's global state say that this is the layout; all ranks must call.

        Process groups, each of which costs threads, are made once per layout.
        """
        from megatron.core import parallel_state, tensor_parallel

        if not _untouched:
            _untouched.update(_state())
        if self not in _made:
            vars(parallel_state).update(_untouched)
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.tensor,
                pipeline_model_parallel_size=self.stages,
                context_parallel_size=self.context,
                expert_model_parallel_size=self.experts,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
            _made[self] = _state()
        vars(parallel_state).update(_made[self])
        parallel_state.set_virtual_pipeline_model_parallel_world_size(
            num_chunks if num_chunks > 1 else None
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)


def _state() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name.isupper()
    }
