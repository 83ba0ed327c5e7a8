"""The weights of one unit of a model (a block, a table, the head) in the memory of every rank, for as long as they are in use.

`Shared` is a tensor that a layer reads, and what travels of it; `Units` is when it travels. What for: weight_sharding.py.

A tensor that is not there has its shape and no memory: its storage has been resized to 0, and is given memory and filled again
before each use. So views of it, also those that the backward pass has saved, and compiled graphs stay valid. Nothing may read it
in between: where torch does not check the size of the storage, that ends the process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanochat.fp8 import E4M3, Float8Linear, cast_into, largest_magnitude
from nanochat.runtime.distributed import all_reduce_max, broadcast_async, rank_and_world_size
from nanochat.training.sharding import Piece

# ---- what travels

@dataclass
class Shared:
    """A tensor that layers read and that is there only while it is in use: a parameter, or its cast.

    pieces: of the parameter.   target: what is read, of the parameter's shape.   own: (piece, master weights) of this rank. A
    parameter that this rank owns whole is its own target, and always there.
    """
    pieces: list[Piece]
    target: Tensor
    own: list[tuple[Piece, Tensor]]

    def temporary(self) -> list[Tensor]:
        """Tensors whose memory is freed after use."""
        return [] if any(master is self.target for _, master in self.own) else [self.target]

    def fill(self) -> None:
        """Put this rank's part in its place. On all ranks."""
        for piece, master in self.own:
            if master is not self.target:
                piece.of(self.target.data).copy_(master.data)  # .data: what autograd has saved may be written again

    def parts(self) -> list[tuple[int, Tensor]]:
        """(owner, what it sends to where it belongs), the same on all ranks."""
        return [(piece.owner, piece.of(self.target.data)) for piece in self.pieces]

    def complete(self) -> None:
        """All parts are there."""


@dataclass
class SharedFp8(Shared):
    """The cast weight of a Float8Linear: `target` is layer.w, e4m3 (N, K); its transpose is made on arrival."""
    layer: Float8Linear

    def temporary(self) -> list[Tensor]:
        return [self.layer.w, self.layer.w_t]

    def fill(self) -> None:
        """The scale is that of the whole weight. Of one divided by rows, its largest magnitude is that of all ranks' rows."""
        for piece, master in self.own:
            largest = largest_magnitude(master.data)
            if piece.start is not None:
                largest = all_reduce_max(largest)
            cast_into(master.data, largest, piece.of(self.target.data), self.target.new_empty(0, dtype=E4M3),
                      self.layer.w_inverse.data)

    def parts(self) -> list[tuple[int, Tensor]]:
        scale = [(self.pieces[0].owner, self.layer.w_inverse.data)] if self.pieces[0].start is None else []
        return [*super().parts(), *scale]

    def complete(self) -> None:
        self.layer.w_t.data.copy_(self.target.data.t())


