"""Kernels of packages for CUDA, called as the packages are: stand-ins compute what they would.

The stand-ins have the signatures of flash-attn 2.8, of flash-attention's Hopper interface and of
transformer-engine 2, and compute with the whole matrix of scores, on the CPU and in float64.
"""

import inspect
import sys
from functools import partial
from itertools import accumulate, pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

from seq1f1b.attention import choose_kernel
from seq1f1b.attention.kernels import KERNELS, Inputs
from seq1f1b.attention.kernels.cudnn import Cudnn
from seq1f1b.attention.kernels.flash_attn_2 import FlashAttn2
from seq1f1b.attention.kernels.flash_attn_3 import FlashAttn3
from seq1f1b.attention.kernels.padded import Padded
from seq1f1b.attention.kernels.torch_flash import TorchFlash
from seq1f1b.attention.kernels.transformer_engine import TransformerEngine
from tests.attention.test_prefix_causal import SCALE, in_parts, make, whole


def attend(q, k, v, scale):
    """Bottom-right causal attention of ``[b, s, heads, dim]``; output and log-sum-exp."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    scores = scores.masked_fill(~hidden, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)


def attend_packed(q, k, v, bounds, scale):
    pieces = [
        attend(q[None, a:b], k[None, a:b], v[None, a:b], scale)
        for a, b in pairwise(bounds.tolist())
    ]
    return torch.cat([p[0][0] for p in pieces]), torch.cat([p[1][0] for p in pieces], dim=1)


def differentiate(forward, grad, tensors, output, log_sum_exp, into):
    """Write gradients into what the kernel allocated; check what it was given from the forward."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in tensors]
        again, log_sum_exp_again = forward(*inputs)
        torch.testing.assert_close(output, again.detach())
        torch.testing.assert_close(log_sum_exp, log_sum_exp_again.detach())
        for place, gradient in zip(into, torch.autograd.grad(again, inputs, grad), strict=True):
            place.copy_(gradient)


def flash_attn_2():
    module = ModuleType("flash_attn.flash_attn_interface")
    module.deterministic = []

    def check(dropout_p, causal, left, right, softcap, alibi_slopes):
        assert (dropout_p, causal, left, right) == (0.0, True, -1, -1)
        assert softcap == 0.0
        assert alibi_slopes is None

    def forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        check(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        assert not return_softmax
        return *attend(q, k, v, softmax_scale), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        check(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        module.deterministic.append(deterministic)
        differentiate(
            lambda *x: attend(*x, softmax_scale), dout, (q, k, v), out, softmax_lse, (dq, dk, dv)
        )

    def varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    ):  # fmt: skip
        check(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(cu_seqlens_q))
        return *attend_packed(q, k, v, cu_seqlens_q, softmax_scale), None, None

    def varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        check(dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        differentiate(
            lambda *x: attend_packed(*x, cu_seqlens_q, softmax_scale),
            dout, (q, k, v), out, softmax_lse, (dq, dk, dv),
        )  # fmt: skip

    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    module._flash_attn_varlen_forward = varlen_forward
    module._flash_attn_varlen_backward = varlen_backward
    return module


def flash_attn_3():
    module = ModuleType("flash_attn_interface")
    module.deterministic = []

    def forward(
        q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
        seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
        rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, causal,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0,
    ):  # fmt: skip
        assert causal is True
        unused = k_new, v_new, qv, out_, cu_seqlens_k_new, seqused_q, seqused_k, page_table
        unused += kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary
        assert set(unused) == {q_descale, k_descale, v_descale} == {None}
        if cu_seqlens_q is None:
            return *attend(q, k, v, softmax_scale), None, None
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(cu_seqlens_k))
        return *attend_packed(q, k, v, cu_seqlens_q, softmax_scale), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert is_causal
        module.deterministic.append(deterministic)

        def again(*tensors):
            if cu_seqlens_q is None:
                return attend(*tensors, softmax_scale)
            return attend_packed(*tensors, cu_seqlens_q, softmax_scale)

        differentiate(again, dout, (q, k, v), out, softmax_lse, (dq, dk, dv))

    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    return module


def fused_attn_fwd(
    is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
    fused_attention_backend, attn_bias=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None,
    page_table_k=None, page_table_v=None, s_quantizer=None, o_quantizer=None, attn_scale=None,
    dropout=0.0, fast_zero_fill=True, qkv_layout="sbh3d", attn_bias_type="no_bias",
    attn_mask_type="padding", window_size=(-1, -1), rng_gen=None, bottom_right_diagonal=None,
):  # fmt: skip
    """Signature of transformer-engine's; the last option is that of later versions."""


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype,
    dqkv_dtype, aux_ctx_tensors, fused_attention_backend, cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None, s_quantizer=None, dp_quantizer=None, dqkv_quantizer=None,
    attn_scale=None, dropout=0.0, fast_zero_fill=True, qkv_layout="sbh3d",
    attn_bias_type="no_bias", attn_mask_type="padding", window_size=(-1, -1),
    deterministic=False, bottom_right_diagonal=None,
):  # fmt: skip
    """Signature of transformer-engine's; the last option is that of later versions."""


