"""Every attention backend against the definition in float64, on the CPU and on a GPU, the windows' edges, the cost, the cache,
the compiler."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings, strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat import flash_attention as fa
from nanochat.flash_attention import flash_attn, make_attention
from nanochat.kernels import cpu_attention
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason

# What the choice can come to on this machine, and the general one that needs no set-up.
WORKING = [name for name in fa.BACKENDS
           if any(fa.backend_unavailable_reason(name, windowed, "cpu", torch.float32, 8) is None for windowed in (False, True))]
WITH_WINDOWS = [name for name, (_, _, windows) in fa.BACKENDS.items() if windows]
NOT_CPP = [name for name in fa.BACKENDS if name not in ("native", "brgemm")]  # which have tests of their own


def reference(q, k, v, grad, window):
    """Output and gradients in float64 from the formulas, and for each the size of the terms it is a sum of.

    Rounding each factor of a sum of products by a relative u changes the sum by at most (number of factors) * u * the
    sum of the products' absolute values; scores s enter through exp(s), where a relative u becomes u * |s|.
    """
    q, k, v, grad = (x.detach().double().transpose(1, 2) for x in (q, k, v, grad))
    groups, T, scale = q.size(1) // k.size(1), q.size(2), 1 / math.sqrt(q.size(3))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    t = torch.arange(T, device=q.device)
    distance = t[:, None] - t
    seen = (distance >= 0) & ((distance <= window) | (window < 0))
    s = q @ k.mT * scale
    p = s.masked_fill(~seen, -math.inf).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    # The same with every sign removed.
    s_size = q.abs() @ k.mT.abs() * scale
    dp_size = grad.abs() @ v.mT.abs()
    ds_size = p * (dp_size + (p * dp_size).sum(-1, keepdim=True))
    fold = lambda x: x.unflatten(1, (-1, groups)).sum(2)  # query heads that share a key head add up
    exact = p @ v, ds @ k * scale, fold(ds.mT @ q * scale), fold(p.mT @ grad)
    sizes = p @ v.abs(), ds_size @ k.abs() * scale, fold(ds_size.mT @ q.abs() * scale), fold(p.mT @ grad.abs())
    return [x.transpose(1, 2) for x in exact], [x.transpose(1, 2) for x in sizes], \
        [x.abs().masked_fill(~seen, 0).max().item() for x in (s, s_size)]


def draw(B, T, H, H_kv, D, dtype, seed=0, device="cpu"):
    random = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, T, H_kv, D), (B, T, H_kv, D), (B, T, H, D)
    *inputs, grad = (torch.randn(s, generator=random).to(device, dtype) for s in shapes)
    return [x.requires_grad_() for x in inputs], grad


def check(function, inputs, grad, window):
    """Output and the three gradients of `function(q, k, v, window)` are within rounding of the float64 reference."""
    y = function(*inputs, window)
    agree((y, *torch.autograd.grad(y, inputs, grad)), inputs, grad, window)


def agree(found, inputs, grad, window):
    """`found`, the output and the three gradients, are within rounding of the float64 reference."""
    y = found[0]
    assert [x.shape for x in found] == [x.shape for x in (inputs[0], *inputs)] and y.dtype == inputs[0].dtype
    exact, sizes, (score, score_size) = reference(*inputs, grad, window)
    T, D = inputs[0].shape[1], inputs[0].shape[3]
    u = torch.finfo(y.dtype).eps / 2
    # bf16 products are summed in fp32, so what counts is the rounding of scores, probabilities, their gradients,
    # results, and of the up to 3 chunks whose gradients for a key are added in bf16. In fp32 a sum of n terms adds
    # n roundings.
    factor = u * (8 + 2 * score if y.dtype == torch.bfloat16 else 8 + T + D + 2 * D * score_size)
    names = "output", "dq", "dk", "dv"
    for name, got, want, size in zip(names, found, exact, sizes, strict=True):
        bound = factor * size + 1e-30
        worst = ((got.double() - want).abs() / bound).max().item()
        assert worst <= 1, f"{name} is off by {worst:.3g} times the bound"


@st.composite
def problems(draw_):
    H_kv = draw_(st.integers(1, 2))
    return dict(T=draw_(st.integers(1, 70) | st.sampled_from([127, 128, 129, 200, 300])), H_kv=H_kv,
                H=H_kv * draw_(st.integers(1, 3)), D=draw_(st.sampled_from([8, 16, 32])), B=draw_(st.integers(1, 2)),
                window=draw_(st.integers(-1, 80)), dtype=draw_(st.sampled_from([torch.float32, torch.bfloat16])),
                seed=draw_(st.integers(0, 99)))


@pytest.mark.parametrize("name", WORKING)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(problem=problems())
def test_backend_equals_definition(name, problem):
    window = problem.pop("window")
    if name not in WITH_WINDOWS:
        window = fa.FULL
    check(fa.BACKENDS[name][0](), *draw(**problem), window)


def test_expected_backends_work_here():
    assert {"chunked", "flash", "sdpa", "blocks", "masked"} <= set(WORKING)


@pytest.mark.parametrize("name", [n for n in WORKING if n in WITH_WINDOWS])
@pytest.mark.parametrize("T, window", [(1, 0), (1, 1), (2, 0), (7, 0), (9, 1), (16, 1), (16, 8), (17, 8), (15, 16),
                                       (16, 15), (16, 14), (16, 16), (5, 100), (130, 1), (257, 128), (256, 128),
                                       (129, 128)])
def test_window_edges(name, T, window):
    check(fa.BACKENDS[name][0](), *draw(1, T, 2, 1, 8, torch.float32), window)


# --- on a GPU, where there is one; in bf16, as in training ----------------------------------------------------------------

def backend_or_skip(name, windowed, device, D):
    if reason := fa.backend_unavailable_reason(name, windowed, device.type, torch.bfloat16, D):
        pytest.skip(f"{name}: {reason}")
    return fa.BACKENDS[name][0]()


def test_the_backends_of_this_device_work(device):
    """Those that need no package of their own: a reason is a fault."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("a GPU without bf16")
    names = ["varlen", "flash", "sdpa", "blocks", "masked"] if device.type == "cuda" else ["chunked", "flash", "sdpa", "blocks"]
    for name in names:
        _, full, windows = fa.BACKENDS[name]
        reasons = [fa.backend_unavailable_reason(name, windowed, device.type, torch.bfloat16, 128)
                   for windowed, can in ((False, full), (True, windows)) if can]
        assert reasons == [None] * len(reasons), f"{name}: {reasons}"


