"""Text out of a trained model: a cache of keys and values, a sampler, and the loop between them.

A decoder is causal: a new token changes no key or value of the tokens before it. So they are computed once and kept.
*Prefill* runs the whole prompt through the model and fills the cache; *decode* then runs one token at a time, attending
to the cache, which costs one position per token where recomputing would cost them all. Several samples of one prompt
share its prefill: the cache of one row is copied to many.

    engine = Engine(model, tokenizer)
    for text in engine.stream_text(tokenizer("The capital of France is", prepend="<|bos|>"), max_tokens=32):
        print(text, end="", flush=True)
"""

import codecs
from collections.abc import Iterator

import torch

from nanochat.common import UserError

SAMPLE_TOKENS = 48    # length of the samples that training and evaluation show
PREFILL_CHUNK = 1024  # positions: bounds the logits that a long prompt needs at once (1024 x 32k x 4 bytes = 128 MiB)


def sample_prompts(source: str) -> tuple[str, ...]:
    """Prompts that suit a model trained on this text source."""
    if source == "python":
        return "def __init__(self", "import os\n", "for i in range("
    return "The capital of France is", "If yesterday was Friday, then tomorrow will be", "The planets of the solar system are:"


class KVCache:
    """Keys and values of all layers, each (B, T_max, H_kv, D) in `dtype`; every row is equally long.

    `seq_len` is the room (in positions) to begin with: `reserve` doubles it at need, up to `max_seq_len` (None: no
    limit). `num_heads` counts the key/value heads. `prev_embedding`, (B, 1, C) or None, belongs to the model's smear.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int, device, dtype,
                 max_seq_len: int | None = None):
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.pos = 0  # the same number on the host, so that nobody waits for the device to learn it
        self.prev_embedding = None

    @classmethod
    def for_model(cls, model, batch_size: int, seq_len: int) -> "KVCache":
        """An empty cache of the right shape, dtype and limit for `model`, on its device."""
        c = model.config
        return cls(batch_size, c.n_kv_head, min(seq_len, model.max_seq_len), c.n_embd // c.n_head, c.n_layer,
                   model.get_device(), model.compute_dtype, max_seq_len=model.max_seq_len)

    @property
    def seq_len(self) -> int:
        """Positions there is room for now."""
        return self.k_cache.size(2)

    def get_pos(self) -> int:
        """Positions filled: where the next token goes."""
        return self.pos

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's (k, v), each (B, T_max, H_kv, D): views, written in place by the attention."""
        return self.k_cache[layer], self.v_cache[layer]

    def advance(self, num_tokens: int) -> None:
        """The model says that all layers have written `num_tokens` more positions."""
        assert self.pos + num_tokens <= self.seq_len, "written past the end: call reserve() before the forward pass"
        self.pos += num_tokens
        self.cache_seqlens += num_tokens

    def reset(self) -> None:
        """Forget the text, keep the memory."""
        self.pos = 0
        self.cache_seqlens.zero_()
        self.prev_embedding = None

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more positions, by doubling. UserError past `max_seq_len`."""
        needed = self.pos + num_tokens
        if self.max_seq_len is not None and needed > self.max_seq_len:
            raise UserError(f"the text would be {needed} tokens long, but this model's positions end at "
                            f"{self.max_seq_len}. Shorten the prompt or ask for fewer tokens.")
        if needed <= self.seq_len:
            return
        room = max(needed, 2 * self.seq_len)
        room = room if self.max_seq_len is None else min(room, self.max_seq_len)
        self.k_cache, self.v_cache = self._grown(self.k_cache, room), self._grown(self.v_cache, room)

    def _grown(self, cache: torch.Tensor, room: int) -> torch.Tensor:
        layers, batch_size, _, heads, head_dim = cache.shape
        bigger = cache.new_zeros(layers, batch_size, room, heads, head_dim)
        bigger[:, :, :self.pos] = cache[:, :, :self.pos]
        return bigger

    def prefill(self, other: "KVCache") -> None:
        """Take over the text of `other`, whose one row is copied to all of ours (or row by row, if it has as many)."""
        assert self.pos == 0, "prefill fills an empty cache"
        assert other.batch_size in (1, self.batch_size), f"{other.batch_size} rows do not fit {self.batch_size}"
        self.reserve(other.pos)
        self.k_cache[:, :, :other.pos] = other.k_cache[:, :, :other.pos]
        self.v_cache[:, :, :other.pos] = other.v_cache[:, :, :other.pos]
        if other.prev_embedding is not None:
            self.prev_embedding = other.prev_embedding.expand(self.batch_size, -1, -1)
        self.advance(other.pos)


def sample_next_token(logits: torch.Tensor, rng: torch.Generator | None = None, temperature: float = 1.0,
                      top_k: int | None = None) -> torch.Tensor:
    """One token (B, 1) int64 per row of logits (B, V): the likeliest at temperature 0, else drawn from
    softmax(logits / temperature), among the `top_k` likeliest where given (None or 0: among all)."""
    assert temperature >= 0, f"temperature must not be negative, got {temperature}"
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        logits, choices = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1, generator=rng)
    return choices.gather(-1, drawn) if top_k else drawn


class Engine:
    """Samples from `model`, with `tokenizer` to know where a text ends."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.end_tokens = {tokenizer.get_bos_token_id()}
        if "<|assistant_end|>" in tokenizer.get_special_tokens():  # GPT-2's vocabulary has none
            self.end_tokens.add(tokenizer.encode_special("<|assistant_end|>"))

    @torch.no_grad()
    def generate(self, tokens: list[int], num_samples: int = 1, max_tokens: int | None = None, temperature: float = 1.0,
                 top_k: int | None = None, seed: int = 42) -> Iterator[tuple[list[int], list[int]]]:
        """Continue the prompt `tokens`; yields (token_column, token_masks) per step, both `num_samples` long.

        A row ends with <|assistant_end|> or <|bos|>; after that it repeats its end token. A mask is 1 where the token
        was sampled and 0 where it is such a filler. The iterator ends when all rows have, after `max_tokens` steps, or
        where the model's positions end. The same seed, prompt and `num_samples` give the same text.
        """
        assert tokens and num_samples >= 1, "a prompt has at least one token, such as <|bos|>, and one sample or more"
        device = self.model.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        steps = self.model.max_seq_len - len(tokens)
        steps = steps if max_tokens is None else min(steps, max_tokens)
        cache, logits = self._prefill(tokens, num_samples, room=len(tokens) + max(0, min(steps, PREFILL_CHUNK)))
        ended = [None] * num_samples  # each row's end token, once it has come
        for step in range(steps):
            sampled = sample_next_token(logits, rng, temperature, top_k)
            column = [token if end is None else end for token, end in zip(sampled[:, 0].tolist(), ended, strict=True)]
            yield column, [int(end is None) for end in ended]
            ended = [token if token in self.end_tokens else None for token in column]
            if None not in ended or step == steps - 1:
                return
            cache.reserve(1)
            logits = self.model(torch.tensor(column, device=device)[:, None], kv_cache=cache)[:, -1]

    def _prefill(self, tokens: list[int], num_samples: int, room: int) -> tuple[KVCache, torch.Tensor]:
        """A cache of `num_samples` rows that holds the prompt, and the logits (num_samples, V) after it."""
        one = KVCache.for_model(self.model, batch_size=1, seq_len=room if num_samples == 1 else len(tokens))
        one.reserve(len(tokens))  # a prompt that is too long is refused before any work
        ids = torch.tensor([tokens], device=self.model.get_device())
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            logits = self.model(chunk, kv_cache=one)[:, -1]
        if torch.isnan(logits).any():
            raise UserError("the model's output is not a number: the run had diverged. Take an earlier step.")
        if num_samples == 1:
            return one, logits
        many = KVCache.for_model(self.model, num_samples, room)
        many.prefill(one)
        return many, logits.expand(num_samples, -1)

    def generate_batch(self, tokens: list[int], num_samples: int = 1,
                       **sampling) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks), one of each per sample: the prompt (mask 0) and its continuation (mask 1), without the
        end token. `sampling` as in `generate`."""
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        for column, sampled in self.generate(tokens, num_samples, **sampling):
            for i, token in enumerate(column):
                if sampled[i] and token not in self.end_tokens:
                    sequences[i].append(token)
                    masks[i].append(1)
        return sequences, masks

    def complete(self, prompt: str, **sampling) -> str:
        """The prompt and one continuation of it, as text. `sampling` as in `generate`."""
        tokens = self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id())
        (sequence,), _ = self.generate_batch(tokens, **sampling)
        return self.tokenizer.decode(sequence[1:])

    def stream_text(self, tokens: list[int], **sampling) -> Iterator[str]:
        """The continuation of `tokens` as pieces of text, for a terminal. A token may end inside a character: its bytes
        are held back until the character is whole; bytes that never become one are shown as U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for (token,), _ in self.generate(tokens, num_samples=1, **sampling):
            piece = b"" if token in self.end_tokens else self.tokenizer.decode_single_token_bytes(token)
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
