"""The hooks of a feature, and how a run's features are called together. No torch."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


class Feature:
    """What a room may do, and when. Every hook has a default that does nothing; override those that are needed."""

    name: str                 # key of its flags in `config.features` and of its state in checkpoints
    varies_forward = False    # True where before_step's answers differ: the model is then compiled in parts, whose few
                              # graphs serve every variant, instead of whole, a graph for each
    defers = False            # True to read a step's results while the next one runs
    memory: dict = {}         # how it changes what a step needs: fields of nanochat/recipe/memory_estimate.py's How

    @dataclass
    class Config:
        """Heading in --help"""

    @classmethod
    def enabled(cls, config) -> bool:
        """Whether the run's Config switches this room on. A room that is off is not made and changes no bit."""
        raise NotImplementedError

    @classmethod
    def validate(cls, config) -> list[str]:
        """Problems of the run's Config as far as this room knows, in words that a user can act on."""
        return []

    def __init__(self, config):
        self.config = config.features[self.name]

    def on_model(self, model, horizon) -> None:
        """Change the model, on its device and initialized, before the optimizer is made and anything is compiled.
        `horizon`: what the run will do (nanochat/recipe/horizon.py)."""

    def before_step(self, step: int) -> dict:
        """Keyword arguments for this step's forward, the same for all its micro-batches: {"active_start": 5}."""
        return {}

    def after_backward(self, model, step: int) -> None:
        """Look at the gradients of the whole step before the optimizer does."""

    def after_update(self) -> None:
        """The weights are others: the optimizer has changed them, and what is done here counts as training time, or training
        begins, or goes back to a checkpoint."""

    def after_step(self, step: int, loss: float, time) -> None:
        """Take note of the step's mean loss in nats, and of the time it took (nanochat/runtime/clock.py, StepTime)."""

    @contextmanager
    def eval_context(self, model):
        """How the model is evaluated, sampled from and saved."""
        yield

    def metrics(self) -> dict:
        """Columns of the last step for metrics.jsonl."""
        return {}

    def summary(self) -> dict:
        """Fields for result.json."""
        return {}

    def report(self) -> str | None:
        """A line for the user when the run ends."""

    def state_dict(self) -> dict:
        """What an exact resume needs, as JSON."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave."""


class Features:
    """The rooms that a run has switched on, called in the order of FEATURES."""

    def __init__(self, config, available: tuple[type[Feature], ...]):
        self.rooms = [feature(config) for feature in available if feature.enabled(config)]

    @property
    def varies_forward(self) -> bool:
        return any(room.varies_forward for room in self.rooms)

    @property
    def defers(self) -> bool:
        """Whether results are read a step late. Not where they decide the next step."""
        return any(room.defers for room in self.rooms) and not self.varies_forward

    def memory(self) -> dict:
        return {key: value for room in self.rooms for key, value in room.memory.items()}

    def on_model(self, model, horizon) -> None:
        for room in self.rooms:
            room.on_model(model, horizon)

    def before_step(self, step: int) -> dict:
        return {key: value for room in self.rooms for key, value in room.before_step(step).items()}

    def after_backward(self, model, step: int) -> None:
        for room in self.rooms:
            room.after_backward(model, step)

    def after_update(self) -> None:
        for room in self.rooms:
            room.after_update()

    def after_step(self, step: int, loss: float, time) -> None:
        for room in self.rooms:
            room.after_step(step, loss, time)

    @contextmanager
    def eval_context(self, model):
        with ExitStack() as stack:
            for room in self.rooms:
                stack.enter_context(room.eval_context(model))
            yield

    def metrics(self) -> dict:
        return {key: value for room in self.rooms for key, value in room.metrics().items()}

    def summary(self) -> dict:
        return {key: value for room in self.rooms for key, value in room.summary().items()}

    def reports(self) -> list[str]:
        return [line for room in self.rooms if (line := room.report())]

    def state_dict(self) -> dict:
        return {room.name: room.state_dict() for room in self.rooms}

    def load_state_dict(self, state: dict) -> None:
        for room in self.rooms:
            if room.name in state:
                room.load_state_dict(state[room.name])
