"""Evaluation and sampling during training. The uncompiled model is used, except for bits per byte under --compile-evaluation,
and none of it counts as training time."""

from contextlib import contextmanager

from nanochat.common import is_main_rank, print0
from nanochat.core_eval import CoreUnavailable, evaluate_core
from nanochat.dataloader import val_batches
from nanochat.engine import SAMPLE_TOKENS, Engine, sample_prompts
from nanochat.loss_eval import evaluate_bpb, no_tokens
from nanochat.runtime.device import evaluation
from nanochat.runtime.distributed import in_step
from nanochat.runtime.signals import Signals
from nanochat.tokenizer import get_token_bytes
from nanochat.training.compiled_evaluation import CompiledEvaluation
from nanochat.training.recorder import Recorder
from nanochat.training.state import RunPlan, TrainState


class Evaluator:
    """Evaluates the model of `state` and records the results."""

    def __init__(self, plan: RunPlan, state: TrainState, recorder: Recorder, signals: Signals):
        self.plan, self.state, self.recorder, self.signals = plan, state, recorder, signals
        self.token_bytes = get_token_bytes(plan.device, plan.tokenizer)
        self.compiled = CompiledEvaluation(state.model, plan.micro_batch_size, plan.shape.sequence_len) \
            if plan.compile and plan.config.eval.compile_evaluation else None

    @contextmanager
    def evaluation_context(self, clock=None):
        """Put the model in evaluation mode and time it apart: by `clock`, if it is not for evaluations. A signal ends it at once,
        unless other ranks wait for a result."""
        model = self.state.model
        with self.signals.raise_immediately(self.plan.ranks.world_size == 1), clock or self.state.clock.evaluating(), \
                evaluation(model), self.state.features.eval_context(model):
            yield

    def bits_per_byte(self) -> None:
        """Evaluate bits per byte on the first --eval-tokens validation tokens."""
        plan, state = self.plan, self.state
        if self.compiled:
            with self.evaluation_context(state.clock.compiling()):
                self.compiled.warm_up()
        with self.evaluation_context():
            batches = val_batches(plan.tokens.split("val"), plan.shape.sequence_len, plan.micro_batch_size,
                                  plan.config.eval.eval_tokens, plan.ranks.rank, plan.ranks.world_size, plan.device)
            if state.model.called_in_step:
                batches = in_step(batches, no_tokens(plan.shape.sequence_len, plan.device), plan.device)
            bpb = evaluate_bpb(self.compiled or state.model, batches, None, self.token_bytes)
        state.stats.add_evaluation(state.step, bpb, state.clock.train)
        self.recorder.bits_per_byte(bpb)

    def core_metric(self) -> None:
        """Evaluate the CORE metric, where its bundle is at hand or can be fetched; otherwise print a line that says why not."""
        try:
            with self.evaluation_context():
                results = evaluate_core(self.state.model, self.plan.tokenizer, self.plan.device,
                                        self.plan.config.eval.core_metric_max_per_task)
        except CoreUnavailable as e:
            return self.recorder.console.line(f"step {self.state.step} | CORE left out: {e}")
        self.recorder.core_metric(results["core_metric"])

    def sample(self) -> None:
        """Print and record a few greedy continuations, on rank 0."""
        if not (is_main_rank() or self.state.model.called_in_step):
            return
        self.recorder.console.line(f"step {self.state.step} | samples")
        texts = []
        with self.evaluation_context():
            engine = Engine(self.state.model, self.plan.tokenizer)
            for prompt in sample_prompts(self.plan.config.data.data):
                texts.append(engine.complete(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0))
                print0("  " + texts[-1].replace("\n", "\n  "))
        self.recorder.samples(texts)
