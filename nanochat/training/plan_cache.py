"""What steps have taken on this machine: measured by a probe (plan_probe.py), or by a whole run, which knows better.

It is kept under the base directory, by machine and flags, so that the same steps are measured once:

    BASE/plan/DIGEST.json      of a machine and a version of the source: {"machine": {...}, "probes": {KEY: ...}}, sealed

No torch.
"""

import hashlib
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.common import get_base_dir
from nanochat.data.split import VAL_CHARS
from nanochat.features import FEATURES, Features
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime import timing
from nanochat.runtime.diagnosis import version_of
from nanochat.runtime.files import read_sealed, seal, write_atomic
from nanochat.runtime.provenance import source_fingerprint
from nanochat.training.config import Config

SCHEMA_VERSION = 2         # of the file, whose entries are the fields of a Probe
MICRO_BATCHES = 2          # of a probe's step at most
STEPS_TO_KNOW = 20         # of a run: fewer say less than a probe
BUSY = 0.25                # share of the cores that others had during a run which says nothing of the next one
CHARS_PER_TOKEN = 3        # about, to guess how much text there is to evaluate on
# flags of a run that its steps do not depend on; all others of this group are part of a probe's key
NAMES = {"run", "model_tag", "seed", "compile_cache_dir", "resume_from_step", "overwrite", "allow_change", "max_train_seconds",
         "tracker", "result_json", "audit", "explain", "ui"}


@dataclass(frozen=True)
class Probe:
    """What steps have taken. Seconds of a micro-batch are those of its forward and backward pass; of a run only whole steps are
    known, so there they hold the update too."""
    device: str
    device_type: str
    dtype: str
    compiled: bool
    rows: int                    # of a micro-batch: --device-batch-size, or fewer that fit
    memory_limit: int            # bytes that a run may use on the device
    micro_batch_sec: float       # median
    update_sec: float            # median; what a step takes besides its micro-batches
    spread: float                # of the steps' times: distance of the quartiles, as a share of the median
    steps: int                   # that were timed
    eval_micro_batch_sec: float  # evaluation of a micro-batch in bits per byte
    compile_sec: float           # as it was then: less where the graphs were compiled before
    save_sec: float              # to write a checkpoint
    step_peak_mem_mib: float
    peak_mem_mib: float          # the evaluation included
    other_load: float | None     # share of all cores' time that other programs used meanwhile
    date: str
    run: str | None = None       # whose steps these are; None for a probe

    def step_sec(self, rows_per_step: int) -> float:
        """Seconds of an optimizer step of so many rows."""
        return rows_per_step / self.rows * self.micro_batch_sec + self.update_sec


def kept_probe(config: Config, shape: GPTConfig) -> Probe | None:
    """What a run of these flags has taken on this machine, or else a probe."""
    found = _kept()
    kept = found.get(_run_key(config, shape)) or found.get(_key(config, shape))
    return Probe(**kept) if kept else None


def keep(config: Config, shape: GPTConfig, probe: Probe) -> None:
    """Write down what was measured, in the place of what was known before. In a base directory that cannot be written nothing is
    kept: the next plan measures again."""
    kept, run_key = _kept(), _run_key(config, shape)
    kept.pop(run_key, None)
    content = {"schema_version": SCHEMA_VERSION, "machine": _machine(),
               "probes": kept | {run_key if probe.run else _key(config, shape): asdict(probe)}}
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_file(), seal(content))


