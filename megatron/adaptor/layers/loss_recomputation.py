"""The output layer and its loss, computed anew in the backward.

The last stage keeps logits and softmax [s, b, V] of every sub-sequence whose backward is to come,
which with a large vocabulary outweighs its layers. With this it keeps hidden states [s, b, h], and
logits of one sub-sequence at a time, for one more product of the output layer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.adaptor.patches import Patch


class LossRecomputation:
    """Recomputes losses in training steps for which ``asked`` returns true."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's GPT model."""
        return [Patch("megatron.core.models.gpt.gpt_model:GPTModel._postprocess", self.postprocess)]

    def postprocess(
        self,
        original: Callable[..., Any],
        model: Any,
        *,
        labels: Tensor | None,
        output_processor: Callable[..., Tensor] | None,
        **kwargs: Any,
    ) -> Any:
        """Recompute the output layer and the loss in the backward, if asked to."""
        if self._asked() and model.post_process and torch.is_grad_enabled():
            if labels is None or output_processor is not None:
                raise ValueError(
                    "--seq1f1b-recompute-loss: the script's loss is computed from logits, which "
                    "are kept for it, and not by Megatron from labels: leave the flag out"
                )
            output_processor = _recomputed
        return original(model, labels=labels, output_processor=output_processor, **kwargs)


def check_model(chunks: Iterable[nn.Module]) -> None:
    """Raise ValueError for a model that computes its loss elsewhere than Megatron's GPTModel."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.utils import get_attr_wrapped_model

    for chunk in chunks:
        model = get_attr_wrapped_model(chunk, "post_process", return_model_obj=True)
        if not isinstance(model, GPTModel):
            raise ValueError(
                f"--seq1f1b-recompute-loss: the model is a {type(model).__name__}, and only "
                "Megatron's GPTModel can recompute its loss: leave the flag out"
            )


def _recomputed(
    *,
    hidden_states: Tensor,
    output_layer: Callable[..., tuple[Tensor, Any]],
    output_weight: Tensor | None,
    labels: Tensor,
    runtime_gather_output: bool | None,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """Return losses [b, s] of hidden states [s, b, h], of which alone the backward is computed."""
    from megatron.core.tensor_parallel import checkpoint

    def loss(hidden: Tensor) -> Tensor:
        logits, _ = output_layer(
            hidden, weight=output_weight, runtime_gather_output=runtime_gather_output
        )
        return compute_language_model_loss(labels, scale_logits(logits))

    # Below frozen layers the output would have no gradient, because its only input has none.
    return (
        checkpoint(loss, False, hidden_states)
        if hidden_states.requires_grad
        else loss(hidden_states)
    )
