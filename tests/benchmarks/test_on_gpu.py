"""The first day on a GPU: stretches of steps, parts that survive a kill, the expected times; all of it tiny, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # dev/ is not installed

from dev.bench import gpu_numbers, on_gpu, train_step
from nanochat.benchmarks import expected_step
from nanochat.benchmarks.parts import Part, Summary
from nanochat.cli.flags import parse
from nanochat.common import UserError
from nanochat.fp8 import fp8_unavailable_reason
from nanochat.lab.rows import config_of
from nanochat.recipe.memory_estimate import MemoryConfig, estimate_memory
from nanochat.recipe.shape import shape_of_depth

CPU = torch.device("cpu")
TINY = ("--depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=64 --vocab-size=300 --device-batch-size=4 --no-compile "
        "--total-batch-size=512 --dtype=float32").split()


# --- numbers of the device -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8, fast accumulation"])
def test_a_product_on_the_device_is_within_rounding(device, name):
    if device.type == "cuda" and name != "bf16" and (reason := fp8_unavailable_reason(device)):
        pytest.skip(reason)
    call, exact, bound = gpu_numbers.product(name, 256, 512, device)
    error = ((call()[:len(exact)].double() - exact).norm() / exact.norm()).item()
    assert 2.0**-12 < error < bound < 0.006, "rounding to bf16 leaves an error; a wrong scale or layout one of the order of 1"


# --- stretches of steps ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, order", [
    ([], "launch 2, read 2, launch 3, read 3, launch 4, read 4"),
    (["--deferred-loss-logging"], "launch 2, launch 3, read 2, launch 4, read 3, read 4"),
])
def test_only_a_deferred_step_is_pending_inside_a_stretch(base, monkeypatch, flags, order):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))  # the variant changes it
    _, configs = train_step.parse_command(["--device-type=cpu", "--", *TINY, f"--data={base / 'text'}", *flags])
    variant, done = train_step.Variant(configs["compiled"], base), []
    launch, finalize = variant.trainer.launch_step, variant.trainer.finalize_step

    def launching():
        pending = launch()
        done.append(f"launch {pending.step}")
        return pending

    def reading(pending):
        done.append(f"read {pending.step}")
        return finalize(pending)
    variant.trainer.launch_step, variant.trainer.finalize_step = launching, reading
    variant.stretch(3)
    variant.trainer.loader.close()
    assert ", ".join(done) == order
    assert variant.pending is None and len(variant.losses) == 5, "all of them are read at the end, also the two of the warm-up"


@pytest.mark.slow
def test_a_stretch_is_timed_whole_and_reported_per_step(base, monkeypatch):
    """The clock of the bench counts 1 for everything that it times."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    steps, timed = [], train_step.timing.timed

    def one_second(*arguments, **options):
        before = sum(len(v.losses) for v in variants)
        _, result = timed(*arguments, **options)
        steps.append(sum(len(v.losses) for v in variants) - before)
        return 1.0, result
    variants, build = [], train_step.Variant

    def built(*arguments):
        variants.append(build(*arguments))
        return variants[-1]
    monkeypatch.setattr(train_step.timing, "timed", one_second)
    monkeypatch.setattr(train_step, "Variant", built)
    flags, configs = train_step.parse_command(["--device-type=cpu", "--repeats=2", "--consecutive=4", "--", *TINY,
                                               f"--data={base / 'text'}"])
    results, _ = train_step.measure(flags, configs)
    assert steps[:6] == [4, 0, 4, 0, 4, 0], "one stretch to warm up and two counted, a product after each"
    assert results["compiled"]["seconds"] == {"median": 0.25, "q1": 0.25, "q3": 0.25, "n": 2}


# --- parts and their summary -------------------------------------------------------------------------------------------------

def program(name, code, limit=60.0, needs=0.0, facts=dict, **more):
    return Part(name, [sys.executable, "-c", code], needs, limit, facts, **more)


def summary_of(folder, tiny=True):
    return Summary(folder, on_gpu.SCRIPT, {"tiny": tiny})


