"""The shell runners: the commands they launch, what they do when a step fails, and set-up. No network, no training.

An interpreter that only records its arguments stands in for Python, so a test sees exactly what would be launched.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nanochat.cli.flags import build_parser, parse
from nanochat.features import FEATURES
from nanochat.lab.cli import Experiment, JudgeFlags, LabFlags, TableFlags
from nanochat.lab.rows import read_csv
from nanochat.training.config import Config, DataFlags, parse_config

ROOT = Path(__file__).resolve().parent.parent
RUNNERS = sorted(p for p in (ROOT / "runs").glob("*.sh") if p.name != "_lib.sh")
BASH = shutil.which("bash")
PYTEST = ["-m", "pytest", "--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile"]
STEPS = ["scripts.tok_train", "nanochat.dataset", "scripts.base_train", "scripts.base_eval", "scripts.sample"]

# Writes its arguments to $CALLS, one call a line, separated by tabs; exits 3 when the call contains $FAIL_AT. Values of profiles
# are read by a real interpreter.
RECORDER = f"""#!/bin/sh
case "$*" in "-m nanochat.cli.flag_files "*) PYTHONPATH='{ROOT}' exec '{sys.executable}' "$@" ;; esac
for a in "$@"; do printf '%s\\t' "$a" >> "$CALLS"; done; echo >> "$CALLS"
case "$*" in *"${{FAIL_AT:-nothing fails}}"*) exit 3 ;; esac
"""
# The same, and makes what `python -m venv DIR` and `uv venv DIR` would; $OLD and $NO_VENV imitate such interpreters.
FAKE_PYTHON = RECORDER + """
case "$*" in
    *version_info*) [ -z "$OLD" ] ;;
    *ensurepip*) [ -z "$NO_VENV" ] ;;
    "-m venv "*|"venv "*) for dir in "$@"; do :; done; mkdir -p "$dir/bin"; cp "$0" "$dir/bin/python" ;;
esac
"""


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


class Sandbox:
    """A copy of the runners with stand-ins for the programs they start, all first in PATH."""

    def __init__(self, folder):
        self.root, self.bin, self.calls_file = folder / "repo", folder / "bin", folder / "calls"
        for name in ("runs", "configs"):
            shutil.copytree(ROOT / name, self.root / name)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.bin.mkdir()
        self.python = write_program(self.bin / "stub", RECORDER)
        self.program("curl", "exit 7")        # PyTorch's index is out of reach
        self.program("nvidia-smi", "exit 9")  # no GPU
        self.program("uname", 'case "$1" in -s) echo Linux ;; *) echo Linux x86_64 ;; esac')
        for name in ("python3", "uv"):
            write_program(self.bin / name, FAKE_PYTHON)

    def program(self, name, body):
        write_program(self.bin / name, f"#!/bin/sh\n{body}\n")

    def run(self, command, cwd=None, **environment):
        """Run a bash command in a clean environment -> (process, the calls it made as lists of arguments)."""
        self.calls_file.write_text("")
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.root.parent),
                       "CALLS": str(self.calls_file), **environment}
        process = subprocess.run([BASH, "-c", command], cwd=cwd or self.root, env=environment, text=True, timeout=300,
                                 stdin=subprocess.DEVNULL, capture_output=True)
        return process, [line.split("\t")[:-1] for line in self.calls_file.read_text().splitlines()]

    def launch(self, runner="speedrun_small.sh", arguments="", **environment):
        return self.run(f"bash {self.root}/runs/{runner} {arguments}",
                        **{"SKIP_SETUP": "1", "PYTHON": str(self.python), **environment})

    def setup(self, **environment):
        return self.run("source runs/setup.sh; echo \"interpreter $PYTHON\"", **environment)


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


class Comparison:
    """What a runner has the lab run: base_train's flags by variant, all checked by the lab, and how."""

    def __init__(self, sandbox, runner, arguments="", **environment):
        process, calls = sandbox.launch(runner, arguments, **environment)
        assert process.returncode == 0, process.stderr
        command, *given = arguments_of(calls, "scripts.lab")
        self.modules, self.lab, self.given = modules_of(calls), parse([LabFlags, JudgeFlags, TableFlags], given), given
        first, others = Experiment(command, None, *self.lab).plans[None]
        self.runs = {v.name: list(v.flags) for v in (first, *others)}
        self.configs = {name: parse_config(FEATURES, flags) for name, flags in self.runs.items()}


def arguments_of(calls, module):
    """The arguments that `-m module` was called with."""
    matching = [call[call.index(module) + 1:] for call in calls if module in call]
    assert len(matching) == 1, f"{module} was called {len(matching)} times in {calls}"
    return matching[0]


def modules_of(calls):
    return [call[1] for call in calls if call[:1] == ["-m"] and call[1] != "nanochat.cli.paths"]  # which only says where


