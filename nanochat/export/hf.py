"""A folder for Hugging Face's transformers, which loads it with `from_pretrained(DIR, trust_remote_code=True)`:

    model.safetensors, config.json, generation_config.json    weights, and what the code is to make of them
    modeling_nanochat.py, configuration_nanochat.py           the code, self-contained
    tokenizer.json, tokenizer_config.json                     the tokenizer
    README.md                                                 the model card
"""

import json
import os
import shutil
from pathlib import Path

import torch

from nanochat.common import UserError
from nanochat.export.hf_tokenizer import end_token_ids, tokenizer_config, tokenizer_json
from nanochat.export.single_file import write_safetensors
from nanochat.export.trained import Trained
from nanochat.gpt import QK_SCALE, ROTARY_BASE
from nanochat.kernels.cross_entropy import SOFTCAP
from nanochat.recipe.shape import SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, has_value_embedding, window_sizes
from nanochat.runtime.compute_dtype import DTYPES
from nanochat.runtime.files import read_json

MODEL_TYPE = "nanochat_home"  # as in hf_files/configuration_nanochat.py
CODE = Path(__file__).parent / "hf_files"
VOCAB_TABLES = ("transformer.wte.", "lm_head.", "value_embeds.")  # a row per token, and rows of padding behind


def folder_problem(out: Path, overwrite: bool) -> str | None:
    """Why no model may be written to this folder, in words; None where one may."""
    if out.exists() and not out.is_dir():
        return f"{out} is a file: name a folder"
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        is_export = read_json(out / "config.json").get("model_type") == MODEL_TYPE
    except (OSError, ValueError):
        is_export = False
    if not is_export:
        return f"{out} holds other files than those of an export: name another folder"
    return None if overwrite else f"{out} holds an export: name another folder, or replace it (--overwrite)"


def write_folder(trained: Trained, out: Path, dtype: str = "float32", overwrite: bool = False) -> None:
    """Write the folder; it gets its name when it is complete. dtype: of the weights.

    Raises: UserError where it may not be written or the disk does not take it.
    """
    if problem := folder_problem(out, overwrite):
        raise UserError(f"{problem}.")
    written = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        written.mkdir(parents=True)
        write_safetensors(hf_weights(trained, DTYPES[dtype]), {"format": "pt"}, written / "model.safetensors")
        texts = {"config.json": hf_config(trained, dtype), "generation_config.json": generation_config(trained),
                 "tokenizer.json": tokenizer_json(trained.tokenizer),
                 "tokenizer_config.json": tokenizer_config(trained.tokenizer, trained.shape.sequence_len)}
        for name, content in texts.items():
            (written / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (written / "README.md").write_text(model_card(trained, out.name), encoding="utf-8")
        for file in sorted(CODE.glob("*.py")):
            shutil.copyfile(file, written / file.name)
        if out.exists():
            for file in written.iterdir():
                os.replace(file, out / file.name)
        else:
            os.rename(written, out)
    except OSError as e:
        raise UserError(f"could not write {out}: {e.strerror or e}. Make room, or choose another place.") from None
    finally:
        shutil.rmtree(written, ignore_errors=True)


def hf_weights(trained: Trained, dtype: torch.dtype) -> dict:
    """The weights under their own names, in one dtype, the tables without the rows that no token has."""
    rows = trained.shape.vocab_size
    return {name: (tensor[:rows] if name.startswith(VOCAB_TABLES) else tensor).to(dtype).contiguous()
            for name, tensor in trained.weights.items()}


def hf_config(trained: Trained, dtype: str) -> dict:
    """The content of config.json: sizes, and every rule of nanochat/gpt.py that the code needs as numbers."""
    shape, ends = trained.shape, end_token_ids(trained.tokenizer)
    return {
        "architectures": ["NanochatForCausalLM"], "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": "configuration_nanochat.NanochatConfig",
                     "AutoModelForCausalLM": "modeling_nanochat.NanochatForCausalLM"},
        "vocab_size": shape.vocab_size, "hidden_size": shape.n_embd, "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head, "num_key_value_heads": shape.n_kv_head, "head_dim": shape.head_dim,
        "max_position_embeddings": shape.sequence_len, "windows": window_sizes(shape),
        "value_embedding_layers": [i for i in range(shape.n_layer) if has_value_embedding(i, shape.n_layer)],
        "backout_layer": shape.n_layer // 2, "smear_channels": SMEAR_GATE_CHANNELS, "gate_channels": VE_GATE_CHANNELS,
        "qk_scale": QK_SCALE, "logit_softcap": SOFTCAP, "rotary_base": ROTARY_BASE, "short_conv": shape.short_conv,
        "exclusive_attention": shape.exclusive_attention,
        "tie_word_embeddings": False, "bos_token_id": ends[0], "eos_token_id": ends, "pad_token_id": ends[0],
        "torch_dtype": dtype}


def generation_config(trained: Trained) -> dict:
    """The content of generation_config.json: what ends a text, and by default greedy, as the reference to compare with."""
    ends = end_token_ids(trained.tokenizer)
    return {"bos_token_id": ends[0], "eos_token_id": ends, "pad_token_id": ends[0], "do_sample": False}


def model_card(trained: Trained, name: str) -> str:
    """README.md: what the model is, what it learned from and how well, and how to use it."""
    shape, flags = trained.shape, trained.flags
    bpb = "not evaluated" if trained.val_bpb is None else f"{trained.val_bpb:.4f} bits per byte, on its validation text"
    tokens = f"{trained.step:,} steps" + (f" of {trained.tokens_per_step:,} tokens" if trained.tokens_per_step else "")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat]
---

# {name}

A base model (it continues text; it was not trained to chat or to be safe), exported from the nanochat run `{trained.name}`.

| | |
| --- | --- |
| size | {trained.num_params:,} parameters: {shape.n_layer} layers, {shape.n_embd} wide, {shape.n_head} heads |
| vocabulary | {shape.vocab_size:,} tokens |
| context | {shape.sequence_len:,} tokens in training |
| data | `{flags.get("data", "unknown")}` |
| training | {tokens} |
| quality | {bpb} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)  # runs modeling_nanochat.py of this folder
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")           # begins with {trained.tokenizer.bos_token}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```

Every text begins with `{trained.tokenizer.bos_token}`, which the tokenizer adds; without it the model works less well. Names of
special tokens in a text are read as text.
"""
