"""The PCIe tree, from Linux's sysfs or from ``lspci -t``: each GPU's way up to its root."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from seq1f1b.offload.topology import Level, Topology, TopologyError, pairs

_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")
_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_TOKEN = re.compile(
    r"\[(?P<root>[0-9a-f]{4,8}:[0-9a-f]{2})\]"
    r"|\[(?P<buses>[0-9a-f]{2}(?:-[0-9a-f]{2})?)\]"
    r"|(?P<device>[0-9a-f]{2}\.[0-7])"
)
_NAME = re.compile(r"  (?=[A-Za-z])")
_IS_GPU = re.compile(r"nvidia(?!.*(switch|bridge|audio))", re.IGNORECASE)
_BRANCH = re.compile(r"[+\\]-")


def here(sysfs: Path = Path("/sys")) -> Topology:
    """Describe the GPUs of this machine by the PCI tree under ``sysfs``.

    Those that NVML counts, where nvidia-ml-py is installed (a container may see fewer than the
    machine has); otherwise all of NVIDIA's. Raises TopologyError where there is none.
    """
    devices = sysfs / "bus" / "pci" / "devices"
    visible = _counted_by_driver()
    found = {
        device.name: device.resolve()
        for device in sorted(devices.glob("*"))
        if (_is_gpu(device) if visible is None else device.name in visible)
    }
    if not found:
        raise TopologyError(
            f"no GPU of NVIDIA's under {devices}: name a file with the output of "
            "`nvidia-smi topo -m`"
        )
    ways = {name: tuple(path.relative_to(sysfs / "devices").parts) for name, path in found.items()}
    nodes = {name: _read(devices / name / "numa_node") for name in found}
    return _topology(ways, nodes)


def looks_like_tree(text: str) -> bool:
    """Whether ``text`` has the root of a tree that ``lspci -t`` drew."""
    return any(match["root"] for match in _TOKEN.finditer(text))


def parse_tree(text: str, gpus: Sequence[str] = ()) -> Topology:
    """Read what ``lspci -t`` or ``lspci -tv`` drew.

    gpus: PCI addresses of the GPUs, such as ``63:00.0`` or ``0000:63:00.0``. Without them the text
    has to be of ``lspci -tv`` and those that it calls NVIDIA's are taken, which excludes sound and
    switches. Raises TopologyError, with the number of the line, for what is no such tree.
    """
    ways: dict[str, tuple[str, ...]] = {}
    nvidia: list[str] = []
    branches: dict[int, tuple[str, str, tuple[str, ...]]] = {}  # by column
    for number, line in enumerate(text.splitlines(), 1):
        drawn = _NAME.split(line.rstrip())[0]
        tokens = list(_TOKEN.finditer(drawn))
        way: tuple[str, ...] = ()
        if not tokens:
            continue
        at = tokens[0]
        before = [match.start() for match in _BRANCH.finditer(drawn, 0, at.start())]
        if at["root"]:
            domain, bus = "", ""
        elif before and before[-1] in branches:
            domain, bus, way = branches[before[-1]]
        else:
            raise TopologyError(f"line {number}: {drawn.strip()!r} hangs on nothing above it")
        start = before[-1] if before else 0
        branches = {column: place for column, place in branches.items() if column < start}
        end = start
        for token, after in zip(tokens, [*tokens[1:], None], strict=True):
            for match in _BRANCH.finditer(drawn, end, token.start()):
                branches[match.start()] = domain, bus, way
            end = token.end()
            if token["root"]:
                domain, bus = token["root"].split(":")
                way = (f"pci{token['root']}",)
            elif token["buses"]:
                bus = token["buses"][:2]
            else:
                address = f"{domain}:{bus}:{token['device']}"
                ways[address] = (*way, address)
                if after is not None and after["buses"]:
                    way = ways[address]
                elif address.endswith(".0") and _IS_GPU.search(line, token.end()):
                    nvidia.append(address)
    chosen = [_full(text, ways) for text in gpus] or nvidia
    if not chosen:
        raise TopologyError(
            "`lspci -t` does not say which devices are GPUs: name their addresses with --gpus, or "
            "give the output of `lspci -tv`"
        )
    return _topology({name: ways[name] for name in sorted(chosen)}, {})


def _full(address: str, ways: Mapping[str, tuple[str, ...]]) -> str:
    match = _ADDRESS.fullmatch(address.lower())
    full = match and f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}"
    if not full or full not in ways:
        raise TopologyError(f"there is no device {address} in the tree")
    return full


def _topology(ways: Mapping[str, tuple[str, ...]], nodes: Mapping[str, str]) -> Topology:
    """ways: for each GPU its root complex, the bridges below it, and itself."""
    names = sorted(ways)
    levels = {}
    for i, j in pairs(len(names)):
        one, other = ways[names[i]], ways[names[j]]
        shared = sum(a == b for a, b in zip(one, other, strict=False))
        if shared > 1:
            # below a switch's upstream port each device has a downstream port: nothing else between
            is_single = max(len(one), len(other)) - shared <= 2
            levels[i, j] = Level.PIX if is_single else Level.PXB
        elif shared == 1:
            levels[i, j] = Level.PHB
        else:
            node = nodes.get(names[i], "")
            is_near = node.isdigit() and node == nodes.get(names[j])
            levels[i, j] = Level.NODE if is_near else Level.SYS
    notes = () if nodes else ("NUMA nodes are not in it: root complexes count as far apart",)
    return Topology(tuple(names), levels, notes)


def _is_gpu(device: Path) -> bool:
    return _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_GPU_CLASSES)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _counted_by_driver() -> set[str] | None:
    """Return the PCI addresses of the GPUs that the driver offers; None where none can be asked."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no package, no driver, no GPU: each has its own error
        return None
    handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    ids = [nvml.nvmlDeviceGetPciInfo(handle).busId for handle in handles]
    texts = [one.decode() if isinstance(one, bytes) else one for one in ids]
    return {text.lower()[-len("0000:00:00.0") :] for text in texts}