# --- every runner ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [*RUNNERS, *map(ROOT.joinpath, ("runs/_lib.sh", "runs/slurm.sbatch", ".ci/run"))],
                         ids=lambda p: p.name)
def test_bash_accepts_the_syntax(path):
    assert subprocess.run([BASH, "-n", path], capture_output=True).stderr == b""


@pytest.mark.parametrize("path", RUNNERS, ids=lambda p: p.name)
def test_runner_is_strict_before_its_first_command(path):
    """Only variables for another runner stand before the line that takes the strict mode from _lib.sh."""
    code = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    first = next(line for line in code if not re.fullmatch(r'([A-Z0-9_]+="[^"]*" ?)+', line))
    assert re.match(r"source .*/\w+\.sh", first), f"{path.name} begins with {first!r}"


def test_lib_makes_a_shell_strict(sandbox):
    process, _ = sandbox.run("source runs/_lib.sh; false | true; echo survived")
    assert process.returncode == 1 and "survived" not in process.stdout
    process, _ = sandbox.run('source runs/_lib.sh; echo "$NOT_SET"; echo survived')
    assert process.returncode != 0 and "survived" not in process.stdout


# --- what speedrun_small.sh launches --------------------------------------------------------------------------------

def test_the_steps_and_their_order(sandbox):
    process, calls = sandbox.launch()
    assert process.returncode == 0, process.stderr
    assert modules_of(calls) == STEPS
    assert arguments_of(calls, "scripts.tok_train") == ["--data=python", "--max-chars=40000000", "--vocab-size=4096"]
    assert arguments_of(calls, "nanochat.dataset") == ["--data=python", "--max-chars=40000000"]
    launched = [f"@{sandbox.root}/configs/cpu-d2.flags", "--model-tag=d2", "--device-type=cpu", "--chunked-ce"]
    assert arguments_of(calls, "scripts.base_train") == launched
    assert f"scripts.base_train {' '.join(launched)}" in process.stdout, "the command that is launched must be visible"


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The arguments of base_train in a clean environment."""
    return arguments_of(Sandbox(tmp_path_factory.mktemp("default")).launch()[1], "scripts.base_train")


@pytest.mark.parametrize("environment, added, removed", [
    (dict(DEPTH="6"), ["--model-tag=d6", "--depth=6"], ["--model-tag"]),
    (dict(DEPTH="6", MODEL_TAG="mine"), ["--model-tag=mine", "--depth=6"], ["--model-tag"]),
    (dict(HEAD_DIM="32"), ["--head-dim=32"], []),
    (dict(WINDOW_PATTERN="SSSL"), ["--window-pattern=SSSL"], []),
    (dict(MAX_SEQ_LEN="256"), ["--max-seq-len=256"], []),
    (dict(DEVICE_BATCH_SIZE="2", TOTAL_BATCH_SIZE="2048"), ["--device-batch-size=2", "--total-batch-size=2048"], []),
    (dict(NUM_ITERATIONS="7"), ["--num-iterations=7"], []),
    (dict(WARMUP_STEPS="0", LR_MULTIPLIER="2"), ["--warmup-steps=0", "--lr-multiplier=2"], []),
    (dict(EVAL_EVERY="5", EVAL_TOKENS="1024"), ["--eval-every=5", "--eval-tokens=1024"], []),
    (dict(SEED="3"), ["--seed=3"], []),
    (dict(CHUNKED_CE="0"), [], ["--chunked-ce"]),
    (dict(WANDB_RUN="tonight"), ["--run=tonight"], []),
    (dict(DATA="hf:tinystories"), ["--data=hf:tinystories"], []),
    (dict(VAL_DATA="hf:climbmix"), ["--val-data=hf:climbmix"], []),
    (dict(VOCAB_SIZE="512"), ["--vocab-size=512"], []),
    (dict(MAX_CHARS="1000"), ["--max-chars=1000"], []),
    (dict(PREPARE_DATA="0"), [], []),
    (dict(BLOCK_UPDATE_SCHEDULE="dynamic_suffix", DYN_PROBE_EVERY="40", DYN_REQUIRE_STABLE="1", DYN_ADAPT_BUDGET="0"),
     ["--block-update-schedule=dynamic_suffix", "--dyn-probe-every=40", "--dyn-require-stable"], []),
    (dict(BLOCK_UPDATE_SCHEDULE="static_suffix", STATIC_ACTIVE_LAYERS="2"),
     ["--block-update-schedule=static_suffix", "--static-active-layers=2"], []),
    (dict(USE_FP8="1"), ["--fp8"], []),
    (dict(USE_FP8="1", FP8_BACKEND="custom", FP8_RECIPE="tensorwise", FP8_EMULATE="1"),
     ["--fp8", "--fp8-emulate", "--fp8-backend=custom", "--fp8-recipe=tensorwise"], []),
    (dict(USE_FP8="0", FP8_BACKEND="custom"), [], []),
    (dict(BASE_TRAIN_EXTRA_ARGS="  --fp8-min-dim=256   --fp8-include-regex=*.sh\n--explain "),
     ["--fp8-min-dim=256", "--fp8-include-regex=*.sh", "--explain"], []),
    (dict(BASE_TRAIN_EXTRA_ARGS="*"), ["*"], []),
], ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_environment_becomes_flags(sandbox, default, environment, added, removed):
    """Flags of base_train that the environment adds, and those that it takes away."""
    process, calls = sandbox.launch(**environment)
    assert process.returncode == 0, process.stderr
    given = arguments_of(calls, "scripts.base_train")
    assert [a for a in given[1:] if a not in default] == added
    assert [a.split("=")[0] for a in default if a not in given and not a.startswith("@")] == removed
    assert given[0].startswith("@") and given[0].endswith("/configs/cpu-d2.flags"), "so that what is behind it counts"


def test_arguments_go_to_base_train_last(sandbox):
    _, calls = sandbox.launch(arguments="--tracker wandb --run='two words'", BASE_TRAIN_EXTRA_ARGS="--explain")
    assert arguments_of(calls, "scripts.base_train")[-4:] == ["--explain", "--tracker", "wandb", "--run=two words"]


def test_prepared_data_is_not_prepared_again(sandbox):
    _, calls = sandbox.launch(PREPARE_DATA="0")
    assert modules_of(calls) == ["scripts.base_train", "scripts.base_eval", "scripts.sample"]


def test_variables_reach_the_preparation(sandbox):
    _, calls = sandbox.launch(DATA="hf:tinystories", MAX_CHARS="1000", VOCAB_SIZE="300")
    assert arguments_of(calls, "scripts.tok_train") == ["--data=hf:tinystories", "--max-chars=1000", "--vocab-size=300"]
    assert arguments_of(calls, "nanochat.dataset") == ["--data=hf:tinystories", "--max-chars=1000"]


def test_a_profile_is_chosen_by_name(sandbox):
    _, calls = sandbox.launch(PROFILE="plan-d12")
    text = DataFlags()
    assert arguments_of(calls, "scripts.base_train")[:2] == [f"@{sandbox.root}/configs/plan-d12.flags", "--model-tag=d12"]
    assert arguments_of(calls, "scripts.tok_train") == [
        f"--data={text.data}", f"--max-chars={text.max_chars}", f"--vocab-size={text.vocab_size}"], "base_train's defaults"
    process, calls = sandbox.launch(PROFILE="cpu-d5")
    assert process.returncode == 2 and "cpu-d4" in process.stderr and calls == []


def test_validation_text_reaches_the_preparation(sandbox):
    _, calls = sandbox.launch(VAL_DATA="hf:climbmix")
    assert arguments_of(calls, "nanochat.dataset") == ["--data=python", "--max-chars=40000000", "--val-data=hf:climbmix"]


def test_relative_paths_are_the_callers(sandbox, tmp_path):
    """The runner changes to the repository root; what it starts is told where the user stands."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "poems.txt").write_text("text")
    _, calls = sandbox.run(f"bash {sandbox.root}/runs/speedrun_small.sh", cwd=elsewhere, SKIP_SETUP="1",
                           PYTHON=str(sandbox.python), DATA="*.txt", VAL_DATA="poems.txt")
    assert arguments_of(calls, "nanochat.dataset") == ["--data=*.txt", "--max-chars=40000000", "--val-data=poems.txt"]
    process, _ = sandbox.run(f"source {ROOT}/runs/_lib.sh; echo $PYTHON; PYTHON={sys.executable}; base_dir", cwd=elsewhere,
                             NANOCHAT_BASE_DIR="out", PYTHON="../bin/stub")
    assert process.stdout == f"{elsewhere}/../bin/stub\n{elsewhere}/out\n"


