"""Peak rates by the names that drivers give, and one line where a driver does not serve torch."""

import pytest

from nanochat.runtime.nvidia import PEAK_BF16_FLOPS, peak_bf16_flops, unseen_gpu_reason, words


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA B200", 2250), ("NVIDIA GH200 480GB", 989),
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H20", None),
    ("NVIDIA A100-SXM4-40GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA A10", 125), ("NVIDIA A10G", None), ("NVIDIA A40", 149.7), ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA RTX A6000 Laptop GPU", None), ("NVIDIA RTX 6000 Ada Generation", None),
    ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L40G", None),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("GeForce RTX 3090", 71),
    ("NVIDIA GeForce RTX 4080", 97.5), ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA GeForce RTX 4080 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 5090 D", None), ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
    ("Tesla T4", None), ("Tesla V100-SXM2-16GB", None), ("AMD Instinct MI300X", None), ("", None),
])
def test_a_card_has_its_own_rate_or_none(name, teraflops):
    assert peak_bf16_flops(name) == (teraflops and pytest.approx(teraflops * 1e12))


def test_no_two_cards_of_the_table_share_their_words():
    assert len({words(name) for name in PEAK_BF16_FLOPS}) == len(PEAK_BF16_FLOPS)


PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-I3-AE18-23-3)
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""
OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 14:37:44 UTC 2024\n"
CU126 = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"


@pytest.fixture(autouse=True)
def visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def program(tmp_path, prints: str, status: int = 0) -> str:
    (path := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("text, cuda, told, untold", [
    (PROPRIETARY, "13.0", ["driver 535.183.01 is too old", "CUDA 13.0", "driver 580 or later", CU126], "nvidia-smi"),
    (OLD, "13.0", ["driver 470.256.02 is too old", "driver 580 or later"], "pip"),
    (OLD, "12.8", ["driver 470.256.02 is too old", "CUDA 12.8", "driver 525 or later"], "pip"),
    (OPEN, "13.0", ["CUDA 13.0", "driver 580.65.06", "nvidia-smi", "--gpus all"], "too old"),
    (PROPRIETARY, "99.1", ["CUDA 99.1", "driver 535.183.01", "nvidia-smi"], "too old"),
    ("no version at all\n", "13.0", ["does not run", "CUDA 13.0", "nvidia-smi"], "too old"),
])
def test_a_driver_that_does_not_serve_torch(tmp_path, text, cuda, told, untold):
    (file := tmp_path / "version").write_text(text)
    said = unseen_gpu_reason(cuda, file, "no-such-program")
    assert all(part in said for part in told) and untold not in said and len(said.splitlines()) == 1


def test_without_the_file_nvidia_smi_is_asked(tmp_path):
    missing = tmp_path / "version"
    assert "driver 552.44 is too old" in unseen_gpu_reason("13.0", missing, program(tmp_path, "552.44\n552.44"))
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert "does not run" in unseen_gpu_reason("13.0", missing, program(tmp_path, failed, status=9))


@pytest.mark.parametrize("hidden", ["", " ", "-1"])
def test_there_is_nothing_to_say(tmp_path, monkeypatch, hidden):
    """Without a driver, for a torch without CUDA, and where the user hides the GPUs."""
    (file := tmp_path / "version").write_text(PROPRIETARY)
    assert unseen_gpu_reason("13.0", tmp_path / "none", "no-such-program") is None
    assert unseen_gpu_reason(None, file, "no-such-program") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert unseen_gpu_reason("13.0", file, "no-such-program")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert unseen_gpu_reason("13.0", file, "no-such-program") is None
