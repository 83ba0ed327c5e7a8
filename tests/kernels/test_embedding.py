"""The lookup's gradient: exact against a plain sum, better than bf16 accumulation, equal to the bit on every run, sorted once for
all tables of a model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from nanochat.engine import KVCache
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.embedding import (
    Embedding,
    choose_embedding_gradient,
    embedding_gradient,
    embedding_gradient_reference,
    faster_way,
    sort_tokens,
)
from nanochat.runtime.compilation import CompiledModel
from nanochat.runtime.tuner import Tuner
from test_gpt import TINY, batch, gradients_of, tiny_model
from triton_kernels import compiled_for, interpreted

reason = cpp_unavailable_reason("embedding")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
EPS = 2.0**-24  # relative rounding of an fp32 operation
ROUNDING = {torch.float32: EPS, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=["torch", "cpp", "sorted"])
def way(request, device):
    """Each way; `sorted` is Triton on a GPU and PyTorch elsewhere."""
    if request.param == "cpp" and (reason or device.type != "cpu"):
        pytest.skip(reason or "a kernel for CPUs")
    return request.param


def gradient(table, idx, weights, way="torch", compile=False):
    layer = Embedding(*table.shape, dtype=table.dtype, device=table.device)
    layer.gradient_by = way
    layer.weight.data.copy_(table)
    forward = torch.compile(layer, fullgraph=True) if compile else layer
    (forward(idx) * weights).sum().backward()
    return layer.weight.grad


def inputs(dtype, device, tokens=4096, rows=50, width=32, seed=0):
    """A table, ids of which a few are very frequent, and the gradient that arrives, (8, tokens / 8, width)."""
    generator = torch.Generator().manual_seed(seed)
    idx = (torch.rand(8, tokens // 8, generator=generator) ** 4 * rows).long()
    weights = torch.rand(*idx.shape, width, generator=generator).to(dtype)
    return [t.to(device) for t in (torch.randn(rows, width, generator=generator).to(dtype), idx, weights)]


def exact(idx, grad, rows):
    """The sum per token in float64 (rows, C), and the sum of magnitudes, by which rounding is bounded."""
    grad, idx = grad.flatten(0, -2).double(), idx.flatten()
    zeros = torch.zeros(rows, grad.size(1), dtype=torch.float64, device=grad.device)
    return zeros.index_add(0, idx, grad), zeros.index_add(0, idx, grad.abs())


def check(got, idx, grad, rows):
    """n additions in fp32, in any order, and one rounding to the table's dtype. Rows of absent tokens are zeros."""
    sums, magnitudes = exact(idx, grad, rows)
    counts = idx.flatten().bincount(minlength=rows)[:, None]
    bound = EPS * counts * magnitudes * 1.01 + 1.01 * ROUNDING[grad.dtype] * sums.abs()
    assert got.dtype == grad.dtype and got.shape == sums.shape and got.is_contiguous()
    assert ((got.double() - sums).abs() <= bound).all()


def direct(idx, grad, rows, way):
    by_token = sort_tokens(idx, rows) if way == "sorted" else ()
    return embedding_gradient(grad, idx, rows, way, *by_token)


# --- values -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, tokens", [(50, 4096), (30000, 8192), (1, 3000), (3, 8)])
def test_it_is_the_sum_over_the_places_of_a_token(device, way, dtype, rows, tokens):
    """Few tokens and many, one at every place, more rows than tokens. C is no power of two."""
    if way == "cpp" and dtype == torch.float32:
        pytest.skip("a kernel for bf16")
    _, idx, grad = inputs(dtype, device, tokens, rows, width=300 if rows < 100 else 20)
    check(direct(idx, grad, rows, way), idx, grad, rows)


def test_it_is_a_lookup(device, way):
    table, idx, _ = inputs(torch.bfloat16, device)
    layer = Embedding(*table.shape, dtype=table.dtype, device=device)
    layer.gradient_by = way
    assert torch.equal(layer(idx), layer.weight[idx])