@pytest.mark.parametrize("completed, failing", list(enumerate(STEPS)), ids=STEPS)
def test_a_failing_step_ends_the_run_with_its_status(sandbox, completed, failing):
    process, calls = sandbox.launch(FAIL_AT=failing)
    assert process.returncode == 3
    assert len(calls) == completed + 1, "a step after the one that failed was started"
    assert failing in process.stderr and "exit status 3" in process.stderr


def test_the_run_is_summed_up_from_result_json(sandbox):
    run = sandbox.root / "base" / "base_checkpoints" / "d4"
    run.mkdir(parents=True)
    (run / "result.json").write_text('{"status": "ok", "steps_done": 300, "min_val_bpb": 1.25}')
    (run / "loss.png").write_text("")
    process, _ = sandbox.run(f"source {ROOT}/runs/_lib.sh; PYTHON={sys.executable}; show_results d4",
                             NANOCHAT_BASE_DIR=str(run.parent.parent))
    assert re.search(r"ok +300 .* 1\.25 ", process.stdout)
    assert f"{run}/loss.png\n{run}/result.json\n" in process.stdout


def with_gpus(sandbox, n):
    one = 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"; echo "  MIG 1g.18gb Device 0: (UUID: MIG-1)"'
    sandbox.program("nvidia-smi", "\n".join([one] * n))


