"""``seq1f1b plan-offload``: model chunks in host memory, on a few small GPUs."""

import textwrap
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from seq1f1b.cli import megatron, offload_options, options, report
from seq1f1b.cli.megatron import or_exit, read_given
from seq1f1b.cli.offload_options import make_machine
from seq1f1b.cli.options import flag_error
from seq1f1b.offload.planning.case import Case, Recomputation, make_case
from seq1f1b.offload.planning.costs import adam_bytes, resident_bytes, total_parameters
from seq1f1b.offload.planning.machine import GB
from seq1f1b.offload.planning.search import best_offloaded, best_resident, best_zero_offload
from seq1f1b.offload.planning.simulation import Adam
from seq1f1b.offload.planning.thresholds import Thresholds, bubble, thresholds
from seq1f1b.offload.planning.ways import Way
from seq1f1b.planner.gpu import Gpu
from seq1f1b.planner.gpu import gpu as load_gpu
from seq1f1b.planner.launch import flags, wrapped
from seq1f1b.planner.memory.parameters import gradient_bytes
from seq1f1b.planner.search import MARGIN

_WIDTH = 80
_RUNS = (
    "Every figure is a model's; nothing was measured. --offload-model-chunks has not run on a GPU "
    "yet (docs/offload.md)."
)
_MARK = "* Without clipping by the norm of all gradients: needs --clip-grad 0."


def plan_offload(
    ctx: typer.Context,
    gpus: Annotated[
        int,
        typer.Option(
            "--gpus",
            min=1,
            max=1024,
            help="GPUs, each a pipeline stage.",
            rich_help_panel="Cluster",
        ),
    ],
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="NAME|PATH",
            help="Kind of GPU (seq1f1b gpus lists them), or the path of a description.",
            rich_help_panel="Cluster",
        ),
    ],
    host_gb: Annotated[
        float | None,
        typer.Option(
            "--host-gb",
            parser=options.number_from(1e-3),
            metavar="NUMBER",
            help="GB of host memory that there are.",
            rich_help_panel="Cluster",
        ),
    ] = None,
    model: megatron.Model = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, help="Tokens of a step, instead of --global-batch-size."),
    ] = None,
    adam: Annotated[
        Adam, typer.Option("--adam", help="Whose way is explained, and its flags printed.")
    ] = Adam.SERIAL,
    num_slots: Annotated[
        int | None,
        typer.Option("--offload-model-chunks", min=1, help="Model chunks on a GPU at a time."),
    ] = None,
    num_turns: Annotated[
        int | None,
        typer.Option("--turns", min=1, help="Turns that a step's sub-sequences are dealt to."),
    ] = None,
    peak_fraction: offload_options.PeakFraction = 0.6,
    pcie: offload_options.Pcie = 25.0,
    uplink: offload_options.Uplink = None,
    per_root: offload_options.PerRoot = 2,
    crossed: offload_options.Crossed = False,
    host: offload_options.Host = None,
    collectives: offload_options.Collectives = 10.0,
    stages: offload_options.Stages = 10.0,
    buckets: offload_options.Buckets = 2.0,
    gradient_copy: offload_options.GradientCopy = 4,
    recompute: offload_options.Recompute = Recomputation.FULL,
    fp32_gradients: offload_options.Fp32Gradients = False,
    min_tokens: offload_options.MinTokens = 1024,
    as_json: options.Json = False,
) -> None:
    """Plan training whose model chunks are in host memory and visit the GPUs.

    The model is a preset, a Hugging Face config.json or Megatron's options; --seq-length and
    --global-batch-size (or --tokens) are needed too. The pipeline goes over all GPUs. Searched are
    the chunks of a stage (v) and those on its GPU (k), turns (T), sub-sequences (s), micro-batches
    (m) and the layers of chunks; --num-virtual-stages-per-pipeline-rank, --seq1f1b-splits,
    --micro-batch-size and others fix them. Steps are simulated with computing, copies and Adam each
    on lanes of their own, and every tensor of a GPU is followed. Beside it: ZeRO-Offload, and
    everything on the GPUs. All figures are a model's.
    """
    device = or_exit(lambda: load_gpu(gpu))
    machine = make_machine(
        device,
        gpus,
        peak_fraction=peak_fraction,
        pcie=pcie,
        uplink=uplink,
        per_root=per_root,
        crossed=crossed,
        host=host,
        collectives=collectives,
        stages=stages,
        buckets=buckets,
        gradient_copy=gradient_copy,
    )
    given = read_given(ctx.args, model)
    values = _with_batch(given.values, tokens)
    case = or_exit(
        lambda: make_case(
            values,
            machine,
            profile=device.runtime,
            recomputation=recompute,
            fp32_gradients=fp32_gradients,
            num_slots=num_slots,
            num_turns=num_turns,
            min_tokens=min_tokens,
        )
    )
    with Console(stderr=True).status("searching ..."):
        found = or_exit(lambda: _Found(case, device, adam, host_gb))
    if as_json:
        report.write_json(found.figures(given.ignored))
    else:
        _print(found, given.ignored)
    if found.chosen is None:
        raise typer.Exit(1)