def test_bf16_is_rounded_once_and_not_at_every_addition(device, way):
    table, idx, weights = inputs(torch.bfloat16, device)
    right, _ = exact(idx, weights, 50)
    error = ((gradient(table, idx, weights, way).double() - right).abs() / right.clamp_min(1e-9)).max()
    assert error <= 2**-8  # half a unit in the last place of bf16
    if device.type == "cpu":  # on CUDA PyTorch sums in fp32 too
        plain = torch.nn.functional.embedding(idx, table.requires_grad_())
        (plain * weights).sum().backward()
        assert ((table.grad.double() - right).abs() / right.clamp_min(1e-9)).max() > 10 * error  # what we avoid


def test_compiled_and_repeated_it_gives_the_same_bits(device, way):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # where atomic adds would come in any order
    try:
        table, idx, weights = inputs(torch.bfloat16, device, tokens=32768)
        first = gradient(table, idx, weights, way)
        assert all(torch.equal(gradient(table, idx, weights, way, compile=True), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


@given(rows=st.integers(1, 40), columns=st.integers(1, 300), tokens=st.integers(0, 300), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_sorted_it_is_exact_for_any_size(device, rows, columns, tokens, seed):
    """Whole numbers, whose sums need no rounding: equal to the bit, in any order. NaN and infinity stay in their row."""
    generator = torch.Generator().manual_seed(seed)
    idx = (torch.rand(tokens, generator=generator) ** 3 * rows).long()
    grad = torch.randint(-3, 4, (tokens, columns), generator=generator).bfloat16()
    if tokens > 100:
        grad[3, 0], grad[5, -1] = float("nan"), float("inf")
    idx, grad = idx.to(device), grad.to(device)
    ours, plain = direct(idx, grad, rows, "sorted"), embedding_gradient_reference(grad, idx, rows)
    assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0))


@needs_kernel
@given(rows=st.integers(1, 40), columns=st.integers(1, 150), tokens=st.integers(0, 200), seed=st.integers(0, 99))
def test_the_kernels_for_cpus_give_the_bits_of_pytorch(rows, columns, tokens, seed):
    """Any width, rows without a token, tokens at every place; gradients that are not next to each other, NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    idx = (torch.rand(tokens, 2, generator=generator) ** 3 * rows).long()
    grad = torch.randn(tokens, columns, 2, generator=generator).bfloat16().mT
    if tokens > 100:
        grad[3, 0, 0], grad[5, 1, -1] = float("nan"), float("inf")
    plain = embedding_gradient_reference(grad, idx, rows)
    for ours in (direct(idx, grad, rows, "cpp"), direct(idx, grad, rows, "sorted")):
        assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0))


@given(rows=st.integers(1, 60), tokens=st.integers(0, 200), seed=st.integers(0, 99))
def test_positions_are_grouped_by_token(device, rows, tokens, seed):
    idx = torch.randint(rows, (2, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    order, starts = sort_tokens(idx, rows)
    assert starts.shape == (rows + 1,) and starts[0] == 0 and starts[-1] == idx.numel() == len(order)
    for row in range(rows):
        assert torch.equal(order[starts[row]:starts[row + 1]], (idx.flatten() == row).nonzero()[:, 0])


# --- in the model -----------------------------------------------------------------------------------------------------

def sorted_model(device, **options):
    model = tiny_model(device=device, **options)
    for table in (model.transformer.wte, *model.value_embeds.values()):
        table.gradient_by = "sorted"
    return model


@pytest.mark.parametrize("start, detach_x0", [(0, True), (2, True), (2, False), (4, True)])
def test_the_model_and_its_suffixes_learn_the_same(device, start, detach_x0):
    """Only the tables' gradients may differ, by the order of their sums, and on a CPU not even these."""
    plain, model, options = tiny_model(device=device), sorted_model(device), dict(active_start=start, detach_x0=detach_x0)
    loss, expected = gradients_of(plain, plain, device, **options)
    other, grads = gradients_of(model, model, device, **options)
    assert torch.equal(loss, other) and grads["value_embeds.4.weight"].any()
    assert (grads["transformer.wte.weight"] is None) == (start > 0 and detach_x0)
    for name, grad in grads.items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=0 if device.type == "cpu" else 1e-5,
                                       atol=0 if device.type == "cpu" else 1e-6, msg=name)


