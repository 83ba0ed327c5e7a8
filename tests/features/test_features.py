"""Features: switched off, none changes a bit of a run; switched on, each survives a kill and a resume, and so do the switches
that need no hook. The hooks are called when they say, which a feature of this test shows: it trains suffixes."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from nanochat.cli.flags import flag
from nanochat.common import UserError
from nanochat.features import FEATURES, Feature
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from processes import anew, python_m

SWITCHED_ON = {  # flags that switch each feature on
    "fp8": ["--no-compile", "--fp8", "--fp8-emulate", "--fp8-min-dim=16"],
    "cast_once": ["--no-compile", "--cast-once", "--dtype=bfloat16"],
    "chunked_ce": ["--no-compile", "--chunked-ce", "--ce-chunk-tokens=48"],  # of 64
    "progressive_depth": ["--no-compile", "--initial-depth=2", "--depth-growth-frac=0.6"],
    "fused_rmsnorm": ["--no-compile", "--fused-rmsnorm"],
    "suffix": ["--no-compile", "--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=1", "--dyn-probe-every=4",
               "--dyn-refresh-every=0", "--dyn-relevance-threshold=0.5", "--dyn-freeze-start-frac=0",
               "--dyn-final-full-frac=0.13", "--dyn-min-active-layers=1", "--dyn-adapt-budget"],
    "alternate": ["--no-compile", "--alternate-from=3"],
}
COMPILED = ["--compile", "--compile-cache-dir={cache}", "--depth=1", "--aspect-ratio=32"]
SWITCHES = {  # the same of optimizations without hooks
    "bf16_momentum": ["--no-compile", "--bf16-momentum"],
    "deferred_loss": ["--no-compile", "--deferred-loss-logging"],
    "compile_cache": COMPILED,
    "recompute": [*COMPILED, "--recompute-activations"],
}
STEPS = 8


class Alternate(Feature):
    """Trains the upper half on odd steps, notes which hooks are called, and keeps a state that decides the next step. It puts a
    function of its own in the place of the model's attention, as any feature may."""
    name = "alternate"

    @dataclass
    class Config:
        """Alternate"""
        alternate_from: int = flag(-1, "first step on which only the upper half may be trained; -1 is off")

    @classmethod
    def enabled(cls, config):
        return config.features[cls.name].alternate_from >= 0

    def __init__(self, config):
        super().__init__(config)
        self.frozen, self.evaluations, self.gradients, self.called = False, 0, [], []

    def on_model(self, model, horizon):
        self.half, attention = model.config.n_layer // 2, model.kernels.attention
        model.kernels.attention = lambda q, k, v, window: attention(q, k, v, window)

    def before_step(self, step):
        self.called.append(("before_step", step))
        self.frozen = not self.frozen and step >= self.config.alternate_from
        return {"active_start": self.half if self.frozen else 0}

    def after_backward(self, model, step):
        self.called.append(("after_backward", step))
        self.gradients.append([block.mlp.c_fc.weight.grad is not None for block in model.transformer.h])

    def on_weights_changed(self):
        self.called.append(("on_weights_changed",))

    def after_step(self, step, loss, time):
        assert loss > 0 and time.total > 0
        self.called.append(("after_step", step))

    @contextmanager
    def eval_context(self, model):
        self.evaluations += 1
        yield

    def step_columns(self):
        self.called.append(("step_columns",))
        return {"step_kind": "suffix" if self.frozen else "full", "active_start": self.half if self.frozen else 0,
                "active_layers": self.half if self.frozen else 2 * self.half}

    def summary(self):
        return {"schedule": "alternate"}

    def state_dict(self):
        return {"frozen": self.frozen}

    def load_state_dict(self, state):
        self.frozen = state["frozen"]


ALL = (*FEATURES, Alternate)


def flags(base, tag, *extra):
    return anew([*(f"--depth=4 --head-dim=8 --aspect-ratio=8 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
                   f"--num-iterations={STEPS} --warmup-steps=2 --eval-every=4 --eval-tokens=256 "
                   f"--core-metric-every=-1 --sample-every=-1 --save-every=3 --vocab-size=300 --device-type=cpu "
                   f"--data={base / 'text'} --model-tag={tag}").split(), *extra])