def keep_run(config: Config, shape: GPTConfig, result: dict, step_seconds: list[float], *, device_type: str, rows: int,
             memory_limit: int) -> None:
    """Keep what a run has taken, which its result.json says; not of one that was short, or shared the machine.

    step_seconds: of its steps.   rows: of a micro-batch.   memory_limit: bytes that it could use.
    """
    if result["status"] != "ok" or len(step_seconds) < STEPS_TO_KNOW or (result["other_load"] or 0.0) > BUSY \
            or not result["tok_per_sec_median"]:
        return
    times = timing.spread(step_seconds)
    per_step = config.plan(shape).total_batch_size // shape.sequence_len
    rate = "tok_per_sec_avg" if steps_differ(config) else "tok_per_sec_median"  # one slow moment is no property of a machine
    step_sec = config.plan(shape).total_batch_size / result[rate]
    rows_evaluated = -(-evaluated_tokens(config) // shape.sequence_len)
    keep(config, shape, Probe(
        device=result["device"], device_type=device_type, dtype=result["dtype"],
        compiled=config.run.compile and not result["eager_fallbacks"], rows=rows, memory_limit=memory_limit,
        micro_batch_sec=step_sec * rows / per_step, update_sec=0.0,
        spread=(times["q3"] - times["q1"]) / times["median"], steps=len(step_seconds),
        eval_micro_batch_sec=result["eval_time_sec"] / max(1, len(result["val_curve"])) / rows_evaluated * rows,
        compile_sec=result["compile_time_sec"], save_sec=result["save_time_sec"] / saves(config, shape),
        step_peak_mem_mib=result["peak_mem_mib"], peak_mem_mib=result["peak_mem_mib"], other_load=result["other_load"],
        date=time.strftime("%Y-%m-%d"), run=config.model_tag))


# ---- what the flags say about a run besides its steps

def steps_differ(config: Config) -> bool:
    """Whether the steps of a run take different times by its schedule."""
    return bool(Features(config, tuple(f for f in FEATURES if f.name in config.features)).dynamic_forward_args)


def saves(config: Config, shape: GPTConfig) -> int:
    """Checkpoints that a run writes: the last one always."""
    every = config.eval.save_every
    return -(-config.plan(shape).num_iterations // every) if every > 0 else 1


def evaluations(config: Config, shape: GPTConfig) -> int:
    """Evaluations in bits per byte: before the first step, at each multiple of --eval-every, and at the end."""
    every = config.eval.eval_every
    return 0 if every <= 0 else 1 + -(-config.plan(shape).num_iterations // every)


def evaluated_tokens(config: Config) -> int:
    """Tokens of an evaluation in bits per byte, at most. By default a twentieth of the text is for validation."""
    if config.data.val_data:
        return config.eval.eval_tokens
    chars = VAL_CHARS if config.data.max_chars <= 0 else min(VAL_CHARS, config.data.max_chars // 20)
    return max(1, min(config.eval.eval_tokens, chars // CHARS_PER_TOKEN))


# ---- the file

def _kept() -> dict:
    """The probes of this machine, by key. A file that is damaged counts as none."""
    try:
        return read_sealed(_file(), SCHEMA_VERSION)["probes"]
    except (OSError, ValueError, KeyError):
        return {}


def _file() -> Path:
    return get_base_dir() / "plan" / f"{_digest(_machine())}.json"


def _machine() -> dict:
    """What the times of all probes depend on, as far as it is known without torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NANOCHAT_DTYPE", "NANOCHAT_NATIVE")
    return {"host": platform.node(), "cores": cores, **{name: os.environ.get(name) for name in settings},
            "torch": version_of("torch"), "source": source_fingerprint()}


def _key(config: Config, shape: GPTConfig) -> str:
    """Of the shape and of all flags that the time of a micro-batch or of an update depends on."""
    run = {name: value for name, value in vars(config.run).items() if name not in NAMES}
    return _digest([asdict(shape), run, config.horizon.device_batch_size, config.horizon.takes_what_fits,
                    micro_batches(config, shape), config.optim.bf16_momentum,
                    {name: vars(flags) for name, flags in config.features.items()}])


def _run_key(config: Config, shape: GPTConfig) -> str:
    """Of all this, and of what the time of a whole step and the peak memory of a run depend on besides. Where the steps of a run
    differ, its length decides how many there are of each kind."""
    length = config.plan(shape).num_iterations if steps_differ(config) else None
    return _digest(["run", _key(config, shape), config.plan(shape).total_batch_size, length, config.data.data,
                    config.data.max_chars, evaluations(config, shape) > 0, saves(config, shape) > 1,
                    config.eval.core_metric_every > 0, config.eval.sample_every > 0])


def _digest(facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def micro_batches(config: Config, shape: GPTConfig) -> int:
    """Of a probe's step."""
    return min(MICRO_BATCHES, config.plan(shape).grad_accum_steps)
