"""What a machine can do, found by trying it: the findings of `python -m scripts.doctor`, and the checks that need no model.

A check is a function that returns findings. What it raises becomes a finding, too: a check never ends the diagnosis. torch is
imported where it is used, as the first finding may be that it is missing.
"""

import getpass
import io
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.cli.paths import unwritable_reason
from nanochat.common import BASE, UserError, get_base_dir
from nanochat.recipe.memory_estimate import gib, host_memory
from nanochat.runtime.other_load import SPOILT, OtherLoad

if TYPE_CHECKING:
    import torch

OK, SLOW, MISSING, NOT_HERE = "ok", "slow", "missing", "-"  # the last: this hardware has none, and nothing can be done about it
NAME_WIDTH = 22
REQUIRED = ("torch", "numpy", "tiktoken", "tokenizers", "safetensors")
OPTIONAL = {  # module -> (what pip installs, what for)
    "matplotlib": ("matplotlib", "loss.png, reports of the lab"), "scipy": ("scipy", "verdicts of the lab"),
    "datasets": ("'datasets>=5'", "text of the Hugging Face hub"), "pyarrow": ("pyarrow", ".parquet and .arrow"),
    "zstandard": ("zstandard", ".zst"), "yaml": ("pyyaml", "the CORE metric"), "wandb": ("wandb", "--tracker wandb"),
    "tensorboard": ("tensorboard", "--tracker tensorboard"), "trackio": ("trackio", "--tracker trackio"),
    "torchao": ("torchao", "--fp8-backend torchao"), "rich": ("rich", "the live view, --ui rich")}
DISK_BYTES, DISK_SECONDS = 2**26, 2.0  # that are written at most to time the disk
SLOW_DISK = 50e6         # bytes per second: a checkpoint of d12 takes a minute
LITTLE_ROOM = 2**30      # bytes
SLOW_CLOCK = 0.6         # share of the highest clock


@dataclass(frozen=True)
class Finding:
    """What a check has found. detail: for the reader, with what to do where something is missing or slow.

    numbers: what was measured.   required: nothing can be trained unless the status is `ok` or `slow`.
    """
    name: str
    status: str
    detail: str
    numbers: dict = field(default_factory=dict)
    required: bool = False

    @property
    def prevents_training(self) -> bool:
        return self.required and self.status not in (OK, SLOW)

    def line(self) -> str:
        return f"{self.name.ljust(NAME_WIDTH)}  {self.status.ljust(len(MISSING))}  {self.detail}".rstrip()


def findings_of(name: str, check: Callable[[], Iterable[Finding]], required: bool = False) -> list[Finding]:
    """Run a check in silence. Where it fails, that is its one finding, under `name`. User name and home folder are replaced."""
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(check())
    except Exception as e:  # a kernel on an unsupported device may raise anything
        kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
        found = [Finding(name, MISSING, kind + (str(e).strip() or "no message").splitlines()[0], {}, required)]
    return [Finding(f.name, f.status, anonymous(f.detail), f.numbers, f.required) for f in found]


def anonymous(text: str, home: str | None = None, user: str | None = None) -> str:
    """The text with `~` for the home folder and USER for the user's name, wherever it is a word of its own."""
    home = os.path.expanduser("~") if home is None else home
    if len(home) > 1:
        text = re.sub(re.escape(home.rstrip("/")) + r"(?![\w-])", "~", text)
    try:
        user = getpass.getuser() if user is None else user
    except (KeyError, ImportError, OSError):  # a number without a name
        return text
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", text) if user and user != "root" else text


def as_json(findings: list[Finding]) -> dict:
    return {"schema_version": 1, "can_train": not any(f.prevents_training for f in findings),
            "findings": [asdict(f) for f in findings]}


# ---- software

def software() -> Iterable[Finding]:
    """The system, Python, and the packages without which nothing runs."""
    yield Finding("system", OK, f"{platform.system()} {platform.release()}, {platform.machine()}, Python "
                                f"{platform.python_version()}")
    for name in REQUIRED:
        try:
            import_module(name)
            yield Finding(f"package {name}", OK, version_of(name), {}, True)
        except ImportError as e:  # not there, or a library that it needs is not
            yield Finding(f"package {name}", MISSING, f"{str(e).splitlines()[0]}. pip install {name}; or, in the checkout, all "
                          "that is needed: pip install -e .", {}, True)


def optional_packages() -> Iterable[Finding]:
    """Whether they are there; some take seconds to import."""
    for module, (package, purpose) in OPTIONAL.items():
        there = find_spec(module) is not None
        yield Finding(f"package {module}", OK if there else MISSING,
                      f"{version_of(package)} ({purpose})" if there else f"for {purpose}: pip install {package}")


def version_of(package: str) -> str:
    try:
        return metadata.version(re.findall(r"[\w-]+", package)[0])
    except metadata.PackageNotFoundError:
        return "version unknown"


def cpp_compiler() -> Iterable[Finding]:
    """Compiled, loaded and called."""
    from torch._inductor.codecache import CppCodeCache

    from nanochat.runtime.toolchain import failure_reason, prepare_compiler
    nonce = time.time_ns() % 2**31  # a program that no cache holds

    def attempt():
        prepare_compiler()
        assert CppCodeCache.load(f'extern "C" int answer() {{ return {nonce}; }}').answer() == nonce
    started = time.perf_counter()
    why, seconds = failure_reason(attempt), time.perf_counter() - started
    yield Finding("C++ compiler", MISSING if why else OK, why or f"{seconds:.1f} s for a function", {"seconds": seconds})


