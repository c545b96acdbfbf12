"""The flags of Seq1F1B on Megatron's command line."""

import argparse
import re
from typing import Any

from seq1f1b.attention.kernels import KERNELS
from seq1f1b.sequence import BALANCE_METHODS
from seq1f1b.simulate.costs import read_roots

MINDSPEED_SPLITS = 4
SCHEDULES = ("auto", "1f1b", "zb-h1", "greedy")
SPLITTING_SCHEDULES = ("zb-h1", "greedy")
"""Those that compute weight gradients in actions of their own."""
MEGATRON_ATTENTION = "megatron"
AUTO = "auto"


def _splits(text: str) -> int | str:
    return AUTO if text == AUTO else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to Megatron's parser, and make its help printable."""
    group = parser.add_argument_group(title="seq1f1b")
    _add_cut_arguments(group)
    _add_schedule_arguments(group)
    group.add_argument(
        "--seq1f1b-attention",
        choices=sorted([*KERNELS, MEGATRON_ATTENTION]),
        default=None,
        help="Attention kernel (default: the first of "
        f"{', '.join(KERNELS)} that supports the tensors). megatron: leave Megatron's attention "
        "layers untouched, which needs one split.",
    )
    group.add_argument(
        "--seq1f1b-verify",
        action="store_true",
        help="Before the first iteration, run one micro-batch whole in Megatron's own loop and "
        "once more in sub-sequences, and stop unless loss and gradient norm agree. Needs the "
        "memory of a whole micro-batch's activations on every stage, and --hidden-dropout 0.",
    )
    group.add_argument(
        "--seq1f1b-recompute-loss",
        action="store_true",
        help="Compute the output layer and the loss anew in the backward, so that the last stage "
        "keeps logits of one sub-sequence at a time. Saves most of its memory where the "
        "vocabulary is large, and costs one more product of the output layer.",
    )
    _add_offload_arguments(group)
    _add_output_arguments(group)
    _escape_help(parser)
    return parser


def _add_cut_arguments(group: Any) -> None:
    group.add_argument(
        "--seq1f1b-splits",
        type=_splits,
        default=None,
        metavar="N|auto",
        help="Number of sub-sequences that each micro-batch is cut into (default: 1, Megatron's "
        "own schedule, untouched); auto: the number and balance of the shortest step that the "
        "planner simulates for this device. More splits mean less bubble and less activation "
        "memory, as long as one sub-sequence still fills the device.",
    )
    group.add_argument(
        "--seq1f1b-balance-method",
        choices=BALANCE_METHODS,
        default="uniform_comp",
        help="Where to cut. average: sub-sequences of equal length. uniform_comp: of equal "
        "computation, since later tokens attend to more; with packed documents, each micro-batch "
        "by its own. (default: %(default)s)",
    )
    group.add_argument(
        "--seq1f1b-multiple",
        type=int,
        default=1,
        metavar="N",
        help="Round sub-sequence lengths to multiples of N, e.g. a kernel's tile size. Multiples "
        "that parallelism requires are applied anyway. (default: %(default)s)",
    )
    group.add_argument(
        "--seq1f1b-lengths",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="Lengths of the sub-sequences, instead of --seq1f1b-splits and a balance method; they "
        "sum to --seq-length. `seq1f1b plan` prints those of the shortest step that it finds. "
        "Shorter or longer sequences, as in evaluation, are cut by the balance method.",
    )
    group.add_argument(
        "--enable-seq1f1b",
        action="store_true",
        help=f"Same as --seq1f1b-splits {MINDSPEED_SPLITS} when no number of splits is given.",
    )


