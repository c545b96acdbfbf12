"""Where and with what a benchmark ran, and how its result is stored."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any


def setting(**others: Any) -> dict[str, Any]:
    """Return versions, machine and date, after what the caller adds."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    return {**others, **versions, **machine, "date": str(datetime.date.today())}


def sentence(setting: dict[str, Any]) -> str:
    """Return the setting in one line of text."""
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()) + "."


def save(output: Path, setting: dict[str, Any], rows: Any, text: str) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    document = {"setting": setting, "rows": rows}
    output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
