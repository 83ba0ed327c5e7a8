"""Rows and batches: full, from BOS on, losing next to nothing; a pure function of (seed, step, rank, world size)."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import PackedRows, TrainLoader, batch, pack, val_batches
from nanochat.dataset import Split

BOS = 0


def make_split(lengths, shards: int = 2) -> Split:
    """Documents of these lengths (BOS counted) whose other tokens are all different, spread over shards."""
    token, docs = 1, []
    for n in lengths:
        docs.append(np.r_[BOS, np.arange(token, token + n - 1)].astype(np.uint32))
        token += n - 1
    parts = [docs[i * len(docs) // shards:(i + 1) * len(docs) // shards] for i in range(shards)]
    parts = [part for part in parts if part]
    shard_lengths = [np.array([len(doc) for doc in part], np.uint32) for part in parts]
    return Split([np.concatenate(part) for part in parts], shard_lengths, BOS)


def random_split(num_docs: int = 400, seed: int = 0) -> Split:
    return make_split(np.random.default_rng(seed).integers(2, 90, num_docs))


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of few tokens, so that a small split has several."""
    monkeypatch.setattr(dataloader, "GROUP_TOKENS", 2000)


LENGTHS = st.lists(st.integers(2, 60) | st.integers(2, 500), min_size=1, max_size=80)


@settings(max_examples=300)
@given(lengths=LENGTHS, row_tokens=st.integers(2, 70))
def test_packing_loses_only_what_bos_pushes_out(lengths, row_tokens):
    lengths = np.array(lengths)
    pieces, first = pack(lengths, row_tokens)
    assert len(first) == lengths.sum() // row_tokens + 1
    assert all(pieces[a:b, 2].sum() == row_tokens for a, b in pairwise(first))
    uses = Counter()
    for document, start, count in pieces.tolist():
        assert 0 <= start and 1 <= count and start + count <= lengths[document]
        uses.update((document, position) for position in range(start + 1, start + count))
    assert set(uses.values()) <= {1}  # no token of a document is trained on twice
    bos = len(pieces)  # a piece has one, the document's or an added one
    assert sum(uses.values()) + bos == row_tokens * (len(first) - 1)


@given(lengths=LENGTHS, row_len=st.integers(1, 69), seed=st.integers(0, 5))
def test_rows_are_full_start_with_bos_and_repeat_nothing(lengths, row_len, seed):
    split = make_split(lengths)
    if split.num_tokens < row_len + 1:
        with pytest.raises(UserError, match="one row needs"):
            PackedRows(split, row_len, seed)
        return
    packed = PackedRows(split, row_len, seed)
    rows = packed.rows(range(packed.rows_per_epoch))
    assert rows.shape == (packed.rows_per_epoch, row_len + 1) and rows.dtype == np.int64
    assert (rows[:, 0] == BOS).all()
    text = rows[rows != BOS]
    assert len(set(text.tolist())) == len(text)
    report = packed.report(groups=10**9)
    # every token is in a row, is lost, or is the BOS of a document (not all of which are in a row)
    lost = report["tokens_lost_share"] * split.num_tokens
    kept = rows.size - report["added_bos_share"] * rows.size
    assert kept + lost == pytest.approx(split.num_tokens)


def test_rows_follow_the_documents():
    """A row is made of stretches of documents in their order, each after a BOS."""
    split = random_split()
    packed = PackedRows(split, 32, seed=1)
    next_token = {int(a): int(b) for i in range(split.num_docs) for a, b in pairwise(split.doc(i)[1:])}
    for row in packed.rows(range(packed.rows_per_epoch)).tolist():
        for a, b in pairwise(row):
            assert b == BOS or a == BOS or b == next_token[a]


def test_next_to_nothing_is_lost_or_cut():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 3000).astype(int), 2, None)
    report = PackedRows(make_split(lengths), 512, seed=0).report()
    assert report["tokens_lost_share"] < 0.005 and report["added_bos_share"] < 1 / 512
    assert report["documents_cut_share"] < report["documents_longer_share"] + 0.01


def test_several_groups_cover_the_text(small_groups):
    split = random_split()
    packed = PackedRows(split, 32, seed=3)
    assert packed.num_groups > 5
    for epoch in range(3):
        rows = packed.rows(range(epoch * packed.rows_per_epoch, (epoch + 1) * packed.rows_per_epoch))
        text = rows[rows != BOS].tolist()
        assert len(set(text)) == len(text) > 0.9 * (split.num_tokens - split.num_docs)


def test_epochs_and_seeds_differ_in_order(small_groups):
    split = random_split()
    packed, other = PackedRows(split, 32, seed=3), PackedRows(split, 32, seed=4)
    n = packed.rows_per_epoch
    first, second = packed.rows(range(n)), packed.rows(range(n, 2 * n))
    assert not np.array_equal(first, second) and not np.array_equal(first, other.rows(range(n)))
    assert len({tuple(row) for row in first.tolist()} & {tuple(row) for row in second.tolist()}) < n / 2


def test_one_long_document():
    split = make_split([100_000])
    packed = PackedRows(split, 64, seed=0)
    assert packed.rows_per_epoch == 100_000 // 65
    rows = packed.rows(range(packed.rows_per_epoch))
    assert (rows[:, 0] == BOS).all() and (rows == BOS).sum() == len(rows)
    assert np.array_equal(np.sort(rows[:, 1:].ravel()), np.arange(1, 64 * len(rows) + 1))


