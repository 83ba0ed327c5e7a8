"""kill -9 at random steps and while a checkpoint is being written, for features alone and together: nothing is lost.

`python -m scripts.prove_resume` does the same with more kills.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.lab.resume_proof import ProofFlags, TrainingProcess, fingerprint, prove, split_arguments
from processes import Served

ROOT = Path(__file__).parents[2]
SUFFIX = ["--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=2", "--dyn-probe-every=4", "--dyn-refresh-every=0",
          "--dyn-relevance-threshold=0.5", "--dyn-freeze-start-frac=0", "--dyn-min-active-layers=1", "--dyn-adapt-budget"]
FP8 = ["--fp8", "--fp8-emulate", "--fp8-min-dim=16"]
COMBINATIONS = {
    "plain": [], "suffix": SUFFIX, "fp8": [*FP8, "--deferred-loss-logging"],
    "all": [*SUFFIX, *FP8, "--chunked-ce", "--keep-last=2"],
}


def flags(base, *extra):
    return (f"--depth=4 --head-dim=16 --aspect-ratio=8 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
            f"--num-iterations=16 --warmup-steps=2 --eval-every=6 --eval-tokens=256 "
            f"--core-metric-every=-1 --sample-every=-1 --save-every=3 --vocab-size=300 --device-type=cpu --no-compile "
            f"--data={base / 'text'}").split() + list(extra)


def launch(argv, base, tag, *more):
    base.mkdir(exist_ok=True)
    process = Served([*argv, f"--model-tag={tag}", *more], base, base / f"{tag}.log")
    return TrainingProcess(process, process.log)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_killed_runs_end_in_the_same_bits(base, name):
    certificate = prove(ProofFlags(kills=3), flags(base, *COMBINATIONS[name]), base / name, launch)
    assert certificate["equal"] and certificate["differing"] == [], certificate["differing"]
    assert certificate["kills"] == 3 and certificate["kills_while_saving"] >= 1
    assert certificate["steps"] == 16


@pytest.mark.slow
def test_the_proof_finds_what_differs(base):
    """Another seed changes all bits except the learning rates; another rate changes the bits from the same batches."""
    for tag, extra in (("one", []), ("other", ["--seed=7"]), ("rates", ["--lr-multiplier=19"])):
        launch(flags(base, *extra), base / "differ", tag).expect_success()
    one, other, rates = (fingerprint(base / "differ/base_checkpoints" / tag) for tag in ("one", "other", "rates"))
    assert {name for name in one if one[name] == other[name]} == {"steps", "lr_multiplier", "step_kind", "active_start"}
    assert one["batch_crc32"] == rates["batch_crc32"] and one["loss"] != rates["loss"] and one["weights"] != rates["weights"]


def test_a_run_that_fails_is_reported(base):
    with pytest.raises(UserError, match="no/such"):
        launch(flags(base, "--data=/no/such/text"), base / "fails", "fails").expect_success()


def test_flags_are_split():
    own, rest = split_arguments(["--kills", "3", "--depth=4", "--keep", "--data", "python", "--kill-seed=5"])
    assert (own.kills, own.keep, own.kill_seed) == (3, True, 5) and rest == ["--depth=4", "--data", "python"]


@pytest.mark.slow
def test_the_script(base, tmp_path, quick_python):
    """A proof from the command line. Relative paths start at the user's working directory, also for the runs that it starts in
    another one, which read the text."""
    shutil.copytree(base / "text", tmp_path / "mine")
    done = subprocess.run([quick_python, "-m", "scripts.prove_resume", "--kills=2", "--certificate=proof.json",
                           "--max-chars=-1", *flags(base), "--data=mine", "--num-iterations=6", "--save-every=2"], cwd=tmp_path,
                          env=os.environ | {"NANOCHAT_BASE_DIR": "base-of-mine", "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["equal"] and proof["kills"] == 2 and proof["weights"][:16] in done.stdout
    assert (tmp_path / "base-of-mine").is_dir()
    assert not list((tmp_path / "base-of-mine").iterdir())  # the proof's own base was in there, and is deleted
    refused = subprocess.run([sys.executable, "-m", "scripts.prove_resume", "--model-tag=x", "--kills=1"], cwd=ROOT,
                             capture_output=True, text=True)
    assert refused.returncode == 2 and "--kills must be at least 2" in refused.stderr
