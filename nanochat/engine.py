"""Text generation from a trained model: KV cache, sampler, and the generation loop.

A decoder is causal: a new token does not change the keys and values of earlier tokens, so they are computed once and cached.
*Prefill* runs the whole prompt through the model and fills the cache. *Decode* then runs one token at a time, which attends to
the cache. Several samples of one prompt share the prefill: the cache is copied to all rows.

    engine = Engine(model, tokenizer)
    for text in engine.stream_text(tokenizer("The capital of France is", prepend="<|bos|>"), max_tokens=32):
        print(text, end="", flush=True)
"""

import codecs
from collections.abc import Iterator

import torch

from nanochat.common import UserError
from nanochat.flash_attention import make_attention
from nanochat.kernels.inference import use_inference_kernels, use_inference_linears
from nanochat.runtime.tuner import Tuner

SAMPLE_TOKENS = 48    # length of the samples that training and evaluation print
PREFILL_CHUNK = 1024  # tokens of a prompt per forward pass: limits the logits to 1024 * 32k * 4 bytes = 128 MiB


def sample_prompts(source: str) -> tuple[str, ...]:
    """Prompts for samples of a model trained on this source (`--data`)."""
    if source == "python":
        return "def __init__(self", "import os\n", "for i in range("
    return "The capital of France is", "If yesterday was Friday, then tomorrow will be", "The planets of the solar system are:"


@torch.no_grad()
def prepare_for_inference(model, attention: dict[str, str] | None = None) -> None:
    """Make a loaded model fast where it only reads: weights of linear layers are cast to the compute dtype once, not in every
    call, and the fastest kernels are taken. It can no longer be trained.

    attention: the backends of the run that trained it (`Attention.names`), taken where they work; others are measured.
    """
    shape, tuner, tokens = model.config, Tuner(model.get_device()), model.config.sequence_len
    use_inference_linears(model, tuner)
    model.kernels.attention = make_attention(
        model.get_device(), model.compute_dtype, shape.head_dim, tokens, model.window_sizes, heads=shape.n_head,
        kv_heads=shape.n_kv_head, tuner=tuner, recorded=attention)
    use_inference_kernels(model, tokens, tuner)


