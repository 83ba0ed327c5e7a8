"""The GPT model: a decoder-only Transformer whose size follows from its depth (nanochat/recipe/shape.py).

    ids (B, T) -> embedding wte -> norm -> smear = x0      (B, T, C), also the residual stream x before the first block
    for each block i:
        x = resid_lambda_i x + x0_lambda_i x0              learned scalars
        x = x + attention(conv(norm(x)))
        x = x + MLP(conv(norm(x)))
    norm(x - backout_lambda x_mid) -> lm_head -> softcap   logits (B, T, V), or the cross-entropy loss

Differences from GPT-2, and where they come from:
- RMSNorm without learned gain (arXiv 1910.07467), squared ReLU in the MLP (arXiv 2109.08668), no biases, no dropout;
- rotary position embeddings (arXiv 2104.09864), then QK-norm (arXiv 2010.04245), then q and k times 1.2 for sharper attention;
- grouped-query attention where n_kv_head < n_head (arXiv 2305.13245);
- sliding-window attention in a pattern such as SSSL: three layers see a quarter of the context, the fourth all of it;
- value embeddings in every second layer (ResFormer, arXiv 2410.17897): one more embedding table, added to v through a gate;
- x0 is mixed into the input of every block (modded-nanogpt);
- with --short-conv, a short causal convolution before attention and MLP (nanochat/kernels/short_conv.py);
- smear: a gated share of the previous token's embedding is added to each token's;
- backout: a learned share of the residual stream after the middle block is subtracted before the last norm;
- untied input embedding and lm_head, logits soft-capped to +-15 (Gemma 2, arXiv 2408.00118).

In shapes: B rows of a batch, T tokens of a row, C = n_embd, H query heads, H_kv key/value heads, D = C / H features of a
head, V = vocab_size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.flash_attention import flash_attn
from nanochat.kernels.cross_entropy import softcapped_cross_entropy, softcapped_logits
from nanochat.kernels.embedding import Embedding, sort_tokens
from nanochat.kernels.linear import Linear
from nanochat.kernels.norms import add_norm, mix, mix_norm, rms_norm
from nanochat.kernels.qkv import separate_qkv
from nanochat.kernels.rotary import rotary_norm
from nanochat.kernels.short_conv import ShortConv
from nanochat.optim import MuonAdamW
from nanochat.recipe.shape import (
    MUON_BATCH,
    SMEAR_GATE_CHANNELS,
    VE_GATE_CHANNELS,
    GPTConfig,
    has_value_embedding,
    padded_vocab_size,
    window_sizes,
)

QK_SCALE = 1.2         # of q and k after their norm
ROTARY_BASE = 100_000
ROTARY_REACH = 10      # rotary tables cover this many times the training context, for generation beyond it
# AdamW's eps for the learned scalars. At initialization the blocks add nothing, so x is a multiple of x0 and the norms cancel
# its scale: the gradient of these scalars is rounding noise. With the usual 1e-10 AdamW follows that noise at full step size
# until x vanishes (dev/LOG.md).
SCALAR_EPS = 1e-3
CONV_LR = 0.02         # AdamW's of the short convolutions, for every batch (dev/LOG.md)


def windowed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal sliding-window attention: q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D), on any device."""
    return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))


def use_weights(unit: str, function: Callable, *args):
    """`function(*args)`, which reads the weights of `unit`, the module of that name. They are always there; where ranks divide
    them (--shard-weights), another function takes this one's place in `GPT.use_weights` and fetches them."""
    return function(*args)


