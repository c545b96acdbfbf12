"""``seq1f1b list-cfg``, ``copy-cfg`` and ``train``: training by a recipe."""

from seq1f1b.cli.training.catalogue import copy_cfg, list_cfg
from seq1f1b.cli.training.train import train

__all__ = ["copy_cfg", "list_cfg", "train"]