def train(base, tag, *extra, features=ALL):
    torch._dynamo.reset()  # no run takes over the graphs of an earlier one, which need not recompute what this one is to
    torch._dynamo.utils.counters.clear()
    run = build_run(parse_config(features, flags(base, tag, *extra)), features)
    assert fit(run) == 0 and ("--compile" in extra) == bool(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return run


def final_bytes(run):
    folder = run.plan.run_dir / f"step_{STEPS:06d}"
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def steps_of(run):
    rows = read_metrics(run.plan.run_dir / "metrics.jsonl")
    return [(r["step"], r["loss"], r["step_kind"], r["active_start"]) for r in rows if r["loss"] is not None]


def test_every_feature_is_tested_here():
    assert set(SWITCHED_ON) == {feature.name for feature in ALL}


@pytest.fixture(scope="module")
def all_off(base):
    """A run that could have every feature and has none."""
    return train(base, "all-off", "--no-compile")


@pytest.mark.parametrize("feature", ALL, ids=lambda f: f.name)
def test_switched_off_it_changes_no_bit(base, feature, all_off):
    without = train(base, "without", "--no-compile", features=tuple(f for f in ALL if f is not feature))
    assert steps_of(without) == steps_of(all_off) and final_bytes(without) == final_bytes(all_off)


@pytest.fixture(scope="module")
def cache(base, tmp_path_factory):
    """A cache of compiled graphs, as a process has left it that trained with COMPILED. Compiling takes most of a minute."""
    folder = tmp_path_factory.mktemp("compiled")
    done = python_m("scripts.base_train", *flags(base, "cached", *[flag.format(cache=folder) for flag in COMPILED]))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SWITCHED_ON, *SWITCHES])
def test_switched_on_it_survives_a_resume(base, name, request):
    on = (SWITCHED_ON | SWITCHES)[name]
    if "--compile" in on:
        on = [flag.format(cache=request.getfixturevalue("cache")) for flag in on]
    whole = train(base, f"whole-{name}", *on)
    halved = whole.plan.run_dir.with_name(f"halved-{name}")
    shutil.copytree(whole.plan.run_dir, halved)
    for step in (6, STEPS):
        shutil.rmtree(halved / f"step_{step:06d}")
    resumed = train(base, halved.name, *on, "--resume-from-step=latest")
    assert resumed.recorder.first_step == 3
    assert steps_of(resumed) == steps_of(whole) and final_bytes(resumed) == final_bytes(whole)


def test_hooks_are_called_when_they_say(base):
    run = train(base, "hooks", *SWITCHED_ON["alternate"])
    feature = run.state.features.enabled[-1]
    assert [row[2:] for row in steps_of(run)] == [("full", 0)] * 3 + [("suffix", 2), ("full", 0)] * 2 + [("suffix", 2)]
    assert feature.gradients == [[True] * 4] * 3 + [[False, False, True, True], [True] * 4] * 2 + [[False, False, True, True]]
    assert feature.evaluations == 3 + 3  # evaluations at 0, 4 and 8; checkpoints at 3, 6 and 8
    assert json.loads((run.plan.run_dir / "result.json").read_text())["schedule"] == "alternate"
    assert feature.called == [("on_weights_changed",)] + [call for step in range(STEPS) for call in (
        ("before_step", step), ("after_backward", step), ("on_weights_changed",), ("step_columns",), ("after_step", step))]


def test_a_columns_row_is_that_of_its_step_when_results_are_read_late(base):
    """With --deferred-loss-logging, after_step comes after the next step's launch."""
    at_once, later = (train(base, f"columns{len(more)}", *SWITCHED_ON["alternate"], *more)
                      for more in ([], ["--deferred-loss-logging"]))
    assert steps_of(at_once) == steps_of(later)
    called = later.state.features.enabled[-1].called
    assert called.index(("after_step", 0)) > called.index(("before_step", 1))


