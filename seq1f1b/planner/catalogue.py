"""Schedules by name."""

from enum import StrEnum

from seq1f1b.schedule import Schedule, gpipe, interleaved, one_f_one_b, zb_h1


class ScheduleName(StrEnum):
    """What the command line calls a schedule, and the schedule itself."""

    GPIPE = "gpipe"
    PLAIN = "1f1b"
    INTERLEAVED = "1f1b-interleaved"
    ZERO_BUBBLE = "zb-h1"
    SEQ = "seq1f1b"
    SEQ_INTERLEAVED = "seq1f1b-interleaved"
    SEQ_ZERO_BUBBLE = "seq1f1b-zb-h1"
    GREEDY = "greedy"

    @property
    def has_chunks(self) -> bool:
        """Whether it always deals several model chunks to a stage."""
        return self in (ScheduleName.INTERLEAVED, ScheduleName.SEQ_INTERLEAVED)

    @property
    def has_splits(self) -> bool:
        """Whether it always cuts micro-batches into sub-sequences."""
        return self in (
            ScheduleName.SEQ,
            ScheduleName.SEQ_INTERLEAVED,
            ScheduleName.SEQ_ZERO_BUBBLE,
        )

    @property
    def is_zero_bubble(self) -> bool:
        """Whether it is ZB-H1, on whole micro-batches or sub-sequences."""
        return self in (ScheduleName.ZERO_BUBBLE, ScheduleName.SEQ_ZERO_BUBBLE)

    @property
    def is_megatrons(self) -> bool:
        """Whether Megatron's own loop runs it."""
        return self in (ScheduleName.PLAIN, ScheduleName.INTERLEAVED)

    @property
    def is_one_f_one_b(self) -> bool:
        """Whether it is 1F1B, plain or interleaved, on whole micro-batches or sub-sequences."""
        return self in (
            ScheduleName.PLAIN,
            ScheduleName.INTERLEAVED,
            ScheduleName.SEQ,
            ScheduleName.SEQ_INTERLEAVED,
        )

    def allows(self, num_chunks: int, num_splits: int) -> bool:
        """Whether it exists for this many model chunks a stage and sub-sequences a micro-batch."""
        if self is ScheduleName.GREEDY:
            return True
        splits_fit = self is ScheduleName.GPIPE or self.has_splits == (num_splits > 1)
        return splits_fit and self.has_chunks == (num_chunks > 1)


def by_shape(num_chunks: int, num_splits: int) -> ScheduleName:
    """Return the 1F1B schedule with these numbers of model chunks and sub-sequences."""
    if num_chunks > 1:
        return ScheduleName.SEQ_INTERLEAVED if num_splits > 1 else ScheduleName.INTERLEAVED
    return ScheduleName.SEQ if num_splits > 1 else ScheduleName.PLAIN


def make(
    name: ScheduleName,
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    num_splits: int,
    group: int | None = None,
) -> Schedule:
    """Generate a schedule in closed form; raises ValueError for a shape that it does not have."""
    if name is ScheduleName.GPIPE:
        return gpipe(num_stages, num_micro_batches, num_splits)
    if name.has_chunks:
        return interleaved(num_stages, num_chunks, num_micro_batches, num_splits, group)
    if name.is_zero_bubble:
        return zb_h1(num_stages, num_micro_batches, num_splits)
    return one_f_one_b(num_stages, num_micro_batches, num_splits)
