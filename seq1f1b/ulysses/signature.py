"""What a model's forward accepts, and how it computes its loss; found out once, at dispatch."""

import inspect
from dataclasses import dataclass
from enum import Enum

from torch import nn


class LossKind(Enum):
    """Who computes the loss of labels.

    FUNCTION: the model's ``loss_function``, which is replaced by one for shifted labels. LOGITS:
    the model itself, by the usual formula, which is applied to its logits instead. OWN: the model
    itself, by another formula.
    """

    FUNCTION = "function"
    LOGITS = "logits"
    OWN = "own"


@dataclass(frozen=True)
class Signature:
    """names: of the parameters of ``forward``. takes_any: whether it has ``**kwargs``.

    positions_follow_mask: whether the model numbers tokens by their padding mask, as OPT does.
    """

    names: tuple[str, ...]
    takes_any: bool
    positions_follow_mask: bool

    @classmethod
    def read(cls, model: nn.Module) -> "Signature":
        """Look at the model's forward and its embeddings."""
        parameters = inspect.signature(model.forward).parameters
        follows = any(
            isinstance(module, nn.Embedding)
            and "attention_mask" in inspect.signature(module.forward).parameters
            for module in model.modules()
        )
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        names = tuple(n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD)
        return cls(names, takes_any, follows)

    def accepts(self, name: str) -> bool:
        """Whether forward has a parameter of this name, or takes any."""
        return self.takes_any or name in self.names

    def by_name(self, args: tuple[object, ...]) -> dict[str, object]:
        """Return positional arguments by their names."""
        if len(args) > len(self.names):
            raise TypeError(f"forward takes {len(self.names)} arguments, not {len(args)}")
        return dict(zip(self.names, args, strict=False))
