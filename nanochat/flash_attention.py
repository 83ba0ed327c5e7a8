"""Causal attention behind one function, whatever the machine.

Attention is softmax(q k^T / sqrt(D)) v, where query t sees key s if s <= t and, in a layer with a window of W tokens,
t - s <= W. Written down like that it makes (T, T) scores per head. Six ways to make less of them:

    fa3      FlashAttention-3 (arXiv 2407.08608): scores live in the chip's own memory. A separate package.
    varlen   FlashAttention-2 (arXiv 2307.08691) as bundled with PyTorch on CUDA, the entry that knows windows.
    native   the same in C++ for CPUs that multiply bf16 natively (nanochat/kernels/cpp/attention.cpp), where there is a compiler.
    chunked  a loop over chunks of queries that multiplies only with the keys they can see: plain matrix products, which
             a CPU does 2-3 times faster than PyTorch's CPU flash kernel. For CPUs without a compiler, and for fp32.
    sdpa     PyTorch's scaled_dot_product_attention: full context on any device. It has no windows.
    blocks   windows on any device: queries in blocks of W attend to their own and the previous block of keys, all
             blocks in one batched SDPA with a fixed mask, so that the cost grows with T*W.

and `masked`, SDPA with a (T, T) mask: slow, always right, the standard for the others.

Which of them works is found by running it, not by asking for a version: `make_attention` gives each candidate, once per
kind of problem, a small forward and backward and compares with the definition. It belongs into the set-up of a model,
before anything is compiled; what it returns is plain calls without a decision left to trace.

Shapes: q (B, T, H, D); k, v (B, T, H_kv, D) with H a multiple of H_kv (grouped-query attention, arXiv 2305.13245: query
heads h*G .. h*G+G-1 share key head h). Windows: W counts the tokens a query sees before itself; -1 is full context.
"""

import inspect
import math
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.runtime.device import cpu_multiplies_bf16

FULL = -1  # the window that is none


# ---------------------------------------------------------------------------------------------------------------------
# Backends: (q, k, v, window) -> (B, T, H, D). All of them are differentiable and free of state.

def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Who sees whom, from positions (..., Tq) and (..., Tk): bool (..., Tq, Tk)."""
    distance = queries[..., :, None] - keys[..., None, :]
    return (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0


def _expand_heads(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat the key and value heads (dimension 2) so that there is one for each of `heads` query heads."""
    groups = heads // k.size(2)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))


