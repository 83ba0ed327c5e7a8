"""--compile-evaluation: the numbers of the plain evaluation, by one graph of its own."""

import pytest
import torch

from nanochat.checkpoint_manager import build_model
from nanochat.features import FEATURES
from nanochat.loss_eval import evaluate_bpb
from nanochat.recipe.shape import shape_of_depth
from nanochat.runtime.compilation import CompiledModel, graphs_compiled
from nanochat.runtime.device import evaluation
from nanochat.training import compiled_evaluation
from nanochat.training.build import build_run
from nanochat.training.compiled_evaluation import CompiledEvaluation
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from processes import tiny_flags

SHAPE = shape_of_depth(3, 16, 16, sequence_len=32, vocab_size=300)
BATCHES = (4, 32), (4, 32), (3, 32), (1, 20), (5, 32), (2, 40)  # of the compiled shape, smaller, larger


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def a_model(device, dtype=torch.float32):
    """One whose output projections are not zero, so that all layers take part."""
    torch.manual_seed(3)
    model = build_model(SHAPE, dtype, torch.device("cpu"))
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.3)
    return model.to(device)


def batches(device, shapes=BATCHES):
    generator = torch.Generator().manual_seed(5)
    for shape in shapes:
        x, y = (torch.randint(0, 300, shape, generator=generator) for _ in range(2))
        y[:, 7] = -1
        yield x.to(device), y.to(device)


def losses_of(function, model, device):
    with evaluation(model):
        return [function(x, y, loss_reduction="none").double() for x, y in batches(device)]


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 5])
def test_the_losses_are_those_of_the_model(device, monkeypatch, chunks):
    """In fp32 each loss agrees to rounding. A sum of 300 exponentials, and layers of width 48: errors of some tens of 2^-24."""
    monkeypatch.setattr(compiled_evaluation, "default_chunk", lambda *_: -(-4 * 32 // chunks))
    model = a_model(device)
    compiled = CompiledEvaluation(model, 4, 32)
    with evaluation(model):
        compiled.warm_up()
    assert compiled.works
    graphs = graphs_compiled()
    for ours, plain in zip(losses_of(compiled, model, device), losses_of(model, model, device), strict=True):
        torch.testing.assert_close(ours, plain, rtol=100 * 2**-24, atol=100 * 2**-24)
    with evaluation(model):
        token_bytes = torch.arange(300, device=device) % 5
        bpb, plain_bpb = (evaluate_bpb(m, batches(device), None, token_bytes) for m in (compiled, model))
    assert bpb == pytest.approx(plain_bpb, rel=100 * 2**-24) and graphs_compiled() == graphs


@pytest.mark.slow
def test_in_bf16_it_rounds_no_worse_than_the_model(device):
    """Errors of the losses against float64 with the same weights: both round to 8 bits, a fused kernel less often."""
    model, exact = a_model(device, torch.bfloat16), a_model(device, torch.bfloat16)
    exact = exact.double()
    exact.compute_dtype = torch.float64
    compiled = CompiledEvaluation(model, 4, 32)
    with evaluation(model):
        compiled.warm_up()
    truth = losses_of(exact, exact, device)
    ours, plain = ([(a - b).abs().mean() for a, b in zip(losses_of(function, model, device), truth, strict=True)]
                   for function in (compiled, model))
    assert compiled.works and max(plain) > 1e-4
    for shape, error, of_plain in zip(BATCHES, ours, plain, strict=True):
        assert error <= 1.2 * of_plain, shape


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "parts"])
def test_no_graph_of_training_is_touched(whole):
    """Evaluations between steps, with smaller batches, and steps of two suffixes: one graph for all evaluations, made once; the
    steps after them find theirs."""
    model = a_model("cpu")
    training, compiled = CompiledModel(model, whole, backend="eager"), CompiledEvaluation(model, 4, 32, backend="eager")
    (x, y), *_ = batches("cpu")
    for start in (0, 1):
        training.warm_up(x, y, active_start=start)
    graphs, loss = graphs_compiled(), model.kernels.loss
    for round_ in range(2):
        with evaluation(model):
            compiled.warm_up()
            evaluate_bpb(compiled, batches("cpu"), None, torch.ones(300, dtype=torch.int64))
        assert graphs_compiled() == graphs + 1 and compiled.works and model.kernels.loss is loss
        for start in (0, 1):
            training(x, y, active_start=start).backward()
        assert graphs_compiled() == graphs + 1, round_
    assert training.eager_fallbacks == 0


def test_where_it_cannot_be_compiled_it_runs_uncompiled_and_says_so(capsys):
    def backend(graph, inputs):
        raise RuntimeError("no such instruction")
    model = a_model("cpu")
    compiled = CompiledEvaluation(model, 4, 32, backend=backend)
    with evaluation(model):
        compiled.warm_up()
        compiled.warm_up()
    said = capsys.readouterr().out
    assert said.count("could not be compiled") == 1 and "no such instruction" in said
    assert all(map(torch.equal, losses_of(compiled, model, "cpu"), losses_of(model, model, "cpu")))


def test_beside_features_that_change_layers_and_loss(base):
    """FP8 layers are swapped out for each evaluation, and the chunked loss is replaced: one graph serves all, and gives the
    numbers of the plain evaluation."""
    run = build_run(parse_config(FEATURES, tiny_flags(
        base, "evaluated", "--dtype=bfloat16", "--fp8", "--fp8-emulate", "--fp8-min-dim=16", "--fp8-skip-lm-head", "--cast-once",
        "--chunked-ce", "--num-iterations=3", "--eval-every=1", "--eval-tokens=150")))
    plain, compiled = run.evaluator, CompiledEvaluation(run.state.model, 2, 32, backend="aot_eager")
    bits_per_byte, pairs, graphs = plain.bits_per_byte, [], []

    def both():
        curve = run.state.stats.val_curve
        plain.compiled = None
        bits_per_byte()
        without = curve[-1][2]
        plain.compiled = compiled
        bits_per_byte()
        pairs.append((curve[-1][2], without))
        graphs.append(graphs_compiled())
    plain.bits_per_byte = both
    assert fit(run) == 0
    assert compiled.works and len(pairs) == 4 and len(set(graphs)) == 1
    assert all(ours == pytest.approx(without, rel=1e-3) for ours, without in pairs)
    assert pairs[0] != pairs[-1] and run.state.clock.compile > 0
