import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import build_model
from nanochat.loss_eval import evaluate_bpb
from nanochat.recipe.shape import GPTConfig
from processes import started

VOCAB, T = 11, 24
TOKEN_BYTES = torch.tensor([1, 1, 2, 3, 4, 7, 1, 0, 5, 2, 0], dtype=torch.int32)  # 7 and 10 are special


def make_model():
    torch.manual_seed(3)
    config = GPTConfig(sequence_len=T, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = build_model(config, torch.float32, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=2 * p.size(1) ** -0.5)
    return model


def make_rows(n=12):
    """x, y (n, T): some targets ignored, some special, and one row that has nothing but such."""
    ids = torch.randint(VOCAB, (n, T + 1), generator=torch.Generator().manual_seed(5))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    y[:, ::5] = -1
    y[3, ::2], y[3, 1::2] = -1, 7
    return x, y


def batches(x, y, batch_size):
    return zip(x.split(batch_size), y.split(batch_size), strict=True)


def by_hand(model, x, y):
    """The definition, one target at a time, in Python's floats."""
    nats, size = 0.0, 0
    with torch.no_grad():
        logits = model(x)
    for row, targets in zip(logits.tolist(), y.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target >= 0 and TOKEN_BYTES[target] > 0:
                nats += math.log(sum(math.exp(z) for z in scores)) - scores[target]
                size += int(TOKEN_BYTES[target])
    return nats / size / math.log(2)


def test_bpb_is_its_definition_for_every_batch_size():
    model, (x, y) = make_model(), make_rows()
    expected = by_hand(model, x, y)
    assert 0.5 < expected < 20
    for batch_size in (12, 5, 4, 1):
        # each loss is rounded to float32 once, the sums are in float64
        assert evaluate_bpb(model, batches(x, y, batch_size), None, TOKEN_BYTES) == pytest.approx(expected, rel=1e-6)


def test_steps_limits_the_batches_and_positional_order_is_nanochats():
    model, (x, y) = make_model(), make_rows()
    limited = evaluate_bpb(model, batches(x, y, 2), 2, TOKEN_BYTES)
    assert limited == pytest.approx(by_hand(model, x[:4], y[:4]), rel=1e-6)


def test_special_and_ignored_targets_do_not_count():
    """A model that is perfect but for special targets, where it is infinitely wrong, has 0 bits per byte."""
    def model(x, y, loss_reduction):
        assert loss_reduction == "none"
        return torch.where((y < 0) | (TOKEN_BYTES[y.clamp(min=0)] == 0), torch.inf, 0.0)

    x, y = make_rows()
    assert evaluate_bpb(model, batches(x, y, 4), None, TOKEN_BYTES) == 0.0
    assert evaluate_bpb(model, batches(x, torch.full_like(y, 7), 4), None, TOKEN_BYTES) == math.inf


def test_bpb_of_a_uniform_model_is_known():
    def model(x, y, loss_reduction):
        return torch.full(y.shape, math.log(256.0))

    x = torch.zeros(2, 6, dtype=torch.long)
    one_byte, three_bytes = torch.zeros_like(x), torch.full_like(x, 3)
    assert evaluate_bpb(model, [(x, one_byte)], None, TOKEN_BYTES) == pytest.approx(8.0, rel=1e-6)
    assert evaluate_bpb(model, [(x, three_bytes)], None, TOKEN_BYTES) == pytest.approx(8 / 3, rel=1e-6)
    # a mean over targets of bits per byte would give 5.33: what counts is all bits over all bytes
    assert evaluate_bpb(model, [(x, one_byte), (x, three_bytes)], None, TOKEN_BYTES) == pytest.approx(4.0, rel=1e-6)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y = make_rows()
    share = slice(0, 7) if rank == 0 else slice(7, None)
    bpb = evaluate_bpb(make_model(), batches(x[share], y[share], 4), None, TOKEN_BYTES)
    Path(folder, f"rank{rank}").write_text(repr(bpb))
    dist.barrier()  # a rank that leaves while the other still talks to it makes that one abort
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_add_up(tmp_path):
    ranks = [started(_rank, rank, str(tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.join()
    x, y = make_rows()
    alone = evaluate_bpb(make_model(), batches(x, y, 4), None, TOKEN_BYTES)
    for rank in (0, 1):
        assert float((tmp_path / f"rank{rank}").read_text()) == pytest.approx(alone, rel=1e-12)
