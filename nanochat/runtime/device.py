"""The machine as seen by torch: which device, which compute dtype and why, the allocator, real peak memory."""

import ctypes
import os
import platform
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from nanochat.common import RankError, UserError, print0
from nanochat.runtime.distributed import Ranks, join_process_group
from nanochat.runtime.nvidia import peak_bf16_flops, unseen_gpu_reason

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def autodetect_device_type() -> str:
    """`cuda`, else `mps`, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device_type(device_type: str) -> str:
    """The device type to use for `--device-type` ('' = autodetect). UserError where the machine has no such device. A GPU that
    is there and cannot be used is never passed over in silence."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    unseen = unseen_gpu_reason(torch.version.cuda) if device_type in ("", "cuda") and not available["cuda"] else None
    if not device_type:
        if unseen:
            print0(f"the GPU is not used: {unseen}")
        return autodetect_device_type()
    if not available[device_type]:
        have = ", ".join(name for name, there in available.items() if there)
        why = unseen or "this machine (or this build of torch) has no such device"
        raise UserError(f"--device-type {device_type}: {why}. Available: {have}; leave the flag out to take the best one.")
    return device_type


def init_device(device_type: str = "") -> tuple[torch.device, Ranks]:
    """Choose the device and, under torchrun, join the process group (NCCL on CUDA, Gloo elsewhere)."""
    device_type = check_device_type(device_type)
    ranks = Ranks.from_environment()
    device = torch.device(device_type, ranks.local_rank) if device_type == "cuda" else torch.device(device_type)
    keep_large_buffers()
    if device_type == "cpu" and ranks.local_world_size > 1:
        take_cores(ranks.local_rank, ranks.local_world_size)
    elif "OMP_NUM_THREADS" not in os.environ and (cores := cpu_quota()) and cores < torch.get_num_threads():
        torch.set_num_threads(cores)
    if device_type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise RankError(f"rank {ranks.rank} has no GPU of its own: this machine has {torch.cuda.device_count()}. Start as "
                            "many processes (--nproc_per_node), or fewer.")
        let_segments_grow()
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in fp32
    join_process_group(ranks, device)
    return device, ranks


def take_cores(local_rank: int, processes: int, system: Path = Path("/sys/devices/system/cpu")) -> None:
    """Of several processes of one machine, keep this one to its share of the cores, with as many threads: neighbours of one
    memory node, so that its weights are near. Linux only, and where each has a core of its own.

    torchrun sets OMP_NUM_THREADS=1, whatever the number of cores; another value counts.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0), key=lambda core: place_of_core(system / f"cpu{core}"))
    share = cores[len(cores) * local_rank // processes:len(cores) * (local_rank + 1) // processes]
    if len(cores) >= processes:
        os.sched_setaffinity(0, share)
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(min(len(share), max(1, (cpu_quota() or len(cores)) // processes)))


def place_of_core(folder: Path) -> tuple[int, ...]:
    """Memory node, physical core, number: sorted by it, neighbours are near each other."""
    node = next((int(path.name[4:]) for path in folder.glob("node[0-9]*")), 0)
    try:
        core = int((folder / "topology/core_id").read_text())
    except (OSError, ValueError):
        core = 0
    return node, core, int(folder.name[3:])


def cpu_quota(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores that the control group of a container grants, at least 1; None without a limit. torch counts those of the machine:
    the threads beyond the quota would make all of them wait."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of control groups version 2, and 1
        try:
            quota, period = [word for name in files for word in (group / name).read_text().split()]
            return None if int(quota) <= 0 else max(1, -(-int(quota) // int(period)))
        except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
            continue
    return None


def let_segments_grow(os_release: Path = Path("/proc/sys/kernel/osrelease")) -> None:
    """Let torch's CUDA allocator lengthen what it has instead of taking new pieces that leave holes: 8 % less memory held in a
    d12 run (dev/LOG.md). Before the first allocation; settings of the user's own stay. Not under WSL, where the first
    allocation may fail that way (pytorch/pytorch#192330)."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys() and not is_wsl(os_release):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def is_wsl(os_release: Path) -> bool:
    """Whether this is the Windows Subsystem for Linux: Microsoft's kernels have its name in their release."""
    try:
        return "microsoft" in os_release.read_text().lower()
    except OSError:
        return False


def keep_large_buffers() -> None:
    """Let glibc reuse the memory of large temporaries instead of giving it back to the system at every free.

    By default each large tensor is mapped, faulted in page by page and unmapped again, tens of thousands of faults a
    training step: 14 % of its time on two cores (dev/LOG.md). Elsewhere than on glibc there is nothing to set.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Give the system the memory that is free in this process, which `keep_large_buffers` holds: what reading text and trying
    kernels took, and training does not need: 50 of the 694 MiB of a first run of d2 (dev/LOG.md)."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def cpu_multiplies_bf16() -> bool:
    """True where the processor has native bf16 matrix arithmetic: AVX512-BF16 or AMX."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def pick_compute_dtype(device: torch.device, requested: str = "auto") -> tuple[torch.dtype, str]:
    """The dtype that activations and matrix products use, and the reason in words.

    In order: `requested` (the flag `--dtype`), `$NANOCHAT_DTYPE`, then bf16 where the hardware multiplies it
    natively, else fp32. fp16 is never chosen by itself: it needs a gradient scaler.
    """
    environment = os.environ.get("NANOCHAT_DTYPE", "")
    for name, origin in ((requested, "--dtype"), (environment, "NANOCHAT_DTYPE")):
        if name and name != "auto":
            if name not in DTYPES:
                raise UserError(f"{origin}={name}: choose one of {', '.join(DTYPES)}.")
            if name == "float16" and device.type == "cpu":
                raise UserError(f"{origin}=float16 trains on a GPU only; on a CPU choose bfloat16 or float32.")
            return DTYPES[name], f"set by {origin}"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU is sm_80 or newer"
        return torch.float32, "the GPU is older than sm_80 and has no bf16 units"
    if device.type == "cpu" and cpu_multiplies_bf16():
        return torch.bfloat16, "the CPU multiplies bf16 natively"
    return torch.float32, f"no known fast bf16 on this {device.type}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """What a reader of a result wants to know of the hardware: the GPU's name, or the CPU's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (mps)"
    return f"{_cpu_model()} ({torch.get_num_threads()} threads)"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 datasheet peak in FLOP/s; None where it is not known (every CPU), so no MFU is claimed."""
    if device.type != "cuda":
        return None
    return peak_bf16_flops(torch.cuda.get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a host clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class PeakMemory:
    """Peak memory in MiB, real on every device: allocator peak on CUDA, peak resident set on a CPU.

    MPS has no peak counter, so there the driver's allocation is sampled each time `step_peak` is asked.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def step_peak(self) -> float:
        """The peak since the last call on CUDA, else the peak so far."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "mps":
            now = torch.mps.driver_allocated_memory() / 2**20
        else:
            now = peak_resident() / 2**20
        return now


def peak_resident() -> int:
    """Bytes of main memory that this process has had at most."""
    try:
        with open("/proc/self/status") as f:  # getrusage would count the process that started this one, too
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 2**10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 2**10  # bytes on macOS, KiB elsewhere


@contextmanager
def evaluation(model):
    """Evaluate `model` uncompiled, without gradients, and leave its mode as it was. Compiled graphs are not touched."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        model.train(was_training)
