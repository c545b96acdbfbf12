"""Where Megatron parses and validates its command line."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron.adaptor.command_line.flags import add_arguments
from megatron.adaptor.command_line.refusals import refuse, settings_from
from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.patches import Patch
from megatron.adaptor.reports.outlook import choose_splits
from megatron.adaptor.without_engine import fallbacks

_ARGUMENTS = "megatron.training.arguments"


class CommandLine:
    """Adds our flags, and passes settings that can work to ``accept``."""

    def __init__(self, accept: Callable[[Settings, argparse.Namespace], None]) -> None:
        self._accept = accept

    def patches(self) -> list[Patch]:
        """Return what is replaced around Megatron's command line."""
        return [
            Patch(f"{_ARGUMENTS}:add_megatron_arguments", self.add_megatron_arguments),
            Patch(f"{_ARGUMENTS}:validate_args", self.validate_args),
            Patch("megatron.training.yaml_arguments:load_yaml", self.load_yaml),
        ]

    def add_megatron_arguments(
        self, original: Callable[..., Any], parser: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        """Add the flags of Seq1F1B to Megatron's."""
        return add_arguments(original(parser))

    def validate_args(
        self,
        original: Callable[..., Any],
        args: argparse.Namespace,
        defaults: dict[str, Any] | None = None,
    ) -> Any:
        """Check the flags before any process group is made."""
        refuse(fallbacks.refusals(args), args.rank)  # Megatron would stumble over these
        result = original(args, defaults or {})
        refuse([fault for fault in [choose_splits(args)] if fault], args.rank)
        settings, faults = settings_from(args)
        refuse(faults, args.rank)
        if settings.packing is not None and settings.runs_executor:
            # All stages get the documents' boundaries; no layer reads an s x s mask.
            args.create_attention_mask_in_dataloader = False
        self._accept(settings, args)
        return result

    def load_yaml(self, original: Callable[..., Any], yaml_path: str) -> Any:
        """Refuse a file that replaces every argument, those of Seq1F1B too."""
        refuse(
            [
                f"--yaml-cfg {yaml_path} replaces every argument, those of Seq1F1B too: pass flags "
                "instead"
            ],
            rank=0,
        )
