"""Causal attention with sliding windows behind one function, on any device.

Attention is softmax(q k^T / sqrt(D)) v, where query t sees key s if s <= t and, in a layer with a window of W tokens,
t - s <= W. Computed literally it needs a (T, T) matrix of scores per head. The backends avoid that:

    fa3      FlashAttention-3 (arXiv 2407.08608), a separate package for Hopper GPUs (nanochat/kernels/gpu_attention.py)
    fa4      FlashAttention-4, a separate package for GPUs from Hopper on (the same file)
    varlen   FlashAttention-2 (arXiv 2307.08691) from PyTorch, CUDA only, through the function that supports windows
    flash    the same through SDPA: full context only. On a CPU, SDPA's flash kernel for CPUs
    cudnn    cuDNN's kernel through SDPA, CUDA only: full context only
    native   FlashAttention-2 in C++ for CPUs with AVX512-BF16 (nanochat/kernels/cpp/attention.cpp); needs a compiler
    brgemm   the same through PyTorch's brgemm, which uses AMX where there is one (nanochat/kernels/cpp/attention_brgemm.cpp)
    chunked  a loop over chunks of queries, each multiplied with the keys that it can see. Ordinary matrix products, on CPUs
    sdpa     PyTorch's scaled_dot_product_attention (SDPA) on any device, by the kernel that it chooses: full context only
    blocks   windows on any device: queries in blocks of W see the keys of their own and the previous block, all blocks in one
             batched SDPA with a fixed mask, so the cost is proportional to T*W
    masked   SDPA with a (T, T) mask: slow, always available, the reference implementation for the others

Whether a backend works is found by running it, not by checking versions: `make_attention` runs each candidate once per kind of
problem, forward and backward on a small input, and compares with the definition. Which of those that work is the fastest is
measured too, on the model's own shapes (nanochat/runtime/tuner.py). Call it while a model is built, before anything is compiled;
the object it returns has no decision left for torch.compile to trace.

Shapes: q (B, T, H, D); k, v (B, T, H_kv, D) with H a multiple of H_kv (grouped-query attention, arXiv 2305.13245: with
G = H / H_kv, query heads h*G .. h*G+G-1 share key head h). Windows: W counts the tokens that a query sees before itself; -1 is
full context.
"""

import inspect
import math
import warnings
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.common import UserError
from nanochat.kernels.gpu_attention import GENERATIONS, gpu_generation, load_fa3, load_fa4
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner

FULL = -1  # window of a layer with full context
MOST_CHUNKED = 2048  # keys that a query of the backend `chunked` may see
LONGEST_TIMED = 4096  # tokens: of a longer context a proportional part is timed
SHORT = 128  # tokens: not every kernel takes shorter sequences, so SDPA chooses one itself


# ---------------------------------------------------------------------------------------------------------------------
# Backends: (q, k, v, window) -> (B, T, H, D). All of them are differentiable and free of state.

def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Attention mask from positions (..., Tq) and (..., Tk): bool (..., Tq, Tk), True where a query sees a key."""
    distance = queries[..., :, None] - keys[..., None, :]
    return (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0


def _expand_heads(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat key and value heads (dimension 2): (B, T, H_kv, D) -> (B, T, heads, D)."""
    groups = heads // k.size(2)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))


