"""torch.compile without its surprises: no step runs uncompiled unnoticed, and no timed step waits for the compiler.

torch compiles a function when it is first called, and its backward when that is first needed. Each value of a Python argument,
of `active_start` for example, makes a graph of its own; from the ninth on, torch runs uncompiled with only a warning. So here
each variant of the forward is warmed up once before a step uses it, forward and backward. If its graphs cannot be made, this
one variant runs uncompiled and the run says so.

A model is compiled whole, which fuses best, or in parts: embedding, blocks and loss. Blocks of a kind share graphs, so that a
dozen graphs serve any depth and every `active_start`. On a CPU, steps in parts take 1-2 % longer, and a d12 model compiles in
39 s instead of 75, from a warm cache in 5 instead of 13 (dev/LOG.md).

The compiler chooses what the forward pass keeps for the backward pass. By default it keeps everything that a matrix product of
the backward pass reads. With `recompute_activations` it keeps less and computes norms, rotary positions and squared ReLUs again
there, but no product and no attention: selective activation checkpointing (arXiv 2205.05198).
"""

import os
from collections import Counter

import torch

from nanochat.common import print0, resolve
from nanochat.runtime.toolchain import cause_of, prepare_compiler, reason

RECOMPILE_LIMIT = 64  # graphs per function, where torch's default is 8


class CompiledModel:
    """A GPT compiled for training, called like the model itself: `(x, y, **forward_args) -> loss`.

    whole: one graph per variant; otherwise in parts. The model is unchanged for whoever calls it under the stance `force_eager`,
    as evaluation does.
    recompute_activations: see the top of this file.
    compiled_variants: for each set of forward_args that was warmed up, whether its graphs could be made.
    graph_breaks: reason -> how often it cut a graph in two. The pieces are right, but nothing is fused across a cut, and the host
    works between them.
    """

    def __init__(self, model, whole: bool, backend: str = "inductor", recompute_activations: bool = False):
        self.model, self.recompute_activations = model, recompute_activations
        self.forward = (compile_whole if whole else compile_parts)(model, backend)
        self.compiled_variants: dict[tuple, bool] = {}
        self.graph_breaks: Counter[str] = Counter()

    def is_warmed_up(self, forward_args: dict) -> bool:
        return _variant(forward_args) in self.compiled_variants

    def warm_up(self, x: torch.Tensor, y: torch.Tensor, **forward_args) -> list[torch.Tensor]:
        """Compile forward(x, y, **forward_args) and its backward, the first time these forward_args are seen.

        x, y: (B, T) int64, of the micro-batch's shape.
        Returns the parameters that such a step trains: those that got a gradient here. Raises: torch.OutOfMemoryError.
        """
        if self.is_warmed_up(forward_args):
            return []
        variant, breaks_before = _variant(forward_args), graph_breaks()
        try:
            with torch._functorch.config.patch(ban_recompute_materialized_backward=not self.recompute_activations):
                self.forward(x, y, **forward_args).backward()
            self.compiled_variants[variant] = True
        except Exception as e:  # a compiler may raise anything
            if isinstance(cause_of(e), torch.OutOfMemoryError):
                raise cause_of(e) from None
            self.compiled_variants[variant] = False
            which = ", ".join(f"{name}={value}" for name, value in variant) or "the model"
            print0(f"{which} could not be compiled and trains uncompiled, slower: {reason(e)}")
        trained = [p for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        self._count_breaks(graph_breaks() - breaks_before)
        return trained

    def _count_breaks(self, breaks: Counter[str]) -> None:
        """Add to the graph breaks, and print those whose reason is new."""
        new = {why: count for why, count in breaks.items() if why not in self.graph_breaks}
        self.graph_breaks += breaks
        for why, count in new.items():
            print0(f"{count} graph break{'s' if count > 1 else ''}, where nothing is fused: {why}")

    def __call__(self, x: torch.Tensor, y: torch.Tensor, **forward_args) -> torch.Tensor:
        if self.compiled_variants[_variant(forward_args)]:
            return self.forward(x, y, **forward_args)
        with torch.compiler.set_stance("force_eager"):
            return self.model(x, y, **forward_args)

    @property
    def eager_fallbacks(self) -> int:
        """How many variants could not be compiled."""
        return list(self.compiled_variants.values()).count(False)


def _variant(forward_args: dict) -> tuple:
    return tuple(sorted(forward_args.items()))


def compile_unavailable_reason(device: torch.device) -> str | None:
    """Why torch.compile cannot be used on the device, with what to do; None where it can. Found by compiling a small function:
    it needs a C++ compiler or Triton."""
    try:
        prepare_compiler()
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as e:  # a missing or broken tool chain may raise anything
        return reason(e)


def use_compile_cache(folder: str | None) -> None:
    """Keep compiled graphs in this folder (--compile-cache-dir). By default torch keeps them under the temporary directory, which
    a reboot empties, and which containers and rented machines find empty every time."""
    if folder:
        path = resolve(folder)
        path.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)


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


def graph_breaks() -> Counter[str]:
    """The first line of each reason why torch had to cut a graph in this process -> how often."""
    breaks = Counter[str]()
    for why, count in torch._dynamo.utils.counters["graph_break"].items():
        breaks[why.strip().partition("\n")[0]] += count
    return breaks


def _fail_loudly() -> None:
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
