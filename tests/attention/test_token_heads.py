"""Tokens for heads, between ranks: what arrives, where it came from, and the way back."""

import pytest
import torch
import torch.distributed as dist

from seq1f1b.attention.token_heads import Dealing, head_and_tail, to_heads, to_tokens

pytestmark = pytest.mark.distributed

LENGTH, BATCH, HEADS, DIM = 24, 2, 4, 3


def in_order(size: int) -> tuple[int, ...]:
    return tuple(range(size))


DEALINGS: dict[str, Dealing] = {"head and tail": head_and_tail, "in order": in_order}


def exchange(name: str) -> tuple[bool, bool, bool]:
    """Whether heads arrive in order, tokens come back, and gradients are those of the whole."""
    dealing, size, rank = DEALINGS[name], dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    whole = torch.randn(LENGTH, BATCH, HEADS, DIM, dtype=torch.float64)
    weights = torch.randn_like(whole)
    pieces = dealing(size)
    per_rank = len(pieces) // size
    mine = pieces[rank * per_rank : (rank + 1) * per_rank]
    length = LENGTH // len(pieces)
    places = torch.cat([torch.arange(piece * length, (piece + 1) * length) for piece in mine])
    heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
    tokens = whole[places].requires_grad_()
    arrived = to_heads(dist.group.WORLD, tokens, dealing)
    back = to_tokens(dist.group.WORLD, arrived * weights[:, :, heads], dealing)
    back.square().sum().backward()
    return (
        torch.equal(arrived, whole[:, :, heads]),
        torch.equal(back, (whole * weights)[places]),
        torch.allclose(tokens.grad, (2 * whole * weights**2)[places], rtol=1e-12),
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", DEALINGS)
def test_heads_arrive_in_order_and_go_back(workers, size, name):
    assert workers(size).run(exchange, name) == [(True, True, True)] * size


def uneven() -> str:
    try:
        to_heads(dist.group.WORLD, torch.zeros(4, 1, 3, 2), head_and_tail)
    except ValueError as error:
        return str(error)
    return ""


def test_heads_that_do_not_divide_are_refused(workers):
    for message in workers(2).run(uneven):
        assert "cannot deal 3 heads of this tensor-parallel rank out to 2 ranks" in message
