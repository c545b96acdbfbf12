"""``torchrun ... pinned.py SCRIPT ARGS...``: run SCRIPT on this rank's own share of the cores.

Without it two stages of one thread each may meet on one core while another is free, and every
such meeting looks like a bubble of the pipeline.
"""

import os
import sys


def own_cores(cores: list[int], local_rank: int, num_local_ranks: int) -> list[int]:
    """Return the cores of a rank; all of them where there are more ranks than cores."""
    if num_local_ranks > len(cores):
        return cores
    first, stop = (len(cores) * rank // num_local_ranks for rank in (local_rank, local_rank + 1))
    return cores[first:stop]


def main() -> None:
    """Take the cores, then become the script."""
    if hasattr(os, "sched_setaffinity"):
        cores = own_cores(
            sorted(os.sched_getaffinity(0)),
            int(os.environ["LOCAL_RANK"]),
            int(os.environ["LOCAL_WORLD_SIZE"]),
        )
        os.sched_setaffinity(0, cores)
    os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])


if __name__ == "__main__":
    main()
