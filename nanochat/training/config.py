"""The core flags of `scripts.base_train`, grouped as `--help` shows them. Each feature brings its own (nanochat/features).

`parse_config` gives a `Config`, or raises one UserError that lists every problem. Nothing here imports torch, so a wrong
command line is answered at once.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nanochat.cli.flags import LARGEST_SEED, default_of, flag, flag_name, parse
from nanochat.cli.launch_environment import world_size
from nanochat.cli.paths import output_problem, portable_source
from nanochat.data.sources import TokenizerFlags
from nanochat.recipe.horizon import Horizon, nearest_batch_sizes, plan_horizon
from nanochat.recipe.shape import SMEAR_GATE_CHANNELS, GPTConfig, shape_of_depth


@dataclass
class DeviceFlags:
    """The device"""
    device_type: str = flag("", "cuda, mps or cpu; empty takes the best there is", choices=("", "cuda", "mps", "cpu"), free=True)
    dtype: str = flag("auto", "compute dtype; auto is bf16 where the hardware multiplies it natively",
                      choices=("auto", "bfloat16", "float16", "float32"), free=True)


@dataclass
class RunFlags(DeviceFlags):
    """The run: its name, its records and its limits"""
    run: str = flag("dummy", "name for wandb; 'dummy' leaves wandb off unless --tracker names it", free=True)
    model_tag: str | None = flag(None, "folder of the run under base_checkpoints; by default d<depth>", free=True)
    seed: int = flag(42, "seed of initialization and of the order of the data", low=0, high=LARGEST_SEED)
    compile: bool = flag(True, "compile the model and the optimizer", free=True)
    compile_parts: bool = flag(False, "compile the model block by block: a deep one starts in half the time or less, and "
                               "its steps take up to 3 % longer", free=True)
    resume_from_step: str = flag("-1", "continue from the checkpoint of this step, or from the latest one; -1 starts anew",
                                 metavar="STEP|latest", free=True)
    overwrite: bool = flag(False, "start anew under the name of a run that has weights; those are deleted when the new run has "
                           "its first checkpoint, not before", free=True)
    allow_change: bool = flag(False, "resume with flags or text that change what is computed", free=True)
    on_divergence: str = flag("stop", "after a step whose loss or gradients are not finite, which is never taken: stop; skip "
                              "it; or roll back to the last checkpoint and go on with other data",
                              choices=("stop", "skip", "rollback"), free=True)
    max_train_seconds: float = flag(-1.0, "stop, evaluate and save after this much training time; -1 is no limit", free=True)
    tracker: list[str] = flag([], "also log to these", choices=("none", "wandb", "tensorboard", "trackio"), free=True)
    result_json: str | None = flag(None, "write result.json here too", metavar="PATH", free=True)
    explain: bool = flag(False, "print what the run would do (shape, batch, steps, learning rates) and stop", free=True)

    def validate(self):
        problems = []
        if not re.fullmatch(r"-1|latest|\d+", self.resume_from_step):
            problems.append(f"--resume-from-step must be a step, 'latest' or -1, got {self.resume_from_step!r}")
        if self.model_tag is not None and not re.fullmatch(r"[\w.+-]*[\w+-]", self.model_tag):
            problems.append(f"--model-tag names a folder: letters, digits, '.', '_', '+' and '-' only, got {self.model_tag!r}")
        if self.result_json and (trouble := output_problem(self.result_json)):
            problems.append(f"--result-json {trouble}")
        if self.overwrite and self.resume_from_step != "-1":
            problems.append("--overwrite starts anew, and --resume-from-step goes on: leave one of them out")
        if self.compile_parts and not self.compile:
            problems.append("--compile-parts says how to compile, and --no-compile not to: leave one of them out")
        if "none" in self.tracker and len(self.tracker) > 1:
            problems.append("--tracker none excludes the others: name trackers or none")
        return problems


@dataclass
class DataFlags(TokenizerFlags):
    """The text"""
    val_data: str | None = flag(None, "an explicit source of validation text; by default a fixed part of --data",
                                metavar="SOURCE")


@dataclass
class ModelFlags:
    """The model: one dial, --depth, and what follows from it unless overridden"""
    depth: int = flag(20, "number of layers", low=1, high=512)
    aspect_ratio: int = flag(64, "width = depth x aspect ratio, rounded up to whole heads", low=1, high=2**16)
    head_dim: int = flag(128, "width of an attention head", low=2, high=512)
    max_seq_len: int = flag(2048, "context length T in tokens", low=2, high=2**24)
    window_pattern: str = flag("SSSL", "attention windows tiled over layers: S a quarter of the context, L all of it")

    def validate(self):
        problems = []
        if not re.fullmatch("[SLsl]+", self.window_pattern):
            problems.append(f"--window-pattern is made of S and L, as in SSSL, got {self.window_pattern!r}")
        if self.head_dim % 2:
            problems.append(f"--head-dim must be even (rotary positions come in pairs): use {self.head_dim + 1}")
        elif self.shape(vocab_size=1).n_embd < SMEAR_GATE_CHANNELS:
            problems.append(f"the model is narrower than {SMEAR_GATE_CHANNELS} channels: "
                            "raise --depth, --aspect-ratio or --head-dim")
        return problems

    def shape(self, vocab_size: int) -> GPTConfig:
        return shape_of_depth(self.depth, self.aspect_ratio, self.head_dim, sequence_len=self.max_seq_len,
                              vocab_size=vocab_size, window_pattern=self.window_pattern)


@dataclass
class HorizonFlags:
    """The horizon: the first of the three that is positive counts"""
    num_iterations: int = flag(-1, "number of optimizer steps; -1 leaves it to the next two")
    target_flops: float = flag(-1.0, "train for this many FLOPs; -1 leaves it to the ratio", high=1e30)
    target_param_data_ratio: float = flag(12.0, "tokens per scaling parameter (block matrices and head)", high=1e6)
    device_batch_size: int = flag(32, "rows per micro-batch and device; halve it if memory runs out", low=1, high=2**20,
                                  free=True)
    auto_batch: bool = flag(False, "take fewer rows where they do not fit into memory; tokens per step stay as they are",
                            free=True)
    total_batch_size: int = flag(-1, "tokens per optimizer step; -1 takes the predicted optimum", high=2**40)
    batch_multiplier: float = flag(1.0, "multiplies the predicted optimal batch; LR and weight decay follow by the law", high=1e6)

    def validate(self):
        problems = [f"--{name.replace('_', '-')} must be positive, or -1 to leave it out, got {value}"
                    for name in ("num_iterations", "target_flops", "total_batch_size")
                    if (value := getattr(self, name)) != -1 and value <= 0]
        if max(self.num_iterations, self.target_flops, self.target_param_data_ratio) <= 0:
            problems.append("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio")
        if self.batch_multiplier <= 0:
            problems.append("--batch-multiplier must be positive")
        if self.total_batch_size > 0 and self.batch_multiplier != 1:
            problems.append("--batch-multiplier scales the predicted batch, so it clashes with --total-batch-size: "
                            "give one of them")
        return problems


@dataclass
class OptimFlags:
    """Optimization: rates for d12 and 2^19 tokens a step, transferred to the run's size"""
    embedding_lr: float = flag(0.3, "AdamW rate of the embedding tables", low=0)
    unembedding_lr: float = flag(0.008, "AdamW rate of the head", low=0)
    matrix_lr: float = flag(0.02, "Muon rate of block matrices: spectral norm per update", low=0)
    scalar_lr: float = flag(0.5, "AdamW rate of the per-layer scalars", low=0)
    weight_decay: float = flag(0.28, "cautious weight decay of the block matrices", low=0)
    lr_multiplier: float = flag(1.0, "multiplies every learning rate above (smear and backout keep theirs, as under any batch)",
                                low=0)
    wd_multiplier: float = flag(1.0, "multiplies the weight decay", low=0)
    warmup_steps: int = flag(40, "steps of linear warm-up", low=0)
    warmdown_ratio: float = flag(0.65, "share of the steps over which the rate goes down", low=0, high=1)
    warmdown_shape: str = flag("linear", "how it goes down", choices=("linear", "cosine"))
    final_lr_frac: float = flag(0.05, "final rate as a share of the peak", low=0, high=1)


