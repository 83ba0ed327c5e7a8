"""A step by itself: no run folder, lock or file; against the plain formula; and the state that a checkpoint restores."""

import json

import pytest
import torch

from nanochat import optim
from nanochat.features import FEATURES
from nanochat.training.build import build_trainer_only
from nanochat.training.config import parse_config

STEPS = 4


def trainer(base, *extra):
    flags = ["--depth=2", "--head-dim=16", "--aspect-ratio=16", "--max-seq-len=32", "--device-batch-size=2",
             "--total-batch-size=128", "--vocab-size=300", f"--num-iterations={STEPS}", "--warmup-steps=2",
             f"--data={base / 'text'}", "--device-type=cpu", "--dtype=float32"]
    return build_trainer_only(parse_config(FEATURES, [*flags, *(extra if "--compile" in extra else ["--no-compile", *extra])]))


def weights(trained):
    return {name: tensor.clone() for name, tensor in trained.state.model.state_dict().items()}


def test_a_step_needs_no_run(base):
    trained = trainer(base)
    before = weights(trained)
    result = trained.finalize_step(trained.launch_step())
    assert (result.step, trained.state.step, result.not_finite, result.stop_signal) == (0, 1, [], 0)
    assert result.time.total > 0 and result.lr_scale == 0.5  # the first of two steps of warm-up
    assert any(not torch.equal(before[name], now) for name, now in weights(trained).items())
    assert not (base / "base_checkpoints").exists() and not list(base.glob("**/*.lock"))


def test_loss_and_gradient_norm_are_those_of_the_whole_batch(base):
    """Two micro-batches per step: the mean of their losses, and the norm of the gradient of that mean."""
    trained = trainer(base)
    assert trained.plan.horizon.grad_accum_steps == 2
    model, loader = trainer(base).state.model, trained.loader
    batches = [tuple(t.clone() for t in loader.next()) for _ in range(2)]
    loss = sum(model(x, y) for x, y in batches) / 2
    loss.backward()
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    loader.start(0)
    result = trained.finalize_step(trained.launch_step())
    assert result.loss == pytest.approx(loss.item(), rel=1e-6) and result.grad_norm == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--block-update-schedule=static_suffix", "--static-active-layers=1"]],
                         ids=["plain", "suffix"])
def test_no_step_waits_for_the_compiler(base, monkeypatch, extra):
    """Warming up compiles forward, backward and both rules of the optimizer; then steps of a compiled run compile nothing."""
    monkeypatch.setattr(optim, "COMPILE_FROM", 2**10)  # the matrices and tables of this small model
    torch._dynamo.reset()
    trained = trainer(base, "--compile", *extra)
    optimizer = trained.state.optimizer
    assert sum(map(optimizer._is_compiled, trained.state.model.parameters())) > 10
    before, random = weights(trained), torch.get_rng_state()
    trained.warm_up(trained.state.features.before_step(0))
    assert trained.state.clock.compile > 0 and not optimizer.state and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], now) for name, now in weights(trained).items())
    compiled = trained.state.clock.compile
    results = [trained.finalize_step(trained.launch_step()) for _ in range(STEPS)]
    assert not any(result.compiled for result in results) and trained.state.clock.compile == compiled
    assert all(result.time.forward and result.time.backward and result.time.update for result in results)
    assert trained.forward.eager_fallbacks == 0 and optimizer.state


@pytest.mark.parametrize("extra", [
    [], ["--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=1", "--dyn-freeze-start-frac=0", "--dyn-probe-every=2"]],
    ids=["plain", "suffix"])
def test_the_state_is_all_that_the_next_steps_depend_on(base, extra):
    """Half of the steps, its state through JSON into a trainer that was just built, and the rest: the same bits."""
    def steps(trained, n):
        for _ in range(n):
            result = trained.finalize_step(trained.launch_step())
            trained.state.features.after_step(result.step, result.loss, result.time)
            yield result.loss
    whole = trainer(base, *extra)
    losses = list(steps(whole, STEPS))
    half, rest = trainer(base, *extra), trainer(base, *extra)
    assert list(steps(half, 2)) == losses[:2]
    saved = json.loads(json.dumps(half.state.state_dict() | {"step": half.state.step}))
    rest.state.model.load_state_dict(half.state.model.state_dict())
    rest.state.optimizer.load_named_state(half.state.optimizer.named_state())
    rest.state.load_state_dict(saved)
    rest.loader.start(rest.state.batches_used)
    assert list(steps(rest, 2)) == losses[2:]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(rest).values(), strict=True))
