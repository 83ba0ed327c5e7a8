"""The memory estimate: counts against a real model, its order, what fits, and --auto-batch. And a peak measured here."""

import re
import resource
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat.checkpoint_manager import build_model
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.recipe.memory_estimate import (
    MARGIN,
    MemoryConfig,
    advice,
    estimate_memory,
    evaluation_memory,
    host_memory,
    largest_fit,
    micro_batches,
)
from nanochat.recipe.shape import shape_of_depth
from nanochat.runtime.device import peak_resident
from nanochat.training.auto_batch import choose_micro_batch_size, estimated_to_fit, fits_in_memory, is_out_of_memory
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from processes import Served

SHAPE = shape_of_depth(4, 16, 16, sequence_len=64, vocab_size=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_moments_are_those_of_the_model(dtype):
    model = build_model(SHAPE, dtype, torch.device("cpu"))
    optimizer = model.setup_optimizer()
    model(*torch.randint(0, 300, (2, 2, 64))).backward()
    optimizer.step()
    estimate = estimate_memory(SHAPE, 2, MemoryConfig(dtype.itemsize, compiled=False))
    assert estimate.weights == sum(p.nbytes for p in model.parameters()) == sum(p.grad.nbytes for p in model.parameters())
    assert estimate.gradients == estimate.weights
    moments = sum(t.nbytes for t in optimizer.named_state().values())
    assert estimate.moments == pytest.approx(moments, rel=0.02)  # Muon's second moment, a vector per matrix, is left out


CONFIGS = st.builds(MemoryConfig, st.sampled_from([2, 4]), *[st.booleans()] * 4, st.sampled_from([2, 4]))


@given(rows=st.integers(1, 200), available=st.integers(2**20, 2**36), config=CONFIGS)
def test_the_largest_fit_fits_and_the_next_does_not(rows, available, config):
    def fits(n):
        return estimate_memory(SHAPE, n, config).total <= MARGIN * available
    best = largest_fit(SHAPE, micro_batches(rows), available, config)
    for n in micro_batches(rows):
        assert rows % n == 0 and fits(n) == (best is not None and n <= best)


@given(rows=st.integers(1, 64), limit=st.integers(2**20, 2**34), config=CONFIGS)
def test_advice_names_flags_that_fit_by_the_same_estimate(rows, limit, config):
    """Whatever it says to add or to take, put on the command line, fits; it says neither only where nothing does."""
    text = advice(SHAPE, rows, limit, config)
    added = replace(config, chunked_ce=config.chunked_ce or "--chunked-ce" in text,
                    recompute=config.recompute or "--recompute-activations" in text)
    taken = re.search(r"Take --device-batch-size (\d+)", text)
    if "and even" not in text:
        assert estimate_memory(SHAPE, int(taken[1]) if taken else rows, added).total <= MARGIN * limit
        assert not taken or int(taken[1]) < rows and rows % int(taken[1]) == 0
    else:
        thriftiest = replace(config, chunked_ce=True, recompute=config.compiled)
        assert "--max-seq-len" in text and "--depth" in text
        assert all(estimate_memory(SHAPE, n, thriftiest).total > MARGIN * limit for n in micro_batches(rows)[1:])


def test_host_memory_knows_the_limit_of_the_process():
    assert 2**26 < host_memory(available=True) <= host_memory(available=False)
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = 2**42 if host_memory(False) > 2**42 else host_memory(False) - 2**20
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        assert host_memory(available=False) == limit and host_memory(available=True) < limit
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("error, yes", [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory."), True),
    (RuntimeError("MPS backend out of memory"), True), (OSError(12, "Cannot allocate memory"), True),
    (RuntimeError("shape mismatch"), False), (KeyError("out of memory"), False)])
def test_what_counts_as_out_of_memory(error, yes):
    assert is_out_of_memory(error) == yes
    with pytest.raises(RuntimeError) as e:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(e.value)


# --- --auto-batch ---------------------------------------------------------------------------------------------------

def flags(base, tag, *extra):
    return (f"--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=8 --num-iterations=4 "
            f"--eval-every=-1 --core-metric-every=-1 --sample-every=-1 --vocab-size=300 --device-type=cpu --no-compile "
            f"--dtype=float32 --total-batch-size=512 --data={base / 'text'} --model-tag={tag}").split() + list(extra)


def needs(run, rows):
    return estimate_memory(run.state.model.config, rows, MemoryConfig(4, compiled=False)).total / MARGIN


def test_auto_batch_keeps_the_step_and_takes_what_fits(base, monkeypatch):
    """The machine's memory, as the planner sees it, is set so that 2 rows fit and 4 do not."""
    whole = build_run(parse_config(FEATURES, flags(base, "whole", "--auto-batch")))
    assert whole.plan.micro_batch_size == 8 and fit(whole) == 0
    at_hand = int((needs(whole, 2) + needs(whole, 4)) / 2)
    monkeypatch.setattr("nanochat.recipe.memory_estimate.host_memory", lambda available: at_hand)
    small = build_run(parse_config(FEATURES, flags(base, "small", "--auto-batch", "--save-every=2")))
    assert small.plan.micro_batch_size == 2 and small.plan.horizon.grad_accum_steps == 512 // 64
    assert small.plan.horizon.total_batch_size == whole.plan.horizon.total_batch_size
    assert small.plan.horizon.lr_factor == whole.plan.horizon.lr_factor
    assert fit(small) == 0
    rows = [read_metrics(run.plan.run_dir / "metrics.jsonl") for run in (whole, small)]
    assert [r["batch_crc32"] for r in rows[0]] == [r["batch_crc32"] for r in rows[1]]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-4)
    monkeypatch.undo()
    again = build_run(parse_config(FEATURES, flags(base, "small", "--auto-batch", "--save-every=2", "--resume-from-step=2")))
    assert again.plan.micro_batch_size == 2  # as the run began, though now 8 would fit
    assert fit(again) == 0
    assert [r["loss"] for r in read_metrics(again.plan.run_dir / "metrics.jsonl")] == [r["loss"] for r in rows[1]]


