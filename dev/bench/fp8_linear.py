"""How much faster than in bf16 is a linear layer in FP8, this repository's and torchao's, for each shape?

    python -m dev.bench.fp8_linear --preset gpu-d12 gpu-d20 gpu-d26 --modes eager compiled --json-out fp8.json

For each shape of the presets' models: forward, and forward and backward, as ratios of bf16's median time (above 1 is
faster). On a GPU its own time counts, without the program's for launching, as in a step whose queue is full. Layers are as in
training: fp32 weights, which the bf16 layer and torchao's cast at every call. The custom layer casts them once per optimizer
step, in `cast ms` milliseconds. `roofline` is the ratio, forward and backward, that the datasheet allows if every product and
every cast runs at the device's peak or bandwidth, with a separate pass for the largest magnitudes (amax); `fused` is the ratio if
amax costs nothing, as a compiler can fuse it into the operation before.
"""

import importlib.util
import time
from dataclasses import dataclass

from nanochat.benchmarks.flags import OutputFlags
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import format_table, print0
from nanochat.features.fp8 import Fp8Flags, fp8_flag_unavailable_reason, layers_to_time
from nanochat.recipe.shape import shape_of_depth
from nanochat.training.config import DeviceFlags

PRESETS = {  # depth, head_dim, vocabulary, tokens of a micro-batch
    "cpu-d4": (4, 64, 4096, 4096), "cpu-d6": (6, 64, 4096, 4096),
    "gpu-d12": (12, 128, 32768, 32768), "gpu-d20": (20, 128, 32768, 32768),
    "gpu-d24": (24, 128, 32768, 16384), "gpu-d26": (26, 128, 32768, 16384),
}
# Memory bandwidth in bytes/s by a card's whole name (nanochat/runtime/nvidia.py), from NVIDIA's datasheets.
BANDWIDTH = {"B200": 8e12, "GH200 144G HBM3e": 4.9e12, "H200": 4.8e12, "H200 NVL": 4.8e12, "H100 NVL": 3.9e12,
             "H100 PCIe": 2.0e12, "H100 80GB HBM3": 3.35e12, "L40S": 864e9, "L40": 864e9, "L4": 300e9, "GeForce RTX 5090": 1792e9,
             "GeForce RTX 4090": 1008e9, "GeForce RTX 4080": 717e9}
CALLS = ("forward", "forward_backward")


@dataclass
class BenchFlags(OutputFlags, DeviceFlags):
    """The bench"""
    preset: list[str] = flag(["cpu-d4"], "models whose shapes are timed", choices=tuple(PRESETS))
    modes: list[str] = flag(["eager"], "how the layers are run", choices=("eager", "compiled"))
    tokens: list[int] = flag([], "tokens of a micro-batch instead of the preset's, one or several", low=16)
    fast_accum: bool = flag(False, "accumulate the forward products with fewer bits")
    calls: int = flag(10, "calls in one timing", low=1)
    repeats: int = flag(10, "timings per variant", low=2)

    def validate(self) -> list[str]:
        problems = super().validate() + [f"--tokens must be multiples of 16, got {n}" for n in self.tokens if n % 16]
        # on a CPU FP8 is emulated: that shows only that the bench works
        trouble = fp8_flag_unavailable_reason(self.device_type, emulate=True)
        return problems + ([trouble] if trouble else [])


