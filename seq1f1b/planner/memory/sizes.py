"""Bytes of the tensors of one layer on one rank, for a sub-sequence of a given length."""

from dataclasses import dataclass
from functools import cached_property

from seq1f1b.planner.setting import Setting


@dataclass(frozen=True)
class Sizes:
    """Bytes of tensors.

    tokens: of the sub-sequence on one context-parallel rank, all rows of the micro-batch.
    """

    setting: Setting
    tokens: int

    @property
    def element(self) -> int:
        """One element of an activation."""
        return self.setting.element_bytes

    @cached_property
    def full(self) -> float:
        """The residual stream of all tokens."""
        return float(self.tokens * self.setting.model.hidden * self.element)

    @cached_property
    def shards(self) -> int:
        """Ranks that the residual stream is dealt to."""
        return self.setting.tensor if self.setting.sequence_parallel else 1

    @cached_property
    def residual(self) -> float:
        """The residual stream as a rank holds it."""
        return self.full / self.shards

    def per_head(self, width: int, groups: int | None = None) -> float:
        """Return the size of ``width`` elements a token, dealt to tensor-parallel ranks by heads.

        Where there are fewer groups than ranks, each rank has one.
        """
        share = self.setting.tensor if groups is None else min(self.setting.tensor, groups)
        return self.tokens * width * self.element / share

    @cached_property
    def query(self) -> float:
        """Queries."""
        return self.per_head(self.setting.model.query_width)

    @cached_property
    def key(self) -> float:
        """Keys."""
        return self.per_head(self.setting.model.key_width, self._groups)

    @cached_property
    def value(self) -> float:
        """Values."""
        return self.per_head(self.setting.model.value_width, self._groups)

    @property
    def _groups(self) -> int | None:
        model = self.setting.model
        return None if model.latent else model.groups

    @cached_property
    def attended(self) -> float:
        """Attention's output."""
        return self.per_head(self.setting.model.output_width)

    @cached_property
    def log_sum_exp(self) -> float:
        """One fp32 number for each head and token."""
        return 4.0 * self.tokens * self.setting.model.heads / self.setting.tensor

    @cached_property
    def rotary(self) -> float:
        """A table of cosines or sines."""
        latent = self.setting.model.latent
        return float(
            self.tokens
            // self.setting.micro_batch_size
            * (latent.rotary if latent else self.setting.model.head)
            * self.element
        )

    @cached_property
    def mask(self) -> float:
        """A dropout mask of the residual stream with one byte an element."""
        return self.residual / self.element

    @cached_property
    def activated(self) -> float:
        """The MLP's hidden tensor behind its activation."""
        return self.tokens * self.setting.model.ffn * self.element / self.setting.tensor

    @cached_property
    def projected(self) -> float:
        """The MLP's hidden tensor before its activation."""
        return self.activated * (2 if self.setting.model.gated else 1)

    @cached_property
    def dispatched_tokens(self) -> float:
        """Tokens that a rank's experts get when routing is balanced."""
        experts = self.setting.model.experts
        assert experts is not None
        return self.tokens / self.shards * experts.topk * self.setting.expert_tensor

    @cached_property
    def dispatched(self) -> float:
        """What those tokens are before and after their experts."""
        return self.dispatched_tokens * self.setting.model.hidden * self.element

    @cached_property
    def expert_activated(self) -> float:
        """The experts' hidden tensor behind the activation."""
        experts = self.setting.model.experts
        assert experts is not None
        share = experts.ffn / self.setting.expert_tensor
        return self.dispatched_tokens * share * self.element

    @cached_property
    def shared_activated(self) -> float:
        """The shared experts' hidden tensor behind the activation."""
        experts = self.setting.model.experts
        assert experts is not None
        return self.tokens * experts.shared_ffn * self.element / self.setting.tensor

    @cached_property
    def logits(self) -> float:
        """Logits in the model's precision."""
        return self.tokens * self.setting.vocabulary * self.element / self.setting.tensor

    @cached_property
    def loss_logits(self) -> float:
        """Logits in fp32."""
        return self.tokens * self.setting.vocabulary * 4.0 / self.setting.tensor
