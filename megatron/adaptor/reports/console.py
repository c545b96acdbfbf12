"""Lines for the person who watches the job."""

import sys

import torch.distributed as dist


def print_first(message: str) -> None:
    """Print ``message`` on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()
