"""--audit: whatever trains outside of the timed steps is found; honest runs are clean, and keep their bits."""

import json
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nanochat.features import FEATURES, Feature
from nanochat.runtime.compilation import CompiledModel
from nanochat.training import audit
from nanochat.training.audit import fingerprint
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from processes import anew, compile_with, tiny_flags

STEPS, MICRO_BATCHES = 5, 2
CPU = torch.device("cpu")
FP8 = ["--fp8", "--fp8-emulate", "--fp8-min-dim=16"]
DYNAMIC = ["--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=1", "--dyn-freeze-start-frac=0", "--dyn-probe-every=2"]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing a run's loss takes longer than these runs."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def make(base, tag, *extra, features=FEATURES, audited=True):
    argv = anew(tiny_flags(base, tag, f"--num-iterations={STEPS}", "--save-every=2", *extra, *["--audit"] * audited))
    return build_run(parse_config(features, argv), features)


def result(run):
    return json.loads((run.plan.run_dir / "result.json").read_text())


def audit_of(run):
    """The audit of a run that goes well."""
    assert fit(run) == 0
    return result(run)["audit"]


def clean(steps=STEPS, warm_ups=0):
    batches = steps * MICRO_BATCHES
    return {"steps": steps, "changed_between_steps": [], "batches_drawn": batches, "batches_declared": batches,
            "backward_calls": batches + warm_ups, "backward_declared": batches + warm_ups}


# ---- honest runs

@pytest.mark.parametrize("extra", [
    ["--deferred-loss-logging"], [*FP8, "--chunked-ce", "--ce-chunk-tokens=48"],
    ["--cast-once", "--dtype=bfloat16", "--bf16-momentum", "--fused-rmsnorm"],
    ["--on-divergence=skip", "--sample-every=2", *DYNAMIC, "--suffix-detach-x0"]], ids=" ".join)
def test_an_honest_run_is_clean(base, extra):
    run = make(base, "honest", *extra)
    assert audit_of(run) == clean()
    assert result(run)["status"] == "ok" and torch.autograd.backward.__module__ == "torch.autograd"


@pytest.mark.slow
def test_a_compiled_run_warms_up_within_its_rights(base):
    torch._dynamo.reset()
    run = make(base, "compiled", *DYNAMIC, "--chunked-ce")
    compile_with(run, CompiledModel(run.state.model, whole=False, backend="aot_eager"))
    audited, variants = audit_of(run), len(run.trainer.forward.compiled_variants)
    assert audited == clean(warm_ups=variants) and variants > 1


@pytest.mark.slow
def test_a_graph_that_cannot_be_compiled_is_no_offence(base):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")
    torch._dynamo.reset()
    run = make(base, "uncompiled")
    compile_with(run, CompiledModel(run.state.model, whole=True, backend=broken))
    assert audit_of(run) == clean() and run.trainer.forward.eager_fallbacks == 1


def test_a_return_to_a_checkpoint_is_no_offence(base):
    run = make(base, "rollback", "--on-divergence=rollback")
    forward, bad = run.trainer.forward, iter([False] * 3 * MICRO_BATCHES + [True])
    run.trainer.forward = lambda x, y, **options: forward(x, y, **options) * (math.nan if next(bad, False) else 1)
    assert audit_of(run) == clean(steps=STEPS + 2) and run.state.stats.rollbacks == [[3, 2]]


def test_it_watches_what_a_resumed_process_trains(base):
    make_again = ["--num-iterations=7", "--allow-change", "--resume-from-step=4"]
    assert audit_of(make(base, "resumed", *FP8)) == clean()
    assert audit_of(make(base, "resumed", *FP8, *make_again)) == clean(steps=3)


@pytest.mark.parametrize("extra", [["--deferred-loss-logging"], [*DYNAMIC, *FP8, "--chunked-ce", "--dtype=bfloat16"]],
                         ids=" ".join)