def _sdp(q, k, v, mask=None, is_causal=False):
    """SDPA in this file's layout; `mask` is bool (Tq, Tk)."""
    # Only the CUDA flash kernel shares key heads by itself; elsewhere and with masks SDPA would take its slowest path.
    native_groups = q.is_cuda and mask is None and q.size(2) != k.size(2)
    if not native_groups:
        k, v = _expand_heads(k, v, q.size(2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=native_groups)
    return y.transpose(1, 2)


def _masked(q, k, v, window):
    t = torch.arange(q.size(1), device=q.device)
    return _sdp(q, k, v, mask=_visible(t, t, window))


def _sdpa(q, k, v, window):
    assert window < 0 or window >= q.size(1) - 1, "sdpa has no windows"
    return _sdp(q, k, v, is_causal=True)


def _blocks(q, k, v, window):
    B, T, H, D = q.shape
    if window < 0 or window >= T - 1:
        return _sdpa(q, k, v, FULL)
    size = -(-max(window, 1) // 8) * 8  # a multiple of 8 keeps the mask's rows aligned as CUDA's kernels want them
    n = -(-T // size)
    k, v = _expand_heads(k, v, H)

    def fold(x):  # (B, n' * size, H, D) -> (n', B*H, size, D): blocks as the batch, so that all heads share a mask
        return x.reshape(B, -1, size, H, D).permute(1, 0, 3, 2, 4).reshape(-1, B * H, size, D)

    def two_blocks(x):  # each block of keys behind the one before it; before the first, padding: (n, B*H, 2*size, D)
        x = fold(F.pad(x, (0, 0, 0, 0, size, n * size - T)))
        return torch.cat((x[:-1], x[1:]), dim=2)

    start = torch.arange(n, device=q.device)[:, None] * size
    queries = start + torch.arange(size, device=q.device)                # (n, size)
    keys = start - size + torch.arange(2 * size, device=q.device)        # (n, 2*size); negative: the padding
    mask = _visible(queries, keys, window) & (keys >= 0)[:, None, :]
    # Queries after T, also padding, see at least themselves, so no row of the softmax is empty; they are cut off below.
    y = F.scaled_dot_product_attention(fold(F.pad(q, (0, 0, 0, 0, 0, n * size - T))), two_blocks(k), two_blocks(v),
                                       attn_mask=mask[:, None].expand(n, B * H, size, 2 * size))
    return y.reshape(n, B, H, size, D).permute(1, 0, 3, 2, 4).reshape(B, n * size, H, D)[:, :T]


def _chunk_size(T: int, window: int) -> int:
    """Measured: 128 is best up to T=1024, 256 at 2048. An eighth of T keeps the loop, which compilers unroll, short."""
    eighth = -(-T // 8)
    return max(128, eighth if window < 0 else min(eighth, window))  # beyond the window a chunk would waste its corners


def _chunked(q, k, v, window):
    # In bf16 the scores are rounded to bf16 before the softmax (a flash kernel keeps them in fp32), because a CPU's
    # matrix product returns the type of its inputs.
    B, T, H, D = q.shape
    k, v = _expand_heads(k, v, H)
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    size, t, y = _chunk_size(T, window), torch.arange(T, device=q.device), []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = max(0, start - window) if window >= 0 else 0
        hidden = ~_visible(t[start:end], t[first:end], window)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -math.inf)
        scores = torch.baddbmm(bias[None], q[:, start:end], k[:, first:end].transpose(1, 2), alpha=D ** -0.5)
        y.append(scores.softmax(-1) @ v[:, first:end])                   # softmax is computed in fp32 inside
    return torch.cat(y, dim=1).reshape(B, H, T, D).transpose(1, 2)


def _varlen(q, k, v, window, *, kernel, native_groups):
    B, T, H, D = q.shape
    if not native_groups:
        k, v = _expand_heads(k, v, H)
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)  # B sequences of T, one after the other
    options = {"enable_gqa": True} if native_groups and k.size(2) != H else {}
    y = kernel(q.reshape(B * T, H, D), *(x.reshape(B * T, -1, D) for x in (k, v)), ends, ends, T, T,
               window_size=(window, 0) if window < T - 1 else (-1, 0), **options)
    return y.view(B, T, H, D)


def _fa3(q, k, v, window, *, kernel):
    y = kernel(q, k, v, causal=True, window_size=(window, 0) if window < q.size(1) - 1 else (-1, -1))
    return y[0] if isinstance(y, tuple) else y  # some releases return the log-sum-exp too


def _load_varlen():
    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        raise RuntimeError("this release's varlen_attn has no window_size")
    return partial(_varlen, kernel=varlen_attn, native_groups="enable_gqa" in known)


def _load_fa3():
    try:
        import flash_attn_interface
    except ImportError:
        from huggingface_hub import snapshot_download

        import kernels
        # local_files_only: a training run does not download code behind the user's back; `kernels download` does it.
        folder = Path(snapshot_download("kernels-community/flash-attn3", local_files_only=True))
        named = "package_name" in inspect.signature(kernels.get_local_kernel).parameters  # until release 0.10 or so
        flash_attn_interface = kernels.get_local_kernel(folder, *(["flash_attn3"] if named else []))
    return partial(_fa3, kernel=flash_attn_interface.flash_attn_func)


def _load_native():
    from nanochat.kernels.cpu_attention import load
    return load()


# name -> (what gives its function, serves full context, serves windows)
BACKENDS = {
    "fa3": (_load_fa3, True, True),
    "varlen": (_load_varlen, True, True),
    "native": (_load_native, True, True),
    "chunked": (lambda: _chunked, True, True),
    "sdpa": (lambda: _sdpa, True, False),
    "blocks": (lambda: _blocks, False, True),
    "masked": (lambda: _masked, True, True),
}


# ---------------------------------------------------------------------------------------------------------------------
# The choice

def _definition(q, k, v, window):
    """Attention as the docstring above defines it, in fp32."""
    k, v = _expand_heads(k, v, q.size(2))
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    t = torch.arange(q.size(2), device=q.device)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3))).masked_fill(~_visible(t, t, window), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@cache
def why_not(name: str, windowed: bool, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run a backend on a small problem. None if it works there, otherwise the reason why it cannot be used, in words.

    Working means: forward and backward run, with grouped heads, and output and gradients are within 3 % of the
    definition in norm, which any dtype reaches and a misread window or causal flag does not.
    """
    load, full, windows = BACKENDS[name]
    if not (windows if windowed else full):
        return "does not do windows" if windowed else "does windows only"
    try:
        function, window = load(), 70 if windowed else FULL
        with torch.inference_mode(False), torch.enable_grad():
            random = torch.Generator().manual_seed(0)  # its own, so that probing moves no one else's random numbers
            shapes = [(2, 150, heads, head_dim) for heads in (4, 2, 2, 4)]  # T and window are no multiple of any block
            *inputs, grad = (torch.randn(s, generator=random).to(device_type, dtype) for s in shapes)
            inputs = [x.requires_grad_() for x in inputs]
            results = []
            for f in (function, _definition):
                y = f(*inputs, window)
                results.append([x.float() for x in (y, *torch.autograd.grad(y, inputs, grad.to(y.dtype)))])
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    except Exception as e:  # whatever a kernel raises where it does not belong
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160] if str(e).strip() else 'no message'}"
    return None if error < 0.03 else f"ran, but its results are wrong (relative error {error:.2g})"


def _candidates(device_type: str, dtype: torch.dtype, seq_len: int, windowed: bool) -> list[str]:
    """Backend names for a problem, the fastest first."""
    plain = ["blocks", "masked"] if windowed else ["sdpa", "masked"]
    if device_type == "cuda":
        # For full context SDPA picks among the flash kernels of PyTorch by itself, cuDNN's too, so varlen adds nothing.
        return ["fa3", "varlen", *plain] if windowed else ["fa3", *plain]
    if device_type == "cpu":
        native = dtype == torch.bfloat16 and seq_len >= 64  # it works in blocks of 64, so on shorter rows half for nothing
        pays = {"native": native, "chunked": _chunked_pays(dtype, seq_len, windowed)}
        return [*(name for name, wins in pays.items() if wins), *plain]
    return plain


def _chunked_pays(dtype: torch.dtype, seq_len: int, windowed: bool) -> bool:
    """Where `chunked` beats SDPA on a CPU: measured forward and backward, 2 cores with AVX512-BF16, see dev/LOG.md.

    In bf16 it comes after `native`, for machines without a compiler and heads that the kernel does not take."""
    if dtype == torch.bfloat16:
        # It keeps T*T/2 probabilities for the backward pass: beyond 2048 tokens memory matters more than speed.
        return cpu_multiplies_bf16() and (windowed or seq_len <= 2048)
    return dtype == torch.float32 and (windowed or seq_len <= 512)


def choose_backend(device, dtype: torch.dtype, head_dim: int, seq_len: int, window: int) -> str:
    """The name of the fastest backend that works for this problem. Probes, so not for traced code.

    `window` in tokens before the query, -1 or anything >= seq_len - 1 for full context. UserError if nothing works.
    """
    kind, windowed = torch.device(device).type, 0 <= window < seq_len - 1
    names = _candidates(kind, dtype, seq_len, windowed)
    reasons = {}
    for name in names:
        reasons[name] = why_not(name, windowed, kind, dtype, head_dim)
        if reasons[name] is None:
            return name
    raise UserError(f"no attention works on {kind} in {dtype} with heads of {head_dim}: "
                    + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                    + ". Try another dtype ($NANOCHAT_DTYPE) or --device-type cpu.")


class Attention:
    """The attention of one model: `attention(q, k, v, window) -> (B, T, H, D)`, every choice already made.

    It serves any T; a window not named at set-up goes to the backend that works anywhere. `str()` is the line to print.
    """

    def __init__(self, names: dict[int, str], windows: list[int], seq_len: int):
        self.names, self.windows, self.seq_len = names, windows, seq_len
        self.functions = {window: BACKENDS[name][0]() for window, name in names.items()}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if window < 0 or window >= q.size(1) - 1:
            return self.functions[FULL](q, k, v, FULL)
        return self.functions.get(window, _blocks)(q, k, v, window)

    def backend_for(self, window: int) -> str:
        """The name of the backend that serves `window` at the sequence length of the set-up."""
        return self.names.get(window, "blocks") if 0 <= window < self.seq_len - 1 else self.names[FULL]

    def __str__(self) -> str:
        served = {}
        for window in self.windows:
            served.setdefault(self.backend_for(window), []).append("full context" if window < 0 else f"window {window}")
        return "attention: " + ", ".join(f"{name} ({', '.join(which)})" for name, which in served.items())


def make_attention(device, dtype: torch.dtype, head_dim: int, seq_len: int, windows) -> Attention:
    """Choose a backend for each of a model's `windows` (ints, repeats allowed). Call it before compiling."""
    distinct = sorted({w if 0 <= w < seq_len - 1 else FULL for w in windows})
    names = {w: choose_backend(device, dtype, head_dim, seq_len, w) for w in sorted({FULL, *distinct})}
    return Attention(names, distinct, seq_len)


# ---------------------------------------------------------------------------------------------------------------------
# FlashAttention-3's functions, as nanochat's model and engine call them

def _window(causal: bool, window_size: tuple[int, int]) -> int:
    assert causal and window_size[1] in (0, -1), f"only causal attention here, not {causal=} {window_size=}"
    return window_size[0]


def flash_attn_func(q, k, v, causal=True, window_size=(-1, 0)):
    """Causal attention without set-up: the backends that work on every device. (B, T, H, D) -> (B, T, H, D).

    `window_size` is (tokens before the query, 0), -1 for all of them.
    """
    return _blocks(q, k, v, _window(causal, window_size))


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=True, window_size=(-1, 0)):
    """Attention of the newest T tokens, q (B, T, H, D), to a cache k_cache, v_cache (B, T_max, H_kv, D).

    If given, the new k, v (B, T, H_kv, D) are first written into the cache, in place, at position `cache_seqlens`: an
    int, or an int tensor (B,) of one value (reading it makes a GPU wait; the int does not). Without k and v,
    `cache_seqlens` counts the tokens in the cache, q's included. Query t of T stands at the end's position - T + t.
    """
    T, window = q.size(1), _window(causal, window_size)
    if torch.is_tensor(cache_seqlens):
        positions = set(cache_seqlens.tolist())
        assert len(positions) == 1, f"all rows of the cache must be at one position, not {sorted(positions)}"
        cache_seqlens = positions.pop()
    assert cache_seqlens is not None, "cache_seqlens says where in the cache to write and to read"
    end = cache_seqlens if k is None else cache_seqlens + T
    start = end - T
    assert 0 <= start and end <= k_cache.size(1), f"positions {start}..{end} do not fit a cache of {k_cache.size(1)}"
    if k is not None:
        k_cache[:, start:end], v_cache[:, start:end] = k, v
    first = max(0, start - window) if window >= 0 else 0  # nothing before it is visible to any of the queries
    keys, values = k_cache[:, first:end], v_cache[:, first:end]
    if start == 0:
        return flash_attn_func(q, keys, values, window_size=window_size)
    if T == 1:
        return _sdp(q, keys, values)
    t = torch.arange(first, end, device=q.device)
    return _sdp(q, keys, values, mask=_visible(t[start - first:], t, window))


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
