"""What a dispatched model does when it is called."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from seq1f1b.ulysses.call import read_call
from seq1f1b.ulysses.causal_loss import target_loss
from seq1f1b.ulysses.errors import CallError
from seq1f1b.ulysses.labels import IGNORED, unmark
from seq1f1b.ulysses.memory.tiled_loss import tiled_loss
from seq1f1b.ulysses.mends.sdpa import SdpaDoor
from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.prepare import Doors
from seq1f1b.ulysses.recompute import bind_recomputation
from seq1f1b.ulysses.rows import Rows
from seq1f1b.ulysses.run import Choices, Run, current_run
from seq1f1b.ulysses.signature import LossKind, Signature

MARK = "seq1f1b_dispatch"


@dataclass(frozen=True)
class Dispatch:
    """How a dispatched model is called: over which ranks, through which doors, in which tiles."""

    parallel: SequenceParallel
    doors: Doors
    signature: Signature
    choices: Choices = field(default_factory=Choices)
    loss_tile: int | None = None

    def __deepcopy__(self, memo: object) -> "Dispatch":
        """A copy of the model is dispatched as the model is."""
        return self

    def make_run(self, rows: Rows, **options: Any) -> Run:
        """Return a forward pass over ``rows``; options are those of ``Run``."""
        return Run(self.parallel, rows, choices=self.choices, door=SdpaDoor, **options)


def dispatch_of(model: nn.Module) -> Dispatch:
    """Return how the dispatched model within ``model``, or ``model`` itself, is called.

    Raises ValueError when there is none.
    """
    for module in model.modules():
        if MARK in vars(module):
            found: Dispatch = vars(module)[MARK]
            return found
    raise ValueError(f"{type(model).__name__} is not dispatched: call dispatch_modules first")


def forward(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Take the place of the model's forward."""
    dispatch: Dispatch = vars(model)[MARK]
    arguments = {**dispatch.signature.by_name(args), **kwargs}
    run = current_run()
    if run is not None:
        return _compute(original, model, dispatch, run, arguments)
    num_items = arguments.pop("num_items_in_batch", None)
    call = read_call(
        dispatch.parallel,
        dispatch.signature,
        arguments,
        keeps_mask=dispatch.doors.implementation != "sdpa",
    )
    run = dispatch.make_run(call.rows)
    run.num_items = num_items
    run.targets = None if call.targets is None else unmark(call.targets)
    with run.active():
        return _compute(original, model, dispatch, run, call.arguments)


def _compute(
    original: Any, model: nn.Module, dispatch: Dispatch, run: Run, arguments: dict[str, Any]
) -> Any:
    """Run the model's own forward within ``run``, with a loss if there are targets."""
    if not run.is_closed:
        bind_recomputation(model)
    for name in ("labels", "shift_labels"):
        arguments.pop(name, None)
    if run.targets is None:
        output = original(**arguments)
    elif dispatch.doors.loss is LossKind.OWN:
        raise CallError(
            f"{type(model).__name__} computes a loss of its own from labels, which cannot be "
            f"divided over shards: call it without labels and compute the loss from its logits and "
            f"the shifted labels"
        )
    else:
        output = _with_loss(original, model, dispatch, run, arguments, run.targets)
    if run.num_mixed == 0:
        raise RuntimeError(
            f"no layer of {type(model).__name__} attended over the group: its attention "
            f"implementation was changed after dispatch_modules. Call dispatch_modules again"
        )
    return output


def _with_loss(
    original: Any,
    model: nn.Module,
    dispatch: Dispatch,
    run: Run,
    arguments: dict[str, Any],
    targets: Tensor,
) -> Any:
    if run.num_items is None:
        run.num_items = (targets != IGNORED).sum().clamp(min=1)

    def on_targets(part: Tensor | None, is_first: bool) -> tuple[Any, Tensor]:
        given = dict(arguments)
        if not is_first and dispatch.signature.accepts("output_router_logits"):
            given["output_router_logits"] = False
        if dispatch.doors.loss is LossKind.FUNCTION:
            output = original(**given, labels=part)
            return output, output.loss
        output = original(**given)
        assert part is not None
        return output, target_loss(output.logits, part, run.num_items)

    tile = dispatch.loss_tile
    if tile is not None and targets.shape[1] > tile:
        assert dispatch.doors.body is not None
        return tiled_loss(run, model, dispatch.doors.body, on_targets, targets, tile)
    output, loss = on_targets(targets, True)
    output.loss = loss
    return output
