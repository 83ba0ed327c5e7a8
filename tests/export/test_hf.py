"""What transformers loads from an exported folder computes what our model computes, with and without its KV cache."""

import ast
import json
from dataclasses import fields

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.export.hf import CODE, folder_problem, write_folder
from nanochat.recipe.shape import GPTConfig

PROMPTS = ["def split(text", "the tokens of a document that is longer than a row are cut, ", "é"]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "my model"
    write_folder(trained, folder)
    return folder


@pytest.fixture(scope="module")
def auto():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs(folder, auto):
    return auto.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def their_tokenizer(folder, auto):
    return auto.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def logits(model, ids):
    with torch.no_grad():
        logits = model(ids)
    assert logits.std() > 1
    return logits


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@torch.no_grad()
def test_logits_are_ours(theirs, ids, logits):
    assert theirs.dtype == torch.float32 and theirs.config.windows == [128, 130]
    same(theirs(ids, use_cache=False).logits, logits)
    same(theirs(ids, logits_to_keep=3).logits, logits[:, -3:])
    outputs = theirs(ids, labels=ids, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same(outputs.loss, loss)
    assert len(outputs.hidden_states) == 3


@torch.no_grad()
def test_cached_logits_are_ours(theirs, auto, ids, logits):
    for cache in (auto.DynamicCache(), auto.DynamicCache(config=theirs.config)):
        parts = [theirs(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 130, 2, 61], dim=1)]
        same(torch.cat(parts, dim=1), logits)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(theirs, auto, ids, logits):
    padded = torch.cat([ids[:1, :9], ids[:1, :150]], dim=1)  # some tokens in the place of padding
    batch, mask = torch.cat([padded, ids[1:, :159]]), torch.ones(2, 159, dtype=torch.long)
    mask[0, :9] = 0
    cache = auto.DynamicCache()
    first, second = (theirs(batch[:, part], attention_mask=mask[:, :part.stop], past_key_values=cache).logits
                     for part in (slice(0, 20), slice(20, 159)))
    for found in (theirs(batch, attention_mask=mask).logits, torch.cat([first, second], dim=1)):
        same(found[0, 9:], logits[0, :150])
        same(found[1], logits[1, :159])


def greedy(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt, prepend="<|bos|>")
    return Engine(model, tokenizer).generate_batch(ids, max_tokens=tokens, temperature=0)[0][0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_ours_beyond_the_windows(model, tokenizer, theirs, their_tokenizer, use_cache):
    expected = greedy(model, tokenizer, PROMPTS[0], 140)
    inputs = their_tokenizer(PROMPTS[0], return_tensors="pt")
    found = theirs.generate(**inputs, max_new_tokens=140, use_cache=use_cache)[0].tolist()
    assert len(expected) > 135 and found == expected


def test_a_padded_batch_gives_each_prompt_its_text(model, tokenizer, theirs, their_tokenizer):
    inputs = their_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    padding = (inputs.attention_mask == 0).sum(1).tolist()
    for prompt, start, row in zip(PROMPTS, padding, theirs.generate(**inputs, max_new_tokens=8).tolist(), strict=True):
        expected = greedy(model, tokenizer, prompt, 8)
        assert row[start:start + len(expected)] == expected


def test_beams_take_the_cached_embeddings_with_them(theirs, their_tokenizer):
    inputs = their_tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    cached, whole = (theirs.generate(**inputs, max_new_tokens=12, num_beams=4, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, whole)


def test_the_tokenizer_is_ours(tokenizer, their_tokenizer):
    for text in [*PROMPTS, "", "<|bos|>a<|assistant_end|>", "  \n\t x  ", "naïve 漢字 🌍 1234"]:
        assert their_tokenizer(text).input_ids == tokenizer(text, prepend="<|bos|>")
        assert their_tokenizer(text, add_special_tokens=False).input_ids == tokenizer(text)
        assert their_tokenizer.decode(tokenizer(text)) == text
    assert len(their_tokenizer) == tokenizer.get_vocab_size()


def test_nothing_is_loaded_without_trust(folder, auto):
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


# ---- without transformers

def test_the_code_needs_torch_and_transformers_only():
    for path in CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] in ("torch", "transformers", "configuration_nanochat") for name in names), path


def test_the_config_has_every_part_of_the_shape():
    """A new one needs a place in modeling_nanochat.py: without, an export would compute something else."""
    assert {f.name for f in fields(GPTConfig)} == {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd",
                                                   "window_pattern", "short_conv", "exclusive_attention"}


def test_the_card_says_what_the_model_is(folder, trained):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "1.2500 bits per byte" in card and "`python`" in card and f"{trained.num_params:,} parameters" in card
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [
        trained.tokenizer.encode_special(name) for name in ("<|bos|>", "<|assistant_end|>")]


def test_nothing_is_replaced_unasked(folder, trained, tmp_path):
    with pytest.raises(UserError, match="holds an export.*--overwrite"):
        write_folder(trained, folder)
    (folder / "mine.txt").write_text("kept")
    (folder / "README.md").write_text("old")
    write_folder(trained, folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "kept" and "bits per byte" in (folder / "README.md").read_text()
    assert not list(folder.parent.glob(".*"))
    (tmp_path / "config.json").write_text('{"depth": 2}')  # as in the folder of a run
    assert "other files" in folder_problem(tmp_path, overwrite=True)
    assert "file" in folder_problem(folder / "README.md", overwrite=True)
