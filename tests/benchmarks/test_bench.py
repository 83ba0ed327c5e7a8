"""The bench of a training step: a breakdown that adds up, kernel categories, interleaved pairs, flags checked first."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import record_function

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # dev/ is not installed

from dev.bench import inference, train_step
from nanochat.benchmarks import profiler
from nanochat.benchmarks.yardsticks import external_rate, make_instruction_loop
from nanochat.common import UserError
from nanochat.gpt import rms_norm
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.cross_entropy import softcapped_cross_entropy
from nanochat.runtime.compilation import compile_unavailable_reason

CPU = torch.device("cpu")
TINY = ("--dtype float32 --device-type cpu -- --depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 64 --vocab-size 300 "
        "--device-batch-size 4 --total-batch-size 512").split()
SMALLER = "--no-compile --total-batch-size=256"
TRAINER = """import os, sys
with open(sys.argv[1], "a") as f: f.write(os.environ["NANOCHAT_BASE_DIR"] + "\\n")
for rate in ("1", "2", "3", "1,000", "2,000.0", "9,000"): print(f"step 1 | tok/sec: {rate} | loss 2.0")
sys.exit(int(sys.argv[2]))
"""


def run_bench(monkeypatch, folder, *arguments):
    """Run it in this process -> the JSON, which must be strict."""
    path = folder / "out.json"
    monkeypatch.setattr(sys, "argv", ["train_step", "--json-out", str(path), *arguments])
    train_step.main()
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def measured(base):
    """A tiny model timed in two variants against a trainer that prints fixed numbers: JSON, output, the trainer's starts."""
    (base / "trainer.py").write_text(TRAINER)
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(io.StringIO()) as printed:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))  # the bench changes it
        other = f"{sys.executable} {base / 'trainer.py'} {base / 'starts'} 0"
        result = run_bench(monkeypatch, base, "--variants", "eager", "--with", SMALLER, "--repeats=2", "--rounds=2",
                           "--against", other, *TINY, f"--data={base / 'text'}")
    return result, printed.getvalue(), (base / "starts").read_text().split()


@pytest.mark.slow
def test_evaluation_and_sampling_beside_a_step(base, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))  # the bench changes it
    monkeypatch.setattr(sys, "argv", ["inference", f"--json-out={base / 'inference.json'}", "--repeats=2", *TINY, "--no-compile",
                                      f"--data={base / 'text'}"])
    inference.main()
    results, printed = json.loads((base / "inference.json").read_text())["results"], capsys.readouterr().out
    names = "training step", "evaluation, PyTorch's", "evaluation", "sampling, as built", "sampling", "reading the weights"
    assert all(results[name]["seconds"]["n"] == 2 and results[name]["tok_per_sec"] > 0 and name in printed for name in names)
    assert [results[name]["tokens"] for name in names] == [512, 256, 256, 1, 1, 1]
    assert results["weights_bytes"] == 4 * 2 * (12 * 32**2) + 4 * (12 * 2) + 4 * 320 * 32


# --- the breakdown ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_breakdown_of_a_real_step(measured):
    for row in measured[0]["results"].values():
        parts = row["breakdown_ms"]
        assert tuple(parts) == profiler.CATEGORIES
        assert all(parts[name] > 0 for name in profiler.CATEGORIES if name != "other"), parts
        assert sum(parts.values()) == pytest.approx(1000 * row["seconds"]["median"], rel=1e-6)
        assert parts["other"] < 0.02 * sum(parts.values()), row["breakdown_unknown"]


def parts_of(step):
    """The categories in which a step spends time, host aside."""
    parts, unknown = profiler.breakdown(step, CPU, 0.01, steps=1)
    assert sum(parts.values()) == pytest.approx(10) and not unknown
    return {name for name, ms in parts.items() if ms > 0} - {"host"}


def test_a_product_has_the_category_of_what_runs_it():
    x = torch.randn(4, 32, 32)
    matrix = x[0]

    @record_function(f"{profiler.UPDATE}muon")
    def muon():
        return x @ x + matrix @ matrix
    assert parts_of(muon) == {"muon"}
    assert parts_of(lambda: matrix.mm(matrix)) == {"gemms"}
    assert parts_of(lambda: x.bmm(x)) == {"attention"}
    assert parts_of(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x)) == {"attention"}
    assert parts_of(lambda: torch.log_softmax(x, -1)) == {"loss"}
    assert parts_of(lambda: x.exp()) == {"norms_elementwise"}