def test_a_part_that_fails_is_the_last_line_and_nothing_decisive_follows(tmp_path):
    parts = [program("a", "print('fine')"), program("b", "print('error: too wrong'); print('bye'); exit(3)", decisive=True),
             program("c", ""), program("d", "", impossible="no such thing here")]
    summary = summary_of(tmp_path)
    on_gpu.run_parts(summary, parts, on_gpu.DayFlags(), time.monotonic() + 100)
    assert [summary.results[p.name]["status"] for p in parts] == ["ok", "failed", "left out", "left out"]
    assert on_gpu.verdict(summary.results, list("abcd")) == ("FAILED: b: exit status 3: error: too wrong", 1)

    summary = summary_of(tmp_path)  # again, from the file
    on_gpu.run_parts(summary, parts, on_gpu.DayFlags(go_on=True), time.monotonic() + 100)
    assert [summary.results[p.name]["status"] for p in parts] == ["ok", "failed", "ok", "left out"]
    assert on_gpu.verdict(summary.results, list("acd")) == ("ALL OK", 0), "what is impossible here is no failure"


def test_a_problem_among_the_facts_is_a_failure(tmp_path):
    summary = summary_of(tmp_path)
    facts = {"problem": "step 3 is nan", "losses": [1.0, float("nan")]}
    assert not summary.run(program("a", "", facts=lambda: facts), 60)
    content = json.loads(summary.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["results"]["a"]["reason"] == "step 3 is nan"
    assert content["results"]["a"]["facts"]["losses"] == [1.0, "nan"]


def test_a_finished_part_is_run_again_only_if_asked(tmp_path):
    part, flags = program("a", f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"), on_gpu.DayFlags()
    for asked in (flags, flags, on_gpu.DayFlags(again=True)):
        on_gpu.run_parts(summary_of(tmp_path), [part], asked, time.monotonic() + 100)
    assert (tmp_path / "runs").read_text() == "xx"


def is_running(pid):
    """Whether a process exists and has not ended. (One whose parent does not ask for its status stays as a zombie.)"""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limit, time_left, status, reason", [(3.0, 50.0, "failed", "longer than its limit of 3 s"),
                                                             (50.0, 3.0, "left out", "no time: cut off after 3 s")])
def test_a_part_without_time_ends_with_all_it_has_started(tmp_path, limit, time_left, status, reason):
    code = f"""import subprocess
child = subprocess.Popen(["sleep", "60"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
child.wait()"""
    summary = summary_of(tmp_path)
    assert not summary.run(program("a", code, limit), time_left)
    assert (summary.results["a"]["status"], summary.results["a"]["reason"]) == (status, reason)
    assert not is_running(int((tmp_path / "pid").read_text()))
    line, code = on_gpu.verdict(summary.results, ["a"])
    assert code == 1 and line.startswith("FAILED: a" if status == "failed" else "NOT COMPLETE: a: no time")


def test_an_earlier_failure_is_not_forgotten_for_want_of_time(tmp_path):
    summary = summary_of(tmp_path)
    part = program("a", "exit(3)", needs=5)
    summary.run(part, 60)
    summary.run(part, 5)
    assert summary.results["a"]["status"] == "failed"


def test_a_folder_of_something_else_is_refused(tmp_path):
    summary_of(tmp_path).record("a", status="ok")
    with pytest.raises(UserError, match="another kind of run"):
        summary_of(tmp_path, tiny=False)
    (tmp_path / "summary.json").write_text('{"script":')
    with pytest.raises(UserError, match="damaged"):
        summary_of(tmp_path)


def test_no_time_leaves_everything_out(tmp_path, capsys):
    assert on_gpu.main(["numbers", str(tmp_path), "--tiny", "--seconds=0"]) == 1
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert len(results) == 7 and {(r["status"], r["reason"]) for r in results.values()} == {("left out", "no time")}
    assert capsys.readouterr().out.splitlines()[-1] == "NOT COMPLETE: machine: no time. The same command goes on"


@pytest.mark.parametrize("argv, names", [(["number"], "number"), (["steps", "--tinny"], "--tinny"),
                                         (["runs", "--seconds=-1"], "--seconds")])
def test_wrong_commands(argv, names):
    with pytest.raises(UserError, match=names):
        on_gpu.main(argv)


# --- numbers, tiny, killed in the middle and gone on with ----------------------------------------------------------------

@pytest.fixture(scope="module")
def day(tmp_path_factory, quick_python):
    """`numbers --tiny`, killed while its third part runs, and started again: folder, the part that was killed, what the second
    start printed, and its exit status."""
    folder = tmp_path_factory.mktemp("day")
    command = ["bash", str(ROOT / "dev/bench/on_gpu.sh"), "numbers", str(folder), "--tiny"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=os.environ | {
        "SKIP_SETUP": "1", "PYTHON": quick_python})
    first = subprocess.Popen(command, **options)
    running, children = set(), set()
    while not (running and children):  # a part is said to run just before its process starts
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
        running = {name for name, r in statuses(folder).items() if r == "running"} - {"machine", "numbers: ceilings"}
        started = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and started_for(folder, pid)}
        children = running and started - {first.pid}
    first.send_signal(signal.SIGKILL)
    first.communicate()
    killed = statuses(folder)
    second = subprocess.run(command, **options)
    return folder, running.pop(), children, killed, second


