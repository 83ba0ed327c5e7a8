"""A first day on a GPU: three commands of at most nine minutes each, the most decisive fact first.

    bash dev/bench/on_gpu.sh numbers [FOLDER]    is what the GPU computes right? versions, rates, tests, attention, 20 steps
    bash dev/bench/on_gpu.sh steps [FOLDER]      how fast is a step, and where is its time lost?
    bash dev/bench/on_gpu.sh runs [FOLDER]       do whole runs work? FP8 against bf16, fewer blocks at the end or the beginning

Every part is a process of its own with a limit of time. FOLDER/summary.json has all that is known, at any moment; FOLDER/logs
the output, FOLDER/report.tar.gz both. A command that was stopped, or had no time for all, goes on when it is started again: a
finished part is not run again without --again. `numbers` stops at the first wrong number; --go-on does not. The last line is
ALL OK, or the first failure; the exit status 0 or 1. FOLDER is by default on_gpu in the base directory.

    --seconds 525    of the whole command; a part that does not fit in what is left is left out
    --tiny           the same on a CPU in a minute or so, FP8 emulated: it shows that this program works, and nothing of a GPU

PEER='cd ../other && python train.py' lets `steps` run another trainer in turn with ours, which prints `tok/sec: N`.
MAX_CHARS (50000000) limits the text of `runs`. What to do with the results: dev/GPU_DAY.md.
"""

import importlib.util
import os
import re
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dev.bench.gpu_numbers import SCRIPT as NUMBERS, TINY_FP8, bench_flags
from nanochat.benchmarks import expected_step
from nanochat.benchmarks.parts import CUT_OFF, NO_TIME, Part, Summary, slug
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli, subcommand
from nanochat.common import UserError, format_table, get_base_dir, resolve
from nanochat.lab.processes import sigterm_as_interrupt
from nanochat.lab.rows import number, read_csv
from nanochat.recipe.memory_estimate import MemoryConfig, estimate_memory
from nanochat.recipe.shape import GPTConfig, shape_of_depth
from nanochat.runtime.files import read_json

SCRIPT = "dev/bench/on_gpu.py"
COMMANDS = ("numbers", "steps", "runs")
MACHINE = "machine"          # the part that every command begins with
USABLE = 0.9                 # share of the free memory that a plan may use; the estimate is within 4 % of measured peaks
ROWS = (16, 8, 4, 2, 1)      # of a micro-batch of a d12; of a deeper model 8 and less
TOO_LARGE = "it does not fit in the memory"
NOT_INSTALLED = "not installed"  # why a part is left out that any machine could run
QUALITY = 0.01               # relative: further apart, FP8's bits per byte are worse than bf16's
RESULT_COLUMNS = ("status", "error", "num_iterations", "train_time_sec", "tok_per_sec_median", "final_train_loss", "min_val_bpb",
                  "peak_mem_mib")


@dataclass
class DayFlags:
    """A first day on a GPU"""
    seconds: float = flag(525.0, "time of the command; a part that does not fit in what is left is left out", low=0, high=1e6)
    again: bool = flag(False, "run finished parts again")
    go_on: bool = flag(False, "go on after a wrong number")
    tiny: bool = flag(False, "a tiny model on the CPU: shows that this program works, and nothing of a GPU")


@dataclass
class Day:
    """What the parts of a command depend on."""
    folder: Path
    tiny: bool
    machine: dict  # facts of the part `machine`

    def memory(self) -> float:
        """Bytes of the GPU's memory that a plan may use."""
        return USABLE * self.machine.get("memory_free", 0)

    def fp8_impossible(self) -> str | None:
        return None if self.tiny else self.machine.get("fp8_unavailable")

    def at_least(self, seconds: float) -> float:
        """Seconds that a part takes at least, if it takes so long on a GPU."""
        return 1.0 if self.tiny else seconds

    def rows(self, depth: int, models: int) -> int | None:
        """Rows of a micro-batch with which so many models of this depth fit in memory together, one of them training; None where
        none does."""
        if self.tiny:
            return 1
        return rows_that_fit(shape_of_depth(depth, window_pattern="L"), models, self.memory(), ROWS if depth == 12 else ROWS[1:])