@dataclass
class EvalFlags:
    """Evaluation, samples and checkpoints: every N steps and at the end; -1 is never (checkpoints: only at the end)"""
    eval_every: int = flag(250, "steps between evaluations in bits per byte", free=True)
    eval_tokens: int = flag(80 * 524288, "validation tokens to evaluate on, at most all there are", low=1, free=True)
    core_metric_every: int = flag(2000, "steps between evaluations of the CORE metric", free=True)
    core_metric_max_per_task: int = flag(500, "examples per CORE task; -1 takes all", free=True)
    sample_every: int = flag(2000, "steps between samples of text", free=True)
    save_every: int = flag(-1, "steps between checkpoints", free=True)
    keep_last: int = flag(-1, "checkpoints to keep, besides the best by validation; -1 keeps all", free=True)
    target_metric_name: str | None = flag(None, "metric whose first crossing of the threshold is timed",
                                          choices=("val_bpb", "smooth_loss"))
    target_metric_threshold: float | None = flag(None, "the threshold, crossed from above")

    def validate(self):
        problems = []
        if (self.target_metric_name is None) != (self.target_metric_threshold is None):
            problems.append("--target-metric-name and --target-metric-threshold come together: give both or neither")
        if self.target_metric_name == "val_bpb" and self.eval_every <= 0:
            problems.append("--target-metric-name val_bpb needs evaluations: give --eval-every")
        if self.keep_last != -1 and self.keep_last < 1:
            problems.append(f"--keep-last must be at least 1, or -1 to keep all, got {self.keep_last}")
        return problems


