"""The model: shape facts of the recipe, the suffix's gradients to the bit, and what must not leak between positions."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPT, relu_square
from nanochat.kernels.linear import Linear
from nanochat.recipe.shape import GPTConfig, flops_per_token, param_counts, shape_of_depth, window_sizes

TINY = GPTConfig(sequence_len=32, vocab_size=101, n_layer=5, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL", short_conv=3)


def tiny_model(config=TINY, seed=0, dtype=torch.float32, device="cpu"):
    """A model in which every path carries signal: projections and lambdas that start at zero are drawn at random. The weights are
    the same on every device."""
    torch.manual_seed(seed)
    model = build_model(config, dtype, torch.device("cpu"))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.normal_(std=0.1)
            block.mlp.c_proj.weight.normal_(std=0.1)
        for conv in model.short_convs():
            conv.weight.normal_(std=0.3)
        model.lm_head.weight.normal_(std=0.1)
        model.smear_lambda.fill_(0.5)
    return model.to(device)


def batch(config=TINY, rows=3, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(config.vocab_size, (rows, config.sequence_len + 1), generator=generator).to(device)
    return x[:, :-1], x[:, 1:]


def gradients_of(model, forward, device, **options):
    """Loss of a batch by `forward`, which is the model or compiled, and the gradients by name."""
    for p in model.parameters():
        p.grad = None
    loss = forward(*batch(device=device), **options)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(a, b, name=""):
    """The same bits on a CPU. A GPU may sum in another order each time."""
    if a.device.type == "cpu":
        assert torch.equal(a, b), name
    else:
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7, name


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 20])
def test_counts_from_the_config_are_the_models(depth):
    config = shape_of_depth(depth, vocab_size=1000, short_conv=depth % 4)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == param_counts(config)["total"]


def test_d12_has_79_linears():
    with torch.device("meta"):
        model = GPT(shape_of_depth(12))
    assert len(model.linears()) == 79
    assert sum(type(m).__mro__[1] is torch.nn.Linear for m in model.modules()) == 79


def test_windows():
    assert window_sizes(shape_of_depth(12)) == [512, 512, 512, 2048] * 3
    assert window_sizes(shape_of_depth(5, window_pattern="S", sequence_len=600)) == [256, 256, 256, 256, 600]


def test_flops_match_a_count_of_what_runs():
    """6 per matmul parameter and 12 x width x T for attention, against torch's own counter of a forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config = GPTConfig(sequence_len=128, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")
    model = tiny_model(config)
    x, y = batch(config, rows=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no CPU flash kernel
        model(x, y).backward()
    assert counter.get_total_flops() / 128 == pytest.approx(flops_per_token(config), rel=0.01)


def test_initial_loss_is_that_of_a_uniform_guess(device):
    torch.manual_seed(0)
    model = build_model(TINY, torch.float32, device)
    assert model(*batch(device=device)).item() == pytest.approx(torch.log(torch.tensor(101.0)).item(), abs=0.01)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_agrees_with_the_logits(device, reduction):
    model, (x, y) = tiny_model(device=device), batch(device=device)
    y = y.masked_fill((torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) < 0.3).to(device), -1)
    logits = model(x)
    assert logits.shape == (3, 32, 101) and logits.dtype == torch.float32 and logits.abs().max() < 15
    nats = -logits.double().log_softmax(-1).gather(-1, y.clamp_min(0)[..., None])[..., 0] * (y >= 0)
    expected = {"mean": nats.sum() / (y >= 0).sum(), "sum": nats.sum(), "none": nats}[reduction]
    torch.testing.assert_close(model(x, y, loss_reduction=reduction).double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(position=st.integers(1, 31), seed=st.integers(0, 99))
def test_no_position_sees_a_later_one(device, position, seed):
    model, (x, _) = tiny_model(seed=seed, device=device), batch(seed=seed, device=device)
    changed = x.clone()
    changed[:, position] = (changed[:, position] + 1) % TINY.vocab_size
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-5)
    assert (before[:, position] - after[:, position]).abs().max() > 1e-3