@pytest.mark.parametrize("gpus, environment, device", [(0, {}, "cpu"), (1, {}, "cuda"), (8, {}, "cuda"),
                                                       (1, {"CUDA_VISIBLE_DEVICES": ""}, "cpu")])
def test_device_detection(sandbox, gpus, environment, device):
    if gpus:
        with_gpus(sandbox, gpus)
    process, _ = sandbox.run("source runs/_lib.sh; detect_device; count_gpus", **environment)
    assert process.stdout.split() == [device, "0" if device == "cpu" else str(gpus)]


def test_a_mac_is_detected(sandbox):
    sandbox.program("uname", 'case "$1" in -s) echo Darwin ;; *) echo Darwin arm64 ;; esac')
    assert sandbox.run("source runs/_lib.sh; detect_device")[0].stdout == "mps\n"


def test_several_gpus_go_through_torchrun(sandbox):
    with_gpus(sandbox, 4)
    process, calls = sandbox.launch(NPROC_PER_NODE="4")
    assert process.returncode == 0
    launched = next(call for call in calls if "scripts.base_train" in call)
    assert launched[:6] == ["-m", "nanochat.runtime.launch", "--standalone", "--nproc_per_node=4", "-m",
                            "scripts.base_train"]
    assert launched[6].endswith("/configs/gpu-d12.flags")
    lab, _, _ = Comparison(sandbox, "dynamic_suffix_compare.sh", NPROC_PER_NODE="4").lab
    assert lab.nproc_per_node == 4
    for runner in ("speedrun_small.sh", "dynamic_suffix_compare.sh"):
        process, calls = sandbox.launch(runner, NPROC_PER_NODE="8")
        assert process.returncode == 2 and "there are 4 GPUs" in process.stderr
        assert not {"scripts.base_train", "scripts.lab"} & set(modules_of(calls))


def test_the_speedrun_takes_the_eight_gpus_of_a_machine(sandbox):
    with_gpus(sandbox, 8)
    process, calls = sandbox.launch("speedrun.sh")
    assert process.returncode == 0, process.stderr
    assert modules_of(calls) == ["scripts.tok_train", "nanochat.dataset", *["nanochat.runtime.launch"] * 2, "scripts.sample"]
    launched = next(call for call in calls if "scripts.base_train" in call)
    assert launched[1:5] == ["nanochat.runtime.launch", "--standalone", "--max-restarts=3", "--nproc_per_node=8"]
    config = parse_config(FEATURES, arguments_of(calls, "scripts.base_train"))
    assert config.model.depth == 24 and config.run.resume_from_step == "auto", "the same command goes on after a preemption"
    for gpus in (0, 4):
        with_gpus(sandbox, gpus)
        process, calls = sandbox.launch("speedrun.sh")
        assert process.returncode == 2 and f"there are {gpus} GPUs" in process.stderr
        assert modules_of(calls) == [], "before hours of downloading"


def test_two_machines_meet_by_rendezvous_and_each_trains_only(sandbox):
    with_gpus(sandbox, 8)
    process, calls = sandbox.launch("speedrun.sh", NNODES="2", RDZV_ENDPOINT="10.0.0.1:29400")
    assert process.returncode == 0 and modules_of(calls) == ["nanochat.runtime.launch"], process.stderr
    assert calls[-1][2:7] == ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:29400", "--rdzv-id=nanochat",
                              "--max-restarts=3"]
    process, calls = sandbox.launch("speedrun.sh", NNODES="2")
    assert process.returncode == 2 and "RDZV_ENDPOINT=HOST:PORT" in process.stderr and modules_of(calls) == []


