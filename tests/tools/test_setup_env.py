"""tools/setup_env.sh on machines made up of fake interpreters, fake uv and nothing else."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.tools.machine import (
    FREE_THREADED,
    INSTALLED,
    NEWER_THAN_THE_WHEELS,
    OLD,
    ROOT,
    SHIM,
    WITHOUT_VENV,
    Machine,
)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_first_start_installs_and_the_second_does_nothing(machine: Machine) -> None:
    machine.python("python3.12")
    messages = machine.ready()
    assert "Python 3.12.1" in messages
    assert "installing the pinned packages with pip" in messages
    assert "ready after" in messages
    assert machine.calls() == INSTALLED
    assert machine.ready() == ""
    assert machine.calls() == []


def test_changed_pins_are_brought_in_without_starting_afresh(machine: Machine) -> None:
    machine.python("python3.12")
    machine.ready()
    kept = machine.venv / "kept"
    kept.touch()
    (machine.clone / "requirements.txt").write_text("torch==2.11.1\n")
    machine.calls()
    assert "up to date" in machine.ready()
    assert machine.calls() == INSTALLED
    assert kept.exists()
    assert machine.ready() == ""


def test_the_lock_is_installed_until_the_pins_change(machine: Machine) -> None:
    lock = machine.clone / "requirements.lock"
    lock.write_text("torch==2.11.0 ; sys_platform == 'linux' \\\n    --hash=sha256:0\n")
    machine.python("python3.12")
    machine.ready()
    log = machine.venv / "seq1f1b-install.log"
    assert f"pip install -r {machine.clone}/requirements.lock" in log.read_text()
    (machine.clone / "requirements.txt").write_text("torch==2.11.0\nnumpy==2.5.5\n")
    assert "requirements.lock lacks numpy==2.5.5: installing without hashes" in machine.ready()
    assert f"pip install -r {machine.clone}/requirements.txt" in log.read_text()


@pytest.mark.parametrize("damage", ["python missing", "clone moved"])
def test_environment_that_cannot_work_is_made_anew(machine: Machine, damage: str) -> None:
    machine.python("python3.12")
    machine.ready()
    (machine.venv / "kept").touch()
    if damage == "python missing":
        (machine.venv / "bin" / "python").unlink()
    else:
        machine.clone = machine.clone.rename(machine.clone.with_name("moved"))
    assert "making" in machine.ready()
    assert not (machine.venv / "kept").exists()


@pytest.mark.parametrize(
    "output, reason, advice",
    [
        (
            "OSError: [Errno 28] No space left on device",
            "the disk is full",
            "SEQ1F1B_VENV",
        ),
        (
            "Failed to establish a new connection: Temporary failure in name resolution",
            "the package index could not be reached",
            "HTTPS_PROXY",
        ),
        (
            "ERROR: No matching distribution found for torch==2.11.0",
            "no file for this machine",
            "Python 3.12 or 3.13",
        ),
        ("error: subprocess-exited-with-error", "installing failed", "log"),
    ],
)
def test_failed_install_says_why_and_starts_afresh_next_time(
    machine: Machine, output: str, reason: str, advice: str
) -> None:
    machine.python("python3.12")
    messages = machine.fails(FAKE_PIP_STATUS="1", FAKE_PIP_OUTPUT=output)
    explanation = messages.partition("setup: error: ")[2]
    assert reason in explanation
    assert advice in explanation
    assert output in messages  # the tail of the log
    assert "making" in machine.ready()


def test_packages_that_do_not_import_are_no_success(machine: Machine) -> None:
    machine.python("python3.12")
    assert "checking it ... 0 s, failed" in machine.fails(FAKE_IMPORT_STATUS="1")
    assert "making" in machine.ready()


def test_no_usable_python_lists_what_was_tried_and_what_to_do(machine: Machine) -> None:
    machine.python("python3.12", SHIM)
    machine.python("python3.13", FREE_THREADED)
    machine.python("python3", OLD)
    machine.python("python", NEWER_THAN_THE_WHEELS)
    machine.python(machine.home / ".pyenv/versions/3.12.4/bin/python3", WITHOUT_VENV)
    messages = machine.fails()
    for line in (
        "no usable Python found: Python 3.12 or 3.13 is needed",
        "python3.12: does not run",
        "python3.13: a free-threaded build of cpython",
        "python3: Python 3.11.9, not 3.12 or 3.13",
        "python: Python 3.14.0, not 3.12 or 3.13",
        "lacks venv or ensurepip (Debian, Ubuntu: apt install python3.12-venv)",
        "install uv",
        "pyenv install 3.12",
        "PYTHON=/path/to/python3.12",
    ):
        assert line in messages
    assert not machine.venv.exists()


def test_python_of_pyenv_is_found_behind_a_shim_that_fails(machine: Machine) -> None:
    machine.python("python3.12", SHIM)
    machine.python("python3", OLD)
    found = machine.python(machine.home / ".pyenv/versions/3.12.1/bin/python3")
    assert f"Python 3.12.1 ({found})" in machine.ready()


def test_python_named_by_the_user_comes_first(machine: Machine) -> None:
    machine.python("python3.12")
    named = machine.python(machine.home / "mine", "sys.version_info = (3, 13, 2)")
    assert f"Python 3.13.2 ({named})" in machine.ready(PYTHON=str(named))


@pytest.mark.parametrize(
    "before, reason", [(OLD, "Python 3.11.9, not 3.12 or 3.13"), (None, "cannot be used")]
)
def test_python_named_by_the_user_is_not_silently_replaced(
    machine: Machine, before: str | None, reason: str
) -> None:
    machine.python("python3.12")
    named = machine.home / "mine"
    if before:
        machine.python(named, before)
    messages = machine.fails(PYTHON=str(named))
    assert f"PYTHON={named} cannot be used" in messages
    assert reason in messages


def test_uv_fetches_a_python_where_there_is_none_and_installs(machine: Machine) -> None:
    machine.uv()
    messages = machine.ready()
    assert "fetching one with uv" in messages
    assert "pinned packages with uv" in messages
    assert [call for call in machine.calls() if "find" not in call] == [
        "uv python install",
        "uv venv --allow-existing",
        "uv pip install",
        "uv pip install",
    ]


def test_uv_without_network_ends_with_what_to_do(machine: Machine) -> None:
    machine.uv()
    assert "no usable Python found" in machine.fails(FAKE_UV_OFFLINE="1")


def test_pip_is_tried_where_uv_does_not_get_through(machine: Machine) -> None:
    machine.uv()
    messages = machine.ready(FAKE_UV_STATUS="1")
    assert "pinned packages with uv (about 3 GB the first time) ... 0 s, failed" in messages
    assert [call for call in machine.calls() if call.startswith("pip")] == INSTALLED


UV_PINNED = """\
urllib3==2.8.0 \\
    --hash=sha256:0
