"""``torchrun ... -m megatron.adaptor SCRIPT ARGS...``: run a Megatron script, unmodified."""

import os
import runpy
import sys
from pathlib import Path

from megatron.adaptor.install import install

_USAGE = """\
usage: python -m megatron.adaptor SCRIPT [ARGS ...]
       python -m megatron.adaptor --check-flags NUM_RANKS SCRIPT [ARGS ...]
       python -m megatron.adaptor --list-patches

Runs a Megatron training script with Seq1F1B under it. ARGS are the script's own, plus
--seq1f1b-splits, --seq1f1b-balance-method and the other flags that SCRIPT --help lists.
With --check-flags the script ends once Megatron and Seq1F1B have accepted ARGS for a job of
NUM_RANKS processes, on any machine and before any process group is made.
"""


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--list-patches":
        _list_patches()
        return
    checks = arguments[0] == "--check-flags"
    if checks:
        arguments = _pretend_ranks(arguments[1:])
    script = Path(arguments[0])
    if not script.is_file():
        sys.exit(f"python -m megatron.adaptor: no such script: {script}")
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.resolve().parent))
    _run(script, only_checks=checks)


def _pretend_ranks(arguments: list[str]) -> list[str]:
    """Make this process rank 0 of as many as the first argument says; return the others."""
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1:
        sys.exit("python -m megatron.adaptor --check-flags: needs a number of ranks and a script")
    os.environ.update(WORLD_SIZE=arguments[0], RANK="0", LOCAL_RANK="0")
    return arguments[1:]


def _run(script: Path, *, only_checks: bool) -> None:
    from megatron.adaptor.error_file import record

    install().only_checks_flags = only_checks
    run = runpy.run_path if only_checks else record(runpy.run_path)
    run(str(script), run_name="__main__")
    if only_checks:
        sys.exit(f"{script} ended before Megatron had parsed its flags, so they were not checked")


def _list_patches() -> None:
    from megatron.adaptor.cpu import device

    device.install()
    from megatron.adaptor.session import Session

    for patch in Session("cpu").patches():
        sys.stdout.write(f"{patch.target}\n    {patch.reason}\n")


if __name__ == "__main__":
    main()
