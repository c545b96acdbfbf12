"""How processes come to be: torchrun's command, and places by torchrun's and Slurm's variables."""

import pytest

from seq1f1b.ulysses.training.launch import (
    LaunchError,
    Place,
    find_place,
    first_host,
    torchrun_command,
)

TRAIN = ["train", "recipe"]


def test_one_process_needs_no_torchrun():
    assert torchrun_command(TRAIN, {}) is None
    assert torchrun_command(TRAIN, {"RANK": "0", "WORLD_SIZE": "4", "NPROC_PER_NODE": "4"}) is None


def test_processes_of_one_node():
    command = torchrun_command(TRAIN, {"NPROC_PER_NODE": "8", "PORT": "123"})
    assert command is not None
    assert command[1:] == [
        *("-m", "torch.distributed.run", "--nproc-per-node=8", "--master-port=123"),
        *("-m", "seq1f1b.cli", "train", "recipe"),
    ]


def test_processes_of_several_nodes():
    environ = {"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "ADDR": "node0"}
    command = torchrun_command(TRAIN, environ)
    assert command is not None
    wanted = ["--nnodes=2", "--node-rank=1", "--master-addr=node0", "--master-port=29500"]
    assert command[4:8] == wanted


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs ADDR"),
        ({"NPROC_PER_NODE": "many"}, "NPROC_PER_NODE=many is not a whole number"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0 is not a whole number of at least 1"),
    ],
)
def test_bad_variables_are_named(environ, message):
    with pytest.raises(LaunchError, match=message):
        torchrun_command(TRAIN, environ)


def test_a_place_by_torchrun():
    environ = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    assert find_place("none", environ) == Place(3, 1, 4, "a", "29500")
    assert find_place("none", {}).world_size == 1
    with pytest.raises(LaunchError, match="--launcher pytorch expects"):
        find_place("pytorch", {})


def test_a_place_by_slurm():
    environ = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "1234567",
    }
    assert find_place("slurm", environ) == Place(5, 1, 8, "gpu03", str(20000 + 1234567 % 20000))
    with pytest.raises(LaunchError, match="SLURM_PROCID and SLURM_NTASKS"):
        find_place("slurm", {})


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("a[7,9]b,c", "a7b"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host
