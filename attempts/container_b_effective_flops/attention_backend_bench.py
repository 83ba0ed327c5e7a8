"""Which attention is fastest here? Every backend the device offers, forward and backward, over contexts, heads and windows.

    python attempts/container_b_effective_flops/attention_backend_bench.py --preset smoke --json-out b.json

The backends of nanochat/flash_attention.py, each of those that PyTorch's SDPA chooses among (`sdpa_math`, `sdpa_flash`,
`sdpa_efficient`, `sdpa_cudnn`), and flex attention, which is compiled for each shape. A backend that does not support a
shape is a row with the reason. The output and gradients of each are first compared with the math backend in fp32; one that
is wrong is not timed. Then the timings of all are interleaved.

Queries, keys and values are those of a trained model's layers on its text, their features distributed over heads of the size
asked for, sequences cut to the length asked for. The time hardly depends on them, but rounding errors do.

The JSON has for each shape the fastest backend, and the one that flash_attention.py chooses there by its own short measurement
(`chosen`), with its time relative to the fastest: where that is above 1 in run after run, the tuner measures too little.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from nanochat.benchmarks.attempt import Attempt
from nanochat.benchmarks.flags import AttemptFlags
from nanochat.cli.flags import flag
from nanochat.cli.program import cli
from nanochat.common import format_table
from nanochat.runtime import timing

SCRIPT = "attempts/container_b_effective_flops/attention_backend_bench.py"
LIBRARY = ("fa3", "fa4", "varlen", "flash", "cudnn", "native", "brgemm", "chunked", "sdpa", "blocks", "masked")
SDPA = {"sdpa_math": "MATH", "sdpa_flash": "FLASH_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION",
          "sdpa_cudnn": "CUDNN_ATTENTION"}
UNCOMPILED = (*LIBRARY, *SDPA)
BACKENDS = (*UNCOMPILED, "flex")
PRESETS = {
    "smoke": dict(backends=UNCOMPILED, tokens=1024, seq_lens=[128, 256], head_dims=[64], windows=[-1, 64], groups=[1, 2],
                  heads=2, repeats=5),
    "default": dict(backends=UNCOMPILED, tokens=2048, seq_lens=[256, 1024], head_dims=[64, 128], windows=[-1, 128],
                    groups=[1, 4], heads=4, repeats=5),
    "gpu": dict(backends=BACKENDS, tokens=32768, seq_lens=[1024, 2048, 4096, 8192], head_dims=[64, 128],
                windows=[-1, 256, 1024], groups=[1, 4], heads=12, repeats=21),
}
WRONG = 0.03  # relative error beyond which a backend is not timed, as in flash_attention.backend_unavailable_reason


@dataclass
class BenchFlags(AttemptFlags):
    """The attempt; the preset gives the sizes that are not given"""
    backends: list[str] = flag([], "which; by default all, flex only with the preset gpu, as it is compiled for each shape",
                               choices=BACKENDS)
    seq_lens: list[int] = flag([], "context lengths T", low=2)
    head_dims: list[int] = flag([], "features of a head", low=8, high=512)
    windows: list[int] = flag([], "tokens seen before the query; -1 is all. Skipped where it covers all of T", low=-1)
    groups: list[int] = flag([], "query heads to a key head", low=1)
    heads: int | None = flag(None, "query heads", low=1)
    tokens: int | None = flag(None, "tokens of a batch, B x T, whatever T is", low=2)
    repeats: int | None = flag(None, "timings of each backend, interleaved", low=2)
    random: bool = flag(False, "normal numbers instead of a trained model's queries, keys and values: no model is needed")

    presets = PRESETS

    def validate(self) -> list[str]:
        filled = self.filled()
        found = super().validate()
        found += [f"--groups {g} does not divide --heads {filled.heads}" for g in filled.groups if filled.heads % g]
        found += [f"--head-dims {d}: take a multiple of 8, as kernels want it" for d in filled.head_dims if d % 8]
        found += [] if shapes(filled) else ["no window is shorter than any of --seq-lens: nothing is left to measure"]
        found += [f"--seq-lens {T} is more than --tokens {filled.tokens} of a batch"
                  for T in filled.seq_lens if T > filled.tokens]
        return found


class Shape(NamedTuple):
    T: int
    head_dim: int
    window: int
    group: int

    def __str__(self):
        reach = "full" if self.window < 0 else f"window {self.window}"
        return f"T {self.T}, D {self.head_dim}, {reach}, {self.group} to a key head"


def shapes(flags: BenchFlags) -> list[Shape]:
    return [Shape(T, D, window, group) for T in flags.seq_lens for D in flags.head_dims for window in flags.windows
            if window < T - 1 for group in flags.groups]


def model_features(trained, tokens: int):
    """q, k and v of all layers on text: three (tokens, features) in the compute dtype."""
    import torch
    seen, attention = [], trained.model.kernels.attention

    def record(q, k, v, window):
        seen.append([x.detach().flatten(2).flatten(0, 1) for x in (q, k, v)])
        return attention(q, k, v, window)
    trained.model.kernels.attention = record
    parts = []
    with torch.no_grad():
        while sum(part[0].size(0) for part in parts) < tokens:
            seen.clear()
            trained.model(trained.train_batches(len(parts) + 1, seed=0)[-1][0])
            parts.append([torch.cat(layers, dim=1) for layers in zip(*seen, strict=True)])
    trained.model.kernels.attention = attention
    return [torch.cat(one)[:tokens] for one in zip(*parts, strict=True)]


def inputs(features, shape: Shape, flags: BenchFlags, device, dtype):
    """q (B, T, H, D), k, v (B, T, H / group, D) and the gradient of y (B, T, H, D), in the compute dtype.

    The model's features fill the heads one after the other, repeated where there are too few; normal numbers without a model.
    """
    import torch
    B, generator = flags.tokens // shape.T, torch.Generator().manual_seed(flags.seed)
    result = []
    for i, heads in enumerate((flags.heads, flags.heads // shape.group, flags.heads // shape.group)):
        size = (B, shape.T, heads, shape.head_dim)
        if features is None:
            x = torch.randn(size, generator=generator)
        else:
            index = torch.arange(heads * shape.head_dim, device=features[i].device) % features[i].size(1)
            x = features[i][:B * shape.T, index].view(size)
        result.append(x.to(device, dtype))
    dy = torch.randn((B, shape.T, flags.heads, shape.head_dim), generator=generator).to(device, dtype)
    return *result, dy


def expand(x, heads: int):
    return x if x.size(2) == heads else x.repeat_interleave(heads // x.size(2), 2)


def sdpa_with(backend: str):
    """PyTorch's SDPA with one of its kernels: (q, k, v, window) -> y. Key heads are shared where the kernel supports that."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, window):
        mask, shares = None, q.is_cuda and backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION")
        if window >= 0:
            t = torch.arange(q.size(1), device=q.device)
            distance = t[:, None] - t
            mask = (distance >= 0) & (distance <= window)
        heads = q.size(2)
        q, k, v = (x.transpose(1, 2) for x in (q, *((k, v) if shares else (expand(k, heads), expand(v, heads)))))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shares)
        return y.transpose(1, 2)
    return attend


