"""One tiny model of random weights for all tests of exports."""

import os

# Where transformers copies a model's code to, read when it is imported; removed with the base directory of the tests
os.environ.setdefault("HF_MODULES_CACHE", os.path.join(os.environ["NANOCHAT_BASE_DIR"], "hf_modules"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from nanochat.checkpoint_manager import build_model
from nanochat.export.trained import Trained
from nanochat.recipe.shape import GPTConfig
from nanochat.tokenizer import Tokenizer
from training_text import text_of

TEXT = text_of(20_000)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train_from_iterator([TEXT], 500)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Two layers, with grouped heads, exclusive attention in a window of 128 and one of 130 tokens, short convolutions, and every
    part of weight."""
    shape = GPTConfig(sequence_len=130, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                      window_pattern="SL", short_conv=3, exclusive_attention=True)
    torch.manual_seed(42)  # its first weights, whatever other tests have drawn
    model = build_model(shape, torch.float32, "cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=random))
        model.smear_lambda.fill_(1.5)
    return model.eval()


@pytest.fixture(scope="session")
def trained(model, tokenizer):
    return Trained(name="tiny", step=7, shape=model.config, weights=model.state_dict(), tokenizer=tokenizer,
                   flags={"data": "python", "depth": 2}, val_bpb=1.25, tokens_per_step=128)
