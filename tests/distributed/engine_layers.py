"""Linear layers without biases that treat gradients as transformer-engine's do, in torch.

What they share with them, of version 2.3 and later: the gradient goes into ``main_grad`` and a
placeholder to autograd; the backward of the first forward since ``is_first_microbatch`` was set
overwrites the buffer, unless the layer is told ``None``; with ``delay_wgrad_compute`` the product
waits in ``wgrad_store`` until ``backward_dw``, oldest first.
"""

import queue

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class Store:
    """The products that wait."""

    def __init__(self, is_enabled):
        self.is_enabled = is_enabled
        self.context = queue.Queue()

    def delay_wgrad_compute(self):
        return self.is_enabled


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, layer, is_first):
        ctx.save_for_backward(inputs, weight)
        ctx.layer, ctx.is_first = layer, is_first
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        inputs, values = ctx.saved_tensors
        weight, adds = ctx.layer.weight, not ctx.is_first
        main_grad = weight.main_grad

        def accumulate():
            product = gradient.flatten(0, -2).t() @ inputs.flatten(0, -2)
            main_grad.copy_(main_grad + product if adds else product)

        if ctx.layer.wgrad_store.delay_wgrad_compute():
            ctx.layer.wgrad_store.context.put(accumulate)
        else:
            accumulate()
        weight.grad_added_to_main_grad = True
        return gradient @ values, torch.full_like(weight, torch.nan), None, None


class _EngineLinear:
    """In front of a linear layer of Megatron's that has no ranks to share with."""

    def __init__(self, *args, config, **kwargs):
        super().__init__(*args, config=config, **kwargs)
        assert self.bias is None
        self.is_first_microbatch = True
        self.caches = not config.disable_parameter_transpose_cache
        self.wgrad_store = Store(config.delay_wgrad_compute)

    def forward(self, inputs, *args, **kwargs):
        is_first = self.is_first_microbatch if self.caches else None
        self.is_first_microbatch = False
        return _Product.apply(inputs, self.weight, self, is_first), None

    def backward_dw(self):
        self.wgrad_store.context.get_nowait()()


class EngineColumnLinear(_EngineLinear, ColumnParallelLinear):
    """Stands for TEColumnParallelLinear."""


class EngineRowLinear(_EngineLinear, RowParallelLinear):
    """Stands for TERowParallelLinear."""


def engine_spec(spec):
    """Return a layer spec of Megatron's local layers with these in their place."""
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.keywords
    for place, column, row in (
        (attention, "linear_qkv", "linear_proj"),
        (mlp["submodules"], "linear_fc1", "linear_fc2"),
    ):
        setattr(place, column, EngineColumnLinear)
        setattr(place, row, EngineRowLinear)
    return spec