def test_a_slurm_job_starts_a_launcher_on_each_machine_and_goes_back_to_the_queue(sandbox):
    sandbox.program("scontrol", 'case "$1" in show) echo n7; echo n8 ;; *) echo "scontrol $*" ;; esac')
    sandbox.program("srun", 'shift; "$@"; exit 143')  # as after a preemption
    environment = dict(SLURM_SUBMIT_DIR=str(sandbox.root), SLURM_JOB_NODELIST="n[7-8]", SLURM_JOB_ID="61",
                       SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="4", PYTHON=str(sandbox.python))
    process, calls = sandbox.run("bash runs/slurm.sbatch", **environment)
    assert process.returncode == 143 and process.stdout == "scontrol requeue 61\n", process.stderr
    assert calls == [["-m", "nanochat.runtime.launch", "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d",
                      "--rdzv-endpoint=n7:20061", "--rdzv-id=61-0", "--max-restarts=3", "-m", "scripts.base_train",
                      "@configs/speedrun-d24.flags"]]
    _, calls = sandbox.run("bash runs/slurm.sbatch --depth=4 '--run=two words'", **environment)
    assert calls[0][-2:] == ["--depth=4", "--run=two words"]


def test_gpus_side_by_side_reach_the_lab(sandbox):
    with_gpus(sandbox, 2)
    _, calls = sandbox.launch("miniseries.sh", CANDIDATE="--fp8", GPUS="0 1", NPROC_PER_NODE="1")
    given = arguments_of(calls, "scripts.lab")
    assert given[given.index("--gpus"):][:3] == ["--gpus", "0", "1"] and "--nproc-per-node=1" in given


def test_unknown_device_is_refused_before_anything_runs(sandbox):
    process, calls = sandbox.launch(DEVICE_TYPE="gpu")
    assert process.returncode == 2 and "choose cuda, mps or cpu" in process.stderr and calls == []


# --- the flags exist, and the profiles are valid runs ---------------------------------------------------------------

@pytest.mark.parametrize("runner", ["speedrun_small.sh", "runcpu.sh"])
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_profiles_are_valid_runs(sandbox, runner, device):
    """What a runner launches passes the checks of base_train itself: known flags, values in range, a batch that divides."""
    with_gpus(sandbox, 1)
    _, calls = sandbox.launch(runner, DEVICE_TYPE=device)
    config = parse_config(FEATURES, arguments_of(calls, "scripts.base_train"))
    assert config.features["chunked_ce"].chunked_ce == (device == "cpu")
    assert config.run.device_type == device
    assert config.model.depth == (6 if runner == "runcpu.sh" else {"cpu": 2, "mps": 6, "cuda": 12}[device])
    assert config.eval.core_metric_every == -1, "CORE would need a download"


def test_every_flag_of_the_runner_is_one_of_base_train(sandbox):
    _, calls = sandbox.launch(SEED="1", WANDB_RUN="x", VAL_DATA="hf:x")
    parser = build_parser([*(f.type for f in fields(Config) if f.name != "features"), *(room.Config for room in FEATURES)])
    known = {name for action in parser._actions for name in action.option_strings}
    passed = {argument.split("=")[0] for argument in arguments_of(calls, "scripts.base_train")}
    assert {a for a in passed if a.startswith("--")} - known == set()


@pytest.mark.parametrize("module", STEPS)
def test_every_flag_of_the_runner_is_in_the_help(sandbox, module):
    _, calls = sandbox.launch(SEED="1", WANDB_RUN="x", VAL_DATA="hf:x")
    passed = {a.split("=")[0] for a in arguments_of(calls, module) if a.startswith("-") and a != "-1"}
    help = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert help.returncode == 0, help.stderr
    assert passed - set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help.stdout)) == set()


# --- dynamic_suffix_compare.sh --------------------------------------------------------------------------------------

# Records its arguments. The lab is run for real, and starts this instead of base_train, which leaves the result.json that a
# run of this variant would. A variant called $OOM runs out of memory; at one called $STOP the lab is told to stop.
TRAINER = RECORDER + f"""
lab='import runpy, sys; sys.executable = sys.argv.pop(1); runpy.run_module("scripts.lab", run_name="__main__", alter_sys=True)'
if [ "$2" = scripts.lab ]; then shift 2; PYTHONPATH='{ROOT}' exec '{sys.executable}' -c "$lab" "$0" "$@"; fi
case "$*" in *scripts.base_train*) ;; *) exit 0 ;; esac
schedule=full_update layers='' status=ok code=0
for a in "$@"; do
    case "$a" in
        --model-tag=*) tag="${{a#*=}}" ;;
        --result-json=*) result="${{a#*=}}" ;;
        --num-iterations=*) steps="${{a#*=}}" ;;
        --block-update-schedule=*) schedule="${{a#*=}}" ;;
    esac
done
case "$tag" in *-full-*) rate=1000.0 ;; *-pilot-*) rate=1265.4 ;; *) rate=1300.256 ;; esac
[ "$schedule" = full_update ] || layers=', "active_layers_mean": 2.444, "active_layers_range": "2-4"'
case "$tag" in *"-${{OOM:-no tag}}-"*) status=oom code=1 ;; *"-${{STOP:-no tag}}-"*) kill -INT "$PPID"; exec sleep 60 ;; esac
seconds="$(echo "$steps $rate" | awk '{{ print $1 * 381.5385 / $2 }}')"
printf '{{"status": "%s", "exit_code": %s, "error": null, "num_iterations": %s, "steps_done": %s, "tokens_seen": %s,
"train_time_sec": %s, "schedule": "%s", "tok_per_sec_max": 1400.7, "tok_per_sec_avg": %s, "final_loss": 4.9136831,
"min_val_bpb": 1.5, "val_bpb": 1.5, "peak_mem_mib": 3778.144, "avg_step_peak_mem_mib": 3535.811%s}}' \
    "$status" "$code" "$steps" "$steps" "$steps" "$seconds" "$schedule" "$rate" "$layers" > "$result"
exit "$code"
"""
COMPARED = ("variant schedule num_iterations elapsed_sec max_tok_per_sec avg_tok_per_sec final_loss min_val_bpb "
            "avg_step_peak_vram_mib peak_vram_mib active_layers_mean active_layers_range exit_code status").split()
