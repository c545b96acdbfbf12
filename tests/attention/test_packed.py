"""Attention over packed documents against one masked softmax over the whole sequence."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seq1f1b.attention import CarryPool
from seq1f1b.attention.kernels import KERNELS, Attended
from seq1f1b.attention.packed import packed_attention
from seq1f1b.sequence import Documents, sub_sequences

SCALE = 0.3


class Counting:
    """A kernel that counts the keys it is shown, over all calls."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.name = kernel.name
        self.keys_read = 0

    def forward(self, inputs):
        self.keys_read += inputs.key.shape[0]
        return self.kernel.forward(inputs)

    def backward(self, *args):
        return self.kernel.backward(*args)


class InOneCall(type(KERNELS["reference"])):
    """A kernel that takes packed documents at once, as those for CUDA do."""

    def forward_packed(self, inputs, lengths):
        query, key, value, scale = inputs
        weights, log_sum_exp = self._weights(query, key, lengths, scale)
        grouped = torch.einsum("bkgij,jbkd->ibkgd", weights, value)
        return Attended(grouped.flatten(2, 3), log_sum_exp)

    def backward_packed(self, grad, inputs, attended, lengths):
        with torch.enable_grad():
            own = inputs.each(lambda x: x.detach().requires_grad_())
            again, _ = self.forward_packed(own, lengths)
        return torch.autograd.grad(again, own[:3], grad)

    def _weights(self, query, key, lengths, scale):
        grouped = query.unflatten(2, (key.shape[2], -1))
        scores = torch.einsum("ibkgd,jbkd->bkgij", grouped, key) * scale
        scores = scores.masked_fill(~allowed(lengths), float("-inf"))
        return scores.softmax(-1), scores.logsumexp(-1)


def allowed(lengths):
    """Return which pairs of (query, key) are in one document, the key not behind the query."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (owner[:, None] == owner[None]).tril()


def masked(rows, query, key, value, grad):
    """Return output and gradients of a softmax over all pairs that are allowed."""
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    grouped = inputs[0].unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("ibkgd,jbkd->bkgij", grouped, inputs[1]) * SCALE
    mask = torch.stack([allowed(lengths) for lengths in rows])[:, None, None]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    output = torch.einsum("bkgij,jbkd->ibkgd", weights, inputs[2]).flatten(2, 3)
    return output.detach(), torch.autograd.grad(output, inputs, grad)


def in_parts(rows, cuts, query, key, value, grad, kernel, pool=None):
    """Return the same, computed sub-sequence by sub-sequence."""
    pool = pool or CarryPool()
    documents = [Documents.of_lengths(lengths) for lengths in rows]
    parts = sub_sequences(cuts)
    outputs, inputs = [], []
    for part in parts:
        own = [x[part.start : part.stop].clone().requires_grad_() for x in (query, key, value)]
        outputs.append(
            packed_attention(
                *own,
                kernel=kernel,
                scale=SCALE,
                part=part,
                documents=documents,
                carry_of=lambda row, number, *args: pool.carry(
                    0, (row, number), *args, reuse=False
                ),
            )
        )
        inputs.append(own)
    grads = [
        torch.autograd.grad(outputs[p.index], inputs[p.index], grad[p.start : p.stop])
        for p in reversed(parts)
    ]
    pool.release(0)
    pool.check_whole()
    columns = zip(*reversed(grads), strict=True)
    return torch.cat(outputs).detach(), [torch.cat(column) for column in columns]


def tensors(total, num_rows, heads, kv_heads, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(total, num_rows, size, dim, dtype=dtype) for size in sizes]


def lengths_from(cuts, total):
    ends = [0, *sorted(cuts), total]
    return [after - before for before, after in pairwise(ends)]


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Draw the documents of one to three rows and where the sequence is cut."""
    total = draw(st.integers(6, 48))
    places = st.sets(st.integers(1, total - 1), max_size=6)
    rows = [lengths_from(draw(places), total) for _ in range(draw(st.integers(1, 3)))]
    return rows, lengths_from(draw(places), total)


