"""Let a Hugging Face model train on shards of sequences: find its doors, or refuse."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from seq1f1b.ulysses.call import read_call
from seq1f1b.ulysses.causal_loss import target_loss
from seq1f1b.ulysses.cores import CORES
from seq1f1b.ulysses.errors import CallError
from seq1f1b.ulysses.labels import unmark
from seq1f1b.ulysses.mends import mend
from seq1f1b.ulysses.mends.replaced import replace_forward
from seq1f1b.ulysses.mends.sdpa import SdpaDoor
from seq1f1b.ulysses.mesh import SequenceParallel, sequence_parallel
from seq1f1b.ulysses.prepare import Doors, find_doors, install_configs, install_loss
from seq1f1b.ulysses.recompute import bind_recomputation
from seq1f1b.ulysses.run import Run, current_run
from seq1f1b.ulysses.signature import LossKind, Signature

_MARK = "seq1f1b_dispatch"


@dataclass(frozen=True)
class Dispatch:
    """How a dispatched model is called: over which ranks, through which doors."""

    parallel: SequenceParallel
    doors: Doors
    signature: Signature
    core: str | None

    def __deepcopy__(self, memo: object) -> "Dispatch":
        """A copy of the model is dispatched as the model is."""
        return self


def dispatch_modules(
    model: nn.Module,
    use_varlen_attn: bool = False,
    *,
    verify: bool = False,
    core: str | None = None,
) -> nn.Module:
    """Let ``model`` take shards that ``split_for_sequence_parallel`` made; return it.

    Every layer that mixes tokens, or takes values from positions, then sees the whole sequence of
    its group. Documents are found by ``position_ids`` or ``cu_seq_lens_q`` in any case, so
    ``use_varlen_attn`` changes nothing. ``core`` names an attention core to take everywhere.
    ``verify`` compares loss and gradients of a small copy on one process and on the group first;
    all ranks must ask for it.

    The model is called as before, with whole attention masks and shifted labels, and cannot
    generate. Raises UnsupportedModelError, with the classes seen, when any layer of it cannot be
    exact, and RuntimeError before ``init_sequence_parallel``.
    """
    if core is not None and core not in CORES:
        raise ValueError(f"no attention core {core!r}; there are {', '.join(CORES)}")
    parallel = sequence_parallel()
    target = _target(model)
    if verify:
        from seq1f1b.ulysses.verify import verify as run  # which dispatches models itself

        run(target, parallel)
    doors = vars(target)[_MARK].doors if _MARK in vars(target) else find_doors(target)
    mend(target)
    install_configs(target, doors.implementation)
    if doors.loss is LossKind.FUNCTION:
        install_loss(target)
    signature = Signature.read(target)
    replace_forward(target, _forward)
    vars(target)[_MARK] = Dispatch(parallel, doors, signature, core)
    return model


def _target(model: nn.Module) -> nn.Module:
    """Return the outermost transformers model within wrappers such as PEFT's or DDP's."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    return model


def _forward(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if current_run() is not None:
        return original(*args, **kwargs)
    dispatch: Dispatch = vars(model)[_MARK]
    arguments = {**dispatch.signature.by_name(args), **kwargs}
    num_items = arguments.pop("num_items_in_batch", None)
    call = read_call(
        dispatch.parallel,
        dispatch.signature,
        arguments,
        keeps_mask=dispatch.doors.implementation != "sdpa",
    )
    arguments = call.arguments
    for name in ("labels", "shift_labels"):
        arguments.pop(name, None)
    if call.targets is not None:
        _check_loss(model, dispatch)
        if dispatch.doors.loss is LossKind.FUNCTION:
            arguments["labels"] = unmark(call.targets)
    run = Run(dispatch.parallel, call.rows, core=dispatch.core, door=SdpaDoor)
    run.num_items = num_items
    bind_recomputation(model)
    with run.active():
        output = original(**arguments)
    _check_mixed(model, run)
    if call.targets is not None and dispatch.doors.loss is LossKind.LOGITS:
        output.loss = target_loss(output.logits, unmark(call.targets), num_items)
    return output


def _check_loss(model: nn.Module, dispatch: Dispatch) -> None:
    if dispatch.doors.loss is LossKind.OWN:
        raise CallError(
            f"{type(model).__name__} computes a loss of its own from labels, which cannot be "
            f"divided over shards: call it without labels and compute the loss from its logits and "
            f"the shifted labels"
        )


def _check_mixed(model: nn.Module, run: Run) -> None:
    if run.num_mixed == 0:
        raise RuntimeError(
            f"no layer of {type(model).__name__} attended over the group: its attention "
            f"implementation was changed after dispatch_modules. Call dispatch_modules again"
        )
