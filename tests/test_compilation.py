"""Compiled training: a variant whose graphs cannot be made runs uncompiled, alone, and is counted; nothing is silent."""

import pytest
import torch

from nanochat.compilation import CompiledModel, first_line
from test_gpt import TINY, batch, tiny_model


def breaks_on(number):
    """A backend that runs graphs as they are, except for the one with this number, which it cannot make."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        if len(made) == number:
            raise RuntimeError("no such instruction")
        return graph.forward
    return backend


def gradients(forward, model, start):
    model.zero_grad(set_to_none=True)
    loss = forward(*batch(), active_start=start)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def test_a_broken_graph_costs_only_its_own_variant(capsys):
    """Of three suffixes the second one's graph is broken. All three train right; only that one is named and counted."""
    plain, model = tiny_model(), tiny_model()
    compiled = CompiledModel(model, whole=True, backend=breaks_on(2))
    for start in (0, 1, 2):
        compiled.rehearse(*batch(seed=9), active_start=start)
    said = [line for line in capsys.readouterr().out.splitlines() if "could not be compiled" in line]
    assert len(said) == 1 and said[0].startswith("active_start=1 ") and "no such instruction" in said[0]
    assert compiled.eager_fallbacks == 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for start in (0, 1, 2, 1):
        (loss, grads), (expected_loss, expected) = gradients(compiled, model, start), gradients(plain, plain, start)
        assert torch.equal(loss, expected_loss)
        for name, grad in grads.items():
            assert (grad is None) == (expected[name] is None), name
            assert grad is None or torch.equal(grad, expected[name]), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # the broken one is not tried again
    assert compiled.eager_fallbacks == 1


def test_a_rehearsal_leaves_no_trace():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    compiled = CompiledModel(model, whole=False, backend="aot_eager")
    compiled.rehearse(*batch(), active_start=1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_memory_running_out_is_no_fault_of_the_graph():
    def backend(graph, inputs):
        raise torch.OutOfMemoryError("out of memory")
    compiled = CompiledModel(tiny_model(), whole=True, backend=backend)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.rehearse(*batch())
    assert compiled.eager_fallbacks == 0


def test_more_variants_than_torch_keeps_by_itself():
    """Twelve starts of a deep model, whole: a graph each, none dropped to eager at torch's limit of eight."""
    from dataclasses import replace
    model = tiny_model(replace(TINY, n_layer=12))
    compiled = CompiledModel(model, whole=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for start in range(12):
        compiled.rehearse(*batch(), active_start=start)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12 and compiled.eager_fallbacks == 0


def test_the_first_line_that_says_something():
    assert first_line(RuntimeError("\n  \n no compiler \n more")) == "no compiler" and first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("whole", [True, False])
def test_recomputed_activations_are_not_kept(whole):
    """By the partitioner alone, without a compiler that rounds otherwise: the same bits, and less kept for the backward pass."""
    kept, results = {}, {}
    for recompute in (False, True):
        model = tiny_model()
        model.recompute_activations = recompute
        compiled = CompiledModel(model, whole, backend="aot_eager")
        compiled.rehearse(*batch(seed=9), active_start=0)
        sizes, own = {}, {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}

        def keep(tensor):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results[recompute] = gradients(compiled, model, 0)
        assert compiled.eager_fallbacks == 0
        kept[recompute] = sum(sizes.values())
        torch._dynamo.reset()
    assert kept[True] < 0.75 * kept[False], kept
    (loss, grads), (expected_loss, expected) = results[True], results[False]
    assert torch.equal(loss, expected_loss) and all(torch.equal(grads[name], expected[name]) for name in expected)