uv==0.13.9 ; sys_platform == 'linux' \\
    --hash=sha256:1 \\
    --hash=sha256:2
watchdog==7.1.0 \\
    --hash=sha256:3
torch==2.11.0 \\
    --hash=sha256:4
"""


def test_uv_is_fetched_by_its_pin_where_there_is_none(machine: Machine) -> None:
    machine.python("python3.12")
    machine.uv_on_the_index()
    (machine.clone / "requirements.lock").write_text(UV_PINNED)
    messages = machine.ready()
    assert "pinned packages with uv" in messages
    assert machine.calls() == [
        "pip config list",
        "pip install -r",
        "uv pip install",
        "uv pip install",
    ]
    log = (machine.venv / "seq1f1b-install.log").read_text()
    entry = [
        line for line in UV_PINNED.splitlines() if "uv==" in line or ":1" in line or ":2" in line
    ]
    assert "\n".join(entry) in log
    assert not [line for line in log.splitlines() if line.startswith(("urllib3", "watchdog"))]


@pytest.mark.parametrize("setting", ["another index", "an index without uv", "uv fails"])
def test_pip_installs_where_uv_cannot_be_used(machine: Machine, setting: str) -> None:
    machine.python("python3.12")
    (machine.clone / "requirements.lock").write_text(UV_PINNED)
    if setting != "an index without uv":
        machine.uv_on_the_index()
    environment = {
        "another index": {"PIP_INDEX_URL": "https://mirror/simple"},
        "uv fails": {"FAKE_UV_STATUS": "1"},
    }
    assert "pinned packages with pip" in machine.ready(**environment.get(setting, {}))
    calls = machine.calls()
    assert calls[-3:] == INSTALLED
    assert ("uv pip install" in calls) == (setting == "uv fails")


def test_too_little_space_stops_before_anything_is_made(machine: Machine) -> None:
    machine.python("python3.12")
    messages = machine.fails(SEQ1F1B_SETUP_MIN_GB="99999999")
    assert "99999999 GB needed" in messages
    assert "SEQ1F1B_VENV" in messages
    assert not machine.venv.exists()


def test_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.python("python3.12")
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").touch()
    assert "is not a virtual environment" in machine.fails()
    assert (machine.venv / "thesis.txt").exists()


def test_environment_made_by_the_user_is_kept_or_refused(machine: Machine) -> None:
    good = machine.python("python3.12")
    old = machine.python("python3", OLD)
    own = machine.home / "own"
    for python, ends in ((good, 0), (old, 1)):
        subprocess.run([python, "-m", "venv", own], env={"PATH": str(machine.bin)}, check=True)
        (own / "kept").touch()
        code, _, messages = machine.run(SEQ1F1B_VENV=str(own))
        assert code == ends
        assert (own / "kept").exists()
        if code:
            assert "made by someone else and does not fit" in messages
            assert "Python 3.11.9" in messages
        shutil.rmtree(own)


def test_environment_elsewhere_by_a_relative_path(machine: Machine) -> None:
    machine.python("python3.12")
    code, out, _ = machine.run(SEQ1F1B_VENV="deep/folder/", cwd=machine.home)
    assert (code, out) == (0, str(machine.home / "deep/folder/bin/python"))


def test_folder_that_cannot_be_written(machine: Machine) -> None:
    machine.python("python3.12")
    messages = machine.fails(SEQ1F1B_VENV="/dev/null/environment")
    assert "cannot write to /dev/null" in messages


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_two_at_once_install_once(machine: Machine) -> None:
    machine.python("python3.12")
    first = machine.start(FAKE_PIP_SECONDS="0.5")
    second = machine.start(FAKE_PIP_SECONDS="0.5")
    messages = [process.communicate(timeout=30)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), messages
    assert sum("waiting for another set-up" in text for text in messages) == 1
    assert machine.calls() == INSTALLED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_install_ends_at_once_and_starts_afresh(machine: Machine, number: int) -> None:
    machine.python("python3.12")
    process = machine.start(FAKE_PIP_SECONDS="20")
    deadline = time.monotonic() + 10
    while not machine.calls_file.exists() or "-r" not in machine.calls_file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    start = time.monotonic()
    os.kill(process.pid, number)
    process.wait(timeout=10)
    assert time.monotonic() - start < 5
    assert process.returncode == 128 + number
    machine.python("python3.12")
    assert "making" in machine.ready()


def test_run_sh_passes_its_arguments_to_pytest(machine: Machine) -> None:
    machine.python("python3.12")
    code, out, _ = machine.run(str(machine.clone / "tests" / "run.sh"), "-k", "a b", "-x")
    assert (code, out) == (0, f"{machine.clone}: pytest -k a b -x")


def test_run_sh_stops_when_the_set_up_fails(machine: Machine) -> None:
    code, out, err = machine.run(str(machine.clone / "tests" / "run.sh"))
    assert (code, out) == (1, "")
    assert "no usable Python found" in err


LEFT_OVER = (
    *("PIP_CONSTRAINT", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN", "PIP_NO_DEPS"),
    *("PIP_REQUIRE_HASHES", "PIP_BUILD_CONSTRAINT", "UV_CONSTRAINT", "UV_SYSTEM_PYTHON"),
)


def test_settings_that_bend_installs_are_left_out(machine: Machine) -> None:
    """NVIDIA's containers set PIP_CONSTRAINT, with which nothing can be installed."""
    machine.python("python3.12")
    machine.ready(PIP_INDEX_URL="https://mirror/simple", **dict.fromkeys(LEFT_OVER, "/x"))
    seen = Path(f"{machine.calls_file}.environment").read_text()
    assert "PIP_INDEX_URL" in seen
    assert not [name for name in LEFT_OVER if name in seen]


