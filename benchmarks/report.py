"""Where and with what a benchmark ran, and how its result is stored."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def device_name() -> str:
    """Return the GPU's name, or cpu."""
    has_gpu = torch.empty(0).cuda().is_cuda if torch.cuda.is_available() else False
    return torch.cuda.get_device_name() if has_gpu else "cpu"


def setting(**others: Any) -> dict[str, Any]:
    """Return versions, machine and date, after what the caller adds."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    for name in ("flash-attn", "transformer-engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if device_name() != "cpu":
        versions["cuda"] = torch.version.cuda
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    return {**others, **versions, **machine, "date": str(datetime.date.today())}


def sentence(setting: dict[str, Any]) -> str:
    """Return the setting in one line of text."""
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()) + "."


def table(setting: dict[str, Any], header: str, lines: Iterable[str]) -> str:
    """Return the setting and a table in Markdown; ``header`` ends with the line of dashes."""
    return "\n".join([sentence(setting), "", header, *lines, ""])


def show(text: str, output: Path | None, setting: dict[str, Any], rows: Any) -> None:
    """Print a report, and save it where there is an OUTPUT."""
    print(text)
    if output:
        save(output, setting, rows, text)


def save(output: Path, setting: dict[str, Any], rows: Any, text: str) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    document = {"setting": setting, "rows": rows}
    output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
