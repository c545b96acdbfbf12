"""Ways to train a model on a few GPUs, each with its seconds of a step and its bytes."""

import math
from dataclasses import dataclass, replace

from seq1f1b.offload.planning.costs import (
    action_costs,
    adam_bytes,
    gpu_adam_seconds,
    host_bytes,
    moved,
    stage_link,
    total_parameters,
)
from seq1f1b.offload.planning.machine import Machine
from seq1f1b.offload.planning.memory import traced_bytes
from seq1f1b.offload.planning.shape import Shape, arrange, batches
from seq1f1b.offload.planning.simulation import Adam, Visits, simulate_visits
from seq1f1b.planner.memory.parameters import gradient_bytes
from seq1f1b.planner.memory.stage import trace_stage
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Action, Kind, Schedule, gpipe, one_f_one_b
from seq1f1b.simulate import Simulation, simulate


@dataclass(frozen=True)
class Parts:
    """What a step's seconds consist of.

    compute: of a stage, on average. bubble: what stages wait for each other, unequal stages
    included. adam: for weights to be updated. pcie: for copies. collectives: ZeRO's.
    """

    compute: float
    bubble: float = 0.0
    adam: float = 0.0
    pcie: float = 0.0
    collectives: float = 0.0

    @property
    def seconds(self) -> float:
        """A step."""
        return self.compute + self.bubble + self.adam + self.pcie + self.collectives

    @property
    def bound_by(self) -> str:
        """What takes most of a step beside computing, unless that takes 90% of it."""
        if self.compute >= 0.9 * self.seconds:
            return "compute"
        rest = {
            "bubble": self.bubble,
            "Adam": self.adam,
            "PCIe": self.pcie,
            "collectives": self.collectives,
        }
        return max(rest, key=lambda name: rest[name])


@dataclass(frozen=True)
class Bound:
    """What no order of a step beats: its seconds of computing, of copies and of Adam."""

    compute: float
    pcie: float
    adam: float

    @property
    def seconds(self) -> float:
        """The longest of the three, as if they fully overlapped."""
        return max(self.compute, self.pcie, self.adam)


@dataclass(frozen=True)
class Way:
    """One way to train: ``parts`` of a step, bytes of the fullest GPU and of the host.

    shape: of a pipeline. loads: of each stage and step. bound: with chunks that visit the GPUs.
    """

    name: str
    setting: Setting
    parts: Parts
    gpu_bytes: float
    host_bytes: float
    shape: Shape | None = None
    adam: Adam | None = None
    loads: tuple[int, ...] = ()
    bound: Bound | None = None

    @property
    def seconds(self) -> float:
        """A step."""
        return self.parts.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        setting = self.setting
        rows = setting.arguments.global_batch_size or 1
        return rows * setting.seq_length / self.seconds


def time_visits(
    setting: Setting,
    shape: Shape,
    machine: Machine,
    adam: Adam,
    *,
    prefetch: bool = True,
    num_steps: int = 4,
) -> Visits:
    """Simulate steps of ``setting`` whose chunks visit the GPUs."""
    schedule = shape.schedule(setting.num_stages, prefetch=prefetch)
    return _simulated(setting, schedule, machine, adam, num_steps)


def _simulated(
    setting: Setting, schedule: Schedule, machine: Machine, adam: Adam, num_steps: int = 4
) -> Visits:
    return simulate_visits(
        schedule,
        action_costs(setting, machine.flops),
        stage_link(setting, machine),
        moved(setting, machine),
        machine,
        adam,
        num_steps=num_steps,
    )


def offloaded(
    setting: Setting,
    shape: Shape,
    machine: Machine,
    runtime: Runtime,
    adam: Adam,
    *,
    prefetch: bool = True,
    gpu_bytes: float | None = None,
) -> Way:
    """Return a step whose chunks visit the GPUs.

    What it waits for is told apart by simulating it without copies' time, and without Adam's too.
    gpu_bytes: of the fullest GPU, if that is known already.
    """
    schedule = shape.schedule(setting.num_stages, prefetch=prefetch)
    visits = _simulated(setting, schedule, machine, adam)
    instant = replace(machine, pcie=math.inf, uplink=math.inf)
    without_copies = _simulated(setting, schedule, instant, adam).seconds
    bare = _simulated(setting, schedule, replace(instant, host=math.inf), adam).seconds
    compute = sum(visits.busy) / len(visits.busy)
    parts = Parts(
        compute=compute,
        bubble=bare - compute,
        adam=without_copies - bare,
        pcie=visits.seconds - without_copies,
    )
    copies = visits.uplink_bytes / machine.root_together
    if gpu_bytes is None:
        gpu_bytes = traced_bytes(setting, runtime, schedule, num_slots=shape.num_slots)
    bound = Bound(compute, copies, _adam_seconds(setting, machine))
    return Way(
        name=f"offload, {_ADAM[adam]}",
        setting=setting,
        parts=parts,
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes(setting, machine),
        shape=shape,
        adam=adam,
        loads=visits.loads,
        bound=bound,
    )