FULL_ROW = "full full_update 520 198 1401 1000.00 4.913683 1.500000 3535.81 3778.14 NA NA 0 ok".split()
DYNAMIC_ROW = "dynamic dynamic_suffix 650 191 1401 1300.26 4.913683 1.500000 3535.81 3778.14 2.44 2-4 0 ok".split()
SUFFIX = "dynamic_suffix_compare.sh"


def compare(sandbox, runner, arguments="", **environment):
    """-> (process, the table's lines as lists of cells, the variants that were run, in their order, their folder)."""
    write_program(sandbox.python, TRAINER)
    out = sandbox.root / "out"
    process, calls = sandbox.launch(runner, arguments, **{
        "FULL_NUM_ITERATIONS": "520", "DYNAMIC_NUM_ITERATIONS": "650", "NANOCHAT_BASE_DIR": str(sandbox.root / "base"),
        "OUT": "out", **environment})
    lines = process.stdout.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("variant ")), len(lines))
    table = [line.split() for line in lines[begin:] if len(line.split()) > 7]
    tags = [next(a for a in call if a.startswith("--model-tag=")) for call in calls if "scripts.base_train" in call]
    return process, table, [re.fullmatch(r"--model-tag=lab-\w{8}-(.+)-s\d+-\w{8}", tag)[1] for tag in tags], out


@pytest.mark.slow
def test_the_schedules_are_compared_in_the_reference_table_by_a_comparison_that_was_interrupted(sandbox):
    process, table, ran, out = compare(sandbox, SUFFIX, STOP="dynamic")
    assert process.returncode == 130 and ran == ["full", "dynamic"] and table == []
    assert f"OUT={out.name} " in process.stdout
    process, table, ran, _ = compare(sandbox, SUFFIX)
    assert process.returncode == 0, process.stderr
    assert table == [COMPARED, FULL_ROW, DYNAMIC_ROW] and ran == ["dynamic"]
    assert "scripts.lab run --profile=" in process.stdout
    assert {row["variant"] for row in read_csv(out / "runs.csv")} == {"full", "dynamic"}


def test_the_schedules_differ_in_nothing_else(sandbox):
    """Each is the run of speedrun_small.sh but for its steps and its schedule, with all blocks from the start; the text is
    prepared once."""
    environment = dict(PROFILE="cpu-d4", DEPTH="6", VAL_DATA="it's/a file", BASE_TRAIN_EXTRA_ARGS="--compile-cache-dir=\\d")
    arguments = "--run='two words' --tracker tensorboard"
    plain = arguments_of(sandbox.launch(arguments=arguments, **environment)[1], "scripts.base_train")
    compared = Comparison(sandbox, SUFFIX, arguments, FULL_NUM_ITERATIONS="520", DYN_PROBE_EVERY="20", **environment)
    assert compared.modules == ["scripts.tok_train", "nanochat.dataset", "scripts.lab"]
    schedules = {"full": "full_update", "dynamic": "dynamic_suffix"}
    plain, steps = parse_config(FEATURES, plain).flat() | {"model_tag": None}, {"full": 520, "dynamic": 460}
    for name, config in compared.configs.items():
        own = {"block_update_schedule": schedules[name], "num_iterations": steps[name], "initial_depth": 0}
        assert config.flat() == plain | own | {"dyn_probe_every": 20 if name == "dynamic" else plain["dyn_probe_every"]}
    assert compared.configs["full"].run.run == "two words" and compared.lab[0].seeds == [42]
    compared = Comparison(sandbox, SUFFIX, PREPARE_DATA="0", SEEDS="1 2", OUT="my runs")
    assert compared.modules == ["scripts.lab"] and compared.lab[0].seeds == [1, 2]
    assert compared.lab[0].out == "my runs" and compared.lab[2].columns.endswith(" seed")


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_the_compared_runs_are_valid(sandbox, device):
    with_gpus(sandbox, 1)
    for equal_time in "01":
        compared = Comparison(sandbox, SUFFIX, DEVICE_TYPE=device, EQUAL_TIME=equal_time, FULL_NUM_ITERATIONS="520")
        schedules = [config.features["suffix"].block_update_schedule for config in compared.configs.values()]
        assert schedules == ["full_update", "dynamic_suffix"]
        assert compared.lab[0].match == (None, "time")[int(equal_time)]
        assert compared.configs["full"].horizon.num_iterations == 520
    assert compared.configs["dynamic"].horizon.num_iterations == 520, "its length is the pilot's to find"


