"""``tied.py [--worker] [--own-cores] COMMAND...``: run COMMAND, which ends with its parent.

So nothing of a sweep goes on computing, and writing into its files, when the sweep is killed. With
--own-cores a rank gets its own share of the cores: otherwise two stages of one thread each may meet
on one core while another is free, and every such meeting looks like a bubble of the pipeline.
"""

import os
import signal
import sys

from seq1f1b.processes import end_with_parent

PARENT_VARIABLE = "SEQ1F1B_SWEEP_PROCESS"


def own_cores(cores: list[int], local_rank: int, num_local_ranks: int) -> list[int]:
    """Return the cores of a rank; all of them where there are more ranks than cores."""
    if num_local_ranks > len(cores):
        return cores
    first, stop = (len(cores) * rank // num_local_ranks for rank in (local_rank, local_rank + 1))
    return cores[first:stop]


def main() -> None:
    """Tie this process to its parent, then become the command."""
    words = sys.argv[1:]
    is_worker = words[:1] == ["--worker"]
    words = words[is_worker:]
    if words[:1] == ["--own-cores"]:
        words = words[1:]
        if hasattr(os, "sched_setaffinity"):
            cores = own_cores(
                sorted(os.sched_getaffinity(0)),
                int(os.environ["LOCAL_RANK"]),
                int(os.environ["LOCAL_WORLD_SIZE"]),
            )
            os.sched_setaffinity(0, cores)
    # torchrun ends its workers in good order; the rest of these has nothing to clean up
    parent = None if is_worker else int(os.environ[PARENT_VARIABLE])
    end_with_parent(parent, signal.SIGKILL if is_worker else signal.SIGTERM)
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
