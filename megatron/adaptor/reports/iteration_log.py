"""What is logged, and written to files, after each iteration."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.patches import Patch
from megatron.adaptor.reports import trace, writers
from megatron.adaptor.reports.metrics import StepMeter
from megatron.adaptor.reports.metrics_file import MetricsFile


class IterationLog:
    """Logs what ``meter`` has measured, as the settings of the process say."""

    def __init__(
        self,
        meter: StepMeter,
        settings: Callable[[], Settings | None],
        arguments: Callable[[], argparse.Namespace | None],
    ) -> None:
        self._meter, self._settings, self._arguments = meter, settings, arguments
        self._file: MetricsFile | None = None
        meter.before_step = self._before_step

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's log."""
        return [Patch("megatron.training.training:training_log", self.training_log)]

    def training_log(
        self,
        original: Callable[..., Any],
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Log tokens/s, TFLOP/s, MFU, activation memory, KV carry and bubble ratio."""
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        self._log(iteration)
        return result

    def _before_step(self) -> None:
        """Let all stages begin the iteration that is traced at the same moment."""
        if self._traces(getattr(self._arguments(), "curr_iteration", -1) + 1):
            torch.distributed.barrier(parallel_state.get_pipeline_model_parallel_group())

    def _traces(self, iteration: int) -> bool:
        settings = self._settings()
        return bool(settings and settings.trace_file and iteration == settings.trace_iteration)

    def _log(self, iteration: int) -> None:
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size
        from megatron.training import get_args, print_rank_last
        from megatron.training.training import num_floating_point_operations

        settings, args = self._settings(), get_args()
        if settings and settings.trace_file and self._traces(iteration):
            self._trace(settings.trace_file)
        prints = iteration % args.log_interval == 0
        file = settings.metrics_file if settings else None
        to_writers = writers.writes(args, iteration)
        if not prints and file is None and not to_writers:
            return
        batch_size = get_current_global_batch_size()
        operations = num_floating_point_operations(args, batch_size)
        entry = self._meter.iteration(iteration, operations, batch_size * args.seq_length)
        if entry is None or torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        if prints:
            print_rank_last(entry.log_line())
        if to_writers:
            writers.write(entry, args)
        if file is not None:
            self._file = self._file or MetricsFile(Path(file))
            self._file.append(entry)

    def _trace(self, file: str) -> None:
        """Write the trace of the pipeline that rank 0 is in."""
        group = parallel_state.get_pipeline_model_parallel_group()
        if 0 in torch.distributed.get_process_group_ranks(group):
            trace.write(file, self._meter.timed, group)
