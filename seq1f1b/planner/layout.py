"""Which layers every model chunk of every stage has."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from seq1f1b.errors import Seq1F1BError
from seq1f1b.planner.arguments import Arguments


@dataclass(frozen=True)
class ChunkLayers:
    """One model chunk: its transformer layers, True where one has experts, and what is around.

    mtp: layers of multi-token prediction, which each have a transformer layer of their own and use
    the output layer once more. head: the final norm, the output layer and the loss.
    """

    layers: tuple[bool, ...]
    embedding: bool = False
    mtp: int = 0
    head: bool = False


class LayoutError(Seq1F1BError, ValueError):
    """Layers that cannot be dealt to the stages as asked; the message names the flag."""


def num_chunks_of(arguments: Arguments, num_stages: int, default: int = 1) -> int:
    """Return how many model chunks a stage has; raises LayoutError as Megatron does.

    ``default`` holds where no option gives the number.
    """
    a = arguments
    given = [
        flag
        for flag, value in (
            ("--num-layers-per-virtual-pipeline-stage", a.num_layers_per_virtual_pipeline_stage),
            ("--num-virtual-stages-per-pipeline-rank", a.num_virtual_stages_per_pipeline_rank),
            ("--pipeline-model-parallel-layout", a.pipeline_model_parallel_layout),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise LayoutError(f"{' and '.join(given)}: Megatron takes one of them")
    if a.pipeline_model_parallel_layout is not None:
        num_parts = len(parse_layout(a.pipeline_model_parallel_layout))
        if num_parts % num_stages:
            raise LayoutError(
                f"--pipeline-model-parallel-layout: {num_parts} parts cannot be dealt to "
                f"{num_stages} stages"
            )
        return num_parts // num_stages
    if a.num_layers_per_virtual_pipeline_stage is not None:
        per_chunk = a.num_layers_per_virtual_pipeline_stage
        per_stage = _counted_layers(a) // num_stages
        if not 0 < per_chunk <= per_stage or per_stage % per_chunk:
            raise LayoutError(
                f"--num-layers-per-virtual-pipeline-stage {per_chunk}: does not divide the "
                f"{per_stage} layers of a stage"
            )
        return per_stage // per_chunk
    return a.num_virtual_stages_per_pipeline_rank or default


def deal(
    arguments: Arguments, pattern: Sequence[bool], num_stages: int, num_chunks: int
) -> tuple[tuple[ChunkLayers, ...], ...]:
    """Deal layers to the chunks of every stage, as Megatron does; raises LayoutError.

    ``pattern`` tells of each layer whether it has experts.
    """
    mtp = arguments.mtp_num_layers or 0
    if arguments.pipeline_model_parallel_layout is not None:
        parts = _by_layout(arguments.pipeline_model_parallel_layout, pattern, mtp)
    else:
        counts = _even_counts(arguments, num_stages, num_chunks)
        parts = _parts(counts, pattern, mtp)
    return tuple(
        tuple(parts[chunk * num_stages + stage] for chunk in range(num_chunks))
        for stage in range(num_stages)
    )


def parse_layout(text: str) -> list[str]:
    """Unroll Megatron's notation (``Et*3|(tt|)*6L``) into a string of letters for each part."""
    unrolled = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        unrolled = re.sub(pattern, lambda found: found[1] * int(found[2]), unrolled)
    parts = unrolled.split("|")
    wrong = sorted(set("".join(parts)) - set("EtmL"))
    if wrong:
        raise LayoutError(
            f"--pipeline-model-parallel-layout: {text} has {', '.join(wrong)}; "
            "letters are E (embedding), t (layer), m (multi-token prediction) and L (loss)"
        )
    return parts


def write_layout(counts: Sequence[int], mtp: int) -> str:
    """Write ``counts`` layers a part in Megatron's notation, the embedding first, the loss last."""
    parts = ["t" * count for count in counts]
    parts[0] = "E" + parts[0]
    parts[-1] += "m" * mtp + "L"
    words: list[str] = []
    position = 0
    while position < len(parts):
        end = position
        while end < len(parts) and parts[end] == parts[position]:
            end += 1
        if end - position > 1 and end < len(parts):
            words.append(f"({_short(parts[position])}|)*{end - position}")
        else:
            for index in range(position, end):
                words.append(_short(parts[index]) + ("|" if index < len(parts) - 1 else ""))
        position = end
    return "".join(words)


