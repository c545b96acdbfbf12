"""A machine made up of fake interpreters, a fake uv and nothing else, to set a clone up on."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    *("awk", "bash", "cat", "cp", "cut", "df", "dirname", "du", "env", "flock", "grep", "head"),
    *("ls", "mkdir", "mktemp", "mv", "readlink", "rm", "sed", "sh", "sleep", "tail", "tee", "wc"),
)

# Stands for an interpreter. The real one answers for it after doing ``before``, which changes what
# it says of itself; the environments that it makes hold a copy of it; its pip only notes the call.
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv")
    for last; do :; done
    mkdir -p "$last/bin" "$last/lib/python3.12/site-packages"
    cp "{path}" "$last/bin/python" && : >"$last/pyvenv.cfg" ;;
  "-m pip")
    echo "pip $3 $4" >>"{calls}"
    export -p >>"{calls}.environment"
    [ "$3" = config ] && env | sed -n 's/^PIP_INDEX_URL/:env:.index-url/p'
    [ "$3" = install ] || exit 0
    sleep "${{FAKE_PIP_SECONDS:-0}}"
    printf '%s\\n' "${{FAKE_PIP_OUTPUT:-}}" >&2
    case "$5" in
      */uv.txt) cp "{uv}" "${{0%/*}}/uv" && cat "$5" || exit 1 ;;
    esac
    exit "${{FAKE_PIP_STATUS:-0}}" ;;
  "-m pytest")
    shift; echo "$PWD: $*" ;;
  "-c import torch"*)
    exit "${{FAKE_IMPORT_STATUS:-0}}" ;;
  "-c "*)
    program=$2; shift 2
    exec {real} -c 'import sys; sys._base_executable = "{path}"; {before}
exec(sys.argv.pop(1))' "$program" "$@" ;;
  *)
    exec {real} "$@" ;;
esac
"""
OLD = "sys.version_info = (3, 11, 9)"
CURRENT = "sys.version_info = (3, 12, 1)"
NEWER_THAN_THE_WHEELS = "sys.version_info = (3, 14, 0)"
WITHOUT_VENV = f'{CURRENT}; sys.modules["ensurepip"] = None; import importlib.util as u; \
f = u.find_spec; u.find_spec = lambda n: None if n == "ensurepip" else f(n)'
FREE_THREADED = f"{CURRENT}; import sysconfig; sysconfig.get_config_var = lambda name: 1"
SHIM = "sys.exit('pyenv: python3.12: command not found')"

FAKE_UV = """#!/bin/sh
echo "uv $1 $2" >>"{calls}"
case "$1 $2" in
  "python find") [ -e "{fetched}" ] && echo "{fetched}" ;;
  "python install") [ -z "${{FAKE_UV_OFFLINE:-}}" ] && cp "{store}" "{fetched}" ;;
  "venv "*) for last; do :; done; "{store}" -m venv "$last" ;;
  "pip install") exit "${{FAKE_UV_STATUS:-0}}" ;;
esac
"""


class Machine:
    """A clone in a folder with a space in its name; PATH and home hold only what is put there."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "a clone"
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.calls_file = folder / "calls"
        for path in (self.clone / "tools", self.clone / "tests", self.bin, self.home):
            path.mkdir(parents=True)
        scripts = ("setup_env.sh", "system_torch.sh", "wheels.sh", "lacking.py")
        for name in ("exp.sh", "tests/run.sh", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, self.clone / name)
        for name in scripts:
            shutil.copy(ROOT / "tools" / name, self.clone / "tools" / name)
        (self.clone / "requirements.txt").write_text("torch==2.11.0\n")
        for name in COMMANDS:
            if path := shutil.which(name):
                (self.bin / name).symlink_to(path)

    @property
    def venv(self) -> Path:
        return self.clone / ".venv"

    def python(self, path: Path | str, before: str = CURRENT) -> Path:
        """Put a fake interpreter at ``path`` (a bare name: on PATH) that first does ``before``."""
        path = self.bin / path
        path.parent.mkdir(parents=True, exist_ok=True)
        fake = FAKE_PYTHON.format(
            path=path,
            calls=self.calls_file,
            real=sys.executable,
            before=before,
            uv=self.home / "uv",
        )
        self._script(path, fake)
        return path

    def uv(self) -> None:
        self.uv_on_the_index().rename(self.bin / "uv")

    def uv_on_the_index(self) -> Path:
        """Make a fake uv that pip brings when it is asked for."""
        store = self.python(self.home / "uv-store")
        fake = FAKE_UV.format(calls=self.calls_file, store=store, fetched=self.home / "uv-python")
        self._script(self.home / "uv", fake)
        return self.home / "uv"

    def start(self, *command: str, cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", *(command or (str(self.clone / "tools" / "setup_env.sh"),))],
            env={"PATH": str(self.bin), "HOME": str(self.home), **env},
            cwd=cwd or self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> tuple[int, str, str]:
        process = self.start(*command, cwd=cwd, **env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out.strip(), err

    def ready(self, **env: str) -> str:
        """Run the set-up, see that it ends well, and return its messages."""
        code, out, err = self.run(**env)
        assert (code, out) == (0, str(self.venv / "bin" / "python")), err
        return err

    def fails(self, **env: str) -> str:
        code, out, err = self.run(**env)
        assert (code, out) == (1, ""), err
        assert "setup: error: " in err
        return err

    def calls(self) -> list[str]:
        """What pip and uv were called with since the last time."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)


INSTALLED = ["pip --version ", "pip install -r", "pip install --no-deps"]
