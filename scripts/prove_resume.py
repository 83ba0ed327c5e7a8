"""Prove on this machine that killing a run loses nothing: train once undisturbed, once with kill -9, and compare the bits.

    python -m scripts.prove_resume                                       # a tiny model: minutes on a laptop
    python -m scripts.prove_resume --kills 5 --data ~/texts --depth=6    # any flags of base_train; the last of a name counts

The victim is killed at random steps, every second time while a checkpoint is being written, and resumed from the latest one
until it is done. A victim that ends too early for all its kills (two or more each) is followed by another. Then everything
that a run is must be equal: losses, rates, active_start, gradient norms, checksums of the batches, evaluations, and the bytes
of the final weights and of the optimizer's state. The certificate is printed and written as JSON; exit status 1 where
anything differs.

The runs have a base directory of their own, with their own tokenizer, which is deleted unless --keep is given.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.flags import LARGEST_SEED, build_parser, flag, parse
from nanochat.cli.paths import child_environment, list_steps, output_problem, step_dir, writable_base_dir
from nanochat.cli.program import cli
from nanochat.common import ROOT, UserError, print0, resolve
from nanochat.features import FEATURES
from nanochat.runtime.files import write_atomic
from nanochat.training.config import parse_config
from nanochat.training.records import read_metrics

DEFAULTS = ("--data=python --max-chars=2000000 --vocab-size=512 --depth=4 --head-dim=32 --aspect-ratio=16 --max-seq-len=128 "
            "--device-batch-size=4 --total-batch-size=1024 --num-iterations=200 --save-every=5 --eval-every=50 "
            "--eval-tokens=8192 --core-metric-every=-1 --sample-every=-1 --no-compile --device-type=cpu").split()
DECIDED = ("step", "loss", "lr_multiplier", "step_kind", "active_start", "grad_norm", "batch_crc32", "val_bpb")
POLL = 0.002  # seconds between looks at the victim
PATIENCE = 600  # seconds without a new step after which it is taken for stuck


@dataclass
class Proof:
    """The proof"""
    kills: int = flag(20, "how often to kill -9, two or more", low=2)
    kill_seed: int = flag(0, "seed of the moments; they are never twice the same to the millisecond", low=0,
                          high=LARGEST_SEED)
    certificate: str = flag("prove_resume.json", "where to write the certificate", metavar="PATH")
    keep: bool = flag(False, "keep the runs")

    def validate(self) -> list[str]:
        trouble = output_problem(self.certificate)
        return [f"--certificate {trouble}"] if trouble else []


def main() -> int:
    own, flags = split_arguments(sys.argv[1:])
    flags = [*DEFAULTS, *flags]
    config = parse_config(FEATURES, flags, prog="python -m scripts.prove_resume")
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


def split_arguments(argv: list[str]) -> tuple[Proof, list[str]]:
    """The proof's own flags, and the rest, which is base_train's."""
    parser = build_parser([Proof], prog="python -m scripts.prove_resume", description=__doc__.splitlines()[0])
    rest = parser.parse_known_args(argv)[1]
    mine = list(argv)
    for a in rest:
        mine.remove(a)
    return parse([Proof], mine)[0], rest


def prove(own: Proof, flags: list[str], base: Path, launch: Callable | None = None) -> dict:
    """The certificate. `launch`: starts a run, as `train` does."""
    launch = launch or train
    started, dice = time.monotonic(), random.Random(own.kill_seed)
    print0("the reference, undisturbed")
    launch(flags, base, "reference").expect_success()
    reference = fingerprint(base / "base_checkpoints/reference")
    kills, victims, differing = [], 0, []
    while len(kills) < own.kills:
        victims += 1
        tag = f"victim{victims}"
        planned = min(own.kills - len(kills), max(2, reference["steps"] // 5))
        before = len(kills)
        kills += kill_and_resume(launch, flags, base, tag, planned, reference["steps"], dice)
        if len(kills) - before < min(2, planned):
            raise UserError(f"{tag} was over after {len(kills) - before} kills: give it more to do (--num-iterations)")
        victim = fingerprint(base / "base_checkpoints" / tag)
        differing += [f"{tag}: {name}" for name in reference if victim[name] != reference[name]]
        if not own.keep:
            shutil.rmtree(base / "base_checkpoints" / tag, ignore_errors=True)
    return {
        "equal": not differing, "differing": differing, "kills": len(kills),
        "kills_while_saving": sum(kill["saving"] for kill in kills), "victims": victims, **reference,
        "seconds": round(time.monotonic() - started, 1), "flags": flags, "moments": kills,
    }


@dataclass
class Training:
    """A run in a process of its own, its output in a file."""
    process: subprocess.Popen
    log: Path

    def expect_success(self) -> None:
        if self.process.wait() != 0:
            raise UserError(f"training ended with exit status {self.process.returncode}:\n{self.log.read_text()[-2000:]}")


def train(flags: list[str], base: Path, tag: str, *more: str) -> Training:
    log = base / f"{tag}.log"
    base.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as f:
        process = subprocess.Popen([sys.executable, "-m", "scripts.base_train", *flags, f"--model-tag={tag}", *more], cwd=ROOT,
                                   stdout=f, stderr=subprocess.STDOUT, env=child_environment(base))
    return Training(process, log)


def kill_and_resume(launch, flags: list[str], base: Path, tag: str, kills: int, steps: int, dice: random.Random) -> list[dict]:
    """Train the run `tag` to its end, killed at `kills` random steps or fewer; returns the moments."""
    folder, moments = base / "base_checkpoints" / tag, []
    for number, at in enumerate(sorted(dice.sample(range(1, steps), min(kills, steps - 1)))):
        run = launch(flags, base, tag, *resume(folder))
        reached = wait_until(run, folder, at)
        if reached and number % 2:
            while not writing(folder) and run.process.poll() is None:
                pass  # a small checkpoint is written within milliseconds
        elif reached:
            time.sleep(dice.random() * 0.1)
        if run.process.poll() is not None:
            run.expect_success()
            return moments
        run.process.kill()
        run.process.wait()
        moments.append({"run": tag, "step": last_step(folder), "saving": writing(folder)})
        print0(f"killed {tag} at step {moments[-1]['step']}{', while it was saving' if moments[-1]['saving'] else ''}")
    launch(flags, base, tag, *resume(folder)).expect_success()
    return moments


def resume(folder: Path) -> list[str]:
    return ["--resume-from-step=latest"] if list_steps(folder) else []


def wait_until(run: Training, folder: Path, step: int) -> bool:
    """Wait until the run has taken `step`; False if it ended before."""
    seen, since = -1, time.monotonic()
    while run.process.poll() is None:
        now = last_step(folder)
        if now >= step:
            return True
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            run.process.kill()
            raise UserError(f"no step in {PATIENCE} s:\n{run.log.read_text()[-2000:]}")
        time.sleep(POLL)
    return False


def last_step(folder: Path) -> int:
    """The last step in the run's metrics, -1 where there is none. Only the file's end is read: it is asked for often."""
    try:
        with open(folder / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 2**12))
            lines = f.read().split(b"\n")
    except OSError:
        return -1
    return json.loads(lines[-2])["step"] if len(lines) > 1 else -1


def writing(folder: Path) -> bool:
    """Whether a checkpoint is half written, now or by who was killed."""
    return any(folder.glob(".step_*"))


def fingerprint(folder: Path) -> dict:
    """What a run came to: SHA-256 of all that was decided at each step, and of the final checkpoint's tensors."""
    rows = [[row.get(name) for name in DECIDED] for row in read_metrics(folder / "metrics.jsonl")]
    final = step_dir(folder, list_steps(folder)[-1])
    return {
        "steps": 1 + max(row[0] for row in rows if row[1] is not None),
        **{name: sha256(json.dumps([[row[0], row[i]] for row in rows]).encode()) for i, name in enumerate(DECIDED) if i},
        "weights": sha256((final / "model.safetensors").read_bytes()),
        "optimizer": sha256((final / "optimizer.safetensors").read_bytes()),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    cli(main)