def _short(part: str) -> str:
    return re.sub(r"t{3,}", lambda run: f"t*{len(run[0])}", part) if "t" in part else part


def _counted_layers(a: Arguments) -> int:
    assert a.num_layers is not None
    return (
        a.num_layers
        + a.account_for_embedding_in_pipeline_split
        + a.account_for_loss_in_pipeline_split
    )


def _even_counts(a: Arguments, num_stages: int, num_chunks: int) -> list[int]:
    """Return the layers of every part, in the order of the model."""
    assert a.num_layers is not None
    ends = a.decoder_first_pipeline_num_layers, a.decoder_last_pipeline_num_layers
    accounts = a.account_for_embedding_in_pipeline_split or a.account_for_loss_in_pipeline_split
    if ends != (None, None):
        if accounts:
            raise LayoutError(
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers "
                "cannot go with --account-for-embedding-in-pipeline-split or "
                "--account-for-loss-in-pipeline-split"
            )
        per_stage = _uneven_stages(a.num_layers, num_stages, *ends)
    else:
        total = _counted_layers(a)
        if total % num_stages:
            raise LayoutError(
                f"--num-layers {a.num_layers}: {total} layers cannot be dealt evenly to "
                f"--pipeline-model-parallel-size {num_stages}; give "
                "--pipeline-model-parallel-layout, or another number of stages"
            )
        per_stage = [total // num_stages] * num_stages
    wrong = next((count for count in per_stage if count % num_chunks), None)
    if wrong is not None:
        raise LayoutError(
            f"--num-virtual-stages-per-pipeline-rank {num_chunks}: does not divide the {wrong} "
            "layers of a stage"
        )
    counts = [count // num_chunks for _ in range(num_chunks) for count in per_stage]
    counts[0] -= a.account_for_embedding_in_pipeline_split
    counts[-1] -= a.account_for_loss_in_pipeline_split
    return counts


def _uneven_stages(
    num_layers: int, num_stages: int, first: int | None, last: int | None
) -> list[int]:
    rest = num_layers - (first or 0) - (last or 0)
    middle = num_stages - (first is not None) - (last is not None)
    if rest < 0 or (middle > 0 and rest % middle) or (middle == 0 and rest):
        raise LayoutError(
            f"--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers leave "
            f"{rest} layers for {middle} stages"
        )
    counts = [rest // middle if middle else 0] * num_stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def _parts(counts: Sequence[int], pattern: Sequence[bool], mtp: int) -> list[ChunkLayers]:
    parts, position, last = [], 0, len(counts) - 1
    for index, count in enumerate(counts):
        layers = tuple(pattern[position : position + count])
        position += count
        is_last = index == last
        parts.append(ChunkLayers(layers, index == 0, mtp if is_last else 0, is_last))
    return parts


def _by_layout(text: str, pattern: Sequence[bool], mtp: int) -> list[ChunkLayers]:
    letters = parse_layout(text)
    joined = "".join(letters)
    faults = [
        (joined[:1] != "E" or joined.count("E") != 1, "the first letter, and no other, is E"),
        (joined[-1:] != "L" or joined.count("L") != 1, "the last letter, and no other, is L"),
        (joined.count("t") != len(pattern), f"the model has {len(pattern)} layers"),
        (joined.count("m") != mtp, f"--mtp-num-layers is {mtp}"),
        ("t" in joined.partition("m")[2], "m comes after all layers"),
    ]
    for is_wrong, rule in faults:
        if is_wrong:
            raise LayoutError(f"--pipeline-model-parallel-layout: {text}: {rule}")
    parts, position = [], 0
    for part in letters:
        count = part.count("t")
        layers = tuple(pattern[position : position + count])
        position += count
        parts.append(ChunkLayers(layers, "E" in part, part.count("m"), "L" in part))
    return parts