def rows_that_fit(shape: GPTConfig, models: int, memory: float, candidates: tuple[int, ...]) -> int | None:
    """The first of the candidates, rows of a micro-batch, with which a compiled bf16 step of this shape fits in `memory` bytes
    beside the weights and moments of the other models; None where none fits. Without --chunked-ce, which takes less."""
    config = MemoryConfig(2, True, cuda=True)

    def needs(rows: int) -> int:
        one = estimate_memory(shape, rows, config)
        return one.total + (models - 1) * (one.weights + one.moments)
    return next((rows for rows in candidates if needs(rows) <= memory), None)


# --- the parts of each command ----------------------------------------------------------------------------------------

def question(day: Day, name: str, key: str, *flags: str, needs: float, limit: float, impossible: str | None = None) -> Part:
    """A part of dev/bench/gpu_numbers.py. Its failure is decisive."""
    out = day.folder / "json" / f"{key}.json"
    command = [sys.executable, "-m", NUMBERS.removesuffix(".py").replace("/", "."), f"--json-out={out}", *flags,
               *(["--tiny"] if day.tiny else [])]

    def facts() -> dict:
        return next(iter(read_json(out)["results"].values())) if out.exists() else {}
    return Part(name, command, day.at_least(needs), limit, facts, out, environment_of(day), impossible, decisive=True)


def environment_of(day: Day) -> dict[str, str]:
    return {"NANOCHAT_BASE_DIR": str(day.folder / "base"), "PYTHONUNBUFFERED": "1"}


def machine_part(day: Day) -> Part:
    return question(day, MACHINE, "machine", "--part=machine", needs=0, limit=120)


def numbers(day: Day) -> list[Part]:
    rows, fp8, plain = day.rows(12, 1), TINY_FP8 if day.tiny else "--fp8", day.folder / "json" / "training_plain.json"
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    log = day.folder / "logs" / f"{slug('numbers: tests')}.txt"

    def tests() -> dict:
        return pytest_facts(log.read_text(encoding="utf-8", errors="replace"))

    def steps(key: str, flags: str, impossible: str | None = None if rows else TOO_LARGE) -> Part:
        against = [] if key == "plain" else [f"--against={plain}"]
        return question(day, f"numbers: 20 steps, {key}", f"training_{key}", "--part=training", f"--rows={rows or 1}",
                        f"--run-flags={flags}", *against, needs=30, limit=240, impossible=impossible)
    return [
        question(day, "numbers: ceilings", "ceilings", "--part=ceilings", needs=10, limit=90),
        Part("numbers: tests", [sys.executable, "-m", "pytest", "-m", "device", "-vv", "--tb=short", "-p", "no:xdist", "-p",
                                "no:cacheprovider", *(["tests/benchmarks/test_on_gpu.py"] if day.tiny else [])],
             day.at_least(60), 300, tests, environment=environment_of(day), decisive=True,
             impossible=f"{NOT_INSTALLED}: {', '.join(missing)}" if missing else None),
        question(day, "numbers: attention", "attention", "--part=attention", f"--rows={rows or 1}", needs=20, limit=120),
        steps("plain", ""), steps("chunked", "--chunked-ce"),
        steps("fp8", fp8, day.fp8_impossible() or (None if rows else TOO_LARGE))]


def growing(day: Day) -> str:
    """The flag of a run that begins with few blocks."""
    return f"--initial-depth={1 if day.tiny else 2}"


