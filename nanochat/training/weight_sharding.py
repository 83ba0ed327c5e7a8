"""Weights divided among ranks, too (--shard-weights): for models beyond the memory of one device.

ZeRO, stage 3 (arXiv 1910.02054), as FSDP has it (arXiv 2304.11277), but by the ownership of sharding.py: between steps each piece
of a weight is on its owner alone. A *unit* is what is fetched together: a block, an embedding table, or the head.

Forward. Before a unit runs, its owners send what they have of it (broadcasts); after it, it is freed. What the next unit needs
travels while this one runs.
Backward. A block is fetched again before its backward pass and freed after it; the last block and the head are kept, as they come
first, and a table is not needed, as the gradient of a lookup does not depend on it. Gradients go to their owners, which sum them in
fp32, whenever the backward pass enters or leaves a unit, after each micro-batch: no rank ever has those of all weights.
Update. Each owner updates its pieces. Nothing is sent back but parameters below WHOLE_BELOW elements, which all ranks have.

What travels is what the layer multiplies: where it casts its fp32 master weight to bf16, bf16; under --fp8 the e4m3 numbers and
their scale. The owner has the masters and casts them. So the bits are those of whole weights.

A tensor that is not there has its shape and no memory: its storage has been resized to 0, and is given memory and filled again
before each use. So views of it, also those that the backward pass has saved, and compiled graphs stay valid.

Bytes that all N ranks send in a step of M micro-batches together, attributed to the owners: (N-1) (M (F + B + G) + s), with F of
the weights as they travel, B of these those of the trained blocks but the last, G of the gradients of what is trained, and s of the
trained parameters below WHOLE_BELOW (N rows, filled up to the longest). Without the division: (N-1) 2 G.
Memory of a rank: 1/N of weights and moments, the unit in use and the next one, the gradients of two units on their way, and lm_head
while the loss is computed. At the start all weights, once: they are initialized as one rank would, and then divided.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from nanochat.checkpoint_manager import check_weights
from nanochat.fp8 import E4M3, Float8Linear, cast_into, largest_magnitude
from nanochat.kernels.linear import CastOnceLinear, keep_casts
from nanochat.optim import MuonAdamW
from nanochat.runtime.distributed import all_reduce_max, broadcast_async, rank_and_world_size
from nanochat.training.sharding import Bucket, Piece, Sharding

WHOLE_BELOW = 2**12  # elements: smaller parameters are on all ranks, as sending each would take longer than it saves memory


def make_sharding(model, optimizer: MuonAdamW, shard_weights: bool) -> Sharding:
    """What divides the model among the ranks: its weights, too, if there are several and `shard_weights`."""
    return (WeightSharding if shard_weights and rank_and_world_size()[1] > 1 else Sharding)(model, optimizer)


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
        self.following = dict(zip(self.order, self.order[1:], strict=False))
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


def unit_names(model) -> list[str]:
    """Names of a GPT's modules that are fetched together, in the order of the forward pass."""
    names = ["transformer.wte"]
    for i in range(model.config.n_layer):
        names += [f"value_embeds.{i}"] if str(i) in model.value_embeds else []
        names.append(f"transformer.h.{i}")
    return [*names, "lm_head"]


def is_block(unit: str) -> bool:
    return unit.startswith("transformer.h.")


# ---- the division

