"""Gated delta rule (arXiv 2412.06464): heads are shared out, each with the whole rows.

The recurrence runs through the sequence but never from head to head, so a rank computes whole heads
over all rows, one document at a time, because the state starts anew with each document.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seq1f1b.ulysses.mends.replaced import replace_function
from seq1f1b.ulysses.rows import Pattern
from seq1f1b.ulysses.run import Run, current_run, each_alone
from seq1f1b.ulysses.units import Block

_NAMES = ("torch_chunk_gated_delta_rule", "chunk_gated_delta_rule")


def mend_delta_rule(model: nn.Module) -> None:
    """Replace the chunked delta rule in the code of every layer that can call it."""
    for code in {type(module).__module__ for module in model.modules()}:
        for name in _NAMES:
            replace_function(code, name, _delta_rule)


def _delta_rule(
    original: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute what ``original`` does, over the group's rows.

    query, key ``[b, shard, key heads, dim]``, value ``[b, shard, heads, v dim]``, g and beta
    ``[b, shard, heads]``; returns ``[b, shard, heads, v dim]``.
    """
    run = current_run()
    if run is None:
        state = {"initial_state": initial_state, "output_final_state": output_final_state}
        return original(query, key, value, g=g, beta=beta, **state, **kwargs)
    run.check_length(query.shape[1], "the delta rule")
    run.refuse_parts("a delta rule")
    run.num_mixed += 1
    if run.is_closed:
        others = query, key, g[..., None], beta[..., None]
        heads_first = (x.transpose(1, 2) for x in others)
        return each_alone(value.transpose(1, 2), *heads_first).transpose(1, 2), None

    def rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
        return original(q, k, v, g=decay, beta=rate, **kwargs)[0]

    if run.parallel.size == 1:
        return _by_document(run, rule, query, key, value, g, beta), None
    return _by_heads(run, rule, query, key, value, g, beta), None


def _by_heads(
    run: Run,
    rule: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
) -> Tensor:
    size, rank = run.parallel.size, run.parallel.rank
    num_heads, group = value.shape[2], value.shape[2] // key.shape[2]
    shares = [(r * num_heads // size, (r + 1) * num_heads // size) for r in range(size)]
    length = run.rows.length
    heads = [[Block(a, b, 0, length)] if b > a else [] for a, b in shares]
    keys = [[Block(a // group, -(-b // group), 0, length)] if b > a else [] for a, b in shares]
    gates = torch.stack([g.to(torch.float32), beta.to(torch.float32)], dim=-1)
    sent = [x.transpose(1, 2) for x in (query, key, value)]
    (queries, keys_, values), token = run.exchange.to_blocks(sent, [keys, keys, heads])
    (pairs,), gate_token = run.exchange.to_blocks([gates.transpose(1, 2)], [heads])
    outputs = []
    if values:
        own = range(*shares[rank])
        chosen = [head // group - own[0] // group for head in own]
        q, k = (x[0][:, chosen].transpose(1, 2) for x in (queries, keys_))
        v, pair = values[0].transpose(1, 2), pairs[0].transpose(1, 2)
        decay, rate = pair[..., 0].to(g.dtype), pair[..., 1].to(beta.dtype)
        outputs = [_by_document(run, rule, q, k, v, decay, rate).transpose(1, 2)]
    token = token + gate_token.to(token.dtype)
    shape = value.shape[0], num_heads, value.shape[3]
    return run.exchange.to_rows(outputs, heads, shape, token).transpose(1, 2)


def _by_document(run: Run, rule: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply ``rule`` to each document of rows ``[b, s, ...]``; padding between them gets 0."""
    if not bool(run.rows.is_packed.any()):
        return rule(*tensors)
    values = tensors[2]
    num_rows = 1 if run.rows.is_alike else values.shape[0]
    rows = []
    for row in range(num_rows):
        batch = slice(None) if run.rows.is_alike else slice(row, row + 1)
        pieces, end = [], 0
        for start, stop in run.rows.segments(Pattern(), row):
            pieces.append(torch.zeros_like(values[batch, end:start]))
            pieces.append(rule(*(x[batch, start:stop] for x in tensors)))
            end = stop
        pieces.append(torch.zeros_like(values[batch, end:]))
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows)
