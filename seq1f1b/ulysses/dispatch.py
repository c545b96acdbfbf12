"""Let a Hugging Face model train on shards of sequences: find its doors, or refuse."""

from torch import nn

from seq1f1b.ulysses.cores import CORES
from seq1f1b.ulysses.dispatched import MARK, Dispatch, forward
from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.memory.tiled_mlp import tile_mlps
from seq1f1b.ulysses.mends import mend
from seq1f1b.ulysses.mends.replaced import replace_forward
from seq1f1b.ulysses.mesh import sequence_parallel
from seq1f1b.ulysses.prepare import find_doors, install_configs, install_loss
from seq1f1b.ulysses.run import Choices
from seq1f1b.ulysses.signature import LossKind, Signature


def dispatch_modules(
    model: nn.Module,
    use_varlen_attn: bool = False,
    *,
    verify: bool = False,
    core: str | None = None,
    loss_tile: int | None = None,
    mlp_tile: int | None = None,
    unit_at_a_time: bool = False,
) -> nn.Module:
    """Let ``model`` take shards that ``split_for_sequence_parallel`` made; return it.

    Every layer that mixes tokens, or takes values from positions, then sees the whole sequence of
    its group. Documents are found by ``position_ids`` or ``cu_seq_lens_q`` in any case, so
    ``use_varlen_attn`` changes nothing. The model is called as before, with whole attention masks
    and shifted labels, and cannot generate.

    verify: first compare loss and gradients of a small copy on one process and on the group; all
    ranks must ask for it. core: the attention core to take everywhere. loss_tile: tokens whose
    logits are alive at a time; the output then has a loss and no logits. mlp_tile: tokens that an
    MLP computes at a time. unit_at_a_time: gather and compute attention one unit of work at a time.

    Raises UnsupportedModelError, with the classes seen, when any layer of it cannot be exact,
    RuntimeError before ``init_sequence_parallel``, and ValueError for an option that does not fit.
    """
    if core is not None and core not in CORES:
        raise ValueError(f"no attention core {core!r}; there are {', '.join(CORES)}")
    parallel = sequence_parallel()
    target = _target(model)
    if verify:
        from seq1f1b.ulysses.verify import verify as run  # which dispatches models itself

        run(target, parallel)
    doors = vars(target)[MARK].doors if MARK in vars(target) else find_doors(target)
    if loss_tile is not None and doors.body is None:
        raise UnsupportedModelError(
            f"loss_tile: the head of {type(target).__name__} cannot be run apart from its body; "
            f"leave loss_tile out"
        )
    mend(target)
    install_configs(target, doors.implementation)
    if doors.loss is LossKind.FUNCTION:
        install_loss(target)
    if mlp_tile is not None:
        tile_mlps(target, mlp_tile)
    signature = Signature.read(target)
    replace_forward(target, forward)
    choices = Choices(core, unit_at_a_time)
    vars(target)[MARK] = Dispatch(parallel, doors, signature, choices, loss_tile)
    return model


def _target(model: nn.Module) -> nn.Module:
    """Return the outermost transformers model within wrappers such as PEFT's or DDP's."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    return model