def test_auto_batch_says_where_nothing_fits(base, monkeypatch):
    monkeypatch.setattr("nanochat.recipe.memory_estimate.host_memory", lambda available: 2**20)
    with pytest.raises(UserError, match="no micro-batch fits.*--max-seq-len"):
        build_run(parse_config(FEATURES, flags(base, "nothing", "--auto-batch")))


def without_rows(base, tag, *extra):
    return [flag for flag in flags(base, tag, *extra) if not flag.startswith("--device-batch-size")]


def test_without_a_number_of_rows_as_many_as_fit_are_taken(base, monkeypatch):
    """32 where there is room; where not, by the whole machine's memory: what other programs use just now must not change the
    bits. A number that was typed is taken though it does not fit by estimate."""
    argv = [*without_rows(base, "default"), "--total-batch-size=2048"]
    assert build_run(parse_config(FEATURES, argv)).plan.micro_batch_size == 32
    typed = build_run(parse_config(FEATURES, [*argv, "--device-batch-size=32", "--model-tag=typed"]))
    at_hand = int((needs(typed, 4) + needs(typed, 8)) / 2)
    monkeypatch.setattr("nanochat.recipe.memory_estimate.host_memory", lambda available: 0 if available else at_hand)
    small = build_run(parse_config(FEATURES, [*argv, "--model-tag=default-small"]))
    assert small.plan.micro_batch_size == 4 and small.plan.horizon.grad_accum_steps == 2048 // (4 * 32)
    again = build_run(parse_config(FEATURES, [*argv, "--device-batch-size=32", "--model-tag=typed-again"]))
    assert again.plan.micro_batch_size == 32
    assert fit(small) == 0
    monkeypatch.undo()
    again = build_run(parse_config(FEATURES, [*argv, "--model-tag=default-small", "--resume-from-step=latest"]))
    assert again.plan.micro_batch_size == 4


@given(rows=st.integers(1, 64), length=st.integers(1, 64))
def test_smaller_micro_batches_keep_what_fp8_needs(rows, length):
    sizes = micro_batches(rows, length)
    assert sizes[0] == rows and sizes == sorted(set(sizes), reverse=True) and all(rows % n == 0 for n in sizes)
    left_out = set(micro_batches(rows)) - set(sizes)
    assert all(n * length % 16 for n in left_out)
    assert rows * length % 16 or all(n * length % 16 == 0 for n in sizes)
    assert not (left_out and rows * length % 16)


