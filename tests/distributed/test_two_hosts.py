"""Two hosts on one machine: network namespaces that meet by address, over a slow or cut link.

Each host runs the script for clusters as a user does. Needs root and Linux's ip and tc.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from seq1f1b.processes import end_with_parent

pytestmark = [pytest.mark.long, pytest.mark.distributed, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
FLAGS = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --tensor-model-parallel-size 1 "
    "--pipeline-model-parallel-size 2 --global-batch-size 4 --vocab-size 256 "
    "--eval-iters 1 --log-interval 1 --lr 1e-3 --min-lr 1e-3 --lr-warmup-iters 0"
)
SCRIPT = ["bash", str(ROOT / "examples" / "many_nodes.sh"), *FLAGS]
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces, each with one end of a link of ``rate`` (tc's words, such as 20mbit)."""

    def __init__(self, rate):
        self.names = [f"seq1f1b-{os.getpid()}-{number}" for number in range(2)]
        self.jobs = []
        ends = [f"s{os.getpid()}x{number}" for number in range(2)]
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name, "name", "fabric0")
                ip("-n", name, "address", "add", f"{address}/24", "dev", "fabric0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "fabric0", "up")
                shape = f"tc qdisc add dev fabric0 root tbf rate {rate} burst 64kb latency 1s"
                ip("netns", "exec", name, *shape.split())
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")

    def start(self, folder, *flags):
        """Start the job on both; each host's output goes into a file of ``folder``."""
        for rank, name in enumerate(self.names):
            output = folder / f"host{rank}.log"
            with output.open("w") as file:
                job = subprocess.Popen(
                    ["ip", "netns", "exec", name, *SCRIPT, *flags],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ
                    | {"NODES": "2", "GPUS": "1", "NODE_RANK": str(rank), "IFACE": "fabric0"}
                    | {"MASTER_ADDR": ADDRESSES[0], "CHECKPOINTS": str(folder / "kept")},
                    preexec_fn=lambda: end_with_parent(number=signal.SIGTERM),
                )
            self.jobs.append((job, output))

    def cut(self):
        ip("-n", self.names[1], "link", "set", "fabric0", "down")

    def wait(self, seconds):
        """Return exit statuses and outputs once both have ended."""
        end = time.monotonic() + seconds
        for job, output in self.jobs:
            try:
                job.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"runs after {seconds} s:\n{output.read_text()[-3000:]}")
        return [(job.returncode, output.read_text()) for job, output in self.jobs]

    def close(self):
        for job, _ in self.jobs:
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(30)
            job.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def hosts(request):
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    found = Hosts(rate="20mbit")
    yield found
    found.close()


def losses(metrics):
    return [json.loads(line)["lm_loss"] for line in metrics.read_text().splitlines()]


def test_two_hosts_train_like_one_over_a_slow_link(hosts, tmp_path):
    hosts.start(tmp_path, "--train-iters", "4", "--save-interval", "4")
    for status, output in hosts.wait(240):
        assert status == 0, output[-4000:]
    assert (tmp_path / "kept" / "latest_checkpointed_iteration.txt").read_text() == "4"
    found = losses(tmp_path / "kept" / "metrics.jsonl")
    assert len(found) == 4
    one = subprocess.run(
        [*SCRIPT, "--train-iters", "4"],
        env=os.environ | {"NODES": "1", "GPUS": "2", "CHECKPOINTS": str(tmp_path / "one")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=lambda: end_with_parent(number=signal.SIGTERM),
    )
    assert one.returncode == 0, one.stderr[-4000:]
    assert found == losses(tmp_path / "one" / "metrics.jsonl")


def test_a_cut_link_ends_the_job_on_both_hosts(hosts, tmp_path):
    hosts.start(tmp_path, "--train-iters", "100000", "--distributed-timeout-minutes", "1")
    metrics = tmp_path / "kept" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < end, hosts.jobs[0][1].read_text()[-3000:]
        time.sleep(0.5)
    hosts.cut()
    for status, output in hosts.wait(120):
        assert status != 0
        assert "stage" in output