def without_own_value(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Exclusive self-attention (Zhai, arXiv 2603.09078): attention's output y (B, T, H, D) without its part along the token's own
    value v (B, T, H_kv, D). A head attends much to the token itself, of which the residual stream tells the rest anyway."""
    own = v.float().unsqueeze(3)                                            # (B, T, H_kv, 1, D), for the heads that share it
    heads = y.float().unflatten(2, (v.size(2), -1))                         # (B, T, H_kv, H / H_kv, D)
    share = (heads * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return (heads - share * own).flatten(2, 3).to(y.dtype)


def relu_square(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (arXiv 2109.08668)."""
    return F.relu(x).square()


@dataclass
class Kernels:
    """The functions of a model that an optimization may replace, by one of the same signature and meaning.

    One object is shared by all modules of a model, so `model.kernels.loss = faster` before compilation is all it takes. The
    defaults are reference implementations. The only other place to replace something is a `Linear`, found by its name
    (`GPT.linears`).
    """
    norm: Callable = rms_norm                    # x (..., C) -> (..., C)
    mix_norm: Callable = mix_norm                # x, x0, a, b -> x' = a x + b x0, norm(x'): before attention
    add_norm: Callable = add_norm                # x, y -> x' = x + y, norm(x'): before the MLP
    project_qkv: Callable = separate_qkv         # x (B, T, C), c_q, c_k, c_v -> their outputs: q, k, v before the split in heads
    rotary_norm: Callable = rotary_norm          # x (B, T, H, D), cos, sin, s -> s norm(rotary(x)): of q and k
    relu_square: Callable = relu_square          # x (..., 4 C) -> max(x, 0)^2: in the MLP
    attention: Callable = windowed_attention     # q (B, T, H, D), k and v (B, T, H_kv, D), window -> (B, T, H, D)
    loss: Callable = softcapped_cross_entropy    # x (B, T, C), lm_head, targets (B, T), V, reduction -> loss in nats


class CausalSelfAttention(nn.Module):
    """Causal self-attention with rotary positions, QK-norm, and in every second layer a gated value embedding."""

    def __init__(self, config: GPTConfig, with_value_embedding: bool, kernels: Kernels):
        super().__init__()
        self.head_dim, self.exclusive = config.n_embd // config.n_head, config.exclusive_attention
        self.kernels = kernels
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VE_GATE_CHANNELS, config.n_kv_head) if with_value_embedding else None

    def forward(self, x, ve, cos, sin, window, cache):
        """Normed input x (B, T, C) -> (B, T, C).

        ve: value embeddings of the tokens (B, T, H_kv * D), or None in layers without.   cos, sin: (1, T, 1, D/2).
        window: tokens that a query sees before itself.
        cache: None in training; else (keys, values, count): this layer's KV cache, both (B, T_max, H_kv, D), and the number of
        tokens in it, to which k and v are appended.
        """
        B, T, _ = x.shape
        qkv = self.kernels.project_qkv(x, self.c_q, self.c_k, self.c_v)
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in qkv)   # (B, T, H, D), and (B, T, H_kv, D) twice
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (B, T, H_kv), in (0, 3), one per head
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = (self.kernels.rotary_norm(x, cos, sin, QK_SCALE) for x in (q, k))
        k_cache, v_cache, length = cache or (None, None, 0)
        if length == 0:  # training, or the beginning of a text: there are no earlier keys
            if cache:
                k_cache[:, :T], v_cache[:, :T] = k, v
            y = self.kernels.attention(q, k, v, window)
        else:
            y = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=length,
                                                   causal=True, window_size=(window, 0))
        if self.exclusive:
            y = without_own_value(y, v)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """Two linear layers with a squared ReLU between them: (B, T, C) -> (B, T, 4 C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(h if getattr(self.c_proj, "joins_relu_square", False) else self.kernels.relu_square(h))


class Block(nn.Module):
    """A pre-norm Transformer block.

    What differs from layer to layer (scalars, window, value embedding) comes as an argument, so that all blocks of a kind
    share one compiled graph.

    cache: None in training; else that of attention, and the (B, K-1, C) inputs of both convolutions before x.
    """

    def __init__(self, config: GPTConfig, with_value_embedding: bool, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.attn = CausalSelfAttention(config, with_value_embedding, kernels)
        self.mlp = MLP(config, kernels)
        convs = (ShortConv(config.n_embd, config.short_conv) for _ in range(2)) if config.short_conv else (None, None)
        self.attn_conv, self.mlp_conv = convs

    def forward(self, x, x0, resid_lambda, x0_lambda, ve, cos, sin, window, cache):
        cache, conv_states = cache or (None, (None, None))
        x, normed = self.kernels.mix_norm(x, x0, resid_lambda, x0_lambda)
        if self.attn_conv is not None:
            normed = self.attn_conv(normed, conv_states[0])
        x, normed = self.kernels.add_norm(x, self.attn(normed, ve, cos, sin, window, cache))
        if self.mlp_conv is not None:
            normed = self.mlp_conv(normed, conv_states[1])
        return x + self.mlp(normed)


class _StopGradient(torch.autograd.Function):
    """The identity, with no gradient to x. Unlike `x.detach()` the result has `requires_grad`, as x has, so that blocks which
    were compiled for steps that train x need no second graph."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None


