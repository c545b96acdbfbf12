"""The guide's table of kernels says what their limits are."""

from pathlib import Path

from seq1f1b.attention.kernels import KERNELS, PackedKernel

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def heads(limits):
    if limits.largest_head is None:
        return "any"
    parts = [f"multiples of {limits.head_multiple} up to {limits.largest_head}"]
    parts += [f"{key} with values of {value}" for key, value in limits.other_heads]
    return "; ".join(parts) + ("" if limits.equal_heads else ", values may be narrower")


def deterministic(limits):
    if limits.device != "cuda":
        return "yes"
    if limits.largest_deterministic == 0:
        return "no: refused when torch is told to be"
    largest = limits.largest_deterministic
    return "when torch is told to be" + (f", heads up to {largest}" if largest else "")


def row(kernel):
    limits = kernel.limits
    dtypes = ", ".join(str(x).removeprefix("torch.") for x in limits.dtypes or ())
    documents = "yes" if isinstance(kernel, PackedKernel) else "no"
    cells = limits.needs, dtypes or "any", heads(limits), documents, deterministic(limits)
    return f"| `{kernel.name}` | {' | '.join(cells)} |"


def test_the_guide_has_every_kernel_in_the_order_of_choice():
    head = "| kernel | needs | types | heads | documents in one call | deterministic |"
    table = [head, "|---|---|---|---|---|---|", *map(row, KERNELS.values())]
    lines = PAGE.read_text().splitlines()
    start = lines.index(head)
    assert lines[start : lines.index("", start)] == table
