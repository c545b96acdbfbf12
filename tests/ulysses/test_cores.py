"""Every attention core against attention written out, over all that a unit of work can be."""

import pytest
import torch
from torch import Tensor

from seq1f1b.ulysses.cores import CORES, Options, Scope, attend, choose_core
from seq1f1b.ulysses.rows import Pattern, Rows

HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 8, 6


def written_out(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.softcap:
        scores = (scores / options.softcap).tanh() * options.softcap
    places = torch.arange(scope.num_keys)
    own = torch.arange(scope.num_queries) + scope.start - scope.key_start
    seen = (places <= own[:, None]) & (places >= scope.first("cpu")[..., None])
    if scope.rows.is_real is not None:
        seen &= scope.rows.is_real[:, None, scope.key_start : scope.stop]
        # A window can hold nothing but padding; such a token and padding itself see nothing.
        blind = ~seen.any(dim=-1, keepdim=True)
        seen |= blind
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        extra = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def rows(kind: str) -> Rows:
    whole = torch.arange(40)
    packed = torch.cat([torch.arange(9), torch.arange(20), torch.arange(11)])
    match kind:
        case "plain":
            return Rows.read(whole[None].expand(2, 40))
        case "packed":
            return Rows.read(torch.stack([packed, whole]))
        case "packed alike":
            return Rows.read(torch.stack([packed, packed]))
        case "padded":
            mask = torch.ones(2, 40)
            mask[0, 30:] = mask[1, :7] = 0
            return Rows.read(torch.stack([whole, whole - 7]).clamp(min=0), mask)
        case "holes":
            mask = torch.ones(2, 40)
            mask[0, 5:9] = mask[1, 20:22] = 0
            return Rows.read(torch.stack([whole, whole]), mask)
    raise ValueError(kind)


KINDS = ("plain", "packed", "packed alike", "padded", "holes")
PATTERNS = (Pattern(), Pattern(window=6), Pattern(chunk=7))
UNITS = ((0, 40, 0), (13, 40, 0), (0, 24, 0), (17, 33, 0))


def tensors(scope: Scope, value_dim: int = VALUE_DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (2, HEADS, scope.num_queries, KEY_DIM),
        (2, KV_HEADS, scope.num_keys, KEY_DIM),
        (2, KV_HEADS, scope.num_keys, value_dim),
    )
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in made]


def check(name: str, scope: Scope, options: Options, *, with_sinks: bool = False) -> None:
    q, k, v = tensors(scope)
    sinks = None
    if with_sinks:
        sinks = torch.linspace(-1, 2, HEADS, dtype=torch.float64).requires_grad_()
    given = [x for x in (q, k, v, sinks) if x is not None]
    real = torch.ones(2, 40) if scope.rows.is_real is None else scope.rows.is_real
    matters = real[:, None, scope.start : scope.stop, None].double()
    weights = torch.randn(2, HEADS, scope.num_queries, VALUE_DIM, dtype=torch.float64) * matters
    wanted = written_out(q, k, v, sinks, scope, options) * matters
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), given)
    found = attend(CORES[name], q, k, v, sinks, scope, options)
    assert bool(torch.isfinite(found).all())
    gradients = torch.autograd.grad((found * weights).sum(), given)
    torch.testing.assert_close(found * matters, wanted, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("core", CORES)
def test_core_computes_attention(core, kind, pattern):
    of_rows = rows(kind)
    pattern = of_rows.simplify(pattern)
    for start, stop, _ in UNITS:
        key_start = int(of_rows.first(pattern)[:, start].min())
        scope = Scope(of_rows, pattern, start, stop, key_start)
        options = Options(0.4)
        if not CORES[core].refusal(*tensors(scope)[::2], None, scope, options):
            check(core, scope, options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [Options(0.4, softcap=2.0), Options(1.3)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sinks_and_soft_capping(kind, options, pattern):
    scope = Scope(rows(kind), pattern, 0, 40, 0)
    check("tiled", scope, options, with_sinks=True)


def test_a_core_is_chosen_for_what_is_asked():
    scope = Scope(rows("plain"), Pattern(), 0, 40, 0)
    windowed = Scope(rows("plain"), Pattern(window=6), 0, 40, 0)
    q, _, v = tensors(scope)
    sinks = torch.zeros(HEADS)
    assert choose_core(None, q, v, None, scope, Options(1.0)).name == "kernel"
    assert choose_core(None, q, v, None, windowed, Options(1.0)).name == "tiled"
    assert choose_core(None, q, v, sinks, scope, Options(1.0)).name == "tiled"
    assert choose_core(None, q, v, None, scope, Options(1.0, softcap=3.0)).name == "tiled"
    with pytest.raises(ValueError, match="'kernel' does not take sliding windows"):
        choose_core("kernel", q, v, None, windowed, Options(1.0))
    with pytest.raises(ValueError, match="no attention core 'flesh'"):
        choose_core("flesh", q, v, None, scope, Options(1.0))


def test_dropout_keeps_the_mean_and_its_gradient():
    scope = Scope(rows("plain"), Pattern(), 0, 40, 0)
    q, k, v = tensors(scope)
    options = [Options(0.4, dropout=0.3, seed=seed) for seed in range(300)]
    plain = attend(CORES["tiled"], q, k, v, None, scope, Options(0.4))
    with torch.no_grad():
        drawn = torch.stack([attend(CORES["tiled"], q, k, v, None, scope, o) for o in options])
    spread = drawn.std(dim=0) / len(options) ** 0.5
    assert float(((drawn.mean(dim=0) - plain).abs() <= 5 * spread + 1e-12).double().mean()) > 0.999
    assert not torch.equal(drawn[0], drawn[1])
    torch.autograd.gradcheck(
        lambda q, k, v: attend(CORES["tiled"], q, k, v, None, scope, options[0]).sum(dim=2),
        (q, k, v),
        fast_mode=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("core", CORES)
def test_low_precision_comes_back_as_it_went_in(core, dtype):
    scope = Scope(rows("packed"), Pattern(), 0, 40, 0)
    exact = tensors(scope, value_dim=KEY_DIM)
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = attend(CORES[core], *low, None, scope, Options(0.4))
    wanted = written_out(*exact, None, scope, Options(0.4))
    found.sum().backward()
    tolerance = {torch.float32: 1e-5}.get(dtype, 3e-2)
    assert found.dtype == dtype
    assert all(x.grad is not None and x.grad.dtype == dtype for x in low)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
