"""The short convolution against PyTorch's, and its use piece by piece."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import CONV_LR
from nanochat.kernels.short_conv import ShortConv
from nanochat.recipe.shape import shape_of_depth


def random_conv(width, taps, dtype=torch.float64):
    conv = ShortConv(width, taps).to(dtype)
    torch.nn.init.normal_(conv.weight)
    return conv


@settings(max_examples=25)
@given(rows=st.integers(1, 3), length=st.integers(1, 9), width=st.integers(1, 5), taps=st.integers(2, 6), seed=st.integers(0, 99))
def test_it_is_a_depthwise_convolution(rows, length, width, taps, seed):
    """Output and gradients against F.conv1d, with a first tap of 1; also for texts that are shorter than the taps."""
    torch.manual_seed(seed)
    conv, x = random_conv(width, taps), torch.randn(rows, length, width, dtype=torch.float64, requires_grad=True)
    kernel = torch.cat([torch.ones(1, width, dtype=torch.float64), conv.weight]).flip(0).T[:, None]  # (C, 1, K)
    expected = F.conv1d(F.pad(x.mT, (taps - 1, 0)), kernel, groups=width).mT
    torch.testing.assert_close(conv(x), expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(torch.autograd.grad(conv(x), (x, conv.weight), upstream),
                            torch.autograd.grad(expected, (x, conv.weight), upstream), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=25)
@given(taps=st.integers(2, 6), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_pieces_give_what_the_whole_gives(taps, sizes, seed):
    torch.manual_seed(seed)
    conv, x = random_conv(4, taps), torch.randn(2, sum(sizes), 4, dtype=torch.float64)
    before = torch.zeros(2, taps - 1, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([conv(piece, before) for piece in x.split(sizes, dim=1)], dim=1), conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_begins_as_the_identity_to_the_bit(dtype):
    conv, x = ShortConv(8, 4), torch.randn(2, 5, 8, dtype=dtype)
    conv.init_weights()
    assert torch.equal(conv(x), x) and conv.weight.dtype == torch.float32


def test_its_rate_does_not_depend_on_the_size_of_the_gradients():
    """They are about 1e-4 in training. With the eps of the learned scalars the convolutions would hardly move."""
    model = build_model(shape_of_depth(2, 16, 16, sequence_len=8, vocab_size=50, short_conv=3), torch.float32, "cpu")
    optimizer = model.setup_optimizer()
    for conv in model.short_convs():
        conv.weight.grad = 1e-4 * torch.randn_like(conv.weight).sign()
    optimizer.step()
    for conv in model.short_convs():
        torch.testing.assert_close(conv.weight.detach(), -CONV_LR * conv.weight.grad.sign(), rtol=1e-3, atol=0)
