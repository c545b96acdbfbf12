"""Sub-sequence attention against torch's own attention over the whole sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from seq1f1b.attention import CarryPool, causal_attention, choose_kernel
from seq1f1b.attention.kernels import KERNELS
from seq1f1b.sequence import sub_sequences

SCALE = 0.3


def make(length, batch, heads, kv_heads, dim, dtype=torch.float64):
    """Return query, key, value and an output gradient, ``[length, batch, heads, dim]`` each."""
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(length, batch, size, dim, dtype=dtype) for size in sizes]


def whole(query, key, value, grad):
    """Return output and gradients of torch's attention over the whole sequence."""
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    q, k, v = (x.permute(1, 2, 0, 3) for x in inputs)
    output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)
    output = output.permute(2, 0, 1, 3)
    return output.detach(), torch.autograd.grad(output, inputs, grad)


def in_parts(lengths, query, key, value, grad, kernel):
    """Return the same, computed sub-sequence by sub-sequence."""
    pool = CarryPool()
    parts = sub_sequences(lengths)
    outputs, inputs = [], []
    for part in parts:
        own = [x[part.start : part.stop].clone().requires_grad_() for x in (query, key, value)]
        carry = pool.carry("micro-batch", "layer", part.total, own[1], own[2])
        outputs.append(causal_attention(*own, kernel=kernel, scale=SCALE, carry=carry, part=part))
        inputs.append(own)
    grads = [
        torch.autograd.grad(outputs[p.index], inputs[p.index], grad[p.start : p.stop])
        for p in reversed(parts)
    ]
    pool.release("micro-batch")
    pool.check_whole()
    columns = zip(*reversed(grads), strict=True)
    return torch.cat(outputs).detach(), [torch.cat(column) for column in columns]


@pytest.mark.parametrize("kernel", ["cpu-flash", "reference"])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    dim=st.sampled_from([4, 16]),
)
def test_float64_equals_whole_sequence(kernel, lengths, batch, heads, dim):
    tensors = make(sum(lengths), batch, *heads, dim)
    output, grads = in_parts(lengths, *tensors, KERNELS[kernel])
    wanted, wanted_grads = whole(*tensors)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_no_further_from_the_truth_than_the_whole_sequence():
    tensors = make(256, 1, 4, 2, 32, torch.bfloat16)
    exact, exact_grads = whole(*(x.double() for x in tensors))
    output, grads = in_parts((100, 80, 76), *tensors, KERNELS["cpu-flash"])
    plain, plain_grads = whole(*tensors)
    triples = zip((output, *grads), (plain, *plain_grads), (exact, *exact_grads), strict=True)
    for got, base, want in triples:
        own_error = (got.double() - want).abs().mean()
        assert own_error <= 1.02 * (base.double() - want).abs().mean()


def test_whole_sequence_without_a_carry():
    query, key, value, grad = make(33, 2, 4, 2, 8)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    output = causal_attention(*inputs, kernel=KERNELS["cpu-flash"], scale=SCALE)
    wanted, wanted_grads = whole(query, key, value, grad)
    torch.testing.assert_close(output.detach(), wanted)
    for got, want in zip(torch.autograd.grad(output, inputs, grad), wanted_grads, strict=True):
        torch.testing.assert_close(got, want)


def test_values_narrower_than_keys_are_padded():
    query, key, _, _ = make(10, 1, 2, 2, 8)
    value = torch.randn(10, 1, 2, 6, dtype=torch.float64)
    kernel = choose_kernel(query, key, value)
    assert kernel.name == "cpu-flash, values padded"
    assert causal_attention(query, key, value, kernel=kernel, scale=SCALE).shape == (10, 1, 2, 6)


def test_recomputing_a_forward_changes_nothing():
    tensors = make(24, 1, 2, 2, 8)
    pool = CarryPool()
    parts = sub_sequences((10, 8, 6))

    def forward(part, own):
        carry = pool.carry(0, 0, part.total, own[1], own[2])
        return causal_attention(
            *own, kernel=KERNELS["cpu-flash"], scale=SCALE, carry=carry, part=part
        )

    inputs = [[x[p.start : p.stop].clone().requires_grad_() for x in tensors[:3]] for p in parts]
    with torch.no_grad():
        for part, own in zip(parts, inputs, strict=True):
            forward(part, own)
    grads = []
    for part, own in zip(reversed(parts), reversed(inputs), strict=True):
        again = forward(part, own)
        grads.append(torch.autograd.grad(again, own, tensors[3][part.start : part.stop]))
    _, wanted = whole(*tensors)
    for got, want in zip(zip(*reversed(grads), strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.cat(got), want)


def test_a_batch_that_was_not_cut_is_refused():
    query, key, value, _ = make(24, 1, 2, 2, 8)
    part = sub_sequences((8, 16))[1]
    carry = CarryPool().carry(0, 0, 24, key, value)
    with pytest.raises(ValueError, match="24 tokens for sub-sequence 1, which has 16 of 24"):
        causal_attention(
            query, key, value, kernel=KERNELS["reference"], scale=1.0, carry=carry, part=part
        )


def test_kernels_by_name():
    tensors = make(4, 1, 2, 2, 8)[:3]
    assert choose_kernel(*tensors).name == "cpu-flash"
    assert choose_kernel(*tensors, "reference").name == "reference"
    with pytest.raises(
        ValueError,
        match="no attention kernel 'warp'; there are flash-attn-3, flash-attn-2, torch-flash",
    ):
        choose_kernel(*tensors, "warp")
    with pytest.raises(ValueError, match=r"'torch-flash' cannot take torch\.float64 on cpu"):
        choose_kernel(*tensors, "torch-flash")
