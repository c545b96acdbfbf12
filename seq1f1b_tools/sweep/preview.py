"""The runs of a sweep and the command of each, without starting any."""

import shlex

from rich.console import Console

from seq1f1b_tools.sweep.corpus import Corpus
from seq1f1b_tools.sweep.plan import (
    TRAINING_SCRIPT,
    launcher,
    plan_runs,
    training_arguments,
    why_not,
)
from seq1f1b_tools.sweep.records import Output
from seq1f1b_tools.sweep.settings import Settings


def preview(settings: Settings, console: Console) -> bool:
    """Print each run with its theory and its command on this node; returns whether any can work."""
    output, corpus, cluster = Output(settings.output), Corpus.of(settings), settings.cluster
    port, can_work = cluster.master_port + (cluster.num_nodes > 1), False
    for run in plan_runs(settings):
        if reason := why_not(run, settings):
            console.print(f"{run.name}: skipped, {reason}", soft_wrap=True, markup=False)
            continue
        can_work = True
        command = [
            *launcher(run, settings, port),
            str(TRAINING_SCRIPT),
            *training_arguments(run, corpus, settings, output.metrics(run.name)),
        ]
        console.print(
            f"{run.name}: {run.num_processes} processes, {run.num_iterations} iterations, bubble "
            f"{run.bubble_ratio:.1%}, {run.speedup:.2f}x of 1F1B in theory",
            f"    {shlex.join(command)}",
            sep="\n",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
    return can_work