def shapes_of(preset: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a preset's model: attention, the MLP's two, the head."""
    depth, head_dim, vocab_size, _ = PRESETS[preset]
    width = shape_of_depth(depth, head_dim=head_dim).n_embd
    return [(width, width), (width, 4 * width), (4 * width, width), (width, vocab_size)]


def roofline(tokens: int, inputs: int, outputs: int, peak: float, bandwidth: float, fused: bool) -> float:
    """The speed-up of forward and backward that hardware allows. peak: bf16 FLOP/s, doubled by FP8; bandwidth: bytes/s."""
    x, w, y = tokens * inputs, inputs * outputs, tokens * outputs  # elements

    def product(flops_per_second, read_and_written):
        return max(2 * tokens * inputs * outputs / flops_per_second, read_and_written / bandwidth)
    bf16 = product(peak, 2 * (x + w + y)) * 3 + 2 * 6 * w / bandwidth  # the weight and its gradient between fp32 and bf16
    casts = (4 if fused else 6) * (x + y) / bandwidth                  # read 2 bytes, write 1 twice; and read 2 before that
    fp8 = sum(product(2 * peak, size) for size in (x + w + 2 * y, y + w + 2 * x, x + y + 4 * w))
    return bf16 / (fp8 + casts)


def main() -> None:
    flags, = parse([BenchFlags], prog="python -m dev.bench.fp8_linear")
    import torch

    from nanochat.benchmarks.result_file import make_result, write_json
    from nanochat.fp8 import refresh_weights
    from nanochat.runtime import timing
    from nanochat.runtime.compute_dtype import pick_compute_dtype
    from nanochat.runtime.device import device_name, init_device, peak_flops
    from nanochat.runtime.nvidia import words
    started = time.monotonic()
    device, _ = init_device(flags.device_type)
    dtype, _ = pick_compute_dtype(device, flags.dtype)
    backends = ["custom"] + (["torchao"] if importlib.util.find_spec("torchao") else [])
    if "torchao" not in backends:
        print0("torchao is not installed, so it is not timed (pip install torchao)")
    peak, bandwidth = peak_flops(device), {words(card): b for card, b in BANDWIDTH.items()}.get(words(device_name(device)))
    results, rows = {}, []

    def measure(inputs, outputs, tokens, compiled):
        """{layer: {forward, forward_backward}} in seconds per call, and the seconds of a cast of the weight."""
        torch._dynamo.reset()
        layers = {}
        for backend in backends:
            layers["bf16"], layers[backend] = layers_to_time(
                inputs, outputs, Fp8Flags(fp8_backend=backend, fp8_fast_accum=flags.fast_accum), device)
        x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
        g = torch.randn(tokens, outputs, device=device, dtype=dtype)
        variants = {"cast": lambda: [refresh_weights([layers["custom"]]) for _ in range(flags.calls)]}
        for name, layer in layers.items():
            forward = torch.compile(layer, dynamic=False, fullgraph=True) if compiled else layer
            variants[name, "forward"] = lambda f=forward: [f(x) for _ in range(flags.calls)] and None
            variants[name, "forward_backward"] = lambda f=forward, w=layer.weight: [
                torch.autograd.grad(f(x), (x, w), g) for _ in range(flags.calls)] and None
        times = timing.time_in_turn(variants, device, flags.repeats, queued=True)
        seconds = {key: timing.spread([t / flags.calls for t in spent]) for key, spent in times.items()}
        cast = seconds.pop("cast")
        return {name: {call: seconds[name, call] for call in CALLS} for name in layers}, cast

    for preset in flags.preset:
        for tokens in flags.tokens or [PRESETS[preset][-1]]:
            for inputs, outputs in shapes_of(preset):
                for mode in flags.modes:
                    seconds, cast = measure(inputs, outputs, tokens, mode == "compiled")
                    limits = {name: roofline(tokens, inputs, outputs, peak, bandwidth, fused) if peak and bandwidth else None
                              for name, fused in (("roofline", False), ("fused", True))}
                    ratios = {f"{backend} {call}": seconds["bf16"][call]["median"] / seconds[backend][call]["median"]
                              for call in CALLS for backend in backends}
                    results[f"{preset} {inputs}->{outputs} {tokens} tokens {mode}"] = {
                        "inputs": inputs, "outputs": outputs, "tokens": tokens, "mode": mode, "speedup": ratios, **limits,
                        "seconds": seconds, "weight_cast_seconds": cast}
                    rows.append({"preset": preset, "inputs": inputs, "outputs": outputs, "tokens": tokens, "mode": mode,
                                 "bf16 ms": f"{1000 * seconds['bf16']['forward_backward']['median']:.3f}",
                                 **{name.replace("forward_backward", "f+b"): f"{ratio:.2f}" for name, ratio in ratios.items()},
                                 **{name: limit and f"{limit:.2f}" for name, limit in limits.items()},
                                 "cast ms": f"{1000 * cast['median']:.3f}"})
    print(format_table(rows))
    write_json(flags.json_out, make_result("dev/bench/fp8_linear.py", device, vars(flags) | {"dtype": str(dtype)}, results,
                                           time.monotonic() - started))


if __name__ == "__main__":
    cli(main)