class GPT(nn.Module):
    """The model. Build it on the meta device, then call `to_empty(device=...)` and `init_weights()`: memory is allocated once.

    compute_dtype: dtype of activations and matrix products, and of the embedding tables (fp32 tables under fp16, whose
    scaled gradients must be fp32). All other parameters are fp32 master weights.
    """

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        assert config.n_embd % config.n_head == 0 and config.n_head % config.n_kv_head == 0
        n, head_dim = config.n_layer, config.n_embd // config.n_head
        vocab = padded_vocab_size(config.vocab_size)
        table_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.config, self.compute_dtype, self.kernels = config, compute_dtype, Kernels()
        self.use_weights, self.called_in_step = use_weights, False  # in step: all ranks must call the model equally often
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
        self.smear_gate = nn.Parameter(torch.empty(1, SMEAR_GATE_CHANNELS))  # not a Linear: `linears()` has 79 layers at d12
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        rotary_shape = (1, self.max_seq_len, 1, head_dim // 2)  # not persistent: computed again, so not in checkpoints
        self.register_buffer("cos", torch.empty(rotary_shape, dtype=compute_dtype), persistent=False)
        self.register_buffer("sin", torch.empty(rotary_shape, dtype=compute_dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter and buffer, in this order, from torch's global random generator of the device.

        The numbers are those of the public nanochat, tuned there.
        """
        n = self.config.n_layer
        # Uniform in +-bound has a standard deviation of 1/sqrt(C), which keeps the variance of a unit input, and no outliers.
        bound = (3 / self.config.n_embd) ** 0.5
        nn.init.normal_(self.transformer.wte.weight, std=0.8)   # normed after the lookup: its scale sets only how fast it learns
        nn.init.normal_(self.lm_head.weight, std=0.001)         # logits near 0: the first loss is that of a uniform guess, ln(V)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.attn.c_proj.weight)            # zero output projections: at first a block adds nothing to x,
            nn.init.zeros_(block.mlp.c_proj.weight)             # so the signal reaches all depths unchanged
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)  # gates near 3 sigmoid(0) = 1.5
        for conv in self.short_convs():
            conv.init_weights()
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)       # like the output of c_v, to which it is added
        self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, n))  # early blocks: more of the stream and
        self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, n))     # more of the embedding
        nn.init.uniform_(self.smear_gate, 0.0, 0.02)
        nn.init.zeros_(self.smear_lambda)                        # the smear starts switched off
        nn.init.constant_(self.backout_lambda, 0.2)
        self._init_rotary()

    def _init_rotary(self) -> None:
        """Fill cos and sin, (1, max_seq_len, 1, D/2): the angle of pair i at position t is t * ROTARY_BASE^(-i / (D/2))."""
        half = self.cos.size(-1)
        device = self.cos.device
        frequencies = ROTARY_BASE ** -(torch.arange(half, dtype=torch.float32, device=device) / half)  # (D/2,)
        angles = torch.arange(self.max_seq_len, dtype=torch.float32, device=device)[:, None] * frequencies  # (max_seq_len, D/2)
        self.cos.copy_(angles.cos()[None, :, None])
        self.sin.copy_(angles.sin()[None, :, None])

    def rotary_tables(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, (1, count, 1, D/2), of the positions from `start` on."""
        return self.cos[:, start:start + count], self.sin[:, start:start + count]

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def linears(self) -> dict[str, nn.Module]:
        """Name -> linear layer, of whatever class (FP8 for example): 6 per block, the value-embedding gates, and lm_head."""
        return {name: m for name, m in self.named_modules() if hasattr(m, "in_features") and hasattr(m, "weight")}

    def short_convs(self) -> list[ShortConv]:
        return [m for m in self.modules() if isinstance(m, ShortConv)]

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean", active_start=0, detach_x0=True, active_end=None):
        """Token ids idx (B, T) int64 -> logits (B, T, V) fp32; with `targets` (B, T) int64, -1 = ignored, the loss in nats.

        loss_reduction: `mean` or `sum` -> a 0-d tensor, `none` -> (B, T).
        kv_cache: a `nanochat.engine.KVCache`; idx continues the text in it, and its keys and values are appended.
        active_start, a: train only the suffix of blocks [a, n_layer). Blocks [0, a) run without gradient, so their
        activations are not kept for the backward pass; what enters the suffix (x and, once computed, x_mid, (B, T, C)) is
        detached. Parameters before the suffix keep `.grad` None, which the optimizer takes as "do not update". That includes
        smear_gate, smear_lambda, resid_lambdas and x0_lambdas: a few numbers for all tokens, whose gradient would lack the part
        that flows through the prefix, and which diverged when trained by the rest (dev/LOG.md).
        detach_x0: at a > 0, whether x0, which enters every block, is detached too. False trains the embedding wte on suffix
        steps as well, by the gradient that reaches it through the x0 of blocks [a, n_layer).
        active_end, e: run only the blocks below e; None runs all. Of the others no more than the mix of x and x0 before each is
        computed, with its scalars. Before their first update, while their output projections are zero, that is all they do:
        loss and gradients are then those of the whole model, and the gradients of their weights None instead of zero.
        """
        start = 0 if kv_cache is None else kv_cache.get_pos()
        T = idx.size(1)
        assert start + T <= self.max_seq_len, f"{start + T} positions, but the rotary tables end at {self.max_seq_len}"
        end = self.config.n_layer if active_end is None else active_end
        assert 0 <= active_start < end <= self.config.n_layer
        cos, sin = self.rotary_tables(start, T)
        lambdas = self.resid_lambdas, self.x0_lambdas                          # (n_layer,) each
        if active_start > 0:
            lambdas = tuple(map(_StopGradient.apply, lambdas))
        by_token = None  # positions sorted by token, once for the gradients of all tables
        if self.transformer.wte.gradient_by == "sorted" and torch.is_grad_enabled() and kv_cache is None:
            by_token = sort_tokens(idx, self.transformer.wte.num_embeddings)
        # 1. The embedding: x0 (B, T, C).
        with torch.no_grad() if active_start > 0 and detach_x0 else nullcontext():
            x0 = self.use_weights("transformer.wte", self._embed, idx, by_token, kv_cache, active_start == 0)
        # 2. The frozen blocks [0, a), of which there are none in full training.
        with torch.no_grad() if active_start > 0 else nullcontext():
            x, mid = self._run_blocks(range(active_start), x0, x0, None, lambdas, idx, by_token, cos, sin, kv_cache, start)
        # 3. The trained blocks [a, e), and the mixes before the blocks that are left out.
        x, mid = self._run_blocks(range(active_start, end), x, x0, mid, lambdas, idx, by_token, cos, sin, kv_cache, start)
        x, mid = self._skip_blocks(range(end, self.config.n_layer), x, x0, mid, lambdas)
        if kv_cache is not None:
            kv_cache.advance(T)
        # 4. The head.
        x = self.kernels.norm(x - self.backout_lambda.to(x.dtype) * mid)       # (B, T, C)
        if targets is None:
            return self.use_weights("lm_head", softcapped_logits, x, self.lm_head, self.config.vocab_size)
        return self.use_weights("lm_head", self.kernels.loss, x, self.lm_head, targets, self.config.vocab_size, loss_reduction)

    def _embed(self, idx, by_token, kv_cache, train_smear=True):
        """x0 (B, T, C) of idx (B, T): the normed embedding of each token, plus a gated share of the previous token's."""
        smear_gate, smear_lambda = (p if train_smear else p.detach() for p in (self.smear_gate, self.smear_lambda))
        x = self.kernels.norm(self.transformer.wte(idx, by_token).to(self.compute_dtype))
        before = None if kv_cache is None else kv_cache.prev_embedding  # (B, 1, C): the last token of the cached text
        if kv_cache is not None:
            kv_cache.prev_embedding = x[:, -1:]
        # (B, T, C): x one position later; the first token of a text has zeros before it
        previous = F.pad(x[:, :-1], (0, 0, 1, 0)) if before is None else torch.cat([before, x[:, :-1]], dim=1)
        gate = torch.sigmoid(F.linear(x[..., :SMEAR_GATE_CHANNELS], smear_gate.to(x.dtype)))  # (B, T, 1)
        return x + smear_lambda.to(x.dtype) * gate * previous

    def _run_blocks(self, layers, x, x0, mid, lambdas, idx, by_token, cos, sin, kv_cache, start):
        """Run these layers on x (B, T, C). Returns x, and mid (B, T, C): x after layer n_layer // 2, or what was given for it."""
        resid_lambdas, x0_lambdas = lambdas
        for i in layers:
            ve = None
            if str(i) in self.value_embeds:
                ve = self.use_weights(f"value_embeds.{i}", self.value_embeds[str(i)], idx, by_token).to(x.dtype)
            cache = None if kv_cache is None else ((*kv_cache.get_layer_cache(i), start), kv_cache.get_conv_states(i))
            x = self.use_weights(f"transformer.h.{i}", self.transformer.h[i], x, x0, resid_lambdas[i], x0_lambdas[i], ve, cos,
                                 sin, self.window_sizes[i], cache)
            if i == self.config.n_layer // 2:
                mid = x
        return x, mid

    def _skip_blocks(self, layers, x, x0, mid, lambdas):
        """What `_run_blocks` would return if the output projections of these layers were zero."""
        resid_lambdas, x0_lambdas = lambdas
        for i in layers:
            x = mix(x, x0, resid_lambdas[i], x0_lambdas[i])
            if i == self.config.n_layer // 2:
                mid = x
        return x, mid

    def setup_optimizer(self, unembedding_lr: float = 0.008, embedding_lr: float = 0.3, matrix_lr: float = 0.02,
                        weight_decay: float = 0.28, scalar_lr: float = 0.5, momentum_dtype: torch.dtype = torch.float32,
                        compile: bool = False, muon_way: str = "plain", muon_batch: int = MUON_BATCH) -> MuonAdamW:
        """One MuonAdamW over all parameters: Muon for the matrices of the blocks, AdamW for the rest.

        unembedding_lr, embedding_lr: for n_embd = 768; scaled by (n_embd / 768)^-0.5 for other widths.
        matrix_lr: the spectral norm of one Muon update of a square matrix.   weight_decay: Muon's.
        momentum_dtype, compile, muon_way, muon_batch: see MuonAdamW.
        Every group keeps `initial_lr` and `initial_weight_decay`, which the schedules multiply.
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
        if convs := [conv.weight for conv in self.short_convs()]:
            groups.append(adamw(convs, CONV_LR, (0.8, 0.95), eps=1e-8))  # their gradients are of about 1e-4
        matrices = self.muon_matrices()
        for shape in sorted({tuple(p.shape) for p in matrices}):  # a group per shape: Muon updates a stack of matrices at once
            groups.append(dict(kind="muon", params=[p for p in matrices if tuple(p.shape) == shape], lr=matrix_lr,
                               momentum=0.95, beta2=0.9, weight_decay=weight_decay))
        assert sum(len(g["params"]) for g in groups) == len(list(self.parameters()))
        for group in groups:
            group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
        return MuonAdamW(groups, names={p: name for name, p in self.named_parameters()}, muon_dtype=self.muon_dtype,
                         momentum_dtype=momentum_dtype, compile=compile, muon_way=muon_way, muon_batch=muon_batch)

    def muon_matrices(self) -> list[torch.Tensor]:
        """The parameters that Muon updates: the matrices of the blocks."""
        return [p for module in self.linears().values() for p in module.parameters() if module is not self.lm_head]

    @property
    def muon_dtype(self) -> torch.dtype:
        """The dtype of Muon's matrix products."""
        return torch.bfloat16 if self.compute_dtype == torch.bfloat16 else torch.float32