class KVCache:
    """Keys and values of all layers, (B, T_max, H_kv, D) each. All rows have the same number of tokens.

    num_heads: key/value heads, H_kv.
    seq_len: initial capacity T_max in tokens; `reserve` doubles it when needed, up to `max_seq_len` (None: no limit).
    short_conv, width: taps K of the model's short convolutions (0: none), and their channels C.

    `prev_embedding` (B, 1, C), or None before the first token, is the embedding of the last token, for the model's smear.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int, device, dtype,
                 max_seq_len: int | None = None, short_conv: int = 0, width: int = 0):
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.pos = 0  # the same number on the host: reading it does not synchronize with the device
        self.prev_embedding = None
        self.conv_states = torch.zeros((num_layers, 2, batch_size, short_conv - 1, width), device=device, dtype=dtype) \
            if short_conv else None

    @classmethod
    def for_model(cls, model, batch_size: int, seq_len: int) -> "KVCache":
        """An empty cache with the shape, dtype, limit and device of `model`."""
        c = model.config
        return cls(batch_size, c.n_kv_head, min(seq_len, model.max_seq_len), c.n_embd // c.n_head, c.n_layer,
                   model.get_device(), model.compute_dtype, model.max_seq_len, c.short_conv, c.n_embd)

    @property
    def seq_len(self) -> int:
        """Current capacity in tokens."""
        return self.k_cache.size(2)

    def get_pos(self) -> int:
        """Number of tokens in the cache: the position of the next one."""
        return self.pos

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k, v) of a layer, (B, T_max, H_kv, D) each: views, which attention writes in place."""
        return self.k_cache[layer], self.v_cache[layer]

    def get_conv_states(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """The last inputs of a layer's two short convolutions, (B, K-1, C) each, which they replace; None for a model without."""
        return (None, None) if self.conv_states is None else tuple(self.conv_states[layer])

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more tokens; the model calls it after all layers have written them."""
        assert self.pos + num_tokens <= self.seq_len, "written past the end: call reserve() before the forward pass"
        self.pos += num_tokens
        self.cache_seqlens += num_tokens

    def reset(self) -> None:
        """Empty the cache but keep its memory."""
        self.pos = 0
        self.cache_seqlens.zero_()
        self.prev_embedding = None
        if self.conv_states is not None:
            self.conv_states.zero_()

    def reserve(self, num_tokens: int) -> None:
        """Grow the capacity, by doubling, so that `num_tokens` more tokens fit. Raises: UserError beyond `max_seq_len`."""
        needed = self.pos + num_tokens
        if self.max_seq_len is not None and needed > self.max_seq_len:
            raise UserError(f"the text would be {needed} tokens long, but this model's positions end at "
                            f"{self.max_seq_len}. Shorten the prompt or ask for fewer tokens.")
        if needed <= self.seq_len:
            return
        capacity = max(needed, 2 * self.seq_len)
        capacity = capacity if self.max_seq_len is None else min(capacity, self.max_seq_len)
        self.k_cache, self.v_cache = self._grown(self.k_cache, capacity), self._grown(self.v_cache, capacity)

    def _grown(self, cache: torch.Tensor, capacity: int) -> torch.Tensor:
        layers, batch_size, _, heads, head_dim = cache.shape
        bigger = cache.new_zeros(layers, batch_size, capacity, heads, head_dim)
        bigger[:, :, :self.pos] = cache[:, :, :self.pos]
        return bigger

    def prefill(self, other: "KVCache") -> None:
        """Copy the tokens of `other` into this empty cache: its single row to all rows, or row by row if it has as many."""
        assert self.pos == 0, "prefill fills an empty cache"
        assert other.batch_size in (1, self.batch_size), f"{other.batch_size} rows do not fit {self.batch_size}"
        self.reserve(other.pos)
        self.k_cache[:, :, :other.pos] = other.k_cache[:, :, :other.pos]
        self.v_cache[:, :, :other.pos] = other.v_cache[:, :, :other.pos]
        if other.prev_embedding is not None:
            self.prev_embedding = other.prev_embedding.expand(self.batch_size, -1, -1)
        if self.conv_states is not None:
            self.conv_states.copy_(other.conv_states.expand_as(self.conv_states))
        self.advance(other.pos)


def sample_next_token(logits: torch.Tensor, rng: torch.Generator | None = None, temperature: float = 1.0,
                      top_k: int | None = None) -> torch.Tensor:
    """Sample one token per row: logits (B, V) -> (B, 1) int64.

    temperature: 0 is greedy (the most likely token), else tokens are drawn from softmax(logits / temperature).
    top_k: draw only from the k most likely tokens; None or 0 draws from all.
    """
    assert temperature >= 0, f"temperature must not be negative, got {temperature}"
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        logits, choices = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    logits = logits / max(temperature, 1e-30)  # a smaller number is 0 in fp32
    drawn = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1, generator=rng)
    return choices.gather(-1, drawn) if top_k else drawn


class Engine:
    """Generates text with a model and its tokenizer."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.end_tokens = {tokenizer.get_bos_token_id()}
        if "<|assistant_end|>" in tokenizer.get_special_tokens():  # GPT-2's vocabulary has none
            self.end_tokens.add(tokenizer.encode_special("<|assistant_end|>"))

    @torch.no_grad()
    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int = 42) -> Iterator[tuple[list[int], list[int]]]:
        """Continue the prompt `tokens`. Yields (tokens, masks) per step, one entry for each of `num_samples` rows.

        A row ends with <|assistant_end|> or <|bos|> and repeats that token until all rows have ended; its mask is 1 for sampled
        tokens and 0 for repeated ones. Generation stops when all rows have ended, after `max_tokens` steps, or at the model's
        `max_seq_len`. The same seed, prompt and `num_samples` give the same text.
        """
        assert tokens and num_samples >= 1, "a prompt has at least one token, such as <|bos|>, and one sample or more"
        device = self.model.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        steps = self.model.max_seq_len - len(tokens)
        steps = steps if max_tokens is None else min(steps, max_tokens)
        cache, logits = self._prefill(tokens, num_samples, capacity=len(tokens) + max(0, min(steps, PREFILL_CHUNK)))
        ended = [None] * num_samples  # the end token of each row that has ended
        for step in range(steps):
            sampled = sample_next_token(logits, rng, temperature, top_k)
            column = [token if end is None else end for token, end in zip(sampled[:, 0].tolist(), ended, strict=True)]
            yield column, [int(end is None) for end in ended]
            ended = [token if token in self.end_tokens else None for token in column]
            if None not in ended or step == steps - 1:
                return
            cache.reserve(1)
            logits = self.model(torch.tensor(column, device=device)[:, None], kv_cache=cache)[:, -1]

    def _prefill(self, tokens: list[int], num_samples: int, capacity: int) -> tuple[KVCache, torch.Tensor]:
        """A cache of `num_samples` rows with the prompt, and the logits (num_samples, V) of the next token."""
        one = KVCache.for_model(self.model, batch_size=1, seq_len=capacity if num_samples == 1 else len(tokens))
        one.reserve(len(tokens))  # refuse a prompt that is too long before any work
        ids = torch.tensor([tokens], device=self.model.get_device())
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            logits = self.model(chunk, kv_cache=one)[:, -1]
        if torch.isnan(logits).any():
            raise UserError("the model's output is not a number: the run had diverged. Take an earlier step.")
        if num_samples == 1:
            return one, logits
        many = KVCache.for_model(self.model, num_samples, capacity)
        many.prefill(one)
        return many, logits.expand(num_samples, -1)

    def generate_batch(self, tokens: list[int], num_samples: int = 1,
                       **sampling) -> tuple[list[list[int]], list[list[int]]]:
        """Like `generate`, all at once: (sequences, masks), one per sample. Prompt tokens have mask 0, sampled ones 1, and end
        tokens are left out."""
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        for column, sampled in self.generate(tokens, num_samples, **sampling):
            for i, token in enumerate(column):
                if sampled[i] and token not in self.end_tokens:
                    sequences[i].append(token)
                    masks[i].append(1)
        return sequences, masks

    def complete(self, prompt: str, **sampling) -> str:
        """The prompt and one continuation, as text."""
        tokens = self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id())
        (sequence,), _ = self.generate_batch(tokens, **sampling)
        return self.tokenizer.decode(sequence[1:])

    def stream_text(self, tokens: list[int], **sampling) -> Iterator[str]:
        """Yield the continuation of `tokens` as pieces of text. A token may end inside a UTF-8 character: its bytes wait until
        the character is complete; invalid bytes become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for (token,), _ in self.generate(tokens, num_samples=1, **sampling):
            piece = b"" if token in self.end_tokens else self.tokenizer.decode_single_token_bytes(token)
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
