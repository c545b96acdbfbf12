"""A schedule: every stage's list of actions, and how the model's chunks are dealt to stages."""

from dataclasses import dataclass, replace

from seq1f1b.schedule.action import Action, Kind


@dataclass(frozen=True)
class Schedule:
    """What each of ``num_stages`` stages does, in order.

    Model chunk c of stage i is the (c * num_stages + i)-th part of the model, so activations go
    round the stages ``num_chunks`` times. ``lowered`` tells whether sends and receives are in the
    lists or still implied by the computations.

    slots: where model chunks visit the device instead of staying there: for each stage the place
    that each of its chunks always takes, counted from 0. num_slots: how many places there are.
    """

    name: str
    num_stages: int
    num_chunks: int
    num_micro_batches: int
    num_splits: int
    stages: tuple[tuple[Action, ...], ...]
    lowered: bool = False
    slots: tuple[tuple[int, ...], ...] | None = None
    num_slots: int | None = None

    def with_stages(self, stages: tuple[tuple[Action, ...], ...], *, lowered: bool) -> "Schedule":
        """Return the same schedule with other action lists."""
        return replace(self, stages=stages, lowered=lowered)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Stages, model chunks of each, micro-batches, and sub-sequences of each."""
        return self.num_stages, self.num_chunks, self.num_micro_batches, self.num_splits

    def upstream(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """Return (stage, chunk) of the model part before this one; None for the first."""
        if stage > 0:
            return stage - 1, chunk
        return (self.num_stages - 1, chunk - 1) if chunk > 0 else None

    def downstream(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """Return (stage, chunk) of the model part after this one; None for the last."""
        if stage < self.num_stages - 1:
            return stage + 1, chunk
        return (0, chunk + 1) if chunk < self.num_chunks - 1 else None

    def peer(self, stage: int, action: Action) -> tuple[int, Action]:
        """Return the other end of a send or receive: its stage and its action."""
        forward = action.kind in (Kind.SEND_F, Kind.RECV_F)
        down = forward == action.kind.is_send
        other = (self.downstream if down else self.upstream)(stage, action.chunk)
        if other is None:
            raise ValueError(f"stage {stage} has nobody at the other end of {action}")
        kind = _OTHER_END[action.kind]
        return other[0], Action(kind, other[1], action.micro_batch, action.sub_sequence)

    def describe(self) -> str:
        """Return the one line that says what will run."""
        visiting = f", {self.num_slots} on the device at a time" if self.slots else ""
        return (
            f"{self.name}: {self.num_stages} stages x {self.num_chunks} model chunks{visiting}, "
            f"{self.num_micro_batches} micro-batches x {self.num_splits} sub-sequences"
        )

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, actions)) for actions in self.stages)


_OTHER_END = {
    Kind.SEND_F: Kind.RECV_F,
    Kind.RECV_F: Kind.SEND_F,
    Kind.SEND_B: Kind.RECV_B,
    Kind.RECV_B: Kind.SEND_B,
}
