"""The kernels on PyTorch's brgemm where oneDNN is made to believe that the processor has less than this one."""

from pathlib import Path

import pytest

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from processes import python_c

CHECKS = {
    "head_loss": "from test_head_loss import check, draw; check(draw(300, 96, 1000, 24), 256)",
    "polar_express": "from test_polar_express import check_symmetric_product as check; check(2, 80, 544, -2.0, 3.0, True, 0)",
}
KERNELS = [pytest.param(name, marks=pytest.mark.skipif(bool(why := cpp_unavailable_reason(name)), reason=str(why)))
           for name in CHECKS]


def printed(code, isa):
    """What Python prints, with the tests' folders on its path."""
    folder = Path(__file__).parent
    run = python_c(f"import sys; sys.path[:0] = {[str(folder), str(folder.parent)]}; {code}", ONEDNN_MAX_CPU_ISA=isa)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_amx_the_same_bounds_hold(kernel):
    assert printed(f"{CHECKS[kernel]}; print('checked')", "AVX512_CORE_BF16") == "checked\n"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_avx512_there_is_a_reason_and_no_end_of_the_process(kernel):
    code = f"from nanochat.kernels.cpp_kernels import cpp_unavailable_reason as why; print(why('{kernel}'))"
    assert "brgemm does not work here" in printed(code, "AVX2")
