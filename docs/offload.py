"""Print the tables of docs/offload.md, or write them: what a model of a step says of offloading.

python docs/offload.py --write
python docs/offload.py --pcie-gb-s 12 --gpus-per-root 1
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from seq1f1b.cli import offload_options  # noqa: E402
from seq1f1b.cli.offload_options import make_machine  # noqa: E402
from seq1f1b.offload.planning.case import Case, Recomputation, make_case  # noqa: E402
from seq1f1b.offload.planning.machine import GB, Machine  # noqa: E402
from seq1f1b.offload.planning.search import best_offloaded  # noqa: E402
from seq1f1b.offload.planning.shape import Shape, arrange, layouts  # noqa: E402
from seq1f1b.offload.planning.simulation import Adam  # noqa: E402
from seq1f1b.offload.planning.thresholds import thresholds  # noqa: E402
from seq1f1b.offload.planning.ways import (  # noqa: E402
    Way,
    offloaded,
    resident,
    time_visits,
    zero_offload,
)
from seq1f1b.planner.gpu import gpu  # noqa: E402
from seq1f1b.planner.presets import model_options  # noqa: E402
from seq1f1b.planner.setting import with_recomputed_loss  # noqa: E402

PAGE = ROOT / "docs" / "offload.md"
BEGIN, END = "<!-- tables of docs/offload.py -->", "<!-- end of tables -->"
CARDS = {"l20": "4 x L20", "rtx-4090": "4 x RTX 4090"}
MODELS = {"llama-2-7b": "Llama 2 7B", "llama-2-13b": "Llama 2 13B", "llama-3-8b": "Llama 3 8B"}
SHORT = (128, 64, 4)
"""Tokens of a sequence, sequences and micro-batches of a step."""
LONG = ((32768, 1, 1), (65536, 1, 1))
OURS = (
    ("v=2, k=2, serial Adam", 2, 2, Adam.SERIAL),
    ("v=4, k=2, serial Adam", 4, 2, Adam.SERIAL),
    ("v=4, k=2, just-in-time Adam", 4, 2, Adam.JUST_IN_TIME),
    ("v=8, k=2, just-in-time Adam", 8, 2, Adam.JUST_IN_TIME),
    ("v=4, k=2, Adam on arrival", 4, 2, Adam.ON_ARRIVAL),
    ("v=8, k=2, Adam on arrival", 8, 2, Adam.ON_ARRIVAL),
)


@dataclass(frozen=True)
class Assumed:
    """What all tables rest on; a machine for each card."""

    machines: dict[str, Machine]
    recomputation: Recomputation
    fp32_gradients: bool

    def case(self, model: str, card: str, length: int, rows: int) -> Case:
        """Return a model and a step on a card."""
        values = model_options(model) | {"seq_length": length, "global_batch_size": rows}
        return make_case(
            values,
            self.machines[card],
            recomputation=self.recomputation,
            fp32_gradients=self.fp32_gradients,
        )

    def changed(self, **rates: float) -> "Assumed":
        """Return the same with other rates of every machine."""
        changed = {card: replace(one, **rates) for card, one in self.machines.items()}
        return replace(self, machines=changed)


def ours(case: Case, shape: Shape, adam: Adam) -> Way:
    """Return the fastest layout's step."""
    settings = [
        arrange(case.base, case.num_stages, shape, case.rows, layout)
        for layout in layouts(case.base, case.num_stages, shape.num_chunks)
    ]
    fastest = min(settings, key=lambda one: time_visits(one, shape, case.machine, adam).seconds)
    return offloaded(fastest, shape, case.machine, case.runtime, adam)


def zero(case: Case) -> Way:
    """Return ZeRO-Offload's step."""
    return zero_offload(case.base, case.rows, case.machine, case.runtime)


def stays(case: Case, shape: Shape, *, all_forwards: bool = False) -> Way:
    """Return a step with everything on the GPUs."""
    layout = next(layouts(case.base, case.num_stages, shape.num_chunks))
    setting = arrange(case.base, case.num_stages, shape, case.rows, layout)
    return resident(setting, shape, case.machine, case.runtime, all_forwards=all_forwards)


def share(way: Way) -> float:
    """Return how much of a step max(compute, PCIe, Adam) is."""
    assert way.bound is not None
    return way.bound.seconds / way.seconds


