"""Times the kernels of one rank while all ranks of the machine are busy with the same."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from seq1f1b.attention.kernels import Inputs, choose_kernel
from seq1f1b.planner.time.layer import SEPARATE_OPERATIONS as OPERATIONS

_TERA = 1e12
_BACKWARD_OPERATIONS = 2.5
_MEGATRON_OVER_TORCH = 3.0


@dataclass(frozen=True)
class Grid:
    """Which shapes are measured; ``longest`` the tokens that
    are attended to at most, ``rounds`` how often.
    """

    rows: tuple[int, ...]
    products: tuple[tuple[int, int], ...]
    own: tuple[int, ...]
    ratios: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    dim: int
    hidden: int
    longest: int
    rounds: int


ON_HOST = Grid(
    rows=(128, 512, 2048),
    products=((256, 256), (512, 256), (1024, 256), (256, 1024), (1024, 1024), (4096, 256)),
    own=(128, 512, 1024, 2048),
    ratios=(0, 1, 3),
    heads=((4, 4), (8, 8), (4, 2)),
    dim=64,
    hidden=256,
    longest=4096,
    rounds=5,
)
ON_GPU = Grid(
    rows=(512, 1024, 2048, 4096, 8192, 16384),
    products=(
        (1024, 4096),
        (1536, 4096),
        (2048, 4096),
        (4096, 512),
        (4096, 2048),
        (4096, 4096),
        (12288, 4096),
        (4096, 12288),
        (8192, 8192),
    ),
    own=(1024, 2048, 4096, 8192, 16384),
    ratios=(0, 1, 3),
    heads=((4, 4), (8, 8), (32, 32), (32, 8)),
    dim=128,
    hidden=4096,
    longest=1 << 16,
    rounds=7,
)


class Bench:
    """Measures on one device; every measurement begins on all ranks together."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grid: Grid) -> None:
        self.device, self.dtype, self.grid = device, dtype, grid

    def seconds(self, call: Callable[[], object], *, waits: bool = False) -> float:
        """Return the shortest time of ``call`` over the grid's rounds.

        All ranks are at it together; other programs on the machine only add time. A rank of one
        thread counts its own time on the core, unless ``waits`` says that it waits for others.
        """
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1 and not waits
        clock = time.thread_time if alone else time.perf_counter
        call()
        found = []
        for _ in range(self.grid.rounds):
            self._wait()
            start = clock()
            call()
            self._wait_for_device()
            found.append(clock() - start)
        return min(found)

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _wait(self) -> None:
        self._wait_for_device()
        if dist.is_initialized():
            dist.barrier()

    def random(self, *shape: int) -> Tensor:
        """Return a tensor of random numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def products(self) -> Iterator[tuple[int, int, int, float]]:
        """Yield rows, columns, inner size and TFLOP/s of matrix products."""
        for (columns, inner), rows in product(self.grid.products, self.grid.rows):
            left, right = self.random(rows, inner), self.random(columns, inner)
            seconds = self.seconds(partial(torch.matmul, left, right.t()))
            yield rows, columns, inner, 2 * rows * columns * inner / seconds / _TERA

    def attention(self) -> Iterator[tuple[tuple[int, int, int, int, int], float, float]]:
        """Yield a shape (own, before, heads, key heads, dim), and TFLOP/s forward and backward."""
        dim, scale = self.grid.dim, self.grid.dim**-0.5
        for (heads, groups), ratio, own in product(
            self.grid.heads, self.grid.ratios, self.grid.own
        ):
            before = ratio * own
            if before + own > self.grid.longest:
                continue
            query = self.random(own, 1, heads, dim)
            key, value = (self.random(before + own, 1, groups, dim) for _ in range(2))
            gradient = self.random(own, 1, heads, dim)
            kernel = choose_kernel(query, key, value)
            inputs = Inputs(query, key, value, scale)
            forward = partial(kernel.forward, inputs)
            backward = partial(kernel.backward, gradient, inputs, forward())
            operations = 4.0 * heads * dim * (own * before + own * (own + 1) / 2)
            yield (
                (own, before, heads, groups, dim),
                operations / self.seconds(forward) / _TERA,
                _BACKWARD_OPERATIONS * operations / self.seconds(backward) / _TERA,
            )

    def elementwise(self) -> Iterator[tuple[float, float, float]]:
        """Yield bytes of a layer's elementwise kernels, seconds forward, and backward."""
        for rows in self.grid.rows:
            mix = _Mix(self, rows)
            forward = self.seconds(mix.forward)
            both = self.seconds(mix.both)
            yield mix.num_bytes, forward, max(both - forward, forward / 2)

    def launch(self) -> float:
        """Return the host's seconds to launch one of a layer's operations.

        A layer of plain torch functions runs on next to no tokens. Megatron's, with its modules
        around them, takes three times as long to launch, as measured on a CPU.
        """
        layer = _TinyLayer(self)
        return _MEGATRON_OVER_TORCH * self.seconds(layer.forward) / OPERATIONS

    def memory_rate(self) -> float:
        """Return bytes per second of a copy."""
        source = self.random(1 << (22 if self.device.type == "cpu" else 27))
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))


