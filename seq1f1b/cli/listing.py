"""``seq1f1b models`` and ``seq1f1b gpus``: what can be named."""

from rich.table import Table

from seq1f1b.cli import report
from seq1f1b.planner.files import load
from seq1f1b.planner.gpu import gpu, gpus
from seq1f1b.planner.memory.parameters import stage_parameters
from seq1f1b.planner.presets import Preset, model_options, presets
from seq1f1b.planner.resolve import resolve


def models() -> None:
    """List the models that --model knows by name."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("name", "parameters", "layers", "hidden", "heads", "from"):
        table.add_column(title, no_wrap=title != "from")
    for name in presets():
        setting = resolve(model_options(name) | {"seq_length": 4096})
        held, model = stage_parameters(setting, 0), setting.model
        table.add_row(
            name,
            f"{(held.dense + held.experts) / 1e9:.1f}B",
            str(model.num_layers),
            str(model.hidden),
            f"{model.heads}" + (f"/{model.groups}" if model.groups != model.heads else ""),
            load(Preset, "models", name).source,
        )
    report.console().print(table)


def list_gpus() -> None:
    """List the GPUs that --gpu knows by name."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("name", "bf16 TFLOP/s", "usable GiB", "GB/s", "kernel curves"):
        table.add_column(title, no_wrap=True)
    for name in gpus():
        one = gpu(name)
        scaled = "" if one.curve_scale == 1 else f" x {one.curve_scale:g}"
        table.add_row(
            name,
            f"{one.bf16_tflops.value:g}",
            f"{one.usable_gib.value:.1f}",
            f"{one.memory_gb_s.value:g}",
            f"{one.kernel_curves.name}{scaled} ({one.kernel_curves.kind})",
        )
    report.console().print(table)
