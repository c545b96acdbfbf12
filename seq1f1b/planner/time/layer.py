"""Seconds of one transformer layer, the embedding and the output layer on one sub-sequence."""

from dataclasses import dataclass

from seq1f1b.planner.memory.parameters import gradient_bytes, layer_parameters
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time.kernels import Kernels

_EXPOSED = 0.3
"""Share of the collectives beside weight gradients that these do not hide."""
_WEIGHT_GRADIENT = 1.03
"""Time of a backward's matrix products over twice the forward's: they add to the gradients."""
FUSED_OPERATIONS, SEPARATE_OPERATIONS = 30, 45
"""Kernels that a layer launches in a forward."""


@dataclass(frozen=True)
class Times:
    """Seconds of a forward, of its backward without weight gradients, and of those.

    operations: kernels that the host launches in a forward; a backward has as many.
    """

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        return Times(
            self.forward + other.forward,
            self.backward + other.backward,
            self.weights + other.weights,
            self.operations + other.operations,
        )


class LayerTimes:
    """Times of the parts of a setting's model on one rank."""

    def __init__(self, setting: Setting, kernels: Kernels, runtime: Runtime) -> None:
        self.setting, self.kernels = setting, kernels
        self.on_host = runtime.host
        self.backward_traffic = kernels.gpu.backward_traffic.value
        self._known: dict[tuple[int, bool], Times] = kernels.known(
            runtime.name,
            setting.model,
            setting.lengths,
            setting.tensor,
            setting.context,
            setting.experts,
            setting.expert_tensor,
            setting.sequence_parallel,
            setting.micro_batch_size,
            setting.element_bytes,
            setting.recompute,
        )
        a = setting.arguments
        fused = a.apply_rope_fusion and a.transformer_impl != "local"
        self.separate_rotary = setting.model.rotary and (
            runtime.rotary_tables == "per_layer" or not fused
        )
        self.operations = SEPARATE_OPERATIONS if self.separate_rotary else FUSED_OPERATIONS

    def layer(self, part: int, *, experts: bool) -> Times:
        """Return the times of a layer on a sub-sequence, with what it computes anew."""
        key = part, experts
        if key not in self._known:
            self._known[key] = self._layer(part, experts=experts)
        return self._known[key]

    def _layer(self, part: int, *, experts: bool) -> Times:
        attention = self.attention(part)
        feed_forward = self.experts(part) if experts else self.mlp(part, self.setting.model.ffn)
        times = attention + feed_forward + Times(operations=self.operations)
        return Times(
            times.forward,
            times.backward + self._anew(part, times, feed_forward, experts=experts),
            times.weights + self._accumulation(experts=experts),
            times.operations,
        )

    def _accumulation(self, *, experts: bool) -> float:
        """Return the time to add weight gradients to their buffers, whatever the tokens."""
        held = layer_parameters(self.setting, experts=experts)
        moved = 2 * gradient_bytes(self.setting) * (held.dense + held.experts)
        # without a fused kernel the product is written and read once more
        return self.kernels.elementwise(moved * (2 if self.on_host else 1))

    def _anew(self, part: int, whole: Times, feed_forward: Times, *, experts: bool) -> float:
        """Return the time of a layer's recomputed modules."""
        recompute, sizes = self.setting.recompute, self.sizes(part)
        anew = 0.0
        if recompute.has("core_attn"):
            anew += self._kernel(part, backward=False)
        if recompute.has("layernorm"):
            anew += self.kernels.elementwise(4 * sizes.residual)
        if recompute.has("mlp") and not experts:
            anew += feed_forward.forward
        if recompute.has("moe") and experts:
            anew += feed_forward.forward
        if recompute.has("moe_act") and experts:
            anew += self.kernels.elementwise(3 * sizes.expert_activated)
        if recompute.has("mla_up_proj") and self.setting.model.latent is not None:
            anew += self._latent_up(sizes.tokens)
        if recompute.has("shared_experts") and experts and not recompute.has("moe"):
            assert self.setting.model.experts is not None
            anew += self.mlp(part, self.setting.model.experts.shared_ffn).forward
        return anew

    def sizes(self, part: int) -> Sizes:
        """Return the sizes of tensors of a sub-sequence."""
        return Sizes(self.setting, self.setting.tokens(part))

    def attention(self, part: int) -> Times:
        """Norm, projections, rotary positions, the kernel, and the addition to the residual."""
        sizes, kernels = self.sizes(part), self.kernels
        products = self._attention_products(sizes.tokens)
        moved = 4 * sizes.residual + 3 * sizes.residual  # norm; dropout and addition
        heads = sizes.query + sizes.key
        moved += (15 if self.separate_rotary else 2) * heads if self.setting.model.rotary else 0
        moved += 2 * (heads + sizes.value)
        exchange = self._context_exchange(sizes)
        reads, sums = self._tensor_collectives(sizes)
        return Times(
            forward=products
            + self._kernel(part, backward=False)
            + kernels.elementwise(moved)
            + exchange
            + reads
            + sums,
            backward=products * _WEIGHT_GRADIENT
            + self._kernel(part, backward=True)
            + kernels.elementwise(moved) * self.backward_traffic
            + exchange
            + reads
            + _EXPOSED * (reads + sums),
            weights=products * _WEIGHT_GRADIENT,
        )

    def _kernel(self, part: int, *, backward: bool) -> float:
        """Return the time of attention over the prefix, whole sub-sequences of fewer heads."""
        setting, model = self.setting, self.setting.model
        piece = setting.parts[part]
        ranks = setting.tensor * setting.context
        rows = setting.micro_batch_size
        heads = model.heads * rows / ranks
        groups = heads if model.latent else max(rows, model.groups * rows / ranks)
        dim = (model.query_width + model.output_width) / 2 / model.heads
        return self.kernels.attention(piece.length, piece.start, heads, groups, dim, backward)

    def _attention_products(self, tokens: int) -> float:
        model, tp = self.setting.model, self.setting.tensor
        product = self.kernels.matrix_product
        if model.latent is not None:
            return (
                self._latent_down(tokens)
                + self._latent_up(tokens)
                + product(tokens, model.hidden, model.output_width / tp)
            )
        keys = (model.key_width + model.value_width) / min(tp, model.groups)
        return product(tokens, model.query_width / tp + keys, model.hidden) + product(
            tokens, model.hidden, model.output_width / tp
        )

    def _latent_down(self, tokens: int) -> float:
        latent, hidden = self.setting.model.latent, self.setting.model.hidden
        assert latent is not None
        own = tokens / (self.setting.tensor if self.setting.sequence_parallel else 1)
        time = self.kernels.matrix_product(own, latent.kv_rank + latent.rotary, hidden)
        if latent.query_rank is not None:
            time += self.kernels.matrix_product(own, latent.query_rank, hidden)
        return time

    def _latent_up(self, tokens: int) -> float:
        model, tp = self.setting.model, self.setting.tensor
        latent = model.latent
        assert latent is not None
        width = model.heads * (latent.head + latent.value) / tp
        time = self.kernels.matrix_product(tokens, width, latent.kv_rank)
        query = latent.query_rank or model.hidden
        return time + self.kernels.matrix_product(tokens, model.query_width / tp, query)

    def mlp(self, part: int, width: int) -> Times:
        """Norm, two products, the activation between them, and the addition to the residual."""
        sizes, kernels, model = self.sizes(part), self.kernels, self.setting.model
        share = width / self.setting.tensor
        factor = 2 if model.gated else 1
        products = kernels.matrix_product(
            sizes.tokens, share * factor, model.hidden
        ) + kernels.matrix_product(sizes.tokens, model.hidden, share)
        hidden = sizes.tokens * share * sizes.element * (factor + 1)
        moved = 7 * sizes.residual + hidden
        reads, sums = self._tensor_collectives(sizes)
        return Times(
            forward=products + kernels.elementwise(moved) + reads + sums,
            backward=products * _WEIGHT_GRADIENT
            + kernels.elementwise(moved) * self.backward_traffic
            + reads
            + _EXPOSED * (reads + sums),
            weights=products * _WEIGHT_GRADIENT,
        )

    def experts(self, part: int) -> Times:
        """Router, exchange of tokens, grouped products of this rank's experts, and back."""
        setting, kernels, sizes = self.setting, self.kernels, self.sizes(part)
        model, experts = setting.model, setting.model.experts
        assert experts is not None
        number = experts.count / setting.experts
        rows = sizes.dispatched_tokens / number
        share, factor = experts.ffn / setting.expert_tensor, 2 if model.gated else 1
        products = number * (
            kernels.matrix_product(rows, share * factor, model.hidden)
            + kernels.matrix_product(rows, model.hidden, share)
        )
        router = kernels.matrix_product(sizes.tokens / sizes.shards, experts.count, model.hidden)
        moved = 7 * sizes.residual + 6 * sizes.dispatched
        moved += sizes.expert_activated * (factor + 1)
        exchange = 2 * kernels.collective(
            "all_to_all", sizes.dispatched, setting.experts, setting.expert_tensor
        )
        gathered = kernels.collective("all_gather", sizes.dispatched, setting.expert_tensor)
        times = Times(
            forward=products + router + kernels.elementwise(moved) + exchange + 2 * gathered,
            backward=(products + router) * _WEIGHT_GRADIENT
            + kernels.elementwise(moved) * self.backward_traffic
            + exchange
            + 2 * gathered,
            weights=(products + router) * _WEIGHT_GRADIENT,
            operations=self.operations,
        )
        return times + self.mlp(part, experts.shared_ffn) if experts.shared_ffn else times

    def _tensor_collectives(self, sizes: Sizes) -> tuple[float, float]:
        """Return the time to gather a column-parallel input, and to sum a row-parallel output."""
        setting, collective = self.setting, self.kernels.collective
        if setting.tensor == 1:
            return 0.0, 0.0
        if not setting.sequence_parallel:
            return 0.0, collective("all_reduce", sizes.full, setting.tensor)
        return (
            collective("all_gather", sizes.full, setting.tensor),
            collective("reduce_scatter", sizes.full, setting.tensor),
        )

    def _context_exchange(self, sizes: Sizes) -> float:
        """Return the time of the all-to-alls around attention under context parallelism."""
        setting = self.setting
        if setting.context == 1:
            return 0.0
        moved = sizes.query + sizes.key + sizes.value + sizes.attended
        return self.kernels.collective("all_to_all", moved, setting.context, setting.tensor)

    def embedding(self, part: int) -> Times:
        """Look tokens up, and share them out."""
        sizes = self.sizes(part)
        _, sums = self._tensor_collectives(sizes)
        moved = self.kernels.elementwise(2 * sizes.full)
        return Times(moved + sums, 0.0, 2 * moved + sums, 3)

    def head(self, part: int) -> Times:
        """Final norm, output layer and cross entropy."""
        setting, kernels, sizes = self.setting, self.kernels, self.sizes(part)
        share = setting.vocabulary / setting.tensor
        product = kernels.matrix_product(sizes.tokens, share, setting.model.hidden)
        reads, _ = self._tensor_collectives(sizes)
        logits = sizes.tokens * share
        forward = product + kernels.elementwise(40 * logits + 4 * sizes.residual) + reads
        anew = forward if setting.recompute.loss else 0.0
        return Times(
            forward=forward,
            backward=product + kernels.elementwise(12 * logits) + 2 * reads + anew,
            weights=product,
            operations=15,
        )

    def ahead(self, part: int, *, experts: bool) -> Times:
        """One layer of multi-token prediction: a projection, a layer and an output layer."""
        sizes, hidden = self.sizes(part), self.setting.model.hidden
        product = self.kernels.matrix_product(
            sizes.tokens, hidden / self.setting.tensor, 2 * hidden
        )
        moved = self.kernels.elementwise(12 * sizes.residual)
        projection = Times(product + moved, product + 2 * moved, product, 8)
        return projection + self.layer(part, experts=experts) + self.head(part)
