"""Command lines: what parses, what is refused, and that a refusal lists everything at once."""

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
    assert "did you mean --depth?" in message and "--seed must be a whole number, got 'x'" in message
    message = refusal("--window-pattern=SX", "--num-iterations=0", "--model-tag=a/b", "--target-metric-name=val_bpb")
    assert message.startswith("4 problems") and all(f in message for f in (
        "--window-pattern", "--num-iterations", "--model-tag", "--target-metric-threshold"))


@pytest.mark.parametrize("argv, advice", [
    (["--device-batch-size=3", "--max-seq-len=512", "--total-batch-size=16384"], "use 15,360 or 16,896"),
    (["--batch-multiplier=0.7", "--total-batch-size=65536"], "give one of them"),
    (["--result-json=/no/such/folder/result.json"], "Make it first"),
    (["--resume-from-step=newest"], "'latest' or -1"),
    (["--keep-last=0"], "at least 1, or -1 to keep all"),
    (["--dtype=bf16"], "did you mean bfloat16?"),
    (["--head-dim=63"], "use 64"),
    (["--depth=1", "--aspect-ratio=2", "--head-dim=4"], "raise --depth"),
    (["--warmdown-ratio=1.5"], "at most 1"),
    (["--tracker", "none", "wandb"], "excludes the others"),
    (["--compile-cache-dir=x", "--no-compile"], "leave one of them out"),
    (["--compile-parts", "--no-compile"], "leave one of them out"),
    (["--depth"], "expected one argument"),
    (["--matrix-lr=nan"], "must be a number"),
    (["--target-param-data-ratio=-1"], "no horizon"),
    (["extra"], "unexpected argument 'extra'"),
])
def test_refusals_say_what_to_do(argv, advice):
    assert advice in refusal(*argv)


def test_world_size_counts_in_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 ranks" in refusal("--device-batch-size=1", "--max-seq-len=512", "--total-batch-size=4096")


def test_whole_numbers_may_be_written_with_exponents():
    assert parse_config(FEATURES, ["--eval-tokens=5e5"]).eval.eval_tokens == 500_000


def test_a_rooms_flags_and_checks_take_part():
    class Room(Feature):
        name = "room"

        @dataclass
        class Config:
            """A room of the test's"""
            room_size: int = flag(3, "its size", low=1)

        @classmethod
        def validate(cls, config):
            return ["--room-size is more than --depth"] if config.features["room"].room_size > config.model.depth else []

    config = parse_config([*FEATURES, Room], ["--room-size=7"])
    assert config.features["room"].room_size == 7 and config.flat()["room_size"] == 7
    assert "--room-size is more than --depth" in refusal("--room-size=7", "--depth=4", features=[*FEATURES, Room])


def test_rooms_do_not_share_flags_or_names():
    config = parse_config(FEATURES, [])
    groups = [vars(getattr(config, g)) for g in ("run", "data", "model", "horizon", "optim", "eval")]
    groups += [vars(c) for c in config.features.values()]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names)) and len({f.name for f in FEATURES}) == len(FEATURES)


def test_a_bad_command_line_exits_with_2_within_3_seconds():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", "--depht=4", "--seed=x"],
                          capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "2 problems" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - started < 3


def test_explain_needs_neither_text_nor_torch():
    code = """import sys, runpy
sys.argv = ["x", "--explain", "--depth=12"]
try: runpy.run_module("scripts.base_train", run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "84,935,088" in done.stdout and "524,288 in 8 micro-batches" in done.stdout
