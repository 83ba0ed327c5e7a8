"""A GPT trained by nanochat, for transformers: one file of plain PyTorch that needs nothing but torch and transformers.

    ids (B, T) -> embedding wte -> norm -> smear = x0      (B, T, C), also the residual stream x before the first block
    for each block i:
        x = resid_lambda_i x + x0_lambda_i x0              learned scalars
        x = x + attention(conv(norm(x)))                   conv: where the model has short convolutions
        x = x + MLP(conv(norm(x)))
    norm(x - backout_lambda x_mid) -> lm_head -> softcap   logits (B, T, V)

In shapes: B rows of a batch, T tokens of a row, S tokens of the text so far (T and those in the cache), C = hidden_size, H query
heads, H_kv key/value heads, D = C / H features of a head, V = vocab_size.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat import NanochatConfig

# transformers renamed the argument and the output `past_key_values` to `cache`
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def norm(x):
    """RMSNorm without a learned gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary positions of x (B, T, heads, D): features i and i + D/2 are turned by an angle. cos, sin: (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def with_tokens_before(x, count, cache, index):
    """x (B, T, C) behind the `count` tokens before it, zeros where a text begins: (B, count + T, C).

    The cache keeps x as the keys of one of its layers, `index`, behind those of attention. So whatever transformers does with a
    cache between two steps (reorder its rows for a beam search, crop it) happens to x too.
    """
    T = x.size(1)
    if cache is not None:
        x = cache.update(x[:, None], x[:, None, :, :0], index)[0][:, 0]  # (B, S, C)
    return F.pad(x, (0, 0, count, 0))[:, -count - T:]


class ShortConv(nn.Module):
    """Causal convolution: x[t] + sum over j of w[j-1] x[t-j]. weight: (K-1, C)."""

    def __init__(self, config, index):
        super().__init__()
        self.index = index  # in the cache
        self.weight = nn.Parameter(torch.zeros(config.short_conv - 1, config.hidden_size))

    def forward(self, x, tokens, cache):
        T, count = x.size(1), len(self.weight)
        before = with_tokens_before(x if tokens is None else x * tokens, count, cache, self.index)
        for j, weight in enumerate(self.weight, 1):
            x = torch.addcmul(x, before[:, count - j:count - j + T], weight)
        return x


class Attention(nn.Module):
    """Causal attention within a window, with rotary positions, normed queries and keys, and gated value embeddings."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.qk_scale = layer, config.head_dim, config.qk_scale
        self.exclusive = config.exclusive_attention
        self.groups = config.num_attention_heads // config.num_key_value_heads
        kv_dim = config.num_key_value_heads * config.head_dim
        self.c_q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.c_k = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.c_v = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.ve_gate = None
        if layer in config.value_embedding_layers:
            self.ve_gate = nn.Linear(config.gate_channels, config.num_key_value_heads, bias=False)

    def forward(self, x, value_embedding, cos, sin, mask, cache):
        """Normed x (B, T, C) -> (B, T, C). mask: bool, True where a query sees a key, (..., T, S); None is plainly causal."""
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :self.ve_gate.in_features]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        q, k = (norm(rotate(t, cos, sin)) * self.qk_scale for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        own = v.repeat_interleave(self.groups, dim=1)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)          # (B, H_kv, S, D)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        if self.exclusive:
            share = (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-12)
            y = y - share * own
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Two linear layers with a squared ReLU between them."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)
        self.attn_conv = self.mlp_conv = None
        if config.short_conv:
            self.attn_conv, self.mlp_conv = (
                ShortConv(config, config.num_hidden_layers + 1 + 2 * layer + i) for i in range(2))

    def forward(self, x, value_embedding, cos, sin, mask, tokens, cache):
        normed = norm(x)
        if self.attn_conv is not None:
            normed = self.attn_conv(normed, tokens, cache)
        x = x + self.attn(normed, value_embedding, cos, sin, mask, cache)
        normed = norm(x)
        if self.mlp_conv is not None:
            normed = self.mlp_conv(normed, tokens, cache)
        return x + self.mlp(normed)


class NanochatForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanochatConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        kv_dim = config.num_key_value_heads * config.head_dim
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.hidden_size),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
        })
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(config.vocab_size, kv_dim) for layer in config.value_embedding_layers})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        self.smear_gate = nn.Parameter(torch.zeros(1, config.smear_channels))
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, cache=None, labels=None, use_cache=None,
                logits_to_keep=0, output_hidden_states=False, return_dict=True, **kwargs):
        """Token ids (B, T) -> logits (B, T, V) in fp32, and the loss if there are `labels` (B, T), of which -100 is ignored.

        attention_mask: (B, S), 0 for padding tokens, which may be on either side.
        cache, or past_key_values: of the text before; the new tokens are appended.
        logits_to_keep: compute the logits of this many last tokens only; 0 is all.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        T, past = input_ids.size(1), 0 if cache is None else cache.get_seq_length()
        padding = None if attention_mask is None or attention_mask.all() else attention_mask.bool()  # (B, S), True for tokens
        tokens = None if padding is None else padding[:, -T:, None]  # (B, T, 1): the new ones
        if cache is not None:
            self._add_layers(cache)
        masks = {window: self._mask(T, past, window, padding) for window in set(self.config.windows)}
        x0 = x = self._smeared(norm(self.transformer.wte(input_ids)), tokens, cache)
        cos, sin = self._rotary(past, T, x)
        states = [x]
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value_embedding = self.value_embeds[str(i)](input_ids) if str(i) in self.value_embeds else None
            x = block(x, value_embedding, cos, sin, masks[self.config.windows[i]], tokens, cache)
            states.append(x)
        x = norm(x - self.backout_lambda * states[1 + self.config.backout_layer])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept]).float()
        logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:  # each token predicts the next one
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=tuple(states) if output_hidden_states else None,
                                        **{CACHE_FIELD: cache})
        return output if return_dict else output.to_tuple()

    def _add_layers(self, cache):
        """Give a new cache its layers behind those of attention: one for embeddings, two for the convolutions of each block."""
        layers = self.config.num_hidden_layers
        while len(cache.layers) < layers + 1 + 2 * layers * bool(self.config.short_conv):
            cache.layers.append(DynamicLayer())

    def _smeared(self, x, tokens, cache):
        """x (B, T, C) plus a gated share of the embedding before each. A padding token has no embedding to give."""
        before = with_tokens_before(x if tokens is None else x * tokens, 1, cache, self.config.num_hidden_layers)[:, :-1]
        gate = torch.sigmoid(F.linear(x[..., :self.config.smear_channels], self.smear_gate))  # (B, T, 1)
        return x + self.smear_lambda * gate * before

    def _mask(self, T, past, window, padding):
        """bool (T, S), or (B, 1, T, S) with padding: True where a query sees a key. None where that is plainly causal."""
        if padding is None and past == 0 and T <= window + 1:
            return None
        keys = torch.arange(past + T, device=self.device)
        distance = keys[past:, None] - keys
        mask = (distance >= 0) & (distance <= window)
        if padding is not None:  # a padding token sees itself, as attention to nothing is not a number
            mask = mask & padding[:, None, None, :] | (distance == 0)
        return mask

    def _rotary(self, past, T, x):
        """cos and sin of positions past ... past + T - 1, (T, 1, D/2): the angle of pair i is position * base^(-i / (D/2))."""
        half = self.config.head_dim // 2
        frequencies = self.config.rotary_base ** -(torch.arange(half, dtype=torch.float32, device=x.device) / half)
        angles = torch.arange(past, past + T, dtype=torch.float32, device=x.device)[:, None, None] * frequencies
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def get_output_embeddings(self):
        return self.lm_head
