"""Megatron's ``forward_backward_func``: its own loops, measured, or a step of ours."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from megatron.adaptor.layers.known import check_layers
from megatron.adaptor.layers.loss_recomputation import check_model
from megatron.adaptor.offload.link import link_of
from megatron.adaptor.offload.slots import ChunkSlots
from megatron.adaptor.patches import Patch
from megatron.adaptor.reports.console import print_first
from megatron.adaptor.reports.outlook import advice
from megatron.adaptor.step.batch_feed import DataError
from megatron.adaptor.step.links import Links, close_links, make_links, transport
from megatron.adaptor.step.planning import plan_step
from megatron.adaptor.step.step import Step, StepArguments
from megatron.adaptor.step.verify import verify
from seq1f1b.runtime import ActionClock, ActionError
from seq1f1b.schedule import Plan

if TYPE_CHECKING:
    from megatron.adaptor.command_line.settings import Settings
    from megatron.adaptor.session import Session

_UTILS = "megatron.core.utils"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"


class Loop:
    """Runs the steps of one process; keeps the links between its stages."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._links: dict[tuple[Any, bool], Links] = {}
        self._checked: dict[bool, Any] = {}
        self._is_verified = False
        self._has_named_kernel = False
        self._has_warned = False
        self._is_running = False
        self._slots: ChunkSlots | None = None
        self._slots_of: Any = None

    def patches(self) -> list[Patch]:
        """Return what is replaced around Megatron's loops and their data."""
        return [
            Patch(f"{_SCHEDULES}:get_forward_backward_func", self.get_forward_backward_func),
            Patch(f"{_SCHEDULES}:forward_step", self.forward_step),
            Patch(f"{_UTILS}:get_batch_on_this_cp_rank", self.get_batch_on_this_cp_rank),
        ]

    def get_forward_backward_func(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., list[Any]]:
        """Run sub-sequences in the executor, and measure Megatron's own loops."""
        session = self._session
        session.count_vocabulary()
        loop = original(*args, **kwargs)
        asked = session.asked
        if asked is None and not self._has_warned:
            self._has_warned = True
            print_first(
                "> warning: Seq1F1B is installed and nothing is on: training runs as without it; "
                "pass --seq1f1b-splits, or call megatron.adaptor.enable(splits=4)"
            )
        if asked is None or not asked.runs_executor:
            return self._of_ours(self._measured(loop))
        return self._of_ours(lambda **kwargs: self._run(StepArguments(**kwargs), loop))

    def forward_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stop a loop of Megatron's that was fetched before sub-sequences were turned on."""
        asked = self._session.asked
        if not self._is_running and asked is not None and asked.runs_executor:
            raise RuntimeError(
                "Seq1F1B is on, and a loop of Megatron's runs that get_forward_backward_func "
                "returned before: call megatron.adaptor.enable() before get_forward_backward_func "
                "is called"
            )
        return original(*args, **kwargs)

    def get_batch_on_this_cp_rank(
        self, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Cut a micro-batch to the running sub-sequence."""
        return original(self._session.cutter.cut(batch), *args, **kwargs)

    def close(self) -> None:
        """Destroy the links; the next step makes new ones."""
        while self._links:
            close_links(self._links.popitem()[1])

    def _of_ours(self, loop: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def forward_backward(**kwargs: Any) -> list[Any]:
            self._is_running = True
            try:
                return loop(**kwargs)
            finally:
                self._is_running = False

        return forward_backward

    def _measured(self, loop: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        around = self._session.meter.around_loop(loop)

        def forward_backward(**kwargs: Any) -> list[Any]:
            self._session.has_stepped = True
            try:
                return around(**kwargs)
            except StopIteration:
                raise DataError(
                    "the data iterator ended inside a step: it must deliver as many micro-batches "
                    "as a step has"
                ) from None
            finally:
                self._session.attention.forget_masks()

        return forward_backward

    def _run(self, arguments: StepArguments, loop: Callable[..., list[Any]]) -> list[Any]:
        session = self._session
        settings = session.settings_for(arguments)
        if settings.verify and arguments.trains and not self._is_verified:
            self._is_verified = True
            whole = loop if settings.packing is None else self._whole(settings)
            verify(arguments, whole, lambda step: self._step(step, settings))
        reports = self._step(arguments, settings)
        kernel = session.context.kernel_taken
        if kernel is not None and not self._has_named_kernel:
            self._has_named_kernel = True
            print_first(f"> attention kernel of sub-sequences: {kernel}")
        return reports

    def _whole(self, settings: "Settings") -> Callable[..., list[Any]]:
        """Return a loop that runs packed micro-batches whole: the executor, with one split.

        Megatron's own passes no documents to middle stages.
        """
        one = replace(settings, num_splits=1, schedule_name="auto", max_live=None)
        return lambda **arguments: self._step(StepArguments(**arguments), one)

    def _step(self, arguments: StepArguments, settings: "Settings") -> list[Any]:
        """Plan and run one step; links that a failed step has used are not used again."""
        session = self._session
        session.router_losses.forget()
        hidden = settings.packing.hidden if settings.packing else ()
        feeds = arguments.feeds(hidden, repeats=settings.num_splits > 1)
        plan, documents = plan_step(settings, arguments, feeds[0])
        key = arguments.groups.pp, plan.schedule.num_chunks > 1
        if key not in self._links:
            check_layers(arguments.chunks)
            if settings.recompute_loss:
                check_model(arguments.chunks)
            self._links[key] = make_links(key[0], interleaved=key[1], timeout=settings.timeout)
            lengths = ", ".join(str(part.length) for part in plan.cuts[0])
            if documents is not None and settings.balance_method == "uniform_comp":
                lengths = "by the documents of each micro-batch"
            print_first(f"> {plan.schedule.describe()}; lengths {lengths}")
            if session.args is not None:
                for text in advice(session.args):
                    print_first(f"> warning: {text}")
        step = Step(
            arguments,
            plan,
            session.context,
            session.cutter,
            feeds,
            documents=documents,
            splits_backwards=settings.splits_backwards,
            is_checked=self._is_first(arguments, plan),
            slots=self._slots_for(arguments, settings),
        )

        def run(clock: ActionClock) -> list[Any]:
            return step.run(
                transport(
                    self._links[key],
                    plan,
                    key[0],
                    num_shares=arguments.num_shares,
                    micro_batch_size=arguments.micro_batch_size,
                    hidden_size=arguments.config.hidden_size,
                    dtype=arguments.config.pipeline_dtype or arguments.config.params_dtype,
                ),
                clock,
            )

        try:
            return session.meter.measure(arguments.model, run, step.slots)
        except ActionError as error:
            self._links.pop(key)
            raise ActionError(f"{self._where()}{error}") from error.__cause__
        except BaseException:
            self._links.pop(key)
            raise

    def _slots_for(self, arguments: StepArguments, settings: "Settings") -> ChunkSlots | None:
        """Return the slots that model chunks visit, which are made once for a model."""
        if not settings.offload_chunks:
            return None
        chunks, number = arguments.chunks, settings.offload_chunks
        pace, roots = settings.offload_gb_per_second, settings.offload_roots
        wanted = chunks, number, pace, roots
        if self._slots is None or self._slots_of != wanted:
            self._slots = ChunkSlots(
                chunks,
                number,
                self._session.updates,
                self._session.reductions,
                device=torch.cuda.current_device(),
                link=link_of(pace, roots, arguments.groups.pp.rank()),
                poison=settings.poison,
            )
            self._slots_of = wanted
        return self._slots

    def _is_first(self, arguments: StepArguments, plan: Plan) -> bool:
        """Whether this forward step trains, or evaluates, on sub-sequences for the first time."""
        if all(part.is_whole for parts in plan.cuts for part in parts):
            return False
        script = _code_of(arguments.forward_step_func)
        is_first = self._checked.get(arguments.trains) != script
        self._checked[arguments.trains] = script
        return is_first

    def _where(self) -> str:
        args = self._session.args
        iteration = getattr(args, "curr_iteration", None)
        rank = f"rank {torch.distributed.get_rank()}, "
        return rank if iteration is None else f"{rank}iteration {iteration + 1}, "


def _code_of(function: Any, seen: frozenset[int] = frozenset()) -> tuple[Any, ...]:
    """Return what a function runs, which a closure or partial made anew for each step shares.

    Functions that it closes over, or that a partial passes on, are a part of that.
    """
    if id(function) in seen:
        return ()
    seen |= {id(function)}
    if isinstance(function, functools.partial):
        held = [function.func, *function.args, *function.keywords.values()]
        return tuple(code for value in held for code in _code_of(value, seen))
    code = getattr(function, "__code__", None)
    if code is None:
        return (function,) if callable(function) else ()
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return (code, *(inner for value in cells for inner in _code_of(value, seen)))


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
