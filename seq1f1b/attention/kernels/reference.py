"""Attention written out in plain torch: slow, for any device and type, and easy to check."""

import torch
from torch import Tensor

from seq1f1b.attention.kernels.interface import Attended, Gradients, Inputs
from seq1f1b.attention.kernels.limits import Limited, Limits


class Reference(Limited):
    """Builds the n x (c + n) matrix of scores."""

    name = "reference"
    limits = Limits("nothing; holds the whole matrix", equal_heads=False)

    def forward(self, inputs: Inputs) -> Attended:
        """See Kernel; the log-sum-exp is ``[b, kv heads, group, n]``."""
        query, key, value, scale = inputs
        scores = _scores(query, key, scale)
        log_sum_exp = scores.logsumexp(dim=-1)
        weights = (scores - log_sum_exp[..., None]).exp()
        output = torch.einsum("bkgij,jbkd->ibkgd", weights, value.to(weights.dtype))
        return Attended(output.flatten(2, 3).to(query.dtype), log_sum_exp)

    def backward(self, grad_output: Tensor, inputs: Inputs, attended: Attended) -> Gradients:
        """See Kernel."""
        query, key, value, scale = inputs
        output, log_sum_exp = attended
        weights = (_scores(query, key, scale) - log_sum_exp[..., None]).exp()
        dtype, kv_heads = weights.dtype, key.shape[2]
        grad = grad_output.to(dtype).unflatten(2, (kv_heads, -1))
        grad_weights = torch.einsum("ibkgd,jbkd->bkgij", grad, value.to(dtype))
        dot = (grad * output.to(dtype).unflatten(2, (kv_heads, -1))).sum(-1).permute(1, 2, 3, 0)
        grad_scores = weights * (grad_weights - dot[..., None]) * scale
        grad_query = torch.einsum("bkgij,jbkd->ibkgd", grad_scores, key.to(dtype)).flatten(2, 3)
        grouped = query.to(dtype).unflatten(2, (kv_heads, -1))
        grad_key = torch.einsum("bkgij,ibkgd->jbkd", grad_scores, grouped)
        grad_value = torch.einsum("bkgij,ibkgd->jbkd", weights, grad)
        prefix = key.shape[0] - query.shape[0]
        return Gradients(
            grad_query.to(query.dtype),
            grad_key[prefix:].to(key.dtype),
            grad_value[prefix:].to(value.dtype),
            (grad_key[:prefix], grad_value[:prefix]) if prefix else None,
        )


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return masked scores ``[b, kv heads, group, n, c + n]`` in at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("ibkgd,jbkd->bkgij", grouped, key.to(dtype)) * scale
    num_queries, num_keys = query.shape[0], key.shape[0]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(
        num_keys - num_queries + 1
    )
    return scores.masked_fill(hidden, float("-inf"))
