"""What attempts on a trained model share: how they begin and end, the model, text for it, what its layers see, variants of
it, and training these in turn.

Spectra of trained matrices and of activations are not those of random ones, so an attempt asks a model that was trained
here. Without --checkpoint it is a small one, trained first in under a minute and kept in $NANOCHAT_BASE_DIR/attempts. Its
sizes are known before it exists, so impossible flags are refused before it is trained; torch is imported where it is used.
"""

import copy
import hashlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.benchmarks import bench
from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import child_environment, list_steps, located, runs_dir, step_dir
from nanochat.common import ROOT, Progress, UserError, get_base_dir, resolve
from nanochat.recipe.shape import GPTConfig, shape_of_depth
from nanochat.runtime import timing

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
        return [] if self.steps() else [f"--checkpoint {self.checkpoint}: no checkpoint{self._which()} in {self.folder()}"]

    def folder(self) -> Path:
        """The folder of the run that --checkpoint names: a path if it is one, else a name under base_checkpoints."""
        path = resolve(self.checkpoint)
        return path if path.is_dir() else runs_dir() / self.checkpoint

    def steps(self) -> list[int]:
        found = list_steps(self.folder())
        return found if self.step is None else [s for s in found if s == self.step]

    def _which(self) -> str:
        return "" if self.step is None else f" of step {self.step}"

    def shape(self, preset: str) -> GPTConfig:
        """The model's shape, also before it is trained. UserError where a checkpoint does not say."""
        if self.checkpoint is None:
            depth, ratio, head_dim, T, vocab = SMALL[preset][:5]
            return shape_of_depth(depth, ratio, head_dim, sequence_len=T, vocab_size=vocab, window_pattern="L")
        from nanochat.runtime.files import read_json
        path = step_dir(self.folder(), self.steps()[-1]) / "state.json"
        try:
            return GPTConfig(**read_json(path)["model_config"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} does not say what its model is like: {e}") from None

    def open(self, preset: str, device, dtype) -> "Subject":
        """Load the model; train the small one first if it is not there."""
        folder, step = (self.folder(), self.step) if self.checkpoint else (train_small(preset, device.type), None)
        return Subject(folder, step, device, dtype)


def train_small(preset: str, device_type: str) -> Path:
    """The folder of the preset's small model, trained unless it has been. UserError where that fails."""
    depth, ratio, head_dim, T, vocab, characters, rows, batch, steps, rate = SMALL[preset]
    flags = [f"--depth={depth}", f"--aspect-ratio={ratio}", f"--head-dim={head_dim}", f"--max-seq-len={T}",
             "--window-pattern=L", f"--vocab-size={vocab}", "--data=python", f"--max-chars={characters}",
             f"--device-batch-size={rows}", f"--total-batch-size={batch}", f"--num-iterations={steps}",
             f"--warmup-steps={steps // 10}", f"--lr-multiplier={rate}", "--eval-every=-1", "--core-metric-every=-1",
             "--sample-every=-1", "--no-compile"]
    # a base directory of its own per vocabulary, as there is one tokenizer to a base directory
    base = get_base_dir() / "attempts" / preset
    tag = "small-" + hashlib.blake2b(" ".join(flags).encode(), digest_size=4).hexdigest()
    folder = base / "base_checkpoints" / tag
    if step_dir(folder, steps).is_dir():
        return folder
    print(f"training a small model first (d{depth}, {steps} steps); it is kept in {folder}", flush=True)
    command = [sys.executable, "-m", "scripts.base_train", *flags, f"--model-tag={tag}", f"--device-type={device_type}",
               *(["--resume-from-step=latest"] if list_steps(folder) else [])]  # one that was stopped half-way
    done = subprocess.run(command, cwd=ROOT, env=child_environment(base), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise UserError(f"the small model could not be trained (exit status {done.returncode}). Its last lines:\n{last}")
    return folder


class Attempt:
    """A script at work: its flags, the device, the dtype, and the clock. Every flag is right before anything is done."""

    def __init__(self, script: str, group: type[bench.AttemptFlags], argv: list[str] | None, doc: str, validate=None):
        self.script, self.argv, self.about = script, argv, None
        flags, self.model_flags = parse([group, ModelFlags], argv, prog=f"python {script}", description=doc.splitlines()[0],
                                        validate=validate)
        self.flags, self.started = flags.filled(), time.monotonic()
        self.device, self.dtype = self.flags.open_device()

    def open_model(self) -> "Subject":
        subject = self.model_flags.open(self.flags.preset, self.device, self.dtype)
        self.about = subject.about
        return subject

    def save(self, results: dict, draw: Callable, traces: dict | None = None, **facts) -> None:
        """Write what came out, where --json-out says; `facts` belong to all of it."""
        from nanochat.runtime.device import dtype_name
        config = asdict(self.model_flags) | asdict(self.flags) | {
            "model": self.about, "compute_dtype": dtype_name(self.dtype)} | facts
        content = bench.envelope(self.script, self.device, config, results, time.monotonic() - self.started, traces, self.argv)
        bench.save(self.flags.json_out, content, draw if self.flags.plot else None)


class Subject:
    """A trained model in eval mode, and its text.

    model (nanochat.gpt.GPT), tokens (TokenDataset), device, dtype, and what a record says of it: `about`.
    """

    def __init__(self, folder: Path, step: int | None, device: "torch.device", dtype: "torch.dtype"):
        from nanochat.checkpoint_manager import load_model
        from nanochat.dataset import TokenDataset
        from nanochat.flash_attention import make_attention
        from nanochat.runtime.device import dtype_name
        from nanochat.tokenizer import get_token_bytes
        self.model, tokenizer, state = load_model("base", device, "eval", str(folder), step, dtype_name(dtype))
        self.device, self.dtype, self.shape = device, dtype, self.model.config
        self.tokens, self.token_bytes = TokenDataset.open(located(state["tokens"])), get_token_bytes(device, tokenizer)
        self.model.kernels.attention = make_attention(device, dtype, self.shape.head_dim, self.shape.sequence_len,
                                                      self.model.window_sizes)
        self.rows = max(1, 2048 // self.shape.sequence_len)  # of a batch
        self.about = {"run": folder.name, "step": state["step"], "tokens_trained": state["step"]
                      * state["computed"]["tokens per step"], **asdict(self.shape)}

    def train_batches(self, count: int, seed: int) -> list:
        """[(x, y), ...]: int64 (B, T), rows of the training text in an order of `seed`."""
        import torch

        from nanochat.dataloader import PackedRows
        packed = PackedRows(self.tokens.split("train"), self.shape.sequence_len, seed)
        rows = (torch.from_numpy(packed.rows(range(i * self.rows, (i + 1) * self.rows))) for i in range(count))
        return [(r[:, :-1].to(self.device), r[:, 1:].to(self.device)) for r in rows]

    def val_batches(self, tokens: int) -> list:
        """The same rows of the validation text every time, `tokens` of them."""
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
    """The linear layers of the blocks by name, but for the gates of a dozen channels."""
    return {name: layer for name, layer in model.linears().items() if ".h." in name and not name.endswith("ve_gate")}


def kind_of(name: str) -> str:
    """transformer.h.3.mlp.c_fc -> mlp.c_fc"""
    return name.split(".h.")[1].split(".", 1)[1]


def second_moments(model, layers: "dict[str, torch.nn.Module]", batches: Iterable) -> "dict[str, torch.Tensor]":
    """X^T X / N of the inputs X (N, in) of each layer over these batches: name -> (in, in), float64, on the CPU."""
    import torch
    sums, count = {}, 0

    def hook(name):
        def watch(_, inputs):
            x = inputs[0].detach().flatten(0, -2)
            x = x.double() if x.is_cuda else x.float()  # CUDA may multiply fp32 with 10 bits of mantissa
            sums[name] = sums.get(name, 0) + (x.T @ x).cpu().double()
        return watch
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
            count += x.numel()
    for handle in handles:
        handle.remove()
    return {name: total / count for name, total in sums.items()}


def inputs_of(model, layers: "dict[str, torch.nn.Module]", x: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """What each layer sees of the tokens x (B, T): name -> (B * T, in), in the compute dtype."""
    import torch
    seen = {}
    handles = [layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, -2)}))
               for name, layer in layers.items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


class Training:
    """One variant in `train_in_turn`: its model, AdamW over `parameters`, and what came of it."""

    def __init__(self, model, parameters: list, lr: float):
        import torch
        self.model, self.parameters, self.lr = model.train().requires_grad_(False), list(parameters), lr
        for p in self.parameters:
            p.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.seconds, self.losses, self.curve = [], [], []  # per step; curve: [step, bits per byte] now and then

    @property
    def bpb(self) -> float:
        """As validated last."""
        return self.curve[-1][1]

    def beside(self, dense: "Training") -> dict:
        """What came of it, and the speed of a step, compared with a run that was trained in turn with it."""
        return {"rise_vs_dense_pct": 100 * (self.bpb / dense.bpb - 1),
                "step_ms": timing.spread([1000 * s for s in self.seconds]),
                "speedup_step": timing.speedup(self.seconds, dense.seconds)}

    def step(self, x, y, rate: float) -> "torch.Tensor":
        """One step at `rate` times the learning rate. Returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train_in_turn(subject: Subject, runs: dict[str, Training], steps: int, seed: int, val: list, looks: int = 4) -> None:
    """Train every run for `steps` on the same batches, in turn, the rate falling linearly to 0; validate now and then."""
    progress = Progress("training", total=steps * len(runs), unit=" steps")
    batches = subject.train_batches(steps, seed)
    for step in range(steps + 1):
        if step % max(1, steps // looks) == 0 or step == steps:
            for name, run in runs.items():
                run.curve.append([step, subject.bpb(val, run.model)])
                if not math.isfinite(run.bpb):
                    raise UserError(f"{name} has diverged by step {step}: lower its learning rate")
        if step == steps:
            break
        for run in runs.values():
            seconds, loss = timing.timed(subject.device, run.step, *batches[step], 1 - step / steps)
            run.seconds.append(seconds)
            run.losses.append(loss.item())
            progress.update()
    progress.close()