def test_a_clone_does_not_delete_the_environment_of_another(machine: Machine) -> None:
    machine.python("python3.12")
    shared = machine.home / "shared"
    assert machine.run(SEQ1F1B_VENV=str(shared))[0] == 0
    (shared / "kept").touch()
    first, machine.clone = machine.clone, machine.clone.with_name("second clone")
    shutil.copytree(first, machine.clone)
    messages = machine.fails(SEQ1F1B_VENV=str(shared))
    assert f"{shared} is the environment of another clone, {first}" in messages
    assert "Set SEQ1F1B_VENV to another folder" in messages
    assert (shared / "kept").exists()
    machine.ready()
    shutil.rmtree(first)  # then no clone needs it
    assert machine.run(SEQ1F1B_VENV=str(shared))[0] == 0


@pytest.mark.parametrize("is_relative", [False, True])
def test_scripts_are_found_through_links_to_them(machine: Machine, is_relative: bool) -> None:
    machine.python("python3.12")
    bin_folder = machine.home / "bin"
    bin_folder.mkdir()
    for name in ("tests/run.sh", "tools/setup_env.sh"):
        target = machine.clone / name
        link = Path(os.path.relpath(target, bin_folder)) if is_relative else target
        (bin_folder / Path(name).name).symlink_to(link)
    (bin_folder / "twice.sh").symlink_to("run.sh")
    code, out, err = machine.run(str(bin_folder / "setup_env.sh"))
    assert (code, out) == (0, str(machine.venv / "bin" / "python")), err
    code, out, err = machine.run(str(bin_folder / "twice.sh"), "-x")
    assert (code, out) == (0, f"{machine.clone}: pytest -x"), err


def test_exp_sh_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "sweep").symlink_to(ROOT / "exp.sh")
    done = subprocess.run(
        ["bash", tmp_path / "sweep", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "MODEL_SIZES" in done.stdout