def flex_for(shape: Shape, device):
    """Flex attention compiled for a shape; empty blocks of the mask are not computed."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, query, key):
        seen = query >= key
        return seen & (query - key <= shape.window) if shape.window >= 0 else seen
    mask = create_block_mask(visible, None, None, shape.T, shape.T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v, window):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)
    return attend


def load(name: str, shape: Shape, device):
    """(q, k, v, window) -> y. Raises: RuntimeError, or what loading raises, where the backend is not available."""
    from nanochat.flash_attention import BACKENDS as LIBRARY_BACKENDS
    if name in SDPA:
        return sdpa_with(SDPA[name])
    if name == "flex":
        return flex_for(shape, device)
    load_backend, full, windows = LIBRARY_BACKENDS[name]
    if not (windows if shape.window >= 0 else full):
        raise RuntimeError("does not do windows" if shape.window >= 0 else "does windows only")
    return load_backend()


def output_and_gradients(function, tensors, dy, window) -> tuple[list, str | None]:
    """[y, dq, dk, dv] in fp32, or [y] alone and the reason why there is no backward."""
    import torch

    from nanochat.runtime.toolchain import first_line
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    try:
        y = function(q, k, v, window)
        return [x.float() for x in (y.detach(), *torch.autograd.grad(y, (q, k, v), dy.to(y.dtype)))], None
    except Exception as e:  # kernels raise many types of errors; flex attention has no backward on a CPU, for example
        reason = f"no backward: {first_line(e)[:160]}"
    with torch.no_grad():
        return [function(*tensors, window).float()], reason


def reference(tensors, dy, window) -> list:
    """[y, dq, dk, dv] by the math backend in fp32, one sequence at a time, as it allocates T x T scores."""
    import torch
    attend = sdpa_with("MATH")
    parts = [output_and_gradients(attend, [x[i:i + 1].float() for x in tensors], dy[i:i + 1].float(), window)[0]
             for i in range(len(dy))]
    return [torch.cat(one) for one in zip(*parts, strict=True)]


def relative_error(results, expected) -> float:
    """The largest relative error of y, dq, dk and dv; of y alone where there is no backward."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=False))


