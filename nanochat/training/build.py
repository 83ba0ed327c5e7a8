"""From flags to a run that is ready to train: text, plan, model, optimizer, loader, records; or a checkpoint taken over."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from nanochat.checkpoint_manager import build_model, recover_interrupted_writes
from nanochat.cli.launch_environment import restarts
from nanochat.cli.paths import located, runs_dir, writable_base_dir
from nanochat.common import UserError, get_base_dir, is_main_rank, print0
from nanochat.dataloader import PackedRows, TrainLoader
from nanochat.dataset import TokenDataset, prepare_tokens, train_tokenizer
from nanochat.features import FEATURES, Feature, Features
from nanochat.flash_attention import make_attention
from nanochat.gpt import GPT, QK_SCALE
from nanochat.kernels.cross_entropy import ChunkedCrossEntropy, kernel_name
from nanochat.kernels.embedding import choose_embedding_gradient
from nanochat.kernels.head_loss import choose_head_loss, use_head_loss
from nanochat.kernels.inference import use_inference_kernels
from nanochat.kernels.linear import Linear, use_own_weight_gradient
from nanochat.kernels.polar_express import choose_polar_express
from nanochat.kernels.qkv import choose_qkv, fused_qkv
from nanochat.kernels.rotary import choose_rotary_norm, rotary_norm_cpp
from nanochat.kernels.weight_gradient import choose_weight_gradient
from nanochat.recipe.horizon import Horizon
from nanochat.recipe.memory_estimate import MemoryConfig, micro_batches
from nanochat.recipe.shape import MUON_BATCH, GPTConfig
from nanochat.runtime.clock import Clock
from nanochat.runtime.compilation import CompiledModel, compile_unavailable_reason, use_compile_cache
from nanochat.runtime.compute_dtype import dtype_name, pick_compute_dtype
from nanochat.runtime.cores import cache_bytes, choose_threads
from nanochat.runtime.device import device_name, give_back_memory, init_device
from nanochat.runtime.distributed import Ranks, broadcast_object, grad_scaler, on_main_rank_first
from nanochat.runtime.lock import RunLock
from nanochat.runtime.provenance import source_fingerprint
from nanochat.runtime.signals import Signals
from nanochat.runtime.tuner import Choice, Tuner
from nanochat.tokenizer import FILE_NAME, Tokenizer, get_tokenizer
from nanochat.training import run_folder
from nanochat.training.audit import Audit
from nanochat.training.auto_batch import check_memory, choose_micro_batch_size, is_out_of_memory, out_of_memory_advice
from nanochat.training.config import Config
from nanochat.training.console import Console
from nanochat.training.divergence import DivergencePolicy
from nanochat.training.evaluation import Evaluator
from nanochat.training.live_view import open_console
from nanochat.training.recorder import Recorder, describe_run, write_config, write_failed_start
from nanochat.training.resume import Checkpoints, open_checkpoint, refuse_changes
from nanochat.training.run_stats import RunStats
from nanochat.training.state import RunPlan, TrainState
from nanochat.training.step import PendingStep, Trainer
from nanochat.training.weight_sharding import make_sharding


class FailedStart(Exception):
    """A run that could not be built for want of memory. Its result.json is written; the message says what to do."""


@dataclass
class Run:
    """A run that is ready to train: the parts that the loop (nanochat/training/loop.py) works with."""
    trainer: Trainer                    # takes the steps
    recorder: Recorder                  # writes rows and result.json
    checkpoints: Checkpoints
    evaluator: Evaluator
    divergence: DivergencePolicy
    signals: Signals
    lock: RunLock | None                # rank 0's
    pending: PendingStep | None = None  # the last step, where its results have not been read yet
    stop_signal: int = 0                # under torchrun, the signal at which all ranks have agreed to stop
    time_is_up: bool = False            # under torchrun, whether they have agreed that --max-train-seconds are over

    @property
    def plan(self) -> RunPlan:
        return self.trainer.plan

    @property
    def state(self) -> TrainState:
        return self.trainer.state

    @property
    def defers_metrics(self) -> bool:
        """Whether a step's results are read while the next one runs: not where they decide about that one."""
        flags = self.plan.config.run
        return (flags.deferred_loss_logging and flags.on_divergence == "stop"
                and not self.state.features.follows_results)

    @property
    def console(self) -> Console:
        return self.recorder.console

    @contextmanager
    def observed(self):
        """For the training loop: shows it, times it and, with --audit, watches it."""
        audit = self.trainer.audit
        with self.console.training(), self.state.clock.looping(), audit.counting() if audit else nullcontext():
            yield

    def save(self) -> None:
        """Begin to write a checkpoint. What the loop waits for is timed."""
        with self.state.clock.saving():
            self.checkpoints.save()

    def wait_until_saved(self) -> None:
        """Wait until nothing is being written, which is timed too."""
        with self.state.clock.saving():
            self.checkpoints.wait()


