"""--audit: check that a run trains only in its timed steps, and only on the batches that it declares.

Training outside of the timed steps (in a feature's hooks, while the compiler works, in an evaluation) would be free in every
comparison of training times. So with --audit

- weights, gradients and optimizer state must be the same at the end of a step's time and at the beginning of the next one's;
- the micro-batches that come out of the loader are counted;
- calls of `backward` are counted, and outside of the timed steps those of `torch.autograd.grad` too: gradients could be kept
  there, and used within the next step.

What follows from the weights, such as copies of them in FP8, may be made anew at any time: it is not looked at. The audit finds
mistakes and shortcuts, not code that sets out to deceive it. It waits for the device before and after each step, and changes no
bit of the run.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager

import torch

from nanochat.dataloader import TrainLoader
from nanochat.runtime.device import synchronize
from nanochat.training.state import TrainState

CHUNK = 2**18  # elements that are summed at once: their products take 2 MiB
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class Audit:
    """Watches the training loop of this process. Make it when the model is as training begins, its checkpoint loaded.

    micro_batches: per step.
    """

    def __init__(self, state: TrainState, micro_batches: int):
        self.state, self.micro_batches = state, micro_batches
        self.steps = self.batches_drawn = self.backward_calls = self.backward_declared = 0
        self.changed: list[int] = []  # steps before which something has changed since the step before
        self.at_work = False          # in the time of a step, or in the compilation of one
        self.accept_changes()

    @contextmanager
    def counting(self):
        """For the training loop: counts what it calls, and looks at the weights once more at its end."""
        with each_call(TrainLoader, "next", self._drawn), each_call(torch.autograd, "backward", self._backward), \
                each_call(torch.autograd, "grad", self._grad):
            yield
        self._compare()

    def step_begins(self) -> None:
        """To be called directly before the time of a step begins."""
        self._compare()
        self.steps += 1
        self.backward_declared += self.micro_batches
        self.at_work = True

    def step_ended(self) -> None:
        """To be called directly after the time of a step has ended."""
        self.at_work = False
        self.accept_changes()

    @contextmanager
    def warming_up(self):
        """For the compilation of a step's graphs, which runs one backward pass on zeros, or none where it fails before."""
        calls, self.at_work = self.backward_calls, True
        try:
            yield
        finally:
            self.at_work = False
            self.backward_declared += min(1, self.backward_calls - calls)

    def accept_changes(self) -> None:
        """Take weights and optimizer state as they are now for right: after a step, or a return to a checkpoint."""
        self.accepted = self._fingerprint()

    def summary(self) -> dict:
        """The field `audit` of result.json."""
        return {"steps": self.steps, "changed_between_steps": self.changed,
                "batches_drawn": self.batches_drawn, "batches_declared": self.steps * self.micro_batches,
                "backward_calls": self.backward_calls, "backward_declared": self.backward_declared}

    def _compare(self) -> None:
        if self._fingerprint() != self.accepted:
            self.changed.append(self.state.step)

    def _fingerprint(self) -> tuple[list[str], list[int]]:
        model, optimizer = self.state.model, self.state.optimizer
        synchronize(self.state.clock.device)
        with self.state.clock.left_out():
            gradients = {f"{name}/gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
            return fingerprint(self.state.sharding.held_weights() | optimizer.named_state() | gradients, self.state.clock.device)

    def _drawn(self) -> None:
        self.batches_drawn += 1

    def _backward(self) -> None:
        self.backward_calls += 1

    def _grad(self) -> None:
        self.backward_calls += not self.at_work  # the compiler and --chunked-ce call it too


@contextmanager
def each_call(owner, name: str, count: Callable[[], None]):
    """Let every call of `owner.name` call `count` first."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def counted(*args, **kwargs):
        count()
        return original(*args, **kwargs)
    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, original)


def fingerprint(tensors: dict[str, torch.Tensor], device: torch.device) -> tuple[list[str], list[int]]:
    """The names, and a number for each CHUNK elements of each tensor, computed on the device. Where any bit differs, a number
    differs: surely for a single element, and with a probability of at least 1 - 2^-32 for several of up to 4 bytes.

    The number is the sum of the elements' bits, as integers, times random odd numbers, modulo 2^64 (multilinear hashing). A
    mere sum or exclusive or would not see elements that change places, nor the same change in an even number of them.
    """
    odd = multipliers(device)
    sums = [torch.sum(chunk.to(device, torch.int64) * odd[:len(chunk)])
            for tensor in tensors.values() for chunk in as_integers(tensor).split(CHUNK)]
    return list(tensors), torch.stack(sums).tolist()


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor's elements as integers: (numel,)."""
    return tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])


@functools.cache
def multipliers(device: torch.device) -> torch.Tensor:
    """(CHUNK,) random odd int64, always the same; torch's global generator is not touched."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(-2**63, 2**63 - 1, (CHUNK,), generator=generator) | 1).to(device)
