"""NVIDIA's cards and drivers: the peak rate of a card, and why torch may not see one that is there. Without torch."""

import os
import re
import shutil
import subprocess
from pathlib import Path

# Dense bf16 tensor-core peaks in FLOP/s with fp32 accumulation, which is what training uses, by the whole name that the driver
# gives. A part of a name would fit other cards, too: laptop chips, Ti, SUPER and D, PCIe and NVL differ in their rates. Cards
# whose rate NVIDIA has not published, or not for this name, are not here: no MFU is better than a wrong one.
PEAK_BF16_FLOPS = {
    # Datasheets HGX B200, GH200, H200, H100. They give the rate with sparsity, which is twice the dense one.
    "B200": 2250e12,
    "GH200 480GB": 989e12, "GH200 144G HBM3e": 989e12,
    "H200": 989e12, "H200 NVL": 835e12,
    "H100 80GB HBM3": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    # Datasheets A100, A40, A10, L40S, L40, L4
    "A100-SXM4-40GB": 312e12, "A100-SXM4-80GB": 312e12, "A100-PCIE-40GB": 312e12, "A100 80GB PCIe": 312e12,
    "A40": 149.7e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    # Whitepapers "NVIDIA Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture", "NVIDIA RTX Blackwell GPU Architecture"
    "RTX A6000": 154.8e12, "GeForce RTX 3090": 71e12,
    "GeForce RTX 3090 Ti": 80e12, "GeForce RTX 4090": 165.2e12, "GeForce RTX 4080": 97.5e12,
    "GeForce RTX 5090": 209.5e12,
}
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # for each CUDA; docs.nvidia.com/deploy/cuda-compatibility, minor versions, table 1
OLDER_CUDA = 12, "https://download.pytorch.org/whl/cu126"  # torch for an older CUDA: its major version, where it is


def words(name: str) -> tuple[str, ...]:
    """The words of a card's name, without the maker's, which old drivers leave out."""
    return tuple(word for word in re.findall(r"[a-z0-9]+", name.lower()) if word != "nvidia")


PEAK_BY_WORDS = {words(name): flops for name, flops in PEAK_BF16_FLOPS.items()}


def peak_bf16_flops(name: str) -> float | None:
    """The dense bf16 peak in FLOP/s of the card with this name; None where it is not known."""
    return PEAK_BY_WORDS.get(words(name))


def unseen_gpu_reason(cuda: str | None, version_file: Path = Path("/proc/driver/nvidia/version"),
                      smi: str = "nvidia-smi") -> str | None:
    """Why torch, built for this version of CUDA, sees no GPU although an NVIDIA driver is installed, and what to do, in a line.
    None without such a driver, for a torch without CUDA, and where the user hides the GPUs.

    version_file, smi: where the driver's version stands; the program that is asked for it where there is no such file (WSL).
    """
    if cuda is None or hides_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) or not (version_file.exists() or shutil.which(smi)):
        return None
    driver, built = driver_version(version_file, smi), f"this torch is built for CUDA {cuda}"
    if driver is None:
        return f"an NVIDIA driver is installed, but does not run ({built}). See what nvidia-smi says"
    major, needed = int(driver.split(".")[0]), OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if major >= needed:
        return (f"{built} and sees no GPU through the NVIDIA driver {driver}. See what nvidia-smi says; start a container with "
                "--gpus all; restart the machine after an update of its driver")
    older, index = OLDER_CUDA
    instead = f", or a torch for an older CUDA: pip install --force-reinstall torch --index-url {index}"
    return (f"the NVIDIA driver {driver} is too old: {built}. Install driver {needed} or later"
            + (instead if major >= OLDEST_DRIVER[older] else ""))


def hides_gpus(visible: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES, None where it is not set, leaves no GPU."""
    return visible is not None and (not visible.strip() or visible.strip().startswith("-"))


def driver_version(version_file: Path, smi: str) -> str | None:
    """The version of the NVIDIA driver; None where nothing tells it."""
    try:
        text = version_file.read_text(errors="replace")
    except OSError:
        try:
            text = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
                                  errors="replace", timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)  # versions of compilers, which may follow, are shorter
    return found and found[0]
