"""A trained model to measure on: its text, the inputs of its layers, and variants of it.

The spectra of trained matrices and of activations differ from those of random ones, so attempts use a trained model. Without
--checkpoint it is a small one, trained first in under a minute and kept in $NANOCHAT_BASE_DIR/attempts. Its sizes are known
before it exists, so impossible flags are refused before it is trained. torch is imported where it is used.
"""

import copy
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.cli.flags import flag
from nanochat.cli.paths import child_environment, list_steps, located, runs_dir, step_dir
from nanochat.common import ROOT, UserError, get_base_dir, resolve
from nanochat.recipe.shape import GPTConfig, shape_of_depth

if TYPE_CHECKING:
    import torch

# preset -> depth, aspect ratio, head size, T, vocabulary, characters of text, rows, tokens a step, steps, learning rate
SMALL = {
    "smoke": (2, 64, 32, 128, 1024, 3_000_000, 16, 2048, 100, 4),
    "default": (4, 64, 64, 256, 2048, 6_000_000, 8, 2048, 120, 4),
    "gpu": (12, 64, 128, 1024, 8192, 40_000_000, 16, 65536, 300, 2),
}


@dataclass
class ModelFlags:
    """The trained model"""
    checkpoint: str | None = flag(None, "a run under base_checkpoints, or the folder of one; by default a small model that is "
                                        "trained first, in under a minute, and kept", metavar="RUN")
    step: int | None = flag(None, "the step of its checkpoint; by default the last one", low=0)

    def validate(self) -> list[str]:
        if self.checkpoint is None:
            return ["--step goes with --checkpoint"] if self.step is not None else []
        which = "" if self.step is None else f" of step {self.step}"
        return [] if self.steps() else [f"--checkpoint {self.checkpoint}: no checkpoint{which} in {self.folder()}"]

    def folder(self) -> Path:
        """The folder of the run that --checkpoint names: a path if it is one, else a name under base_checkpoints."""
        path = resolve(self.checkpoint)
        return path if path.is_dir() else runs_dir() / self.checkpoint

    def steps(self) -> list[int]:
        found = list_steps(self.folder())
        return found if self.step is None else [s for s in found if s == self.step]

    def shape(self, preset: str) -> GPTConfig:
        """The model's shape, known before it is trained.

        Raises: UserError where a checkpoint has none.
        """
        if self.checkpoint is None:
            depth, ratio, head_dim, T, vocab = SMALL[preset][:5]
            return shape_of_depth(depth, ratio, head_dim, sequence_len=T, vocab_size=vocab, window_pattern="L")
        from nanochat.runtime.files import read_json
        path = step_dir(self.folder(), self.steps()[-1]) / "state.json"
        try:
            return GPTConfig(**read_json(path)["model_config"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} has no model shape: {e}") from None

    def open(self, preset: str, device, dtype) -> "TrainedModel":
        """Load the model; train the small one first if it is not there."""
        folder, step = (self.folder(), self.step) if self.checkpoint else (train_small_model(preset, device.type), None)
        return TrainedModel(folder, step, device, dtype)


def train_small_model(preset: str, device_type: str) -> Path:
    """Train the preset's small model, unless that has been done; its folder.

    Raises: UserError where training fails.
    """
    depth, ratio, head_dim, T, vocab, characters, rows, batch, steps, rate = SMALL[preset]
    flags = [f"--depth={depth}", f"--aspect-ratio={ratio}", f"--head-dim={head_dim}", f"--max-seq-len={T}",
             "--window-pattern=L", f"--vocab-size={vocab}", "--data=python", f"--max-chars={characters}",
             f"--device-batch-size={rows}", f"--total-batch-size={batch}", f"--num-iterations={steps}",
             f"--warmup-steps={steps // 10}", f"--lr-multiplier={rate}", "--eval-every=-1", "--core-metric-every=-1",
             "--sample-every=-1", "--no-compile"]
    # a base directory has one tokenizer, so each vocabulary has its own
    base = get_base_dir() / "attempts" / preset
    tag = "small-" + hashlib.blake2b(" ".join(flags).encode(), digest_size=4).hexdigest()
    folder = base / "base_checkpoints" / tag
    if step_dir(folder, steps).is_dir():
        return folder
    print(f"training a small model first (d{depth}, {steps} steps); it is kept in {folder}", flush=True)
    command = [sys.executable, "-m", "scripts.base_train", *flags, f"--model-tag={tag}", f"--device-type={device_type}",
               *(["--resume-from-step=latest"] if list_steps(folder) else [])]  # after an interruption
    done = subprocess.run(command, cwd=ROOT, env=child_environment(base), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(f"the small model could not be trained (exit status {done.returncode}). Its last lines:\n{last}")
    return folder


class TrainedModel:
    """A trained model in eval mode, and its text.

    model (nanochat.gpt.GPT), tokens (TokenDataset), device, dtype; about: what a record says of the model.
    """

    def __init__(self, folder: Path, step: int | None, device: "torch.device", dtype: "torch.dtype"):
        from nanochat.checkpoint_manager import load_model
        from nanochat.dataset import TokenDataset
        from nanochat.flash_attention import make_attention
        from nanochat.runtime.compute_dtype import dtype_name
        from nanochat.runtime.tuner import Tuner
        from nanochat.tokenizer import get_token_bytes
        self.model, tokenizer, state = load_model("base", device, "eval", str(folder), step, dtype_name(dtype))
        self.device, self.dtype, self.shape = device, dtype, self.model.config
        self.tokens, self.token_bytes = TokenDataset.open(located(state["tokens"])), get_token_bytes(device, tokenizer)
        self.rows = max(1, 2048 // self.shape.sequence_len)  # per batch
        self.model.kernels.attention = make_attention(
            device, dtype, self.shape.head_dim, self.shape.sequence_len, self.model.window_sizes, rows=self.rows,
            heads=self.shape.n_head, kv_heads=self.shape.n_kv_head, tuner=Tuner(device))
        fingerprint = state.get("result_fingerprint") or state["computed"]  # its name in older checkpoints
        self.about = {"run": folder.name, "step": state["step"],
                      "tokens_trained": state["step"] * fingerprint["tokens per step"], **asdict(self.shape)}

    def train_batches(self, count: int, seed: int) -> list:
        """[(x, y), ...]: int64 (B, T), rows of the training text in an order that `seed` decides."""
        import torch

        from nanochat.dataloader import PackedRows
        packed = PackedRows(self.tokens.split("train"), self.shape.sequence_len, seed)
        rows = (torch.from_numpy(packed.rows(range(i * self.rows, (i + 1) * self.rows))) for i in range(count))
        return [(r[:, :-1].to(self.device), r[:, 1:].to(self.device)) for r in rows]

    def val_batches(self, tokens: int) -> list:
        """[(x, y), ...]: int64 (B, T), the first `tokens` tokens of the validation text."""
        from nanochat.dataloader import val_batches
        return list(val_batches(self.tokens.split("val"), self.shape.sequence_len, self.rows, tokens, 0, 1, self.device))

    def bpb(self, batches: list, model=None) -> float:
        """Validation bits per byte of the model, or of a variant of it."""
        from nanochat.loss_eval import evaluate_bpb
        from nanochat.runtime.device import evaluation
        with evaluation(model or self.model) as evaluated:
            return evaluate_bpb(evaluated, batches, None, self.token_bytes)

    def variant(self, replacement: "Callable[[str, torch.nn.Module], torch.nn.Module | None]"):
        """A copy of the model, in training mode, with the layers of `block_matrices` replaced where `replacement(name, layer)`
        gives another."""
        model = copy.deepcopy(self.model).train()
        for name, layer in block_matrices(model).items():
            if (other := replacement(name, layer)) is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, other.to(self.device))
        return model


def block_matrices(model) -> "dict[str, torch.nn.Module]":
    """The linear layers of the blocks by name, without the small gates."""
    return {name: layer for name, layer in model.linears().items() if ".h." in name and not name.endswith("ve_gate")}


def kind_of(name: str) -> str:
    """transformer.h.3.mlp.c_fc -> mlp.c_fc"""
    return name.split(".h.")[1].split(".", 1)[1]


def second_moments(model, layers: "dict[str, torch.nn.Module]", batches: Iterable) -> "dict[str, torch.Tensor]":
    """X^T X / N of the inputs X (N, in) of each layer over these batches: name -> (in, in), float64, on the CPU."""
    sums, count = {}, 0

    def add(name, x):
        x = x.double() if x.is_cuda else x.float()  # CUDA may multiply fp32 with 10 bits of mantissa
        sums[name] = sums.get(name, 0) + (x.T @ x).cpu().double()
    with input_hooks(layers, add):
        for x, _ in batches:
            model(x)
            count += x.numel()
    return {name: total / count for name, total in sums.items()}


def inputs_of(model, layers: "dict[str, torch.nn.Module]", x: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """The inputs of each layer for the tokens x (B, T): name -> (B * T, in), in the compute dtype."""
    found = {}
    with input_hooks(layers, found.__setitem__):
        model(x)
    return found


@contextmanager
def input_hooks(layers: "dict[str, torch.nn.Module]", use: Callable):
    """Inside the block call `use(name, x)` with the inputs x (N, in) of each layer that runs. No gradients are recorded."""
    import torch
    handles = [layer.register_forward_pre_hook(lambda _, inputs, name=name: use(name, inputs[0].flatten(0, -2)))
               for name, layer in layers.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
