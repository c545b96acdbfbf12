"""Prove, on a few tokens in this process, that every mixing of tokens passes through a door.

Two questions, asked with every door closed, when a layer may look at each token alone:

- Does one token's output depend on another token? Then something mixes tokens behind the doors.
- Does a shard of a row, told its place, give what the whole row gives? If not, something takes
  positions from the shard.

Both are asked of every module's output, so that the answer can name the module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seq1f1b.ulysses.mesh import ALONE
from seq1f1b.ulysses.rows import Rows
from seq1f1b.ulysses.run import Run

LENGTH = 13
"""Tokens of a shard: a number that is unlikely to be the size of anything else."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.complex64: 1e-3}
_COARSE = 5e-2

Outputs = dict[str, tuple[list[Tensor], list[Tensor]]]
"""What went into each module and what came out, tensors with a dimension of tokens."""

Forward = Callable[[Tensor, Tensor, Run], Any]


class Finding(Exception):
    """A module whose outputs are not what they should be; ``kind`` is "mixes" or "positions"."""

    def __init__(self, kind: str, names: list[str], classes: list[str]) -> None:
        self.kind, self.names, self.classes = kind, names, classes
        super().__init__(f"{kind}: {', '.join(classes)}")


@torch.no_grad()
def probe(model: nn.Module, vocabulary: int, forward: Forward, make_run: Callable[..., Run]) -> int:
    """Ask both questions of ``model``; return how often it passed through a door in one call.

    forward: calls the model with token ids ``[1, n]``, positions ``[1, n]`` and a run. make_run:
    takes what ``Run`` takes. Raises Finding, or whatever the model itself raises.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    low = min(3, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (1, 2 * LENGTH), generator=generator).to(device)
    positions = torch.arange(2 * LENGTH, device=device)[None]
    rows = Rows.read(positions)

    def watch(tokens: Tensor, begin: int, end: int) -> tuple[Outputs, Run]:
        run = make_run(ALONE, rows, part=slice(begin, end), is_closed=True)
        with _evaluating(model), _watching(model, end - begin) as outputs:
            forward(tokens[:, begin:end], positions[:, begin:end], run)
        return outputs, run

    first, run = watch(ids, 0, LENGTH)
    other = ids.clone()
    middle = LENGTH // 2
    other[0, middle] = low + (ids[0, middle] - low + 1) % max(vocabulary - low, 1)
    second, _ = watch(other, 0, LENGTH)
    rest = [i for i in range(LENGTH) if i != middle]
    _compare(model, "mixes", first, second, rest, rest)
    whole, _ = watch(ids, 0, 2 * LENGTH)
    shard, _ = watch(ids, LENGTH, 2 * LENGTH)
    _compare(model, "positions", whole, shard, range(LENGTH, 2 * LENGTH), range(LENGTH))
    return run.num_mixed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside, and every module back as it was after."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _watching(model: nn.Module, length: int) -> Iterator[Outputs]:
    """Record the inputs and outputs of every module inside."""
    seen: Outputs = {}
    handles = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name not in seen:
                inputs = [*_tensors(args, length), *_tensors(kwargs, length)]
                seen[name] = inputs, list(_tensors(output, length))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(record(name), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(found: Any, length: int) -> Iterator[Tensor]:
    """Yield floating-point tensors of tokens, not of pairs of them, as ``[tokens, the rest]``."""
    if isinstance(found, Tensor):
        if found.is_floating_point() or found.is_complex():
            places = [d for d, size in enumerate(found.shape) if size == length]
            if len(places) == 1 and places[0] < 3:
                yield found.detach().movedim(places[0], 0).reshape(length, -1).clone()
    elif isinstance(found, dict):
        for each in found.values():
            yield from _tensors(each, length)
    elif isinstance(found, tuple | list):
        for each in found:
            yield from _tensors(each, length)


def _compare(
    model: nn.Module, kind: str, first: Outputs, second: Outputs, rows_a: Any, rows_b: Any
) -> None:
    """Raise Finding for modules whose inputs agree in the given rows and whose outputs do not."""
    a, b = list(rows_a), list(rows_b)
    guilty = [
        name
        for name in first
        if name in second
        and _agree(first[name][0], second[name][0], a, b) is True
        and _agree(first[name][1], second[name][1], a, b) is False
    ]
    innermost = [name for name in guilty if not any(_is_within(other, name) for other in guilty)]
    if innermost:
        modules = dict(model.named_modules())
        classes = sorted({type(modules[name]).__name__ for name in innermost})
        raise Finding(kind, innermost, classes)


def _is_within(inner: str, outer: str) -> bool:
    return inner != outer and (outer == "" or inner.startswith(outer + "."))


def _agree(first: list[Tensor], second: list[Tensor], a: list[int], b: list[int]) -> bool | None:
    """Whether tensors have the same values in the given rows; None if they cannot be compared."""
    if [x.shape[1] for x in first] != [y.shape[1] for y in second]:
        return None
    for x, y in zip(first, second, strict=True):
        tolerance = _TOLERANCE.get(x.dtype, _COARSE)
        difference = (x[a] - y[b]).abs().max()
        if not bool(difference <= tolerance * x.abs().max() + 1e-12):
            return False
    return True
