"""FSDP2 over all ranks, data-parallel and sequence-parallel alike, and weights from rank 0."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from seq1f1b.ulysses.training.recipe import Recipe


def shard(model: nn.Module, recipe: Recipe, device: str) -> None:
    """Divide weights, gradients and optimizer state over all ranks, layer by layer.

    The model has its weights on rank 0 and may have them on the meta device elsewhere; afterwards
    each rank has its share of them. Layers compute in the recipe's dtype, gradients are averaged in
    float32.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    _to_meta(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shard",))
    options: dict[str, Any] = {"mesh": mesh}
    if recipe.model.dtype == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if recipe.memory.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device == "cuda")
    for layer in layers_of(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    resting = "cpu" if recipe.memory.cpu_offload else device
    model._apply(lambda x: torch.empty_like(x, device=resting) if x.is_meta else x.to(device))
    _scatter(model, weights)
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: those that transformers recomputes, or never splits."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if found:
        return found
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


def _to_meta(model: nn.Module) -> None:
    """Replace parameters by ones without storage, shared ones by one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                key = id(parameter)
                if key not in made:
                    made[key] = nn.Parameter(
                        parameter.detach().to("meta"), requires_grad=parameter.requires_grad
                    )
                module._parameters[name] = made[key]


@torch.no_grad()
def _scatter(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give each rank its share of rank 0's weights, one parameter at a time."""
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, list(weights))
    assert all(each == names[0] for each in names), "ranks have built different models"
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        device = parameter.device_mesh.device_type
        whole = weights.pop(name)
        whole = torch.empty_like(whole, device=device) if whole.is_meta else whole.to(device)
        share = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(share.to_local())
