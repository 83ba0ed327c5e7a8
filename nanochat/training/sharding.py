"""Gradients, optimizer state and updates divided among ranks (ZeRO, stages 1 and 2: arXiv 1910.02054).

Every rank holds all weights (weight_sharding.py divides them, too). Each *piece*, a parameter or some rows of a large one, has
one owner, and only the owner has its reduced gradient and its moments. A step:

1. Backward. As soon as all gradients of a bucket are there, each rank sends every owner its pieces (all-to-all); the owner adds
   them up in fp32 in the order of the ranks. So this is a reduce-scatter whose result does not depend on the network.
2. The optimizer of each rank updates the pieces that it owns, and knows of no others.
3. The owners send what they updated to all (all-gather).

Only parameters that have a gradient travel. Which these are follows from the arguments of the forward (`active_start`, ...), so
that all ranks know it: buckets are made the first time there are such arguments, and from then on sent while the backward pass
runs. A model that is compiled whole gives all gradients at its end: there they overlap with each other only.

Bytes that a rank sends in a step, of S bytes of gradients with N ranks: S (N-1)/N to the owners, and as many back, if the pieces
divide evenly.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from nanochat.checkpoint_manager import load_weights
from nanochat.optim import MuonAdamW
from nanochat.runtime.distributed import Exchange, all_gather_async, all_to_all_async, broadcast_object, rank_and_world_size

SPLIT_FROM = 2**14       # elements: larger tables are divided by rows, what is smaller has one owner
BUCKET_BYTES = 2**23     # of gradients: enough to keep a network busy, and small against a model
GATHER_ELEMENTS = 2**23  # of each rank at once: bounds the memory for what the owners send back


@dataclass(frozen=True)
class Piece:
    """A parameter, or its rows `start` to `stop`, and the rank that owns it."""
    name: str
    parameter: Tensor
    owner: int
    start: int | None = None  # None: the whole parameter
    stop: int | None = None

    @property
    def label(self) -> str:
        """Its name in checkpoints: `NAME` or `NAME[start:stop]`."""
        return self.name if self.start is None else f"{self.name}[{self.start}:{self.stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """The view of this piece in a tensor of the parameter's shape."""
        return tensor if self.start is None else tensor[self.start:self.stop]

    @property
    def shape(self) -> torch.Size:
        """Not that of a view: the parameter's memory may be freed (weight_sharding.py)."""
        shape = self.parameter.shape
        return shape if self.start is None or self.stop is None else torch.Size((self.stop - self.start, *shape[1:]))

    def numel(self) -> int:
        return self.shape.numel()


