"""How often keys, values and their gradients pass through memory beside the kernel."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seq1f1b.attention import CarryPool
from seq1f1b.attention.kernels import Attended, Gradients
from seq1f1b.attention.prefix_causal import backward_with_carry, forward_with_carry
from seq1f1b.sequence import sub_sequences

FIRST, MIDDLE, LAST = sub_sequences((6, 5, 4))
BATCH, HEADS, DIM = 2, 3, 4


class Passes(TorchDispatchMode):
    """Notes every operation that is not a view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Nothing:
    """A kernel that costs nothing: it hands out what was made before."""

    name = "nothing"

    def __init__(self, dtype):
        self.made = torch.ones(15, BATCH, HEADS, DIM, dtype=dtype)

    def supports(self, query, key, value):
        return True

    def forward(self, inputs):
        return Attended(inputs.query, inputs.query)

    def backward(self, grad_output, inputs, attended):
        own = self.made[: len(inputs.query)]
        prefix = self.made[: len(inputs.key) - len(inputs.query)]
        return Gradients(grad_output, own, own, (prefix, prefix) if len(prefix) else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_each(dtype):
    kernel, pool = Nothing(dtype), CarryPool()
    parts = {
        part: torch.ones(part.length, BATCH, HEADS, DIM, dtype=dtype)
        for part in (FIRST, MIDDLE, LAST)
    }
    carry = pool.carry(0, "layer", 15, parts[FIRST], parts[FIRST])

    def passes(call, part, *others):
        x = parts[part]
        with Passes() as seen:
            call(x, x, x, *others, carry, part, 1.0, kernel)
        return seen.names

    def forward(query, key, value, *rest):
        return forward_with_carry(query, key, value, *rest)

    def backward(gradient, query, output, *rest):
        return backward_with_carry(gradient, query, Attended(output, output), *rest)

    for part in parts:
        assert passes(forward, part) == ["aten.copy_.default"] * 2
    # The last fills the accumulators; the next adds to them, and what they hold to its own.
    computed = [name for name in passes(backward, LAST) if "empty" not in name]
    assert [name for name in computed if "promote" not in name] == ["aten.copy_.default"] * 2
    assert passes(backward, MIDDLE) == ["aten.add_.Tensor"] * 2 + ["aten.add.out"] * 2
    assert passes(backward, FIRST) == ["aten.add.out"] * 2