def torch_compile(device: "torch.device") -> Iterable[Finding]:
    from nanochat.runtime.compilation import compile_unavailable_reason
    started = time.perf_counter()
    why, seconds = compile_unavailable_reason(device), time.perf_counter() - started
    yield Finding("torch.compile", MISSING if why else OK,
                  f"{why}; until then --no-compile" if why else f"{seconds:.1f} s for a function", {"seconds": seconds})


def triton(device: "torch.device") -> Iterable[Finding]:
    from nanochat.runtime.toolchain import triton_unavailable_reason
    if device.type != "cuda":
        yield Finding("Triton", NOT_HERE, f"its kernels are for NVIDIA GPUs, and the device is {device.type}")
    else:
        why = triton_unavailable_reason()
        yield Finding("Triton", MISSING if why else OK, why or "a kernel was launched")


# ---- hardware

def device_and_memory(device: "torch.device") -> Iterable[Finding]:
    import torch

    from nanochat.runtime.cores import cpu_quota
    from nanochat.runtime.device import device_name
    from nanochat.runtime.nvidia import unseen_gpu_reason
    why_unseen = None if device.type == "cuda" else unseen_gpu_reason(torch.version.cuda)
    yield Finding("device", OK, device_name(device), {"type": device.type}, True)
    if why_unseen:
        yield Finding("NVIDIA GPU", MISSING, why_unseen)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield Finding("GPU memory", OK if free > 0.9 * total else SLOW, f"{gib(free)} free of {gib(total)}"
                      + ("" if free > 0.9 * total else ": other programs have the rest"), {"free": free, "total": total})
    free, total = host_memory(available=True), host_memory(available=False)
    yield Finding("memory", OK if free > LITTLE_ROOM else SLOW, f"{gib(free)} available of {gib(total)}"
                  + ("" if free > LITTLE_ROOM else ": close other programs"), {"available": free, "total": total})
    threads, cores, quota = torch.get_num_threads(), os.cpu_count(), cpu_quota()
    limited = f", of which this container may use {quota}" if quota else ""
    yield Finding("threads", OK, f"torch uses {threads}; the system has {cores}{limited}"
                  + (" (OMP_NUM_THREADS is set)" if "OMP_NUM_THREADS" in os.environ else ""),
                  {"torch": threads, "system": cores, "quota": quota})


def clock_rate(cpus: Path = Path("/sys/devices/system/cpu"), info: Path = Path("/proc/cpuinfo")) -> Iterable[Finding]:
    """The processor's clock at this moment, best just after it was busy. Linux only; many virtual machines do not say it."""
    try:
        now, most = [max(int(path.read_text()) for path in cpus.glob(f"cpu[0-9]*/cpufreq/{name}")) / 1000
                     for name in ("scaling_cur_freq", "cpuinfo_max_freq")]
        slow = now < SLOW_CLOCK * most
        yield Finding("clock", SLOW if slow else OK, f"{now:,.0f} MHz of at most {most:,.0f}"
                      + (": plug in the charger, choose the power profile for speed, or cool it" if slow else ""),
                      {"mhz": now, "mhz_at_most": most})
    except (OSError, ValueError):
        try:
            now = max(float(rate) for rate in re.findall(r"^cpu MHz\s*: ([\d.]+)", info.read_text(), re.MULTILINE))
            yield Finding("clock", OK, f"{now:,.0f} MHz", {"mhz": now})
        except (OSError, ValueError):
            yield Finding("clock", NOT_HERE, "this system does not say it")


def disk(folder: Path | None = None) -> Iterable[Finding]:
    """Room and speed where the runs are kept: a file is written, synced and deleted."""
    folder = folder or get_base_dir()
    if trouble := unwritable_reason(folder):
        yield Finding("base directory", MISSING, f"{trouble}. Set {BASE} to a folder you can write to", {}, True)
        return
    free = shutil.disk_usage(folder).free
    yield Finding("base directory", OK if free > LITTLE_ROOM else SLOW, f"{folder}: {gib(free)} free"
                  + ("" if free > LITTLE_ROOM else f". Make room, or set {BASE} to another disk"), {"free": free}, True)
    rate = write_rate(folder, min(DISK_BYTES, free // 4))
    yield Finding("disk", OK if rate > SLOW_DISK else SLOW, f"writes {rate / 1e6:,.0f} MB/s"
                  + ("" if rate > SLOW_DISK else f": checkpoints will take long. Set {BASE} to a folder on a faster disk"),
                  {"bytes_per_sec": rate})


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second, for a file of at most so many bytes."""
    path, block, written = folder / f".doctor-{os.getpid()}", os.urandom(2**20), 0
    try:
        started = time.perf_counter()
        with open(path, "wb", buffering=0) as f:
            while written < size and time.perf_counter() - started < DISK_SECONDS:
                written += f.write(block)
            os.fsync(f.fileno())
        return written / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def other_programs(load: OtherLoad) -> Iterable[Finding]:
    """load: began with the diagnosis, so it says how much its figures are worth."""
    share = load.share()
    if share is None:
        yield Finding("other programs", NOT_HERE, "this system does not say what they use")
    else:
        yield Finding("other programs", SLOW if share > SPOILT else OK, f"used {share:.0%} of the processor meanwhile"
                      + (": the rates above are too low. Close them" if share > SPOILT else ""), {"share": share})
