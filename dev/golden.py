"""Does a refactor change the results? Record tiny runs before it, and train them again after it.

    python -m dev.golden --write /tmp/golden.json        # before
    python -m dev.golden --against /tmp/golden.json      # after: exit status 1, and a table, where anything differs

Each run is a real `scripts.base_train`, uncompiled, on generated text. The record has for every step the checksum of its tokens,
the first block trained, loss and gradient norm; bits per byte of every evaluation; SHA-256 of the final weights and optimizer
state. The last bits depend on processor and torch, so a record is valid on the machine that wrote it, and is not committed.
"""

import json
import random
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import child_environment, list_steps, output_problem, step_dir
from nanochat.cli.program import cli
from nanochat.common import ROOT, UserError, format_table, print0, resolve
from nanochat.lab.processes import training_command
from nanochat.runtime.files import file_digest, write_atomic
from nanochat.training.records import read_metrics

COMMON = ("--depth=4 --head-dim=16 --aspect-ratio=8 --max-seq-len=32 --device-batch-size=4 --total-batch-size=128 "
          "--vocab-size=300 --num-iterations=16 --warmup-steps=2 --eval-every=6 --eval-tokens=512 "
          "--save-every=4 --core-metric-every=-1 --sample-every=-1 --device-type=cpu --no-compile "
          "--attention-backend=chunked --weight-gradient=torch --rotary-norm=torch "
          "--fused-qkv=separate --polar-express=plain")  # measured, these could change each time
DYNAMIC = ("--block-update-schedule=dynamic_suffix --dyn-warmup-steps=2 --dyn-probe-every=4 --dyn-refresh-every=0 "
           "--dyn-relevance-threshold=0.5 --dyn-freeze-start-frac=0 --dyn-min-active-layers=1 --dyn-adapt-budget")
FP8 = "--fp8 --fp8-emulate --fp8-min-dim=16"
CHUNKED = "--chunked-ce --ce-chunk-tokens=48 --head-loss=torch"
DEFERRED = "--deferred-loss-logging"
ALL = f"{FP8} {CHUNKED} --bf16-momentum --cast-once --fused-rmsnorm --dtype=bfloat16"
RUNS = {  # flags in addition to COMMON
    "plain": "",
    "dynamic-suffix": DYNAMIC,
    "static-suffix": "--block-update-schedule=static_suffix --static-active-layers=2",
    "fp8": FP8,
    "chunked": CHUNKED,
    "deferred": DEFERRED,
    "all": f"{ALL} {DEFERRED}",
    "all-with-suffix": f"{ALL} {DYNAMIC}",  # its decisions need each loss at once, so no loss is deferred
    "accumulated-fp32": "--dtype=float32 --device-batch-size=1",
    "two-ranks": "--device-batch-size=2",
    "killed": "",  # by kill -9 after its first checkpoint, then resumed
}
COLUMNS = ("batch_crc32", "active_start", "loss", "grad_norm", "val_bpb")  # in the order in which a step decides them


@dataclass
class GoldenFlags:
    """Golden runs"""
    write: str | None = flag(None, "record the runs in this file", metavar="FILE.json")
    against: str | None = flag(None, "compare the runs with those recorded in this file", metavar="FILE.json")
    runs: list[str] = flag(list(RUNS), "which runs", choices=tuple(RUNS))

    def validate(self) -> list[str]:
        if bool(self.write) == bool(self.against):
            return ["give either --write or --against"]
        trouble = output_problem(self.write) if self.write else None
        return [f"--write {trouble}"] if trouble else []


def main() -> int:
    flags, = parse([GoldenFlags], prog="python -m dev.golden", description=__doc__.splitlines()[0])
    before = read_record(flags.against) if flags.against else {}
    with tempfile.TemporaryDirectory(prefix="golden_") as base:
        now = record_runs(flags.runs, Path(base))
    if flags.write:
        if failed := [f"{name}: {run['failed']}" for name, run in now.items() if "failed" in run]:
            raise UserError("nothing was recorded, as these runs failed:\n  " + "\n  ".join(failed))
        write_atomic(resolve(flags.write), json.dumps(now, indent=1) + "\n")
        print0(f"written to {flags.write}")
        return 0
    differing = differences({name: before.get(name, {}) for name in flags.runs}, now)
    print0(format_table(differing) if differing else f"the same bits in {len(now)} runs")
    return 1 if differing else 0


def read_record(path: str) -> dict:
    try:
        return json.loads(resolve(path).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"--against {path} cannot be read ({e}): write it first, with --write") from None


def record_runs(names: list[str], base: Path) -> dict[str, dict]:
    """Train these runs in the base directory `base`; a record of each."""
    records = {}
    for name in names:
        started = time.monotonic()
        records[name] = record(name, base)
        print0(f"{name}: {records[name].get('failed', 'trained')} ({time.monotonic() - started:.1f} s)")
    return records


def record(name: str, base: Path, *more: str) -> dict:
    """Train one run, with `more` flags; its record, with keys like "step 3 loss", or {"failed": its last line of output}."""
    text, folder = base / "text.txt", base / "base_checkpoints" / name
    if not text.exists():
        text.write_text(generated_text())
    flags = [*COMMON.split(), *RUNS[name].split(), f"--data={text}", f"--model-tag={name}", *more]
    command = training_command(flags, processes=2 if name == "two-ranks" else 1)
    environment = child_environment(base) | {"OMP_NUM_THREADS": "1"}
    if name == "killed":
        victim = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while victim.poll() is None and not list_steps(folder):
            time.sleep(0.001)
        victim.kill()
        if victim.wait() >= 0:
            return {"failed": f"it ended with exit status {victim.returncode} before it could be killed"}
        command.append("--resume-from-step=latest")
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return record_of(folder) if done.returncode == 0 else {"failed": done.stdout.strip().rpartition("\n")[2]}


def generated_text() -> str:
    """About 100 000 characters of random words with a skewed distribution, the same on every machine."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubdfgklmnprst", k=rng.randint(1, 8))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return "\n".join(" ".join(rng.choices(words, weights, k=12)) + "." for _ in range(1500))


def record_of(folder: Path) -> dict:
    """The record of a run that has ended: settings, metrics (floats as hex), digests."""
    result = json.loads((folder / "result.json").read_text())
    found = {name: result[name] for name in ("device", "torch_version", "dtype")}
    for row in sorted(read_metrics(folder / "metrics.jsonl"), key=lambda row: row["step"]):
        found |= {f"step {row['step']} {name}": value.hex() if isinstance(value, float) else value
                  for name in COLUMNS if (value := row[name]) is not None}
    final = step_dir(folder, list_steps(folder)[-1])
    return found | {name: file_digest(final / f"{name}.safetensors") for name in ("model", "optimizer")}


def differences(before: dict[str, dict], now: dict[str, dict]) -> list[dict]:
    """A row for each run that differs, with its first difference."""
    rows = []
    for name, run in now.items():
        differing = [key for key in {**run, **before[name]} if run.get(key) != before[name].get(key)]
        if differing:
            key = differing[0]
            rows.append({"run": name, "first difference": key, "before": str(before[name].get(key))[:24],
                         "now": str(run.get(key))[:80], "differing": f"{len(differing)} of {len(run)}"})
    return rows


if __name__ == "__main__":
    cli(main)