def test_it_changes_no_bit_of_the_run(base, extra):
    def record(audited):
        run = make(base, f"bits-{audited}", *extra, audited=audited)
        assert fit(run) == 0 and (result(run)["audit"] is not None) == audited
        final = run.plan.run_dir / f"step_{STEPS:06d}"
        return ([(row["loss"], row["grad_norm"], row["val_bpb"]) for row in read_metrics(run.plan.run_dir / "metrics.jsonl")],
                [(final / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")])
    assert record(True) == record(False)


# ---- cheats

@dataclass
class Plot:
    """What a dishonest feature does, and where. hook: the one that it uses."""
    hook: str
    run: Any = None
    kept: list = field(default_factory=list)

    def loss(self):
        x = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
        return self.run.state.model(x[:, :-1], x[:, 1:])

    def train(self):
        """Another batch, and a step of plain gradient descent."""
        with torch.enable_grad():
            self.loss().backward()
        for p in self.run.state.model.parameters():
            if p.grad is not None:
                p.data -= 0.01 * p.grad
                p.grad = None

    def leave_gradients(self):
        """The next step's gradients are added to these."""
        self.loss().backward()

    def keep_gradients(self):
        """They are added within the next step's time, which hardly takes longer."""
        self.kept = list(torch.autograd.grad(self.loss(), [self.run.state.model.lm_head.weight]))

    def draw(self):
        self.run.trainer.loader.next()

    def nudge_moments(self):
        for state in list(self.run.state.optimizer.state.values())[:1]:
            next(t for t in state.values() if t.dim()).view(-1)[0] += 1e-6


def dishonest(plot, deed):
    """A feature that does a deed of the plot in its hook, once: the first time after the first step."""
    class Cheat(Feature):
        name = "cheat"
        enabled = classmethod(lambda cls, config: True)
        done = False

        def act(self, hook):
            if hook == plot.hook and plot.run and plot.run.state.step >= 1 and not self.done:
                self.done = True
                getattr(plot, deed)()

        def before_step(self, step):
            self.act("before_step")
            return {}

        def after_backward(self, model, step):
            for gradient in plot.kept:
                model.lm_head.weight.grad += gradient
            plot.kept.clear()

        def step_columns(self):
            self.act("step_columns")
            return {}

        def after_step(self, step, loss, time):
            self.act("after_step")

        def eval_context(self, model):
            self.act("eval_context")
            return super().eval_context(model)
    return Cheat


@pytest.mark.parametrize("hook, deed, changed, backward, drawn, extra", [
    ("before_step", "train", [1], 1, 0, []), ("step_columns", "train", [2], 1, 0, []), ("after_step", "train", [1], 1, 0, []),
    ("after_step", "train", [2], 1, 0, ["--deferred-loss-logging"]),  # called when the next step has been launched
    ("eval_context", "train", [2], 1, 0, []), ("before_step", "leave_gradients", [1], 1, 0, []),
    ("before_step", "keep_gradients", [], 1, 0, []), ("before_step", "draw", [], 0, 1, []),
    ("after_step", "nudge_moments", [1], 0, 0, [])])
def test_what_a_hook_trains_is_found(base, hook, deed, changed, backward, drawn, extra):
    plot = Plot(hook)
    run = plot.run = make(base, "cheat", *extra, features=(*FEATURES, dishonest(plot, deed)))
    honest = clean()
    assert audit_of(run) == honest | {"changed_between_steps": changed, "backward_calls": honest["backward_calls"] + backward,
                                      "batches_drawn": honest["batches_drawn"] + drawn}


def test_training_after_the_last_step_is_found(base):
    plot = Plot("after_step")
    run = make(base, "last", features=(*FEATURES, dishonest(plot, "train")))
    original = run.evaluator.bits_per_byte

    def evaluate():
        if run.state.step == STEPS:
            plot.run, plot.hook = run, "eval_context"
        original()
    run.evaluator.bits_per_byte = evaluate
    found = audit_of(run)
    assert found["changed_between_steps"] == [STEPS] and found["backward_calls"] == found["backward_declared"] + 1


@pytest.mark.slow
def test_a_step_of_the_optimizer_while_the_compiler_works_is_found(base):
    class Stepping(CompiledModel):
        def warm_up(self, x, y, **forward_args):
            trained = super().warm_up(x, y, **forward_args)
            if trained:
                self.forward(x, y, **forward_args).backward()
                optimizer.step()
                optimizer.zero_grad()
            return trained
    torch._dynamo.reset()
    run = make(base, "stepping")
    optimizer = run.state.optimizer
    compile_with(run, Stepping(run.state.model, whole=True, backend="eager"))
    assert audit_of(run) == clean(warm_ups=1) | {"changed_between_steps": [0], "backward_calls": STEPS * MICRO_BATCHES + 2}


# ---- the fingerprint

def changes(tensor, change):
    before = fingerprint({"t": tensor}, CPU)
    change(tensor)
    return fingerprint({"t": tensor}, CPU) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_every_bit_counts(dtype):
    for size in (1, 7, audit.CHUNK + 3):
        tensor = torch.zeros(size, dtype=dtype)
        raw = tensor.view(torch.uint8)
        for at in (0, len(raw) - 1):
            assert changes(tensor, lambda t, raw=raw, at=at: raw[at].add_(1))


@pytest.mark.parametrize("change", [
    lambda t: t.copy_(t.flip(0)), lambda t: t.copy_(-t), lambda t: t.copy_(t.roll(1)), lambda t: t.zero_(), lambda t: t.add_(1),
    lambda t: t[:2].copy_(t[:2].flip(0)), lambda t: t.neg_().neg_().view(torch.int32)[:4].bitwise_xor_(1),
    lambda t: t.fill_(math.nan)])
def test_changes_that_a_plain_sum_might_not_see(change):
    assert changes(torch.randn(2 * audit.CHUNK, generator=torch.Generator().manual_seed(3)), change)


def test_nothing_changes_by_itself_not_even_nan():
    tensor, random = torch.full((100, 30), math.nan)[:, 3:20], torch.get_rng_state()
    assert not changes(tensor, lambda t: None) and torch.equal(random, torch.get_rng_state())
    assert fingerprint({"a": tensor}, CPU) != fingerprint({"b": tensor}, CPU)
