"""``torchrun ... -m megatron.adaptor SCRIPT ARGS...``: run a Megatron script, unmodified."""

import runpy
import sys
from pathlib import Path

from megatron.adaptor.install import install

_USAGE = """\
usage: python -m megatron.adaptor SCRIPT [ARGS ...]
       python -m megatron.adaptor --list-patches

Runs a Megatron training script with Seq1F1B under it. ARGS are the script's own, plus
--seq1f1b-splits, --seq1f1b-balance-method and the other flags that SCRIPT --help lists.
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
    script = Path(arguments[0])
    if not script.is_file():
        sys.exit(f"python -m megatron.adaptor: no such script: {script}")
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.resolve().parent))
    _run(script)


def _run(script: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import record

    install()
    # torchrun shows the error of the rank that failed first, if the rank has recorded it.
    record(runpy.run_path)(str(script), run_name="__main__")


def _list_patches() -> None:
    from megatron.adaptor.cpu import device

    device.install()
    from megatron.adaptor.session import Session

    for patch in Session("cpu").patches():
        sys.stdout.write(f"{patch.target}\n    {patch.reason}\n")


if __name__ == "__main__":
    main()