def _with_batch(values: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """Return ``values`` with the sequences of a step that ``tokens`` are."""
    if tokens is None:
        return values
    if values.get("global_batch_size") is not None:
        raise flag_error("--tokens", "goes instead of --global-batch-size")
    length = values.get("seq_length")
    if not length or length < 0 or tokens % length:
        raise flag_error("--tokens", f"{tokens}: not a multiple of --seq-length {length}")
    return values | {"global_batch_size": tokens // length}


class _Found:
    """The ways, and what is said of them."""

    def __init__(self, case: Case, device: Gpu, adam: Adam, host_gb: float | None) -> None:
        self.case, self.device, self.host_gb = case, device, host_gb
        self.zero = best_zero_offload(case)
        self.resident = best_resident(case)
        self.offloaded = best_offloaded(case, Adam)
        self.chosen = self.offloaded[adam]
        self.adam = adam

    @property
    def ways(self) -> list[Way]:
        """Everything that there is a row for."""
        every = [self.zero, self.resident, *self.offloaded.values()]
        return [way for way in every if way is not None]

    def fits(self, way: Way) -> bool:
        """Whether a GPU has room."""
        return way.gpu_bytes <= self.case.machine.usable

    @property
    def is_needed(self) -> bool:
        """Whether a step with everything on the GPUs does not fit with some memory to spare."""
        limit = self.case.machine.usable * (1 - MARGIN)
        return self.resident is None or self.resident.gpu_bytes > limit

    @property
    def resident_bytes(self) -> float:
        """Of weights, gradients and optimizer states, of a GPU on average."""
        base = self.case.base
        return resident_bytes(base) * total_parameters(base) / self.case.num_stages

    @property
    def thresholds(self) -> Thresholds:
        """Tokens from which copies and Adam hide."""
        return thresholds(self.case.base, self.case.machine)

    def figures(self, ignored: tuple[str, ...]) -> dict[str, Any]:
        """Return everything in plain numbers; bytes, seconds and tokens."""
        case, way = self.case, self.chosen
        hidden = self.thresholds
        return {
            "gpu": self.device.name,
            "gpus": case.num_stages,
            "usable_bytes": case.machine.usable,
            "tokens": case.tokens,
            "parameters": total_parameters(case.base),
            "offload_is_needed": self.is_needed,
            "resident_bytes": self.resident_bytes,
            "ways": [self._way(one) for one in self.ways],
            "adam": str(self.adam),
            "tokens_a_turn_for_loads": hidden.loads,
            "tokens_a_turn_for_loads_together": hidden.loads_together,
            "tokens_a_step_for_adam": hidden.adam,
            "bubble": None if way is None else _bubble(way),
            "flags": None if way is None else command_flags(way),
            "assumed": list(assumptions(case)),
            "without_effect": list(ignored),
            "measured": False,
        }

    def _way(self, way: Way) -> dict[str, Any]:
        shape, parts = way.shape, way.parts
        return {
            "name": way.name,
            "adam": None if way.adam is None else str(way.adam),
            "clips": _clips(way),
            "step_seconds": way.seconds,
            "tokens_per_second": way.tokens_per_second,
            "gpu_bytes": way.gpu_bytes,
            "host_bytes": way.host_bytes,
            "fits": self.fits(way),
            "chunks": shape.num_chunks if shape else None,
            "chunks_on_the_gpu": shape.num_slots if shape else None,
            "turns": shape.num_turns if shape else None,
            "splits": shape.num_splits if shape else None,
            "micro_batches": shape.num_micro_batches if shape else None,
            "layout": way.setting.arguments.pipeline_model_parallel_layout,
            "loads": list(way.loads),
            "bound_by": parts.bound_by,
            "compute_seconds": parts.compute,
            "bubble_seconds": parts.bubble,
            "adam_seconds": parts.adam,
            "pcie_seconds": parts.pcie,
            "collectives_seconds": parts.collectives,
            "bound_seconds": way.bound.seconds if way.bound else None,
        }


def _clips(way: Way) -> bool:
    """Whether gradients can be clipped by the norm of all of them."""
    return way.adam is None or way.adam.clips


def _bubble(way: Way) -> float:
    shape = way.shape
    assert shape is not None
    sizes = shape.num_chunks, shape.num_micro_batches, shape.num_splits
    return bubble(way.setting.num_stages, *sizes)


def command_flags(way: Way) -> list[str]:
    """Return the words of a training command line for a way whose chunks visit the GPUs."""
    shape = way.shape
    assert shape is not None
    words = [*flags(way.setting), "--offload-model-chunks", str(shape.num_slots)]
    if shape.num_turns > 1:
        words += ["--seq1f1b-turn", str(shape.turn(way.setting.num_stages))]
    if way.adam is not Adam.SERIAL:
        words.append("--offload-just-in-time-updates")
    if not _clips(way):
        words += ["--clip-grad", "0", "--rerun-mode", "disabled"]
    return [*words, "--offload-prefetch"]


def assumptions(case: Case) -> list[str]:
    """Return what the figures rest on, a sentence each."""
    machine, base = case.machine, case.base
    shared = min(machine.per_root, machine.num_gpus)
    links = f"{machine.pcie / GB:g} GB/s a GPU"
    if shared > 1:
        links += f", {machine.uplink / GB:g} GB/s for {shared} under a root"
    recomputed = base.recompute.granularity or "no"
    if base.recompute.loss:
        recomputed += " and loss"
    return [
        f"{machine.flops / 1e12:.1f} TFLOP/s a GPU",
        f"PCIe {links}",
        f"host memory {machine.host / GB:g} GB/s and {adam_bytes(base)} bytes a parameter for Adam",
        f"{machine.stages / GB:g} GB/s between stages",
        f"collectives {machine.collectives / GB:g} GB/s",
        f"recomputation: {recomputed}",
        f"gradients of {gradient_bytes(base)} bytes",
        *base.assumed,
    ]


def _print(found: _Found, ignored: tuple[str, ...]) -> None:
    console = report.console()
    case = found.case
    base, machine = case.base, case.machine
    console.print(
        f"[bold]{case.num_stages} x {found.device.title}[/], {machine.usable / GB:.1f} GB usable "
        f"each; {total_parameters(base) / 1e9:.2f}e9 parameters"
    )
    console.print(f"{case.rows} x {base.seq_length} = {case.tokens} tokens a step")
    _say(console, _need(found))
    console.print(_table(found))
    marks = (
        "host: GB of its memory. v/k/T/s/m: model chunks a stage, those on its GPU, turns, "
        "sub-sequences, micro-batches."
    )
    if any(not found.fits(way) for way in found.ways):
        marks += " !: more than a GPU has."
    _say(console, marks, dim=True)
    _say(console, _MARK, dim=True)
    _say(console, _RUNS, dim=True)
    if found.chosen is None:
        _say(
            console,
            f"No shape whose chunks visit the GPUs fits into {machine.usable / GB:.1f} GB: cut "
            "sequences further (--seq1f1b-splits), or use shorter ones, fewer, or more GPUs.",
        )
    else:
        _explain(console, found, found.chosen)
    _say(console, f"assumed: {'; '.join(assumptions(case))}", dim=True)
    if ignored:
        _say(console, f"without effect here: {', '.join(ignored)}", dim=True)
    if found.chosen is not None:
        words = command_flags(found.chosen)
        console.print("\n" + wrapped(words, width=_WIDTH - 1), markup=False)


def _say(console: Console, text: str, *, dim: bool = False) -> None:
    """Print a paragraph that is readable at 80 columns."""
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    console.print("\n".join(lines), style="dim" if dim else None, markup=False)


def _need(found: _Found) -> str:
    usable = found.case.machine.usable / GB
    each = resident_bytes(found.case.base)
    text = f"{each} bytes a parameter are {found.resident_bytes / GB:.1f} GB a GPU"
    if found.resident is None:
        return f"Offloading is needed: {text}, and no pipeline with everything there is possible."
    held = f"{found.resident.gpu_bytes / GB:.1f} of {usable:.1f} GB"
    if found.is_needed:
        return f"Offloading is needed: {text}, and with a step's tensors {held}."
    return f"Offloading is not needed: {text}, and with a step's tensors {held}. See seq1f1b plan."


def _table(found: _Found) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for title in ("s/step", "tokens/s", "GB/GPU", "host", "v/k/T/s/m"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for way in found.ways:
        star = "" if _clips(way) else " *"
        room = "" if found.fits(way) else "!"
        table.add_row(
            f"{way.name}{star}",
            _seconds(way.seconds),
            f"{way.tokens_per_second:.0f}",
            f"{way.gpu_bytes / GB:.1f}{room}",
            f"{way.host_bytes / GB:.0f}" if way.host_bytes else "-",
            _shape_text(way),
            way.parts.bound_by,
        )
    if found.chosen is not None and found.chosen.bound is not None:
        least = found.chosen.bound.seconds
        rate = found.case.tokens / least
        table.add_row("max(compute, PCIe, Adam)", _seconds(least), f"{rate:.0f}", "", "", "", "")
    return table


def _shape_text(way: Way) -> str:
    shape = way.shape
    if shape is None:
        return "-"
    if way.adam is None:
        return f"{shape.num_chunks}/-/-/{shape.num_splits}/{shape.num_micro_batches}"
    return (
        f"{shape.num_chunks}/{shape.num_slots}/{shape.num_turns}/{shape.num_splits}/"
        f"{shape.num_micro_batches}"
    )


def _explain(console: Console, found: _Found, way: Way) -> None:
    parts, hidden, shape, bound = way.parts, found.thresholds, way.shape, way.bound
    assert shape is not None
    assert bound is not None
    turn = found.case.tokens / shape.num_turns
    console.print(f"\n[bold]{way.name}[/]")
    _say(
        console,
        f"A step of {_seconds(way.seconds)} s: computing {_seconds(parts.compute)}, bubble "
        f"{_seconds(parts.bubble)}, waiting for Adam {_seconds(parts.adam)} and for PCIe "
        f"{_seconds(parts.pcie)}; {bound.seconds / way.seconds:.2f} of max(compute, PCIe, Adam), "
        f"which take {_seconds(bound.compute)}, {_seconds(bound.pcie)} and {_seconds(bound.adam)} "
        "s. "
        f"{max(way.loads)} loads a stage.",
    )
    _say(
        console,
        f"Loads hide from {_tokens(hidden.loads)} tokens a turn on, "
        f"{_tokens(hidden.loads_together)} when all GPUs under a root load; a turn has "
        f"{_tokens(turn)}.",
    )
    overlap = "this Adam does not overlap" if way.adam is Adam.SERIAL else "this Adam overlaps"
    _say(
        console,
        f"Adam hides from {_tokens(hidden.adam)} tokens a step on where it overlaps ({overlap}); a "
        f"step has {_tokens(found.case.tokens)}.",
    )
    _say(console, f"Bubble (p - 1) / (v m s) of computing: {_bubble(way):.1%}.")
    if way.setting.arguments.pipeline_model_parallel_layout is not None:
        _say(console, "Layers are dealt so that the stage with the output layer has fewer.")
    if way.setting.recompute.loss and not found.case.base.recompute.loss:
        _say(
            console,
            "Backwards compute the output layer and the loss anew (--seq1f1b-recompute-loss), "
            "without which no shape fits.",
        )
    if found.host_gb is not None:
        short = way.host_bytes / GB - found.host_gb
        verdict = f"{short:.0f} GB are missing" if short > 0 else "fits"
        _say(console, f"Host memory: {way.host_bytes / GB:.0f} of {found.host_gb:g} GB: {verdict}.")


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number >= 1 else f"{number:.3f}"


def _tokens(number: float) -> str:
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.1f}k"
