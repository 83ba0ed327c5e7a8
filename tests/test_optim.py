"""MuonAdamW against torch.optim.AdamW, and on parameters that have no gradient."""

import copy
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import optim
from nanochat.optim import MuonAdamW, muon_update

COMPILE = pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def compile_small_ones_too(monkeypatch):
    monkeypatch.setattr(optim, "COMPILE_FROM", 1)


def muon_group(params, **kw):
    return dict(kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.9, weight_decay=0.1) | kw


def adamw_group(params, **kw):
    return dict(kind="adamw", params=params, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1) | kw


def normal(*shape, seed, device="cpu"):
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def parameters(*shapes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def graphs_of(monkeypatch):
    """The list to which every graph goes that is compiled from now on; it then runs as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


def input_shapes(graph):
    """The shapes of the tensors that go into a graph."""
    values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    return [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]


@COMPILE
def test_adamw_agrees_with_torch(compile, device):
    ours, theirs = (parameters((7, 5), (3,), (), device=device) for _ in range(2))
    mine = MuonAdamW([adamw_group(ours)], compile=compile)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(20):
        for params, optimizer in ((ours, mine), (theirs, reference)):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


def test_adamw_keeps_fp32_moments_of_a_bf16_table(device):
    table = torch.nn.Parameter(normal(8, 4, seed=0, device=device).bfloat16())
    optimizer = MuonAdamW([adamw_group([table])], names={table: "wte"})
    for step in range(3):
        give_gradients([table], step)
        optimizer.step()
    assert table.dtype == torch.bfloat16
    assert optimizer.named_state()["wte/exp_avg_sq"].dtype == torch.float32


def test_muon_update_has_unit_spectral_scale_and_follows_the_gradient(device):
    g, yes = normal(1, 32, 64, seed=0, device=device), torch.tensor(True, device=device)
    new, _, _ = muon_update(torch.zeros_like(g), g, torch.zeros_like(g), g.new_zeros(1, 1, 64), yes,
                            0.0, 1.0, 0.0, 0.9, torch.float32)
    assert abs(new.norm().item() / 32**0.5 - 1) < 0.05          # Frobenius norm sqrt(min(m, n)), kept by NorMuon
    assert (new * g).sum() < 0                                  # downhill


def test_weight_decay_is_cautious(device):
    p, g = (normal(1, 16, 16, seed=seed, device=device) for seed in range(2))
    args = (g, torch.zeros_like(g), g.new_zeros(1, 16, 1), torch.tensor(True, device=device), 0.0, 0.1)
    plain, _, _ = muon_update(p, *args, 0.0, 0.9, torch.float32)
    decayed, _, _ = muon_update(p, *args, 0.5, 0.9, torch.float32)
    update = p - plain
    agree = update * p >= 0
    assert torch.equal(plain[~agree], decayed[~agree])
    torch.testing.assert_close(plain[agree] - decayed[agree], 0.1 * 0.5 * p[agree], rtol=1e-3, atol=1e-6)


@COMPILE
def test_a_batch_is_updated_as_its_members_would_be(compile, device):
    together, alone = (parameters((6, 4), (6, 4), (6, 4), device=device) for _ in range(2))
    optimizers = [MuonAdamW([muon_group(together)], compile=compile)] + [MuonAdamW([muon_group([p])]) for p in alone]
    for step in range(4):
        for params in (together, alone):
            give_gradients(params, step)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@COMPILE
def test_batches_of_a_size_are_updated_as_all_at_once(compile, device, monkeypatch):
    """Five matrices at once, and by two or one, while some of them have no gradient."""
    sets, sizes = [parameters(*[(6, 4)] * 5, device=device) for _ in range(3)], []
    if not compile:
        monkeypatch.setattr(optim, "muon_update", lambda *args: sizes.append(len(args[0])) or muon_update(*args))
    optimizers = [MuonAdamW([muon_group(params)], compile=compile, muon_batch=size)
                  for params, size in zip(sets, (2**25, 48, 1), strict=True)]
    for step, frozen in enumerate((0, 2, 0, 4)):
        for params, optimizer in zip(sets, optimizers, strict=True):
            give_gradients(params, step)
            for p in params[:frozen]:
                p.grad = None
            optimizer.step()
    assert compile or sizes[:9] == [5, 1, 2, 2, 1, 1, 1, 1, 1]
    for others in sets[1:]:
        for p, q in zip(sets[0], others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@COMPILE
def test_momentum_in_bf16_is_rounded_only_between_steps(compile, device, monkeypatch):
    """The first step is that of fp32 to the bit, what it keeps is rounded; after twenty the paths differ by rounding. Small
    parameters keep fp32, and so does every second moment."""
    monkeypatch.setattr(optim, "FP32_BELOW", 20)
    shapes = (6, 4), (6, 4), (5, 7), (3,)
    exact, rounded = (parameters(*shapes, device=device) for _ in range(2))
    optimizers = [MuonAdamW([muon_group(ps[:2]), adamw_group(ps[2:3]), adamw_group(ps[3:])],
                            names=dict(zip(ps, "abcd", strict=True)), momentum_dtype=dtype, compile=compile)
                  for ps, dtype in ((exact, torch.float32), (rounded, torch.bfloat16))]
    start = copy.deepcopy(exact)
    for step in range(20):
        for params, optimizer in zip((exact, rounded), optimizers, strict=True):
            give_gradients(params, step)
            optimizer.step()
        if step == 0:
            assert all(torch.equal(p, q) for p, q in zip(exact, rounded, strict=True))
            states = optimizers[0].named_state(), optimizers[1].named_state()
            halved = {k for k, v in states[1].items() if v.dtype == torch.bfloat16}
            assert halved == {"a/momentum_buffer", "b/momentum_buffer", "c/exp_avg"}
            assert all(torch.equal(states[0][k].to(v.dtype), v) for k, v in states[1].items())
    for p, q, before in zip(exact, rounded, start, strict=True):
        assert (p - q).norm() < 0.02 * (p - before).norm()


def test_batches_are_few_and_even():
    for n, most in itertools.product(range(1, 30), range(1, 12)):
        parts = optim.even_parts(list(range(n)), most)
        assert sum(parts, []) == list(range(n)) and len(parts) == -(-n // most)
        assert max(map(len, parts)) <= most and max(map(len, parts)) - min(map(len, parts)) <= 1


@COMPILE
@settings(max_examples=12)
@given(present=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_without_a_gradient_nothing_moves(compile, device, present):
    """Whatever subset has gradients: the others keep value and state to the bit; those with one go on as if alone."""
    params = parameters((6, 4), (6, 4), (5,), (3, 2), device=device)
    optimizer = MuonAdamW([muon_group(params[:2]), adamw_group(params[2:])],
                          names=dict(zip(params, "abcd", strict=True)), compile=compile)
    give_gradients(params, 100)
    optimizer.step()
    for step, mask in enumerate(present):
        before, state = copy.deepcopy(params), {k: v.clone() for k, v in optimizer.named_state().items()}
        give_gradients(params, step)
        for p, has_gradient in zip(params, mask, strict=True):
            if not has_gradient:
                p.grad = None
        optimizer.step()
        for name, p, old, has_gradient in zip("abcd", params, before, mask, strict=True):
            assert torch.equal(p, old) != has_gradient
            for key, value in optimizer.named_state().items():
                if key.startswith(name) and not has_gradient:
                    assert torch.equal(value, state[key]), key


@COMPILE
def test_what_is_not_finite_changes_nothing(compile, device):
    """Values and moments stay to the bit under NaN gradients, and the next step is as if there had been no such one."""
    params, others = (parameters((6, 4), (6, 4), (5,), (3, 2), device=device) for _ in range(2))
    yes = torch.tensor(True, device=device)
    optimizers = [MuonAdamW([muon_group(ps[:2]), adamw_group(ps[2:])],
                            names=dict(zip(ps, "abcd", strict=True)), compile=compile) for ps in (params, others)]
    for ps, optimizer in zip((params, others), optimizers, strict=True):
        give_gradients(ps, 0)
        optimizer.step(finite=yes)
    before, state = copy.deepcopy(params), {k: v.clone() for k, v in optimizers[0].named_state().items()}
    give_gradients(params, 1)
    for p in params:
        p.grad.view(-1)[0] = torch.nan
    optimizers[0].step(finite=~yes)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in optimizers[0].named_state().items() if not k.endswith("/step"))
    for ps, optimizer in zip((params, others), optimizers, strict=True):
        give_gradients(ps, 2)
        optimizer.step(finite=yes)
    assert all(torch.equal(p, q) for p, q in zip(params[:2], others[:2], strict=True))  # AdamW's count of steps has gone on


def test_a_graph_has_the_sizes_of_the_matrices_and_any_number_of_them(monkeypatch):
    """Ten matrices of each of three shapes, subsets of every size: a graph for one matrix and one for more, in which only the
    number of matrices is symbolic. Symbolic sizes of matrices would make slower products."""
    graphs, shapes = graphs_of(monkeypatch), [(6, 4), (4, 12), (8, 8)]
    groups = [parameters(*[shape] * 10) for shape in shapes]
    optimizer = MuonAdamW([muon_group(params) for params in groups], compile=True)
    for size in (10, 7, 1, 3, 9, 2, 5, 8, 6, 4):
        for params in groups:
            give_gradients(params, size)
            for p in params[size:]:
                p.grad = None
        optimizer.step()
    single, several = [], []
    for graph in graphs:
        stacks = [shape for shape in input_shapes(graph) if len(shape) == 3]
        assert len(stacks) == 4 and all(type(size) is int for _, *matrix in stacks for size in matrix), stacks
        (single if type(stacks[0][0]) is int else several).append(stacks[0])
    assert sorted(shape[1:] for shape in single) == sorted(shape[1:] for shape in several) == sorted(shapes)
    assert all(shape[0] == 1 for shape in single)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_warming_up_compiles_all_that_steps_need_and_changes_nothing(monkeypatch, momentum_dtype):
    """Steps with all gradients, and with those of a suffix that was warmed up too: no graph is added. Seven matrices are
    updated four and three at a time, five of a suffix by three and two; one by itself needs a graph of its own."""
    monkeypatch.setattr(optim, "FP32_BELOW", 20)
    graphs = graphs_of(monkeypatch)
    matrices, others = parameters(*[(6, 4)] * 7), parameters((5, 7), (5, 7), (3,), ())
    others[1] = torch.nn.Parameter(others[1].bfloat16())
    params = [*matrices, *others]
    optimizer = MuonAdamW([muon_group(matrices), adamw_group(others)], names={p: str(i) for i, p in enumerate(params)},
                          momentum_dtype=momentum_dtype, compile=True, muon_batch=4 * 24)
    before, random = copy.deepcopy(params), torch.get_rng_state()
    seen = []
    for trained in (params, params[2:], params[6:]):
        optimizer.warm_up(trained)
        seen.append(len(graphs))
    assert seen == [1 + 4, 1 + 4, 2 + 4]
    assert not optimizer.state and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(params, before, strict=True))
    for step, frozen in enumerate((0, 2, 6, 0)):
        give_gradients(params, step)
        for p in params[:frozen]:
            p.grad = None
        optimizer.step()
        assert len(graphs) == seen[-1], step
    optimizer.warm_up(params)
    assert len(graphs) == seen[-1] and optimizer.named_state()["7/step"] == 4


def test_small_parameters_do_not_cost_a_graph(monkeypatch):
    monkeypatch.undo()
    params = parameters((6, 4), (5,))
    optimizer = MuonAdamW([muon_group(params[:1]), adamw_group(params[1:])], compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    give_gradients(params, 0)
    optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_state_travels_by_name():
    """Saved and loaded into an optimizer with other grouping order, training goes on to the same bits."""
    def build(params, reverse):
        groups = [muon_group(params[:2][::-1] if reverse else params[:2]), adamw_group(params[2:])]
        return MuonAdamW(groups[::-1] if reverse else groups, names=dict(zip(params, "abcd", strict=True)))
    first = parameters((6, 4), (6, 4), (5,), (3, 2))
    one = build(first, False)
    for step in range(3):
        give_gradients(first, step)
        one.step()
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    other = build(second, True)
    other.load_named_state({k: v.clone() for k, v in one.named_state().items()})
    for step in range(3, 6):
        for params, optimizer in ((first, one), (second, other)):
            give_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    with pytest.raises(KeyError):
        other.load_named_state({"nobody/step": torch.zeros(())})
