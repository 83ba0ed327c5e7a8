"""What do several processes cost and gain? One process with all threads against several that share them, and a model of why.

    python -m dev.bench.ranks --preset cpu-d4 --processes 2 --json-out ranks.json
    python -m dev.bench.ranks --preset cpu-d4 --processes 2 --trace-out trace.json -- --compile-parts
    python -m dev.bench.ranks --preset gpu-d12 --on-paper

Processes are started in turn, `--rounds` times each way: one with all threads, and N with a share of them, started by torchrun,
with the same tokens per step. Then, one of N alone with its share of rows and threads: from its parts and from the bytes that a
rank sends, at the rate that Gloo or NCCL reach with buffers of this size, follows what a step of N should take:

    forward + backward of one rank's rows + update / N + bytes / rate - what overlaps

`exposed` is what the measured step takes beyond the first two terms: the communication that the backward pass does not hide,
and waiting for the slowest rank. The trace (chrome://tracing, or ui.perfetto.dev) shows the collectives beside the backward pass.

`--on-paper` measures nothing: it gives the same terms for machines that are not here, from their datasheets, as upper bounds of
speed, with the products at an assumed share of the peak (ON_PAPER, ASSUMED_MFU).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.benchmarks.flags import OutputFlags
from nanochat.benchmarks.result_file import make_result, write_json
from nanochat.cli.flag_files import CONFIGS
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import Progress, UserError, format_table, get_base_dir
from nanochat.features import FEATURES
from nanochat.training.config import parse_config

CHILD = "NANOCHAT_BENCH_RANKS"  # in its environment: a process of this bench that trains; where it writes what it measured
PARTS = ("forward", "backward", "update", "step")
WARM_UP = 3                     # steps that do not count: the first one makes the buckets
ASSUMED_MFU = 0.4               # share of the peak that the model's products reach
ON_PAPER = {  # ranks, bf16 FLOP/s (dense, fp32 sums), memory bytes/s, bytes/s to other ranks each way; all of one device
    "1 x H100 SXM": (1, 989e12, 3.35e12, 450e9),
    "8 x H100 SXM, NVLink": (8, 989e12, 3.35e12, 450e9),
    "1 x RTX 4090": (1, 165e12, 1.008e12, 31.5e9),
    "2 x RTX 4090, PCIe 4.0, no P2P": (2, 165e12, 1.008e12, 31.5e9),
}


@dataclass
class Flags(OutputFlags):
    """The bench; base_train's flags go after --"""
    preset: str = flag("cpu-d4", "a file of flags in configs/")
    processes: int = flag(2, "how many share the work", low=2)
    rounds: int = flag(3, "how often each way is started", low=1)
    steps: int = flag(10, "steps that are timed in each process", low=1)
    trace_out: str | None = flag(None, "write a trace of one step of rank 0 here", metavar="PATH")
    on_paper: bool = flag(False, "measure nothing: the terms of a step on other machines, from their datasheets")


def train(out: str, argv: list[str]) -> None:
    """In one of the processes: take steps, and write what rank 0 measured."""
    import torch

    from nanochat.runtime.distributed import all_gather_async, all_to_all_async, barrier, broadcast_object, leave_process_group
    from nanochat.training.build import build_trainer_only
    steps, trace, *flags = argv
    trainer = build_trainer_only(parse_config(FEATURES, flags))
    sharding, device = trainer.state.sharding, trainer.plan.device
    times = []
    for step in range(WARM_UP + int(steps)):
        result = trainer.finalize_step(trainer.launch_step())
        if step >= WARM_UP:
            times.append((result.time.forward, result.time.backward, result.time.update, result.time.total))
    measured = {part: statistics.median(seconds) for part, seconds in zip(PARTS, zip(*times, strict=True), strict=True)}
    measured |= {"threads": torch.get_num_threads(), "bytes": result.columns.get("comm_bytes", 0)}
    if sharding.world_size > 1:
        # fp32 elements of a rank, half of the bytes each way: of rank 0, as the ranks' parts differ by a little
        n = broadcast_object(measured["bytes"]) // 8 // (sharding.world_size - 1)
        for name, exchange in (("reduce", lambda: all_to_all_async(torch.empty(n * sharding.world_size, device=device),
                                                                   [n] * sharding.world_size)),
                               ("gather", lambda: all_gather_async(torch.empty(n, device=device)))):
            seconds = []
            for _ in range(5):
                barrier()
                started = time.perf_counter()
                exchange().wait()
                barrier()
                seconds.append(time.perf_counter() - started)
            measured[name] = statistics.median(seconds)
    if trace != "-" and trainer.plan.ranks.rank == 0:
        with torch.profiler.profile() as profile:
            trainer.finalize_step(trainer.launch_step())
        profile.export_chrome_trace(trace)
    elif trace != "-":
        trainer.finalize_step(trainer.launch_step())
    trainer.loader.close()
    if trainer.plan.ranks.rank == 0:
        Path(out).write_text(json.dumps(measured))
    leave_process_group()