def count(graph, name):
    return sum(name in str(node.target) for node in graph.graph.nodes)


def traced(model, whole):
    """The forward and backward graphs of a compiled loss, as torch's compiler gets them."""
    torch._dynamo.reset()
    graphs = {"forward": [], "backward": []}

    def keep(which):
        return lambda graph, _: graphs[which].append(graph) or make_boxed_func(graph)
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"),
                           partition_fn=min_cut_rematerialization_partition)
    compiled = CompiledModel(model, whole=whole, backend=backend)
    compiled.warm_up(*batch(rows=2))
    assert compiled.eager_fallbacks == 0
    return graphs


def test_a_compiled_model_sorts_once():
    """In the pass that the compiler chooses; every table's gradient uses it."""
    graphs = traced(sorted_model("cpu"), whole=True)
    assert sum(count(g, "aten.sort") for which in graphs.values() for g in which) == 1
    assert [count(g, "nanochat.embedding_gradient") for g in graphs["backward"]] == [1 + len(sorted_model("cpu").value_embeds)]


def test_in_parts_no_part_sorts():
    """The forward sorts before its parts; the gradient of wte is in one, those of the value embeddings in none."""
    graphs = traced(sorted_model("cpu"), whole=False)
    assert not any(count(g, "aten.sort") for which in graphs.values() for g in which)
    assert sum(count(g, "nanochat.embedding_gradient") for g in graphs["backward"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_learns_the_same(device, whole):
    torch._dynamo.reset()
    plain, model = (sorted_model(device, config=replace(TINY, n_layer=3)) for _ in range(2))
    compiled = CompiledModel(model, whole=whole, backend="aot_eager")
    for start in (0, 1, 0):
        compiled.warm_up(*batch(device=device), active_start=start)
        loss, expected = gradients_of(plain, plain, device, active_start=start)
        other, grads = gradients_of(model, compiled, device, active_start=start)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            assert (grad is None) == (expected[name] is None), name
            assert grad is None or (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name
    assert compiled.eager_fallbacks == 0


def test_only_training_sorts(monkeypatch):
    """Not evaluation, and not generation with a cache."""
    from nanochat import gpt
    from nanochat.kernels import embedding
    model, (x, y), sorts = sorted_model("cpu"), batch(), []
    for module in (gpt, embedding):
        monkeypatch.setattr(module, "sort_tokens", lambda *args: sorts.append(args) or sort_tokens(*args))
    with torch.no_grad():
        model(x, y)
        model(x[:1], kv_cache=KVCache.for_model(model, 1, TINY.sequence_len))
    with torch.inference_mode():
        model(x)
    assert sorts == []
    model(x, y).backward()
    assert len(sorts) == 1


# --- the choice -------------------------------------------------------------------------------------------------------

def test_the_tables_of_a_model_take_the_one_that_was_chosen(device, tmp_path):
    fast, why_not = faster_way(device.type, torch.bfloat16)
    if why_not:
        pytest.skip(why_not)

    def choose(**options):
        tables = [Embedding(60, width, dtype=torch.bfloat16, device=device) for width in (32, 16)]
        choice = choose_embedding_gradient(tables, 40_000, Tuner(device, tmp_path), **options)
        assert {table.gradient_by for table in tables} == {choice.name}
        return choice
    first = choose()
    assert set(first.milliseconds) == {"torch", fast} and choose() == first._replace(reason="measured before")
    assert choose(recorded=fast)[:2] == (fast, "as before the resume") and choose(recorded="torch").name == "torch"
    assert choose(recorded="of another device").name == first.name


def test_where_no_other_kernel_works_torch_serves():
    table = Embedding(60, 32)
    assert choose_embedding_gradient([table], 40_000).name == "torch" == table.gradient_by
    assert "bfloat16" in faster_way("cpu", torch.float32)[1] and faster_way("cuda", torch.float32)[0] == "sorted"


# --- Triton -----------------------------------------------------------------------------------------------------------

TRITON = """
import torch
from nanochat.kernels.embedding import PIECE, sort_tokens, sorted_gradient_triton
generator = torch.Generator().manual_seed(0)
cases = (1, 1, 1), (5, 64, 0), (7, 300, 1), (1, 40, 200), (30, 100, 500), (2, 257, 300), (20, 96, PIECE), (20, 32, PIECE - 1)
for rows, width, tokens in cases:
    for dtype in (torch.float32, torch.bfloat16):
        idx = (torch.rand(tokens, generator=generator) ** 4 * rows).long()
        grad = torch.randn(tokens, width, generator=generator).to(dtype)
        got = sorted_gradient_triton(grad, idx, *sort_tokens(idx, rows))
        zeros = torch.zeros(rows, width, dtype=torch.float64)
        sums, sizes = zeros.index_add(0, idx, grad.double()), zeros.index_add(0, idx, grad.double().abs())
        rounding = 2**-24 if dtype == torch.float32 else 2**-7  # the interpreter truncates bf16
        bound = 1.01 * (2**-24 * idx.bincount(minlength=rows)[:, None] * sizes + rounding * sums.abs())
        assert got.dtype == dtype and ((got.double() - sums).abs() <= bound).all(), (rows, width, tokens, dtype)
        whole = torch.randint(-3, 4, grad.shape, generator=generator).to(dtype)  # at most 256 of size: no sum is rounded
        zeros = torch.zeros(rows, width)
        got = sorted_gradient_triton(whole, idx, *sort_tokens(idx, rows))
        expected = zeros.index_add(0, idx, whole.float())
        assert torch.equal(got[expected.abs() <= 256].float(), expected[expected.abs() <= 256])
print("equal")
"""


def test_the_triton_kernels_in_the_interpreter():
    interpreted(TRITON)


PTX = """
from nanochat.kernels.embedding import COLUMNS, PIECE, TILE, _pieces_kernel, _rows_kernel
sizes = dict(PIECE=PIECE, TILE=TILE, COLUMNS=COLUMNS)
pieces = dict(grad="*bf16", idx="*i64", order="*i64", pieces="*fp32", width="i32")
rows = dict(grad="*bf16", order="*i64", starts="*i64", pieces="*fp32", out="*bf16", width="i32")
for kernel, types in ((_pieces_kernel, pieces), (_rows_kernel, rows)):
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(types))}
    source = ASTSource(kernel, types | dict.fromkeys(sizes, "constexpr"), sizes, aligned)
    made = compile(source, target, {"num_warps": 1})
    ptx = made.asm["ptx"]
    print(ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32"), made.metadata.shared, "atom" in ptx, end=" ")
"""


@pytest.mark.parametrize("capability", [89, 90])
def test_the_triton_kernels_compile(capability):
    """Accesses are of 16 bytes, and TILE of them are under way at once: one sum of gradients; or two, and one of fp32 pieces, of
    twice the bytes. Neither shared memory nor atomic adds."""
    assert compiled_for(capability, PTX).split() == "8 2 0 False 32 1 0 False".split()


# --- past 2^31 elements -----------------------------------------------------------------------------------------------

def test_more_than_2_31_elements(large_device):
    """N C > 2^31, with tokens at the first and last positions and the last row of the table."""
    tokens, width, rows = 2**20 + 8, 2**11, 1000
    assert tokens * width > 2**31
    grad = torch.ones(tokens, width, dtype=torch.bfloat16, device=large_device)
    grad[-1] = 3
    idx = torch.arange(tokens, device=large_device) % (rows - 1)
    idx[0] = idx[-1] = rows - 1
    got = direct(idx, grad, rows, faster_way("cuda", torch.bfloat16)[0])
    counts = idx.bincount(minlength=rows).float()
    counts[-1] = 4
    assert torch.equal(got, counts.bfloat16()[:, None].expand(rows, width))