def transformer_engine(is_told_alignment):
    """The two modules that are used of it; later versions are told the mask's alignment apart."""
    functions = ModuleType("transformer_engine.pytorch.cpp_extensions.fused_attn")
    constants = ModuleType("transformer_engine.pytorch.constants")
    functions.FusedAttnBackend = {"F16_arbitrary_seqlen": object()}
    functions.deterministic = []
    constants.TE_DType = {torch.float64: object()}

    def with_signature(of, function):
        """Check what both passes are given alike, then call ``function`` with all of it."""
        options = list(inspect.signature(of).parameters.values())
        signature = inspect.Signature(options if is_told_alignment else options[:-1])

        def called(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = SimpleNamespace(**bound.arguments)
            check(given)
            return function(given)

        called.__signature__ = signature
        return called

    def check(given):
        assert not is_told_alignment or given.bottom_right_diagonal is True
        assert (given.attn_bias_type, given.dropout, given.window_size) == ("no_bias", 0.0, (-1, 0))
        layout_and_mask = given.qkv_layout, given.attn_mask_type
        assert layout_and_mask == ("sbhd_sbhd_sbhd", "causal_bottom_right")
        lengths = given.max_seqlen_q, given.max_seqlen_kv
        assert lengths == (given.q.shape[0], given.k.shape[0])
        assert given.fake_dtype == given.q.dtype
        for bounds, x in ((given.cu_seqlens_q, given.q), (given.cu_seqlens_kv, given.k)):
            assert bounds.dtype == torch.int32
            assert bounds.tolist() == [x.shape[0] * i for i in range(x.shape[1] + 1)]
        backend = functions.FusedAttnBackend["F16_arbitrary_seqlen"]
        assert given.fused_attention_backend is backend

    def attend_rows(q, k, v, scale):
        assert all(x.is_contiguous() for x in (q, k, v))
        output, log_sum_exp = attend(*(x.transpose(0, 1) for x in (q, k, v)), scale)
        return output.transpose(0, 1).contiguous(), log_sum_exp[..., None]

    def forward(given):
        assert given.is_training
        output, log_sum_exp = attend_rows(given.q, given.k, given.v, given.attn_scale)
        return output, [log_sum_exp, torch.zeros(2, dtype=torch.int64)]

    def backward(given):
        assert given.dqkv_dtype is constants.TE_DType[given.q.dtype]
        log_sum_exp, state = given.aux_ctx_tensors
        assert (state.dtype, state.shape) == (torch.int64, (2,))
        assert given.o.is_contiguous()
        assert given.d_o.is_contiguous()
        functions.deterministic.append(given.deterministic)
        tensors = given.q, given.k, given.v
        grads = tuple(torch.empty_like(x) for x in tensors)
        again = partial(attend_rows, scale=given.attn_scale)
        differentiate(again, given.d_o, tensors, given.o, log_sum_exp, grads)
        return *grads, None

    functions.fused_attn_fwd = with_signature(fused_attn_fwd, forward)
    functions.fused_attn_bwd = with_signature(fused_attn_bwd, backward)
    return functions, constants


def shared(x, q):
    """Give every head of ``[b, heads, s, dim]`` its keys or values, in at least float32."""
    return at_least_float32(x).repeat_interleave(q.shape[1] // x.shape[1], 1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def top_left_scores(q, k, scale, is_causal):
    """Scores of ``[b, heads, s, dim]`` behind cuDNN's mask, which is used where it is square."""
    assert not is_causal or q.shape[2] == k.shape[2]
    scores = at_least_float32(q) @ shared(k, q).mT * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")) if is_causal else scores


@pytest.fixture
def cudnn(monkeypatch):
    """The kernel; torch checks the arguments of its operators, which need a GPU to compute."""
    module = sys.modules[Cudnn.__module__]
    forward_operator, backward_operator = module._forward, module._backward

    def on_meta(operator, args, scale):
        """Call the operator where it computes nothing, for torch to look at the arguments."""
        without_data = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
        return operator(*without_data, scale=scale)

    def forward(*args, scale):
        q, k, v, bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask = args
        assert (bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
        scores = top_left_scores(q, k, scale, is_causal)
        output = (scores.softmax(-1) @ shared(v, q)).to(q.dtype)
        log_sum_exp = scores.logsumexp(-1, keepdim=True)
        meta = on_meta(forward_operator, args, scale)
        assert [x.shape for x in meta[:2]] == [output.shape, log_sum_exp.shape]
        return output, log_sum_exp, *meta[2:]

    def backward(*args, scale):
        grad, q, k, v, out, logsumexp, seed, offset, bias, _, _, max_q, max_k, dropout_p, causal = (
            args
        )
        assert (bias, max_q, max_k, dropout_p) == (None, q.shape[2], k.shape[2], 0.0)
        assert seed.dtype == offset.dtype == torch.long
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        meta = on_meta(backward_operator, args, scale)
        assert [x.shape for x in meta] == [x.shape for x in grads]
        # Of the whole softmax: weights are by the log-sum-exp that was given.
        weights = (top_left_scores(q, k, scale, causal) - logsumexp).exp()
        grad, out, rows = (at_least_float32(x) for x in (grad, out, q))
        of_weights = grad @ shared(v, q).mT
        of_scores = weights * (of_weights - (grad * out).sum(-1, keepdim=True)) * scale
        grads[0].copy_(of_scores @ shared(k, q))
        for place, of_all in ((grads[1], of_scores.mT @ rows), (grads[2], weights.mT @ grad)):
            place.copy_(of_all.unflatten(1, (k.shape[1], -1)).sum(2))
        return grads

    monkeypatch.setattr(module, "_forward", forward)
    monkeypatch.setattr(module, "_backward", backward)
    return KERNELS["cudnn"]


STAND_INS = {
    "flash-attn-2": lambda: (flash_attn_2(),),
    "flash-attn-3": lambda: (flash_attn_3(),),
    "transformer-engine": lambda: transformer_engine(is_told_alignment=True),
    "transformer-engine 2.0": lambda: transformer_engine(is_told_alignment=False),
}


@pytest.fixture(params=STAND_INS)
def package(request, monkeypatch):
    """A kernel, and the stand-in for the module of its package that has the functions."""
    modules = STAND_INS[request.param]()
    for module in modules:
        *parents, _ = accumulate(module.__name__.split("."), "{}.{}".format)
        for parent in parents:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return KERNELS[request.param.split()[0]], modules[0]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
def test_sub_sequences(package, heads, kv_heads):
    tensors = make(29, 2, heads, kv_heads, 8)
    output, grads = in_parts((13, 1, 9, 6), *tensors, package[0])
    wanted, wanted_grads = whole(*tensors)
    for got, want in zip((output, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", [(29,), (13, 1, 9, 6)])
def test_cudnn(cudnn, lengths, heads, kv_heads):
    tensors = make(29, 2, heads, kv_heads, 8)
    output, grads = in_parts(lengths, *tensors, cudnn)
    wanted, wanted_grads = whole(*tensors)
    for got, want in zip((output, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_cudnn_in_half_precision(cudnn):
    """Parts of outputs and gradients are put together in float32."""
    tensors = make(29, 2, 4, 2, 8)
    output, grads = in_parts((13, 1, 9, 6), *(x.bfloat16() for x in tensors), cudnn)
    wanted, wanted_grads = whole(*tensors)
    for got, want in zip((output, *grads), (wanted, *wanted_grads), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("package", ["flash-attn-2", "flash-attn-3"], indirect=True)
def test_documents(package):
    kernel, _ = package
    lengths = (5, 1, 12)
    query, key, value, grad = make(18, 1, 4, 2, 8)
    inputs = Inputs(query, key, value, SCALE)
    attended = kernel.forward_packed(inputs, lengths)
    grads = kernel.backward_packed(grad, inputs, attended, lengths)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        wanted, wanted_grads = whole(*(x[rows] for x in (query, key, value, grad)))
        torch.testing.assert_close(attended.output[rows], wanted, rtol=1e-10, atol=1e-12)
        for got, want in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(got[rows], want, rtol=1e-10, atol=1e-12)
        start += length


def test_determinism_is_asked_for_when_torch_is_told_so(package):
    kernel, module = package
    tensors = make(8, 1, 2, 2, 4)
    in_parts((8,), *tensors, kernel)
    torch.use_deterministic_algorithms(True)
    try:
        in_parts((8,), *tensors, kernel)
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.deterministic == [False, True]


def check_narrow_values(kernel, lengths):
    """Keys of 12 columns and values of 8, as in multi-latent attention."""
    query, key, wide, wide_grad = make(21, 2, 4, 4, 12)
    value, grad = wide[..., :8].contiguous(), wide_grad[..., :8].contiguous()
    tensors = query, key, value, grad
    output, grads = in_parts(lengths, *tensors, kernel)
    wanted, wanted_grads = in_parts(lengths, *tensors, KERNELS["reference"])
    for got, want in zip((output, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [(21,), (9, 7, 5)])
def test_padded_values(lengths):
    check_narrow_values(Padded(KERNELS["cpu-flash"]), lengths)


@pytest.mark.parametrize("package", ["transformer-engine"], indirect=True)
@pytest.mark.parametrize("lengths", [(21,), (9, 7, 5)])
def test_narrow_values_without_padding(package, lengths):
    check_narrow_values(package[0], lengths)


def on_cuda(head, dtype=torch.bfloat16):
    """What a kernel looks at of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(64, 1, 4, head))


def test_kernels_of_cudnn_are_taken_by_name_only(monkeypatch):
    for kind in (TorchFlash, TransformerEngine, Cudnn):
        monkeypatch.setattr(kind, "available", lambda self: True)
    tensors = on_cuda(128), on_cuda(128), on_cuda(128)
    assert choose_kernel(*tensors).name == "torch-flash"
    assert choose_kernel(*tensors, "transformer-engine").name == "transformer-engine"
    assert choose_kernel(*tensors, "cudnn").name == "cudnn"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(ValueError, match="'cudnn' cannot take"):
        choose_kernel(*tensors, "cudnn")


@pytest.mark.parametrize(
    "installed, head, value_head, chosen",
    [
        ({"flash-attn-2", "flash-attn-3"}, 128, 128, "flash-attn-3"),
        ({"flash-attn-2"}, 128, 128, "flash-attn-2"),
        (set(), 128, 128, "torch-flash"),
        ({"flash-attn-3"}, 192, 128, "flash-attn-3"),
        ({"flash-attn-2"}, 192, 128, "flash-attn-2, values padded"),
        (set(), 192, 128, "torch-flash, values padded"),
        ({"flash-attn-2"}, 512, 512, "reference"),
        ({"flash-attn-2"}, 100, 100, "reference"),
    ],
)
def test_order(monkeypatch, installed, head, value_head, chosen):
    for kind in (FlashAttn2, FlashAttn3, TorchFlash):
        present = installed | {"torch-flash"}
        monkeypatch.setattr(kind, "available", lambda self, present=present: self.name in present)
    query, key, value = on_cuda(head), on_cuda(head), on_cuda(value_head)
    assert choose_kernel(query, key, value).name == chosen


def test_the_largest_heads_are_not_deterministic_on_hopper(monkeypatch):
    monkeypatch.setattr(FlashAttn3, "available", lambda self: True)
    tensors = on_cuda(256), on_cuda(256), on_cuda(256)
    assert KERNELS["flash-attn-3"].supports(*tensors)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not KERNELS["flash-attn-3"].supports(*tensors)


def test_what_is_not_installed_is_not_taken():
    query = on_cuda(64)
    assert not KERNELS["flash-attn-2"].supports(query, query, query)
    assert not KERNELS["flash-attn-3"].supports(query, query, query)
    assert not KERNELS["transformer-engine"].supports(query, query, query)
    with pytest.raises(ValueError, match=r"'flash-attn-2' cannot take .* or is not installed"):
        choose_kernel(query, query, query, "flash-attn-2")
