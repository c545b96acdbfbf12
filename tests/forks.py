"""Processes that begin with torch imported, or Megatron too: forks of servers that did it once.

A ``TorchFork`` imports Megatron, the project and the script itself, as a new interpreter
does. A ``MegatronFork`` begins with the adaptor installed and Megatron imported. What takes each
rank seconds is spent once for all tests.
"""

import atexit
import contextlib
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import (
    context,
    current_process,
    forkserver,
    popen_forkserver,
    set_start_method,
)
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from seq1f1b.processes import end_with_starter

# Those that cannot be imported are left out.
_PRELOADED = [
    "pytest",
    "torch",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
]
_LAST = "tests.frozen"


class TorchFork(context.ForkServerProcess):
    """A process that begins with torch imported."""

    _server = forkserver.ForkServer()
    _server.set_forkserver_preload([*_PRELOADED, _LAST])

    @staticmethod
    def _Popen(process: BaseProcess) -> popen_forkserver.Popen:
        connect = type(process)._server.connect_to_new_process  # type: ignore[attr-defined]
        with mock.patch.object(forkserver, "connect_to_new_process", connect):
            return popen_forkserver.Popen(process)


class MegatronFork(TorchFork):
    """A process that begins with the adaptor installed and Megatron imported."""

    _server = forkserver.ForkServer()
    _server.set_forkserver_preload([*_PRELOADED, "tests.megatron_preload", _LAST])


def python(
    *arguments: object,
    num_ranks: int | None = None,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300.0,
    with_megatron: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` in forks, with ``text`` as its input; return what it printed.

    num_ranks: as many processes, with torchrun's variables, of which the first that fails ends the
    others. None: one process without. with_megatron: in each a MegatronFork.
    """
    make = MegatronFork if with_megatron else TorchFork
    words = [str(word) for word in arguments]
    ranks = [{}] if num_ranks is None else _places(num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(text)
        variables = {**os.environ, **(environ or {})}
        processes = [
            make(
                target=_run, args=(words, variables | place, cwd or Path.cwd(), files), daemon=False
            )
            for place in ranks
        ]
        try:
            for process in processes:
                process.start()
            code = _await(processes, words, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        printed = {name: _text(files[name]) for name in ("stdout", "stderr")}
    return subprocess.CompletedProcess([sys.executable, *words], code, **printed)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _places(num_ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of the ranks on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [
        {**job, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)
    ]


def _await(processes: Sequence[context.ForkServerProcess], words: list[str], timeout: float) -> int:
    """Return 0 when all have ended with it, else the first other exit code."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            raise subprocess.TimeoutExpired([sys.executable, *words], timeout)
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                return process.exitcode
    return 0


def _run(
    words: list[str], variables: Mapping[str, str], cwd: Path, files: Mapping[str, Path]
) -> None:
    """Be ``python *words``."""
    end_with_starter()  # the server lives as long as its forks
    set_start_method(None, force=True)  # this and the name are those of a new interpreter
    current_process().name = "MainProcess"
    os.environ.clear()
    os.environ.update(variables)
    if int(variables.get("LOCAL_WORLD_SIZE", "1")) > 1:
        torch.set_num_threads(1)  # as torchrun has it
    if "tests.megatron_preload" in sys.modules:
        sys.modules["tests.megatron_preload"].prefer_loopback()
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(cwd)
    _redirect(0, os.open(files["stdin"], os.O_RDONLY))
    for number, name in ((1, "stdout"), (2, "stderr")):
        _redirect(number, os.open(files[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT))
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    code = 0
    try:
        _run_as_main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException as error:
        sys.last_exc = error
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _redirect(number: int, other: int) -> None:
    os.dup2(other, number)
    os.close(other)


def _run_as_main(words: list[str]) -> None:
    first, *others = words
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = others
        sys.path.insert(0, os.getcwd())
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