@pytest.mark.parametrize("kernel", [KERNELS["cpu-flash"], KERNELS["reference"], InOneCall()])
@given(packings(), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]))
def test_float64_equals_the_masked_softmax(kernel, packing, heads):
    rows, cuts = packing
    inputs = tensors(sum(cuts), len(rows), *heads)
    output, grads = in_parts(rows, cuts, *inputs, kernel)
    wanted, wanted_grads = masked(rows, *inputs)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@given(packings())
def test_no_key_outside_of_the_open_documents_is_read(packing):
    (lengths, *_), cuts = packing
    kernel = Counting(KERNELS["reference"])
    in_parts([lengths], cuts, *tensors(sum(cuts), 1, 2, 2), kernel)
    documents = Documents.of_lengths(lengths)
    expected = sum(
        part.stop - documents.starts[documents.at(part.start)] for part in sub_sequences(cuts)
    )
    assert kernel.keys_read == expected


@given(packings(), st.sampled_from([(4, 4), (4, 2)]))
def test_carry_memory_is_what_cut_documents_take(packing, heads):
    rows, cuts = packing
    pool = CarryPool()
    in_parts(
        rows,
        cuts,
        *tensors(sum(cuts), len(rows), *heads, dtype=torch.bfloat16),
        KERNELS["reference"],
        pool,
    )
    ends = torch.tensor(cuts).cumsum(0)[:-1].tolist()
    carried = accumulated = 0
    for row in rows:
        documents = Documents.of_lengths(row)
        for start, end in zip(documents.starts, documents.ends, strict=True):
            inside = [cut for cut in ends if start < cut < end]
            if inside:
                carried += end - start
                accumulated += max(inside) - start
    token = 2 * heads[1] * 8  # keys and values
    assert pool.peak_bytes == token * (2 * carried + 4 * accumulated)
    assert pool.bytes_in_use == pool.bytes_held == 0


def test_a_batch_that_was_not_cut_is_refused():
    query, key, value, _ = tensors(24, 2, 2, 2)
    part = sub_sequences((8, 16))[1]
    for documents in ([Documents((0,), 24)] * 2, [Documents((0,), 24)]):
        with pytest.raises(ValueError, match="for sub-sequence 1, which has 16 of 24 in"):
            packed_attention(
                query,
                key,
                value,
                kernel=KERNELS["reference"],
                scale=1.0,
                part=part,
                documents=documents,
                carry_of=lambda *args: pytest.fail("nothing is carried"),
            )


def test_kept_keys_and_values_hold_no_others_alive():
    pool = CarryPool()
    fused = torch.randn(30, 1, 2, 24, dtype=torch.float64, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        packed_attention(
            *fused.split(8, dim=-1),
            kernel=KERNELS["cpu-flash"],
            scale=SCALE,
            part=sub_sequences((30, 10))[0],
            documents=[Documents((0, 12, 20), 40)],
            carry_of=lambda row, number, *args: pool.carry(0, (row, number), *args),
        )
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    # query and output of all tokens, keys and values of the two whole documents
    tokens = 30 * 2 + 20 * 2
    log_sum_exp = 30 * 2 * 8
    assert sum(storages.values()) == tokens * 2 * 8 * 8 + log_sum_exp


@pytest.mark.gpu
def test_torch_flash_takes_whole_documents_in_one_call():
    rows, cuts = [[70, 3, 100, 200, 11], [384]], [150, 134, 100]
    inputs = [x.cuda() for x in tensors(384, 2, 4, 2, dim=64, dtype=torch.bfloat16)]
    output, grads = in_parts(rows, cuts, *inputs, KERNELS["torch-flash"])
    exact, exact_grads = in_parts(rows, cuts, *(x.double() for x in inputs), KERNELS["reference"])
    for got, want in zip((output, *grads), (exact, *exact_grads), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