SOURCES = ("data", "val_data")  # flags that name text


@dataclass
class Config:
    """Every flag of a run: `config.model.depth`, `config.optim.matrix_lr`; a feature's under `config.features[name]`."""
    run: RunFlags = field(default_factory=RunFlags)
    data: DataFlags = field(default_factory=DataFlags)
    model: ModelFlags = field(default_factory=ModelFlags)
    horizon: HorizonFlags = field(default_factory=HorizonFlags)
    optim: OptimFlags = field(default_factory=OptimFlags)
    eval: EvalFlags = field(default_factory=EvalFlags)
    features: dict = field(default_factory=dict)

    def flat(self) -> dict:
        """Flag name (with underscores) -> value, for records: sources inside the base directory are relative to it."""
        groups = [getattr(self, f.name) for f in fields(self) if f.name != "features"]
        flat = {name: value for group in [*groups, *self.features.values()] for name, value in asdict(group).items()}
        return flat | {name: portable_source(flat[name]) for name in SOURCES if flat[name]}

    def changed_since(self, before: dict) -> list[str]:
        """["--depth 4 -> 6", ...]: the flags that differ from `before`, which `flat` gave, and decide what is computed. One
        that was not there yet had its default."""
        groups, now = [getattr(self, f.name) for f in fields(self) if f.name != "features"], self.flat()
        pairs = [(f, before.get(f.name, default_of(f)), now[f.name])
                 for group in [*groups, *self.features.values()] for f in fields(group) if not f.metadata["free"]]
        return [f"{flag_name(f.name)} {old} -> {new}" for f, old, new in pairs if old != new]

    def same_text(self, before: dict) -> bool:
        """Whether the text is the one of `before`, which `flat` gave, as far as flags tell."""
        now = self.flat()
        return all(now[f.name] == before.get(f.name, default_of(f)) for f in fields(self.data) if not f.metadata["free"])

    def plan(self, shape: GPTConfig, world_size: int = 1) -> Horizon:
        """The horizon that the flags ask for with a model of this shape. ValueError where the batch does not divide."""
        flags, optim = self.horizon, self.optim
        return plan_horizon(
            shape, device_batch_size=flags.device_batch_size, world_size=world_size,
            total_batch_size=flags.total_batch_size, num_iterations=flags.num_iterations, target_flops=flags.target_flops,
            target_param_data_ratio=flags.target_param_data_ratio, batch_multiplier=flags.batch_multiplier,
            weight_decay=optim.weight_decay, lr_multiplier=optim.lr_multiplier, wd_multiplier=optim.wd_multiplier)

    @property
    def model_tag(self) -> str:
        return self.run.model_tag or f"d{self.model.depth}"


def validate(config: Config) -> list[str]:
    """Clashes between flags of different groups, in words."""
    problems = []
    horizon, ranks = config.horizon, world_size()
    micro = horizon.device_batch_size * config.model.max_seq_len * ranks
    if config.run.on_divergence == "rollback" and config.eval.save_every <= 0:
        problems.append("--on-divergence rollback goes back to a checkpoint: give --save-every a number")
    if horizon.total_batch_size > 0 and horizon.total_batch_size % micro:
        problems.append(
            f"--total-batch-size {horizon.total_batch_size} is not a whole number of micro-batches of {micro} tokens "
            f"(--device-batch-size {horizon.device_batch_size} x --max-seq-len {config.model.max_seq_len} x {ranks} "
            f"ranks): use {nearest_batch_sizes(horizon.total_batch_size, micro)}, or change --device-batch-size")
    return problems


def parse_config(features=(), argv: list[str] | None = None, prog: str | None = None) -> Config:
    """The command line of a run. `features` are Feature classes (nanochat/features); each adds its flags and checks."""
    core = [f for f in fields(Config) if f.name != "features"]

    def assemble(instances) -> Config:
        named = dict(zip((f.name for f in core), instances[:len(core)], strict=True))
        return Config(**named, features=dict(zip((feature.name for feature in features), instances[len(core):], strict=True)))

    def validate_all(*instances):
        config = assemble(instances)
        return validate(config) + [p for feature in features for p in feature.validate(config)]

    groups: list[Any] = [f.type for f in core] + [feature.Config for feature in features]  # classes, all of them
    return assemble(parse(groups, argv, prog, description="Train a GPT.", validate=validate_all))
