"""``seq1f1b map-gpus``: the order of GPUs in which stages share PCIe links least."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.tree import Tree

from seq1f1b.cli import options, report
from seq1f1b.cli.options import flag_error
from seq1f1b.offload.mapping import Mapping, best_order
from seq1f1b.offload.topology import Level, Topology, TopologyError
from seq1f1b.offload.topology_pci import here, looks_like_tree, parse_tree
from seq1f1b.offload.topology_text import looks_like_matrix, parse_matrix

_PLACES = {Level.NODE: "NUMA node", Level.PHB: "host bridge", Level.PXB: "switch"}


def map_gpus(
    topology: Annotated[
        str | None,
        typer.Option(
            "--topology",
            metavar="FILE",
            help="What `nvidia-smi topo -m`, `lspci -t` or `lspci -tv` printed; - reads standard "
            "input. [default: this machine's PCI tree]",
        ),
    ] = None,
    gpus: Annotated[
        str,
        typer.Option(
            "--gpus",
            metavar="ADDRESS[,ADDRESS...]",
            help="With the text of `lspci -t`, which does not say it: which devices are GPUs.",
        ),
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Order a machine's GPUs so that neighbours in the pipeline share no PCIe link.

    Stages next to each other load their model chunks at about the same time. Up to 8 GPUs the order
    is the best there is; beyond, no swap of two improves it.
    """
    machine = _read(topology, [word for word in gpus.split(",") if word])
    found = best_order(machine)
    if as_json:
        figures = {
            "order": list(found.order),
            "cost": round(found.cost, 6),
            "identity_cost": round(found.identity_cost, 6),
            "exact": found.is_exact,
        }
        typer.echo(json.dumps(figures))
        return
    console = report.console()
    console.print(_tree(machine))
    for note in machine.notes:
        typer.echo(f"note: {note}")
    typer.echo("\n".join(_verdict(found)))


def _read(file: str | None, gpus: list[str]) -> Topology:
    try:
        if file is None:
            if gpus:
                raise flag_error("--gpus", "goes with --topology and the text of `lspci -t`")
            return here()
        text = sys.stdin.read() if file == "-" else Path(file).read_text(errors="replace")
        if looks_like_matrix(text):
            if gpus:
                raise flag_error("--gpus", "goes with the text of `lspci -t` only")
            return parse_matrix(text)
        if looks_like_tree(text):
            return parse_tree(text, gpus)
        raise TopologyError("it is neither of `nvidia-smi topo -m` nor of `lspci -t`")
    except (OSError, TopologyError) as error:
        raise flag_error("--topology", f"{file or 'this machine'}: {error}") from None


def _tree(machine: Topology) -> Tree:
    root = Tree("host memory")
    _grow(root, machine, list(range(machine.size)), list(_PLACES))
    return root


def _grow(node: Tree, machine: Topology, members: list[int], levels: list[Level]) -> None:
    """Draw a place for each group that a level parts ``members`` into; none for single GPUs."""
    if not levels or len(members) == 1:
        for member in members:
            name = machine.names[member]
            node.add(name if name.startswith("GPU") else f"GPU{member} {name}")
        return
    for group in machine.groups(levels[0], members):
        is_place = len(group) > 1 or levels[0] is Level.NODE
        place = node.add(_PLACES[levels[0]]) if is_place else node
        _grow(place, machine, group, levels[1:])


def _verdict(found: Mapping) -> list[str]:
    own = ",".join(map(str, sorted(found.order)))
    lines = [f"cost of {own}: {found.identity_cost:.3f}"]
    if not found.gains:
        reason = "no order" if found.is_exact else "no order that was tried"
        return [*lines, f"nothing is gained: {reason} shares links less"]
    order = ",".join(map(str, found.order))
    which = "the best there is" if found.is_exact else "no swap of two improves it"
    return [
        *lines,
        f"cost of {order}: {found.cost:.3f} ({which})",
        f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={order}",
    ]
