"""A trained model apart from any run: its weights, tokenizer and what is known of it; read from a run, or made into one."""

import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath

import torch

from nanochat.checkpoint_manager import (
    check_tokenizer,
    check_weights,
    empty_model,
    load_checkpoint,
    save_checkpoint,
    saved_shape,
)
from nanochat.cli.flags import default_of, flag_name
from nanochat.cli.paths import list_tags, runs_dir, writable_base_dir
from nanochat.common import UserError, get_base_dir, print0
from nanochat.features import FEATURES
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.clock import Clock
from nanochat.runtime.files import read_json, write_atomic
from nanochat.runtime.lock import RunLock
from nanochat.runtime.rng import rng_state
from nanochat.tokenizer import FILE_NAME, Tokenizer, get_tokenizer
from nanochat.training import run_folder
from nanochat.training.config import Config, HorizonFlags, ModelFlags, OptimFlags
from nanochat.training.run_stats import RunStats

RECIPE = {f.name for group in (ModelFlags, HorizonFlags, OptimFlags) for f in fields(group)}  # flags that say how it was trained


@dataclass
class Trained:
    """A model at one step of its training."""
    name: str                     # of the run
    step: int
    shape: GPTConfig
    weights: dict                 # name -> tensor on the host, as in a checkpoint
    tokenizer: Tokenizer
    flags: dict                   # of its training, by field name: those in RECIPE and `data`, as far as they are known
    val_bpb: float | None = None  # bits per byte on its validation text
    tokens_per_step: int | None = None
    train_seconds: float = 0.0
    moments: dict = field(default_factory=dict)  # of the optimizer (`MuonAdamW.named_state`); empty where they are not known

    def __post_init__(self):
        """Raises: UserError where the parts are not of one model."""
        if self.tokenizer.get_vocab_size() != self.shape.vocab_size:
            raise UserError(f"{self.name} predicts {self.shape.vocab_size:,} tokens, and the tokenizer has "
                            f"{self.tokenizer.get_vocab_size():,}. Give the one that it was trained with (--tokenizer).")

    @property
    def num_params(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())


def read_run(tag: str | None, step: int | None) -> Trained:
    """The model of a run's checkpoint; by default of the run trained last, and its last step. Raises: UserError."""
    tags = list_tags(runs_dir())
    if tag is None and not tags:
        raise UserError(f"no trained model in {runs_dir()}. Train one first: python -m scripts.base_train --help")
    run_dir = runs_dir() / (tag or tags[-1])
    weights, _, state = load_checkpoint(run_dir, "latest" if step is None else step, with_optimizer=False)
    shape, flags = checked_shape(state, weights, run_dir), state["user_config"]
    tokenizer = get_tokenizer(run_dir / "tokenizer")
    check_tokenizer(tokenizer, state, run_dir)
    return Trained(run_dir.name, state["step"], shape, weights, tokenizer,
                   {name: flags[name] for name in RECIPE & flags.keys()} | {"data": _public_name(flags.get("data", "unknown"))},
                   _val_bpb(run_dir, state), state.get("result_fingerprint", {}).get("tokens per step"))


def _public_name(source: str) -> str:
    """What an exported model says of its text: of files only the name, as where they are is nobody's business."""
    return source if source == "python" or source.startswith("hf:") else PurePath(source).name


def _val_bpb(run_dir: Path, state: dict) -> float | None:
    """Bits per byte at the checkpoint's step by result.json, as a run is evaluated after it was saved; else the last before."""
    try:
        curve = read_json(run_dir / "result.json")["val_curve"]
        return {step: bpb for step, _, bpb in curve}[state["step"]]
    except (OSError, ValueError, KeyError, TypeError):
        return state.get("val_bpb")


def checked_shape(described: dict, weights: dict, where: Path) -> GPTConfig:
    """The shape in `described["model_config"]`. UserError unless these are the weights of such a model, by name and size."""
    shape = saved_shape(described, where)
    if shape.n_layer > len(weights):  # or it would take long even to make an empty model
        raise UserError(f"{where} has {len(weights)} tensors, and names {shape.n_layer} layers.")
    check_weights(empty_model(shape, torch.float32), weights, where)
    return shape


def write_run(trained: Trained, tag: str) -> Path:
    """Make a run of this name, with one checkpoint, that sample, base_eval and base_train can use. Returns its folder.

    Its text is not known here: to train on, a text has to be given, with --allow-change. Where the base directory has no
    tokenizer yet, it gets this one.
    Raises: UserError where there is a run of this name.
    """
    writable_base_dir()
    run_dir = runs_dir() / tag
    lock = RunLock(run_dir)
    try:
        if run_folder.start_problem(run_dir, overwrite=False):
            raise UserError(f"{run_dir} is there already, with a run or with files of another program. Choose another name with "
                            "--model-tag.")
        run_folder.begin(run_dir, overwrite=False)
        trained.tokenizer.save(run_dir / "tokenizer")
        state = _state(trained, tag)
        write_atomic(run_dir / "config.json", json.dumps(state["user_config"], indent=1) + "\n")
        folder = save_checkpoint(run_dir, trained.step, trained.weights, trained.moments, state)
    finally:
        lock.release()
    shared = get_base_dir() / "tokenizer"  # where training looks
    if not (shared / FILE_NAME).exists():
        trained.tokenizer.save(shared)
        print0(f"there was no tokenizer in {shared}, where training looks for it: the model's is there now")
    elif get_tokenizer(shared).fingerprint() != trained.tokenizer.fingerprint():
        print0(f"note: {shared} has another tokenizer. To train the model, {run_dir / 'tokenizer'} has to be in its place")
    return folder


def resume_command(trained: Trained, tag: str) -> str:
    """The command that trains an imported model further: the flags of its training that are not the defaults, with words to
    replace for the steps in all and the text."""
    config, words = Config(), []
    for f in (f for group in (config.model, config.horizon, config.optim) for f in fields(group)):
        value = trained.flags.get(f.name, default_of(f))
        if value != default_of(f) and f.name != "num_iterations":
            words.append(flag_name(f.name) + ("" if value is True else f"={value}"))
    return shlex.join(["python", "-m", "scripts.base_train", f"--model-tag={tag}", "--resume-from-step=latest", "--allow-change",
                       *words, "--num-iterations=STEPS", "--data=TEXT"])


def _state(trained: Trained, tag: str) -> dict:
    """What state.json says of a run: where it stands, as far as it is known, and for the rest how a new run begins."""
    clock, stats = Clock(torch.device("cpu")), RunStats()
    clock.train = trained.train_seconds
    if trained.val_bpb is not None:
        stats.add_evaluation(trained.step, trained.val_bpb, trained.train_seconds)
    config = Config(features={feature.name: feature.Config() for feature in FEATURES})
    flags = config.flat() | trained.flags | {"model_tag": tag}
    torch.manual_seed(flags["seed"])
    known = {"tokens per step": trained.tokens_per_step} if trained.tokens_per_step else {}
    return {"model_config": vars(trained.shape), "user_config": flags, "tokens": "", "tokenizer": trained.tokenizer.fingerprint(),
            "val_bpb": trained.val_bpb, "result_fingerprint": known, "numerics_environment": {},
            "clock": clock.state_dict(), "stats": stats.state_dict(), "features": {},
            "scaler": torch.amp.GradScaler("cpu").state_dict(),  # read where the run goes on in fp16
            "rng": rng_state(torch.device("cpu"))}