def test_fp8_goes_to_both_schedules(sandbox):
    compared = Comparison(sandbox, SUFFIX, USE_FP8_COMPARE="1", FP8_BACKEND_COMPARE="custom", FP8_EMULATE="1")
    assert all({"--fp8", "--fp8-backend=custom", "--fp8-emulate"} <= set(flags) for flags in compared.runs.values())
    assert not [a for flags in Comparison(sandbox, SUFFIX).runs.values() for a in flags if "fp8" in a]


def test_runs_that_fail_leave_their_rows_and_the_others(sandbox):
    """`full` runs out of memory, `dynamic` does not start under the second seed."""
    process, table, ran, out = compare(sandbox, SUFFIX, OOM="full", FAIL_AT="-dynamic-s2", SEEDS="1 2")
    assert process.returncode == 1 and ran == ["full", "dynamic", "dynamic", "full"]
    assert table[0] == [*COMPARED, "seed"] and table[3] == [*DYNAMIC_ROW, "1"]
    assert table[4] == ["dynamic", "dynamic_suffix", "650", *["NA"] * 9, "3", "failed", "2"]
    assert [row[-3:] for row in table[1:3]] == [["1", "oom", "1"], ["1", "oom", "2"]]
    assert len(re.findall(r"^full seed [12] oom: .*/cells/full-s[12]-\w+/log.txt$", process.stdout, re.MULTILINE)) == 2


def test_equal_time_takes_the_dynamic_steps_from_a_pilot(sandbox):
    process, table, ran, out = compare(sandbox, SUFFIX, EQUAL_TIME="1", NPROC_PER_NODE="2")
    assert process.returncode == 0, process.stderr
    assert ran == ["full", "pilot-dynamic", "dynamic"]
    assert [row[:3] for row in table[1:]] == [FULL_ROW[:3], ["dynamic", "dynamic_suffix", "658"]]  # 520 * 1265.4 / 1000
    pilot, = (out / "cells").glob("pilot-*/log.txt")
    command = pilot.read_text().splitlines()[0]
    assert " -m nanochat.runtime.launch --standalone --nproc_per_node=2 -m scripts.base_train " in command
    assert " --num-iterations=260 --target-flops=-1 --dyn-warmup-steps=12 " in command, "half the steps, half the warm-up"


# --- set-up ---------------------------------------------------------------------------------------------------------

PIP_INSTALL = ["-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-e", ".[dev]"]


def installs(calls):
    return [call for call in calls if "install" in call]


def test_setup_is_a_command_too(sandbox, tmp_path):
    process, calls = sandbox.run(f"bash {sandbox.root}/runs/setup.sh", cwd=tmp_path)
    assert process.returncode == 0 and installs(calls) == [PIP_INSTALL]
    assert sandbox.setup()[1] == []


def test_setup_installs_once(sandbox):
    process, calls = sandbox.setup()
    assert process.returncode == 0, process.stderr
    assert ["-m", "venv", ".venv"] in calls and installs(calls) == [PIP_INSTALL]
    assert process.stdout.endswith("interpreter .venv/bin/python\n")
    process, calls = sandbox.setup()
    assert calls == [] and process.stdout == "interpreter .venv/bin/python\n"


def test_setup_installs_over_when_the_project_changes(sandbox):
    sandbox.setup()
    (sandbox.root / ".venv" / "mine").touch()
    with open(sandbox.root / "pyproject.toml", "a") as f:
        f.write("# changed\n")
    _, calls = sandbox.setup()
    assert installs(calls) == [PIP_INSTALL] and (sandbox.root / ".venv" / "mine").exists()
    assert sandbox.setup()[1] == []


def test_interrupted_setup_is_made_anew(sandbox):
    process, _ = sandbox.setup(FAIL_AT="pip install")
    assert process.returncode == 3 and "interpreter" not in process.stdout
    (sandbox.root / ".venv" / "half").touch()
    process, calls = sandbox.setup()
    assert process.returncode == 0 and ["-m", "venv", ".venv"] in calls and installs(calls) == [PIP_INSTALL]
    assert not (sandbox.root / ".venv" / "half").exists()


