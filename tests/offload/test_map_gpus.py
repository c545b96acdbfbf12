"""Cross mapping: the machines that people have, and what they paste wrongly."""

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.offload.mapping import best_order, cost
from seq1f1b.offload.topology import Level, TopologyError
from seq1f1b.offload.topology_pci import here
from seq1f1b.offload.topology_text import parse_matrix
from tests.offload import machines
from tests.offload.machines import grouped, matrix


def run(text: str, *words: str, status: int = 0) -> str:
    given = ["map-gpus", "--topology", "-", *words]
    result = CliRunner().invoke(app, given, input=text, env={"COLUMNS": "400"})
    assert result.exit_code == status, result.output
    return " ".join(result.output.replace("│", " ").split()) if status else result.output


def found(text: str, *words: str) -> dict:
    return json.loads(run(text, "--json", *words))


@pytest.mark.parametrize(
    "text, order",
    [
        (grouped(2, 2), [0, 2, 1, 3]),
        (grouped(4, 4, near="PIX"), [0, 4, 1, 5, 2, 6, 3, 7]),
        (grouped(2, 2, 2, 2, near="PXB"), [0, 2, 4, 6, 1, 3, 5, 7]),
        (machines.PAIRS_OF_TWO_SOCKETS, [0, 4, 2, 6, 1, 5, 3, 7]),
        (grouped(2, 2, near="NODE"), [0, 2, 1, 3]),
        (machines.NVLINK_WITH_CARDS, [0, 2, 1, 3]),
        (machines.NVLINK_ALONE, [0, 2, 1, 3]),
    ],
)
def test_neighbours_share_as_little_as_any_order_allows(text, order):
    topology, got = parse_matrix(text), found(text)
    assert got["cost"] == pytest.approx(cost(topology, order), abs=1e-6)
    assert got["cost"] < got["identity_cost"]
    assert sorted(got["order"]) == sorted(order)
    assert got["cost"] == pytest.approx(cost(topology, got["order"]), abs=1e-6)


@pytest.mark.parametrize("text", [machines.UNEVEN_FIVE, grouped(3, 1), grouped(3, 3)])
def test_the_order_is_the_best_of_all(text):
    topology = parse_matrix(text)
    orders = itertools.permutations(range(topology.size))
    assert best_order(topology).cost == pytest.approx(min(cost(topology, o) for o in orders))


def test_the_order_is_pasted_and_the_tree_drawn():
    output = run(machines.PAIRS_OF_TWO_SOCKETS)
    order = ",".join(map(str, found(machines.PAIRS_OF_TWO_SOCKETS)["order"]))
    assert f"CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={order}" in output
    assert output.count("NUMA node") == 2
    assert output.count("switch") == 4


@pytest.mark.parametrize("text", [grouped(4), grouped(1), grouped(2, 2, near="SYS"), grouped(3, 1)])
def test_it_says_when_nothing_is_gained(text):
    output = run(text)
    assert "nothing is gained" in output
    assert "CUDA_VISIBLE_DEVICES" not in output
    assert found(text)["cost"] == found(text)["identity_cost"]


def test_more_gpus_than_can_be_tried_get_an_order_no_swap_improves():
    got = found(grouped(8, 8))
    assert not got["exact"]
    assert got["order"][:4] in ([0, 8, 1, 9], [0, 8, 9, 1]) or got["cost"] < got["identity_cost"]
    assert all((a < 8) != (b < 8) for a, b in itertools.pairwise(got["order"]))


def test_gpus_of_a_tree_are_named_or_known_by_their_maker():
    gpus = "23:00.0,24:00.0,63:00.0,0000:64:00.0"
    assert found(machines.TREE, "--gpus", gpus)["order"] == [0, 2, 1, 3]
    assert found(machines.TREE_WITH_NAMES)["order"] == [0, 2, 1, 3]
    tree, names = (
        run(machines.TREE, "--gpus", gpus),
        run(machines.TREE_WITH_NAMES),
    )
    assert tree.count("switch") == 2
    assert "switch" not in names
    assert names.count("host bridge") == 2
    assert "root complexes count as far apart" in names


@pytest.mark.parametrize(
    "text, words, complaint",
    [
        (grouped(2).replace("GPU1\tPHB", "GPU1\t"), [], "line 3: GPU1 has"),
        (grouped(2).replace("PHB", "PHX", 1), [], "line 2: GPU0 has 'PHX' under GPU1"),
        (grouped(2).replace("PHB", "SYS", 1), [], "line 3: GPU1 has PHB under GPU0"),
        (grouped(2).replace("\nGPU1", "\nGPU0"), [], "line 3: a second row of GPU0"),
        ("GPU0 X PIX\nGPU1 PIX X\n", [], "line 1: GPU0 comes before the header"),
        (matrix("X PIX").replace("GPU0\tCPU", "GPU0\tGPU1\tCPU"), [], "there is no row of GPU1"),
        ("", [], "neither of `nvidia-smi topo -m` nor of `lspci -t`"),
        (grouped(2), ["--gpus", "01:00.0"], "goes with the text of `lspci -t` only"),
        (machines.TREE, [], "does not say which devices are GPUs"),
        (machines.TREE, ["--gpus", "77:00.0"], "there is no device 77:00.0"),
        (machines.TREE.replace("\\-04.0-[64]", "  \\-04.0-[64]"), [], "line 11: "),
    ],
)
def test_broken_text_is_refused(text, words, complaint):
    assert complaint in run(text, *words, status=2)


def test_a_missing_file_is_named(tmp_path):
    given = ["map-gpus", "--topology", str(tmp_path / "none")]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "--topology" in result.output


def _machine(root, ways, node):
    devices = root / "bus" / "pci" / "devices"
    devices.mkdir(parents=True)
    for way in ways:
        place = root.joinpath("devices", *way.split("/"))
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x10de\n")
        (place / "class").write_text("0x030200\n")
        (place / "numa_node").write_text(f"{node[way]}\n")
        (devices / place.name).symlink_to(place)
    return root


WAYS = [
    "pci0000:20/0000:20:01.0/0000:21:00.0",
    "pci0000:20/0000:20:02.0/0000:22:00.0/0000:23:00.0/0000:24:00.0",
    "pci0000:20/0000:20:02.0/0000:22:00.0/0000:23:01.0/0000:25:00.0",
    "pci0000:40/0000:40:01.0/0000:41:00.0",
    "pci0000:80/0000:80:01.0/0000:81:00.0",
]


def test_this_machine_is_read_from_sysfs(tmp_path):
    node = dict(zip(WAYS, [0, 0, 0, 0, 1], strict=True))
    machine = here(_machine(tmp_path, WAYS, node))
    assert machine.names == tuple(way[-12:] for way in WAYS)
    assert machine.level(1, 2) is Level.PIX
    assert machine.level(0, 1) is Level.PHB
    assert machine.level(0, 3) is Level.NODE
    assert machine.level(3, 4) is Level.SYS


def test_only_gpus_that_the_driver_offers_count(tmp_path, monkeypatch):
    offered = ["00000000:41:00.0", "00000000:81:00.0"]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(offered),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetPciInfo=lambda handle: SimpleNamespace(busId=offered[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine = here(_machine(tmp_path, WAYS, dict.fromkeys(WAYS, 0)))
    assert machine.names == ("0000:41:00.0", "0000:81:00.0")


def test_a_machine_without_gpus_says_so(tmp_path):
    (tmp_path / "bus" / "pci" / "devices").mkdir(parents=True)
    with pytest.raises(TopologyError, match="no GPU"):
        here(tmp_path)
