"""The FP8 runners: the runs they ask the lab for, with the stub of test_runs.py, and one runner in full, emulated on a CPU."""

import json
import os
import re
import subprocess

import pytest

from nanochat.lab.rows import make_row, run_fields, table_of
from test_runs import ROOT, Comparison, sandbox, with_gpus  # noqa: F401  (sandbox is a fixture)
from training_text import write_text

COLUMNS = ("variant use_fp8 fp8_backend fp8_recipe exit_code status elapsed_sec max_tok_per_sec avg_tok_per_sec final_loss "
           "min_val_bpb peak_vram_mib fp8_layers").split()
PRESET = ["--fp8-skip-lm-head", "--fp8-skip-attn-qk", "--fp8-min-dim=256", "--fp8-no-allow-in-graph"]


def fp8_flags(arguments):
    return [a for a in arguments if "fp8" in a]


def test_fp8_and_bf16_differ_in_fp8_alone(sandbox):
    compared = Comparison(sandbox, "fp8_compare.sh", "--run='two words'", FP8_EMULATE="1", USE_FP8="1")
    own = ["--fp8", "--fp8-emulate", "--fp8-backend=custom", "--fp8-recipe=tensorwise", *PRESET]
    assert compared.runs["fp8"] == [*compared.runs["baseline"], *own] and fp8_flags(compared.runs["baseline"]) == []
    assert compared.runs["baseline"][-1] == "--run=two words"


def test_the_backends_are_compared(sandbox):
    pytest.importorskip("torchao")
    runs = Comparison(sandbox, "fp8_backend_compare.sh", FP8_EMULATE="1", FP8_RECIPE="").runs
    assert list(runs) == ["custom", "torchao", "baseline"] and fp8_flags(runs["baseline"]) == []
    for name in ("custom", "torchao"):
        assert {"--fp8", "--fp8-emulate", f"--fp8-backend={name}", "--fp8-recipe=tensorwise"} <= set(runs[name])
    assert "--fp8-no-allow-in-graph" in runs["custom"] and "--fp8-no-allow-in-graph" not in runs["torchao"]


def test_debugging_runs_two_steps_checked_and_two_compiled(sandbox):
    compared = Comparison(sandbox, "fpi_debug.sh", "--fp8-log-modules", FP8_EMULATE="1")
    assert list(compared.runs) == ["debug", "compiled"] and compared.lab[2].show_output
    assert all("--num-iterations=2" in flags and "--fp8" in flags for flags in compared.runs.values())
    assert compared.runs["debug"][-2:] == ["--no-compile", "--fp8-debug"] and "--fp8-debug" not in compared.runs["compiled"]


@pytest.mark.parametrize("runner", ["fp8_compare.sh", "fp8_backend_compare.sh", "fpi_debug.sh"])
def test_the_runs_are_valid_on_a_gpu(sandbox, runner):
    pytest.importorskip("torchao")
    with_gpus(sandbox, 1)
    for name, config in Comparison(sandbox, runner, FP8_EMULATE="1", FP8_FLAGS=" ".join(PRESET[:3])).configs.items():
        assert config.features["fp8"].fp8 == (name != "baseline") and config.run.device_type == "cuda"


@pytest.mark.slow
def test_the_comparison_on_a_cpu(sandbox, tmp_path, quick_python):
    """Text, FP8 emulated, table: d1 for two steps. Without bf16: its row of the same table is made from a result.json."""
    write_text(tmp_path / "text")
    environment = dict(SKIP_SETUP="1", PYTHON=quick_python, DATA=str(tmp_path / "text"),
                       NANOCHAT_BASE_DIR=str(tmp_path / "base"), DEVICE_TYPE="cpu", DEPTH="1", HEAD_DIM="64", MAX_SEQ_LEN="64",
                       VOCAB_SIZE="300", DEVICE_BATCH_SIZE="1", TOTAL_BATCH_SIZE="64", NUM_ITERATIONS="2", EVAL_TOKENS="128",
                       FP8_EMULATE="1", FP8_VARIANTS="fp8",
                       FP8_FLAGS="--fp8-skip-lm-head --fp8-skip-attn-qk --fp8-min-dim=64")
    done = subprocess.run(["bash", ROOT / "runs" / "fp8_compare.sh", "--no-compile"], env=os.environ | environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    begin = re.search("^variant ", done.stdout, re.MULTILINE).start()
    columns, row = (line.split() for line in done.stdout[begin:].splitlines()[:2])
    assert columns == COLUMNS and row[:6] == ["fp8", "1", "custom", "tensorwise", "0", "ok"] and row[-1] == "4/8"
    folder, = (tmp_path / "base" / "lab").glob("fp8_compare-*")
    log, = folder.glob("cells/fp8-*/log.txt")
    assert log.read_text().startswith("+ ") and "Converted FP8 layers: 4/8 (50.00%)" in log.read_text()

    compared = Comparison(sandbox, "fp8_compare.sh", FP8_EMULATE="1")
    result = {"status": "oom", "exit_code": 1, "tok_per_sec_max": 1400.7, "train_time_sec": 198.4}
    flags = compared.runs["baseline"]
    ended = make_row("fp8", "baseline", 42, "cell", flags, result, 1) | {"flags": flags}
    (folder / "cells" / "cell").mkdir()
    (folder / "cells" / "cell" / "result.json").write_text(json.dumps(result))
    table = table_of(compared.lab[2].columns, [run_fields(folder, ended)])
    assert table.splitlines()[1].split() == "baseline 0 NA NA 1 oom 198 1401 NA NA NA NA NA".split()