class _TinyLayer:
    """A transformer layer of plain functions on a few tokens."""

    def __init__(self, bench: Bench) -> None:
        hidden, dim = bench.grid.hidden, bench.grid.dim
        self.heads, self.dim, self.hidden = hidden // dim, dim, hidden
        sizes = ((3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden))
        self.weights = [bench.random(*size).requires_grad_() for size in sizes]
        self.x, self.angles = bench.random(8, 1, hidden), bench.random(8, 1, 1, dim)

    def forward(self) -> Tensor:
        """Run the forward, with what autograd records of it."""
        qkv, out, up, down = self.weights
        normed = functional.layer_norm(self.x, (self.hidden,))
        mixed = functional.linear(normed, qkv).view(8, 1, self.heads, 3 * self.dim)
        query, key, value = mixed.chunk(3, dim=-1)
        query, key = rotated(query, self.angles), rotated(key, self.angles)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        merged = attended.permute(2, 0, 1, 3).reshape(8, 1, self.hidden)
        total = self.x + functional.linear(merged, out)
        normed = functional.layer_norm(total, (self.hidden,))
        return total + functional.linear(functional.gelu(functional.linear(normed, up)), down)


def rotated(part: Tensor, angles: Tensor) -> Tensor:
    """Return queries or keys turned by rotary positions, operation by operation."""
    half = part.shape[-1] // 2
    turned = torch.cat((-part[..., half:], part[..., :half]), dim=-1)
    return part * angles.cos() + turned * angles.sin()


class _Mix:
    """What a layer does beside products and attention: norms, rotation, activation, additions."""

    def __init__(self, bench: Bench, rows: int) -> None:
        hidden, dim = bench.grid.hidden, bench.grid.dim
        self.x, self.branch = (self._leaf(bench, rows, 1, hidden) for _ in range(2))
        self.mixed = self._leaf(bench, rows, 1, hidden // dim, 3 * dim)
        self.middle = self._leaf(bench, rows, 1, 4 * hidden)
        self.angles = bench.random(rows, 1, 1, dim)
        self.hidden = hidden
        residual = self.x.nbytes
        # as seq1f1b.planner.time.layer counts them, with rotary positions by separate operations
        self.num_bytes = 14.0 * residual + 15 * 2 * residual + 2 * 3 * residual + 2 * 4 * residual

    @staticmethod
    def _leaf(bench: Bench, *shape: int) -> Tensor:
        return bench.random(*shape).requires_grad_()

    def forward(self) -> list[Tensor]:
        """Run the forward; return its results."""
        normed = functional.layer_norm(self.x, (self.hidden,))
        query, key, value = self.mixed.chunk(3, dim=-1)
        parts = [
            rotated(query, self.angles),
            rotated(key, self.angles),
            value.contiguous(),
        ]
        total = self.x + self.branch
        again = functional.layer_norm(total, (self.hidden,))
        activated = functional.gelu(self.middle)
        return [normed, *parts, again, activated, total + self.branch]

    def both(self) -> None:
        """Run forward and backward."""
        results = self.forward()
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