def start(processes: int, threads: int, steps: int, flags: list[str], trace: str = "-") -> dict:
    """Start so many processes and return what rank 0 measured. Raises: UserError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        launch = ["-m", "nanochat.runtime.launch", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        done = subprocess.run([sys.executable, *launch, "-m", "dev.bench.ranks", str(steps), trace, *flags], capture_output=True,
                              text=True, env=os.environ | {CHILD: out, "OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise UserError(f"{processes} processes ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
        return json.loads(Path(out).read_text())


def on_paper(base: list[str]) -> list[dict]:
    """The terms of a step, in milliseconds, on each machine of ON_PAPER."""
    import torch

    from nanochat.checkpoint_manager import empty_model
    from nanochat.recipe.shape import flops_per_token
    config = parse_config(FEATURES, base)
    shape = config.model.shape(config.data.vocab_size)
    model, tokens = empty_model(shape, torch.bfloat16), config.plan(shape).total_batch_size
    groups = model.setup_optimizer().param_groups
    muon = [p for group in groups if group["kind"] == "muon" for p in group["params"]]
    adamw = [p for group in groups if group["kind"] == "adamw" for p in group["params"]]
    sides = [(min(p.shape), max(p.shape)) for p in muon]
    newton_schulz = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)  # five iterations of three products
    size = sum(p.numel() * p.element_size() for p in (*muon, *adamw))
    moved = sum(p.numel() * (3 * p.element_size() + 4 * 4) for p in adamw)  # weight, gradient; two moments, read and written
    rows = []
    for machine, (n, flops, memory, network) in ON_PAPER.items():
        terms = {"forward + backward": flops_per_token(shape) * tokens / n / (ASSUMED_MFU * flops),
                 "Muon": newton_schulz / n / (ASSUMED_MFU * flops), "AdamW": moved / n / memory,
                 "reduce": size * (n - 1) / n / network, "gather": size * (n - 1) / n / network}
        rows.append({"machine": machine, **{f"{name} ms": round(1000 * t, 1) for name, t in terms.items()},
                     "step ms": round(1000 * sum(terms.values()), 1), "tokens/s": round(tokens / sum(terms.values()))})
    return rows


def median_of(runs: list[dict]) -> dict:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    own, rest = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, [])
    flags, *_ = parse([Flags], own, prog="python -m dev.bench.ranks", description=__doc__)
    started, n, threads = time.monotonic(), flags.processes, len(os.sched_getaffinity(0))
    if flags.on_paper:
        print(format_table(on_paper([f"@{CONFIGS / f'{flags.preset}.flags'}", *rest])))
        return 0
    base = [f"@{CONFIGS / f'{flags.preset}.flags'}", "--num-iterations=1000", "--eval-every=-1", *rest]
    config = parse_config(FEATURES, base)
    if config.horizon.total_batch_size % (n * config.model.max_seq_len):
        raise UserError(f"{config.horizon.total_batch_size} tokens a step cannot be divided evenly among {n} processes")
    rows = config.horizon.total_batch_size // config.model.max_seq_len
    share = [*base, f"--total-batch-size={config.horizon.total_batch_size // n}",
             f"--device-batch-size={min(config.horizon.device_batch_size, rows // n)}"]
    divided = [*base, f"--device-batch-size={min(config.horizon.device_batch_size, rows // n)}"]
    os.environ["NANOCHAT_BASE_DIR"] = str(get_base_dir() / "bench")
    each = max(1, threads // n)
    ways = {"one process": (1, threads, base), f"{n} processes": (n, each, divided), "one of them alone": (1, each, share)}
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    progress = Progress("starting", total=flags.rounds * len(ways), unit=" processes")
    for _ in range(flags.rounds):
        for way, (processes, of_threads, given) in ways.items():
            runs[way].append(start(processes, of_threads, flags.steps, given))
            progress.update()
    progress.close()
    if flags.trace_out:
        start(n, each, flags.steps, divided, flags.trace_out)
    one, several, alone = map(median_of, runs.values())
    compute = alone["forward"] + alone["backward"] + alone["update"] / n
    communication = several["reduce"] + several["gather"]
    results = {"one": one, "several": several, "alone": alone, "speedup": one["step"] / several["step"],
               "communication": communication, "exposed": several["step"] - compute,
               "predicted_without_overlap": compute + communication}
    rows = [{f"{part} ms": round(1000 * run[part], 1) for part in PARTS} | {"sent MiB": round(run["bytes"] / 2**20, 1)}
            for run in (one, several, alone)]
    print(format_table([{"": way} | row for way, row in zip(ways, rows, strict=True)]))
    print(f"{n} processes of {each} threads: {results['speedup']:.2f} times as fast as one of {threads}")
    print(f"foretold {1000 * compute:,.0f} ms of computing and {1000 * communication:,.0f} ms of communication, were nothing to "
          f"overlap; measured {1000 * several['step']:,.0f} ms, so {1000 * results['exposed']:,.0f} ms are exposed")
    write_json(flags.json_out, make_result("dev.bench.ranks", "cpu", {"preset": flags.preset, "processes": n, "flags": rest},
                                           results, time.monotonic() - started))
    return 0


if __name__ == "__main__":
    if CHILD in os.environ:
        train(os.environ[CHILD], sys.argv[1:])
    else:
        cli(main)
