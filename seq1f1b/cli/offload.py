"""Model chunks that visit the device: the options of the training flags' names, and their link."""

from dataclasses import dataclass
from typing import Annotated

import typer

from seq1f1b.cli.options import flag_error, number_from
from seq1f1b.cli.problem import Shape
from seq1f1b.cli.source import SettingCosts, Source
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.chunks import chunk_bytes
from seq1f1b.schedule import Schedule, lower, visiting
from seq1f1b.simulate import HostLink
from seq1f1b.simulate.costs import read_roots

_PANEL = "Model chunks in host memory"
_CHUNKS, _PREFETCH = "--offload-model-chunks", "--offload-prefetch"
_RATE, _TIME, _ROOTS = "--offload-link-gb-per-s", "--offload-copy-time", "--offload-link-roots"

Chunks = Annotated[
    int,
    typer.Option(
        _CHUNKS,
        metavar="K",
        min=0,
        help="Let at most K of a stage's model chunks visit the device at a time; 0 leaves all of "
        "them there. All sub-sequences then go through a chunk in one turn, unless --group says "
        "otherwise.",
        rich_help_panel=_PANEL,
    ),
]
Prefetch = Annotated[
    bool,
    typer.Option(
        _PREFETCH,
        help="Load a chunk as soon as its place is free, not before the computation that needs it.",
        rich_help_panel=_PANEL,
    ),
]
GbPerSecond = Annotated[
    float | None,
    typer.Option(
        _RATE,
        parser=number_from(1e-6),
        metavar="NUMBER",
        help="GB/s between host memory and the device, one way; needs a model, whose chunks have "
        "bytes.",
        rich_help_panel=_PANEL,
    ),
]
CopyTime = Annotated[
    float | None,
    typer.Option(
        _TIME,
        parser=number_from(0.0),
        metavar="NUMBER",
        help="Without a model: what a copy of a chunk's weights takes, or of its gradients; in "
        "seconds with a trace, else in forwards of a stage on one micro-batch.",
        rich_help_panel=_PANEL,
    ),
]
Roots = Annotated[
    str | None,
    typer.Option(
        _ROOTS,
        metavar="R,R,...",
        help="For each stage the number of its root of the PCIe tree; stages of one root take "
        "turns on its link. [default: each stage has its own link]",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class Offload:
    """What the options say; ends the command where they make no sense."""

    chunks: int
    prefetch: bool
    gb_per_second: float | None
    copy_time: float | None
    roots: str | None

    def __post_init__(self) -> None:
        given = {
            _PREFETCH: self.prefetch or None,
            _RATE: self.gb_per_second,
            _TIME: self.copy_time,
            _ROOTS: self.roots,
        }
        for flag, value in given.items():
            if not self.chunks and value is not None:
                raise flag_error(flag, f"goes with {_CHUNKS} only")

    def turn(self, shape: Shape, name: ScheduleName | None, group: int | None) -> int | None:
        """Return the sub-sequences of a turn: all of them where chunks visit the device."""
        if not self.chunks:
            return group
        if shape.chunks == 1 or shape.stages == 1:
            raise flag_error(
                _CHUNKS, "needs several stages, and several model chunks of each: add --chunks"
            )
        if self.chunks > shape.chunks:
            raise flag_error(
                _CHUNKS,
                f"{self.chunks}: must be from 0 to the model chunks of a stage, which are "
                f"{shape.chunks}",
            )
        if name is not None and not name.has_chunks:
            raise flag_error(_CHUNKS, f"cannot go with --schedule {name}: use an interleaved one")
        return group or max(shape.stages, shape.micro_batches * shape.splits)

    def applied(self, schedule: Schedule) -> Schedule:
        """Return ``schedule`` with its loads; the same where all chunks stay on the device."""
        if not self.chunks:
            return schedule
        return visiting(lower(schedule), self.chunks, prefetch=self.prefetch)

    def host_link(self, source: Source, schedule: Schedule) -> HostLink | None:
        """Return what the copies of ``schedule`` take; None where there are none."""
        if not self.chunks:
            return None
        roots = self._roots(schedule.num_stages)
        if not isinstance(source, SettingCosts):
            if self.gb_per_second is not None:
                raise flag_error(_RATE, f"the bytes of chunks are not known: use {_TIME}")
            if self.copy_time is None:
                raise flag_error(_TIME, "how long does the copy of a model chunk take?")
            # a copy is as many bytes as units of time, on a link of one byte a unit
            size = {"weights": self.copy_time, "gradients": self.copy_time}
            return HostLink.uniform(schedule, **size, bandwidth=1.0, roots=roots)
        if self.copy_time is not None:
            raise flag_error(_TIME, f"a model's chunks have bytes: use {_RATE}")
        if self.gb_per_second is None:
            raise flag_error(_RATE, "how fast are copies between host memory and the device?")
        weights, gradients = chunk_bytes(source.setting(schedule))
        return HostLink(weights, gradients, self.gb_per_second * 1e9, roots)

    def _roots(self, num_stages: int) -> tuple[int, ...] | None:
        if self.roots is None:
            return None
        try:
            roots = read_roots(self.roots)
        except ValueError as error:
            raise flag_error(_ROOTS, str(error)) from None
        if len(roots) != num_stages:
            raise flag_error(_ROOTS, f"{self.roots}: give one number for each of {num_stages}")
        return roots
