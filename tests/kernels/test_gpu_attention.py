"""FlashAttention from packages: which is found, what is said where it is missing, and, with a stand-in for FlashAttention-4 in
plain PyTorch, the operators around it. The real ones are compared in tests/test_flash_attention.py, on a GPU that has them."""

import math
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from nanochat import flash_attention as fa
from nanochat.kernels import gpu_attention


@pytest.fixture
def install(monkeypatch):
    """Put a module that can be imported under a name: install("kernels", function=...)."""
    def install(name, **content):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return install


# --- FlashAttention-3: Hugging Face's package `kernels` and its cache -------------------------------------------------------

def load(folder, package_name=None):
    """Stands for loading a kernel: a snapshot has a build for this torch if there is a file of that name."""
    if not (folder / "build").exists():
        raise FileNotFoundError(f"no build in {folder}")
    if (folder / "build").read_text() == "broken":
        raise OSError("undefined symbol: aoti_torch_empty")
    return ModuleType(f"{folder.name} {package_name}")


def newer_get_local_kernel(repo_path, backend=None):
    return load(repo_path)


def older_get_local_kernel(repo_path, package_name):
    return load(repo_path, package_name)


@pytest.fixture
def cache(tmp_path, monkeypatch, install):
    """A function that adds a snapshot to an empty cache; the later, the newer."""
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    install("huggingface_hub.constants", HF_HUB_CACHE=str(tmp_path / "not looked at"))

    def add(kind, name, build=None):
        folder = tmp_path / f"{kind}--kernels-community--flash-attn3" / "snapshots" / name
        folder.mkdir(parents=True)
        if build is not None:
            (folder / "build").write_text(build)
        age = len(list(tmp_path.glob("*/snapshots/*")))
        os.utime(folder, (age, age))
    return add


@pytest.mark.parametrize("get_local_kernel, kind, other, found", [
    (newer_get_local_kernel, "kernels", "models", "second None"),
    (older_get_local_kernel, "models", "kernels", "second flash_attn3")])
def test_the_newest_build_in_the_cache_is_taken(install, cache, get_local_kernel, kind, other, found):
    """By what each generation of the package calls it; a snapshot without a build for this torch does not hide an older one."""
    install("kernels", get_local_kernel=get_local_kernel)
    for name, build in (("first", ""), ("second", ""), ("third", None)):
        cache(kind, name, build)
    cache(other, "of the other generation", "")
    assert gpu_attention.find_fa3().__name__ == found