def build_run(config: Config, available: tuple[type[Feature], ...] = FEATURES) -> Run:
    """Build the run that the flags describe, holding the lock of its folder.

    available: the features that flags can switch on. Raises: UserError for what the user can mend, FailedStart where memory
    runs out; after any failure the lock is free again.
    """
    started, (device, ranks) = time.monotonic(), init_device(config.run.device_type)
    source_fingerprint()  # now: result.json is written at the end, when the files may have been edited
    dtype, why = pick_compute_dtype(device, config.run.dtype)
    print0(f"device: {device_name(device)} | compute dtype: {dtype_name(dtype)} ({why})")
    run_dir, plan = runs_dir() / config.model_tag, None
    lock = on_main_rank_first(lambda: take_lock(run_dir), others=lambda: None)
    try:
        features = Features(config, available)
        checkpoint = find_checkpoint(config, run_dir)
        plan = make_plan(config, device, ranks, dtype, features, checkpoint and checkpoint[2])
        return assemble(build_trainer(plan, features, checkpoint and checkpoint[2]), checkpoint, lock, started)
    except BaseException as e:
        no_memory = is_out_of_memory(e)
        try:
            if is_main_rank():
                run_folder.restore_replaced(run_dir)
                if not isinstance(e, (UserError, KeyboardInterrupt)):  # what the user can mend is no result
                    error = f"out of memory. {out_of_memory_advice(plan)}" if no_memory else f"{type(e).__name__}: {e}"
                    write_failed_start(run_dir, describe_run(config, device, dtype, plan), config, error, no_memory, started)
        finally:
            if lock:
                lock.release()
        if no_memory:
            raise FailedStart(f"out of memory. {out_of_memory_advice(plan)}") from e
        raise


def take_lock(run_dir) -> RunLock:
    writable_base_dir()
    return RunLock(run_dir)


def find_checkpoint(config: Config, run_dir) -> tuple[dict, dict, dict] | None:
    """The checkpoint to resume from, None for a new run. Raises: UserError where a new run may not begin in the folder, or where
    flags differ from the checkpoint's."""
    step = broadcast_object(on_main_rank_first(lambda: step_to_resume(run_dir, config.run.resume_from_step), lambda: None))
    if step == "-1":
        on_main_rank_first(lambda: refuse_start(run_dir, config.run.overwrite), others=lambda: None)
        return None
    checkpoint = on_main_rank_first(lambda: open_checkpoint(run_dir, step))
    refuse_changes(config, config.changed_since(checkpoint[2]["user_config"]))
    return checkpoint


def step_to_resume(run_dir, wanted: str) -> str:
    """`run_folder.step_to_resume`, after what a killed process left half done has been repaired."""
    if wanted == "auto" or restarts():
        run_folder.restore_replaced(run_dir)
        recover_interrupted_writes(run_dir)
    return run_folder.step_to_resume(run_dir, wanted)


def refuse_start(run_dir, overwrite: bool) -> None:
    run_folder.restore_replaced(run_dir)
    if problem := run_folder.start_problem(run_dir, overwrite):
        raise UserError(f"{problem}.")


def make_plan(config: Config, device: torch.device, ranks: Ranks, dtype: torch.dtype, features: Features,
              saved: dict | None = None) -> RunPlan:
    """Prepare the text and work out what the run will do; nothing is on the device yet.

    saved: the state.json of the checkpoint to resume from. Raises: UserError.
    """
    recorded = saved and config.same_text(saved["user_config"]) and saved["tokens"] or None
    tokenizer, tokens = on_main_rank_first(lambda: prepare_text(config, recorded))
    shape = config.model.shape(tokenizer.get_vocab_size())
    horizon = config.plan(shape, ranks.world_size)
    if saved and saved["step"] > horizon.num_iterations:
        raise UserError(f"the checkpoint is of step {saved['step']}, and the run ends at {horizon.num_iterations} "
                        f"({horizon.reason}): lengthen it, or resume from an earlier step.")
    return plan_of(config, device, ranks, dtype, features, tokenizer, tokens, shape, horizon)