def steps(day: Day) -> list[Part]:
    short = ["--repeats=1", "--consecutive=2"] if day.tiny else ["--repeats=3"]
    fp8, peer = TINY_FP8 if day.tiny else "--fp8", os.environ.get("PEER")

    def bench(key: str, variants: list[str], *run_flags: str, depth: int = 12, more: tuple[str, ...] = (), limit: float = 270,
              impossible: str | None = None) -> Part:
        out, rows = day.folder / "json" / f"step_{slug(key)}.json", day.rows(depth, 1 + len(variants))
        command = [sys.executable, "-m", "dev.bench.train_step", f"--json-out={out}", *short, *more,
                   *(f"--with={variant}" for variant in variants), *bench_flags(day.tiny, rows or 1, f"gpu-d{depth}"), *run_flags]
        return Part(f"steps: {key}", command, day.at_least(60), limit, lambda: step_facts(out), out, environment_of(day),
                    impossible or (None if rows else TOO_LARGE))
    return [
        bench("loss and queue", ["--chunked-ce", "--chunked-ce --deferred-loss-logging" + ("" if day.tiny else " --cast-once")]),
        bench("fp8", [fp8, f"{fp8} --fp8-skip-lm-head", f"{fp8} --fp8-fast-accum"], "--chunked-ce",
              impossible=day.fp8_impossible()),
        bench("windows", ["--window-pattern=SSSL"], "--chunked-ce"),
        bench("few blocks", [growing(day)], "--chunked-ce"),
        bench("d24", [] if day.fp8_impossible() else [fp8], "--chunked-ce", depth=24,
              impossible="there is one tiny model only" if day.tiny else None),
        bench("peer", [], "--chunked-ce", more=(f"--against={peer or ''}", "--rounds=2"), limit=400,
              impossible=None if peer else "PEER names no other trainer")]


def runs(day: Day) -> list[Part]:
    max_chars = "1000000" if day.tiny else os.environ.get("MAX_CHARS", "50000000")

    def comparison(name: str, script: str, environment: dict[str, str], needs: float, impossible: str | None = None) -> Part:
        out = day.folder / "runs" / slug(name)
        settings = {"SKIP_SETUP": "1", "PYTHON": sys.executable, "OUT": str(out), "DATA": "python", "DEVICE_TYPE": "cuda",
                    "MAX_CHARS": max_chars, "EVAL_TOKENS": "262144", "CHUNKED_CE": "1", "FP8_FLAGS": "",
                    "PREPARE_DATA": "0"}  # the lab prepares the text, once
        if day.tiny:
            settings |= {"PROFILE": "cpu-smoke", "DEVICE_TYPE": "cpu", "EVAL_TOKENS": "2048", "FP8_EMULATE": "1",
                         "FP8_FLAGS": "--fp8-min-dim=16"}
            environment = {name: "6" if name.endswith("NUM_ITERATIONS") else value for name, value in environment.items()}
        return Part(f"runs: {name}", ["bash", f"runs/{script}"], day.at_least(needs), 500, lambda: run_facts(out / "runs.csv"),
                    environment=environment_of(day) | settings | environment, impossible=impossible)

    def growth(steps: int) -> Part:
        out = day.folder / "runs" / "growth"
        command = [sys.executable, "-m", "scripts.lab", "run", f"--profile={'cpu-smoke' if day.tiny else 'gpu-d12'}",
                   f"--baseline=--chunked-ce --max-chars={max_chars} --num-iterations={steps}", "--seeds=1",
                   "--variant", "whole=", f"growing={growing(day)}", f"--out={out}"]
        return Part(f"runs: progressive depth, {steps} steps", command, day.at_least(60), 500,
                    lambda: run_facts(out / "runs.csv"), environment=environment_of(day))

    depth, rows = next(((depth, rows) for depth in (24, 20) if (rows := day.rows(depth, 1))), (20, None))
    large = {"NUM_ITERATIONS": "20"} | ({} if day.tiny else {"DEPTH": str(depth), "DEVICE_BATCH_SIZE": str(rows)})
    return [
        comparison("fp8 deep", "fp8_compare.sh", large, 60, day.fp8_impossible() or (None if rows else TOO_LARGE)),
        comparison("fp8 d12 200 steps", "fp8_compare.sh", {"NUM_ITERATIONS": "200"}, 60, day.fp8_impossible()),
        comparison("suffix 60 steps", "dynamic_suffix_compare.sh",
                   {"FULL_NUM_ITERATIONS": "60", "DYNAMIC_NUM_ITERATIONS": "60", "FP8_EMULATE": "",
                    "DYN_WARMUP_STEPS": "2" if day.tiny else "20"}, 60),
        growth(12 if day.tiny else 200)]


