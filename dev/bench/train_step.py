"""How fast is a training step, and what share of the machine's own matrix rate is that?

    python -m dev.bench.train_step --preset cpu-d4 --json-out step.json

Times whole optimizer steps (micro-batches forward and backward, update) on random tokens, in turn with a plain matrix
product of the same dtype: its rate is the peak that the step is held against. Model FLOPs are counted as in
result.json (6 per matmul parameter, 12 x width x window for attention); `share_causal` counts only visible keys.
"""

import time
from dataclasses import dataclass

from nanochat.common import cli, format_table
from nanochat.config import DeviceFlags
from nanochat.flags import flag, parse
from nanochat.shape import flops_per_token, shape_of_depth

PRESETS = {  # depth, head_dim, T, vocabulary, window pattern, rows per micro-batch, tokens per step
    "cpu-d4": (4, 64, 512, 4096, "L", 8, 16384),
    "cpu-d6": (6, 64, 512, 4096, "L", 8, 16384),
    "gpu-d12": (12, 128, 2048, 32768, "L", 16, 524288),
    "gpu-d24": (24, 128, 2048, 32768, "L", 8, 524288),
}


@dataclass
class BenchFlags(DeviceFlags):
    """The bench"""
    preset: str = flag("cpu-d4", "shape and batch", choices=tuple(PRESETS))
    variants: list[str] = flag(["compiled"], "what to time, in turn", choices=("eager", "compiled", "parts"))
    repeats: int = flag(7, "steps counted per variant", low=1)
    tokens: int = flag(-1, "tokens per step instead of the preset's")
    json_out: str | None = flag(None, "write the result here", metavar="PATH")


def main() -> None:
    flags, = parse([BenchFlags], prog="python -m dev.bench.train_step")
    import torch

    from nanochat import bench
    from nanochat.checkpoint_manager import build_model
    from nanochat.device import PeakMemory, init_device, pick_compute_dtype
    from nanochat.flash_attention import make_attention
    from nanochat.compilation import compile_parts, compile_whole
    bench.check_writable(flags.json_out)
    started = time.monotonic()
    device, _ = init_device(flags.device_type)
    dtype, _ = pick_compute_dtype(device, flags.dtype)
    depth, head_dim, T, vocab_size, pattern, rows, tokens = PRESETS[flags.preset]
    tokens = flags.tokens if flags.tokens > 0 else tokens
    shape = shape_of_depth(depth, head_dim=head_dim, sequence_len=T, vocab_size=vocab_size, window_pattern=pattern)
    x = torch.randint(vocab_size, (tokens // (rows * T), rows, T), device=device)
    y = torch.roll(x, -1, dims=-1)
    seconds = {name: {"forward_backward": [], "optimizer": []} for name in flags.variants}

    def step_of(name):
        torch.manual_seed(0)
        model = build_model(shape, dtype, device)
        model.kernels.attention = make_attention(device, dtype, head_dim, T, model.window_sizes)
        optimizer = model.setup_optimizer(compile=name != "eager")
        forward = {"eager": lambda m: m, "compiled": compile_whole, "parts": compile_parts}[name](model)

        def step():
            begun = time.perf_counter()
            for micro_x, micro_y in zip(x, y):
                (forward(micro_x, micro_y) / len(x)).backward()
            bench.synchronize(device)
            between = time.perf_counter()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            bench.synchronize(device)
            seconds[name]["forward_backward"].append(between - begun)
            seconds[name]["optimizer"].append(time.perf_counter() - between)
        return step

    peak_call, peak_flops = bench.gemm(device, dtype)
    variants = {name: step_of(name) for name in flags.variants} | {"gemm": lambda: [peak_call() for _ in range(8)]}
    times = bench.time_in_turn(variants, device, flags.repeats)
    peak = 8 * peak_flops / min(times.pop("gemm"))
    results = {}
    for name, spent in times.items():
        rate = tokens / bench.spread(spent)["median"]
        results[name] = {
            "tok_per_sec_median": rate,
            "model_flops_per_sec": rate * flops_per_token(shape),
            "gemm_peak_flops_per_sec": peak,
            "gemm_peak_share": rate * flops_per_token(shape) / peak,
            "gemm_peak_share_causal": rate * flops_per_token(shape, causal=True) / peak,
            "peak_mem_mib": PeakMemory(device).step_peak(),
            "seconds": bench.spread(spent),
            "breakdown_ms": {part: 1000 * bench.spread(v[-flags.repeats:])["median"] for part, v in seconds[name].items()},
        }
    print(format_table([{
        "variant": name, "tok/s": round(r["tok_per_sec_median"]), "GFLOP/s": round(r["model_flops_per_sec"] / 1e9),
        "GEMM peak": round(peak / 1e9), "share": round(r["gemm_peak_share"], 3), "share_causal": round(r["gemm_peak_share_causal"], 3),
        "fwd+bwd ms": round(r["breakdown_ms"]["forward_backward"]), "optimizer ms": round(r["breakdown_ms"]["optimizer"]),
        "MiB": round(r["peak_mem_mib"])} for name, r in results.items()]))
    config = vars(flags) | {"dtype": str(dtype), "tokens": tokens}
    bench.write_json(flags.json_out, bench.envelope("dev/bench/train_step.py", device, config, results, time.monotonic() - started))


if __name__ == "__main__":
    cli(main)
