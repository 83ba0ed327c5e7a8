"""FlashAttention-3 (arXiv 2407.08608) and FlashAttention-4: kernels for NVIDIA GPUs, from packages of their own.

They are taken where they are installed. Nothing is downloaded here: a training run must not fetch code that nobody asked for.
What is missing is a RuntimeError that says how to get it; docs/devices.md has the commands. Not run on a GPU yet.

FlashAttention-4 is called directly. torch.nn.attention.activate_flash_attention_impl("FA4") would put it under all attention of
the process, and torch 2.13 expects two results where today's releases of the package return five.
"""

import importlib
import inspect
import os
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = "kernels-community/flash-attn3"  # of FlashAttention-3, on Hugging Face
DOWNLOAD_FA3 = f"""python -c "from kernels import get_kernel; get_kernel('{REPOSITORY}', version=1)\""""


# name -> (major versions of CUDA's compute capability that it runs on, in words)
GENERATIONS = {"fa3": (range(9, 10), "sm_90 (H100, H200)"), "fa4": (range(9, 13), "sm_90 and later (H100, B200, RTX 50)")}


def gpu_generation() -> int:
    """The major version of the current GPU's compute capability; 0 without one."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def _need_gpu(name: str) -> None:
    generations, words = GENERATIONS[name]
    if gpu_generation() not in generations:
        raise RuntimeError(f"only for NVIDIA GPUs of {words}")


# --- FlashAttention-3 -------------------------------------------------------------------------------------------------

@cache
def load_fa3():
    """The function `fa3` with its kernel. Raises: RuntimeError where there is none."""
    _need_gpu("fa3")
    return partial(fa3, kernel=find_fa3().flash_attn_func)


def fa3(q: Tensor, k: Tensor, v: Tensor, window: int, *, kernel) -> Tensor:
    """Causal attention: q (B, T, H, D), k and v (B, T, H_kv, D), bf16 or fp16 -> (B, T, H, D). Negative windows mean all."""
    y = kernel(q, k, v, causal=True, window_size=(window, 0) if 0 <= window < q.size(1) - 1 else (-1, -1))
    return y[0] if isinstance(y, tuple) else y  # some releases also return the log-sum-exp


def find_fa3():
    """The module with `flash_attn_func`: built from its source, or from the cache of Hugging Face's package `kernels`, of any of
    its releases. Raises: RuntimeError that says what is missing."""
    if find_spec("flash_attn_interface"):
        return importlib.import_module("flash_attn_interface")
    if not find_spec("kernels"):
        raise RuntimeError("not installed: pip install kernels (docs/devices.md)")
    from huggingface_hub.constants import HF_HUB_CACHE

    import kernels
    # `get_kernel` asks the network first, and notes nowhere which version it put into the cache. So look there.
    cached = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    before_0_14 = "package_name" in inspect.signature(kernels.get_local_kernel).parameters  # when kernels were kept as models
    folders = [*cached.glob(f"{'models' if before_0_14 else 'kernels'}--{REPOSITORY.replace('/', '--')}/snapshots/*")]
    for folder in sorted(folders, key=os.path.getmtime, reverse=True):
        try:
            return kernels.get_local_kernel(folder, *["flash_attn3"] * before_0_14)
        except OSError as e:  # no build for this torch and CUDA, or a library that one needs is missing
            if not (isinstance(e, FileNotFoundError) or "metadata.json" in str(e)):
                raise
    raise RuntimeError(f"not downloaded{' for this torch and CUDA' if folders else ''}: {DOWNLOAD_FA3}")


# --- FlashAttention-4 -------------------------------------------------------------------------------------------------

@cache
def load_fa4():
    """The function `fa4`. Raises: RuntimeError where its package is not installed or the GPU is too old."""
    _need_gpu("fa4")
    interface()
    return fa4


def fa4(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention: q (B, T, H, D), k and v (B, T, H_kv, D), bf16 or fp16 -> (B, T, H, D). Negative windows mean all."""
    return fa4_forward(q, k, v, window if window < q.size(1) - 1 else -1)[0]


def interface():
    """The module of FlashAttention-4 with the two functions that torch's own integration calls, too."""
    if not (find_spec("flash_attn") and find_spec("flash_attn.cute")):
        raise RuntimeError("not installed: pip install 'flash-attn-4[cu13]' (docs/devices.md)")
    return importlib.import_module("flash_attn.cute.interface")


# Operators of torch, which a compiled model calls as they are: the package's own functions cannot be traced.

@torch.library.custom_op("nanochat::fa4_forward", mutates_args=())
def fa4_forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) in the dtype of q, and the log-sum-exp of the scores (B, H, T) fp32, for the backward pass."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    y, lse, *_ = interface()._flash_attn_fwd(q, k, v, causal=True, return_lse=True, **_window(window))  # newer ones return more
    return y, lse.contiguous()


@fa4_forward.register_fake
def _(q, k, v, window):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("nanochat::fa4_backward", mutates_args=())
def fa4_backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor,
                 window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtypes, from the forward's results and the gradient dy (B, T, H, D)."""
    q, k, v, dy = (x.contiguous() for x in (q, k, v, dy))
    dq, dk, dv, *_ = interface()._flash_attn_bwd(q, k, v, y, dy, lse, causal=True, **_window(window),
                                                 deterministic=torch.are_deterministic_algorithms_enabled())
    return dq, dk, dv


@fa4_backward.register_fake
def _(q, k, v, y, lse, dy, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _window(window: int) -> dict[str, int]:
    return {} if window < 0 else {"window_size_left": window, "window_size_right": 0}


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient; do not allocate zeros for it


def _backward(ctx, dy, _):
    return *fa4_backward(*ctx.saved_tensors, dy, ctx.window), None


fa4_forward.register_autograd(_backward, setup_context=_setup_context)