def test_two_setups_do_not_work_in_one_folder(sandbox):
    (sandbox.root / ".venv").mkdir()
    (sandbox.root / ".venv" / ".nanochat-setup").write_text(f"unfinished {os.getpid()}\n")
    process, calls = sandbox.setup()
    assert process.returncode == 2 and "wait for it" in process.stderr and calls == []


def test_a_venv_made_by_hand_is_kept(sandbox):
    binaries = sandbox.root / ".venv" / "bin"
    binaries.mkdir(parents=True)
    shutil.copy(sandbox.bin / "python3", binaries / "python")
    _, calls = sandbox.setup()
    assert ["-m", "venv", ".venv"] not in calls and installs(calls) == [PIP_INSTALL]


def test_a_venv_whose_interpreter_is_gone_is_made_anew(sandbox):
    sandbox.setup()
    (sandbox.root / ".venv" / "bin" / "python").unlink()
    assert ["-m", "venv", ".venv"] in sandbox.setup()[1]


CPU_INDEX = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


@pytest.mark.parametrize("gpus, index", [(0, CPU_INDEX), (1, [])])
def test_pip_takes_the_cpu_torch_only_without_a_gpu(sandbox, gpus, index):
    sandbox.program("curl", "exit 0")
    with_gpus(sandbox, gpus)
    uv_less = "uv() { :; }; command() { [[ $* != '-v uv' ]] && builtin command \"$@\"; }; "
    process, calls = sandbox.run(uv_less + "source runs/setup.sh")
    assert process.returncode == 0, process.stderr
    assert installs(calls) == [PIP_INSTALL[:-2] + index + PIP_INSTALL[-2:]]


def test_uv_chooses_torch_where_its_index_can_be_reached(sandbox):
    sandbox.program("curl", "exit 0")
    process, calls = sandbox.setup()
    assert process.returncode == 0, process.stderr
    assert calls == [["venv", "--quiet", "--allow-existing", ".venv"],
                     ["pip", "install", "--torch-backend=auto", "--python", ".venv/bin/python", "-e", ".[dev]"]]


def test_setup_says_what_python_it_needs(sandbox):
    process, calls = sandbox.setup(OLD="1", PYTHON="python3")
    assert process.returncode == 2 and "Python 3.10 or newer" in process.stderr and installs(calls) == []
    process, calls = sandbox.setup(NO_VENV="1", PYTHON="python3")
    assert process.returncode == 2 and "apt install python3-venv" in process.stderr and installs(calls) == []


def test_skipping_setup_uses_the_interpreter_at_hand(sandbox):
    process, calls = sandbox.setup(SKIP_SETUP="1", VIRTUAL_ENV="/somewhere")
    assert process.stdout == "interpreter python3\n" and calls == [] and not (sandbox.root / ".venv").exists()
    process, _ = sandbox.setup(SKIP_SETUP="1", PYTHON="no-such-python")
    assert process.returncode == 2 and "no-such-python" in process.stderr
    sandbox.setup()  # what the first command of the README leaves is at hand for the next, without activating it
    assert sandbox.setup(SKIP_SETUP="1")[0].stdout == "interpreter .venv/bin/python\n"


def test_the_test_command_passes_its_arguments_to_pytest(sandbox):
    process, calls = sandbox.launch("test.sh", "-k 'one or two' -x")
    assert process.returncode == 0 and calls[-1] == [*PYTEST, "-k", "one or two", "-x"]
    assert sandbox.launch("test.sh", "-x", FAIL_AT="xdist")[1][-1] == ["-m", "pytest", "-x"]
    assert sandbox.launch("test.sh", FAIL_AT="pytest")[0].returncode == 3


def test_the_lint_command_passes_its_arguments_to_ruff(sandbox):
    process, calls = sandbox.launch("lint.sh", "--fix")
    assert process.returncode == 0 and calls == [["-m", "ruff", "check", "--fix"], ["-m", "mypy"]]


def test_ci_lints_then_runs_the_test_command_and_nothing_more(sandbox):
    """What fails ends it."""
    shutil.copytree(ROOT / ".ci", sandbox.root / ".ci")
    ci = {"SKIP_SETUP": "1", "PYTHON": str(sandbox.python)}
    process, calls = sandbox.run(".ci/run", **ci)
    assert process.returncode == 0, process.stderr
    lint = [["-m", "ruff", "check"], ["-m", "mypy"]]
    assert calls[:2] == lint and calls[-1] == PYTEST and [call for call in calls[2:] if call[:1] == ["-m"]] == [PYTEST]
    for number, command in enumerate(lint, 1):
        process, calls = sandbox.run(".ci/run", FAIL_AT=command[1], **ci)
        assert process.returncode == 3 and calls == lint[:number]
