"""Batches from documents: full rows that begin with BOS, in an order that is a function of (seed, step), so without state.

A row has row_len + 1 tokens: inputs and targets overlap. Simple ways to make rows waste tokens: rows cut from one long stream
start in the middle of a document, padding wastes positions, and cropping drops text (about a third of it at 2048 tokens). Here
documents are packed best-fit: a row takes the longest document that still fits, again and again; if none fits, one is cut so
that the row is exactly full. The rest of a cut document continues in a later row, with a BOS in front (compare "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830).

An epoch is a permutation of the documents, drawn from (seed, epoch). Consecutive documents form groups of about four million
tokens. Each group is packed separately, its number of rows follows from its length alone, and its rows are shuffled. So any row
of a run can be computed without the rows before it, and a batch depends only on (seed, step, rank, world size): there is nothing
to save for a resume.

The only lost tokens are those that the added BOS push out of a group's last row: about one in row_len.
"""

import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanochat.common import UserError
from nanochat.dataset import Split

GROUP_TOKENS = 2**22
GROUPS_KEPT = 4  # packed groups in memory; the rows of a step may be in two of them
PREFETCH = 2  # batches prepared ahead of the training step


# ---- packing

def pack(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents of these lengths best-fit into `lengths.sum() // row_tokens` rows, each exactly full.

    Returns pieces, (n, 3) int64 of [document, start, count], and first, (rows + 1,): row r consists of
    pieces[first[r]:first[r + 1]]. The tokens of a piece are a BOS and then the document's tokens from start + 1 on, `count` in
    total. At start 0 the BOS is the document's own; in a later piece it replaces the last token of the previous piece.
    """
    pool = [[] for _ in range(row_tokens + 1)]  # pieces by length; the last list also has all longer ones
    lengths_there = 0  # bit n is set if pool[n] is not empty, so "the longest that fits" is the highest set bit

    def put(document: int, start: int, count: int) -> None:
        nonlocal lengths_there
        n = min(count, row_tokens)
        pool[n].append((document, start, count))
        lengths_there |= 1 << n

    def take(n: int) -> tuple[int, int, int]:
        nonlocal lengths_there
        piece = pool[n].pop()
        if not pool[n]:
            lengths_there ^= 1 << n
        return piece

    for document, count in enumerate(lengths.tolist()):
        put(document, 0, count)
    pieces, first = [], [0]
    for _ in range(int(lengths.sum()) // row_tokens):
        space = row_tokens
        while space:
            # Documents of a row or more must be cut anyway, so they do not start a row while there are shorter ones: they fill
            # the rest of rows, and shorter documents are hardly ever cut.
            fitting = lengths_there & ((1 << min(space + 1, row_tokens)) - 1)
            document, start, count = take((fitting or lengths_there).bit_length() - 1)
            used = min(count, space)
            pieces.append((document, start, used))
            if count > used:
                put(document, start + used - 1, count - used + 1)
            space -= used
        first.append(len(pieces))
    return np.array(pieces, np.int64).reshape(-1, 3), np.array(first)


@dataclass
class _Epoch:
    """The documents of an epoch in order, the first document of each group, and the number of rows before each group."""
    documents: np.ndarray
    first_document: np.ndarray  # (groups + 1,)
    first_row: np.ndarray  # (groups + 1,)


class PackedRows:
    """The infinite sequence of training rows of a split, by index: epoch after epoch, each in a different order."""

    def __init__(self, split: Split, row_len: int, seed: int):
        """Rows have `row_len` + 1 tokens. Raises: UserError if the split has fewer tokens than one row."""
        self.split, self.row_len, self.row_tokens, self.seed = split, row_len, row_len + 1, seed
        assert row_len >= 1 and seed >= 0
        if split.num_tokens < self.row_tokens:
            raise UserError(f"the text has {split.num_tokens:,} tokens, one row needs {self.row_tokens:,}: "
                            "lower --max-seq-len or give more text.")
        self.group_tokens = max(GROUP_TOKENS, 16 * self.row_tokens)
        self.num_groups = max(1, split.num_tokens // self.group_tokens)  # the last group has up to twice as many tokens
        # Each group drops less than one row; how much depends on the permutation. This is the number that every epoch has, so
        # that the epoch of an index is a division.
        self.rows_per_epoch = split.num_tokens // self.row_tokens - (self.num_groups - 1)
        self._epoch = lru_cache(2)(self._make_epoch)
        self._group = lru_cache(GROUPS_KEPT)(self._make_group)

    def rows(self, indices) -> np.ndarray:
        """Token ids of rows by their index in the run: (n,) -> (n, row_len + 1) int64."""
        out = np.empty((len(indices), self.row_tokens), np.int64)
        for row, index in zip(out, indices, strict=True):
            at = 0
            for document, start, count in self._pieces(int(index)).tolist():
                row[at:at + count] = self.split.tokens(document, start, count)
                row[at] = self.split.bos
                at += count
        return out

    def require(self, rows_per_step: int) -> None:
        """Raises: UserError if the text has fewer rows than one optimizer step needs."""
        if self.rows_per_epoch < rows_per_step:
            raise UserError(f"the training text has {self.split.num_tokens:,} tokens, one step needs "
                            f"{rows_per_step * self.row_tokens:,}: lower --total-batch-size, --device-batch-size or "
                            "--max-seq-len, or give more text.")

    def report(self, groups: int = 4) -> dict[str, float]:
        """The cost of packing, measured on the first groups of the first epoch, as shares of their tokens or documents.

        documents_cut_share: documents in more than one piece.   documents_longer_share: documents longer than a row, which must
        be cut.
        """
        epoch = self._epoch(0)
        tokens = added = used = documents = cut = longer = 0
        for group in range(min(groups, self.num_groups)):
            chosen = epoch.documents[epoch.first_document[group]:epoch.first_document[group + 1]]
            pieces, _, _ = self._group(0, group)
            lengths = self.split.doc_lengths[chosen]
            added += int((pieces[:, 1] > 0).sum())
            used += int(pieces[:, 2].sum())
            tokens += int(lengths.sum())
            documents += len(chosen)
            whole = pieces[pieces[:, 2] == self.split.doc_lengths[pieces[:, 0]], 0]
            cut += len(np.setdiff1d(pieces[:, 0], whole))
            longer += int((lengths > self.row_tokens).sum())
        beyond = (epoch.first_row[-1] - self.rows_per_epoch) * self.row_tokens / self.split.num_tokens
        return dict(tokens_lost_share=float((tokens - (used - added)) / tokens + beyond), added_bos_share=added / used,
                    documents_cut_share=cut / documents, documents_longer_share=longer / documents)

    def _pieces(self, index: int) -> np.ndarray:
        """The pieces of one row, (n, 3): [document, start, count], see `pack`."""
        number, row = divmod(index, self.rows_per_epoch)
        first_row = self._epoch(number).first_row
        group = int(np.searchsorted(first_row, row, side="right")) - 1
        pieces, first, order = self._group(number, group)
        r = order[row - first_row[group]]
        return pieces[first[r]:first[r + 1]]

    def _make_epoch(self, number: int) -> _Epoch:
        documents = _generator(self.seed, number).permutation(self.split.num_docs)
        ends = np.cumsum(self.split.doc_lengths[documents])
        begins = ends - self.split.doc_lengths[documents]
        first = np.searchsorted(begins, np.arange(self.num_groups) * self.group_tokens)
        first_document = np.append(first, self.split.num_docs)
        group_tokens = np.diff(np.append(0, ends)[first_document])
        return _Epoch(documents, first_document, np.append(0, np.cumsum(group_tokens // self.row_tokens)))

    def _make_group(self, number: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pieces, first, order): the packed rows of a group, see `pack`, with the split's document numbers, and their order."""
        epoch = self._epoch(number)
        documents = epoch.documents[epoch.first_document[group]:epoch.first_document[group + 1]]
        pieces, first = pack(self.split.doc_lengths[documents], self.row_tokens)
        pieces[:, 0] = documents[pieces[:, 0]]
        return pieces, first, _generator(self.seed, number, group + 1).permutation(len(first) - 1)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key))