def test_frozen_blocks_and_their_state_do_not_change_by_a_bit(base):
    """Between the checkpoints of steps 3 and 4 only the upper half was trained."""
    from nanochat.checkpoint_manager import load_checkpoint
    run = train(base, "frozen", *SWITCHED_ON["alternate"], "--save-every=1")
    (before, state_before, _), (after, state_after, _) = (load_checkpoint(run.plan.run_dir, step) for step in (3, 4))
    for name in before:
        frozen = name.startswith(("transformer.h.0.", "transformer.h.1.", "transformer.wte", "value_embeds.1", "smear",
                                  "x0_lambdas", "resid_lambdas"))
        changed = not torch.equal(before[name], after[name])
        assert changed != frozen, name
        for key in (k for k in state_before if k.startswith(name + "/")):
            assert not frozen or torch.equal(state_before[key], state_after[key]), key


@pytest.mark.slow
def test_deferring_changes_no_number_and_no_row(base, all_off, tmp_path):
    """Nor beside a schedule that decides by the last loss: there a file's flag does not defer, and a typed one is refused."""
    def rows(run):
        timed = {"dt_ms", "tok_per_sec", "peak_mem_mib", "train_time_sec", "cost_share"}
        return [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(run.plan.run_dir / "metrics.jsonl")]
    profile = tmp_path / "deferred.flags"
    profile.write_text("--deferred-loss-logging")
    for other in (["--no-compile"], SWITCHED_ON["suffix"]):
        at_once = all_off if other == ["--no-compile"] else train(base, "at-once", *other)
        later = train(base, "later", *other, f"@{profile}")
        assert rows(at_once) == rows(later) and final_bytes(at_once) == final_bytes(later)
        assert later.defers_metrics == (other == ["--no-compile"])
    with pytest.raises(UserError, match="--deferred-loss-logging"):
        train(base, "refused", *SWITCHED_ON["suffix"], "--deferred-loss-logging")


@pytest.mark.slow
@pytest.mark.parametrize("others", ([], ["--chunked-ce"], SWITCHED_ON["suffix"],
                                    ["--fp8", "--fp8-emulate", "--fp8-min-dim=16", "--fp8-include-regex=mlp"]), ids=str)
def test_casting_once_changes_no_bit(base, others, tmp_path):
    """Also beside other features. Each layer that multiplies in bf16 is a CastOnceLinear. With fp32, where there is nothing to
    cast, --cast-once is refused; in a file of flags it does nothing."""
    flags = ["--no-compile", "--dtype=bfloat16", *others]
    each, once = train(base, "cast-each", *flags), train(base, "cast-once", *flags, "--cast-once")
    assert steps_of(each) == steps_of(once) and final_bytes(each) == final_bytes(once)
    kinds = [type(layer).__name__ for layer in once.state.model.linears().values()]
    assert "Linear" not in kinds and kinds.count("CastOnceLinear") == len(kinds) - kinds.count("Float8Linear") > 0
    if not others:
        with pytest.raises(UserError, match="--cast-once"):
            train(base, "cast-none", "--no-compile", "--dtype=float32", "--cast-once")
        profile = tmp_path / "cast.flags"
        profile.write_text("--cast-once")
        in_fp32 = train(base, "cast-none", "--no-compile", "--dtype=float32", f"@{profile}")
        assert {type(layer).__name__ for layer in in_fp32.state.model.linears().values()} == {"Linear"}


@pytest.mark.slow
def test_the_compile_cache_serves_another_process(base, cache):
    """It finds the first one's graphs: it compiles no C++ of its own."""
    libraries = {path: path.stat().st_mtime_ns for path in cache.rglob("*.so")}
    done = python_m("scripts.base_train", *flags(base, "cached", *[flag.format(cache=cache) for flag in COMPILED]))
    assert done.returncode == 0, done.stderr
    assert libraries and {path: path.stat().st_mtime_ns for path in cache.rglob("*.so")} == libraries


def test_a_compile_cache_that_cannot_be_written_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--compile-cache-dir"):
        train(base, "uncached", "--compile", f"--compile-cache-dir={tmp_path / 'file' / 'cache'}")
