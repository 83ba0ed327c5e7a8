"""Weights divided among ranks, too (--shard-weights): for models beyond the memory of one device.

ZeRO, stage 3 (arXiv 1910.02054), as FSDP has it (arXiv 2304.11277), but by the ownership of sharding.py: between steps each piece
of a weight is on its owner alone. A *unit* is what is fetched together: a block, an embedding table, or the head
(weight_units.py).

Forward. Before a unit runs, its owners send what they have of it (broadcasts); after it, it is freed. What the next unit needs
travels while this one runs.
Backward. A block is fetched again before its backward pass and freed after it. The last block and the head are kept, as they come
first; a table is not needed, as the gradient of a lookup does not depend on it. Whenever the backward pass enters or leaves a
unit, the gradients that are complete go to their owners, which add them up over ranks and micro-batches in fp32.
Update. Each owner updates its pieces. Nothing is sent back but parameters below WHOLE_BELOW elements, which all ranks have.

What travels is what the layer multiplies: bf16 where it casts its fp32 master weight to bf16; under --fp8 the e4m3 numbers and
their scale. The owner has the masters, and casts them each time. So the bits are those of whole weights; with several
micro-batches they differ by rounding, as ranks are summed before micro-batches.

Bytes that all N ranks send in a step of M micro-batches together, each counted at its owner: (N-1) (M (F + B + G) + s). F: the
weights as they travel. B: of these, the trained blocks but the last. G: the gradients of what is trained. s: the trained
parameters below WHOLE_BELOW, N rows filled up to the longest. With weights that are not divided: (N-1) 2 G.

Memory of a rank: 1/N of weights and moments; the unit in use, the next one, and lm_head while the loss is computed; the gradients
of a unit, and those of two on their way. At the start all weights, once, and under --fp8 their casts: they are initialized as
on one rank, and then divided.

An error of one rank leaves the others waiting until they learn that it is gone, as in every collective.
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from nanochat.checkpoint_manager import check_weights, total_bytes
from nanochat.common import print0
from nanochat.fp8 import Float8Linear
from nanochat.kernels.linear import CastOnceLinear, keep_casts
from nanochat.optim import MuonAdamW
from nanochat.runtime.distributed import rank_and_world_size
from nanochat.training.sharding import Bucket, Piece, Sharding
from nanochat.training.weight_units import Shared, SharedFp8, Units, free, unit_names

WHOLE_BELOW = 2**12  # elements: smaller parameters are on all ranks, as sending each would take longer than it saves memory


def make_sharding(model, optimizer: MuonAdamW, shard_weights: bool) -> Sharding:
    """What divides the model among the ranks: its weights, too, if there are several and `shard_weights`."""
    if not shard_weights:
        return Sharding(model, optimizer)
    if rank_and_world_size()[1] == 1:
        print0("--shard-weights does nothing here: there is one rank")
        return Sharding(model, optimizer)
    sharding = WeightSharding(model, optimizer)
    held = total_bytes(sharding.held_weights()) / total_bytes(model.state_dict())
    print0(f"weights: divided among {sharding.world_size} ranks; rank 0 holds {held:.1%} of them between steps")
    return sharding


class WeightSharding(Sharding):
    """Divides the weights of a model among the ranks, with all that Sharding divides. For two ranks or more.

    divided: parameters that are not on all ranks.   units: fetches them.

    The optimizer has the masters of this rank's pieces. Of a table that is divided by rows these are tensors of their own.
    """
    divides_weights = True

    def __init__(self, model, optimizer: MuonAdamW):
        super().__init__(model, optimizer)
        self.divided = {p for unit in unit_names(model) for p in model.get_submodule(unit).parameters()
                        if p.numel() >= WHOLE_BELOW}
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
        """What layers read of the divided parameters of a module, as it is now: under --fp8 evaluation has other layers."""
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
        self.units.run_below(forward_args.get("active_end"))
        if self.armed:
            self._backward_is_over()
            return
        self.armed, self.bytes_sent, self.sent_before = True, 0, self.units.bytes_sent
        self.sums, self.trained, self.ready = {}, {}, []

    def reduce(self) -> None:
        self._backward_is_over()
        self.units.run_below(None)
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
        if p.grad is not None:  # it is where an operation of the model stops the gradient
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
