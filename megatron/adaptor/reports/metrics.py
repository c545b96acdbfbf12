"""The cost of a step, measured alike under Megatron's loops and under our executor."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from megatron.adaptor.layers.weight_gradients import name_owners
from megatron.adaptor.offload.slots import ChunkSlots, Traffic
from megatron.adaptor.patches import Patch
from seq1f1b.runtime import ActionClock, ActivationMeter, ExecutionContext
from seq1f1b.schedule import Action, Kind, Span
from seq1f1b.simulate import Costs

_MIB = 2**20


@dataclass(frozen=True)
class IterationMetrics:
    """One iteration, as it is logged; lists have one entry per stage.

    bubble_ratio: the stage's idle time over the longest stage's forward-backward pass.
    peak_activation_bytes: see ActivationMeter; kv_carry_bytes is the part of the KV carry.
    action_milliseconds: means over micro-batches by name, as of ``Costs.named``; Megatron's
    interleaved loop does not tell its chunks, which share chunk 0's names.
    chunk_loads, transferred_bytes: of model chunks that visit the device; None where they stay.
    """

    iteration: int
    lm_loss: float | None
    milliseconds: float
    tokens_per_second: float
    tflops_per_device: float
    peak_activation_bytes: list[int]
    kv_carry_bytes: list[int]
    bubble_ratio: list[float]
    action_milliseconds: list[dict[str, float]] = field(default_factory=list)
    chunk_loads: list[int] | None = None
    transferred_bytes: list[int] | None = None

    def log_line(self) -> str:
        """Return what is printed under Megatron's own line."""
        memory = ", ".join(f"{number / _MIB:.1f}" for number in self.peak_activation_bytes)
        bubbles = ", ".join(f"{ratio:.3f}" for ratio in self.bubble_ratio)
        visits = ""
        if self.chunk_loads is not None and self.transferred_bytes is not None:
            moved = ", ".join(f"{number / _MIB:.1f}" for number in self.transferred_bytes)
            visits = (
                f" | chunk loads by stage: {self.chunk_loads} | "
                f"weights and gradients MiB by stage: [{moved}]"
            )
        return (
            f" seq1f1b iteration {self.iteration:8d} | tokens/s: {self.tokens_per_second:.1f} | "
            f"TFLOP/s per device: {self.tflops_per_device:.3f} | "
            f"peak activation MiB by stage: [{memory}] | bubble ratio by stage: [{bubbles}]"
            f"{visits}"
        )


class StageFigures(NamedTuple):
    """One stage's last forward-backward pass: how long it was and how much of it was computing."""

    seconds: float
    busy_seconds: float
    peak_activation_bytes: int
    kv_carry_bytes: int
    traffic: Traffic | None = None


def bubble_ratios(stages: Sequence[StageFigures]) -> list[float]:
    """Return each stage's idle share of the step, which lasts as long as its longest stage."""
    step = max(stage.seconds for stage in stages)
    return [1 - stage.busy_seconds / step for stage in stages]


