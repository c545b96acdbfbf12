"""Whether a model chunk's gradients are final once they have arrived in host memory.

Their norm may then be taken before, and the optimizer may update the chunk while its step still
computes, unless Megatron decides at the end of the step whether to use them, or may run it again.
Where they are not final, Megatron changes them at the end of the step.
"""

import math
from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_model_config, get_pg_size


def decisions(optimizer: Any) -> list[str]:
    """Return what at the end of the step decides whether gradients are used, by flag.

    optimizer: Megatron's chain for all chunks.
    """
    parts = parts_of(optimizer)
    clip = max((one.config.clip_grad for one in parts), default=0.0)
    mode = get_rerun_state_machine().get_mode()
    found = {
        f"--clip-grad {clip:g} (must be 0)": clip > 0,
        f"--rerun-mode {mode.value} (must be disabled)": mode is not RerunMode.DISABLED,
        "grad_norm_skip_threshold": any(
            math.isfinite(one.config.grad_norm_skip_threshold) for one in parts
        ),
    }
    return [flag for flag, decides in found.items() if decides]


def changes(optimizer: Any, config: Any) -> list[str]:
    """Return what changes the gradients of all chunks after their reduction, by flag.

    optimizer: Megatron's chain for all chunks. config: Megatron's of the model.
    """
    found = {
        "--fp16 or --loss-scale": any(one.grad_scaler is not None for one in parts_of(optimizer)),
        "--calculate-per-token-loss": config.calculate_per_token_loss,
        "finalize_model_grads_func is not Megatron's": (
            config.finalize_model_grads_func is not finalize_model_grads
        ),
        "gradients that all stages sum": (
            getattr(config, "has_cond_embedder", False) or getattr(config, "flextron", False)
        ),
    }
    return [flag for flag, applies in found.items() if applies]


def changes_of(chunk: Any) -> list[str]:
    """Return what changes gradients of one ``chunk`` (Megatron's DDP) after their reduction."""
    config = get_model_config(chunk)
    model = get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)
    has_embedding = any(
        getattr(model, name, False) for name in ("pre_process", "post_process", "mtp_process")
    )
    positions = parallel_state.get_position_embedding_group(check_initialized=False)
    found = {
        "--sequence-parallel or --qk-layernorm": (
            chunk.tp_group.size() > 1
            and any(
                _is_summed_over_tensor_ranks(name, parameter, config)
                for name, parameter in model.named_parameters()
            )
        ),
        "no --untie-embeddings-and-output-weights": (
            has_embedding and getattr(model, "share_embeddings_and_output_weights", True)
        ),
        "--mtp-num-layers": has_embedding and bool(config.mtp_num_layers),
        "position embeddings of several stages": has_embedding and get_pg_size(positions) > 1,
    }
    return [flag for flag, applies in found.items() if applies]


def parts_of(optimizer: Any) -> list[Any]:
    """Return the distributed optimizers of Megatron's chain that have parameters here."""
    return [one for one in optimizer.chained_optimizers if not one.is_stub_optimizer]


def _is_summed_over_tensor_ranks(name: str, parameter: Any, config: Any) -> bool:
    """See Megatron's ``_allreduce_non_tensor_model_parallel_grads``."""
    return parameter.requires_grad and (
        getattr(parameter, "average_gradients_across_tp_domain", False)
        or (config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        or (config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name))
    )


def describe(found: Sequence[Sequence[str]]) -> str:
    """Return a line about all chunks of a stage, from what was found of each."""
    early = [str(number) for number, flags in enumerate(found) if not flags]
    reasons = ", ".join(dict.fromkeys(flag for flags in found for flag in flags))
    if not reasons:
        which = "all model chunks"
    elif not early:
        which = f"none, but at the end of the step: {reasons}"
    else:
        late = [str(number) for number, flags in enumerate(found) if flags]
        which = (
            f"model chunks {', '.join(early)} of the first stage, and {', '.join(late)} at the end "
            f"of the step: {reasons}"
        )
    return f"> just-in-time updates on arrival of gradients: {which}"
