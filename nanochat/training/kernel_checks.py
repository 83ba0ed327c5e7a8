"""Checks of `python -m scripts.doctor` that need the library's kernels: each is launched, compared with its reference by its own
test (`..._unavailable_reason`), and timed."""

import math
from collections.abc import Iterable

import torch

from nanochat.features import FEATURES
from nanochat.flash_attention import BACKENDS, FULL, backend_unavailable_reason, choose_backend
from nanochat.kernels.cpp_kernels import FOLDER, cpp_unavailable_reason
from nanochat.runtime.diagnosis import MISSING, NOT_HERE, OK, SLOW, Finding
from nanochat.runtime.tuner import measure
from nanochat.training.config import parse_config
from nanochat.training.plan_probe import make_trainer

FP8_SIZE = {"cuda": 4096}       # of the products of square matrices; elsewhere small, as some CPUs take very long
HEAD_DIM, LENGTH, WINDOW = 64, 512, 128  # of the attention that is timed
ONLY_ON = {"fa3": "cuda", "fa4": "cuda", "varlen": "cuda", "cudnn": "cuda", "native": "cpu", "brgemm": "cpu"}
TINY = ("--depth=2 --max-seq-len=64 --head-dim=64 --device-batch-size=4 --total-batch-size=512 --num-iterations=9 --no-compile "
        "--vocab-size=512").split()


def fp8(device: torch.device, bf16_rate: float | None) -> Iterable[Finding]:
    """A product in FP8. bf16_rate: of the same device, in FLOP/s, which it has to beat."""
    size = FP8_SIZE.get(device.type, 256)
    a, b = (torch.ones(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product():
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
    try:
        right = bool((product() == size).all())
    except Exception as e:  # what a device without FP8 raises differs
        yield Finding("FP8", NOT_HERE, f"{str(e).strip().splitlines()[0][:120]}. Leave --fp8 out")
        return
    rate = 2 * size**3 / measure({"fp8": product}, device)["fp8"]
    pays = bf16_rate is None or rate > bf16_rate
    said = f"{rate / 1e9:,.0f} GFLOP/s" + ("" if pays else f", which is less than in bf16: leave --fp8 out (products of {size})")
    yield Finding("FP8", (OK if pays else SLOW) if right else MISSING, said if right else "the result is wrong: leave --fp8 out",
                  {"flops_per_sec": rate})


def cpp_kernels() -> Iterable[Finding]:
    """Those of nanochat/kernels/cpp, compiled and called. A reason that several have is one finding."""
    reasons: dict[str | None, list[str]] = {}
    for path in sorted(FOLDER.glob("*.cpp")):
        reasons.setdefault(cpp_unavailable_reason(path.stem), []).append(path.stem)
    for why, names in reasons.items():
        status = OK if not why else NOT_HERE if "are for CPUs with" in why else MISSING
        yield Finding("C++ kernels", status, ", ".join(names) + (f": {why}" if why else ""))


def attention(device: torch.device, dtype: torch.dtype) -> Iterable[Finding]:
    """Every backend, forward and backward, with and without a window; the times of those that a run chooses from."""
    times = {window: choose_backend(device, dtype, HEAD_DIM, LENGTH, window, rows=2, heads=4).milliseconds
             for window in (FULL, WINDOW)}
    for name, (_, full, windows) in BACKENDS.items():
        problems = [window for window, there in ((FULL, full), (WINDOW, windows)) if there]
        reasons = [backend_unavailable_reason(name, window != FULL, device.type, dtype, HEAD_DIM) for window in problems]
        took = {"full context" if window == FULL else "window": times[window][name] for window in problems
                if name in times[window]}
        why = next(filter(None, reasons), None)
        if why:
            if (kind := ONLY_ON.get(name, device.type)) != device.type:
                yield Finding(f"attention {name}", NOT_HERE, f"for devices of type {kind}")
            else:
                yield Finding(f"attention {name}", NOT_HERE if why.startswith("only for NVIDIA GPUs") else MISSING, why)
        else:
            yield Finding(f"attention {name}", OK, ", ".join(f"{kind} {ms:.3g} ms" for kind, ms in took.items())
                          or "works; not among those that a run chooses from", {"milliseconds": took})


def training_steps(device: torch.device, dtype_flag: str) -> Iterable[Finding]:
    """Three optimizer steps of a tiny model."""
    config = parse_config(FEATURES, [*TINY, f"--device-type={device.type}", f"--dtype={dtype_flag}"])
    trainer = make_trainer(config, config.model.shape(config.data.vocab_size))
    results = [trainer.finalize_step(trainer.launch_step()) for _ in range(3)]
    trainer.loader.close()
    losses, seconds = [r.loss for r in results], min(r.time.total for r in results)
    if not all(map(math.isfinite, losses)):
        yield Finding("training", MISSING, f"losses that are no numbers: {losses}. Try --dtype=float32", {}, True)
    else:
        yield Finding("training", OK, f"a tiny model takes {1000 * seconds:.3g} ms for a step", {"seconds": seconds}, True)
