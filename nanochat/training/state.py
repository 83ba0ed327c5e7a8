"""What a run is (`RunPlan`, frozen) and where it stands (`TrainState`, which a checkpoint restores)."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from nanochat.cli.paths import runs_dir
from nanochat.dataset import TokenDataset
from nanochat.features import Features
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.recipe.horizon import Horizon
from nanochat.recipe.memory_estimate import MemoryConfig
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.clock import Clock
from nanochat.runtime.distributed import Ranks
from nanochat.runtime.rng import rng_state, set_rng_state
from nanochat.tokenizer import Tokenizer
from nanochat.training.config import Config
from nanochat.training.run_stats import RunStats
from nanochat.training.sharding import Sharding


@dataclass(frozen=True)
class RunPlan:
    """Everything that describes a run and does not change while it trains."""
    config: Config              # the flags as typed
    device: torch.device
    ranks: Ranks
    dtype: torch.dtype          # of activations and matrix products
    tokenizer: Tokenizer
    tokens: TokenDataset
    shape: GPTConfig
    horizon: Horizon            # steps, tokens per step, micro-batches per step
    micro_batch_size: int       # rows per micro-batch and device: --device-batch-size, or fewer that fit in memory
    compile: bool               # --compile, where torch.compile works
    compile_whole: bool         # otherwise in parts
    memory: MemoryConfig        # what the memory of a step depends on
    kernel_choices: dict = field(default_factory=dict)  # name, reason, times of each, see runtime/tuner.py

    @property
    def run_dir(self) -> Path:
        return runs_dir() / self.config.model_tag

    def with_micro_batch_size(self, rows: int) -> "RunPlan":
        """The plan with micro-batches of `rows`; the tokens per step stay the same."""
        micro_batch = rows * self.shape.sequence_len * self.ranks.world_size
        horizon = replace(self.horizon, grad_accum_steps=self.horizon.total_batch_size // micro_batch)
        return replace(self, micro_batch_size=rows, horizon=horizon)

    def without_compiler(self) -> "RunPlan":
        return replace(self, compile=False, memory=replace(self.memory, compiled=False))


@dataclass
class TrainState:
    """Exactly what a checkpoint restores. Where the data stands follows from it: a batch is a function of (seed, batch number,
    rank)."""
    model: GPT
    optimizer: MuonAdamW         # of several ranks, each updates the pieces that it owns
    sharding: Sharding
    scaler: torch.amp.GradScaler
    features: Features
    clock: Clock
    stats: RunStats
    step: int = 0                # optimizer steps taken

    @property
    def batches_used(self) -> int:
        """Batches read so far: one per step, and those that rollbacks have left out."""
        return self.step + sum(diverged_at + 1 - back_to for diverged_at, back_to in self.stats.rollbacks)

    def state_dict(self) -> dict:
        """All but the tensors of model and optimizer, as JSON. The generators' states are rank 0's: every rank seeds them alike
        and draws alike."""
        return {"clock": self.clock.state_dict(), "stats": self.stats.state_dict(), "scaler": self.scaler.state_dict(),
                "features": self.features.state_dict(), "rng": rng_state(self.model.get_device())}

    def load_state_dict(self, state: dict) -> None:
        """Take over `state_dict()` and the step, for a model and an optimizer that have their tensors already."""
        self.step = state["step"]
        self.clock.load_state_dict(state["clock"])
        self.stats.load_state_dict(state["stats"])
        self.scaler.load_state_dict(state["scaler"])
        self.features.load_state_dict(state["features"])
        set_rng_state(state["rng"], self.model.get_device())
