"""Command lines: what parses, what is refused, and that a refusal lists everything at once. Their exact words are in
tests/messages.golden."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat.cli.flags import flag
from nanochat.common import UserError
from nanochat.features import FEATURES, Feature
from nanochat.training.config import parse_config

ROOT = Path(__file__).parents[2]
NANOCHAT_SPEEDRUN = ("--depth=24 --target-param-data-ratio=8 --device-batch-size=16 --run=dummy --model-tag=d24 "
                     "--aspect-ratio=64 --head-dim=128 --max-seq-len=2048 --window-pattern=SSSL --num-iterations=-1 "
                     "--target-flops=-1.0 --total-batch-size=-1 --embedding-lr=0.3 --unembedding-lr=0.008 "
                     "--weight-decay=0.28 --matrix-lr=0.02 --scalar-lr=0.5 --warmup-steps=40 --warmdown-ratio=0.65 "
                     "--final-lr-frac=0.05 --resume-from-step=-1 --eval-every=250 --eval-tokens=41943040 "
                     "--core-metric-every=999999 --core-metric-max-per-task=-1 "
                     "--sample-every=-1 --save-every=-1 --device-type=cpu")


def refusal(*argv, features=FEATURES) -> str:
    with pytest.raises(UserError) as e:
        parse_config(features, list(argv))
    return str(e.value)


def test_a_nanochat_command_line_runs_as_it_is():
    config = parse_config(FEATURES, NANOCHAT_SPEEDRUN.split())
    assert config.model.depth == 24 and config.optim.matrix_lr == 0.02 and config.model_tag == "d24"


def test_defaults_are_the_recipes():
    config = parse_config(FEATURES, [])
    assert (config.model.depth, config.horizon.device_batch_size, config.optim.weight_decay) == (20, 32, 0.28)
    assert config.model_tag == "d20" and config.flat()["warmdown_ratio"] == 0.65


def test_every_problem_is_in_one_message():
    message = refusal("--depht=4", "--seed=x", "--window-pattern=SX", "--num-iterations=0")
    assert all(name in message for name in ("--depht", "--depth", "--seed"))
    message = refusal("--window-pattern=SX", "--num-iterations=0", "--model-tag=a/b", "--target-metric-name=val_bpb",
                      "--keep-last=2")
    assert len(message.splitlines()) == 1 + 5 and all(f in message for f in (
        "--window-pattern", "--num-iterations", "--model-tag", "--target-metric-threshold", "--keep-last"))


@pytest.mark.parametrize("argv, parts", [
    (["--device-batch-size=3", "--max-seq-len=512", "--total-batch-size=16384"], ["--total-batch-size", "15,360", "16,896"]),
    (["--batch-multiplier=0.7", "--total-batch-size=65536"], ["--batch-multiplier", "--total-batch-size"]),
    (["--result-json=/no/such/folder/result.json"], ["--result-json", "/no/such/folder"]),
    (["--resume-from-step=newest"], ["--resume-from-step", "latest"]),
    (["--keep-last=0", "--save-every=1"], ["--keep-last"]),
    (["--dtype=bf16"], ["--dtype", "bfloat16"]),
    (["--head-dim=63"], ["--head-dim", "64"]),
    (["--depth=1", "--aspect-ratio=2", "--head-dim=4"], ["--depth", "--aspect-ratio", "--head-dim"]),
    (["--warmdown-ratio=1.5"], ["--warmdown-ratio"]),
    (["--tracker", "none", "wandb"], ["--tracker"]),
    (["--compile-cache-dir=x", "--no-compile"], ["--compile-cache-dir", "--no-compile"]),
    (["--compile-parts", "--no-compile"], ["--compile-parts", "--no-compile"]),
    (["--depth"], ["--depth"]),
    (["--matrix-lr=nan"], ["--matrix-lr"]),
    (["--target-param-data-ratio=-1"], ["--num-iterations", "--target-flops", "--target-param-data-ratio"]),
    (["extra"], ["extra"]),
])
def test_refusals_name_flags_and_values(argv, parts):
    message = refusal(*argv)
    assert all(part in message for part in parts)


@pytest.mark.parametrize("argv", [
    ["--num-iterations=5", "--target-param-data-ratio=8"],  # the ratio still sets batch and weight decay
    ["--eval-every=-1", "--eval-tokens=256"],               # base_eval evaluates on as many
    ["--compile-parts", "--block-update-schedule=dynamic_suffix"],
    ["--recompute-activations", "--bf16-momentum", "--deferred-loss-logging"],
    ["--core-metric-every=-1", "--core-metric-max-per-task=500", "--keep-last=-1"],  # defaults, typed
    ["--num-iterations=-1", "--target-flops=1e15"],
], ids=" ".join)
def test_flags_with_an_effect_are_not_refused(argv):
    parse_config(FEATURES, argv)


def test_what_the_memory_estimate_needs():
    assert parse_config(FEATURES, []).memory_fields() == {"recompute": False, "momentum_bytes": 4}
    config = parse_config(FEATURES, ["--recompute-activations", "--bf16-momentum"])
    assert config.memory_fields() == {"recompute": True, "momentum_bytes": 2}


def test_world_size_counts_in_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "for each of 3 ranks: use 3,072 or 4,608" in refusal("--device-batch-size=1", "--max-seq-len=512",
                                                                "--total-batch-size=4096")


@pytest.mark.parametrize("ranks, flags, rows", [
    (2, "--device-batch-size=8", 4), (2, "--device-batch-size=3", 2), (4, "--device-batch-size=8", 2),
    (8, "--device-batch-size=8", 1), (1, "", 8), (2, "", 4), (1, "--device-batch-size=4", 4), (2, "--device-batch-size=2", 2)])
def test_ranks_share_the_rows_of_a_step(monkeypatch, ranks, flags, rows):
    """4 096 tokens are 8 rows: the flags of one device serve for several, and no number of rows means one that fits."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config = parse_config(FEATURES, [*flags.split(), "--max-seq-len=512", "--total-batch-size=4096"])
    horizon = config.plan(config.model.shape(512), ranks)
    assert config.horizon.device_batch_size == rows
    assert rows * 512 * ranks * horizon.grad_accum_steps == horizon.total_batch_size == 4096


