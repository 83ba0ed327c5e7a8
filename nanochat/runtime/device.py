"""The machine as seen by torch: which device, the allocator, real peak memory."""

import ctypes
import os
import platform
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from nanochat.common import RankError, UserError, print0
from nanochat.runtime.cores import cpu_quota, take_cores
from nanochat.runtime.distributed import Ranks, join_process_group
from nanochat.runtime.nvidia import peak_bf16_flops, unseen_gpu_reason


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
