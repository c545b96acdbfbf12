"""Find the doors of a model: on a small model of the same make, or else on the model itself."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seq1f1b.ulysses.causal_loss import is_usual_loss, shifted_loss, target_loss
from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.interface import NAME, register
from seq1f1b.ulysses.labels import IGNORED
from seq1f1b.ulysses.memory.tiled_loss import body_paths, tiled_loss
from seq1f1b.ulysses.mends import mend
from seq1f1b.ulysses.mends.sdpa import SdpaDoor
from seq1f1b.ulysses.mesh import ALONE
from seq1f1b.ulysses.probe import LENGTH, Finding, probe
from seq1f1b.ulysses.randomise import randomise
from seq1f1b.ulysses.rows import Rows
from seq1f1b.ulysses.run import Run
from seq1f1b.ulysses.shrink import fingerprint, shrink
from seq1f1b.ulysses.signature import LossKind, Signature

_MOST_PARAMETERS = 30_000_000


@dataclass(frozen=True)
class Doors:
    """How layers of a model reach the group.

    implementation: the attention implementation that its configuration must name. loss: who
    computes the loss. body: the module without which the rest of the model makes logits; None if
    none was found.
    """

    implementation: str
    loss: LossKind
    body: str | None


_known: dict[tuple[type, str], Doors] = {}


def find_doors(model: nn.Module) -> Doors:
    """Return the doors of ``model``, which is left as it was.

    Raises UnsupportedModelError, with the classes of the modules at fault, when not every mixing of
    tokens passes through a door.
    """
    register()
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model: only causal language models can "
            f"be shared out"
        )
    key = type(model), fingerprint(config) if config is not None else ""
    small = small_model(model) if hasattr(config, "to_dict") else None
    if small is None:
        if any(p.is_meta for p in model.parameters()):
            raise UnsupportedModelError(
                f"no small model of {type(model).__name__} can be built from its configuration, "
                f"and its own weights are on the meta device: load them before dispatch_modules"
            )
        return _try_all(model)
    if key not in _known:
        _known[key] = _try_all(small)
    return _known[key]


def _try_all(model: nn.Module) -> Doors:
    failures: dict[str, Exception] = {}
    for implementation in (NAME, "sdpa", "eager"):
        try:
            with _prepared(model, implementation):
                return _try(model, implementation)
        except Exception as error:
            failures[implementation] = error
    raise _refusal(model, failures) from failures[NAME]


def _try(model: nn.Module, implementation: str) -> Doors:
    """Probe the model through the doors that stand open with one attention implementation."""
    signature = Signature.read(model)
    vocabulary = vocabulary_of(model)

    def forward(ids: Tensor, positions: Tensor, run: Run, **more: Any) -> Any:
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
            **more,
        }
        with run.active():
            return model(**{k: x for k, x in arguments.items() if signature.accepts(k)})

    def make_run(*args: Any, **kwargs: Any) -> Run:
        return Run(*args, door=SdpaDoor, **kwargs)

    if not probe(model, vocabulary, forward, make_run):
        raise UnsupportedModelError("no layer was seen that looks at more than one token")
    sample = _Sample(model, vocabulary, forward, make_run)
    kind = sample.loss_kind()
    return Doors(implementation, kind, sample.body(kind))


class _Sample:
    """A few tokens with labels, on which a model shows how it computes its loss."""

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int,
        forward: Callable[..., Any],
        make_run: Callable[..., Run],
    ) -> None:
        device = next(model.parameters()).device
        self._model, self._forward = model, forward
        self._ids = (torch.arange(LENGTH, device=device) * 7 % vocabulary)[None]
        self._positions = torch.arange(LENGTH, device=device)[None]
        self._labels = self._ids.clone()
        self._labels[0, 2:4] = IGNORED
        self._make_run = lambda: make_run(ALONE, Rows.read(self._positions), is_closed=True)

    @torch.no_grad()
    def loss_kind(self) -> LossKind:
        """Find out who computes the loss, by asking for it."""
        run = self._make_run()
        try:
            output = self._forward(self._ids, self._positions, run, labels=self._labels)
        except Exception:
            return LossKind.OWN
        if run.num_losses:
            return LossKind.FUNCTION
        logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
        if not isinstance(logits, Tensor) or not isinstance(loss, Tensor):
            return LossKind.OWN
        return LossKind.LOGITS if is_usual_loss(loss, logits, self._labels) else LossKind.OWN

    @torch.no_grad()
    def body(self, kind: LossKind) -> str | None:
        """Find the module that a tiled loss can stand in for, by comparing the losses."""
        if kind is LossKind.OWN:
            return None
        for path in body_paths(self._model):
            try:
                whole = self._loss(kind, None)
                tiled = self._loss(kind, path)
            except Exception:
                continue
            if torch.allclose(whole, tiled, rtol=1e-3):
                return path
        return None

    def _loss(self, kind: LossKind, body: str | None) -> Tensor:
        run = self._make_run()
        run.num_items = LENGTH

        def on_targets(part: Tensor | None, is_first: bool) -> tuple[Any, Tensor]:
            labels = {"labels": part} if kind is LossKind.FUNCTION else {}
            output = self._forward(self._ids, self._positions, run, **labels)
            if kind is LossKind.FUNCTION:
                return output, output.loss
            assert part is not None
            return output, target_loss(output.logits, part, LENGTH)

        if body is None:
            return on_targets(self._labels, True)[1]
        tile = LENGTH // 2
        loss: Tensor = tiled_loss(run, self._model, body, on_targets, self._labels, tile).loss
        return loss


@contextmanager
def _prepared(model: nn.Module, implementation: str) -> Iterator[None]:
    """Mend a copy of the model's parts in place inside; afterwards the model is as before."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    mend(model)
    install_configs(model, implementation)
    install_loss(model)
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def install_configs(model: nn.Module, implementation: str) -> None:
    """Give the model configurations of its own that name an attention implementation.

    Other models may share the object, and must not change with this one.
    """
    from transformers import PretrainedConfig

    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PretrainedConfig):
                vars(module)[name] = copy.deepcopy(value, memo)
    for made in memo.values():
        if isinstance(made, PretrainedConfig):
            made._attn_implementation_internal = implementation


