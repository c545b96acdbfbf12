"""The sweep itself: run after run, resumed, recorded and reported."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.status import Status

from seq1f1b_tools.sweep.corpus import Corpus, prepare
from seq1f1b_tools.sweep.launch import Job, Outcome, launch
from seq1f1b_tools.sweep.nodes import Nodes, NodesError
from seq1f1b_tools.sweep.plan import (
    TRAINING_SCRIPT,
    Run,
    identity,
    launcher,
    plan_runs,
    training_arguments,
    why_not,
)
from seq1f1b_tools.sweep.records import (
    Output,
    Record,
    read_metrics,
    summarize,
    whole_iterations,
)
from seq1f1b_tools.sweep.report import Result
from seq1f1b_tools.sweep.settings import Settings
from seq1f1b_tools.sweep.turns.conductor import Turns

Launcher = Callable[[Run, int], list[str]]
_STOPPED_ELSEWHERE = "stopped on this node"


@dataclass
class Sweep:
    """The runs of a sweep and where they stand.

    script: the training script.
    launcher: gives the part of a run's command before the script, for a port; torchrun if None.
    prepare: makes the data.
    """

    settings: Settings
    nodes: Nodes
    console: Console
    script: Path = TRAINING_SCRIPT
    launcher: Launcher | None = None
    prepare: Callable[[Settings], Corpus] = prepare

    def __post_init__(self) -> None:
        self.output = Output(self.settings.output)
        self.runs = plan_runs(self.settings)
        self.skipped = {
            run.name: reason for run in self.runs if (reason := why_not(run, self.settings))
        }

    def run_all(self) -> None:
        """Bring every run of the plan to an end.

        Raises:
            OutputError: the folder for the results cannot be used.
            CorpusError: the data cannot be made.
            NodesError: the nodes do not go together.
        """
        if self.nodes.is_first:
            self.output.claim()
        self._compare_nodes()
        if len(self.skipped) < len(self.runs):
            self._prepare()
        for runs in self._batches():
            wanted = [run for run in runs if self._is_wanted(run)]
            if wanted:
                self._bring_to_an_end(wanted)
        self.nodes.gather("end", "")

    def _batches(self) -> Iterator[list[Run]]:
        """Say which runs go at the same time."""
        if not self.settings.take_turns:
            yield from ([run] for run in self.runs)
            return
        for _, runs in groupby(self.runs, key=lambda run: run.setting):
            yield list(runs)

    def results(self) -> list[Result]:
        """Return every run of the plan with what is on disk of it."""
        known = {run.name: self._result(run) for run in self.runs}
        baselines = {run.setting: known[run.name].summary for run in self.runs if run.is_baseline}
        return [replace(known[r.name], baseline=baselines.get(r.setting)) for r in self.runs]

    def _result(self, run: Run) -> Result:
        if run.name in self.skipped:
            return Result(run, "skipped", self.skipped[run.name])
        record = self.output.load(run.name)
        if record is None or record.command != self._identity(run):
            return Result(run, "not run")
        summary = None
        if record.status == "ok":
            entries = whole_iterations(read_metrics(self.output.metrics(run.name)))
            if len(entries) < run.num_iterations:
                return Result(run, "not run")
            summary = summarize(entries, self.settings.warmup_iters)
        return Result(run, record.status, record.error, record.seconds, summary)

    def _prepare(self) -> None:
        """Make the data on node 0, for all."""
        folder = self.nodes.decide("data", lambda: str(self.prepare(self.settings).folder))
        if not Corpus.of(self.settings).is_tokenized:
            raise NodesError(
                f"DATA={self.settings.data}: node 0 has made the data in {folder}, which this "
                "node does not see; put DATA and OUTPUT on a file system that all nodes share"
            )

    def _compare_nodes(self) -> None:
        """Make sure that all nodes have the same plan and see the same folder for results."""
        token = f"{socket.gethostname()} {os.getpid()}"
        seen = self.output.folder / ".sweep"
        if self.nodes.is_first:
            seen.write_text(token)
        plan = hashlib.sha256("\n".join(map(repr, self._plan())).encode()).hexdigest()
        if self.nodes.decide("plan", lambda: plan) != plan:
            raise NodesError(
                "this node's settings are not node 0's: start the same command, with the same "
                "variables, on every node"
            )
        shown = self.nodes.decide("token", lambda: token)
        if not seen.is_file() or seen.read_text() != shown:
            raise NodesError(
                f"OUTPUT={self.settings.output}: this node does not see what node 0 writes there; "
                "put DATA and OUTPUT on a file system that all nodes share"
            )

    def _plan(self) -> Sequence[object]:
        return [*self.runs, *self.settings.extra_args, self.settings.warmup_iters]

    # ----------------------------------------------------------------------- runs of one batch

    def _arguments(self, run: Run, metrics_file: Path) -> list[str]:
        return training_arguments(run, Corpus.of(self.settings), self.settings, metrics_file)

    def _identity(self, run: Run) -> str:
        arguments = self._arguments(run, self.output.metrics(run.name))
        return identity(run, self.script, arguments, self.settings.cluster)

    def _command(self, run: Run, start: str) -> list[str]:
        cluster = self.settings.cluster
        several = cluster.num_nodes > 1
        port = cluster.master_port + 1 if several else _free_port()
        if self.launcher is not None:
            before = self.launcher(run, port)
        else:
            before = launcher(run, self.settings, port)
        metrics_file = self.output.started(run.name, start)
        return [*before, str(self.script), *self._arguments(run, metrics_file)]

    def _is_wanted(self, run: Run) -> bool:
        """Whether a run has to be started; says why not otherwise."""
        if run.name in self.skipped:
            self._say(f"{self._place(run)}: skipped, {self.skipped[run.name]}")
            return False

        def decision() -> str:
            settled = self.output.is_settled(
                run.name,
                self._identity(run),
                run.num_iterations,
                retry=self.settings.retry_failed,
            )
            return "done" if settled else "run"

        if self.nodes.decide(f"run/{run.name}", decision) == "done":
            self._say(f"{self._place(run)}: {self._known(run)}")
            return False
        return True

    def _bring_to_an_end(self, runs: list[Run]) -> None:
        starts = [
            self.nodes.decide(f"start/{run.name}", partial(self.output.begin, run.name))
            for run in runs
        ]
        with self.console.status("starting") as status:
            outcomes = self._launch(runs, starts, status)
        for run, outcome in zip(runs, outcomes, strict=True):
            reported = self.nodes.gather(f"outcome/{run.name}", json.dumps(asdict(outcome)))
            if self.nodes.is_first:
                self.output.end(run.name)
                self._settle(run, [Outcome(**json.loads(text)) for text in reported])
                self._say(f"{self._place(run)}: {self._known(run)}")

    def _launch(self, runs: list[Run], starts: list[str], status: Status) -> list[Outcome]:
        def tick(seconds: float) -> None:
            lines = (f"{self._place(run)}: {self._progress(run, seconds)}" for run in runs)
            status.update("\n  ".join(lines))

        timeout = self.settings.run_timeout * len(runs)
        try:
            with Turns(len(runs)) if self.settings.take_turns else nullcontext() as turns:
                jobs = [self._job(*begun) for begun in zip(runs, starts, strict=True)]
                if turns is not None:
                    jobs = [_in_turn(job, turns, place) for place, job in enumerate(jobs)]
                outcomes = launch(jobs, timeout, tick)
        except KeyboardInterrupt:
            for run in runs:
                self.nodes.raise_alarm(run.name, "interrupted")
            raise
        for run, outcome in zip(runs, outcomes, strict=True):
            if outcome.status != "ok":
                self.nodes.raise_alarm(run.name, outcome.error)
        return outcomes

    def _job(self, run: Run, start: str) -> Job:
        def alarm() -> str | None:
            raised = self.nodes.alarm(run.name)
            return None if raised is None else f"{_STOPPED_ELSEWHERE}: {raised}"

        return Job(
            self._command(run, start),
            self.output.log(run.name, self.settings.cluster.node_rank),
            self._environment(),
            alarm,
            self.output.lock,
        )

    def _environment(self) -> dict[str, str]:
        """Return the environment of a run: what the user has set stays."""
        name = "CUDA_DEVICE_MAX_CONNECTIONS" if self.settings.has_gpu else "OMP_NUM_THREADS"
        return {name: "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}

    def _settle(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """Record how a run ended: as on the node where it failed first, if it failed."""
        failed = [outcome for outcome in outcomes if outcome.status != "ok"]
        failed.sort(key=lambda outcome: outcome.error.startswith(_STOPPED_ELSEWHERE))
        outcome = failed[0] if failed else outcomes[0]
        done = len(whole_iterations(read_metrics(self.output.metrics(run.name))))
        if outcome.status == "ok" and done < run.num_iterations:
            outcome = Outcome(
                "failed",
                f"ended well, but only {done} of {run.num_iterations} iterations were measured",
                outcome.seconds,
            )
        self.output.save(
            Record(run.name, outcome.status, outcome.error, outcome.seconds, self._identity(run))
        )

    def _place(self, run: Run) -> str:
        return f"[{self.runs.index(run) + 1}/{len(self.runs)}] {run.name}"

    def _known(self, run: Run) -> str:
        result = self._result(run)
        text = f"{result.status}, {result.seconds or 0.0:.0f} s"
        if result.summary is not None:
            loss = result.summary.last_loss
            text += f", {result.summary.milliseconds:,.0f} ms a step"
            text += "" if loss is None else f", last loss {loss:.4f}"
        return f"{text}: {result.error}" if result.error else text

    def _progress(self, run: Run, seconds: float) -> str:
        entries = read_metrics(self.output.metrics(run.name))
        text = f"{seconds:.0f} s, iteration {len(entries)} of {run.num_iterations}"
        if entries:
            last = entries[-1]
            text += f", {last['milliseconds']:,.0f} ms"
            text += "" if last["lm_loss"] is None else f", loss {last['lm_loss']:.4f}"
        return text

    def _say(self, message: str) -> None:
        if self.nodes.is_first:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)


def _in_turn(job: Job, turns: Turns, place: int) -> Job:
    environment = {**job.environment, **turns.environment(place)}
    return replace(job, environment=environment, ended=lambda: turns.leave(place))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
