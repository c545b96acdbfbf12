"""From the environment to the exit status: read the settings, sweep, report."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console

from seq1f1b_tools.sweep.corpus import CorpusError
from seq1f1b_tools.sweep.nodes import Nodes, NodesError
from seq1f1b_tools.sweep.preview import preview
from seq1f1b_tools.sweep.records import OutputError
from seq1f1b_tools.sweep.report import print_table, write_csv
from seq1f1b_tools.sweep.settings import SettingsError, misspelled, read_settings
from seq1f1b_tools.sweep.sweep import Sweep

_WIDTH_WITHOUT_TERMINAL = 140
_INTERRUPTED = 130


def main(arguments: Sequence[str], environ: Mapping[str, str], num_gpus: int | None = None) -> int:
    """Return the exit status: 0 if no run failed, 1 if one did, 2 for bad settings, 130 ended."""
    if arguments:
        print(
            f"exp.sh: takes no arguments ({' '.join(arguments)}): its settings are environment "
            "variables, which bash exp.sh --help lists",
            file=sys.stderr,
        )
        return 2
    for name, near in misspelled(environ):
        print(f"exp.sh: warning: {name} is no setting; did you mean {near}?", file=sys.stderr)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    try:
        settings = read_settings(environ, _count_gpus() if num_gpus is None else num_gpus)
    except SettingsError as error:
        print(f"exp.sh: these settings cannot work:\n{_indented(str(error))}", file=sys.stderr)
        return 2
    if settings.dry_run:
        return 0 if preview(settings, console) else 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, signal.default_int_handler)
    try:
        nodes = Nodes(settings.cluster)
        return sweep_and_report(Sweep(settings, nodes, console))
    except (CorpusError, NodesError, OutputError) as error:
        print(f"exp.sh: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first run
        print("exp.sh: interrupted", file=sys.stderr)
        return _INTERRUPTED


def sweep_and_report(sweep: Sweep) -> int:
    """Run the sweep and report what was done, even if it was interrupted."""
    try:
        return _sweep_and_report(sweep)
    except OSError as error:
        sweep.nodes.leave(str(error))
        raise OutputError(f"OUTPUT={sweep.output.folder}: {error}") from error


def _sweep_and_report(sweep: Sweep) -> int:
    status = 0
    try:
        sweep.run_all()
    except KeyboardInterrupt:
        status = _INTERRUPTED
        sweep.nodes.leave("interrupted")
    except (CorpusError, NodesError, OutputError) as error:
        sweep.nodes.leave(str(error))
        raise
    if sweep.nodes.is_first:
        report(sweep)
    if status:
        print("exp.sh: interrupted; the same command goes on from here", file=sys.stderr)
        return status
    return int(any(result.status in ("failed", "timeout") for result in sweep.results()))


def report(sweep: Sweep) -> None:
    """Print the table; write the CSV file and the charts."""
    from seq1f1b_tools.sweep.charts import draw_charts

    results = sweep.results()
    print_table(results, sweep.console)
    folder = sweep.settings.output
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(results, folder / "results.csv")
    files = [folder / "results.csv", *draw_charts(results, folder)]
    sweep.console.print("written:", *(os.path.relpath(f) for f in files), soft_wrap=True)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