_ADAM = {
    Adam.SERIAL: "serial Adam",
    Adam.JUST_IN_TIME: "just-in-time Adam",
    Adam.ON_ARRIVAL: "Adam on arrival",
}


def resident(
    setting: Setting,
    shape: Shape,
    machine: Machine,
    runtime: Runtime,
    *,
    all_forwards: bool = False,
) -> Way:
    """Return a step of (Seq)1F1B, or of GPipe, with everything on the GPUs, Adam too."""
    run = run_resident(setting, shape, machine, all_forwards=all_forwards)
    compute = sum(run.busy) / len(run.busy)
    return Way(
        name=f"{'GPipe' if all_forwards else '1F1B'}, all on the GPUs",
        setting=setting,
        parts=Parts(compute, run.step_time - compute, adam=gpu_adam_seconds(setting, machine)),
        gpu_bytes=traced_bytes(setting, runtime, run.schedule),
        host_bytes=0.0,
        shape=shape,
    )


def run_resident(
    setting: Setting, shape: Shape, machine: Machine, *, all_forwards: bool = False
) -> Simulation:
    """Simulate a step's forwards and backwards with everything on the GPUs."""
    sizes = setting.num_stages, shape.num_micro_batches, shape.num_splits
    if all_forwards:
        schedule = gpipe(*sizes)
    else:
        own_turns = replace(shape, num_turns=_own_turns(shape, setting.num_stages))
        schedule = own_turns.bare(setting.num_stages)
    costs = action_costs(setting, machine.flops)
    return simulate(schedule, costs, stage_link(setting, machine))


def _own_turns(shape: Shape, num_stages: int) -> int:
    """Return how many turns 1F1B interleaved takes: as many sub-sequences in each as stages."""
    units = shape.num_micro_batches * shape.num_splits
    return max(1, units // num_stages)


def zero_offload(base: Setting, rows: int, machine: Machine, runtime: Runtime) -> Way:
    """Return the fastest step of ZeRO-Offload that fits, or the smallest one.

    ZeRO-2 with gradients, optimizer states and Adam on the host (arXiv 2101.06840): each GPU has
    all weights and computes its own sequences, of which there are at least one; gradients are
    reduce-scattered in every micro-batch's backward, then leave; the updated weights come back and
    are gathered. ``rows`` are the sequences of a step.
    """
    number = machine.num_gpus
    own = -(-rows // number)
    timed = [_zero_step(base, own, micro_batches, machine) for micro_batches in batches(own)]
    timed.sort(key=lambda entry: entry[0].seconds)
    ways: list[Way] = []
    for parts, setting in timed:
        static = [total_parameters(setting) * setting.element_bytes, machine.buckets]
        actions = one_f_one_b(1, setting.num_micro_batches).stages[0]
        held = trace_stage(setting, runtime, 0, actions, num_steps=1, static=static)
        all_rows = replace(setting.arguments, global_batch_size=rows)
        ways.append(
            Way(
                name="ZeRO-Offload",
                setting=replace(setting, arguments=all_rows),
                parts=parts,
                gpu_bytes=held.reserved,
                host_bytes=host_bytes(setting, machine),
                shape=Shape(1, 1, 1, 1, setting.num_micro_batches),
            )
        )
        if held.reserved <= machine.usable:
            return ways[-1]
    return min(ways, key=lambda way: way.gpu_bytes)


def _zero_step(
    base: Setting, own: int, micro_batches: int, machine: Machine
) -> tuple[Parts, Setting]:
    """Return a step in which each GPU computes ``own`` sequences, and its setting on one GPU."""
    setting = arrange(base, 1, Shape(1, 1, 1, 1, micro_batches), own)
    costs = action_costs(setting, machine.flops)
    forward, backward = (
        micro_batches * costs.of(0, Action(kind, 0, 0, 0)) for kind in (Kind.F, Kind.B)
    )
    total, number = total_parameters(setting), machine.num_gpus
    width, gradient = setting.element_bytes, gradient_bytes(setting)
    others = (number - 1) / number / machine.collectives
    scatter, gather = micro_batches * gradient * total * others, width * total * others
    parts = Parts(
        compute=forward + backward,
        adam=_adam_seconds(setting, machine),
        pcie=(gradient + width) * total / number / machine.pcie_together,
        collectives=max(0.0, scatter - backward) + gather,
    )
    return parts, setting


def _adam_seconds(setting: Setting, machine: Machine) -> float:
    return total_parameters(setting) * adam_bytes(setting) / machine.host