def test_the_breakdown_of_a_compiled_step():
    if trouble := compile_unavailable_reason(CPU):
        pytest.skip(f"no compiler: {trouble}")
    head, table = torch.nn.Linear(32, 64, bias=False), torch.randn(64, 32, requires_grad=True)
    idx = torch.randint(64, (4, 16))

    @torch.compile
    def loss():
        return softcapped_cross_entropy(rms_norm(table[idx]), head, idx, 64)
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        loss().backward()
    parts = parts_of(lambda: loss().backward())
    assert {"gemms", "loss", "embedding"} <= parts and not parts & {"attention", "muon", "adamw", "other"}


@pytest.mark.parametrize("expected, names", [
    ("gemms", ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN", "aten::mm")),
    ("gemms", ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN",)),
    ("gemms", ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x3_nn",)),
    ("gemms", ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16>", "aten::_scaled_mm", "Torch-Compiled Region: 0/0")),
    ("gemms", ("aten::copy_", "aten::mm", "aten::linear")),
    ("attention", ("void pytorch_flash::flash_bwd_kernel<Flash_bwd_kernel_traits<128, cutlass::bfloat16_t>>",)),
    ("attention", ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128_4x1x1_cga1x1x1_kernel0_0",)),
    ("attention", ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "flash_attn_3::fwd")),
    ("attention", ("graph_2_cpp_fused__softmax_backward_data_5", "CompiledFunctionBackward")),
    ("loss", ("triton_red_fused__to_copy_div_mul_prepare_softmax_online_tanh_view_9",)),
    ("loss", ("graph_2_cpp_fused__log_softmax__to_copy__unsafe_view_div_mul_nll_loss_forward_tanh_view_19",)),
    ("loss", ("aten::mul", "TanhBackward0")),
    ("gemms", ("aten::mm", "nanochat::chunked_cross_entropy")),
    ("loss", ("nanochat::chunked_cross_entropy",)),
    ("gemms", ("nanochat::add_weight_gradient", "nanochat::head_loss")),
    ("loss", ("nanochat::head_loss",)),
    ("embedding", ("triton_poi_fused_embedding_dense_backward_0",)),
    ("embedding", ("aten::embedding_dense_backward", "nanochat::embedding_gradient")),
    ("embedding", ("graph_2_cpp_fused__to_copy_add_constant_pad_nd_index_mean_mul_pow_rsqrt_slice_t_0",)),
    ("norms_elementwise", ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_3",)),
    ("norms_elementwise", ("Memcpy DtoD (Device -> Device)",)),
    ("muon", ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN", "aten::bmm", "Torch-Compiled Region: 3/0", "update: muon")),
    ("adamw", ("triton_poi_fused_add_lerp_mul_sqrt_0", "update: adamw", "Optimizer.step#MuonAdamW.step")),
    ("host", ("Torch-Compiled Region: 3/0", "update: muon")),
    ("host", ("## Call CompiledFxGraph fbmmlosstanhindex ##",)),
    ("norms_elementwise", ("aten::empty", "## Call CompiledFxGraph fbmmlosstanhindex ##")),
    ("other", ("ncclDevKernel_AllReduce_Sum_f32_RING_LL",)),
])
def test_the_category_of_a_name(expected, names):
    assert profiler.category(names) == expected


def test_kernels_on_a_gpu_count_once_with_the_operator_that_launched_them():
    def event(id, name, start, end, device=DeviceType.CPU, annotation=False):
        return FunctionEvent(id, name, thread=1, start_us=start, end_us=end, device_type=device, is_user_annotation=annotation)
    launching = event(2, "aten::bmm", 10, 20)
    events = [event(1, "update: muon", 0, 30, annotation=True), launching, event(3, "aten::mul", 40, 50),
              event(4, "nvjet_bz", 100, 150, DeviceType.CUDA), event(5, "nvjet_bz", 200, 230, DeviceType.CUDA),
              event(6, "update: muon", 100, 150, DeviceType.CUDA, annotation=True)]
    launching.append_kernel("nvjet_bz", 0, 50)  # the second kernel of this name has no operator
    tree = EventList(events, use_device="cuda")
    tree._build_tree()
    spent = profiler.kernel_seconds(tree, on_cpu=False)
    assert {key: round(seconds * 1e6, 3) for key, seconds in spent.items() if seconds} == \
        {("muon", "nvjet_bz"): 50, ("gemms", "nvjet_bz"): 30}


# --- the results, and another trainer -------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_results(measured):
    result, printed, _ = measured
    assert list(result["results"]) == ["eager", SMALLER]
    plain, smaller = result["results"].values()
    assert (plain["tokens_per_step"], smaller["tokens_per_step"]) == (512, 256), "flags after -- and of --with, in this order"
    for row in (plain, smaller):
        assert row["seconds"]["n"] == 4 and row["dtype"] == "float32" and not row["compiled"]
        assert row["tok_per_sec_median"] == pytest.approx(row["tokens_per_step"] / row["seconds"]["median"])
        assert row["gemm_peak_share"] == pytest.approx(row["model_flops_per_sec"] / row["gemm_peak_flops_per_sec"])
        assert 0 < row["gemm_peak_share_causal"] < row["gemm_peak_share"] < 1
    assert plain["peak_mem_mib"] > 100 and smaller["peak_mem_mib"] is None, "on a CPU the peak is the process's"
    assert all(part in printed for part in profiler.CATEGORIES) and "ratio: median" in printed
    assert "step 0001/" not in printed, "the output of the runs goes to stderr"


@pytest.mark.slow
def test_the_other_trainer_runs_interleaved(measured, base):
    result, _, starts = measured
    assert starts == [str(base)] * 2, "once per round, with the user's base directory"
    for row in result["results"].values():
        pairs = row["against"]
        assert [pair["theirs"] for pair in pairs["tok_per_sec"]] == [2000, 2000], "the median without the first three"
        assert pairs["ratios"] == [pair["ours"] / 2000 for pair in pairs["tok_per_sec"]]
        assert min(pairs["ratios"]) <= pairs["ratio_median"] <= max(pairs["ratios"])


def test_another_trainers_rate(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    command, regex = f"{sys.executable} {tmp_path / 'trainer.py'} {tmp_path / 'starts'}", r"tok/sec: ([\d,.]+)"
    assert external_rate(f"{command} 0", regex, skip=0) == (3 + 1000) / 2
    for status, pattern, skip in ((7, regex, 0), (0, regex, 6), (0, "(loss)", 0), (0, r"mfu ([\d.]+)", 0)):
        with pytest.raises(UserError, match="7" if status else "--against-regex"):
            external_rate(f"{command} {status}", pattern, skip)


# --- flags ------------------------------------------------------------------------------------------------------------

def test_flags_of_the_run():
    _, configs = train_step.parse_command(["--preset", "gpu-d12", "--variants", "parts", "--with", "--no-compile", "--with",
                                           "--depth=8 --seed=1", "--", "--depth", "6", "--seed", "7"])
    assert list(configs) == ["parts", "--no-compile", "--depth=8 --seed=1"]
    parts, eager, other = configs.values()
    assert (parts.model.depth, parts.run.seed, parts.horizon.device_batch_size, parts.model.window_pattern) == (6, 7, 16, "L")
    assert parts.run.compile and other.run.compile and not eager.run.compile
    assert (other.model.depth, other.run.seed) == (8, 1)
    assert len({config.model_tag for config in configs.values()}) == 3


@pytest.mark.parametrize("arguments, names", [
    (["--presett", "cpu-d4"], "--presett"),
    (["--", "--dept", "4"], "--dept"),
    (["--with", "--no-such-thing"], "--no-such-thing"),
    (["--with", "--seed '1"], "--seed"),
    (["--with", "--total-batch-size=1000"], "--total-batch-size"),
    (["--against-regex", "tok/sec"], "--against-regex"),
    (["--against-regex", "(tok"], "--against-regex"),
    (["--json-out", "/"], "--json-out"),
])
def test_wrong_flags(arguments, names):
    with pytest.raises(UserError, match=names):
        train_step.parse_command(arguments)


def test_wrong_flags_are_reported_before_torch_is_loaded():
    code = """import sys, runpy
sys.argv = ["x", "--", "--no-such-flag"]
try: runpy.run_module("dev.bench.train_step", run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "--no-such-flag" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(cpp_unavailable_reason("peak") is not None, reason="C++ kernels do not run here")
def test_the_hardwares_peak_counts_the_work_of_every_thread():
    """An AVX512 instruction multiplies 32 pairs of numbers, one of AMX 16 x 16 x 32; each thread repeats it equally often."""
    threads, flops = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            flops.append(make_instruction_loop(torch.bfloat16)[1])
    finally:
        torch.set_num_threads(threads)
    amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    assert flops[0] == (200_000 * 4 * 2 * 16 * 16 * 32 if amx else 2_000_000 * 16 * 2 * 32) and flops[1] == 2 * flops[0]
    assert make_instruction_loop(torch.float32) is None