def _add_schedule_arguments(group: Any) -> None:
    group.add_argument(
        "--seq1f1b-schedule",
        choices=SCHEDULES,
        default="auto",
        help="auto: one split runs in Megatron's own loop; several splits, or packed documents, "
        "run under Seq1F1B, interleaved with virtual stages. 1f1b: runs one split in Seq1F1B's "
        "executor too. zb-h1: defers weight gradients to fill gaps (Zero Bubble's ZB-H1 on "
        "sub-sequences). greedy: searches for the order of forwards and both halves of backwards "
        "with the shortest simulated step, with or without virtual stages. (default: %(default)s)",
    )
    group.add_argument(
        "--seq1f1b-max-live",
        type=int,
        default=None,
        metavar="N",
        help="With --seq1f1b-schedule greedy: the most sub-sequences (on one model chunk each) "
        "that a stage may hold from forward to weight gradient (default: as many as the first "
        "stage holds under Seq1F1B).",
    )
    group.add_argument(
        "--seq1f1b-turn",
        type=int,
        default=None,
        metavar="N",
        help="With virtual stages: sub-sequences (with one split: micro-batches) that go through a "
        "model chunk before the next chunk's turn, rounded up to whole micro-batches (default: the "
        "number of stages, or what --microbatch-group-size-per-virtual-pipeline-stage says in "
        "micro-batches). Larger turns hold more activations.",
    )


def _add_offload_arguments(group: Any) -> None:
    group.add_argument(
        "--offload-model-chunks",
        type=int,
        default=0,
        metavar="K",
        help="Keep the model chunks of each stage (virtual stages) in host memory, and let at most "
        "K of them visit the device at a time; 0 leaves them there. A step then takes all "
        "sub-sequences through a chunk before the next, unless --seq1f1b-turn says otherwise, so "
        "that v chunks load 2 v - K times. Needs --use-distributed-optimizer. (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--offload-prefetch",
        action="store_true",
        help="With --offload-model-chunks: load a chunk as soon as its place on the device is "
        "free, not before the computation that needs it.",
    )
    group.add_argument(
        "--offload-just-in-time-updates",
        action="store_true",
        help="With --offload-model-chunks: let the optimizer update each chunk in a thread of its "
        "own, while chunks before it go forward in the next step; a load waits for its chunk's "
        "update. Clipping and the results are the same. With --clip-grad 0 and --rerun-mode "
        "disabled a chunk's update begins in the step itself, when its gradients have arrived in "
        "host memory, where nothing changes them later. Leave cores for it.",
    )
    group.add_argument(
        "--offload-link-gb-per-s",
        type=float,
        default=None,
        metavar="X",
        help="With --offload-model-chunks on a machine without a GPU: let copies take as long as "
        "at X GB/s one way, beside the computations, to rehearse what loads cost. (default: as "
        "fast as memory)",
    )
    group.add_argument(
        "--offload-link-roots",
        type=_roots,
        default=None,
        metavar="R,R,...",
        help="With --offload-link-gb-per-s: for each stage the number of its root of the PCIe "
        "tree; stages of one root take turns on its link. (default: each stage has its own link)",
    )


def _roots(text: str) -> tuple[int, ...]:
    try:
        return read_roots(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_output_arguments(group: Any) -> None:
    group.add_argument(
        "--seq1f1b-metrics-file",
        default=None,
        metavar="FILE",
        help="Append one JSON line per iteration: loss, time, tokens/s, TFLOP/s per device, peak "
        "activation memory and bubble ratio of each stage.",
    )
    group.add_argument(
        "--seq1f1b-trace-file",
        default=None,
        metavar="FILE",
        help="Write the start and end of every action of one iteration on all stages, for "
        "`seq1f1b timeline --trace FILE` and `seq1f1b simulate --trace FILE`.",
    )
    group.add_argument(
        "--seq1f1b-trace-iteration",
        type=int,
        default=3,
        metavar="N",
        help="Iteration to trace; the first ones are slower. (default: %(default)s)",
    )


def _escape_help(parser: argparse.ArgumentParser) -> None:
    """Escape percent signs in help texts that argparse would stumble over."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if not action.help:
            continue
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = re.sub(r"%(?!%|\((?:default|prog|type|choices)\)s)", "%%", action.help)