def plan_of(config: Config, device: torch.device, ranks: Ranks, dtype: torch.dtype, features: Features,
            tokenizer: Tokenizer | None, tokens, shape: GPTConfig, horizon: Horizon) -> RunPlan:
    """The plan of a run on these tokens: a TokenDataset, or what stands in for one. Its Trainer needs no tokenizer."""
    return RunPlan(
        config=config, device=device, ranks=ranks, dtype=dtype, tokenizer=tokenizer, tokens=tokens, shape=shape, horizon=horizon,
        micro_batch_size=config.horizon.device_batch_size, compile=config.run.compile,
        compile_whole=not (config.run.compile_parts or features.many_variants or config.divides_weights),
        memory=MemoryConfig(dtype.itemsize, config.run.compile, cuda=device.type == "cuda", **config.memory_fields(),
                            **features.memory()))


def prepare_text(config: Config, recorded: str | None = None) -> tuple[Tokenizer, TokenDataset]:
    """The tokenizer and the token dataset, made first where they are missing.

    recorded: where the tokens of the run to be resumed are, which are used when this machine does not have the text itself.
    """
    data = config.data
    if not (get_base_dir() / "tokenizer" / FILE_NAME).exists():
        print0("no tokenizer yet: training one")
        tokenizer = train_tokenizer(data.data, data.vocab_size, doc_cap=data.doc_cap, **data.reading())
        tokenizer.save(get_base_dir() / "tokenizer")
    tokenizer = get_tokenizer()
    try:
        folder = prepare_tokens(data.data, tokenizer, val_source=data.val_data, **data.reading())
    except UserError as e:
        if not recorded or not located(recorded).is_dir():
            raise
        folder = located(recorded)
        print0(f"going on with the tokens prepared before, {folder}: {e}")
    tokens = TokenDataset.open(folder)
    give_back_memory()
    print0(f"text: {data.data} | vocabulary {tokenizer.get_vocab_size():,} | tokens: "
           f"{tokens.split('train').num_tokens:,} training, {tokens.split('val').num_tokens:,} validation")
    if left_out := tokens.left_out():
        print0(left_out)
    return tokenizer, tokens


def build_trainer(plan: RunPlan, features: Features, saved: dict | None = None) -> Trainer:
    """Build model, optimizer, compiled forward and loader. No run folder is needed.

    saved: as for `make_plan`; of it come the kernels and, unless the flags say it, the micro-batch, so that the bits stay the
    same.
    Raises: before anything is built, UserError where the text has too few rows, MemoryError where the run cannot fit.
    """
    config, rows = plan.config, training_rows(plan)
    check_memory(plan)
    use_compile_cache(config.run.compile_cache_dir)
    torch.manual_seed(config.run.seed)
    model = build_model(plan.shape, plan.dtype, plan.device)
    before = saved["numerics_environment"] if saved else {}
    threads = use_fastest_threads(plan, before)
    tuner = Tuner(plan.device)  # its choices are of this number of threads
    attention = model.kernels.attention = make_attention(
        plan.device, plan.dtype, plan.shape.head_dim, plan.shape.sequence_len, model.window_sizes, rows=plan.micro_batch_size,
        heads=plan.shape.n_head, kv_heads=plan.shape.n_kv_head, tuner=tuner, backend=config.run.attention_backend,
        recorded=before.get("attention"))
    print0(str(attention))
    features.on_model(model, plan.horizon)
    if plan.compile and (reason := compile_unavailable_reason(plan.device)):
        print0(f"going on without torch.compile, slower: {reason}")
        plan = plan.without_compiler()
    kernels = choose_kernels(plan, model, tuner, before)
    plan = replace(plan, kernel_choices={"attention": attention.describe(), **threads, **kernels})
    give_back_memory()
    flags, factor = config.optim, plan.horizon.lr_factor
    optimizer = model.setup_optimizer(
        flags.unembedding_lr * factor, flags.embedding_lr * factor, flags.matrix_lr * factor, plan.horizon.weight_decay,
        flags.scalar_lr * plan.horizon.scalar_lr_factor,
        momentum_dtype=torch.bfloat16 if flags.bf16_momentum else torch.float32, compile=plan.compile,
        muon_way=kernels["polar express"]["name"], muon_batch=muon_batch(plan.device))
    state = TrainState(
        model=model, optimizer=optimizer, sharding=make_sharding(model, optimizer, config.run.shard_weights), features=features,
        clock=Clock(plan.device),
        scaler=grad_scaler(plan.device, enabled=plan.dtype == torch.float16),
        stats=RunStats(config.eval.target_metric_name, config.eval.target_metric_threshold))
    if config.horizon.takes_what_fits:
        size, possible = before.get("rows per micro-batch"), micro_batches(config.horizon.device_batch_size)
        plan = plan.with_micro_batch_size(size if size in possible else choose_micro_batch_size(plan, state))
    forward = CompiledModel(model, plan.compile_whole, recompute_activations=config.run.recompute_activations) \
        if plan.compile else model
    loader = TrainLoader(rows, device_batch_size=plan.micro_batch_size, grad_accum_steps=plan.horizon.grad_accum_steps,
                         rank=plan.ranks.rank, world_size=plan.ranks.world_size, device=plan.device)
    return Trainer(plan, state, forward, loader, Signals())


