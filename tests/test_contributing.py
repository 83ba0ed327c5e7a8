"""The worked example of CONTRIBUTING.md is a feature that works: the file that a reader would write from it is trained with."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from features.test_features import STEPS, final_bytes, steps_of, train
from nanochat.common import UserError
from nanochat.features import FEATURES

ROOT = Path(__file__).parent.parent
LIMIT = 0.5  # below every step's norm


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The class of the example, from a file that holds its code block and nothing else."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    code, = (block for block in blocks if "(Feature)" in block)
    path = tmp_path_factory.mktemp("example") / "clip_gradients.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("clip_gradients", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipGradients


def clip(base, tag, example, limit, *extra):
    return train(base, tag, "--no-compile", f"--clip-grad-norm={limit}", *extra, features=(*FEATURES, example))


def test_off_it_changes_no_bit(base, example):
    """Nor does a limit that no step reaches."""
    without = train(base, "without", "--no-compile", features=FEATURES)
    for run in (clip(base, "off", example, 0), clip(base, "high", example, 1e9)):
        assert steps_of(run) == steps_of(without) and final_bytes(run) == final_bytes(without)


def test_the_second_flag_needs_the_first(base, example):
    with pytest.raises(UserError, match="--clip-after-step"):
        clip(base, "refused", example, 0, "--clip-after-step=2")
    run = clip(base, "later", example, LIMIT, "--clip-after-step=2")
    assert json.loads((run.plan.run_dir / "result.json").read_text())["clipped_steps"] == STEPS - 2


def test_on_it_bounds_the_gradient(base, example):
    seen = []

    class Watched(example):
        def after_backward(self, model, step):
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            super().after_backward(model, step)
            clipped = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            seen.append((torch.stack(norms).norm().item(), torch.stack(clipped).norm().item()))

    run, off = clip(base, "on", Watched, LIMIT), clip(base, "off", example, 0)
    assert len(seen) == STEPS and all(before > LIMIT and after == pytest.approx(LIMIT, rel=1e-3) for before, after in seen)
    assert final_bytes(run) != final_bytes(off)
    assert json.loads((run.plan.run_dir / "result.json").read_text())["clipped_steps"] == STEPS


def test_on_it_survives_a_resume(base, example):
    whole = clip(base, "whole", example, LIMIT)
    halved = whole.plan.run_dir.with_name("halved")
    shutil.copytree(whole.plan.run_dir, halved)
    for step in (6, STEPS):
        shutil.rmtree(halved / f"step_{step:06d}")
    resumed = clip(base, halved.name, example, LIMIT, "--resume-from-step=latest")
    assert resumed.recorder.first_step == 3 and final_bytes(resumed) == final_bytes(whole)
    assert json.loads((halved / "result.json").read_text())["clipped_steps"] == STEPS