# --- what the parts have left -----------------------------------------------------------------------------------------

OUTCOMES = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*$", re.MULTILINE)


def pytest_facts(text: str) -> dict:
    """How many tests have passed, failed and so on, and the first that failed, from the output of `pytest -vv`, whole or not."""
    found = OUTCOMES.findall(text)
    counts = {word.lower(): sum(outcome == word for _, outcome in found) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    first = next((name for name, outcome in found if outcome in ("FAILED", "ERROR")), None)
    why = re.search(rf"^(?:FAILED|ERROR) {re.escape(first)} - (.*)$", text, re.MULTILINE) if first else None
    begun = re.search(r"^(tests/\S+::\S+) *$(?![\s\S]*^tests/)", text, re.MULTILINE)  # the last line: it never came to an end
    problem = f"{first}: {why[1] if why else 'see the log'}" if first else f"{begun[1]} ended the process" if begun else None
    return counts | {"first_failure": first, "unfinished": begun and begun[1],
                     "problem": problem or (None if found else "no test has run: see the log")}


def step_facts(out: Path) -> dict:
    """The variants of dev.bench.train_step's result, each with the shape of its model; {} where there is none."""
    if not out.exists():
        return {}
    content = read_json(out)
    variants = {}
    for name, result in content["results"].items():
        run = content["config"]["runs"][name]
        variants[name] = result | {flag: run[flag] for flag in ("depth", "max_seq_len", "window_pattern")}
    eager = [name for name, v in variants.items() if not v["compiled"] and content["config"]["runs"][name]["compile"]]
    return {"variants": variants, "problem": f"{', '.join(eager)}: could not be compiled" if eager else None}


def run_facts(path: Path) -> dict:
    """The runs of a comparison, by variant; where one failed, or FP8 trains worse than bf16, that is the problem."""
    if not path.exists():
        return {}
    rows = {row["variant"]: {name: row.get(name) for name in RESULT_COLUMNS} for row in read_csv(path)}
    bad = [f"{name}: {row['status']} ({row['error']})" for name, row in rows.items() if row["status"] != "ok"]
    facts: dict = {"runs": rows}
    if not bad and {"fp8", "baseline"} <= rows.keys():
        fp8, bf16 = (float(rows[name]["min_val_bpb"]) for name in ("fp8", "baseline"))
        facts["fp8_bpb_over_bf16"] = fp8 / bf16
        if fp8 / bf16 > 1 + QUALITY:
            bad.append(f"FP8 reaches {fp8:.4f} bits per byte, bf16 {bf16:.4f}: more than {QUALITY:.0%} worse")
    return facts | {"problem": "; ".join(bad) or None}


# --- the commands -----------------------------------------------------------------------------------------------------

def run_parts(summary: Summary, parts: list[Part], flags: DayFlags, deadline: float) -> None:
    """Run what is not finished, in order; after a decisive failure nothing more, unless --go-on."""
    failed = None
    for part in parts:
        if summary.finished(part.name) and not flags.again:
            print(f"{part.name}: ok before")
        elif failed:
            summary.record(part.name, status="left out", reason=f"{failed} has failed: --go-on goes on")
        else:
            summary.run(part, deadline - time.monotonic())
            if part.decisive and not flags.go_on and summary.results[part.name]["status"] == "failed":
                failed = part.name


def main(argv: list[str] | None = None) -> int:
    if not (found := subcommand(argv, COMMANDS, __doc__)):
        return 0
    command, rest = found
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    flags, = parse([DayFlags], rest, prog=f"bash dev/bench/on_gpu.sh {command}")
    began = time.monotonic()
    folder = resolve(named) if named else get_base_dir() / "on_gpu"
    summary = Summary(folder, SCRIPT, {"tiny": flags.tiny})
    try:
        with sigterm_as_interrupt():
            status = work(command, summary, flags, began + flags.seconds)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", flush=True)
        status = 130
    archive(folder)
    return status


def work(command: str, summary: Summary, flags: DayFlags, deadline: float) -> int:
    """Run the command's parts, print the tables; the exit status."""
    day = Day(summary.folder, flags.tiny, {})
    before = summary.device
    asked = summary.run(machine_part(day), deadline - time.monotonic())
    day.machine = summary.facts(MACHINE)
    summary.device = day.machine.get("device", before)
    if before not in ("not known yet", summary.device):
        raise UserError(f"{summary.path} is of another device, {before}: name another folder.")
    summary.write()
    parts = {"numbers": numbers, "steps": steps, "runs": runs}[command](day)
    if not day.machine:  # so nothing is known to be impossible
        parts = [replace(part, impossible=None) for part in parts]
    if asked or flags.go_on or summary.results[MACHINE]["status"] == "left out":
        run_parts(summary, parts, flags, deadline)
    names = [MACHINE, *(part.name for part in parts)]
    print(f"\n== {command} on {summary.device}\n{format_table([row_of(name, summary.results.get(name, {})) for name in names])}")
    for table in {"numbers": numbers_tables, "steps": steps_tables, "runs": runs_tables}[command](summary):
        print(f"\n{table}")
    line, status = verdict(summary.results, names)
    print(f"\nresults: {summary.path}\n{line}", flush=True)
    return status


def verdict(results: dict, names: list[str]) -> tuple[str, int]:
    """The last line, and the exit status: 0 where every part is ok or impossible on this machine."""
    for name in names:
        if results.get(name, {}).get("status") == "failed":
            return f"FAILED: {name}: {results[name]['reason']}", 1
    for name in names:
        reason = results.get(name, {"reason": "not run"}).get("reason", "")
        if reason.startswith((NO_TIME, CUT_OFF, NOT_INSTALLED, "not run")):
            return f"NOT COMPLETE: {name}: {reason}. The same command goes on", 1
    return "ALL OK", 0


def row_of(name: str, result: dict) -> dict:
    """A row of the table of parts."""
    return {"part": name, "status": result.get("status", "not run"), "s": result.get("seconds"),
            "commit": (result.get("git_commit") or "")[:9], "reason": result.get("reason", "")}


def archive(folder: Path) -> None:
    """Pack summary, JSON and logs, which is all that a reader needs."""
    with tarfile.open(folder / "report.tar.gz", "w:gz") as tar:
        for path in sorted([folder / "summary.json", *folder.glob("json/*.json"), *folder.glob("logs/*.txt"),
                            *folder.glob("runs/*/runs.csv")]):
            if path.exists():
                tar.add(path, str(path.relative_to(folder)))


# --- tables -----------------------------------------------------------------------------------------------------------

def numbers_tables(summary: Summary) -> list[str]:
    tables = []
    ceilings = summary.facts("numbers: ceilings")
    if ceilings:
        tables.append(f"copy: {ceilings['copy_gb_per_sec']:.0f} GB/s\n" + format_table([
            {"product": name, "TFLOP/s": _round(p.get("tflop_per_sec"), 1), "error": p.get("relative_error"),
             "at most": p.get("bound"), "why not": p.get("unavailable", "")} for name, p in ceilings["products"].items()]))
    tests = summary.facts("numbers: tests")
    if tests:
        tables.append("tests: " + ", ".join(f"{tests[word]} {word}" for word in ("passed", "failed", "error", "skipped")))
    attention = summary.facts("numbers: attention")
    if attention:
        tables.append(format_table([{
            "attention": b["backend"], "model": b["model"], "rows": b["rows"], "window": b["window"], "ms": _round(b["ms"], 3),
            "why not": b["reason"] or ""} for b in attention["backends"]]) + f"\ntaken: {attention['chosen']}")
    runs = {key: summary.facts(f"numbers: 20 steps, {key}") for key in ("plain", "chunked", "fp8")}
    rows = [{"20 steps": key, "first loss": _round(f["losses"][0], 4), "last": _round(f["losses"][-1], 4),
             "furthest from plain": _round(f["loss_difference"], 5), "step ms": _round(f["step_ms_median"], 1),
             "tok/s": round(f["tok_per_sec"]), "MiB": round(f["peak_mem_mib"]), "planned": _round(f["planned_mem_mib"], 0),
             "graphs": f["compiled_graphs"], "breaks": sum(f["graph_breaks"].values()), "eager": f["eager_fallbacks"]}
            for key, f in runs.items() if f]
    return tables + ([format_table(rows)] if rows else [])


def _round(value, digits: int):
    """A rounded number; what is none, such as "nan", as it is."""
    return round(value, digits) if isinstance(value, (int, float)) else value


def steps_tables(summary: Summary) -> list[str]:
    """Each bench's variants; and for the best two, where the time goes beside where it should."""
    rows, comparable = [], {}
    for part, result in summary.results.items():
        variants = result.get("facts", {}).get("variants", {}) if part.startswith("steps: ") else {}
        first = next(iter(variants.values()), None)
        for name, v in variants.items():
            rows.append({"part": part.removeprefix("steps: "), "variant": name, "tok/s": round(v["tok_per_sec_median"]),
                         "over the first": round(v["tok_per_sec_median"] / first["tok_per_sec_median"], 3),
                         "step ms": round(1000 * v["seconds"]["median"], 2), "n": v["seconds"]["n"], "rows": v["rows"],
                         "share of product rate": round(v["gemm_peak_share"], 3), "MiB": _round(v["peak_mem_mib"], 0),
                         "over the peer": _round(v.get("against", {}).get("ratio_median"), 3)})
            if v["breakdown_ms"] and (v["depth"], v["max_seq_len"], v["window_pattern"].strip("Ll")) == (
                    expected_step.SHAPE.n_layer, expected_step.SHAPE.sequence_len, ""):
                comparable[f"{name} ({part})"] = v
    tables = [format_table(rows)] if rows else []
    best = sorted(comparable, key=lambda name: -comparable[name]["tok_per_sec_median"])[:2]
    for name in best:
        v = comparable[name]
        expected = expected_step.nearest(v["gemm_peak_flops_per_sec"])
        table = expected_step.compare(expected, v["breakdown_ms"], v["micro_batches"], v["rows"])
        tables.append(f"{name}: milliseconds of a micro-batch of {v['rows']} rows. Expected: for an {expected.card}, the nearest "
                      f"card of the table, by arithmetic, not measured\n{format_table(table)}")
    if rows and not best:
        tables.append("nothing here compares with the expected times, which are of a d12 with full context and T=2048")
    return tables


def runs_tables(summary: Summary) -> list[str]:
    rows = [{"comparison": part.removeprefix("runs: "), "run": name, "status": run["status"], "steps": run["num_iterations"],
             "tok/s": _round(number_of(run["tok_per_sec_median"]), 0), "bits per byte": number_of(run["min_val_bpb"]),
             "MiB": _round(number_of(run["peak_mem_mib"]), 0)}
            for part, result in summary.results.items() for name, run in result.get("facts", {}).get("runs", {}).items()]
    return [format_table(rows)] if rows else []


def number_of(text: str | None) -> float | None:
    """The number in a cell of runs.csv."""
    try:
        return number(float(text or "nan"))
    except ValueError:
        return None


if __name__ == "__main__":
    cli(main)