class WeightSharding(Sharding):
    """Divides the weights of a model among the ranks, with all that Sharding divides. For two ranks or more.

    divided: parameters that are not on all ranks.   units: fetches them.

    The optimizer has the masters of this rank's pieces. Of a table that is divided by rows these are tensors of their own.
    """
    divides_weights = True

    def __init__(self, model, optimizer: MuonAdamW):
        super().__init__(model, optimizer)
        self.divided = {p for unit in unit_names(model) for p in model.get_submodule(unit).parameters() if p.numel() >= WHOLE_BELOW}
        keep_casts(model, lambda layer: layer.weight in self.divided)
        for layer in model.modules():
            if is_cast_ahead(layer) and layer.weight in self.divided:
                layer.gathered = True
        self.index = {p: i for i, p in enumerate(self.parameters)}
        self.under_way: Bucket | None = None
        self.sums: dict[Piece, Tensor] = {}  # of this step's gradients, fp32
        self.trained: dict[Tensor, None] = {}  # parameters with a gradient in this step, in the order in which they come
        self.sent_before = 0
        self.units = Units(model, self._shared, self._send_ready)
        self._keep_own()
        model.use_weights, model.called_in_step = self.units, True

    def _own_rows(self, piece: Piece) -> Tensor:
        return super()._own_rows(piece).clone()  # the whole table will be freed

    def _shared(self, module: torch.nn.Module) -> list[Shared]:
        """What layers read of the divided parameters of a module, in its present form: under --fp8 evaluation has other layers."""
        return [self._shared_of(layer, p) for layer in module.modules() for p in layer.parameters(recurse=False)
                if p in self.divided]

    def _shared_of(self, layer: torch.nn.Module | None, p: Tensor) -> Shared:
        pieces = self.pieces[p]
        own = [(piece, self.owned[piece]) for piece in pieces if piece.owner == self.rank]
        if getattr(layer, "gathered", False) and isinstance(layer, Float8Linear):
            return SharedFp8(pieces, layer.w, own, layer)
        return Shared(pieces, layer.cast if isinstance(layer, CastOnceLinear) else p, own)

    def _keep_own(self) -> None:
        """Free what is everywhere at the beginning: of the divided parameters the pieces of others, and all casts."""
        for p in self.divided:
            for tensor in self._shared_of(None, p).temporary():
                free(tensor)
        for shared in self._shared(self.model):
            for tensor in shared.temporary():
                free(tensor)

    # ---- gradients

    def expect(self, forward_args: dict, last: bool) -> None:
        """Begin a micro-batch. Its gradients are sent as they come."""
        if self.armed:
            self._backward_is_over()
            return
        self.armed, self.bytes_sent, self.sent_before = True, 0, self.units.bytes_sent
        self.sums, self.trained, self.ready = {}, {}, []

    def reduce(self) -> None:
        self._backward_is_over()
        self.armed = False
        for piece, total in self.sums.items():
            self.owned[piece].grad = total.to(piece.parameter.dtype)
        self.sums = {}

    def gather(self) -> None:
        self._gather_all(piece for p in self.trained if p not in self.divided for piece in self.pieces[p])

    def trained_names(self) -> list[str]:
        return [self.pieces[p][0].name for p in self.trained]

    def step_columns(self) -> dict:
        return {"comm_bytes": self.bytes_sent + self.units.bytes_sent - self.sent_before}

    def _gradient_is_there(self, p: Tensor) -> None:
        if p.grad is not None:  # as where an operation of the model stops it
            self.ready.append(p)

    def _send_ready(self, last: bool = False) -> None:
        """Send the gradients that are complete; outside of a step, only keep which there are. While some travel, the owners add
        up those before. Small ones wait for company, until the `last` time."""
        if not (last or any(p in self.divided for p in self.ready)):
            return
        ready, self.ready = self.ready, []
        if not self.armed:
            for p in ready:
                p.grad = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)  # of no memory
            return
        ready.sort(key=lambda p: (str(p.dtype), self.index[p]))
        self.trained |= dict.fromkeys(ready)
        for _, group in groupby(ready, key=lambda p: p.dtype):
            bucket = Bucket(list(group), self.pieces, self.rank, self.world_size)
            bucket.launch()
            self.bytes_sent += bucket.bytes_sent
            self._add_up()
            self.under_way = bucket

    def _add_up(self) -> None:
        """Wait for the gradients that are under way, and add them to the sums."""
        if self.under_way:
            for piece, mean in self.under_way.owned_means():
                self.sums[piece] = self.sums[piece].add_(mean) if piece in self.sums else mean
            self.under_way = None

    def _backward_is_over(self) -> None:
        self.units.release()
        self._send_ready(last=True)
        self._add_up()

    # ---- weights

    def held_weights(self) -> dict[str, Tensor]:
        return {piece.label: tensor.detach() for piece, tensor in self.owned.items()} | {
            pieces[0].name: p.detach() for p, pieces in self.pieces.items() if p not in self.divided}

    def weights_to_save(self) -> Iterable[tuple[str, Tensor]]:
        """One after the other, each whole on every rank for a moment."""
        self.units.release()
        for p, pieces in self.pieces.items():
            for tensor in self.units.whole(self._shared_of(None, p)) if p in self.divided else [p.detach()]:
                yield pieces[0].name, tensor

    @torch.no_grad()
    def load_weights(self, tensors: dict, run_dir: Path) -> None:
        check_weights(self.model, tensors, run_dir)
        self.units.release()
        for p, pieces in self.pieces.items():
            for piece in pieces:
                if p not in self.divided:
                    piece.of(p).copy_(piece.of(tensors[piece.name]))
                elif piece.owner == self.rank:
                    self.owned[piece].copy_(piece.of(tensors[piece.name]))


def is_cast_ahead(layer: torch.nn.Module) -> bool:
    """Whether the forward of this layer reads a cast of its weight that is made before."""
    return isinstance(layer, CastOnceLinear) or (isinstance(layer, Float8Linear) and layer.config.cache_weights)