def _sdp(q, k, v, mask=None, is_causal=False):
    """SDPA on (B, T, H, D); `mask` is bool (Tq, Tk)."""
    # Only CUDA's flash and cuDNN kernels, for 16 bits, support grouped queries; elsewhere SDPA would take its slowest path.
    native_groups = q.is_cuda and q.element_size() == 2 and mask is None and q.size(2) != k.size(2)
    if not native_groups:
        k, v = _expand_heads(k, v, q.size(2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=native_groups)
    return y.transpose(1, 2)


def _masked(q, k, v, window):
    """Backend `masked`."""
    t = torch.arange(q.size(1), device=q.device)
    return _sdp(q, k, v, mask=_visible(t, t, window))


def _sdpa(q, k, v, window):
    """Backend `sdpa`."""
    assert window < 0 or window >= q.size(1) - 1, "sdpa has no windows"
    return _sdp(q, k, v, is_causal=True)


def _sdpa_by(q, k, v, window, *, kernel):
    """Backends `flash` and `cudnn`: SDPA by this kernel and no other."""
    if q.size(1) < SHORT:
        return _sdpa(q, k, v, window)
    with sdpa_kernel(kernel):  # torch.compile records which kernel was chosen, the backward pass follows
        return _sdpa(q, k, v, window)


def _blocks(q, k, v, window):
    """Backend `blocks`; full context goes to `sdpa`."""
    B, T, H, D = q.shape
    if window < 0 or window >= T - 1:
        return _sdpa(q, k, v, FULL)
    size = -(-max(window, 1) // 8) * 8  # a multiple of 8: CUDA kernels need aligned rows of the mask
    n = -(-T // size)
    k, v = _expand_heads(k, v, H)

    def fold(x):  # (B, n' * size, H, D) -> (n', B*H, size, D): blocks as the batch, so that all heads share a mask
        return x.reshape(B, -1, size, H, D).permute(1, 0, 3, 2, 4).reshape(-1, B * H, size, D)

    def two_blocks(x):  # each block of keys with the previous one in front, padding before the first: (n, B*H, 2*size, D)
        x = fold(F.pad(x, (0, 0, 0, 0, size, n * size - T)))
        return torch.cat((x[:-1], x[1:]), dim=2)

    start = torch.arange(n, device=q.device)[:, None] * size
    queries = start + torch.arange(size, device=q.device)                # (n, size)
    keys = start - size + torch.arange(2 * size, device=q.device)        # (n, 2*size); negative: the padding
    mask = _visible(queries, keys, window) & (keys >= 0)[:, None, :]
    # Padded queries after T see at least themselves, so no softmax row is empty; they are cut off below.
    y = F.scaled_dot_product_attention(fold(F.pad(q, (0, 0, 0, 0, 0, n * size - T))), two_blocks(k), two_blocks(v),
                                       attn_mask=mask[:, None].expand(n, B * H, size, 2 * size))
    return y.reshape(n, B, H, size, D).permute(1, 0, 3, 2, 4).reshape(B, n * size, H, D)[:, :T]


def _chunk_size(T: int, window: int) -> int:
    """Queries per chunk. Measured: 128 is best up to T=1024, 256 at 2048. T/8 limits the loop, which torch.compile unrolls."""
    eighth = -(-T // 8)
    return max(128, eighth if window < 0 else min(eighth, window))  # longer chunks than the window waste work


def _chunked(q, k, v, window):
    """Backend `chunked`. In bf16 the scores are rounded to bf16 before the softmax (a flash kernel keeps fp32), because a
    matrix product on a CPU returns the dtype of its inputs."""
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
        y.append(scores.softmax(-1) @ v[:, first:end])                   # softmax computes in fp32 internally
    return torch.cat(y, dim=1).reshape(B, H, T, D).transpose(1, 2)


def _varlen(q, k, v, window, *, kernel, native_groups):
    """Backend `varlen`: the batch as one packed sequence of B documents of T tokens. native_groups: `kernel` supports GQA."""
    B, T, H, D = q.shape
    if not native_groups:
        k, v = _expand_heads(k, v, H)
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)  # (B + 1,): boundaries of the documents
    options = {"enable_gqa": True} if native_groups and k.size(2) != H else {}
    y = kernel(q.reshape(B * T, H, D), *(x.reshape(B * T, -1, D) for x in (k, v)), ends, ends, T, T,
               window_size=(window, 0) if window < T - 1 else (-1, 0), **options)
    return y.view(B, T, H, D)


def _load_varlen():
    from torch.nn.attention.varlen import varlen_attn
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        raise RuntimeError("this release's varlen_attn has no window_size")
    return partial(_varlen, kernel=varlen_attn, native_groups="enable_gqa" in known)


def _load_cudnn():
    if not torch.backends.cudnn.is_available():
        raise RuntimeError("this machine, or this build of torch, has no cuDNN")
    return partial(_sdpa_by, kernel=SDPBackend.CUDNN_ATTENTION)


def _load_cpp(kernel):
    from nanochat.kernels.cpu_attention import load
    return load(kernel)


# name -> (function that loads the backend, supports full context, supports windows)
BACKENDS = {
    "fa3": (load_fa3, True, True),
    "fa4": (load_fa4, True, True),
    "varlen": (_load_varlen, True, True),
    "flash": (lambda: partial(_sdpa_by, kernel=SDPBackend.FLASH_ATTENTION), True, False),
    "cudnn": (_load_cudnn, True, False),
    "native": (partial(_load_cpp, "attention"), True, True),
    "brgemm": (partial(_load_cpp, "attention_brgemm"), True, True),
    "chunked": (lambda: _chunked, True, True),
    "sdpa": (lambda: _sdpa, True, False),
    "blocks": (lambda: _blocks, False, True),
    "masked": (lambda: _masked, True, True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a backend

def _definition(q, k, v, window):
    """Attention as defined at the top of this file, in fp32."""
    k, v = _expand_heads(k, v, q.size(2))
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    t = torch.arange(q.size(2), device=q.device)
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.size(3))).masked_fill(~_visible(t, t, window), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@cache
def backend_unavailable_reason(name: str, windowed: bool, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot be used, or None. Found by running it on a small problem.

    It works if forward and backward run with grouped-query heads, and output and gradients are within a relative error of 3 %
    of the definition: every dtype reaches that, a wrong window or causal flag does not.
    """
    load, full, windows = BACKENDS[name]
    if not (windows if windowed else full):
        return "does not do windows" if windowed else "does windows only"
    warned: list[warnings.WarningMessage] = []  # where SDPA tells why a kernel does not take a problem
    try:
        function, window = load(), 70 if windowed else FULL
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
            shapes = [(2, 150, heads, head_dim) for heads in (4, 2, 2, 4)]  # T and window are no multiples of a block size
            *inputs, grad = (torch.randn(s, generator=random).to(device_type, dtype) for s in shapes)
            inputs = [x.requires_grad_() for x in inputs]
            results = []
            for f in (function, _definition):
                y = f(*inputs, window)
                results.append([x.float() for x in (y, *torch.autograd.grad(y, inputs, grad.to(y.dtype)))])
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    except Exception as e:  # a kernel on an unsupported device may raise anything
        said = (str(e).strip() or "no message").splitlines()[0]
        if said.startswith("No available kernel"):
            said = _refusal([str(warning.message) for warning in warned]) or said
        return said[:160] if type(e) is RuntimeError else f"{type(e).__name__}: {said}"[:160]
    return None if error < 0.03 else f"ran, but its results are wrong (relative error {error:.2g})"


def _refusal(warned: list[str]) -> str | None:
    """Why SDPA does not take a kernel, from its warnings: a heading and a reason for each kernel, those switched off included."""
    said = [message.partition(" (Triggered internally")[0].strip() for message in warned]
    reasons = [message for message in said if not message.endswith("because:") and "disabled" not in message]
    return reasons[0] if reasons else None


def _candidates(device_type: str, dtype: torch.dtype, seq_len: int, window: int) -> list[str]:
    """Names of the backends to try for a problem. `masked` is not among them: it is slow by construction."""
    windowed = 0 <= window < seq_len - 1
    plain = "blocks" if windowed else "sdpa"
    if device_type == "cuda":
        # For full context varlen is what `flash` is. SDPA itself chooses one of these two, not always the faster; it comes before
        # them because it wins ties: it takes any problem, and torch keeps its compiled graphs for the next start.
        packages = [name for name, (generations, _) in GENERATIONS.items() if gpu_generation() in generations]
        return [*packages, *(["varlen", plain] if windowed else [plain, "flash", "cudnn"])]
    if device_type == "cpu":
        # chunked saves the probabilities for the backward pass: with more visible keys they take more memory than all else
        fits = dtype in (torch.bfloat16, torch.float32) and (window if windowed else seq_len) <= MOST_CHUNKED
        return [*["chunked"] * fits, *["native", "brgemm"] * (dtype == torch.bfloat16), plain]
    return [plain]


def choose_backend(device, dtype: torch.dtype, head_dim: int, seq_len: int, window: int, *, rows: int = 1, heads: int = 1,
                   kv_heads: int | None = None, tuner: Tuner | None = None, backend: str = "auto") -> Choice:
    """The backend for a problem: the fastest of those that work here, measured forward and backward by `tuner` (by default one
    that remembers nothing). It runs backends, so do not call it in compiled code.

    window: tokens before the query; -1 or anything >= seq_len - 1 is full context.
    rows, heads, kv_heads: B, H and H_kv of the problem; fewer rows are timed where these give the device enough to do.
    backend: a name that the user has chosen. One that has no windows stands for `blocks` in layers with a window.
    Raises: UserError if none works, or not the one that was chosen.
    """
    device, windowed = torch.device(device), 0 <= window < seq_len - 1
    names = _candidates(device.type, dtype, seq_len, window)
    if backend != "auto":
        names = ["blocks" if windowed and not BACKENDS[backend][2] else backend]
    reasons = {name: backend_unavailable_reason(name, windowed, device.type, dtype, head_dim) for name in names}
    works = [name for name in names if reasons[name] is None]
    if backend != "auto":
        if not works:
            raise UserError(f"--attention-backend {backend} cannot be used here: {reasons[names[0]]}. Leave it out to take the "
                            "fastest that works.")
        return Choice(names[0], "--attention-backend", {})
    if not works:
        reasons["masked"] = backend_unavailable_reason("masked", windowed, device.type, dtype, head_dim)
        works = ["masked"] if reasons["masked"] is None else []
    if not works:
        raise UserError(f"no attention works on {device.type} in {dtype} with heads of {head_dim}: "
                        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                        + ". Try another dtype ($NANOCHAT_DTYPE) or --device-type cpu.")
    kv_heads, window = kv_heads or heads, window if windowed else FULL
    if seq_len > LONGEST_TIMED:
        window, seq_len = window * LONGEST_TIMED // seq_len, LONGEST_TIMED  # FULL stays -1
    # timed: two heads for each thread of a CPU; a GPU is only busy with many tokens
    enough = -(-2 * torch.get_num_threads() // heads) if device.type == "cpu" else MOST_TOKENS // seq_len
    in_use, rows = rows, min(rows, enough)
    problem = (f"attention {rows}x{seq_len}x{heads}/{kv_heads}x{head_dim} {str(dtype).removeprefix('torch.')}, "
               + (f"window {window}" if windowed else "full context"))
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
    shapes = [(rows, seq_len, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]

    def training_call(name):
        def make():
            *inputs, grad = (torch.randn(shape, generator=random).to(device, dtype) for shape in shapes)
            inputs, function = [x.requires_grad_() for x in inputs], BACKENDS[name][0]()
            return lambda: torch.autograd.grad(function(*inputs, window), inputs, grad)
        return make
    with torch.inference_mode(False), torch.enable_grad():
        return (tuner or Tuner(device, folder=None)).choose(
            problem, {name: training_call(name) for name in works}, times_in_use=in_use / rows)


class Attention:
    """The attention function of one model: `attention(q, k, v, window) -> (B, T, H, D)`, with all backends chosen.

    T may differ from the `seq_len` it was made for; an unknown window uses `blocks`. `str()` is for the log.
    passed_over: candidates that do not work here -> the reason.
    """

    def __init__(self, choices: dict[int, Choice], windows: list[int], seq_len: int, passed_over: dict[str, str]):
        self.choices, self.windows, self.seq_len, self.passed_over = choices, windows, seq_len, passed_over
        self.functions = {window: BACKENDS[choice.name][0]() for window, choice in choices.items()}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        if window < 0 or window >= q.size(1) - 1:
            return self.functions[FULL](q, k, v, FULL)
        return self.functions.get(window, _blocks)(q, k, v, window)

    def backend_for(self, window: int) -> str:
        """Name of the backend for `window` at T = seq_len."""
        if 0 <= window < self.seq_len - 1:
            return self.choices[window].name if window in self.choices else "blocks"
        return self.choices[FULL].name

    def names(self) -> dict[str, str]:
        """Window, in words -> name of its backend: what a checkpoint records, so that a resume takes the same ones."""
        return {_in_words(window): choice.name for window, choice in self.choices.items()}

    def describe(self) -> dict[str, dict]:
        """`names()` with the reason and the times of each choice, for result.json."""
        return {_in_words(window): choice._asdict() for window, choice in self.choices.items()}

    def __str__(self) -> str:
        chosen = "; ".join(f"{_in_words(window)}: {self.choices[window]}" for window in self.windows)
        names: dict[str, list[str]] = {}  # by reason
        for name, reason in self.passed_over.items():
            names.setdefault(reason, []).append(name)
        return f"attention: {chosen}" + "".join(f"\n  not {' or '.join(of)}: {reason}" for reason, of in names.items())


def _in_words(window: int) -> str:
    return "full context" if window < 0 else f"window {window}"


def make_attention(device, dtype: torch.dtype, head_dim: int, seq_len: int, windows, *, recorded: dict[str, str] | None = None,
                   **problem) -> Attention:
    """Choose a backend for each of a model's `windows` (list of int, one per layer). Call it before compiling.

    recorded: `Attention.names()` of the run to be resumed; those that work here are taken.
    problem: further arguments of `choose_backend`.
    """
    distinct = sorted({w if 0 <= w < seq_len - 1 else FULL for w in windows})
    kind, recorded = torch.device(device).type, recorded or {}
    choices = {}
    for w in sorted({FULL, *distinct}):
        name = recorded.get(_in_words(w))
        if name in BACKENDS and problem.get("backend", "auto") == "auto" \
                and backend_unavailable_reason(name, w >= 0, kind, dtype, head_dim) is None:
            choices[w] = Choice(name, "as before the resume", {})
        else:
            choices[w] = choose_backend(device, dtype, head_dim, seq_len, w, **problem)
    tried = {name: backend_unavailable_reason(name, w >= 0, kind, dtype, head_dim)
             for w, choice in choices.items() if choice.reason != "--attention-backend"
             for name in _candidates(kind, dtype, seq_len, w)}
    return Attention(choices, distinct, seq_len, {name: reason for name, reason in tried.items() if reason})


# ---------------------------------------------------------------------------------------------------------------------
# The interface of FlashAttention-3, as model and engine call it

def _window(causal: bool, window_size: tuple[int, int]) -> int:
    assert causal and window_size[1] in (0, -1), f"only causal attention here, not {causal=} {window_size=}"
    return window_size[0]


def flash_attn_func(q, k, v, causal=True, window_size=(-1, 0)):
    """Causal attention by the backends that work on every device. q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D).

    window_size: (tokens before the query, 0); (-1, 0) is full context.
    """
    return _blocks(q, k, v, _window(causal, window_size))


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=True, window_size=(-1, 0)):
    """Attention of the last T tokens, q (B, T, H, D), to a KV cache k_cache, v_cache (B, T_max, H_kv, D) -> (B, T, H, D).

    k, v: if given, the keys and values of these tokens (B, T, H_kv, D), written into the cache at position `cache_seqlens`.
    cache_seqlens: number of tokens in the cache, without those of k and v. An int, or an int tensor (B,) of equal values (a
    tensor on a GPU costs a synchronization).
    """
    T, window = q.size(1), _window(causal, window_size)
    if torch.is_tensor(cache_seqlens):
        positions = set(cache_seqlens.tolist())
        assert len(positions) == 1, f"all rows of the cache must be at one position, not {sorted(positions)}"
        cache_seqlens = positions.pop()
    assert cache_seqlens is not None, "cache_seqlens is required"
    end = cache_seqlens if k is None else cache_seqlens + T
    start = end - T
    assert 0 <= start and end <= k_cache.size(1), f"positions {start}..{end} do not fit a cache of {k_cache.size(1)}"
    if k is not None:
        k_cache[:, start:end], v_cache[:, start:end] = k, v
    first = max(0, start - window) if window >= 0 else 0  # the first key that any query sees
    keys, values = k_cache[:, first:end], v_cache[:, first:end]
    if start == 0:
        return flash_attn_func(q, keys, values, window_size=window_size)
    if T == 1:
        return _sdp(q, keys, values)
    t = torch.arange(first, end, device=q.device)
    return _sdp(q, keys, values, mask=_visible(t[start - first:], t, window))


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)
