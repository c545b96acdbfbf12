"""From a recipe to groups of ranks and a divided, dispatched model."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seq1f1b.ulysses.dispatch import dispatch_modules
from seq1f1b.ulysses.memory.offload import offload_recomputation
from seq1f1b.ulysses.mesh import SequenceParallel, init_sequence_parallel
from seq1f1b.ulysses.training.deepspeed_engine import DeepSpeedEngine, read_deepspeed
from seq1f1b.ulysses.training.engine import Engine, FsdpEngine
from seq1f1b.ulysses.training.model import build_model
from seq1f1b.ulysses.training.recipe import Recipe, RecipeError
from seq1f1b.ulysses.training.sharding import shard


def make_groups(recipe: Recipe) -> SequenceParallel:
    """Divide the processes into groups that share rows; raises RecipeError if that cannot be."""
    world, size = dist.get_world_size(), recipe.sequence_parallel_size
    if world % size:
        raise RecipeError(
            f"sequence_parallel_size: {size} does not divide the {world} process(es); start a "
            f"multiple of {size} (NPROC_PER_NODE)"
        )
    batch, rows = recipe.training.global_batch_size, recipe.training.micro_batch_size
    together = world // size * rows
    if batch % together:
        raise RecipeError(
            f"training.global_batch_size: {batch} rows cannot be divided among {world // size} "
            f"groups of ranks with micro_batch_size {rows}; make it a multiple of {together}"
        )
    return init_sequence_parallel(size)


def num_micro_batches(recipe: Recipe, parallel: SequenceParallel) -> int:
    """Return how many micro-batches a group computes in a step."""
    settings = recipe.training
    return settings.global_batch_size // (parallel.data_size * settings.micro_batch_size)


def make_engine(
    recipe: Recipe, config: Any, parallel: SequenceParallel, device: str, deepspeed: str | None
) -> Engine:
    """Build the model, dispatch it, divide it over all ranks, and give it an optimizer."""
    memory = recipe.memory
    if deepspeed is None:
        model = _dispatched(recipe, build_model(recipe, config, on_all=False))
        shard(model, recipe, device)
        torch.manual_seed(recipe.seed + dist.get_rank())
        return FsdpEngine(model, recipe.training)
    if memory.cpu_offload:
        raise RecipeError(
            "memory.cpu_offload: with --deepspeed, offloading is DeepSpeed's: choose "
            "deepspeed_zero2_offload or deepspeed_zero3_offload"
        )
    accumulation = num_micro_batches(recipe, parallel) * memory.subsequences
    settings = read_deepspeed(deepspeed, recipe, accumulation)
    model = _dispatched(recipe, build_model(recipe, config, on_all=True)).to(device)
    torch.manual_seed(recipe.seed + dist.get_rank())
    return DeepSpeedEngine(model, recipe, settings)


def _dispatched(recipe: Recipe, model: nn.Module) -> nn.Module:
    memory = recipe.memory
    try:
        dispatch_modules(
            model.train(),
            verify=recipe.model.verify,
            core=recipe.model.attention_core,
            loss_tile=memory.loss_tile,
            mlp_tile=memory.mlp_tile,
            unit_at_a_time=memory.unit_at_a_time,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if memory.recompute == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    elif memory.recompute == "offload":
        offload_recomputation(model)
    return model