def shape_text(way: Way) -> str:
    """Return v, k, T, s and m."""
    shape = way.shape
    assert shape is not None
    return (
        f"{shape.num_chunks}/{shape.num_slots}/{shape.num_turns}/{shape.num_splits}/"
        f"{shape.num_micro_batches}"
    )


class Tables:
    """The page's tables under some assumptions; each way is computed once."""

    def __init__(self, assumed: Assumed) -> None:
        self.assumed = assumed
        self.short = cache(self._short)
        self.long = cache(self._long)
        self.shares = cache(self._shares)

    def _short(self, model: str, card: str) -> dict[str, Way]:
        length, rows, micro_batches = SHORT
        case = self.assumed.case(model, card, length, rows)
        ways = {
            "ZeRO-Offload": zero(case),
            "GPipe, all on the GPUs": stays(
                case, Shape(1, 1, 1, 1, micro_batches), all_forwards=True
            ),
        }
        for name, v, k, adam in OURS:
            ways[name] = ours(case, Shape(v, k, 1, 1, micro_batches), adam)
        return ways

    def short_table(self, model: str) -> Iterator[str]:
        """Yield lines for both cards: seconds, and times as fast as ZeRO-Offload."""
        columns = [self.short(model, card) for card in CARDS]
        yield f"| {MODELS[model]} | {' | '.join(CARDS.values())} | GB a GPU | GB of host |"
        yield "|---|---|---|---|---|"
        for name in columns[0]:
            cells = [
                self._seconds(card, ways[name], ways)
                for card, ways in zip(CARDS, columns, strict=True)
            ]
            held = max(ways[name].gpu_bytes for ways in columns) / GB
            host = columns[0][name].host_bytes / GB
            yield f"| {name} | {' | '.join(cells)} | {held:.1f} | {host:.0f} |"
        bounds = [ways[OURS[-1][0]].bound for ways in columns]
        cells = [f"{bound.seconds:.2f}" for bound in bounds if bound is not None]
        yield f"| max(compute, PCIe, Adam) | {' | '.join(cells)} | | |"

    def _seconds(self, card: str, way: Way, ways: dict[str, Way]) -> str:
        zero = ways["ZeRO-Offload"]
        times = "" if self._mark(card, zero) else f" ({zero.seconds / way.seconds:.2f}x)"
        return f"{way.seconds:.2f}{times}{self._mark(card, way)}"

    def _mark(self, card: str, way: Way) -> str:
        return "" if way.gpu_bytes <= self.assumed.machines[card].usable else " X"

    def sensitivity(self) -> Iterator[str]:
        """Yield a line for each rate of collectives: v=2, serial Adam over ZeRO-Offload."""
        length, rows, _ = SHORT
        yield f"| collectives GB/s | {' | '.join(CARDS.values())} |"
        yield "|---|---|---|"
        for rate in (5, 10, 15, 20):
            assumed = self.assumed.changed(collectives=rate * GB)
            cells = []
            for card in CARDS:
                other = zero(assumed.case("llama-2-7b", card, length, rows))
                cells.append(
                    f"{other.seconds / self.short('llama-2-7b', card)[OURS[0][0]].seconds:.2f}x"
                )
            yield f"| {rate} | {' | '.join(cells)} |"

    def _long(self, model: str, card: str, length: int) -> dict[str, Way]:
        case = self.assumed.case(model, card, length, 1)
        return {
            "ZeRO-Offload": zero(case),
            "1F1B, all on the GPUs": stays(case, Shape(1, 1, 1, 1, 1)),
            "Seq1F1B s=4, all on the GPUs": stays(case, Shape(1, 1, 1, 4, 1)),
            "v=4, k=2, s=1": ours(case, Shape(4, 2, 1, 1, 1), Adam.SERIAL),
            "v=4, k=2, s=4": ours(case, Shape(4, 2, 1, 4, 1), Adam.SERIAL),
            "v=4, k=2, s=8": ours(case, Shape(4, 2, 1, 8, 1), Adam.SERIAL),
            "v=8, k=2, s=8": ours(case, Shape(8, 2, 1, 8, 1), Adam.SERIAL),
        }

    def long_table(self, model: str, card: str) -> Iterator[str]:
        """Yield lines for one sequence a step: seconds, and GB of the fullest GPU."""
        columns = [self.long(model, card, length) for length, *_ in LONG]
        titles = " | ".join(f"{length // 1024}k x 1" for length, *_ in LONG)
        yield f"| {MODELS[model]}, {CARDS[card]} | {titles} |"
        yield "|---|---|---|"
        for name in columns[0]:
            cells = [
                f"{ways[name].seconds:.1f} s, {ways[name].gpu_bytes / GB:.1f} GB"
                f"{self._mark(card, ways[name])}"
                for ways in columns
            ]
            yield f"| {name} | {' | '.join(cells)} |"

    def thresholds(self) -> Iterator[str]:
        """Yield a line for each card: from how many tokens on copies and Adam hide."""
        yield "| | tokens a turn for loads | when a root's GPUs all load | tokens a step for Adam |"
        yield "|---|---|---|---|"
        for card, title in CARDS.items():
            case = self.assumed.case("llama-2-7b", card, 128, 64)
            found = thresholds(case.base, case.machine)
            numbers = (found.loads, found.loads_together, found.adam)
            yield f"| {title} | {' | '.join(f'{number / 1000:.1f}k' for number in numbers)} |"

    def _shares(self) -> dict[int, dict[Adam, Way]]:
        """Return the best ways by tokens of a step: 7B on 4 x L20, sequences of 128 tokens."""
        found = {}
        for tokens in (8192, 16384, 32768):
            ways = best_offloaded(self.assumed.case("llama-2-7b", "l20", 128, tokens // 128), Adam)
            found[tokens] = {adam: way for adam, way in ways.items() if way is not None}
        return found

    def share_table(self) -> Iterator[str]:
        """Yield a line for each number of tokens: the bound over a step, and its shape."""
        yield f"| tokens a step | {' | '.join(f'Adam {adam}' for adam in Adam)} |"
        yield "|---|---|---|---|"
        for tokens, ways in self.shares().items():
            cells = [f"{share(way):.3f} ({shape_text(way)})" for way in ways.values()]
            yield f"| {tokens // 1024}k | {' | '.join(cells)} |"

    def link_table(self) -> Iterator[str]:
        """Yield a line for each rate of a root's link: what order and prefetch change."""
        length, rows, micro_batches = SHORT
        yield "| GB/s of a root | as it is | neighbours on other roots | without prefetch |"
        yield "|---|---|---|---|"
        for rate in (25, 12):
            assumed = self.assumed.changed(uplink=rate * GB)
            case = assumed.case("llama-2-7b", "l20", length, rows)
            shape = Shape(4, 2, 1, 1, micro_batches)
            setting = arrange(case.base, case.num_stages, shape, case.rows)
            machine = case.machine
            plain = time_visits(setting, shape, machine, Adam.JUST_IN_TIME)
            crossed = time_visits(setting, shape, replace(machine, crossed=True), Adam.JUST_IN_TIME)
            late = time_visits(setting, shape, machine, Adam.JUST_IN_TIME, prefetch=False)
            yield (f"| {rate} | {plain.seconds:.2f} | {crossed.seconds:.2f} | {late.seconds:.2f} |")

    def bars(self) -> dict[str, tuple[str, bool]]:
        """Return what was hoped for: the figure, and whether it is reached."""
        short = {card: self.short("llama-2-7b", card) for card in CARDS}
        found: dict[str, tuple[str, bool]] = {}
        for card, title in CARDS.items():
            ways = short[card]
            base = ways["ZeRO-Offload"].seconds
            two, eight = base / ways[OURS[0][0]].seconds, base / ways[OURS[3][0]].seconds
            found[f"v=2, serial Adam over ZeRO-Offload, {title}: 1.15x to 1.30x"] = (
                f"{two:.2f}x",
                1.15 <= two <= 1.30,
            )
            found[f"v=8, just-in-time Adam over ZeRO-Offload, {title}: 1.5x"] = (
                f"{eight:.2f}x",
                eight >= 1.5,
            )
        memory = (
            short["l20"]["GPipe, all on the GPUs"].gpu_bytes / short["l20"][OURS[0][0]].gpu_bytes
        )
        found["memory of GPipe over v=2, k=2: 3x"] = (f"{memory:.2f}x", memory >= 3)
        long = self.long("llama-2-7b", "l20", 32768)
        splits = long["v=4, k=2, s=1"].seconds / long["v=8, k=2, s=8"].seconds
        found["32k x 1 on 4 x L20, s=8 over s=1: 3x"] = (f"{splits:.2f}x", splits >= 3)
        case = self.assumed.case("llama-3-8b", "rtx-4090", 65536, 1)
        anew = replace(case, base=with_recomputed_loss(case.base))
        name = "Llama 3 8B, 64k x 1 on 4 x RTX 4090, v=8, k=2, s=16: under 24 GB"
        for text, one in ((name, case), (f"{name}, --seq1f1b-recompute-loss", anew)):
            held = ours(one, Shape(8, 2, 1, 16, 1), Adam.SERIAL).gpu_bytes / GB
            found[text] = (f"{held:.1f} GB", held < 24)
        shares = self.shares()
        for adam in (Adam.JUST_IN_TIME, Adam.ON_ARRIVAL):
            least = min(share(ways[adam]) for tokens, ways in shares.items() if tokens >= 16384)
            found[f"share of max(compute, PCIe, Adam) from 16k tokens on, Adam {adam}: 0.9"] = (
                f"{least:.3f}",
                least >= 0.9,
            )
        return found

    def bar_table(self) -> Iterator[str]:
        """Yield a line for each bar."""
        yield "| hoped for | model | reached |"
        yield "|---|---|---|"
        for name, (figure, reached) in self.bars().items():
            yield f"| {name} | {figure} | {'yes' if reached else '**no**'} |"

    def page(self) -> str:
        """Return all tables, with what is read from them."""
        return "\n".join(self._page())

    def _page(self) -> Iterator[str]:
        length, rows, micro_batches = SHORT
        yield (
            f"Short sequences, {rows} x {length} tokens a step in {micro_batches} micro-batches: "
            "seconds of a step, and\n"
            "times as fast as ZeRO-Offload where that fits. X: does not fit.\n"
        )
        for model in MODELS:
            yield from (*self.short_table(model), "")
        yield "v=2, k=2, serial Adam over ZeRO-Offload, 7B, by the rate of ZeRO's collectives:\n"
        yield from (*self.sensitivity(), "")
        yield "Long sequences, one a step, serial Adam:\n"
        for model, card in (
            ("llama-2-7b", "l20"),
            ("llama-2-13b", "l20"),
            ("llama-3-8b", "rtx-4090"),
        ):
            yield from (*self.long_table(model, card), "")
        yield "From how many tokens on loads and Adam hide, for models of any size:\n"
        yield from (*self.thresholds(), "")
        yield (
            "Share of max(compute, PCIe, Adam) in a step, 7B on 4 x L20, sequences of 128 tokens, "
            "the best shape\n(v/k/T/s/m: chunks, slots, turns, sub-sequences, micro-batches):\n"
        )
        yield from (*self.share_table(), "")
        yield "Links, the short step of 7B on 4 x L20, v=4, k=2, just-in-time Adam, seconds:\n"
        yield from (*self.link_table(), "")
        yield "What was hoped for, with these assumptions:\n"
        yield from self.bar_table()


def main(
    write: Annotated[
        bool, typer.Option("--write", help="Write them into docs/offload.md, not to the screen.")
    ] = False,
    peak_fraction: offload_options.PeakFraction = 0.6,
    pcie: offload_options.Pcie = 25.0,
    uplink: offload_options.Uplink = None,
    per_root: offload_options.PerRoot = 2,
    crossed: offload_options.Crossed = False,
    host: offload_options.Host = None,
    collectives: offload_options.Collectives = 10.0,
    stages: offload_options.Stages = 10.0,
    buckets: offload_options.Buckets = 2.0,
    gradient_copy: offload_options.GradientCopy = 4,
    recompute: offload_options.Recompute = Recomputation.FULL,
    fp32_gradients: offload_options.Fp32Gradients = False,
) -> None:
    """Print the tables of docs/offload.md under some assumptions."""
    machines = {
        card: make_machine(
            gpu(card),
            4,
            peak_fraction=peak_fraction,
            pcie=pcie,
            uplink=uplink,
            per_root=per_root,
            crossed=crossed,
            host=host,
            collectives=collectives,
            stages=stages,
            buckets=buckets,
            gradient_copy=gradient_copy,
        )
        for card in CARDS
    }
    text = Tables(Assumed(machines, recompute, fp32_gradients)).page()
    if write:
        PAGE.write_text(placed(PAGE.read_text(), text))
    else:
        typer.echo(text)


def placed(page: str, tables: str) -> str:
    """Return the page with ``tables`` between its marks; raises ValueError if it has none."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no marks: {BEGIN} and {END}")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


if __name__ == "__main__":
    typer.run(main)