# ---- batches

def step_rows(packed, step, device_batch_size, grad_accum_steps, world_size):
    sizes = dict(device_batch_size=device_batch_size, grad_accum_steps=grad_accum_steps, world_size=world_size)
    return np.concatenate([batch(packed, step, micro, rank=rank, **sizes)
                           for micro in range(grad_accum_steps) for rank in range(world_size)])


@pytest.mark.parametrize("shape", [(24, 1, 1), (1, 24, 1), (1, 1, 24), (4, 3, 2), (2, 3, 4), (3, 8, 1)])
def test_a_steps_rows_do_not_depend_on_how_they_are_dealt(small_groups, shape):
    packed = PackedRows(random_split(), 32, seed=5)
    for step in (0, 7, 100):
        expected = packed.rows(range(step * 24, (step + 1) * 24))
        assert np.array_equal(step_rows(packed, step, *shape), expected)


@pytest.mark.slow
@given(order=st.permutations(range(40)))
def test_a_batch_is_a_pure_function(order):
    split = random_split()
    sizes = dict(device_batch_size=4, grad_accum_steps=2, rank=1, world_size=2)
    used = PackedRows(split, 32, seed=5)
    for step in order[:6]:
        fresh = PackedRows(split, 32, seed=5)
        assert np.array_equal(batch(used, step, step % 2, **sizes), batch(fresh, step, step % 2, **sizes))


def test_any_access_order_over_many_groups_and_epochs(small_groups):
    split = random_split()
    packed = PackedRows(split, 32, seed=5)
    indices = np.random.default_rng(0).integers(0, 5 * packed.rows_per_epoch, 60)
    scattered = packed.rows(indices)
    for index, row in zip(indices, scattered, strict=True):
        assert np.array_equal(PackedRows(split, 32, seed=5).rows([index])[0], row)


# ---- the loader

HOST_SIZES = dict(device_batch_size=4, grad_accum_steps=2, rank=0, world_size=1)
SIZES = HOST_SIZES | {"device": "cpu"}


def test_loader_gives_the_batches_in_order_and_starts_anywhere():
    packed = PackedRows(random_split(), 32, seed=5)
    loader = TrainLoader(packed, **SIZES)
    for first_step in (0, 11, 3):
        loader.start(first_step)
        for step in range(first_step, first_step + 5):
            for micro in range(2):
                x, y = loader.next()
                rows = torch.from_numpy(batch(packed, step, micro, **HOST_SIZES))
                assert x.shape == y.shape == (4, 32) and x.dtype == y.dtype == torch.int64 and x.is_contiguous()
                assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
    loader.close()
    loader.close()


def test_loader_starts_at_once_however_far_into_the_run(small_groups):
    packed = PackedRows(random_split(), 32, seed=5)
    loader = TrainLoader(packed, **SIZES)
    loader.start(1_000_000)
    x, _ = loader.next()
    assert (x[:, 0] == BOS).all()
    loader.close()


def test_errors_of_the_thread_surface():
    split = random_split()
    loader = TrainLoader(PackedRows(split, 32, seed=5), **SIZES)
    split._shards = [shard[:10] for shard in split._shards]  # as if the files had shrunk under the run
    loader.start(0)
    with pytest.raises(ValueError):
        for _ in range(100):
            loader.next()
    loader.close()


def test_text_shorter_than_a_step_is_refused():
    packed = PackedRows(random_split(20), 32, seed=5)
    with pytest.raises(UserError, match="one step needs.*--total-batch-size, --device-batch-size or --max-seq-len"):
        TrainLoader(packed, **SIZES | {"grad_accum_steps": 1000})
    with pytest.raises(UserError, match="--max-seq-len"):
        PackedRows(random_split(20), 4096, seed=5)


# ---- validation

def val_rows(split, row_len, batch_size, num_tokens, world_size):
    """All rows of all ranks as a multiset."""
    rows = Counter()
    for rank in range(world_size):
        for x, y in val_batches(split, row_len, batch_size, num_tokens, rank, world_size, "cpu"):
            assert len(x) <= batch_size and torch.equal(x[:, 1:], y[:, :-1])
            rows.update(map(tuple, torch.cat([x, y[:, -1:]], dim=1).tolist()))
    return rows


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (7, 1), (64, 1), (4, 2), (3, 5), (2, 100)])
def test_validation_rows_are_always_the_same(batch_size, world_size):
    split = random_split()
    assert val_rows(split, 32, batch_size, 1000, world_size) == val_rows(split, 32, 32, 1000, 1)
    assert sum(val_rows(split, 32, batch_size, 1000, world_size).values()) == 32  # ceil(1000 / 32)


def test_validation_takes_what_there_is():
    split = random_split(20)
    assert sum(val_rows(split, 32, 4, 10**9, 1).values()) == split.num_tokens // 33
    assert sum(val_rows(split, 32, 4, 1, 1).values()) == 1


def test_validation_shorter_than_a_row_is_one_shorter_row():
    (x, y), = val_batches(make_split([5, 4]), 1024, 8, 10**6, 0, 1, "cpu")
    assert x.shape == y.shape == (1, 8) and x[0, 0] == BOS
