"""The FP8 runners: what they launch, by the stand-in of test_runs.py, and one of them whole, emulated on a CPU."""

import os
import shutil
import subprocess
import sys

import pytest

from nanochat.config import parse_config
from nanochat.features import FEATURES
from test_runs import ROOT, TRAINER, sandbox, with_gpus, write_program  # noqa: F401  (sandbox is a fixture)

COLUMNS = ("variant use_fp8 fp8_backend fp8_recipe exit_code status elapsed_sec max_tok_per_sec avg_tok_per_sec final_loss "
           "min_val_bpb peak_vram_mib fp8_layers").split()
PRESET = ["--fp8-skip-lm-head", "--fp8-skip-attn-qk", "--fp8-min-dim=256", "--fp8-no-allow-in-graph"]
NAMES = ("variant", "fp8", "custom", "torchao", "baseline", "debug", "compiled")


def compare(sandbox, runner="fp8_compare.sh", arguments="", **environment):
    """-> (process, its table as lists of cells, base_train's arguments by variant, in the order of the runs)."""
    write_program(sandbox.python, TRAINER)
    process, calls = sandbox.launch(runner, arguments, **{"NANOCHAT_BASE_DIR": str(sandbox.root / "base"), **environment})
    table = [line.split() for line in process.stdout.splitlines() if line.split()[:1] and line.split()[0] in NAMES]
    runs = [call[2:] for call in calls if "scripts.base_train" in call]
    return process, table, {run[0].rpartition("_")[2]: run for run in runs}


def fp8_flags(arguments):
    return [a for a in arguments if "fp8" in a and "model-tag" not in a]


def test_fp8_is_compared_with_bf16_in_the_reference_table(sandbox):
    process, table, runs = compare(sandbox)
    assert process.returncode == 0, process.stderr
    numbers = "0 ok 198 1401 1300.26 4.913683 1.500000 3778.14 NA".split()
    assert table == [COLUMNS, ["fp8", "1", "custom", "tensorwise", *numbers], ["baseline", "0", "NA", "NA", *numbers]]
    assert list(runs) == ["fp8", "baseline"] and fp8_flags(runs["baseline"]) == []
    assert fp8_flags(runs["fp8"]) == ["--fp8", "--fp8-backend=custom", "--fp8-recipe=tensorwise", *PRESET]
    rest = [[a for a in run if a not in fp8_flags(run) and "model-tag" not in a] for run in runs.values()]
    assert rest[0] == rest[1], "the runs differ in FP8 alone"
    assert "note:" not in process.stderr


def test_the_backends_are_compared(sandbox):
    process, table, runs = compare(sandbox, "fp8_backend_compare.sh", "--run='two words'", FP8_EMULATE="1", FP8_RECIPE="")
    assert process.returncode == 0, process.stderr
    assert [row[:4] for row in table[1:]] == [["custom", "1", "custom", "tensorwise"], ["torchao", "1", "torchao", "tensorwise"],
                                              ["baseline", "0", "NA", "NA"]]
    assert all(run[-1] == "--run=two words" for run in runs.values())
    assert "--fp8-emulate" in runs["custom"] and "--fp8-emulate" in runs["torchao"] and fp8_flags(runs["baseline"]) == []
    assert "--fp8-no-allow-in-graph" in runs["custom"] and "--fp8-no-allow-in-graph" not in runs["torchao"]


def test_debugging_runs_two_steps_checked_and_two_compiled(sandbox):
    process, table, runs = compare(sandbox, "fpi_debug.sh")
    assert process.returncode == 0, process.stderr
    assert table[0] == COLUMNS and [row[0] for row in table[1:]] == list(runs) == ["debug", "compiled"]
    assert all("--num-iterations=2" in run and "--fp8" in run for run in runs.values())
    assert runs["debug"][-2:] == ["--no-compile", "--fp8-debug"] and "--fp8-debug" not in runs["compiled"]


def test_a_variant_that_fails_leaves_its_row_and_the_other(sandbox):
    process, table, runs = compare(sandbox, OOM="fp8")
    assert process.returncode == 4 and list(runs) == ["fp8", "baseline"]
    assert table[1][:6] == ["fp8", "1", "custom", "tensorwise", "4", "oom"] and table[2][5] == "ok"


@pytest.mark.parametrize("runner", ["fp8_compare.sh", "fp8_backend_compare.sh", "fpi_debug.sh"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_runs_are_valid(sandbox, runner, device):
    pytest.importorskip("torchao")
    with_gpus(sandbox, 1)
    _, _, runs = compare(sandbox, runner, DEVICE_TYPE=device, FP8_EMULATE="1", FP8_FLAGS=" ".join(PRESET[:3]))
    for name, arguments in runs.items():
        assert parse_config(FEATURES, argv=arguments).features["fp8"].fp8 == (name != "baseline")


def test_the_comparison_on_a_cpu(tmp_path):
    """Text, FP8 emulated, bf16, table: d1 for two steps."""
    (tmp_path / "text").mkdir()
    for name in ("gpt", "optim", "dataset", "tokenizer"):
        shutil.copy(ROOT / "nanochat" / f"{name}.py", tmp_path / "text")
    environment = dict(SKIP_SETUP="1", PYTHON=sys.executable, DATA=str(tmp_path / "text"), NANOCHAT_BASE_DIR=str(tmp_path / "base"),
                       DEVICE_TYPE="cpu", DEPTH="1", HEAD_DIM="64", MAX_SEQ_LEN="64", VOCAB_SIZE="300", DEVICE_BATCH_SIZE="1",
                       TOTAL_BATCH_SIZE="64", NUM_ITERATIONS="2", EVAL_TOKENS="128", FP8_EMULATE="1",
                       FP8_FLAGS="--fp8-skip-lm-head --fp8-skip-attn-qk --fp8-min-dim=64")
    done = subprocess.run(["bash", ROOT / "runs" / "fp8_compare.sh", "--no-compile"], env=os.environ | environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()][-4:-1]
    assert table[0] == COLUMNS and [(row[0], row[5], row[-1]) for row in table[1:]] == [("fp8", "ok", "4/8"), ("baseline", "ok", "NA")]
    assert "Converted FP8 layers: 4/8 (50.00%)" in done.stdout
