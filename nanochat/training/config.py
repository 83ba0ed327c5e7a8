"""The flags of `scripts.base_train` that belong to no feature, grouped as `--help` shows them. A feature has its own
(nanochat/features).

`parse_config` returns a `Config`, or raises one UserError that lists every problem. Nothing here imports torch, so that a wrong
command line is answered at once.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from nanochat.cli.flags import LARGEST_SEED, above, at_least, default_of, flag, flag_name, other_than, parse
from nanochat.cli.launch_environment import world_size
from nanochat.cli.paths import folder_problem, output_problem, portable_source
from nanochat.common import print0
from nanochat.data.sources import TokenizerFlags
from nanochat.recipe.depth_growth import mean_cost
from nanochat.recipe.horizon import Horizon, nearest_batch_sizes, plan_horizon
from nanochat.recipe.memory_estimate import micro_batches
from nanochat.recipe.shape import SMEAR_GATE_CHANNELS, GPTConfig, shape_of_depth

MOST_ROWS = 32  # of a micro-batch, where --device-batch-size does not say


@dataclass
class DeviceFlags:
    """The device"""
    device_type: str = flag("", "cuda, mps or cpu; empty takes the best available", choices=("", "cuda", "mps", "cpu"),
                            affects_results=False)
    dtype: str = flag("auto", "compute dtype; auto is bf16 where the hardware has instructions for it",
                      choices=("auto", "bfloat16", "float16", "float32"), affects_results=False)


@dataclass
class RunFlags(DeviceFlags):
    """The run: name, compilation, records and limits"""
    run: str = flag("dummy", "name for wandb; 'dummy' leaves wandb off unless --tracker names it", affects_results=False)
    model_tag: str | None = flag(None, "folder of the run under base_checkpoints; by default d<depth>", affects_results=False)
    seed: int = flag(42, "seed of initialization and of the order of the data", low=0, high=LARGEST_SEED)
    attention_backend: str = flag("auto", "how attention is computed (nanochat/flash_attention.py); auto takes the fastest here, "
                                  "measured on the model's own shapes",
                                  choices=("auto", "fa3", "fa4", "varlen", "flash", "cudnn", "native", "brgemm", "chunked",
                                           "sdpa", "masked"), affects_results=False)
    weight_gradient: str = flag("auto", "how the gradients of linear layers' weights are computed on a CPU in bf16 "
                                "(nanochat/kernels/weight_gradient.py); auto takes the faster way here",
                                choices=("auto", "torch", "brgemm"), affects_results=False)
    head_loss: str = flag("auto", "how head and loss are computed on a CPU in bf16 (nanochat/kernels/head_loss.py); auto takes "
                          "the faster way here", choices=("auto", "torch", "brgemm"), affects_results=False,
                          requires={"chunked_ce": True})
    polar_express: str = flag("auto", "how Muon makes its updates orthogonal (nanochat/kernels/polar_express.py); auto takes the "
                              "fastest way here", choices=("auto", "plain", "gram", "brgemm"), affects_results=False)
    rotary_norm: str = flag("auto", "how rotary positions and norms of queries and keys are computed on a CPU in bf16 "
                            "(nanochat/kernels/rotary.py); auto takes the faster way here",
                            choices=("auto", "torch", "cpp"), affects_results=False)
    fused_qkv: str = flag("auto", "how queries, keys and values are computed (nanochat/kernels/qkv.py): by three products or by "
                          "one; auto takes the faster way here", choices=("auto", "separate", "fused"), affects_results=False)
    compile: bool = flag(True, "compile the model and the optimizer", affects_results=False)
    compile_parts: bool = flag(False, "compile the model block by block: a deep one starts in half the time or less, and "
                               "its steps take up to 3 % longer", affects_results=False, requires={"compile": True})
    # torch's own cache is a temporary folder: a reboot empties it, and rented machines and containers start without it
    compile_cache_dir: str | None = flag(None, "keep compiled graphs in this folder, so that the next start compiles in a "
                                         "fraction of the time", metavar="DIR", affects_results=False,
                                         requires={"compile": True})
    # ZeRO, stage 3 (arXiv 1910.02054): nanochat/training/weight_sharding.py
    shard_weights: bool = flag(False, "of several ranks, give each a part of the weights, and fetch each block before its use: "
                               "for models beyond one device's memory; the model is compiled in parts", affects_results=False)
    # A selective form of activation checkpointing (arXiv 2205.05198). By itself torch.compile keeps whatever a matrix product
    # of the backward pass reads: about 19 elements per layer, token and channel. 11 are enough (dev/LOG.md), for a few more
    # passes over memory; no matrix product and no attention is computed twice. FP8 layers still keep their quantized inputs.
    recompute_activations: bool = flag(
        False, "save memory: recompute norms, rotary positions and squared ReLUs in the backward pass instead of keeping them",
        affects_results=False, requires={"compile": True})
    # Reading a number makes the host wait for the device, which then idles while the host queues the next kernels. Deferred,
    # the loss and the norms of step k are read after step k + 1 is queued; before a checkpoint or an evaluation everything is
    # read. Where a step's loss decides the next step, it has to be read at once.
    deferred_loss_logging: bool = flag(
        False, "read the loss of a step while the next one runs, so that a GPU never waits for the host between steps",
        affects_results=False, requires={"on_divergence": "stop", "block_update_schedule": "full_update"})
    resume_from_step: str = flag("-1", "continue from the checkpoint of this step, or from the latest; -1 starts anew; auto "
                                 "continues from the latest, or starts anew where there is none",
                                 metavar="STEP|latest|auto", affects_results=False)
    overwrite: bool = flag(False, "start anew under the name of a run that has weights; those are deleted when the new run has "
                           "its first checkpoint, not before", affects_results=False, requires={"resume_from_step": "-1"})
    allow_change: bool = flag(False, "resume with flags or text that change the results", affects_results=False,
                              requires={"resume_from_step": other_than("-1", "a step, latest or auto")})
    on_divergence: str = flag("stop", "after a step whose loss or gradients are not finite, which is never taken: stop; skip "
                              "it; or roll back to the last checkpoint and continue with other data",
                              choices=("stop", "skip", "rollback"), affects_results=False)
    max_train_seconds: float = flag(-1.0, "stop, evaluate and save after this much training time; -1 is no limit",
                                    affects_results=False)
    tracker: list[str] = flag([], "also log to these", choices=("none", "wandb", "tensorboard", "trackio"),
                              affects_results=False)
    result_json: str | None = flag(None, "write result.json here too", metavar="PATH", affects_results=False)
    audit: bool = flag(False, "check that nothing trains outside of the timed steps and no step takes more batches than it says: "
                       "`audit` in result.json; takes some time, which does not count", affects_results=False)
    ui: str = flag("auto", "what is shown while it trains: rich, a live view with curves on a terminal; or plain lines; auto "
                   "takes rich on a terminal, where that package is installed", choices=("auto", "rich", "plain"),
                   affects_results=False)
    explain: bool = flag(False, "print what the run would do (shape, batch, steps, learning rates) and stop",
                         affects_results=False)

    def validate(self):
        problems = []
        if not re.fullmatch(r"-1|latest|auto|\d+", self.resume_from_step):
            problems.append(f"--resume-from-step must be a step, 'latest', 'auto' or -1, got {self.resume_from_step!r}")
        if self.model_tag is not None and not re.fullmatch(r"[\w.+-]*[\w+-]", self.model_tag):
            problems.append(f"--model-tag names a folder: letters, digits, '.', '_', '+' and '-' only, got {self.model_tag!r}")
        if self.result_json and (reason := output_problem(self.result_json)):
            problems.append(f"--result-json {reason}")
        if self.compile_cache_dir is not None and (reason := folder_problem(self.compile_cache_dir)):
            problems.append(f"--compile-cache-dir: {reason}")
        if self.ui == "rich" and find_spec("rich") is None:
            problems.append("--ui rich needs the package rich: pip install rich (it is in the extra `ui`), or leave out --ui")
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
    """The model: --depth decides its size; the other flags override what follows from it"""
    depth: int = flag(20, "number of layers", low=1, high=512)
    aspect_ratio: int = flag(64, "width = depth x aspect ratio, rounded up to whole heads", low=1, high=2**16)
    head_dim: int = flag(128, "width of an attention head", low=2, high=512)
    max_seq_len: int = flag(2048, "context length T in tokens", low=2, high=2**24)
    window_pattern: str = flag("SSSL", "attention windows tiled over layers: S a quarter of the context, L all of it")
    short_conv: int = flag(0, "tokens, with its own, that each token sees through a short convolution before attention and MLP "
                           "(arXiv 2109.08668, 2512.17351); 0 is none", low=0, high=64)
    exclusive_attention: bool = flag(False, "take from attention's output what lies along the token's own value, so that it "
                                     "tells of other tokens only (arXiv 2603.09078)")

    def validate(self):
        problems = []
        if not re.fullmatch("[SLsl]+", self.window_pattern):
            problems.append(f"--window-pattern is made of S and L, as in SSSL, got {self.window_pattern!r}")
        if self.short_conv == 1:
            problems.append("--short-conv 1 sees no other token: give 2 or more, or 0 for none")
        if self.head_dim % 2:
            problems.append(f"--head-dim must be even (rotary positions come in pairs): use {self.head_dim + 1}")
        elif self.shape(vocab_size=1).n_embd < SMEAR_GATE_CHANNELS:
            problems.append(f"the model is narrower than {SMEAR_GATE_CHANNELS} channels: "
                            "raise --depth, --aspect-ratio or --head-dim")
        return problems

    def shape(self, vocab_size: int) -> GPTConfig:
        return shape_of_depth(self.depth, self.aspect_ratio, self.head_dim, sequence_len=self.max_seq_len,
                              vocab_size=vocab_size, window_pattern=self.window_pattern, short_conv=self.short_conv,
                              exclusive_attention=self.exclusive_attention)


@dataclass
class HorizonFlags:
    """The horizon: --num-iterations, else --target-flops, else --target-param-data-ratio sets the number of steps"""
    num_iterations: int = flag(-1, "number of optimizer steps; -1 derives it")
    target_flops: float = flag(-1.0, "train for this many FLOPs; -1 leaves it to the ratio", high=1e30,
                               requires={"num_iterations": -1})
    target_param_data_ratio: float = flag(12.0, "tokens per scaling parameter (block matrices and head)", high=1e6)
    device_batch_size: int = flag(-1, f"rows per micro-batch and device; -1 takes {MOST_ROWS}, or fewer where memory is short",
                                  low=-1, high=2**20, affects_results=False)
    auto_batch: bool = flag(False, "take fewer rows than --device-batch-size where memory is short; tokens per optimizer step "
                            "stay the same", affects_results=False)
    total_batch_size: int = flag(-1, "tokens per optimizer step; -1 takes the predicted optimum", high=2**40)
    batch_multiplier: float = flag(1.0, "multiplies the predicted optimal batch; learning rates and weight decay follow by the "
                                   "scaling law", high=1e6, requires={"total_batch_size": -1})

    def __post_init__(self):
        self.takes_what_fits = self.auto_batch or self.device_batch_size == -1  # or fewer rows than device_batch_size
        if self.device_batch_size == -1:
            self.device_batch_size = MOST_ROWS

    def validate(self):
        problems = [f"{flag_name(name)} must be positive, or -1 to derive it, got {value}"
                    for name in ("num_iterations", "target_flops", "total_batch_size", "device_batch_size")
                    if (value := getattr(self, name)) != -1 and value <= 0]
        if max(self.num_iterations, self.target_flops, self.target_param_data_ratio) <= 0:
            problems.append("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio")
        if self.batch_multiplier <= 0:
            problems.append("--batch-multiplier must be positive")
        return problems


@dataclass
class OptimFlags:
    """Optimization: learning rates for d12 and 2^19 tokens per step, scaled to the run's size"""
    embedding_lr: float = flag(0.3, "AdamW learning rate of the embedding tables", low=0)
    unembedding_lr: float = flag(0.008, "AdamW learning rate of the head", low=0)
    matrix_lr: float = flag(0.02, "Muon learning rate of block matrices: spectral norm per update", low=0)
    scalar_lr: float = flag(0.5, "AdamW learning rate of the per-layer scalars", low=0)
    weight_decay: float = flag(0.28, "cautious weight decay of the block matrices", low=0)
    lr_multiplier: float = flag(1.0, "multiplies every learning rate above (smear, backout and short convolutions keep theirs)",
                                low=0)
    wd_multiplier: float = flag(1.0, "multiplies the weight decay", low=0, requires={"weight_decay": above(0)})
    warmup_steps: int = flag(40, "steps of linear learning-rate warm-up", low=0)
    warmdown_ratio: float = flag(0.65, "share of the steps, at the end, over which the learning rate goes down", low=0, high=1)
    warmdown_shape: str = flag("linear", "how it goes down", choices=("linear", "cosine"),
                               requires={"warmdown_ratio": above(0)})
    final_lr_frac: float = flag(0.05, "final learning rate as a share of the peak", low=0, high=1,
                                requires={"warmdown_ratio": above(0)})
    # Each step computes the moments in fp32 and rounds what it keeps. A first moment moves by 3 to 20 % towards the gradient
    # per step, which the 8 bits of bf16 resolve. AdamW's second moment moves by as little as 0.5 %: it would stand still.
    bf16_momentum: bool = flag(False, "save memory: keep the optimizer's first moments in bf16, 2 bytes less per parameter, of "
                               "12 to 16 with weights, gradients and moments")


