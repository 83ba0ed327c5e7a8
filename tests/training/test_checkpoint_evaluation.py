"""The lab's evaluation of a finished run: bits per byte by definition, of its weights alone."""

import json
import shutil

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.cli.paths import list_steps
from nanochat.dataloader import val_batches
from nanochat.features import FEATURES
from nanochat.loss_eval import evaluate_bpb
from nanochat.runtime.device import evaluation
from nanochat.runtime.files import file_digest
from nanochat.tokenizer import Tokenizer
from nanochat.training.build import build_run
from nanochat.training.checkpoint_evaluation import Validation, answers
from nanochat.training.config import parse_config
from processes import tiny_flags, trained

EVERYTHING = 10**6  # tokens: more than the text has


@pytest.fixture(scope="module")
def run(base):
    """A run that has evaluated itself on all validation tokens, in fp32."""
    flags = tiny_flags(base, "good", "--num-iterations=4", "--dtype=float32", "--seed=1", f"--eval-tokens={EVERYTHING}")
    return trained(build_run(parse_config(FEATURES, flags)))


@pytest.fixture(scope="module")
def validation(run):
    return Validation(run.plan.tokens, run.plan.tokenizer, torch.device("cpu"))


def changed(run, name, change):
    """The run with another final checkpoint: `change` takes and returns (tensors, state). Its folder."""
    folder = run.plan.run_dir.with_name(name)
    shutil.copytree(run.plan.run_dir, folder)
    tensors, _, state = load_checkpoint(folder, "latest", with_optimizer=False)
    shutil.rmtree(folder / f"step_{state['step']:06d}")
    save_checkpoint(folder, state["step"], *change(tensors, state))
    return folder


def test_a_run_is_evaluated_as_defined(run, validation):
    """In fp32 on the same tokens a run that evaluates itself gets the same, whatever rows and kernels it takes."""
    answer, = answers([str(run.plan.run_dir)], validation, run.plan.tokenizer)
    own = run.state.stats.val_curve[-1][2]
    assert answer["bpb"] == pytest.approx(own, rel=1e-6) and answer["step"] == 4
    weights, = run.plan.run_dir.glob("step_*/model.safetensors")
    assert answer["weights_sha256"] == file_digest(weights)
    rows = run.plan.tokens.split("val").num_tokens // 33
    assert answer["tokens"] == 32 * rows and len(answer["validation_fingerprint"]) == 64


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_run_is_compared_with_itself_on_its_own_tokens(run, validation, rows):
    """It has read the first rows only, of which the last batch may hold a part."""
    def short(tensors, state):
        return tensors, {}, state | {"user_config": state["user_config"] | {"eval_tokens": 32 * rows - 5}}
    folder = changed(run, f"short-{rows}", short)
    whole, part = answers([str(run.plan.run_dir), str(folder)], validation, run.plan.tokenizer)
    assert whole["own_bpb"] == whole["bpb"] == part["bpb"] != part["own_bpb"]
    batches = list(val_batches(run.plan.tokens.split("val"), 32, 2, 32 * rows - 5, 0, 1, "cpu"))
    with evaluation(run.state.model):
        assert part["own_bpb"] == pytest.approx(evaluate_bpb(run.state.model, batches, None, validation.token_bytes), rel=1e-6)


def test_what_a_run_says_of_itself_does_not_count(run, validation):
    """Its records, its own tokenizer, its text, its numbers."""
    def lie(tensors, state):
        return tensors, {}, state | {"val_bpb": 0.1, "tokens": "/no/such/text", "user_config": {}, "numerics_environment": {}}
    folder = changed(run, "liar", lie)
    shutil.rmtree(folder / "tokenizer")
    (folder / "result.json").write_text(json.dumps({"val_bpb": 0.1}))
    honest, liar = answers([str(run.plan.run_dir), str(folder)], validation, run.plan.tokenizer)
    assert liar["bpb"] == honest["bpb"] and liar["weights_sha256"] == honest["weights_sha256"]


@pytest.mark.parametrize("name, change, message", [
    ("extra", lambda tensors, state: (tensors | {"adapter.weight": torch.ones(2)}, {}, state), "unexpected tensor adapter"),
    ("less", lambda tensors, state: ({n: t for n, t in tensors.items() if n != "x0_lambdas"}, {}, state), "lacks the tensor x0_"),
    ("wide", lambda tensors, state: (tensors, {}, state | {"model_config": state["model_config"] | {"n_embd": 64}}), "shape"),
    ("bytes", lambda tensors, state: (tensors, {}, state | {"model_config": state["model_config"] | {"vocab_size": 299}}),
     "predicts 299"),
    ("nan", lambda tensors, state: (tensors | {"lm_head.weight": tensors["lm_head.weight"] * torch.nan}, {}, state), "are nan"),
    ("other-text", lambda tensors, state: (tensors, {}, state | {"tokenizer": "0" * 32}), "another vocabulary")])
def test_another_model_has_no_result_and_does_not_stop_the_others(run, validation, name, change, message):
    bad = str(changed(run, name, change))
    first, second = answers([bad, str(run.plan.run_dir)], validation, run.plan.tokenizer)
    assert first["run_dir"] == bad and message in first["error"] and "bpb" not in first and second["bpb"] > 0


def test_a_damaged_checkpoint_is_named_and_no_earlier_one_taken(run, validation):
    folder = run.plan.run_dir.with_name("damaged")
    shutil.copytree(run.plan.run_dir, folder)
    shutil.copytree(folder / "step_000004", folder / "step_000009")
    answer, = answers([str(folder)], validation, run.plan.tokenizer)
    assert list_steps(folder) == [4, 9] and "damaged" in answer["error"]


def test_a_tokenizer_with_other_tokens_is_refused(run, validation):
    other = Tokenizer.train_from_iterator(["the other text, the other tokens"], 270)
    answer, = answers([str(run.plan.run_dir)], validation, other)
    assert "another vocabulary" in answer["error"]
