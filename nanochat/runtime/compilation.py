"""torch.compile without its surprises: no step runs uncompiled unsaid, and none waits for a compiler while it is timed.

Torch compiles when a function is first called, and its backward when that is first needed. What differs in a Python
value, `active_start` say, is a graph of its own; at the ninth, torch goes on uncompiled with no more than a warning. So
here each variant of the forward is rehearsed once before it is trained with, forward and backward: its graphs are then
made, or found not to be possible, in which case this one variant runs uncompiled and the run says so.

A model is compiled whole, which fuses best, or in parts: embedding, blocks and loss. Blocks of a kind share graphs, so
that a dozen serve any depth and every `active_start`. On a CPU parts are 1-2 % slower, and a d12 start takes 39 s of
compiling instead of 75, from a warm cache 5 instead of 13 (dev/LOG.md).

What the forward pass keeps for the backward one is the compiler's choice. By default it keeps all that a product of the
backward pass reads; of a model with `recompute_activations` only what cannot be had again without one.
"""

import torch

from nanochat.common import print0
from nanochat.runtime.toolchain import cause_of, prepare_compiler, reason

RECOMPILE_LIMIT = 64  # graphs per function, where torch's default is 8


class CompiledModel:
    """A GPT to train with: called like the model, compiled `whole` or in parts. The model itself stays as it was to
    whoever calls it under the stance `force_eager`, as evaluation does."""

    def __init__(self, model, whole: bool, backend: str = "inductor"):
        self.model = model
        self.forward = (compile_whole if whole else compile_parts)(model, backend)
        self.works: dict[tuple, bool] = {}  # variants that were rehearsed, and whether their graphs could be made

    def rehearsed(self, options: dict) -> bool:
        """Whether `rehearse` has seen these options."""
        return tuple(sorted(options.items())) in self.works

    def rehearse(self, x: torch.Tensor, y: torch.Tensor, **options) -> None:
        """Make the graphs of forward(x, y, **options) and its backward, the first time these options are seen."""
        if self.rehearsed(options):
            return
        variant = tuple(sorted(options.items()))
        try:
            with torch._functorch.config.patch(ban_recompute_materialized_backward=not self.model.recompute_activations):
                self.forward(x, y, **options).backward()
            self.works[variant] = True
        except Exception as e:  # whatever a compiler raises
            if isinstance(cause_of(e), torch.OutOfMemoryError):
                raise cause_of(e) from None
            self.works[variant] = False
            which = ", ".join(f"{name}={value}" for name, value in variant) or "the model"
            print0(f"{which} could not be compiled and trains uncompiled, slower: {reason(e)}")
        self.model.zero_grad(set_to_none=True)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, **options) -> torch.Tensor:
        if self.works[tuple(sorted(options.items()))]:
            return self.forward(x, y, **options)
        with torch.compiler.set_stance("force_eager"):
            return self.model(x, y, **options)

    @property
    def eager_fallbacks(self) -> int:
        return list(self.works.values()).count(False)


def compiler_works(device: torch.device) -> str | None:
    """None where torch.compile works on the device, else the reason and what to do. Tried, as it needs a C++ compiler or
    Triton."""
    try:
        prepare_compiler()
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # whatever a missing or broken tool chain raises
        return reason(e)


def compile_whole(model, backend: str = "inductor"):
    """The model's forward as one graph per variant."""
    _fail_loudly()
    return torch.compile(model, dynamic=False, backend=backend)


def compile_parts(model, backend: str = "inductor"):
    """The model with embedding, blocks and loss compiled one by one, in place."""
    _fail_loudly()
    for block in model.transformer.h:
        block.compile(dynamic=False, backend=backend)
    model._embed = torch.compile(model._embed, dynamic=False, backend=backend)
    model.kernels.loss = torch.compile(model.kernels.loss, dynamic=False, backend=backend)
    return model


def graphs_compiled() -> int:
    """How many graphs torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _fail_loudly() -> None:
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
