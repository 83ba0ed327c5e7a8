"""Prove on this machine that killing a run loses nothing: train once undisturbed, once with kill -9, and compare the bits.

    python -m scripts.prove_resume                                       # a tiny model: minutes on a laptop
    python -m scripts.prove_resume --kills 5 --data ~/texts --depth=6    # any flags of base_train; the last of a name counts

The victim is killed at random steps, every second time while a checkpoint is being written, and each time resumed from the
latest checkpoint, until it is done. A victim that ends too early for all its kills (two or more each) is followed by another.
Then everything that a run consists of must be equal: losses, learning rates, active_start, gradient norms, checksums of the
batches, evaluations, and the bytes of the final weights and of the optimizer state. The certificate is printed and written as
JSON. Exit status 1 where anything differs.

The runs have their own base directory with their own tokenizer, which is deleted unless --keep is given.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_names import optimizer_files
from nanochat.cli.flags import LARGEST_SEED, build_parser, flag, parse
from nanochat.cli.paths import child_environment, list_steps, output_problem, step_dir, writable_base_dir
from nanochat.common import ROOT, UserError, print0, resolve
from nanochat.features import FEATURES
from nanochat.lab.processes import last_step, training_command
from nanochat.runtime.files import file_digest, write_atomic
from nanochat.training.config import parse_config
from nanochat.training.records import read_metrics

PROG = "python -m scripts.prove_resume"
DEFAULTS = ("--data=python --max-chars=2000000 --vocab-size=512 --depth=4 --head-dim=32 --aspect-ratio=16 --max-seq-len=128 "
            "--device-batch-size=4 --total-batch-size=1024 --num-iterations=200 --save-every=5 --eval-every=50 "
            "--eval-tokens=8192 --core-metric-every=-1 --sample-every=-1 --no-compile --device-type=cpu").split()
COMPARED = ("step", "loss", "lr_multiplier", "step_kind", "active_start", "grad_norm", "batch_crc32", "val_bpb")
POLL_SECONDS = 0.002
STUCK_SECONDS = 600  # without a new step, after which the proof fails


@dataclass
class ProofFlags:
    """The proof"""
    kills: int = flag(20, "how often to kill -9, two or more", low=2)
    kill_seed: int = flag(0, "seed of the moments; to the millisecond they differ each time", low=0, high=LARGEST_SEED)
    certificate: str = flag("prove_resume.json", "where to write the certificate", metavar="PATH")
    keep: bool = flag(False, "keep the runs")

    def validate(self) -> list[str]:
        trouble = output_problem(self.certificate)
        return [f"--certificate {trouble}"] if trouble else []


def main(argv: list[str] | None = None) -> int:
    own, flags = split_arguments(sys.argv[1:] if argv is None else argv)
    flags = [*DEFAULTS, *flags]
    config = parse_config(FEATURES, flags, prog=PROG)
    if config.run.resume_from_step != "-1" or config.run.model_tag or config.eval.save_every <= 0:
        raise UserError("the proof resumes and names its runs itself, and needs checkpoints: leave out --resume-from-step and "
                        "--model-tag, and give --save-every a number")
    base = Path(tempfile.mkdtemp(prefix="prove_resume_", dir=writable_base_dir()))
    try:
        certificate = prove(own, flags, base)
    finally:
        if not own.keep:
            shutil.rmtree(base, ignore_errors=True)
    write_atomic(resolve(own.certificate), json.dumps(certificate, indent=1) + "\n")
    facts = {name: value for name, value in certificate.items() if not isinstance(value, list)}
    print0("\n" + "\n".join(f"{name.ljust(18)}  {value}" for name, value in facts.items()))
    print0(f"written to {own.certificate}")
    return 0 if certificate["equal"] else 1


def split_arguments(argv: list[str]) -> tuple[ProofFlags, list[str]]:
    """The proof's own flags, and the rest, which is base_train's."""
    parser = build_parser([ProofFlags], prog=PROG, description=(__doc__ or "").partition("\n")[0])
    rest = parser.parse_known_args(argv)[1]
    own = list(argv)
    for word in rest:
        own.remove(word)
    return parse([ProofFlags], own)[0], rest


@dataclass
class TrainingProcess:
    """A run in its own process, its output in a file."""
    process: subprocess.Popen
    log: Path

    def expect_success(self) -> None:
        """Wait for the end. Raises: UserError with the last output where the exit status is not 0."""
        if self.process.wait() != 0:
            raise UserError(f"training ended with exit status {self.process.returncode}:\n{self.log.read_text()[-2000:]}")


def start_training(flags: list[str], base: Path, tag: str, *more: str) -> TrainingProcess:
    log = base / f"{tag}.log"
    base.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as f:
        process = subprocess.Popen(training_command([*flags, f"--model-tag={tag}", *more]), cwd=ROOT, stdout=f,
                                   stderr=subprocess.STDOUT, env=child_environment(base))
    return TrainingProcess(process, log)


def prove(own: ProofFlags, flags: list[str], base: Path, start: Callable = start_training) -> dict:
    """Train and kill; the certificate. `start` has the signature of `start_training`."""
    started, rng = time.monotonic(), random.Random(own.kill_seed)
    print0("the reference run, undisturbed")
    start(flags, base, "reference").expect_success()
    reference = fingerprint(base / "base_checkpoints/reference")
    kills: list[dict] = []
    victims, differing = 0, []
    while len(kills) < own.kills:
        victims += 1
        tag = f"victim{victims}"
        planned = min(own.kills - len(kills), max(2, reference["steps"] // 5))
        moments = kill_and_resume(start, flags, base, tag, planned, reference["steps"], rng)
        kills += moments
        if len(moments) < min(2, planned):
            raise UserError(f"{tag} ended after {len(moments)} kills: give it more steps (--num-iterations)")
        victim = fingerprint(base / "base_checkpoints" / tag)
        differing += [f"{tag}: {name}" for name in reference if victim[name] != reference[name]]
        if not own.keep:
            shutil.rmtree(base / "base_checkpoints" / tag, ignore_errors=True)
    return {
        "equal": not differing, "differing": differing, "kills": len(kills),
        "kills_while_saving": sum(kill["saving"] for kill in kills), "victims": victims, **reference,
        "seconds": round(time.monotonic() - started, 1), "flags": flags, "moments": kills,
    }


def kill_and_resume(start: Callable, flags: list[str], base: Path, tag: str, kills: int, steps: int,
                    rng: random.Random) -> list[dict]:
    """Train the run `tag` to its end, killed at up to `kills` random steps of `steps`; the moments."""
    folder = base / "base_checkpoints" / tag
    moments: list[dict] = []
    for number, step in enumerate(sorted(rng.sample(range(1, steps), min(kills, steps - 1)))):
        run = start(flags, base, tag, *resume_flags(folder))
        reached = wait_until(run, folder, step)
        if reached and number % 2:
            while not is_saving(folder) and run.process.poll() is None:
                pass  # no sleep: a small checkpoint is written within milliseconds
        elif reached:
            time.sleep(rng.random() * 0.1)
        if run.process.poll() is not None:
            run.expect_success()
            return moments
        run.process.kill()
        run.process.wait()
        moments.append({"run": tag, "step": last_step(folder), "saving": is_saving(folder)})
        print0(f"killed {tag} at step {moments[-1]['step']}{', while it was saving' if moments[-1]['saving'] else ''}")
    start(flags, base, tag, *resume_flags(folder)).expect_success()
    return moments


def resume_flags(folder: Path) -> list[str]:
    return ["--resume-from-step=latest"] if list_steps(folder) else []


def wait_until(run: TrainingProcess, folder: Path, step: int) -> bool:
    """Wait until the run has taken `step`; False if it ended before."""
    seen, since = -1, time.monotonic()
    while run.process.poll() is None:
        now = last_step(folder)
        if now >= step:
            return True
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > STUCK_SECONDS:
            run.process.kill()
            raise UserError(f"no step in {STUCK_SECONDS} s:\n{run.log.read_text()[-2000:]}")
        time.sleep(POLL_SECONDS)
    return False


def is_saving(folder: Path) -> bool:
    """Whether there is a half-written checkpoint, of this process or of one that was killed."""
    return any(folder.glob(".step_*"))


def fingerprint(folder: Path) -> dict:
    """SHA-256 of every compared column of a run's metrics, and of the tensors of its final checkpoint."""
    rows: list[list] = [[row.get(name) for name in COMPARED] for row in read_metrics(folder / "metrics.jsonl")]
    final = step_dir(folder, list_steps(folder)[-1])
    columns = {name: json.dumps([[row[0], row[i]] for row in rows]).encode() for i, name in enumerate(COMPARED) if i}
    return {
        "steps": 1 + max(row[0] for row in rows if row[1] is not None),
        **{name: hashlib.sha256(data).hexdigest() for name, data in columns.items()},
        "weights": file_digest(final / "model.safetensors"),
        "optimizer": " ".join(file_digest(path) for path in optimizer_files(final)),
    }