def test_a_layer_may_join_relu_square_to_its_input(device):
    """The MLP then leaves it out."""
    class Joined(Linear):
        joins_relu_square = True

        def forward(self, x):
            return super().forward(relu_square(x))
    plain, joined = tiny_model(device=device), tiny_model(device=device)
    for block in joined.transformer.h:
        block.mlp.c_proj.__class__ = Joined
    assert_same(joined(*batch(device=device)), plain(*batch(device=device)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start", range(TINY.n_layer))
def test_suffix_gradients_are_those_of_the_full_backward(device, start, accumulate):
    """To the bit in eager fp32 on a CPU; what is before the suffix gets no gradient at all."""
    full, suffix = tiny_model(device=device), tiny_model(device=device)
    for i in range(accumulate):
        x, y = batch(seed=i, device=device)
        whole, part = full(x, y), suffix(x, y, active_start=start)
        assert_same(part, whole)
        (whole / accumulate).backward()
        (part / accumulate).backward()
    trained = {f"transformer.h.{i}." for i in range(start, TINY.n_layer)} | {"lm_head."}
    trained |= {f"value_embeds.{i}." for i in range(start, TINY.n_layer)}
    expected = dict(full.named_parameters())
    for name, p in suffix.named_parameters():
        if start == 0 or name.startswith(tuple(trained)) or name == "backout_lambda":
            assert_same(p.grad, expected[name].grad, name)
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("start", range(1, TINY.n_layer))
def test_the_embedding_learns_through_x0(device, start):
    """Without detach_x0 every gradient is to the bit (on a CPU) that of a full forward whose prefix blocks give constants; the
    smear and the scalars that weigh the stream are left alone."""
    reference, suffix = tiny_model(device=device), tiny_model(device=device)
    for block in reference.transformer.h[:start]:
        block.register_forward_hook(lambda module, args, output: output.detach())
    x, y = batch(device=device)
    losses = reference(x, y), suffix(x, y, active_start=start, detach_x0=False)
    assert_same(*losses)
    for loss in losses:
        loss.backward()
    assert suffix.transformer.wte.weight.grad.any()
    for p in (reference.smear_gate, reference.smear_lambda, reference.resid_lambdas, reference.x0_lambdas):
        p.grad = None
    for (name, p), q in zip(suffix.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_same(p.grad, q.grad, name)


@pytest.mark.parametrize("start, end", [(0, 1), (0, 2), (1, 2), (0, TINY.n_layer - 1), (0, TINY.n_layer)])
def test_blocks_that_add_nothing_may_be_left_out(device, start, end):
    """While their output projections are zero: loss and gradients are to the bit (on a CPU) those of the whole model."""
    whole, shallow = tiny_model(device=device), tiny_model(device=device)
    for model in (whole, shallow):
        for block in model.transformer.h[end:]:
            torch.nn.init.zeros_(block.attn.c_proj.weight)
            torch.nn.init.zeros_(block.mlp.c_proj.weight)
    x, y = batch(device=device)
    losses = whole(x, y, active_start=start), shallow(x, y, active_start=start, active_end=end)
    assert_same(*losses)
    for loss in losses:
        loss.backward()
    expected = dict(whole.named_parameters())
    left_out = tuple(f"{kind}.{i}." for kind in ("transformer.h", "value_embeds") for i in range(end, TINY.n_layer))
    for name, p in shallow.named_parameters():
        if name.startswith(left_out) or expected[name].grad is None:
            assert p.grad is None, name
        else:
            assert_same(p.grad, expected[name].grad, name)


def test_bf16_model_follows_the_fp32_one(device):
    exact, coarse = tiny_model(device=device), tiny_model(dtype=torch.bfloat16, device=device)
    x, y = batch(device=device)
    assert coarse.transformer.wte.weight.dtype == torch.bfloat16 and coarse.lm_head.weight.dtype == torch.float32
    # 2^-9 relative rounding per operation, a few dozen of them in a row
    torch.testing.assert_close(coarse(x, y), exact(x, y), rtol=0.03, atol=0.03)


def test_generation_of_the_same_weights_needs_the_same_seed():
    one, two, other = tiny_model(seed=3), tiny_model(seed=3), tiny_model(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