@dataclass
class EvalFlags:
    """Evaluation, samples and checkpoints: every N steps and at the end; -1 is never (checkpoints: only at the end)"""
    eval_every: int = flag(250, "steps between evaluations in bits per byte", affects_results=False)
    eval_tokens: int = flag(80 * 524288, "validation tokens to evaluate on, at most all there are", low=1, affects_results=False)
    # at most the rounding of the bits per byte depends on it: nothing that training reads
    compile_evaluation: bool = flag(False, "compile the evaluation in bits per byte, too: faster on a GPU where there are many, "
                                    "and less memory for the logits", affects_results=False,
                                    requires={"compile": True, "eval_every": at_least(1)})
    core_metric_every: int = flag(2000, "steps between evaluations of the CORE metric", affects_results=False)
    core_metric_max_per_task: int = flag(500, "examples per CORE task; -1 takes all", affects_results=False,
                                         requires={"core_metric_every": at_least(1)})
    sample_every: int = flag(2000, "steps between samples of text", affects_results=False)
    save_every: int = flag(-1, "steps between checkpoints", affects_results=False)
    keep_last: int = flag(-1, "checkpoints to keep, besides the best by validation; -1 keeps all", affects_results=False,
                          requires={"save_every": at_least(1)})
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
    """All flags of a run: `config.model.depth`, `config.optim.matrix_lr`; a feature's under `config.features[name]`."""
    run: RunFlags = field(default_factory=RunFlags)
    data: DataFlags = field(default_factory=DataFlags)
    model: ModelFlags = field(default_factory=ModelFlags)
    horizon: HorizonFlags = field(default_factory=HorizonFlags)
    optim: OptimFlags = field(default_factory=OptimFlags)
    eval: EvalFlags = field(default_factory=EvalFlags)
    features: dict = field(default_factory=dict)

    def groups(self) -> list:
        """The dataclasses that hold the flags, those of the features last."""
        return [*(getattr(self, f.name) for f in fields(self) if f.name != "features"), *self.features.values()]

    def flat(self) -> dict:
        """Field name of every flag -> its value, for records. Sources inside the base directory are relative to it."""
        flat = {name: value for group in self.groups() for name, value in asdict(group).items()}
        return flat | {name: portable_source(flat[name]) for name in SOURCES if flat[name]}

    def changed_since(self, before: dict) -> list[str]:
        """["--depth 4 -> 6", ...]: flags that affect results and differ from `before`, an earlier `flat()`. A flag that did not
        exist then counts as having had its default."""
        now = self.flat()
        pairs = [(f, before.get(f.name, default_of(f)), now[f.name])
                 for group in self.groups() for f in fields(group) if f.metadata["affects_results"]]
        return [f"{flag_name(f.name)} {old} -> {new}" for f, old, new in pairs if old != new]

    def same_text(self, before: dict) -> bool:
        """Whether the flags name the same text as those of `before`, an earlier `flat()`."""
        now = self.flat()
        return all(now[f.name] == before.get(f.name, default_of(f)) for f in fields(self.data) if f.metadata["affects_results"])

    def memory_fields(self) -> dict:
        """Fields of a MemoryConfig (nanochat/recipe/memory_estimate.py) that flags of the core decide."""
        return {"recompute": self.run.recompute_activations, "momentum_bytes": 2 if self.optim.bf16_momentum else 4} | (
            {"weight_ranks": world_size()} if self.divides_weights else {})

    @property
    def divides_weights(self) -> bool:
        """Whether ranks divide the weights: one alone has nothing to divide."""
        return self.run.shard_weights and world_size() > 1

    def plan(self, shape: GPTConfig, world_size: int = 1) -> Horizon:
        """The horizon for a model of this shape. Raises: ValueError if the batch is not a whole number of micro-batches."""
        flags, optim, depth = self.horizon, self.optim, self.features.get("progressive_depth")
        return plan_horizon(
            shape, device_batch_size=flags.device_batch_size, world_size=world_size,
            total_batch_size=flags.total_batch_size, num_iterations=flags.num_iterations, target_flops=flags.target_flops,
            target_param_data_ratio=flags.target_param_data_ratio, batch_multiplier=flags.batch_multiplier,
            weight_decay=optim.weight_decay, lr_multiplier=optim.lr_multiplier, wd_multiplier=optim.wd_multiplier,
            flops_share=mean_cost(depth, shape) if depth else 1.0)

    @property
    def model_tag(self) -> str:
        return self.run.model_tag or f"d{self.model.depth}"