def flops(shape: Shape, flags: BenchFlags) -> float:
    """FLOPs of the forward pass over visible keys; with the backward 3.5 times as many (FlashAttention-2, arXiv 2307.08691)."""
    visible = shape.T if shape.window < 0 else shape.window + 1
    pairs = visible * shape.T - visible * (visible - 1) / 2
    return 4 * (flags.tokens // shape.T) * flags.heads * shape.head_dim * pairs


def measure(shape: Shape, features, flags: BenchFlags, device, dtype) -> dict:
    """The row of a shape: every backend, the fastest, the one that the library chooses."""
    import torch

    from nanochat.flash_attention import choose_backend
    from nanochat.runtime.toolchain import first_line
    *tensors, dy = inputs(features, shape, flags, device, dtype)
    expected = reference(tensors, dy, shape.window)
    rows, calls = {}, {}
    for name in flags.backends:
        row = rows[name] = {"error": None, "why_not": None, "peak_mem_mib": None}
        try:
            function = load(name, shape, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            found, row["why_not"] = output_and_gradients(function, tensors, dy, shape.window)
            row["error"] = relative_error(found, expected)
            if device.type == "cuda":
                row["peak_mem_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        except Exception as e:  # kernels raise many types of errors on devices that they do not support
            row["why_not"] = f"{type(e).__name__}: {first_line(e)[:160]}"
            continue
        if not row["error"] < WRONG:
            row["why_not"] = f"ran, but its results are wrong (relative error {row['error']:.2g})"
            continue
        calls[name, "forward"] = lambda function=function: forward(function, tensors, shape.window)
        if len(found) > 1:
            calls[name, "training"] = lambda function=function: gradients(function, tensors, dy, shape.window)
    times = timing.time_in_turn(calls, device, flags.repeats, at_least=timing.SHORT, label=str(shape))
    for (name, what), seconds in times.items():
        rows[name][f"{what}_ms"] = timing.spread([1000 * s for s in seconds])
    chosen = choose_backend(device, dtype, shape.head_dim, shape.T, shape.window, rows=flags.tokens // shape.T,
                            heads=flags.heads, kv_heads=tensors[1].size(2)).name
    row = {**shape._asdict(), "heads": flags.heads, "batch": flags.tokens // shape.T, "chosen": chosen, "backends": rows}
    for what in ("forward", "training"):
        best = min((n for n, kind in calls if kind == what), key=lambda n: rows[n][f"{what}_ms"]["median"], default=None)
        row[f"fastest_{what}"] = best
        row[f"{what}_ms"] = rows[best][f"{what}_ms"] if best else None
        times_forward = 1 if what == "forward" else 3.5
        row[f"{what}_gflops"] = best and times_forward * flops(shape, flags) / rows[best][f"{what}_ms"]["median"] / 1e6
        timed = best and (chosen, what) in times
        row[f"chosen_{what}_slower"] = timing.speedup(times[best, what], times[chosen, what]) if timed else None
    return row


def forward(function, tensors, window) -> None:
    import torch
    with torch.no_grad():
        function(*tensors, window)


def gradients(function, tensors, dy, window) -> None:
    import torch
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    torch.autograd.grad(function(q, k, v, window), (q, k, v), dy)


def draw(figure, result: dict) -> None:
    axes = figure.subplots()
    names = list(result["results"])
    for backend in BACKENDS:
        points = [(i, row["backends"][backend]["training_ms"]["median"] / row["training_ms"]["median"])
                  for i, row in enumerate(result["results"].values()) if "training_ms" in row["backends"].get(backend, {})]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle="", label=backend)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=6)
    axes.set(title="forward and backward: time over that of the fastest")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)


def table(results: dict) -> str:
    return format_table([{
        "shape": name, "fastest forward": row["fastest_forward"], "ms": (row["forward_ms"] or {}).get("median"),
        "fastest training": row["fastest_training"], "ms ": (row["training_ms"] or {}).get("median"),
        "chosen": row["chosen"], "slower x": (row["chosen_training_slower"] or {}).get("median")}
        for name, row in results.items()])


def verdict(results: dict) -> str:
    """How often the library's choice was not the fastest, forward and backward."""
    slower = [row["chosen_training_slower"] for row in results.values() if row["chosen_training_slower"]]
    lost = [spread["median"] for spread in slower if spread["q1"] > 1]
    return (f"another backend than the chosen one was faster, quartiles included, in {len(lost)} of {len(slower)} shapes"
            + (f": {max(lost):.2f} times as fast at most" if lost else ""))


def main(argv: list[str] | None = None) -> int:
    attempt = Attempt(SCRIPT, BenchFlags, argv, __doc__)
    flags = attempt.flags
    features = None if flags.random else model_features(attempt.open_model(), flags.tokens)
    results = {str(shape): measure(shape, features, flags, attempt.device, attempt.dtype) for shape in shapes(flags)}

    print(table(results))
    for name in flags.backends:
        reasons = {row["backends"][name]["why_not"] for row in results.values()}
        if None not in reasons:
            print(f"{name}: {sorted(reasons)[0]}")
    print(verdict(results))
    attempt.save(results, draw)
    return 0


if __name__ == "__main__":
    cli(main)
