"""Environments on top of a Python that has a torch of its own, with a network and without."""

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import cache_from_source
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.tools.machine import CURRENT, ROOT, Machine

WITHOUT_TORCH = (
    f"{CURRENT}; import importlib.util as u; f = u.find_spec; "
    "u.find_spec = lambda n: None if n == 'torch' else f(n)"
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_only_what_the_python_lacks_is_installed(machine: Machine) -> None:
    machine.python("python3")
    messages = machine.ready(SEQ1F1B_SYSTEM_TORCH="1")
    assert "installing what it lacks" in messages
    assert "installing the pinned packages" not in messages
    assert machine.calls() == ["pip --version ", "pip install -r", "pip install --no-index"]
    assert machine.ready() == ""  # the environment itself says how it was made


def test_the_other_kind_of_environment_is_made_anew(machine: Machine) -> None:
    machine.python("python3")
    machine.ready(SEQ1F1B_SYSTEM_TORCH="1")
    assert "making" in machine.ready(SEQ1F1B_SYSTEM_TORCH="0")
    assert not (machine.venv / ".system-torch").exists()
    assert "making" in machine.ready(SEQ1F1B_SYSTEM_TORCH="1")


def test_a_torch_that_is_there_is_offered(machine: Machine) -> None:
    machine.python("python3")
    assert "SEQ1F1B_SYSTEM_TORCH=1 builds on that one instead" in machine.ready()


def test_a_python_without_torch_is_not_built_on(machine: Machine) -> None:
    machine.python("python3", WITHOUT_TORCH)
    messages = machine.fails(SEQ1F1B_SYSTEM_TORCH="1")
    assert "no Python 3.12 or 3.13 here has torch" in messages
    messages = machine.fails(SEQ1F1B_SYSTEM_TORCH="1", PYTHON=str(machine.bin / "python3"))
    assert "cannot be used" in messages


def test_wheels_are_a_folder(machine: Machine) -> None:
    machine.python("python3")
    assert "SEQ1F1B_WHEELS=/nowhere: no such folder" in machine.fails(SEQ1F1B_WHEELS="/nowhere")
    wheels = machine.home / "wheels"
    wheels.mkdir()
    assert f"installing what it lacks from {wheels}" in machine.ready(SEQ1F1B_WHEELS=str(wheels))


def run_lacking(tmp_path: Path, versions: dict[str, str], pins: str = "") -> tuple[int, str, str]:
    """Run lacking.py on made-up packages; returns its status and what it wrote."""
    packages = tmp_path / "packages"
    for name, version in versions.items():
        folder = packages / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    clone = tmp_path / "clone"
    (clone / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "lacking.py", clone / "tools")
    shutil.copy(ROOT / "pyproject.toml", clone)
    (clone / "requirements.txt").write_text(pins)
    path = [str(packages), str(pip_alone(tmp_path))]
    program = (
        f"import runpy, sys; sys.path[:0] = {path}; sys.argv[1:] = ['l', 'k']; "
        f"runpy.run_path({str(clone / 'tools' / 'lacking.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    written = [tmp_path / "l", tmp_path / "k"]
    texts = [file.read_text() if file.exists() else done.stdout for file in written]
    return done.returncode, *texts


def pip_alone(tmp_path: Path) -> Path:
    """Return a folder with pip, which has what reads requirements, and nothing else."""
    import pip

    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "pip").symlink_to(Path(pip.__file__).parent)
    return folder


def test_versions_decide_what_is_lacking(tmp_path: Path) -> None:
    status, lacking, kept = run_lacking(
        tmp_path,
        {
            "torch": "2.11.0a0+1234.nv26.1",
            "nvidia-nccl-cu13": "2.28.9",
            "Typer": "0.1",
            "rich": "15.0.0",
        },
        "typer==0.29.2\nrich==15.0.0\nmegatron-core==0.19.2\n",
    )
    assert status == 0, lacking
    lines = lacking.splitlines()
    assert "typer==0.29.2" in lines
    assert "megatron-core==0.19.2" in lines
    assert not [line for line in lines if line.startswith(("torch", "rich"))]
    assert set(kept.splitlines()) == {"torch==2.11.0a0+1234.nv26.1", "nvidia-nccl-cu13==2.28.9"}


@pytest.mark.parametrize("torch", [{"torch": "2.4.0"}, {}])
def test_an_old_torch_is_not_built_on(tmp_path: Path, torch: dict[str, str]) -> None:
    status, message, _ = run_lacking(tmp_path, torch)
    assert status == 1
    assert f"torch {torch.get('torch', 'is not there')}: needed is torch>=" in message


def has_namespaces() -> bool:
    if not shutil.which("unshare"):
        return False
    tried = subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True)
    return tried.returncode == 0