def test_what_is_missing_of_fa3_is_told(install, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # cannot be imported
    monkeypatch.setattr(gpu_attention, "find_spec", lambda name: sys.modules.get(name))
    with pytest.raises(RuntimeError, match="^not installed: pip install kernels"):
        gpu_attention.find_fa3()
    install("kernels", get_local_kernel=newer_get_local_kernel)
    with pytest.raises(RuntimeError, match="^not downloaded: .*kernels-community/flash-attn3', version=1"):
        gpu_attention.find_fa3()
    cache("kernels", "for another torch")
    with pytest.raises(RuntimeError, match="^not downloaded for this torch and CUDA: "):
        gpu_attention.find_fa3()
    cache("kernels", "broken", "broken")
    with pytest.raises(OSError, match="undefined symbol"):
        gpu_attention.find_fa3()
    install("flash_attn_interface", flash_attn_func=None)
    assert gpu_attention.find_fa3().__name__ == "flash_attn_interface", "what was built from source comes first"


@pytest.mark.parametrize("name", gpu_attention.GENERATIONS)
def test_without_a_gpu_of_its_generation_neither_is_tried(name, monkeypatch):
    for generation in (0, 8):
        monkeypatch.setattr(gpu_attention, "gpu_generation", lambda generation=generation: generation)
        with pytest.raises(RuntimeError, match="only for NVIDIA GPUs of sm_90"):
            fa.BACKENDS[name][0]()


@pytest.mark.parametrize("generation, packages", [(8, []), (9, ["fa3", "fa4"]), (10, ["fa4"]), (12, ["fa4"])])
def test_no_package_is_asked_for_that_would_not_run(monkeypatch, generation, packages):
    """Their reasons are printed at every start. After them come PyTorch's own, its own choice first, which wins ties."""
    monkeypatch.setattr(fa, "gpu_generation", lambda: generation)
    assert fa._candidates("cuda", torch.bfloat16, 512, fa.FULL) == [*packages, "sdpa", "flash", "cudnn"]
    assert fa._candidates("cuda", torch.bfloat16, 512, 128) == [*packages, "varlen", "blocks"]


def test_the_reasons_fit_into_the_line_that_is_printed():
    assert len(f"not downloaded for this torch and CUDA: {gpu_attention.DOWNLOAD_FA3}") <= 160


# --- FlashAttention-4 -------------------------------------------------------------------------------------------------------

def probabilities(q, k, causal, window_size_left, window_size_right):
    """(B, H, T, T) and the log-sum-exp (B, H, T), by the package's names and rules: None is no bound, 0 the token itself."""
    assert causal and window_size_right in (None, 0)
    t = torch.arange(q.size(1))
    left = q.size(1) if window_size_left is None else window_size_left
    hidden = (t[:, None] < t) | (t[:, None] - t > left)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.size(2) // k.size(2), 2)) / math.sqrt(q.size(3))
    scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def stand_in(more_results):
    """The package's two functions. more_results: None, how many more of today's releases return after those of the first."""
    calls = []

    def forward(q, k, v, *, causal, return_lse, window_size_left=None, window_size_right=None):
        assert return_lse and all(x.is_contiguous() for x in (q, k, v))
        calls.append("forward")
        p, lse = probabilities(q, k, causal, window_size_left, window_size_right)
        y = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(q.size(2) // v.size(2), 2))
        return y.contiguous(), lse, *[None] * more_results

    def backward(q, k, v, out, dout, lse, *, causal, window_size_left=None, window_size_right=None, deterministic=False):
        assert all(x.is_contiguous() for x in (q, k, v, out, dout, lse)) and not deterministic
        calls.append("backward")
        groups = q.size(2) // k.size(2)
        p, same = probabilities(q, k, causal, window_size_left, window_size_right)
        torch.testing.assert_close(lse, same)
        expanded = [x.repeat_interleave(groups, 2) for x in (k, v)]
        dp = torch.einsum("bqhd,bkhd->bhqk", dout, expanded[1])
        ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) / math.sqrt(q.size(3))
        dk, dv = (torch.einsum("bhqk,bqhd->bkhd", x, y).unflatten(2, (-1, groups)).sum(3) for x, y in ((ds, q), (p, dout)))
        dq = torch.einsum("bhqk,bkhd->bqhd", ds, expanded[0])
        return *(x.contiguous() for x in (dq, dk, dv)), *[None] * bool(more_results)
    return dict(_flash_attn_fwd=forward, _flash_attn_bwd=backward, calls=calls)


def problem(T=37, H=4, H_kv=2):
    """Inputs and a gradient whose heads come before their tokens in memory, as none of the package's kernels takes them."""
    random = torch.Generator().manual_seed(0)
    *inputs, grad = (torch.randn(2, heads, T, 8, generator=random).transpose(1, 2) for heads in (H, H_kv, H_kv, H))
    return [x.requires_grad_() for x in inputs], grad


def results(function, inputs, grad, window):
    y = function(*inputs, window)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("more_results", [0, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_fa4_s_operators_give_the_definition(install, more_results, compiled):
    """Full context by any name that a caller has for it, windows, grouped queries; in one graph, too."""
    for name in ("flash_attn", "flash_attn.cute"):
        install(name)
    install("flash_attn.cute.interface", **(package := stand_in(more_results)))
    function = gpu_attention.fa4
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs, grad = problem()
    for window in (-1, 0, 1, 20, 35, 36, 100):
        found, want = results(function, inputs, grad, window), results(fa._masked, inputs, grad, window)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert package["calls"] == ["forward", "backward"] * 7


def test_fa4_s_operators_keep_torch_s_rules(install):
    for name in ("flash_attn", "flash_attn.cute"):
        install(name)
    install("flash_attn.cute.interface", **stand_in(3))
    (q, k, v), grad = problem()
    torch.library.opcheck(gpu_attention.fa4_forward, (q, k, v, 5), test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor"))
    q, k, v = (x.detach() for x in (q, k, v))
    forward = gpu_attention.fa4_forward(q, k, v, 5)
    torch.library.opcheck(gpu_attention.fa4_backward, (q, k, v, *forward, grad, 5), test_utils=("test_schema", "test_faketensor"))


def test_a_missing_fa4_is_told(monkeypatch):
    monkeypatch.setattr(gpu_attention, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="^not installed: pip install 'flash-attn-4"):
        gpu_attention.interface()