def divide(named_parameters: Iterable[tuple[str, Tensor]], by_muon: Callable[[Tensor], bool], world_size: int) -> list[Piece]:
    """Pieces of all parameters, each with an owner.

    Tables that AdamW updates are divided by rows. Parameters of blocks stay whole, so that a feature finds their `.grad`. What is
    whole goes, from the top block down, to the rank that has the least to do so far (list scheduling: Graham 1966): so every
    suffix of the blocks is divided evenly, too. A matrix of Muon costs the products of its Newton-Schulz iteration, all else
    its elements.
    """
    pieces, load = [], [0.0] * world_size
    for name, p in reversed(list(named_parameters)):
        muon = by_muon(p)
        table = not muon and p.dim() == 2 and not name.startswith("transformer.h.")
        if table and p.numel() >= SPLIT_FROM and len(p) >= world_size:
            rows = [len(p) * rank // world_size for rank in range(world_size + 1)]
            pieces += [Piece(name, p, rank, rows[rank], rows[rank + 1]) for rank in range(world_size)]
        else:
            owner = min(range(world_size), key=lambda rank: load[rank])
            load[owner] += p.numel() * (min(p.shape) if muon else 1)
            pieces.append(Piece(name, p, owner))
    return pieces


class Layout:
    """Pieces of one dtype, placed side by side in one row of elements per rank, that of their owner.

    places: (piece, owner, offset in its owner's row).   sizes: elements of each rank's row.
    """

    def __init__(self, pieces: list[Piece], world_size: int):
        self.sizes, self.places = [0] * world_size, []
        for piece in pieces:
            self.places.append((piece, piece.owner, self.sizes[piece.owner]))
            self.sizes[piece.owner] += piece.numel()
        self.dtype, self.device = pieces[0].parameter.dtype, pieces[0].parameter.device


class Bucket:
    """Gradients that travel together to the owners of their pieces.

    parameters: whose gradients these are, all of one dtype.   pieces: parameter -> its pieces.
    """

    def __init__(self, parameters: list[Tensor], pieces: dict[Tensor, list[Piece]], rank: int, world_size: int):
        self.parameters, self.rank = parameters, rank
        self.layout = Layout([piece for p in parameters for piece in pieces[p]], world_size)
        self.exchange: Exchange  # under way, once launched
        self.missing = 0  # of its gradients, in the step under way

    @property
    def bytes_sent(self) -> int:
        sizes = self.layout.sizes
        return (sum(sizes) - sizes[self.rank]) * self.layout.dtype.itemsize

    def launch(self) -> None:
        """Begin to send the gradients, and free them."""
        layout = self.layout
        starts = [sum(layout.sizes[:rank]) for rank in range(len(layout.sizes))]
        out = torch.empty(sum(layout.sizes), dtype=layout.dtype, device=layout.device)
        torch._foreach_copy_([out[starts[owner] + at:][:piece.numel()] for piece, owner, at in layout.places],
                             [gradient_of(piece).reshape(-1) for piece, *_ in layout.places])
        for p in self.parameters:
            p.grad = None
        self.exchange = all_to_all_async(out, layout.sizes)

    def owned_means(self) -> list[tuple[Piece, Tensor]]:
        """Wait; the mean over the ranks of the gradients of this rank's pieces, fp32."""
        sizes = self.layout.sizes
        parts = self.exchange.wait().view(len(sizes), sizes[self.rank])
        del self.exchange  # its buffers
        mean = parts.sum(dim=0, dtype=torch.float32) / len(sizes)
        return [(piece, mean[at:at + piece.numel()].view(piece.shape))
                for piece, owner, at in self.layout.places if owner == self.rank]


class Sharding:
    """Divides the optimizer of a model among the ranks. With one rank it does nothing.

    divides_weights: whether ranks have a part of the weights only (weight_sharding.py).

    It leaves to `optimizer` the pieces that this rank owns, under their labels. A parameter that it owns whole is the model's
    own: after `reduce` its `.grad` is the reduced one, and None on the other ranks. Rows of a table are a parameter that shares
    its memory.
    """
    divides_weights = False

    def __init__(self, model, optimizer: MuonAdamW):
        self.model, self.optimizer = model, optimizer
        self.rank, self.world_size = rank_and_world_size()
        if self.world_size == 1:
            return
        muon = {p for group in optimizer.param_groups if group["kind"] == "muon" for p in group["params"]}
        self.pieces: dict[Tensor, list[Piece]] = {}
        for piece in divide(model.named_parameters(), muon.__contains__, self.world_size):
            self.pieces.setdefault(piece.parameter, []).append(piece)
        self.owned = {piece: piece.parameter if piece.start is None else torch.nn.Parameter(self._own_rows(piece))
                      for pieces in self.pieces.values() for piece in pieces if piece.owner == self.rank}
        for group in optimizer.param_groups:
            group["params"] = self.owned_of(group["params"])
        optimizer.names = {tensor: piece.label for piece, tensor in self.owned.items()}
        self.parameters = list(self.pieces)
        self.buckets: dict[tuple, list[Bucket]] = {}  # arguments of the forward -> buckets in the order in which they are sent
        self.bucket_of: dict[Tensor, Bucket] = {}     # in the step under way
        self.ready: list[Tensor] = []                 # parameters whose gradients are complete, in this order
        self.waiting: list[Bucket] = []
        self.sent: list[Bucket] = []
        self.armed, self.bytes_sent = False, 0
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(self._gradient_is_there)

    def _own_rows(self, piece: Piece) -> Tensor:
        """The rows of a table that this rank owns."""
        return piece.of(piece.parameter.detach())

    def owned_of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """What this rank's optimizer has of these parameters of the model."""
        if self.world_size == 1:
            return list(parameters)
        return [self.owned[piece] for p in parameters for piece in self.pieces[p] if piece.owner == self.rank]

    def expect(self, forward_args: dict, last: bool) -> None:
        """To be called before each micro-batch of a step. The gradients of the last one's backward pass are sent as they come."""
        if self.world_size == 1 or not last:
            return
        self.key = tuple(sorted(forward_args.items()))
        self.waiting, self.sent, self.ready = list(self.buckets.get(self.key, ())), [], []
        self.bucket_of = {p: bucket for bucket in self.waiting for p in bucket.parameters}
        for bucket in self.waiting:
            bucket.missing = len(bucket.parameters)
        self.armed, self.bytes_sent = True, 0

    def reduce(self) -> None:
        """Give the owners the mean gradients of their pieces, once all micro-batches are summed."""
        if self.world_size == 1:
            return
        self.armed = False
        unsent = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if unsent:  # the first step with these arguments. Rank 0's order counts: all must send the same
            order = {p: place for place, p in enumerate(self.ready)}
            unsent.sort(key=lambda i: order.get(self.parameters[i], len(order)))
            new = self._make_buckets([self.parameters[i] for i in broadcast_object(unsent)])
            for bucket in new:
                bucket.launch()
            self.sent += new
            self.buckets[self.key] = list(self.sent)
        for bucket in self.sent:
            self.bytes_sent += bucket.bytes_sent
            for piece, mean in bucket.owned_means():
                self.owned[piece].grad = mean.to(piece.parameter.dtype)

    def gather(self) -> None:
        """Send what the owners have updated to all ranks."""
        if self.world_size == 1:
            return
        self._gather_all(piece for bucket in self.sent for piece, *_ in bucket.layout.places)

    def _gather_all(self, pieces: Iterable[Piece]) -> None:
        """Send these pieces from their owners to all ranks."""
        in_order = sorted(pieces, key=lambda piece: str(piece.parameter.dtype))
        for _, pieces in groupby(in_order, key=lambda piece: piece.parameter.dtype):
            self._gather(Layout(list(pieces), self.world_size))

    def held_weights(self) -> dict[str, Tensor]:
        """The weights that are on this rank between two steps, by name."""
        return self.model.state_dict()

    def weights_to_save(self) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of all weights. To be consumed on all ranks; a tensor is right until the next one is asked for."""
        return self.model.state_dict().items()

    def load_weights(self, tensors: dict, run_dir: Path) -> None:
        """Take over a checkpoint's weights. Raises: UserError where the shapes differ."""
        load_weights(self.model, tensors, run_dir)

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)  # rows of tables are not among the model's parameters

    def step_columns(self) -> dict:
        """For the step's row of metrics.jsonl, with several ranks: bytes of gradients and updates that this one has sent."""
        return {"comm_bytes": self.bytes_sent} if self.world_size > 1 else {}

    def trained_names(self) -> list[str]:
        """Names of the parameters that have a gradient in this step, the same on all ranks."""
        if self.world_size == 1:
            return [name for name, p in self.model.named_parameters() if p.grad is not None]
        return [self.pieces[p][0].name for bucket in self.sent for p in bucket.parameters]

    def owned_gradients(self) -> list[tuple[str, Tensor]]:
        """(parameter's name, reduced gradient) of all pieces of this rank that have one."""
        if self.world_size == 1:
            return [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        return [(piece.name, tensor.grad) for piece, tensor in self.owned.items() if tensor.grad is not None]

    def _gradient_is_there(self, p: Tensor) -> None:
        if not self.armed:
            return
        self.ready.append(p)
        if p in self.bucket_of:
            self.bucket_of[p].missing -= 1
        while self.waiting and not self.waiting[0].missing:  # in the same order on all ranks
            bucket = self.waiting.pop(0)
            bucket.launch()
            self.sent.append(bucket)

    def _make_buckets(self, parameters: list[Tensor]) -> list[Bucket]:
        """Parameters in the order in which their gradients come, in buckets of one dtype of about BUCKET_BYTES."""
        buckets: list[list[Tensor]] = []
        filling: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            bucket = filling.setdefault(p.dtype, [])
            bucket.append(p)
            if sum(p.numel() * p.element_size() for p in bucket) >= BUCKET_BYTES:
                buckets.append(filling.pop(p.dtype))
        return [Bucket(bucket, self.pieces, self.rank, self.world_size) for bucket in [*buckets, *filling.values()]]

    @torch.no_grad()
    def _gather(self, layout: Layout) -> None:
        """All-gather of the ranks' rows, some elements at a time; while one part travels, the one before is unpacked."""
        longest, before = max(layout.sizes), None  # before: the exchange under way, and where its rows belong
        for begin in range(0, longest, GATHER_ELEMENTS):
            end = min(begin + GATHER_ELEMENTS, longest)
            views: dict[int, list] = {}
            for piece, owner, at in layout.places:
                lo, hi = max(begin, at), min(end, at + piece.numel())
                if lo < hi:
                    flat = piece.of(piece.parameter.detach()).view(-1)[lo - at:hi - at]
                    views.setdefault(owner, []).append((flat, slice(lo - begin, hi - begin)))
            own = torch.zeros(end - begin, dtype=layout.dtype, device=layout.device)
            if mine := views.pop(self.rank, []):
                torch._foreach_copy_([own[place] for _, place in mine], list(map(itemgetter(0), mine)))
            exchange = all_gather_async(own)
            self.bytes_sent += (self.world_size - 1) * own.numel() * own.element_size()
            unpack(before)
            before = exchange, views
        unpack(before)


def gradient_of(piece: Piece) -> Tensor:
    """The piece's part of the gradient that this rank's rows gave."""
    gradient = piece.parameter.grad
    assert gradient is not None
    return piece.of(gradient)


def unpack(under_way: tuple[Exchange, dict[int, list]] | None) -> None:
    """Copy what has come from the other ranks to where it belongs: rank -> (target, place in its row)."""
    if under_way is None:
        return
    exchange, views = under_way
    rows = exchange.wait()
    targets = [target for row in views.values() for target, _ in row]
    if targets:
        torch._foreach_copy_(targets, [rows[rank][place] for rank, row in views.items() for _, place in row])