def allocate(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


# ---- when it travels

class _BackwardCall(torch.autograd.Function):
    """The identity. Its backward pass calls `action` before it hands on the gradient."""

    @staticmethod
    def forward(ctx, x, action):
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.action()
        return gradient, None


class Units:
    """The units of a model in the order in which a forward pass uses them. As `GPT.use_weights` it fetches each for its use.

    shared_of: module -> what is shared of its parameters.   at_boundary: called whenever the backward pass enters or leaves a
    unit, at the same places on all ranks.
    bytes_sent: by this rank, since it began.   bytes_here, most_here: bytes of fetched tensors, now and at most.

    An error in a forward or backward pass may leave units fetched. The next forward pass frees them.
    """

    def __init__(self, model, shared_of: Callable[[torch.nn.Module], list[Shared]], at_boundary: Callable[[], None]):
        self.model, self.shared_of, self.at_boundary = model, shared_of, at_boundary
        self.rank, self.world_size = rank_and_world_size()
        self.order = unit_names(model)
        self.run_below(None)
        self.coming: dict[str, tuple[list[Shared], list]] = {}  # unit -> what is on its way, and the handles to wait for
        self.here: dict[str, list[Shared]] = {}
        self.to_come: list[str] = []  # blocks whose backward pass has not begun, the first block first
        self.bytes_sent = self.bytes_here = self.most_here = 0

    def __call__(self, unit: str, function: Callable, x: Tensor, *args):
        """function(x, *args), with the weights of `unit` in place, also in its backward pass."""
        if unit == self.order[0]:
            self.release()
            self.to_come.clear()
        self._fetch(unit)
        if unit in self.following:
            self._begin(self.following[unit])
        trains = torch.is_grad_enabled()
        if trains and x.is_floating_point():
            given, x = x, _BackwardCall.apply(x, partial(self._backward_ended, unit))
            if getattr(function, "_compiled_call_impl", None):  # adds up the gradients of a tensor that it is given twice, the
                args = tuple(x if a is given else a for a in args)  # first block's x and x0: keep that order of sums
        y = function(x, *args)
        if not (trains and y.requires_grad):
            self._free(unit)
        elif is_block(unit):
            self.to_come.append(unit)
            y = _BackwardCall.apply(y, partial(self._backward_begins, unit))
            if self.following[unit] != self.order[-1]:
                self._free(unit)
        elif unit != self.order[-1]:
            self._free(unit)
        return y

    def run_below(self, active_end: int | None) -> None:
        """Forward passes from now on run the blocks below `active_end`, or all (None): no other is fetched ahead."""
        used = unit_names(self.model, active_end)
        self.following = dict(zip(used, used[1:], strict=False))

    def release(self) -> None:
        """Free all units, wherever a pass has ended."""
        for unit in list(self.coming):
            self._fetch(unit)
        for unit in list(self.here):
            self._free(unit)

    def whole(self, shared: Shared) -> Iterator[Tensor]:
        """Yields the whole tensor, then frees it."""
        name = shared.pieces[0].name
        self._begin(name, [shared])
        self._fetch(name)
        yield shared.target.detach()
        self._free(name)

    def _backward_begins(self, unit: str) -> None:
        self._fetch(unit)
        while self.to_come.pop() != unit:
            pass
        if self.to_come:
            self._begin(self.to_come[-1])
        self.at_boundary()

    def _backward_ended(self, unit: str) -> None:
        self._free(unit)
        self.at_boundary()

    def _begin(self, unit: str, shared: list[Shared] | None = None) -> None:
        """Begin to fetch a unit that is not there."""
        if unit in self.here or unit in self.coming:
            return
        shared = self.shared_of(self.model.get_submodule(unit)) if shared is None else shared
        handles = []
        for one in shared:
            for tensor in one.temporary():
                allocate(tensor)
                self.bytes_here += tensor.numel() * tensor.element_size()
            one.fill()
            for owner, part in one.parts():
                handles.append(broadcast_async(part, owner))
                self.bytes_sent += (self.world_size - 1) * part.numel() * part.element_size() * (owner == self.rank)
        self.coming[unit] = shared, handles
        self.most_here = max(self.most_here, self.bytes_here)

    def _fetch(self, unit: str) -> None:
        """Have a unit in place."""
        self._begin(unit)
        if unit in self.coming:
            shared, handles = self.coming.pop(unit)
            for handle in handles:
                handle.wait()
            for one in shared:
                one.complete()
            self.here[unit] = shared

    def _free(self, unit: str) -> None:
        for one in self.here.pop(unit, ()):
            for tensor in one.temporary():
                free(tensor)
                self.bytes_here -= tensor.numel() * tensor.element_size()


def unit_names(model, active_end: int | None = None) -> list[str]:
    """Names of a GPT's modules that are fetched together, in the order of the forward pass.   active_end: of `GPT.forward`."""
    names = ["transformer.wte"]
    for i in range(model.config.n_layer if active_end is None else active_end):
        names += [f"value_embeds.{i}"] if str(i) in model.value_embeds else []
        names.append(f"transformer.h.{i}")
    return [*names, "lm_head"]


def is_block(unit: str) -> bool:
    return unit.startswith("transformer.h.")
