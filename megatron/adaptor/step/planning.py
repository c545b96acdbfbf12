"""Which plan a step runs, after the first stage has told what only its data says."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.step.batch_feed import BatchFeed
from megatron.adaptor.step.read_ahead import agree_on_documents, agree_on_lengths
from megatron.adaptor.step.step import StepArguments
from seq1f1b.schedule import Plan
from seq1f1b.sequence import Documents

PackedRows = Sequence[Sequence[Documents]]


class PlannedStep(NamedTuple):
    """A plan, and for packed sequences the documents of every micro-batch's rows."""

    plan: Plan
    documents: PackedRows | None


def plan_step(settings: Settings, arguments: StepArguments, feed: BatchFeed | None) -> PlannedStep:
    """Return what a step runs; all ranks of the pipeline must call.

    feed: where this rank's first model chunk reads micro-batches. Raises ValueError where the
    settings have no plan for such a step.
    """
    groups, number = arguments.groups, arguments.num_microbatches
    schedule = settings.schedule(
        groups.pp.size(), len(arguments.chunks), number, trains=arguments.trains
    )
    packing, length = settings.packing, arguments.length
    if packing is not None and arguments.config.variable_seq_lengths:
        raise ValueError(
            f"{packing.flag} and variable_seq_lengths cannot both be used with sub-sequences: "
            "leave one of them out"
        )
    documents = None
    if packing is not None:
        documents = agree_on_documents(
            packing,
            feed,
            groups,
            num_micro_batches=number,
            num_rows=arguments.micro_batch_size,
            total=length,
        )
        cuts = [settings.cut(length, rows) for rows in documents]
    elif arguments.config.variable_seq_lengths:
        lengths = agree_on_lengths(feed, groups, num_micro_batches=number)
        cuts = [settings.cut(of_one) for of_one in lengths]
    else:
        cuts = [settings.cut(length)] * number
    return PlannedStep(Plan(schedule, tuple(cuts)), documents)
