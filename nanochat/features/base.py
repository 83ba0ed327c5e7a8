"""The hooks of a feature, in the order in which a run calls them, and `Features`, which calls those of all enabled ones.
No torch."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


class Feature:
    """An optimization behind flags. Every hook does nothing unless it is overridden.

    before_step, after_step, step_columns and eval_context are outside of a step's time. They leave weights, gradients and moments
    as they are: --audit checks it.
    """

    name: str                     # key of its flags in `config.features` and of its state in checkpoints
    dynamic_forward_args = False  # whether before_step's answers differ from step to step
    follows_results = False       # whether they depend on after_step, so that no step may be launched before it
    many_variants = False         # whether there are more than two such answers in a run. The model is then compiled in parts:
                                  # their few graphs serve every variant, where a whole model needs a graph for each
    memory: dict = {}             # its fields of MemoryConfig (nanochat/recipe/memory_estimate.py)

    @dataclass
    class Config:
        """Heading in --help"""

    @classmethod
    def enabled(cls, config) -> bool:
        """Whether the run's Config switches this feature on. One that is off is not constructed and changes no bit."""
        raise NotImplementedError

    @classmethod
    def validate(cls, config) -> list[str]:
        """Problems of the run's Config, each with what to do about it. A flag that needs another one says so itself:
        `flag(..., requires=...)`."""
        return []

    def __init__(self, config):
        self.config = config.features[self.name]

    def on_model(self, model, horizon) -> None:
        """Called once, when the model is initialized and on its device; the optimizer and compiled graphs come later. May replace
        layers and kernels. Example: --fp8 replaces linear layers.

        horizon: steps, batch size and learning rates of the run (nanochat/recipe/horizon.py)
        """

    def before_step(self, step: int) -> dict:
        """Called before each optimizer step. Returns keyword arguments for the forward of all its micro-batches. Example: dynamic
        suffix training returns {"active_start": 5, "detach_x0": False}: blocks 0 to 4 are not trained."""
        return {}

    def cost_between(self, start: int, end: int) -> float:
        """Called for the time left. What the steps from `start` to before `end` cost, in steps that run and train all blocks, as
        far as the schedule tells beforehand."""
        return end - start

    def after_backward(self, model, step: int) -> None:
        """Called when the gradients of all micro-batches are summed and averaged over the ranks, before the optimizer. May read
        or change `p.grad`. Example: gradient clipping. Of several ranks, each has the gradients that it owns
        (nanochat/training/sharding.py); `p.grad` of other parameters is None. Under --shard-weights, so it is with the weights:
        a parameter without gradient may have no memory, and reading it ends the process."""

    def on_weights_changed(self) -> None:
        """Called when the weights have new values: after each optimizer update, as a part of the step's time, when training
        begins, and after a return to a checkpoint. Example: --cast-once casts the weights to bf16."""

    def step_columns(self) -> dict:
        """Called once per step, when all its work is queued. Returns columns for the step's row of metrics.jsonl. They may depend
        on before_step and after_backward, not on the step's after_step, which is called later. Example: {"active_layers": 4}."""
        return {}

    def after_step(self, step: int, loss: float, time) -> None:
        """Called with the results of a step, under --deferred-loss-logging only after the next step was launched; not called for
        one whose results are not finite. Example: a schedule that follows the loss.

        loss: mean over the step's tokens, in nats.   time: how long it took (StepTime, nanochat/runtime/clock.py), in seconds
        """

    @contextmanager
    def eval_context(self, model):
        """The context in which the model is evaluated, sampled from and saved. Must be undone at its end. Example: --fp8 puts the
        original layers back, so that checkpoints contain no FP8 layers."""
        yield

    def summary(self) -> dict:
        """Called when the run ends. Returns fields for result.json. Example: {"fp8_layers": "25/26"}."""
        return {}

    def report(self) -> str | None:
        """Called when the run ends. Returns a line to print, or None."""

    def state_dict(self) -> dict:
        """Called for each checkpoint. Returns, as JSON, whatever later steps depend on, so that a resumed run gives the same
        bits. Example: the moving averages of a schedule."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Called on resume and rollback, after on_model, with what state_dict returned."""

    def switched_on_late(self) -> None:
        """Called instead, where the checkpoint is of a run without this feature (--allow-change)."""


class Features:
    """The features that a run has enabled. Each method calls the hook of the same name of each, in the order of FEATURES."""

    def __init__(self, config, available: tuple[type[Feature], ...]):
        self.enabled = [feature(config) for feature in available if feature.enabled(config)]

    @property
    def dynamic_forward_args(self) -> bool:
        return any(feature.dynamic_forward_args for feature in self.enabled)

    @property
    def follows_results(self) -> bool:
        return any(feature.follows_results for feature in self.enabled)

    @property
    def many_variants(self) -> bool:
        return any(feature.many_variants for feature in self.enabled)

    def memory(self) -> dict:
        return _merged(feature.memory for feature in self.enabled)

    def on_model(self, model, horizon) -> None:
        for feature in self.enabled:
            feature.on_model(model, horizon)

    def before_step(self, step: int) -> dict:
        return _merged(feature.before_step(step) for feature in self.enabled)

    def cost_between(self, start: int, end: int) -> float:
        return min((feature.cost_between(start, end) for feature in self.enabled), default=end - start)

    def after_backward(self, model, step: int) -> None:
        for feature in self.enabled:
            feature.after_backward(model, step)

    def on_weights_changed(self) -> None:
        for feature in self.enabled:
            feature.on_weights_changed()

    def step_columns(self) -> dict:
        return _merged(feature.step_columns() for feature in self.enabled)

    def after_step(self, step: int, loss: float, time) -> None:
        for feature in self.enabled:
            feature.after_step(step, loss, time)

    @contextmanager
    def eval_context(self, model):
        with ExitStack() as stack:
            for feature in self.enabled:
                stack.enter_context(feature.eval_context(model))
            yield

    def summary(self) -> dict:
        return _merged(feature.summary() for feature in self.enabled)

    def reports(self) -> list[str]:
        return [line for feature in self.enabled if (line := feature.report())]

    def state_dict(self) -> dict:
        return {feature.name: feature.state_dict() for feature in self.enabled}

    def load_state_dict(self, state: dict) -> None:
        for feature in self.enabled:
            if feature.name in state:
                feature.load_state_dict(state[feature.name])
            else:
                feature.switched_on_late()


def _merged(dicts) -> dict:
    return {key: value for one in dicts for key, value in one.items()}