LENGTHS = [(333, 4, 4, -1), (517, 6, 2, -1), (333, 4, 2, 70), (517, 2, 1, 300)]  # T, H, H_kv, window: multiples of no block


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("name, T, H, H_kv, window", [
    (name, *problem) for name in NOT_CPP for problem in LENGTHS if fa.BACKENDS[name][1 if problem[-1] < 0 else 2]])
def test_backend_equals_definition_on_this_device(device, name, T, H, H_kv, window, D):
    check(backend_or_skip(name, window >= 0, device, D), *draw(2, T, H, H_kv, D, torch.bfloat16, device=device), window)


@pytest.mark.parametrize("name", [name for name in NOT_CPP if name in WITH_WINDOWS])
@pytest.mark.parametrize("T", [129, 256, 321])
def test_window_edges_on_this_device(device, name, T):
    """At and around the sizes of a kernel's blocks, the first row of each included."""
    function = backend_or_skip(name, True, device, 64)
    inputs, grad = draw(1, T, 2, 1, 64, torch.bfloat16, device=device)
    for window in (1, 63, 64, 65, 127, 128, 129, 191, 192, 254, 255, 256):
        check(function, inputs, grad, window)


@pytest.mark.parametrize("name", ["fa3", "fa4", "varlen", "flash", "cudnn", "sdpa", "blocks"])
def test_more_elements_than_int32_counts(large_device, name):
    """Rows at both ends of 2^31 elements and more. A kernel that counts them in 32 bits reads and writes elsewhere."""
    B, T, H, H_kv, D = 65, 2048, 128, 8, 128
    window = 128 if name == "blocks" else fa.FULL
    function = backend_or_skip(name, window >= 0, large_device, D)
    (q, k, v), grad = draw(1, T, H, H_kv, D, torch.bfloat16, device=large_device)
    assert B * q.numel() > 2**31
    apart = torch.linspace(0.5, 1, B, device=large_device, dtype=torch.bfloat16)[:, None, None, None]  # no two rows are the same
    inputs, grad = [(x.detach() * apart).requires_grad_() for x in (q, k, v)], grad * apart
    try:
        y = function(*inputs, window)
        found = y.detach(), *torch.autograd.grad(y, inputs, grad)
    except torch.OutOfMemoryError:
        pytest.skip("not enough memory")
    for row in (0, B - 1):
        for group in (0, H_kv - 1):
            queries, keys = slice(group * H // H_kv, (group + 1) * H // H_kv), slice(group, group + 1)
            part = lambda x, heads, row=row: x.detach()[row:row + 1, :, heads]
            heads = queries, keys, keys
            agree([part(x, h) for x, h in zip(found, (queries, *heads), strict=True)],
                  [part(x, h) for x, h in zip(inputs, heads, strict=True)], part(grad, queries), window)


# --------------------------------------------------------------------------------------------------------------------------

def test_window_counts_tokens_before_the_query():
    """Values that spell out positions: with equal scores the output is the mean position of what is seen."""
    T, window = 12, 3
    q = torch.zeros(1, T, 1, 8)
    v = torch.arange(T, dtype=torch.float32).view(1, T, 1, 1).expand(1, T, 1, 8)
    y = flash_attn.flash_attn_func(q, q, v, causal=True, window_size=(window, 0))
    want = torch.tensor([sum(seen) / len(seen) for seen in (range(max(0, t - window), t + 1) for t in range(T))])
    torch.testing.assert_close(y[0, :, 0, 0], want)


def flops(function, T, window):
    inputs, grad = draw(1, T, 2, 2, 16, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*inputs, window).backward(grad)
    return counter.get_total_flops()


@pytest.mark.parametrize("function", [fa._blocks, fa._chunked])
def test_windowed_cost_is_linear_in_length(function):
    """Twice the tokens, twice the products, up to the shorter block at the start; `masked` makes four times as many."""
    assert 1.9 < flops(function, 2048, 128) / flops(function, 1024, 128) < 2.4
    assert flops(fa._masked, 2048, 128) == 4 * flops(fa._masked, 1024, 128)


def test_blocks_cost_is_linear_in_window():
    # Per head and feature (2 * 16 of them) 2 * window keys a query; 2 products forward, 4 backward; 2 FLOPs each.
    for T, window in (256, 16), (256, 32), (512, 32), (512, 64):
        assert flops(fa._blocks, T, window) == 6 * 2 * (2 * 16) * T * 2 * window


def test_chunked_full_context_skips_what_no_query_sees():
    assert flops(fa._chunked, 1024, fa.FULL) == flops(fa._masked, 1024, fa.FULL) * 9 / 16  # 8 chunks: (1 + 1/8) / 2


@pytest.mark.parametrize("window", [-1, 0, 1, 5, 11, 100])
@pytest.mark.parametrize("chunks", [[23], [1] * 23, [5, 1, 7, 1, 1, 8], [1, 22]])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_kv_cache_equals_full_attention(window, chunks, as_tensor):
    T, capacity = 23, 30
    (q, k, v), _ = draw(2, T, 4, 2, 8, torch.float32)
    caches = [torch.full((2, capacity, 2, 8), float("nan")) for _ in range(2)]  # NaN spreads if an unwritten place is read
    want, outputs, pos = fa._masked(q, k, v, window), [], 0
    with torch.no_grad():
        for n in chunks:
            now = slice(pos, pos + n)
            seqlens = torch.full((2,), pos, dtype=torch.int32) if as_tensor else pos
            outputs.append(flash_attn.flash_attn_with_kvcache(q[:, now], *caches, k=k[:, now], v=v[:, now], causal=True,
                                                              cache_seqlens=seqlens, window_size=(window, 0)))
            pos += n
    torch.testing.assert_close(torch.cat(outputs, 1), want)
    for cache, x in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[:, :T], x) and cache[:, T:].isnan().all()