def share_rows(config: Config) -> bool:
    """Take fewer rows per micro-batch, where --total-batch-size is a whole number of rows for each rank but not of such
    micro-batches: with several ranks, so that the flags of one device serve for them, and where no number was given. Returns
    whether that was done."""
    horizon, ranks = config.horizon, world_size()
    rows, rest = divmod(horizon.total_batch_size, config.model.max_seq_len * ranks)
    possible = [n for n in micro_batches(rows, config.model.max_seq_len) if n <= horizon.device_batch_size]
    if rest or rows % horizon.device_batch_size == 0 or not possible or not (ranks > 1 or horizon.takes_what_fits):
        return False
    horizon.device_batch_size = possible[0]
    return True


def validate(config: Config) -> list[str]:
    """Problems between flags of different groups."""
    problems = []
    horizon, ranks = config.horizon, world_size()
    micro = horizon.device_batch_size * config.model.max_seq_len * ranks
    if config.run.on_divergence == "rollback" and config.eval.save_every <= 0:
        problems.append("--on-divergence rollback goes back to a checkpoint: give --save-every a number")
    if config.divides_weights and config.eval.compile_evaluation:
        problems.append("--compile-evaluation makes one graph of the model, and --shard-weights has to fetch weights in the "
                        "midst of it: leave one of them out")
    if config.divides_weights and config.run.fused_qkv == "fused":
        problems.append("--fused-qkv fused keeps a copy of the weights, which --shard-weights is to save: leave one of them out")
    if horizon.total_batch_size > 0 and horizon.total_batch_size % micro and (ranks > 1 or horizon.takes_what_fits):
        row, each = config.model.max_seq_len, f" for each of {ranks} ranks" if ranks > 1 else ""
        problems.append(
            f"--total-batch-size {horizon.total_batch_size} is not a whole number of rows of {row} tokens (--max-seq-len){each}: "
            f"use {nearest_batch_sizes(horizon.total_batch_size, row * ranks)}")
    elif horizon.total_batch_size > 0 and horizon.total_batch_size % micro:
        problems.append(
            f"--total-batch-size {horizon.total_batch_size} is not a whole number of micro-batches of {micro} tokens "
            f"(--device-batch-size {horizon.device_batch_size} x --max-seq-len {config.model.max_seq_len}): "
            f"use {nearest_batch_sizes(horizon.total_batch_size, micro)}, or change --device-batch-size")
    return problems


def parse_config(features=(), argv: list[str] | None = None, prog: str | None = None,
                 description: str = "Train a GPT.") -> Config:
    """Parse the command line of a run. features: Feature classes (nanochat/features), which add flags and checks.
    prog, description: for --help.

    Raises: UserError, which lists every problem.
    """
    core = [f for f in fields(Config) if f.name != "features"]

    def assemble(instances) -> Config:
        named = dict(zip((f.name for f in core), instances[:len(core)], strict=True))
        return Config(**named, features=dict(zip((feature.name for feature in features), instances[len(core):], strict=True)))

    def validate_all(*instances):
        config = assemble(instances)
        if share_rows(config):
            horizon = config.horizon
            print0(f"micro-batches of {horizon.device_batch_size} rows, as a step has {horizon.total_batch_size:,} tokens")
        return validate(config) + [p for feature in features for p in feature.validate(config)]

    groups: list[Any] = [f.type for f in core] + [feature.Config for feature in features]  # classes, all of them
    return assemble(parse(groups, argv, prog, description=description, validate=validate_all))
