"""Rotary positions: which of transformers' kinds Megatron has, and how it asks for them."""

from dataclasses import dataclass
from typing import Any

from seq1f1b_tools.checkpoint.config import Config, positive
from seq1f1b_tools.checkpoint.problem import ConversionError

# what Megatron computes with, where its command line has no flag
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_OPTIONAL = ("beta_fast", "beta_slow")
_KINDS = {"latent": ("default", "yarn"), "heads": ("default", "linear", "llama3")}


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    kind: default, linear, llama3, or yarn. factor: of the last three.
    magnitude, magnitude_all: yarn's mscale and mscale_all_dim.
    """

    base: int
    kind: str = "default"
    factor: float = 1.0
    magnitude: float = 1.0
    magnitude_all: float = 0.0

    def flags(self) -> dict[str, Any]:
        """Return Megatron's flags, of multi-head latent attention for yarn."""
        flags: dict[str, Any] = {"--rotary-base": self.base}
        if self.kind == "linear":
            flags["--rotary-seq-len-interpolation-factor"] = int(self.factor)
        elif self.kind == "llama3":
            flags |= {"--use-rope-scaling": True, "--rope-scaling-factor": self.factor}
        elif self.kind == "yarn":
            flags |= {
                "--rotary-scaling-factor": self.factor,
                "--mscale": self.magnitude,
                "--mscale-all-dim": self.magnitude_all,
            }
        return flags


def read_rope(config: Config) -> Rope:
    """Return the rotary positions of a model; raises ConversionError for those Megatron lacks."""
    settings = config.get("rope_parameters") or {}
    kind = settings.get("rope_type", "default")
    kinds = _KINDS["latent" if config.get("kv_lora_rank") else "heads"]
    if kind not in kinds:
        raise ConversionError(
            f"{config.file}: RoPE scaling {kind!r:.80} is not converted; {' and '.join(kinds)} are"
        )
    base = positive(settings.get("rope_theta"), config.file, "rope_theta")
    if base != int(base):
        raise ConversionError(
            f"{config.file}: rope_theta = {base} is not converted: Megatron takes whole numbers"
        )
    _expect(config, settings, {"partial_rotary_factor": 1.0}, optional=("partial_rotary_factor",))
    if kind == "default":
        return Rope(int(base))
    factor = positive(settings.get("factor"), config.file, "factor of RoPE scaling")
    if kind == "linear":
        if factor != int(factor):
            raise ConversionError(
                f"{config.file}: linear RoPE scaling by {factor} is not converted: Megatron takes "
                "whole numbers"
            )
        return Rope(int(base), kind, factor)
    if kind == "llama3":
        _expect(config, settings, _LLAMA3)
        return Rope(int(base), kind, factor)
    return _yarn(config, settings, int(base), factor)


def _yarn(config: Config, settings: dict[str, Any], base: int, factor: float) -> Rope:
    _expect(config, settings, _YARN, optional=_OPTIONAL)
    _expect(config, settings, {"truncate": True, "attention_factor": None}, optional=("truncate",))
    magnitude, magnitude_all = settings.get("mscale"), settings.get("mscale_all_dim")
    if not magnitude and not magnitude_all:
        return Rope(base, "yarn", factor)
    return Rope(
        base,
        "yarn",
        factor,
        positive(magnitude, config.file, "mscale of RoPE scaling, beside mscale_all_dim,"),
        positive(magnitude_all, config.file, "mscale_all_dim of RoPE scaling, beside mscale,"),
    )


def _expect(
    config: Config,
    settings: dict[str, Any],
    expected: dict[str, Any],
    *,
    optional: tuple[str, ...] = (),
) -> None:
    """Raise ConversionError unless RoPE's settings are as Megatron has them."""
    for key, value in expected.items():
        given = settings.get(key)
        if given != value and not (given is None and key in optional):
            raise ConversionError(
                f"{config.file}: RoPE scaling with {key} = {given!r:.80}; Megatron has {value}"
            )