def test_kv_cache_without_new_keys_reads_up_to_cache_seqlens():
    (q, k, v), _ = draw(2, 9, 4, 2, 8, torch.float32)
    for n in (1, 3, 9):
        y = flash_attn.flash_attn_with_kvcache(q[:, 9 - n:], k, v, cache_seqlens=9, window_size=(4, 0))
        torch.testing.assert_close(y, fa._masked(q, k, v, 4)[:, 9 - n:])


def test_kv_cache_refuses_what_it_cannot_do():
    (q, k, v), _ = draw(2, 4, 2, 2, 8, torch.float32)
    with pytest.raises(AssertionError, match="one position"):
        flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([4, 3]))
    with pytest.raises(AssertionError, match="do not fit"):
        flash_attn.flash_attn_with_kvcache(q, k, v, k=k, v=v, cache_seqlens=1)
    with pytest.raises(AssertionError, match="causal"):
        flash_attn.flash_attn_func(q, k, v, causal=False)


class Block(torch.nn.Module):
    """Attention as a model holds it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, q, k, v, window):
        return self.attention(q * self.scale, k, v, window)


ATTENTIONS = {
    "set up": lambda: make_attention("cpu", torch.float32, 8, 32, [8, -1]),
    "not set up": lambda: lambda q, k, v, w: flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(w, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("attention, compiler", [("set up", "inductor"), ("not set up", "aot_eager")])
def test_compiles_to_one_graph_and_agrees(attention, compiler):
    T, window = 32, 8
    block = Block(ATTENTIONS[attention]())
    compiled = torch.compile(block, fullgraph=True, dynamic=False, backend=compiler)
    for w in (window, fa.FULL):
        inputs, grad = draw(1, T, 2, 1, 8, torch.float32)
        leaves = [*inputs, block.scale]
        results = []
        for f in (compiled, block):
            y = f(*inputs, w)
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel, operator", [(SDPBackend.FLASH_ATTENTION, "flash_attention"), (SDPBackend.MATH, "softmax")])
def test_one_kernel_of_sdpa_stays_the_one_when_compiled(kernel, operator):
    """One graph, with the operator of that kernel forward and backward, and SDPA chooses freely again afterwards."""
    graphs = []

    def record(graph, example_inputs):
        graphs.append(str(graph.code))
        return make_boxed_func(graph.forward)
    compiled = torch.compile(partial(fa._sdpa_by, kernel=kernel), fullgraph=True, dynamic=False,
                             backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    allowed = torch.nn.attention._cur_sdpa_kernel_backends()
    check(compiled, *draw(1, fa.SHORT + 5, 2, 1, 16, torch.float32), fa.FULL)
    assert len(graphs) == 2 and all(operator in code for code in graphs)
    assert torch.nn.attention._cur_sdpa_kernel_backends() == allowed


def test_attention_routes_every_window():
    """Also windows and lengths that the set-up did not name."""
    attention = make_attention("cpu", torch.float32, 8, 64, [16, 16, -1])
    for T in (1, 10, 17, 64, 100):
        inputs, grad = draw(1, T, 2, 1, 8, torch.float32)
        for window in (-1, 16, 5, 63, 99):
            check(attention, inputs, grad, window)


def test_every_window_has_a_backend_that_works_and_the_line_names_it():
    """Whichever is the fastest here."""
    attention = make_attention("cpu", torch.float32, 64, 512, [128, 64, 128, -1], rows=2, heads=2)
    names = attention.names()
    assert list(names) == ["full context", "window 64", "window 128"]
    for window, words in ((-1, "full context"), (64, "window 64"), (128, "window 128")):
        assert attention.backend_for(window) == names[words] and f"{words}: {names[words]} (" in str(attention)
        assert fa.backend_unavailable_reason(names[words], window >= 0, "cpu", torch.float32, 64) is None
    assert attention.backend_for(511) == attention.backend_for(-1)


def test_where_one_backend_works_nothing_is_timed():
    attention = make_attention("cpu", torch.float16, 64, 512, [128, -1])
    assert attention.names() == {"full context": "sdpa", "window 128": "blocks"}
    assert all(not choice.milliseconds for choice in attention.choices.values())


@pytest.mark.parametrize("window, timed", [(-1, "1x4096x1/1x32 bfloat16, full"), (16384, "1x4096x1/1x32 bfloat16, window 1024")])
def test_of_a_long_context_a_part_is_timed(window, timed, tmp_path, monkeypatch):
    """A whole one would take minutes and all memory. Nor is `chunked` tried, whose memory grows with the keys that are seen."""
    asked = []

    class Watching(fa.Tuner):
        def choose(self, problem, candidates, times_in_use):
            asked.append((problem, set(candidates)))
            return fa.Choice("blocks" if window >= 0 else "sdpa", "", {})
    fa.choose_backend("cpu", torch.bfloat16, 32, 65536, window, tuner=Watching("cpu", tmp_path))
    (problem, candidates), = asked
    assert timed in problem and "chunked" not in candidates


def test_the_user_chooses():
    attention = make_attention("cpu", torch.float32, 64, 512, [128, -1], backend="sdpa")
    assert attention.names() == {"full context": "sdpa", "window 128": "blocks"}
    attention = make_attention("cpu", torch.float32, 64, 512, [128, -1], backend="flash")
    assert attention.names() == {"full context": "flash", "window 128": "blocks"}
    assert make_attention("cpu", torch.float32, 64, 512, [128], backend="chunked").backend_for(128) == "chunked"
    with pytest.raises(fa.UserError, match="--attention-backend native"):
        make_attention("cpu", torch.float32, 64, 512, [-1], backend="native")  # which is for bf16


def test_a_resume_takes_the_backends_of_before_where_they_work():
    recorded = {"full context": "masked", "window 128": "fa3"}  # neither would be chosen here
    attention = make_attention("cpu", torch.float32, 64, 512, [128, -1], recorded=recorded)
    assert attention.backend_for(-1) == "masked" and attention.backend_for(128) not in ("masked", "fa3")


def test_a_backend_that_raises_is_left_out_and_its_reason_told():
    reason = fa.backend_unavailable_reason("varlen", True, "cpu", torch.float16, 64)  # a CUDA kernel, asked for on a CPU
    assert reason is not None and "CPU" in reason
    assert fa.backend_unavailable_reason("sdpa", True, "cpu", torch.float16, 64) == "does not do windows"


def test_the_reason_is_what_sdpa_warns_of():
    """Its error says that there is no kernel. The flash kernel for CPUs takes floating-point numbers only."""
    reason = fa.backend_unavailable_reason("flash", False, "cpu", torch.complex64, 64)
    assert "complex" in reason.lower() or "dtype" in reason, reason


def test_no_backend_at_all_is_a_user_error():
    with pytest.raises(fa.UserError, match="no attention works on cpu in torch.int32.*sdpa: .*masked: "):
        fa.choose_backend("cpu", torch.int32, 8, 64, -1)


@pytest.mark.slow
def test_probing_leaves_the_random_state_and_grad_mode_alone():
    code = ("import torch; from nanochat.flash_attention import make_attention; torch.manual_seed(1)\n"
            "with torch.inference_mode(): print(make_attention('cpu', torch.float32, 16, 64, [8, -1]).names())\n"
            "a = torch.rand(3); torch.manual_seed(1); assert torch.equal(a, torch.rand(3)) and torch.is_grad_enabled()")
    from processes import python_c  # here, as other processes read this file without the folder of the tests on their path
    run = python_c(code)
    assert run.returncode == 0, run.stderr
    assert "'full context': '" in run.stdout and "'window 8': '" in run.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The C++ kernels

KERNELS = {name: cpp_unavailable_reason(name) for name in ("attention", "attention_brgemm")}
each_kernel = pytest.mark.parametrize("cpp_attention", [
    pytest.param(partial(cpu_attention.attention, kernel=name), id=name,
                 marks=pytest.mark.skipif(why is not None, reason=str(why))) for name, why in KERNELS.items()])


def run_cpp(cpp_attention, inputs, grad, window):
    """Output and gradients."""
    y = cpp_attention(*inputs, window)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_kernel
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(problem=problems(), D=st.sampled_from([32, 64, 96, 128, 160]))
def test_cpp_equals_definition(cpp_attention, problem, D):
    window = problem.pop("window")
    check(cpp_attention, *draw(**problem | {"D": D, "dtype": torch.bfloat16}), window)


@each_kernel
@pytest.mark.parametrize("T", [1, 63, 64, 65, 193])
@pytest.mark.parametrize("window", [0, 1, 15, 16, 62, 63, 64, 126, 127, 128, 191, 192])
def test_cpp_window_edges(cpp_attention, T, window):
    check(cpp_attention, *draw(1, T, 2, 1, 32, torch.bfloat16), window)


@each_kernel
@pytest.mark.parametrize("T, H_kv, D, window", [(1100, 1, 32, -1), (1100, 2, 64, 600), (700, 1, 192, -1), (600, 2, 256, 300)])
def test_cpp_with_more_keys_than_one_product_takes(cpp_attention, T, H_kv, D, window):
    check(cpp_attention, *draw(1, T, 2, H_kv, D, torch.bfloat16), window)


@each_kernel
@pytest.mark.parametrize("sharper", [1, 10])
@pytest.mark.parametrize("T, D", [(512, 64), (700, 128)])
def test_cpp_is_as_near_to_the_definition_as_pytorch(cpp_attention, T, D, sharper):
    (q, k, v), grad = draw(1, T, 2, 2, D, torch.bfloat16)
    inputs = [(q * sharper).detach().requires_grad_(), k, v]
    exact = reference(*inputs, grad, fa.FULL)[0]

    def errors(function):
        y = function(*inputs, fa.FULL)
        found = y, *torch.autograd.grad(y, inputs, grad)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    for ours, pytorch in zip(errors(cpp_attention), errors(fa._sdpa), strict=True):
        assert ours < 1.05 * pytorch


@each_kernel
def test_cpp_gives_the_log_sum_exp(cpp_attention):
    (q, k, v), _ = draw(2, 150, 4, 2, 32, torch.bfloat16)
    t = torch.arange(150)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) / math.sqrt(32)
    want = scores.masked_fill(t > t[:, None], -math.inf).logsumexp(-1)
    got = cpu_attention.attention_forward(q, k, v, -1, **cpp_attention.keywords)[1]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-6)


@each_kernel
@pytest.mark.parametrize("size", [1e2, 1e4, 1e9])
def test_cpp_takes_any_size_of_scores(cpp_attention, size):
    """Every seventh key wins all there is when scores are this far apart: each query gets its value, and nothing overflows."""
    T, at = 150, torch.arange(150)
    inputs, grad = draw(1, T, 1, 1, 32, torch.bfloat16)
    with torch.no_grad():
        inputs[0].fill_(1)
        inputs[1].copy_(torch.where(at % 7 == 3, size, -size)[:, None, None].expand(T, 1, 32))
    y, *gradients = run_cpp(cpp_attention, inputs, grad, 6)
    winner = at - (at - 3) % 7
    v = inputs[2].detach()
    assert torch.equal(y[:, 3:], v[:, winner[3:]]) and torch.equal(y[:, 0], v[:, 0])  # what is hidden never wins
    assert all(x.isfinite().all() for x in (y, *gradients))
    dv = gradients[2][0, 3:, 0]
    assert not dv[at[3:] % 7 != 3].any()
    if size <= 1e4:  # beyond, fp32 cannot tell the log-sum-exp from its neighbours well enough for a probability of 1
        want = torch.zeros(T, 32).double().index_add_(0, winner[3:], grad[0, 3:, 0].double())[3:]
        torch.testing.assert_close(dv.double(), want, rtol=0.02, atol=0.05)


@each_kernel
def test_cpp_leaves_out_what_no_query_sees(cpp_attention):
    """Zero times NaN is NaN: keys and values outside of a window are not even multiplied with."""
    window = 64
    (q, k, v), grad = draw(1, 512, 1, 1, 32, torch.bfloat16)
    clean = cpp_attention(q, k, v, window)
    with torch.no_grad():
        for x in (k, v):
            x[:, :128], x[:, 384:] = math.nan, math.nan
    y = cpp_attention(q, k, v, window)
    assert torch.equal(y[:, 192:384], clean[:, 192:384])
    assert y[:, :192].isnan().all() and y[:, 384:].isnan().all()


@each_kernel
def test_cpp_takes_any_strides(cpp_attention):
    B, T, H, H_kv, D = 2, 70, 4, 2, 32
    inputs, grad = draw(B, T, H, H_kv, D, torch.bfloat16)
    want = run_cpp(cpp_attention, inputs, grad, 20)

    def layouts(x):
        yield x.transpose(1, 2).contiguous().transpose(1, 2)              # (B, H, T, D) in memory
        yield torch.cat((x, x + 1), 2)[:, :, :x.size(2)]                  # part of a fused projection
        yield torch.cat((x + 1, x), 3)[..., D:]                           # heads that begin anywhere
        yield torch.cat((x[..., :1], x), 3)[..., 1:]                      # rows that begin at odd elements
        yield x.transpose(1, 3).contiguous().transpose(1, 3)              # features apart
    for variants in zip(*(layouts(x.detach()) for x in (*inputs, grad)), strict=True):
        assert not variants[0].is_contiguous()
        *leaves, dy = variants
        assert same_bits(want, run_cpp(cpp_attention, [x.requires_grad_() for x in leaves], dy, 20))
    y = cpp_attention(*inputs, 20)
    summed = torch.autograd.grad(y.sum(), inputs)                         # a gradient without strides of its own
    assert same_bits(summed, run_cpp(cpp_attention, inputs, torch.ones_like(grad), 20)[1:])


@each_kernel
@pytest.mark.parametrize("window", [-1, 70])
def test_cpp_gives_the_same_bits_on_any_number_of_threads(cpp_attention, window):
    inputs, grad = draw(1, 300, 6, 3, 64, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 3, 8):  # with 1 and 3, a thread for each key head; with 2 and 8, for each block
            torch.set_num_threads(n)
            results.append(run_cpp(cpp_attention, inputs, grad, window))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@each_kernel
def test_cpp_compiles_to_one_graph_with_the_same_bits(cpp_attention):
    def around(q, k, v):
        return cpp_attention(-q, k, v.transpose(1, 2).contiguous().transpose(1, 2), 20).flatten(2)
    inputs, grad = draw(2, 100, 4, 2, 32, torch.bfloat16)
    results = []
    for f in (around, torch.compile(around, fullgraph=True, dynamic=False)):
        y = f(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, grad.flatten(2))])
    assert same_bits(*results)


@each_kernel
def test_cpp_operators_keep_torch_s_rules(cpp_attention):
    (inputs, grad), kernel = draw(1, 10, 2, 1, 32, torch.bfloat16), cpp_attention.keywords["kernel"]
    torch.library.opcheck(cpu_attention.attention_forward, (*inputs, 3, kernel), test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor"))
    inputs = [x.detach() for x in inputs]
    torch.library.opcheck(cpu_attention.attention_backward,
                          (*inputs, *cpu_attention.attention_forward(*inputs, 3, kernel), grad, 3, kernel),
                          test_utils=("test_schema", "test_faketensor"))


@each_kernel
@pytest.mark.parametrize("shapes, dtype, message", [
    (((1, 8, 2, 32), (1, 8, 2, 32)), torch.float32, "bfloat16"),
    (((1, 8, 2, 24), (1, 8, 2, 24)), torch.bfloat16, "multiple of 32"),
    (((1, 8, 3, 32), (1, 8, 2, 32)), torch.bfloat16, "do not go together"),
    (((1, 8, 2, 32), (1, 9, 2, 32)), torch.bfloat16, "do not go together"),
    (((1, 8, 2, 64), (1, 8, 2, 32)), torch.bfloat16, "do not go together"),
])
def test_cpp_refuses_what_it_cannot_do(cpp_attention, shapes, dtype, message):
    q, k = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        cpp_attention(q, k, k, -1)


@each_kernel
def test_cpp_takes_nothing_for_an_answer(cpp_attention):
    for shape in (0, 8, 2, 32), (2, 0, 2, 32):
        inputs, grad = draw(*shape[:3], 2, 32, torch.bfloat16)
        assert [x.shape for x in run_cpp(cpp_attention, inputs, grad, -1)] == [shape] * 4


@each_kernel
def test_cpp_takes_heads_of_a_multiple_of_32(cpp_attention):
    backend = "brgemm" if cpp_attention.keywords["kernel"] == "attention_brgemm" else "native"
    assert fa.backend_unavailable_reason(backend, False, "cpu", torch.bfloat16, 48) \
        == "ValueError: the kernel takes heads of a multiple of 32, not of 48"
    assert fa.choose_backend("cpu", torch.bfloat16, 48, 512, -1).name not in ("native", "brgemm")


@pytest.mark.slow
def test_without_native_kernels_another_serves():
    code = ("import torch; from nanochat import flash_attention as fa\n"
            "attention = fa.make_attention('cpu', torch.bfloat16, 64, 512, [128, -1])\n"
            "print('native' in attention.names().values(), *str(attention).splitlines()[1:], sep='\\n')")
    from processes import python_c
    run = python_c(code, NANOCHAT_NATIVE="0")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["False", "  not native or brgemm: NANOCHAT_NATIVE=0"]


PRINT_REASON = """from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
print(cpp_unavailable_reason('attention_brgemm'))"""


@pytest.mark.slow
@pytest.mark.skipif(KERNELS["attention_brgemm"] is not None, reason=str(KERNELS["attention_brgemm"]))
@pytest.mark.parametrize("isa, works", [("AVX512_CORE_BF16", True), ("AVX2", False)])
def test_brgemm_on_lesser_processors(isa, works, tmp_path):
    """oneDNN made to believe that there is no AMX: the same tests. No AVX512 either: a reason, where a product would end the
    process."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    code = PRINT_REASON if not works else f"""import runpy, torch; tests = runpy.run_path({__file__!r})
attention = tests["partial"](tests["cpu_attention"].attention, kernel="attention_brgemm")
for T, window in (300, -1), (700, 129): tests["check"](attention, *tests["draw"](1, T, 2, 1, 64, torch.bfloat16), window)
print(None)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert (run.stdout == "None\n") if works else ("brgemm does not work here" in run.stdout)
