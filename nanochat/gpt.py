"""The model: a GPT whose one dial is depth.

What differs from a textbook decoder, and where it comes from:
- rotary positions, then QK-norm (arXiv 2010.04245), then q and k scaled by 1.2 each for sharper attention;
- RMSNorm without gain, squared ReLU (arXiv 2109.08668), no biases, untied embedding and head, soft-capped logits;
- per-layer scalars that mix the residual stream with the normed embedding x0 (modded-nanogpt);
- value embeddings on every second layer (ResFormer, arXiv 2410.17897): a table of its own, mixed into v by a gate;
- smear: a little of the previous token's embedding; backout: a share of the mid-depth stream is taken off at the end;
- sliding windows by a pattern such as SSSL: three layers of a quarter of the context, one of all of it.

Optimizations enter through four seams and nowhere else: `Linear` modules (swapped by name), and the functions of
`Kernels`: norms, attention, loss.

`active_start=a` trains only the suffix of blocks [a, n): what is before runs without gradient, so its activations are
not kept, and what crosses into the suffix (x, x0, the mid-depth stream) is detached. The embedding, the smear and the
frozen blocks then get no gradient at all (`.grad` stays None), which the optimizer takes as "leave alone". With
`detach_x0=False` the embedding is trained as well, by what reaches it from the suffix through x0. The smear is not, nor
are the scalars that weigh x0 and the stream: a few numbers for all tokens, pushed on by a gradient that does not know
what the prefix would make of them, ran away (dev/LOG.md).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.flash_attention import flash_attn
from nanochat.kernels.cross_entropy import softcapped_cross_entropy, softcapped_logits
from nanochat.kernels.embedding import Embedding
from nanochat.kernels.linear import Linear
from nanochat.kernels.norms import add_norm, mix_norm, rms_norm
from nanochat.optim import MuonAdamW
from nanochat.recipe.shape import (
    SMEAR_GATE_CHANNELS,
    VE_GATE_CHANNELS,
    GPTConfig,
    has_value_embedding,
    padded_vocab_size,
    window_sizes,
)

QK_SCALE = 1.2
ROTARY_BASE = 100_000
# Before the blocks write anything the stream is a multiple of x0, whose size the norms cancel: the scalars that scale it
# have no gradient but rounding, which Adam with its usual eps follows at full speed until the stream cancels (dev/LOG.md).
SCALAR_EPS = 1e-3
ROTARY_REACH = 10        # positions are precomputed for this many times the training context


def windowed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention over (B, T, H, D) with the backend that suits any device."""
    return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))