# ---- batches

def batch(rows: PackedRows, step: int, micro_step: int, *, device_batch_size: int, grad_accum_steps: int, rank: int,
          world_size: int) -> np.ndarray:
    """The micro-batch of one rank in one micro-step: (device_batch_size, row_len + 1) int64.

    An optimizer step takes the next device_batch_size * grad_accum_steps * world_size rows: the same rows for the same product.
    """
    rows_per_micro_step = device_batch_size * world_size
    first = (step * grad_accum_steps + micro_step) * rows_per_micro_step + rank * device_batch_size
    return rows.rows(range(first, first + device_batch_size))


class TrainLoader:
    """The micro-batches of a run as tensors, prefetched by a thread: `start(step)`, then `next()` per micro-step."""

    def __init__(self, rows: PackedRows, *, device_batch_size: int, grad_accum_steps: int, rank: int, world_size: int,
                 device):
        """Raises: UserError if the text has fewer rows than one optimizer step needs."""
        rows.require(device_batch_size * grad_accum_steps * world_size)
        self.rows, self.device, self.grad_accum_steps = rows, device, grad_accum_steps
        self.share = dict(device_batch_size=device_batch_size, grad_accum_steps=grad_accum_steps, rank=rank,
                          world_size=world_size)
        self.thread, self.ahead, self.position = None, deque(), 0
        self.made = self.seen = 0  # CRC-32 of the step's tokens so far: of prefetched batches, and of those that `next` returned

    def start(self, step: int) -> None:
        """Seek to the first micro-step of an optimizer step. May be called at any time."""
        self.close()
        self.thread = ThreadPoolExecutor(1, "loader", initializer=_use_device, initargs=(self.device,))
        self.position = step * self.grad_accum_steps  # in micro-steps
        for _ in range(PREFETCH):
            self._submit()

    def next(self):
        """(inputs, targets) of the next micro-step: int64 (B, T) on the device. Raises errors of the thread."""
        assert self.thread is not None, "call start(step) first"
        tensors, self.seen = self.ahead.popleft().result()
        self._submit()
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def checksum(self) -> int:
        """CRC-32 of this rank's tokens (int64) in the current optimizer step so far; independent of the micro-batch size."""
        return self.seen

    def close(self) -> None:
        """Stop the thread and drop prefetched batches."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
            self.thread = None
            self.ahead.clear()

    def _submit(self) -> None:
        self.ahead.append(self.thread.submit(self._make, *divmod(self.position, self.grad_accum_steps)))
        self.position += 1

    def _make(self, step: int, micro_step: int):
        rows = batch(self.rows, step, micro_step, **self.share)
        self.made = zlib.crc32(rows, self.made if micro_step else 0)  # a single thread, so in order
        return _inputs_and_targets(rows, self.device), self.made


def val_batches(split: Split, row_len: int, batch_size: int, num_tokens: int, rank: int, world_size: int,
                device) -> Iterator[tuple]:
    """Yield (inputs, targets) of the validation rows: int64 (B, T) on the device; the last batch may be smaller.

    The rows are always the same: the first ceil(num_tokens / row_len) in a fixed order, or all if there are fewer. Rank r takes
    rows r, r + world_size, ..., possibly none. Text shorter than a row is one shorter row.
    """
    rows = PackedRows(split, min(row_len, split.num_tokens - 1), seed=0)
    count = min(max(1, -(-num_tokens // row_len)), rows.rows_per_epoch)
    mine = range(rank, count, world_size)
    for i in range(0, len(mine), batch_size):
        tensors = _inputs_and_targets(rows.rows(mine[i:i + batch_size]), device)
        yield tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def _inputs_and_targets(rows: np.ndarray, device):
    """(B, T + 1) int64 -> two contiguous tensors (B, T), in pinned memory for CUDA devices."""
    import torch
    # Copied: torch calls a slice of a single row contiguous whatever its strides, but torch.compile does not and recompiles.
    tensors = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
    return tuple(t.pin_memory() for t in tensors) if torch.device(device).type == "cuda" else tensors


def _use_device(device) -> None:
    """Make the rank's GPU current in the thread: pinned memory belongs to the current GPU's context."""
    import torch
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