class StepMeter:
    """Times and weighs the forward-backward pass of every iteration on this rank."""

    def __init__(self, context: ExecutionContext, device: str) -> None:
        self._context = context
        self._device = device
        self._activations = ActivationMeter(
            context.carries, context.weight_gradients, device=device
        )
        self._clock: ActionClock | None = None
        self._num_timed = dict.fromkeys((Kind.F, Kind.B), 0)
        self.before_step: Callable[[], None] | None = None
        self.last: StageFigures | None = None
        self.timed: Sequence[Span] = ()
        self._seconds = 0.0
        self._losses: dict[str, Any] = {}

    def around_loop(self, loop: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """Return ``loop`` (a forward_backward_func of Megatron's) with its actions timed."""

        def forward_backward(**kwargs: Any) -> list[Any]:
            def run(clock: ActionClock) -> list[Any]:
                self._clock = clock
                self._num_timed = dict.fromkeys((Kind.F, Kind.B), 0)
                try:
                    return loop(**kwargs)
                finally:
                    self._clock = None

            return self.measure(kwargs["model"], run)

        return forward_backward

    def measure(
        self,
        model: Any,
        run: Callable[[ActionClock], list[Any]],
        slots: ChunkSlots | None = None,
    ) -> list[Any]:
        """Call ``run`` with a clock for its actions and keep the figures.

        slots: where the model's chunks visit the device, which are no activations.
        """
        chunks = model if isinstance(model, list) else [model]
        if self._device == "cpu":
            for chunk in chunks:
                if getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False):
                    name_owners(chunk.parameters())
        constants = [t for c in chunks for t in (*c.parameters(), *torch.nn.Module.buffers(c))]
        if slots is not None:
            constants += slots.tensors
        if self.before_step is not None:
            self.before_step()
        carries = self._context.carries
        carries.reset_peak()
        clock = ActionClock(self._device)
        with self._activations.measuring(constants):
            result = run(clock)
        self.timed, length = clock.finish()
        busy = sum(entry.end - entry.start for entry in self.timed)
        self.last = StageFigures(
            length,
            busy,
            self._activations.peak_bytes,
            carries.peak_bytes,
            slots.traffic if slots is not None else None,
        )
        return result

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron to time its own loops, and whole iterations."""
        schedules = "megatron.core.pipeline_parallel.schedules"
        emptied = "megatron.core.tensor_parallel.random:CheckpointWithoutOutput"
        return [
            Patch(f"{emptied}.discard_output_and_register_recompute", self.emptied),
            Patch(f"{emptied}._recompute", self.filled),
            Patch(f"{schedules}:forward_step", self.forward_step),
            Patch(f"{schedules}:backward_step", self.backward_step),
            Patch("megatron.training.training:train_step", self.train_step),
        ]

    def emptied(self, original: Callable[..., Any], checkpoint: Any, hook_tensor: Any) -> Any:
        """Count outputs that are emptied until the backward computes them again."""
        original(checkpoint, hook_tensor)
        self._activations.recount()

    def filled(self, original: Callable[..., Any], checkpoint: Any, *args: Any) -> Any:
        """Count outputs that the backward has computed again."""
        original(checkpoint, *args)
        self._activations.recount()

    def forward_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Time the forwards of Megatron's own loops."""
        return self._timed(Kind.F, original, *args, **kwargs)

    def backward_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Time the backwards of Megatron's own loops."""
        return self._timed(Kind.B, original, *args, **kwargs)

    def train_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Time whole iterations, and keep the loss that they return."""
        start = time.perf_counter()
        result = original(*args, **kwargs)
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - start
        self._losses = result[0]
        return result

    def _timed(self, kind: Kind, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a step function of Megatron's own loops, and time it.

        The loops do not say which micro-batch it is: the calls are counted. Only interleaved loops
        take them in another order.
        """
        if self._clock is None:
            return original(*args, **kwargs)
        self._clock.begin()
        result = original(*args, **kwargs)
        self._clock.end(Action(kind, 0, self._num_timed[kind], 0))
        self._num_timed[kind] += 1
        return result

    def iteration(self, iteration: int, floating_point_operations: float, tokens: int) -> Any:
        """Gather the last step's figures from all stages; every rank of a pipeline must call."""
        if self.last is None:
            return None
        group = parallel_state.get_pipeline_model_parallel_group()
        own = self.last, *Costs.measured([self.timed]).named()
        gathered: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(gathered, own, group=group)
        stages, actions = zip(*gathered, strict=True)
        loss = self._losses.get("lm loss")
        traffic = [stage.traffic for stage in stages if stage.traffic is not None]
        return IterationMetrics(
            iteration=iteration,
            lm_loss=None if loss is None else float(loss),
            milliseconds=self._seconds * 1000,
            tokens_per_second=tokens / self._seconds,
            tflops_per_device=floating_point_operations
            / (self._seconds * 1e12 * torch.distributed.get_world_size()),
            peak_activation_bytes=[stage.peak_activation_bytes for stage in stages],
            kv_carry_bytes=[stage.kv_carry_bytes for stage in stages],
            bubble_ratio=bubble_ratios(stages),
            action_milliseconds=[
                {name: round(seconds * 1000, 3) for name, seconds in of_stage.items()}
                for of_stage in actions
            ],
            chunk_loads=[entry.loads for entry in traffic] or None,
            transferred_bytes=[entry.num_bytes for entry in traffic] or None,
        )