@dataclass
class Kernels:
    """The seams: each function may be swapped before compilation for a faster one with the same meaning."""
    norm: Callable = rms_norm                    # (..., C) -> (..., C)
    mix_norm: Callable = mix_norm                # a block's beginning, see nanochat/kernels/norms.py
    add_norm: Callable = add_norm                # between attention and MLP, likewise
    attention: Callable = windowed_attention     # q (B, T, H, D), k and v (B, T, H_kv, D), window -> (B, T, H, D)
    loss: Callable = softcapped_cross_entropy    # see nanochat/kernels/cross_entropy.py


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the half-split pairs of x (B, T, H, D) by position; cos and sin are (1, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, with_value_embedding: bool, kernels: Kernels):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.kernels = kernels
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VE_GATE_CHANNELS, config.n_kv_head) if with_value_embedding else None

    def forward(self, x, ve, cos, sin, window, cache):
        """x (B, T, C), ve (B, T, kv_dim) or None -> (B, T, C). `cache`: this layer's (k, v, tokens in it), or None."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_dim)   # (B, T, H, D)
        k = self.c_k(x).view(B, T, -1, self.head_dim)   # (B, T, H_kv, D)
        v = self.c_v(x).view(B, T, -1, self.head_dim)
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (B, T, H_kv)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        norm = self.kernels.norm
        q = norm(apply_rotary(q, cos, sin)) * QK_SCALE
        k = norm(apply_rotary(k, cos, sin)) * QK_SCALE
        if cache is None:
            y = self.kernels.attention(q, k, v, window)
        else:
            k_cache, v_cache, length = cache
            y = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=length,
                                                   causal=True, window_size=(window, 0))
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer. It holds nothing that tells it from other layers of its kind, so that they share one compiled graph."""

    def __init__(self, config: GPTConfig, with_value_embedding: bool, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.attn = CausalSelfAttention(config, with_value_embedding, kernels)
        self.mlp = MLP(config)

    def forward(self, x, x0, resid_lambda, x0_lambda, ve, cos, sin, window, cache):
        x, normed = self.kernels.mix_norm(x, x0, resid_lambda, x0_lambda)
        x, normed = self.kernels.add_norm(x, self.attn(normed, ve, cos, sin, window, cache))
        return x + self.mlp(normed)


class _WithoutGradient(torch.autograd.Function):
    """x, to which no gradient flows back. Unlike a detached x it asks for one, as x itself would, so that the compiled blocks
    of steps that train x serve here too."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None


class GPT(nn.Module):
    """Build on the meta device, then `to_empty(device=...)`, then `init_weights()`: parameters are made once, in place.

    `compute_dtype` is the dtype of activations and matrix products, and of the embedding tables (except fp16, whose
    gradients need fp32 tables); every other parameter is fp32. `momentum_dtype`: see MuonAdamW. `recompute_activations`:
    see nanochat/runtime/compilation.py.
    """

    momentum_dtype = torch.float32
    recompute_activations = False

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        assert config.n_embd % config.n_head == 0 and config.n_head % config.n_kv_head == 0
        n, head_dim = config.n_layer, config.n_embd // config.n_head
        vocab = padded_vocab_size(config.vocab_size)
        table_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.config, self.compute_dtype, self.kernels = config, compute_dtype, Kernels()
        self.window_sizes = window_sizes(config)
        self.max_seq_len = config.sequence_len * ROTARY_REACH
        self.transformer = nn.ModuleDict({
            "wte": Embedding(vocab, config.n_embd, dtype=table_dtype),
            "h": nn.ModuleList(Block(config, has_value_embedding(i, n), self.kernels) for i in range(n)),
        })
        self.value_embeds = nn.ModuleDict({str(i): Embedding(vocab, config.n_kv_head * head_dim, dtype=table_dtype)
                                           for i in range(n) if has_value_embedding(i, n)})
        self.lm_head = Linear(config.n_embd, vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(n))
        self.x0_lambdas = nn.Parameter(torch.empty(n))
        self.smear_gate = nn.Parameter(torch.empty(1, SMEAR_GATE_CHANNELS))  # a parameter, so that d12 has 79 linears
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        rotary_shape = (1, self.max_seq_len, 1, head_dim // 2)
        self.register_buffer("cos", torch.empty(rotary_shape, dtype=compute_dtype), persistent=False)
        self.register_buffer("sin", torch.empty(rotary_shape, dtype=compute_dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer, drawing from torch's global generator of the device."""
        n = self.config.n_layer
        bound = (3 / self.config.n_embd) ** 0.5  # uniform in +-bound has standard deviation 1/sqrt(n_embd)
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, n))
        self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, n))
        nn.init.uniform_(self.smear_gate, 0.0, 0.02)
        nn.init.zeros_(self.smear_lambda)
        nn.init.constant_(self.backout_lambda, 0.2)
        self._init_rotary()

    def _init_rotary(self) -> None:
        half = self.cos.size(-1)
        device = self.cos.device
        frequencies = ROTARY_BASE ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
        angles = torch.arange(self.max_seq_len, dtype=torch.float32, device=device)[:, None] * frequencies  # (L, D/2)
        self.cos.copy_(angles.cos()[None, :, None])
        self.sin.copy_(angles.sin()[None, :, None])

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def linears(self) -> dict[str, nn.Module]:
        """The linear modules by name, whatever class a feature has put in their place: 79 of them at d12."""
        return {name: m for name, m in self.named_modules() if hasattr(m, "in_features") and hasattr(m, "weight")}

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean", active_start=0, detach_x0=True):
        """Logits (B, T, vocab_size) fp32 of idx (B, T) int64; or, given `targets` (B, T) with -1 ignored, the loss in nats.

        loss_reduction: `mean`, `sum` or `none` -> (B, T).
        kv_cache: see `nanochat.engine.KVCache`; idx then continues the cached text.
        active_start: blocks before it run without gradient, and the stream is detached at the boundary.
        detach_x0: whether x0, which enters every block, is detached for the suffix too. Without effect at active_start=0.
        """
        start = 0 if kv_cache is None else kv_cache.get_pos()
        T = idx.size(1)
        assert start + T <= self.max_seq_len, f"{start + T} positions, but rotary ones end at {self.max_seq_len}"
        assert 0 <= active_start < self.config.n_layer
        cos, sin = self.cos[:, start:start + T], self.sin[:, start:start + T]
        lambdas = self.resid_lambdas, self.x0_lambdas
        if active_start > 0:
            lambdas = tuple(map(_WithoutGradient.apply, lambdas))
        with torch.no_grad() if active_start > 0 and detach_x0 else nullcontext():
            x0 = self._embed(idx, kv_cache, train_smear=active_start == 0)
        with torch.no_grad() if active_start > 0 else nullcontext():
            x, mid = self._run_blocks(range(active_start), x0, x0, None, lambdas, idx, cos, sin, kv_cache, start)
        suffix = range(active_start, self.config.n_layer)
        x, mid = self._run_blocks(suffix, x, x0, mid, lambdas, idx, cos, sin, kv_cache, start)
        if kv_cache is not None:
            kv_cache.advance(T)
        x = self.kernels.norm(x - self.backout_lambda.to(x.dtype) * mid)
        if targets is None:
            return softcapped_logits(x, self.lm_head, self.config.vocab_size)
        return self.kernels.loss(x, self.lm_head, targets, self.config.vocab_size, loss_reduction)

    def _embed(self, idx, kv_cache, train_smear=True):
        """Normed and smeared embedding (B, T, C) of idx (B, T): the x0 that every block sees."""
        smear_gate, smear_lambda = (p if train_smear else p.detach() for p in (self.smear_gate, self.smear_lambda))
        x = self.kernels.norm(self.transformer.wte(idx).to(self.compute_dtype))
        before = None if kv_cache is None else kv_cache.prev_embedding  # (B, 1, C) of the token before this chunk
        if kv_cache is not None:
            kv_cache.prev_embedding = x[:, -1:]
        previous = F.pad(x[:, :-1], (0, 0, 1, 0)) if before is None else torch.cat([before, x[:, :-1]], dim=1)
        gate = torch.sigmoid(F.linear(x[..., :SMEAR_GATE_CHANNELS], smear_gate.to(x.dtype)))  # (B, T, 1)
        return x + smear_lambda.to(x.dtype) * gate * previous

    def _run_blocks(self, layers, x, x0, mid, lambdas, idx, cos, sin, kv_cache, start):
        """Run the given layers; returns the stream and what it was after layer n // 2 (None before that)."""
        resid_lambdas, x0_lambdas = lambdas
        for i in layers:
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            cache = None if kv_cache is None else (*kv_cache.get_layer_cache(i), start)
            x = self.transformer.h[i](x, x0, resid_lambdas[i], x0_lambdas[i], ve, cos, sin, self.window_sizes[i], cache)
            if i == self.config.n_layer // 2:
                mid = x
        return x, mid

    def setup_optimizer(self, unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, weight_decay=0.28, scalar_lr=0.5,
                        compile=False) -> MuonAdamW:
        """One MuonAdamW over all parameters.

        The rates of head and tables are for width 768 and scale as width^-0.5; Muon's is the spectral norm of an update
        of a square matrix. Every group remembers its `initial_lr` and `initial_weight_decay`, which schedules multiply.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        tables = list(self.value_embeds.parameters())
        smear_and_backout = [self.smear_gate, self.smear_lambda, self.backout_lambda]

        def adamw(params, lr, betas, weight_decay=0.0, eps=1e-10):
            return dict(kind="adamw", params=params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

        groups = [
            adamw([self.lm_head.weight], unembedding_lr * scale, (0.8, 0.96), 0.01),
            adamw([self.transformer.wte.weight], embedding_lr * scale, (0.8, 0.995), 0.001),
            adamw(tables, 0.5 * embedding_lr * scale, (0.8, 0.995), 0.01),
            adamw([self.resid_lambdas], 0.01 * scalar_lr, (0.8, 0.95), 0.05, eps=SCALAR_EPS),
            adamw([self.x0_lambdas], scalar_lr, (0.96, 0.95), eps=SCALAR_EPS),
            adamw(smear_and_backout, 0.2, (0.8, 0.95), eps=SCALAR_EPS),
        ]
        matrices = list(self.transformer.h.parameters())
        for shape in sorted({tuple(p.shape) for p in matrices}):
            groups.append(dict(kind="muon", params=[p for p in matrices if tuple(p.shape) == shape], lr=matrix_lr,
                               momentum=0.95, beta2=0.9, weight_decay=weight_decay))
        assert sum(len(g["params"]) for g in groups) == len(list(self.parameters()))
        for group in groups:
            group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
        orthogonalize_in = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32
        return MuonAdamW(groups, names={p: name for name, p in self.named_parameters()},
                         muon_dtype=orthogonalize_in, momentum_dtype=self.momentum_dtype, compile=compile)