def test_on_cuda_step_and_evaluation_have_to_fit(base):
    """d12 by the estimate: 16 rows on 22 GB, 8 on 16 GB. A small model's evaluation needs more than its compiled step."""
    run = build_run(parse_config(FEATURES, flags(base, "cuda-rows")))

    def most(depth, gigabytes):
        plan = replace(run.plan, device=torch.device("cuda"), memory=MemoryConfig(2, compiled=True, cuda=True),
                       shape=shape_of_depth(depth, 64, 128, sequence_len=2048, vocab_size=32768))
        return next(n for n in (32, 16, 8, 4, 2, 1) if estimated_to_fit(plan, int(gigabytes * 1e9), n))
    assert [most(12, size) for size in (80, 24, 22.5, 16, 12)] == [32, 16, 16, 8, 4]
    small, config = shape_of_depth(4, 64, 128, sequence_len=2048, vocab_size=32768), MemoryConfig(2, compiled=True, cuda=True)
    assert most(4, 24) == 16 and estimate_memory(small, 32, config).total < MARGIN * 24e9 < evaluation_memory(small, 32, config)


def test_trying_a_micro_batch_leaves_no_trace(base):
    """As on CUDA, but with an allocator that fails from 4 rows on: by a tensor that is too large for any machine."""
    run = build_run(parse_config(FEATURES, flags(base, "tried")))
    before = {name: t.clone() for name, t in run.state.model.state_dict().items()}
    hook = run.state.model.register_forward_pre_hook(
        lambda _, x: torch.empty(2**50, dtype=torch.uint8) if len(x[0]) >= 4 else None)
    assert [fits_in_memory(run.plan, run.state, rows) for rows in (8, 4, 2, 1)] == [False, False, True, True]
    hook.remove()
    assert all(torch.equal(t, before[name]) for name, t in run.state.model.state_dict().items())
    assert not run.state.optimizer.state and all(p.grad is None for p in run.state.model.parameters())
    assert choose_micro_batch_size(run.plan, run.state) == 8
    assert fit(run) == 0


# --- against measurements ------------------------------------------------------------------------------------------

# Peaks of torch's CUDA allocator in MiB (dev/LOG.md): depth, rows of 2048 tokens, then plain, chunked, chunked and recomputed
CUDA_PEAKS = [(8, 8, 5198, 4542, 3453), (12, 4, 7057, 6960, 5566), (12, 16, 16906, 15305, 10570), (16, 8, 17730, None, 12674),
              (20, 4, 19639, 19598, 15628)]


@pytest.mark.parametrize("depth, rows, plain, chunked, recomputed", CUDA_PEAKS)
def test_the_estimate_is_near_the_peaks_on_cuda(depth, rows, plain, chunked, recomputed):
    shape = shape_of_depth(depth, 64, 128, sequence_len=2048, vocab_size=32768)
    config = MemoryConfig(2, compiled=True, cuda=True)
    for way, peak in ((config, plain), (replace(config, chunked_ce=True), chunked),
                      (replace(config, chunked_ce=True, recompute=True), recomputed)):
        assert peak is None or estimate_memory(shape, rows, way).total / 2**20 == pytest.approx(peak, rel=0.05)


def watch_peak(run):
    """Print, when the run ends, the resident memory that training has added."""
    start, close_checkpoints = peak_resident(), run.checkpoints.close
    model = run.state.model.config
    estimate = estimate_memory(model, run.plan.micro_batch_size, MemoryConfig(4, compiled=False))

    def closing():
        added = peak_resident() - start
        print(f"added {added} planned {estimate.total - estimate.weights}", flush=True)
        close_checkpoints()
    run.checkpoints.close = closing


@pytest.mark.slow
def test_the_estimate_is_near_the_measured_peak(base):
    """A step of 4 rows of 512 tokens at width 256; within a factor of 1.5."""
    process = Served(flags(base, "peak", "--depth=4", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=512",
                           "--device-batch-size=4", "--total-batch-size=2048", "--num-iterations=2"),
                     base, base / "peak.log", watch_peak)
    assert process.wait() == 0, process.log.read_text()[-2000:]
    words = process.log.read_text().split()
    added, planned = (int(words[words.index(name) + 1]) for name in ("added", "planned"))
    assert 1 / 1.5 < added / planned < 1.5, (added, planned)