def test_whole_numbers_may_be_written_with_exponents():
    assert parse_config(FEATURES, ["--eval-tokens=5e5"]).eval.eval_tokens == 500_000


def test_a_features_flags_and_checks_take_part():
    class Sized(Feature):
        name = "sized"

        @dataclass
        class Config:
            """A feature of the test's"""
            size: int = flag(3, "its size", low=1)

        @classmethod
        def validate(cls, config):
            return ["--size is more than --depth"] if config.features["sized"].size > config.model.depth else []

    config = parse_config([*FEATURES, Sized], ["--size=7"])
    assert config.features["sized"].size == 7 and config.flat()["size"] == 7
    assert "--size" in refusal("--size=7", "--depth=4", features=[*FEATURES, Sized])


def test_no_flag_and_no_feature_has_the_name_of_another():
    names = [name for group in parse_config(FEATURES, []).groups() for name in vars(group)]
    assert len(names) == len(set(names)) and len({f.name for f in FEATURES}) == len(FEATURES)


def test_a_bad_command_line_exits_with_2_within_3_seconds():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", "--depht=4", "--seed=x"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and all(name in done.stderr for name in ("--depht", "--seed"))
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 3


def test_explain_needs_neither_text_nor_torch():
    code = """import sys, runpy
sys.argv = ["x", "--explain", "--depth=12"]
try: runpy.run_module("scripts.base_train", run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "84,935,088" in done.stdout and "524,288" in done.stdout


@pytest.mark.parametrize("argv, rows, fewer", [
    ([], 32, True), (["--device-batch-size=-1"], 32, True), (["--device-batch-size=32"], 32, False),
    (["--device-batch-size=12", "--auto-batch"], 12, True), (["--device-batch-size=1"], 1, False)])
def test_rows_that_are_not_given_may_be_fewer(argv, rows, fewer):
    """Whatever reads the number of rows finds the most there may be, in the records too."""
    config = parse_config(FEATURES, argv)
    assert config.horizon.device_batch_size == config.flat()["device_batch_size"] == rows
    assert config.horizon.takes_what_fits == fewer


def test_a_micro_batch_has_rows():
    assert "--device-batch-size must be positive, or -1 to derive it, got 0" in refusal("--device-batch-size=0")
    assert "--device-batch-size must be at least -1" in refusal("--device-batch-size=-2")


def test_without_a_number_rows_follow_from_the_tokens_of_a_step():
    assert "rows of 512 tokens (--max-seq-len): use 7,680 or 8,192" in refusal("--max-seq-len=512", "--total-batch-size=8000")
    for tokens, rows in ((8192, 16), (16384, 32), (32768, 32), (512, 1)):
        config = parse_config(FEATURES, ["--max-seq-len=512", f"--total-batch-size={tokens}"])
        assert config.horizon.device_batch_size == rows
