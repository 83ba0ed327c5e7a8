"""Exclusive self-attention: what is taken away, exactly, and in every way that a model is run."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.checkpoint_manager import build_model
from nanochat.features import FEATURES
from nanochat.gpt import without_own_value
from nanochat.recipe.shape import GPTConfig
from nanochat.training.config import parse_config


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 6, 64]),
       st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_what_is_left_is_orthogonal_to_the_own_value(rows, tokens, kv_heads, shared, width, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, tokens, kv_heads * shared, width, generator=random).to(dtype)
    v = torch.randn(rows, tokens, kv_heads, width, generator=random).to(dtype)
    left, own = without_own_value(y, v), v.double().repeat_interleave(shared, dim=2)
    expected = y.double() - (y.double() * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    assert left.dtype == dtype and left.shape == y.shape
    error = 4 * torch.finfo(dtype).eps
    assert torch.allclose(left.double(), expected, rtol=error, atol=error * y.abs().max().item())


def test_gradients_and_a_value_of_zero():
    random = torch.Generator().manual_seed(0)
    y, v = (torch.randn(2, 3, heads, 4, generator=random, requires_grad=True) for heads in (4, 2))
    gradients = torch.autograd.grad(without_own_value(y, v).square().sum(), (y, v))
    for tensor, gradient in zip((y, v), gradients, strict=True):
        moved = torch.randn(tensor.shape, generator=random)
        up, down = (without_own_value(y + s * moved if tensor is y else y, v + s * moved if tensor is v else v).square().sum()
                    for s in (1e-3, -1e-3))
        assert (up - down).item() / 2e-3 == pytest.approx((gradient * moved).sum().item(), rel=2e-2, abs=1e-2)
    assert torch.equal(without_own_value(y, torch.zeros_like(v)), y)


def test_the_first_token_hears_nothing_and_a_flag_decides():
    """It attends to itself alone, so that nothing of its attention is left."""
    shape = parse_config(FEATURES, ["--depth=1", "--aspect-ratio=32", "--head-dim=16", "--max-seq-len=8",
                                    "--exclusive-attention"]).model.shape(50)
    assert shape.exclusive_attention and not GPTConfig().exclusive_attention
    model = build_model(shape, torch.float32, "cpu")
    attention, heard = model.transformer.h[0].attn, []
    attention.c_proj.register_forward_hook(lambda module, given, out: heard.append(given[0]))
    with torch.no_grad():
        model(torch.arange(8)[None])
    assert heard[0].abs()[0, 0].max() < 1e-5 < heard[0].abs()[0, 1:].amax(-1).min()