def muon_batch(device: torch.device) -> int:
    """How many elements Muon updates at once: on a CPU so many that four fp32 stacks fit into its last-level cache."""
    cache = cache_bytes() if device.type == "cpu" else None
    return min(MUON_BATCH, cache // 16) if cache else MUON_BATCH


def use_fastest_threads(plan: RunPlan, before: dict) -> dict[str, dict]:
    """On a CPU, where one process uses all of it, take as many threads as are fastest. Returns the choice for the records, none
    where there was nothing to choose."""
    if plan.device.type != "cpu" or plan.ranks.local_world_size > 1:
        return {}
    choice = choose_threads(Tuner(plan.device), plan.shape.n_embd, plan.dtype, before.get("threads"))
    if choice is None:
        return {}
    print0(f"threads: {choice}")
    return {"threads": choice._asdict()}


def choose_kernels(plan: RunPlan, model: GPT, tuner: Tuner, before: dict) -> dict[str, dict]:
    """Let the model take the kernels, attention aside, that are the fastest here; what was measured is printed.

    before: the `numerics_environment` of the run to be resumed, or {}. Returns the choices that decide about rounding: name ->
    name, reason and times.
    """
    flags, T, tokens = plan.config.run, plan.shape.sequence_len, plan.micro_batch_size * plan.shape.sequence_len
    layers = [layer for layer in model.linears().values() if isinstance(layer, Linear)]
    gradient = choose_weight_gradient(
        [layer.weight for layer in layers], tokens, plan.dtype, tuner=tuner, wanted=flags.weight_gradient,
        recorded=before.get("weight gradient"))
    if gradient.name == "brgemm":
        use_own_weight_gradient(layers)
    head = choose_loss(plan, model, tuner, before)
    qkv = choose_qkv(
        [(block.attn.c_q, block.attn.c_k, block.attn.c_v) for block in model.transformer.h], tokens, plan.dtype,
        tuner=tuner, wanted="separate" if plan.config.divides_weights else flags.fused_qkv, recorded=before.get("qkv"))
    if qkv.name == "fused":
        model.kernels.project_qkv = fused_qkv
    rotary = choose_rotary_norm(
        plan.micro_batch_size, T, plan.shape.n_head, *model.rotary_tables(0, T), QK_SCALE, compiled=plan.compile, tuner=tuner,
        wanted=flags.rotary_norm, recorded=before.get("rotary norm"))
    if rotary.name == "cpp":
        model.kernels.rotary_norm = rotary_norm_cpp
    tables = choose_embedding_gradient(
        [model.transformer.wte, *model.value_embeds.values()], tokens, tuner,
        recorded=None if plan.device.type == "cpu" else before.get("embedding gradient"))
    polar = choose_polar_express(
        [tuple(p.shape) for p in model.muon_matrices()], model.muon_dtype, plan.device, tuner=tuner, wanted=flags.polar_express,
        recorded=before.get("polar express"))
    chosen = {
        "weight gradients": gradient, **({"head and loss": head} if head else {}), "queries, keys and values": qkv,
        "rotary and norm": rotary, "embedding gradients": tables,
        "Muon's polar factors": polar, "evaluation's passes": use_inference_kernels(model, tokens, tuner)}
    for what, choice in chosen.items():
        if choice.milliseconds:
            print0(f"{what}: {choice}")
    decisive = {"weight gradient": gradient, **({"head loss": head} if head else {}), "rotary norm": rotary, "qkv": qkv,
                "polar express": polar}
    if plan.device.type != "cpu":  # on a CPU both ways give the same bits
        decisive["embedding gradient"] = tables
    return {name: choice._asdict() for name, choice in decisive.items()}


def choose_loss(plan: RunPlan, model: GPT, tuner: Tuner, before: dict) -> Choice | None:
    """`choose_kernels` for head and loss, after the gradients of weights; None without --chunked-ce."""
    loss, head = model.kernels.loss, model.lm_head
    if not isinstance(loss, ChunkedCrossEntropy):
        return None
    choice = choose_head_loss(
        head, plan.micro_batch_size * plan.shape.sequence_len, plan.dtype, plan.shape.vocab_size, plain=loss.is_plain(head),
        chunk_tokens=plan.config.features["chunked_ce"].ce_chunk_tokens, compiled=plan.compile, tuner=tuner,
        wanted=plan.config.run.head_loss, recorded=before.get("head loss"))
    use_head_loss(loss, choice.name)
    kernel = "brgemm" if choice.name.startswith("brgemm") else kernel_name(plan.device.type, plan.dtype)
    print0(f"cross-entropy: {loss.chunk_tokens:,} tokens at a time, kernel: {kernel}")
    return choice


def build_trainer_only(config: Config, available: tuple[type[Feature], ...] = FEATURES) -> Trainer:
    """A trainer at step 0 by itself, to measure its steps: no lock is taken, no run folder made."""
    device, ranks = init_device(config.run.device_type)
    features = Features(config, available)
    trainer = build_trainer(make_plan(config, device, ranks, pick_compute_dtype(device, config.run.dtype)[0], features), features)
    trainer.loader.start(0)
    return trainer


def training_rows(plan: RunPlan) -> PackedRows:
    """The text in rows. Raises: UserError where there are too few for a step."""
    rows = PackedRows(plan.tokens.split("train"), plan.shape.sequence_len, plan.config.run.seed)
    rows.require(plan.horizon.total_batch_size // plan.shape.sequence_len)
    packing = rows.report(groups=1)
    print0(f"rows of {plan.shape.sequence_len} tokens: {packing['tokens_lost_share']:.2%} of the tokens lost, "
           f"{packing['documents_cut_share']:.1%} of the documents cut ({packing['documents_longer_share']:.1%} are longer than "
           "a row)")
    return rows


def assemble(trainer: Trainer, checkpoint: tuple[dict, dict, dict] | None, lock: RunLock | None, started: float) -> Run:
    """The run of a trainer, with its folder: begun, or taken over from the checkpoint."""
    plan, state = trainer.plan, trainer.state
    console = open_console(plan, state, trainer.signals)
    trainer.say = console.line
    state.step = checkpoint[2]["step"] if checkpoint else 0
    checkpoints, same_run = Checkpoints(plan, state, console), True
    if checkpoint:
        same_run = checkpoints.restore(checkpoint)
    else:
        on_main_rank_first(lambda: begin_folder(plan), others=lambda: None)
    trainer.loader.start(state.batches_used)
    if plan.config.run.audit:
        trainer.audit = Audit(state, micro_batches=plan.horizon.grad_accum_steps)
    recorder = Recorder(plan, state, console, started, same_run)
    if plan.compile:
        print0("compiling: about a minute the first time, seconds from then on; it does not count as training time")
    return Run(trainer, recorder, checkpoints, Evaluator(plan, state, recorder, trainer.signals),
               DivergencePolicy(plan.config.run.on_divergence), trainer.signals, lock)


def begin_folder(plan: RunPlan) -> None:
    """Make the folder of a new run, with its flags and its tokenizer."""
    run_folder.begin(plan.run_dir, plan.config.run.overwrite)
    write_config(plan)
    plan.tokenizer.save(plan.run_dir / "tokenizer")