def statuses(folder):
    """Status of each part in the summary, which has to be readable at any moment."""
    path = folder / "summary.json"
    return {name: r["status"] for name, r in json.loads(path.read_text())["results"].items()} if path.exists() else {}


def started_for(folder, pid):
    """Whether a process was started by a day in this folder, or is the day itself."""
    with suppress(OSError):
        about = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))
        return f"BASE_DIR={folder / 'base'}".encode() in about or b"dev.bench.on_gpu\0numbers\0" + bytes(folder) in about


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_day_goes_on(day):
    folder, running, children, killed, second = day
    assert running == "numbers: tests" and killed["numbers: ceilings"] == "ok" and len(killed) == 3
    assert children and not any(map(is_running, children)), "what a killed command has started must not go on unseen"
    lines = second.stdout.splitlines()
    assert lines[-1] == "ALL OK" and second.returncode == 0, second.stdout
    assert "numbers: ceilings: ok before" in lines and "numbers: tests: ok before" not in lines
    assert set(statuses(folder).values()) == {"ok"} and len(statuses(folder)) == 7


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_day_leaves(day):
    folder, *_, second = day
    content = json.loads((folder / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(content, json.loads((ROOT / "attempts/schema.json").read_text()))
    facts = {name: r["facts"] for name, r in content["results"].items()}
    assert content["device"] == facts["machine"]["device"] and facts["machine"]["torch"] == torch.__version__
    tests = facts["numbers: tests"]
    assert tests["passed"] + tests["skipped"] == 3 and tests["failed"] == 0
    working = {b["backend"] for b in facts["numbers: attention"]["backends"] if b["ms"]}
    assert {"sdpa", "blocks", "masked"} <= working
    assert all((b["ms"] is None) == (b["reason"] is not None) for b in facts["numbers: attention"]["backends"])
    plain, fp8 = facts["numbers: 20 steps, plain"], facts["numbers: 20 steps, fp8"]
    assert len(plain["losses"]) == gpu_numbers.STEPS and plain["losses"][-1] < plain["losses"][0] - 0.3
    assert 0 < fp8["loss_difference"] <= gpu_numbers.LOSS_TOLERANCE and plain["loss_difference"] == 0
    with tarfile.open(folder / "report.tar.gz") as tar:
        names = tar.getnames()
    assert {"summary.json", "logs/numbers_tests.txt", "json/training_fp8.json"} <= set(names)
    assert not any(name.startswith("base") for name in names)
    assert "sdpa" in second.stdout and "furthest from plain" in second.stdout


def test_losses_that_differ_are_a_problem(base, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(gpu_numbers, "TINY", [*TINY, f"--data={base / 'text'}"])
    plain = gpu_numbers.training(gpu_numbers.PartFlags(part="training", tiny=True), CPU)
    assert plain["problem"] is None and plain["tokens_per_step"] == 512

    other = tmp_path / "plain.json"
    losses = [loss + (0.02 if step == 7 else 0.005) for step, loss in enumerate(plain["losses"])]
    other.write_text(json.dumps({"results": {"training": {"losses": losses}}}))
    facts = gpu_numbers.training(gpu_numbers.PartFlags(part="training", tiny=True, against=str(other)), CPU)
    assert facts["problem"] == facts["mismatch"] and "the loss of step 7" in facts["problem"]
    assert facts["loss_difference"] == pytest.approx(0.02, abs=1e-6)


def test_a_loss_that_is_not_finite_is_a_problem():
    assert gpu_numbers.difference([1.0, 2.0], [1.0, 2.0099]) is None
    assert "step 1" in gpu_numbers.difference([1.0, float("nan")], [1.0, "nan"])


@pytest.mark.parametrize("facts, problem", [
    (dict(eager_fallbacks=1, peak_mem_mib=1.0, planned_mem_mib=None), "could not be compiled"),
    (dict(eager_fallbacks=0, peak_mem_mib=106.0, planned_mem_mib=100.0), "planner"),
    (dict(eager_fallbacks=0, peak_mem_mib=94.0, planned_mem_mib=100.0), "planner"),
    (dict(eager_fallbacks=None, peak_mem_mib=104.0, planned_mem_mib=100.0), None),
    (dict(eager_fallbacks=0, peak_mem_mib=999.0, planned_mem_mib=None), None),
])
def test_trouble_of_a_run_with_right_losses(facts, problem):
    found = gpu_numbers.trouble_of(facts)
    assert found is None if problem is None else problem in found


# --- what programs leave ------------------------------------------------------------------------------------------------------

TESTS = """import os, pytest
@pytest.mark.parametrize("a", ["x y", "z"])
def test_fine(a): pass
def test_left_out(): pytest.skip("not here")
def test_wrong(): assert 1 + 1 == 3
def test_end(): {end}
"""


@pytest.mark.parametrize("end, counts, problem", [
    ("pass", (3, 1, 1), "tests/test_a.py::test_wrong: assert (1 + 1) == 3"),
    ("os._exit(9)", (2, 1, 1), "tests/test_a.py::test_wrong"),
])
def test_the_outcome_of_tests_is_read_from_their_output(tmp_path, end, counts, problem):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")  # as in pyproject.toml
    (tmp_path / "tests" / "test_a.py").write_text(TESTS.format(end=end))
    done = subprocess.run([sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:xdist", "-p", "no:cacheprovider"],
                          cwd=tmp_path, capture_output=True, text=True)
    facts = on_gpu.pytest_facts(done.stdout)
    assert (facts["passed"], facts["failed"], facts["skipped"]) == counts, done.stdout
    assert facts["problem"].startswith(problem) and facts["first_failure"] == "tests/test_a.py::test_wrong"
    assert facts["unfinished"] == (None if end == "pass" else "tests/test_a.py::test_end")


def test_no_test_at_all_is_a_problem():
    assert "no test" in on_gpu.pytest_facts("collected 0 items\n")["problem"]
    assert on_gpu.pytest_facts("tests/a.py::test_b PASSED [ 50%]\ntests/a.py::test_c ")["problem"] == \
        "tests/a.py::test_c ended the process"


def test_the_runs_of_a_comparison(tmp_path):
    path = tmp_path / "runs.csv"

    def facts(fp8_bpb, status="ok"):
        path.write_text("schema_version,variant,status,error,min_val_bpb\n"
                        f"1,fp8,{status},no memory,{fp8_bpb}\n1,baseline,ok,,1.0\n")
        return on_gpu.run_facts(path)
    assert facts(1.005)["problem"] is None and facts(1.005)["fp8_bpb_over_bf16"] == 1.005
    assert "worse" in facts(1.02)["problem"] and facts("", "oom")["problem"] == "fp8: oom (no memory)"
    assert on_gpu.run_facts(tmp_path / "none.csv") == {}


# --- expected against measured ------------------------------------------------------------------------------------------------

def test_the_nearest_card():
    for rate, card in ((650e12, "H100"), (2000e12, "H100"), (250e12, "RTX 4090"), (71e12, "RTX 4090")):
        assert expected_step.nearest(rate).card == card


def test_expected_sums_are_those_of_the_review():
    """69 and 126 ms of a micro-batch: 475 and 130 thousand tokens per second."""
    for expected, tokens_per_sec in zip(expected_step.EXPECTED, (475e3, 130e3), strict=True):
        assert expected.rows * 2048 / sum(expected.ms.values()) * 1000 == pytest.approx(tokens_per_sec, rel=0.01)


def test_a_slow_part_is_marked():
    """Two micro-batches of 4 rows, where the table has 8: half of its times."""
    h4090 = expected_step.EXPECTED[1]
    parts = h4090.ms | {"attention": 1.5 * 17, "loss": 1.49 * 5, "muon": 8.0, "host": 0.0}
    table = {row["part"]: row for row in expected_step.compare(h4090, parts, micro_batches=2, rows=4)}
    assert table["gemms"]["expected ms"] == 36 and table["gemms"]["measured ms"] == 36 and table["gemms"][""] == ""
    assert table["attention"]["ratio"] == 1.5 and table["attention"][""] == "x1.5"
    assert table["loss"][""] == "" and table["muon"]["expected ms"] is None and table["muon"]["measured ms"] == 4
    total = table["sum of the parts above that are expected"]
    assert total["expected ms"] == pytest.approx(125.5 / 2, abs=0.1) and total["measured ms"] == pytest.approx(
        (125.5 + 8.5 + 2.45) / 2, abs=0.01)


def test_the_best_two_stand_beside_the_expected_times(tmp_path):
    def variant(tok_per_sec, attention, pattern="L"):
        parts = expected_step.EXPECTED[0].ms | {"attention": attention, "muon": 1.0}
        return {"tok_per_sec_median": tok_per_sec, "seconds": {"median": 0.07, "n": 3}, "rows": 16, "micro_batches": 1,
                "gemm_peak_share": 0.4, "gemm_peak_flops_per_sec": 650e12, "peak_mem_mib": 17000.4, "breakdown_ms": parts,
                "depth": 12, "max_seq_len": 2048, "window_pattern": pattern}
    summary = summary_of(tmp_path)
    summary.record("steps: a", status="ok", facts={"variants": {"slow": variant(100e3, 99.0), "good": variant(400e3, 16.0)}})
    summary.record("steps: b", status="ok", facts={"variants": {
        "short windows": variant(900e3, 1.0, "SSSL"), "best": variant(500e3, 9.0)}})
    variants, best, good = on_gpu.steps_tables(summary)
    assert all(name in variants for name in ("slow", "good", "short windows", "best")) and "4" in variants
    assert best.startswith("best (steps: b)") and "by arithmetic, not measured" in best and "x1.5" not in best
    assert good.startswith("good (steps: a)") and [line.split()[:5] for line in good.splitlines() if "x1.5" in line] == [
        ["attention", "10.5", "16", "1.52", "x1.5"]]


# --- on GPUs that are not here ------------------------------------------------------------------------------------------------

H100 = {"device": "NVIDIA H100 80GB HBM3", "memory_free": 79 * 2**30, "fp8_unavailable": None}
RTX4090 = {"device": "NVIDIA GeForce RTX 4090", "memory_free": 23 * 2**30, "fp8_unavailable": None}
RTX3060 = {"device": "NVIDIA GeForce RTX 3060", "memory_free": 11 * 2**30, "fp8_unavailable": "sm_86 has no FP8 tensor cores"}


@pytest.mark.parametrize("machine, rows, possible", [
    (H100, (16, 16), {"steps: d24", "runs: fp8 deep", "steps: fp8", "numbers: 20 steps, fp8"}),
    (RTX4090, (16, 8), {"runs: fp8 deep", "steps: fp8", "numbers: 20 steps, fp8"}),
    (RTX3060, (4, None), set()),
])
def test_command_lines_for_a_gpu(tmp_path, machine, rows, possible):
    """They are valid, have as many rows as fit, and leave out what a card cannot do."""
    day = on_gpu.Day(tmp_path, False, machine)
    assert (day.rows(12, 1), day.rows(12, 4)) == rows
    parts = {part.name: part for make in (on_gpu.numbers, on_gpu.steps, on_gpu.runs) for part in make(day)}
    optional = {"steps: d24", "runs: fp8 deep", "steps: fp8", "numbers: 20 steps, fp8"}
    assert {name for name in optional if parts[name].impossible is None} == possible
    assert parts["runs: fp8 d12 200 steps"].impossible == machine["fp8_unavailable"]
    for name, part in parts.items():
        words = part.command[3:]
        if "dev.bench.train_step" in part.command and name != "steps: peer":
            _, configs = train_step.parse_command(words)
            assert all((c.run.device_type, c.horizon.auto_batch, c.horizon.total_batch_size) == ("cuda", False, 131072)
                       for c in configs.values())
        elif "dev.bench.gpu_numbers" in part.command:
            flags, = parse([gpu_numbers.PartFlags], words)
            train_step.parse_command([*gpu_numbers.bench_flags(False, flags.rows), *flags.run_flags.split()])
        elif "scripts.lab" in part.command:
            baseline = next(word.partition("=")[2] for word in words if word.startswith("--baseline="))
            variants = [word.partition("=")[2] for word in words[words.index("--variant") + 1:] if not word.startswith("--")]
            depths = [config_of(["@configs/gpu-d12.flags", *baseline.split(), *variant.split()]).features["progressive_depth"]
                      .initial_depth for variant in variants]
            assert depths == [0, 2]


def test_rows_fit_by_the_planners_estimate():
    shape, config = shape_of_depth(12, window_pattern="L"), MemoryConfig(2, True, cuda=True)
    one = {rows: estimate_memory(shape, rows, config) for rows in (8, 16)}
    three = one[16].total + 2 * (one[16].weights + one[16].moments)
    assert on_gpu.rows_that_fit(shape, 3, three, (16, 8)) == 16
    assert on_gpu.rows_that_fit(shape, 3, three - 1, (16, 8)) == 8
    assert on_gpu.rows_that_fit(shape, 1, one[8].total - 1, (16, 8)) is None