def install_loss(model: Any) -> None:
    """Replace the model's loss function by the one for shifted labels, if it has the usual one."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "loss_function", None) is ForCausalLMLoss:
        model.loss_function = shifted_loss


def vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens the model knows."""
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    size = getattr(text, "vocab_size", None) or getattr(text, "padded_vocab_size", None)
    if size is None and embedding is None:
        raise UnsupportedModelError("the model has no token embedding")
    return int(size if size is not None else embedding.num_embeddings)  # type: ignore[union-attr]


def small_model(model: Any) -> nn.Module | None:
    """Return a small model with the same classes of modules; None if there is none to be had."""
    config = model.config
    implementation = config._attn_implementation
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            reduced = shrink(config)
            usual = implementation if implementation in ("eager", "sdpa") else "sdpa"
            reduced._attn_implementation_internal = usual
            with torch.device("meta"):
                outline = _plain(type(model))(copy.deepcopy(reduced))
            if sum(p.numel() for p in outline.parameters()) > _MOST_PARAMETERS:
                return None
            small = _plain(type(model))(reduced).float().eval()
            randomise(small)
    except Exception:
        return None
    built = {_plain(type(module)) for module in small.modules()}
    own = {_plain(type(module)) for module in model.modules()}
    return small if own <= built | _HARMLESS else None


_HARMLESS = {nn.Dropout, nn.Identity, nn.Linear, nn.ModuleList, nn.ModuleDict, nn.Sequential}


def _plain(kind: type) -> type:
    """Return a class as it was before FSDP2 put its own in front."""
    if len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule":
        return kind.__mro__[2]
    return kind


def _refusal(model: nn.Module, failures: dict[str, Exception]) -> UnsupportedModelError:
    """Say what stands in the way; where the doors fail for several reasons, the plainest."""
    start = f"{type(model).__name__} cannot be dispatched: "
    findings = [e for e in failures.values() if isinstance(e, Finding)]
    for error in failures.values():
        if isinstance(error, UnsupportedModelError):
            return UnsupportedModelError(f"{start}{error}")
    for finding in sorted(findings, key=lambda f: f.kind):
        classes, places = ", ".join(finding.classes), ", ".join(finding.names[:3])
        if finding.kind == "mixes":
            return UnsupportedModelError(
                f"{start}{classes} mixes tokens without transformers' attention interface, without "
                f"F.scaled_dot_product_attention, and is no kind of layer known here (seen at "
                f'{places}). If the model offers attn_implementation="sdpa", load it so'
            )
        return UnsupportedModelError(
            f"{start}{classes} takes positions from the shard instead of position_ids (seen at "
            f"{places})"
        )
    error = failures[NAME]
    reason = f"{type(error).__name__}: {error}"
    return UnsupportedModelError(
        f"{start}{_module_at_fault(error)} fails on a few tokens with {reason}"
    )


def _module_at_fault(error: BaseException) -> str:
    """Return the class of the innermost module whose code raised the error."""
    name = "it"
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            name = type(owner).__name__
        trace = trace.tb_next
    return name
