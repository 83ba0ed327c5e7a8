"""Which FP8 layers square the ReLU of their input, and that this changes no bit of a step."""

import copy

import pytest
import torch

from nanochat.features.fp8 import Fp8Flags, convert
from nanochat.fp8 import Float8Linear, refresh_weights
from nanochat.gpt import GPT
from nanochat.recipe.shape import GPTConfig

SHAPE = GPTConfig(sequence_len=32, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def fp8_model(names, **flags):
    """A model in bf16 with these layers in FP8, emulated, and its random weights."""
    torch.manual_seed(0)
    model = GPT(SHAPE, torch.bfloat16)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # some begin at zero, and would hide what they multiply
    convert(model, names, Fp8Flags(**flags), torch.device("cpu"))
    return model


def squaring(model):
    return {name for name, layer in model.linears().items() if getattr(layer, "joins_relu_square", False)}


def test_the_layers_after_a_squared_relu_square_it_themselves():
    mlp = [f"transformer.h.{i}.mlp.{role}" for i in range(2) for role in ("c_fc", "c_proj")]
    attention = [f"transformer.h.{i}.attn.c_proj" for i in range(2)]
    assert squaring(fp8_model([*mlp, *attention, "lm_head"])) == {mlp[1], mlp[3]}
    assert squaring(fp8_model([mlp[0], mlp[3]])) == {mlp[3]} and squaring(fp8_model(attention)) == set()


def test_torchao_s_layers_do_not():
    pytest.importorskip("torchao")
    model = fp8_model(["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"], fp8_backend="torchao")
    assert squaring(model) == set()


def test_squaring_in_the_layer_changes_no_bit():
    names = [f"transformer.h.{i}.mlp.{role}" for i in range(2) for role in ("c_fc", "c_proj")]
    joined = fp8_model(names)
    apart = copy.deepcopy(joined)
    for name in squaring(joined):
        apart.get_submodule(name).joins_relu_square = False
    idx = torch.randint(SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    results = []
    for model in (joined, apart):
        refresh_weights([layer for layer in model.linears().values() if isinstance(layer, Float8Linear)])
        loss = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        loss.backward()
        results.append([loss, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > len(names) and all(map(torch.equal, *results))