def without_network() -> None:
    """Leave this process nothing but the loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")
    import fcntl

    with socket.socket() as probe:
        up = struct.pack("16sH14s", b"lo", 0x41, b"")  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(probe, 0x8914, up)  # SIOCSIFFLAGS


STAY = (
    *("torch", "transformers", "numpy", "matplotlib", "rich", "typer", "safetensors"),
    *("tokenizers", "psutil", "einops", "tqdm", "pip", "setuptools"),
)


@pytest.fixture(scope="module")
def cluster_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with torch, transformers and what usually lies beside them, and nothing of ours."""
    folder = tmp_path_factory.mktemp("cluster") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (ours,) = folder.glob("lib/python*/site-packages")
    wanted: list[Requirement] = [Requirement(name) for name in STAY]
    copied: set[str] = set()
    followed: set[tuple[str, str]] = set()
    while wanted:
        needed = wanted.pop()
        try:
            found = distribution(needed.name)
        except PackageNotFoundError:
            continue
        for extra in {"", *needed.extras}:
            if (found.name, extra) in followed:
                continue
            followed.add((found.name, extra))
            for requirement in map(Requirement, found.requires or ()):
                marker = requirement.marker
                if marker is None or marker.evaluate({"extra": extra}):
                    wanted.append(requirement)
        if found.name in copied:
            continue
        copied.add(found.name)
        for file in found.files or ():
            source, target = Path(found.locate_file(file)), ours / str(file)
            if ".." in file.parts or source.suffix == ".pyc" or not source.is_file():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
            # pip lists byte code among a package's files, uv does not
            compiled = Path(cache_from_source(str(source)))
            if source.suffix == ".py" and compiled.exists():
                (target.parent / "__pycache__").mkdir(exist_ok=True)
                Path(cache_from_source(str(target))).symlink_to(compiled)
    return folder / "bin" / "python"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not has_namespaces(), reason="network namespaces are not allowed here")
def test_a_machine_without_a_network(tmp_path: Path, cluster_python: Path) -> None:
    """From a folder of wheels, on top of the torch that is there, to every table of gpu.sh."""
    wheels = tmp_path / "wheels"
    environ = os.environ | {"PYTHON": str(cluster_python), "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", ROOT / "tools/wheels.sh", wheels], env=environ, check=True)
    size = sum(file.stat().st_size for file in wheels.iterdir())
    assert any(file.name.startswith("megatron_core") for file in wheels.iterdir())
    largest = sorted(wheels.iterdir(), key=lambda file: -file.stat().st_size)[:5]
    assert size < 60 << 20, [file.name for file in largest]
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh"],
        env=environ
        | {
            "SEQ1F1B_WHEELS": str(wheels),
            "SEQ1F1B_VENV": str(tmp_path / "venv"),
            "SMALL": "1",
            "RESULTS": str(tmp_path / "results"),
        },
        preexec_fn=without_network,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "installing what it lacks from" in done.stderr, done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    tables = {file.stem for file in (tmp_path / "results").glob("*.md")}
    assert tables == {
        *("attention", "attention-grouped", "layer", "replay-64", "one_gpu", "offload", "segments"),
        *("host", "waiting"),
    }
