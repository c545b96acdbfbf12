"""What a step runs: a schedule, and where each micro-batch is cut. It can be kept in a file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq1f1b.errors import Seq1F1BError
from seq1f1b.schedule.action import Action
from seq1f1b.schedule.lower import lower
from seq1f1b.schedule.schedule import Schedule
from seq1f1b.schedule.validate import validate
from seq1f1b.sequence import SubSequence, sub_sequences


class PlanError(Seq1F1BError, ValueError):
    """A plan whose parts do not fit each other, or a file that holds none."""


@dataclass(frozen=True)
class Plan:
    """A lowered ``schedule``, and for each micro-batch its sub-sequences.

    Raises PlanError when there are not as many micro-batches or sub-sequences as in the schedule.
    """

    schedule: Schedule
    cuts: tuple[tuple[SubSequence, ...], ...]

    def __post_init__(self) -> None:
        if len(self.cuts) != self.schedule.num_micro_batches:
            raise PlanError(
                f"{len(self.cuts)} micro-batches are cut; the schedule has "
                f"{self.schedule.num_micro_batches}"
            )
        for micro_batch, parts in enumerate(self.cuts):
            if len(parts) != self.schedule.num_splits:
                raise PlanError(
                    f"micro-batch {micro_batch} is cut into {len(parts)} sub-sequences; the "
                    f"schedule has {self.schedule.num_splits}"
                )

    @classmethod
    def of(cls, schedule: Schedule, cuts: Iterable[Sequence[SubSequence]]) -> "Plan":
        """Lower and validate ``schedule``; raises ScheduleError when it cannot run."""
        schedule = lower(schedule)
        validate(schedule)
        return cls(schedule, tuple(tuple(parts) for parts in cuts))

    def write(self, path: Path) -> None:
        """Write JSON: the schedule's shape and actions, and the lengths of sub-sequences."""
        shape = self.schedule
        content: dict[str, Any] = {
            "name": shape.name,
            "num_stages": shape.num_stages,
            "num_chunks": shape.num_chunks,
            "num_micro_batches": shape.num_micro_batches,
            "num_splits": shape.num_splits,
            "stages": [" ".join(map(str, actions)) for actions in shape.stages],
            "lengths": [[part.length for part in parts] for parts in self.cuts],
        }
        if shape.slots is not None:
            content |= {"slots": shape.slots, "num_slots": shape.num_slots}
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read what ``write`` wrote, and prove that it can run.

        Raises PlanError or ScheduleError, with the file's name, for anything else.
        """
        try:
            content = json.loads(path.read_text())
            shape = {
                name: int(content[name])
                for name in ("num_stages", "num_chunks", "num_micro_batches", "num_splits")
            }
            stages = tuple(
                tuple(Action.parse(text) for text in actions.split())
                for actions in content["stages"]
            )
            if len(stages) != shape["num_stages"]:
                raise PlanError(f"{len(stages)} stages have actions, not {shape['num_stages']}")
            slots = content.get("slots")
            schedule = Schedule(
                str(content["name"]),
                **shape,
                stages=stages,
                lowered=True,
                slots=None if slots is None else tuple(tuple(map(int, row)) for row in slots),
                num_slots=None if slots is None else int(content["num_slots"]),
            )
            validate(schedule)
            cuts = [sub_sequences(map(int, lengths)) for lengths in content["lengths"]]
            return cls(schedule, tuple(cuts))
        except KeyError as error:
            raise PlanError(f"{path}: lacks {error}") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise PlanError(f"{path}: no plan: {error}") from None
