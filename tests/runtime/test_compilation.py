"""Compiled training: a variant whose graphs cannot be made runs uncompiled, alone, and is counted; nothing is silent. Where
nothing can be compiled, the reason is the compiler's own, with what to do."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from nanochat.runtime.compilation import CompiledModel
from nanochat.runtime.toolchain import INSTALL, default_cache_folder, first_line, path_for_commands, reason
from processes import python_c
from test_gpt import TINY, batch, tiny_model

SMALL = replace(TINY, n_layer=3)


def breaks_on(number):
    """A backend that runs graphs as they are, except for the one with this number, which it cannot make."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        if len(made) == number:
            raise RuntimeError("no such instruction")
        return graph.forward
    return backend


def gradients(forward, model, start):
    model.zero_grad(set_to_none=True)
    loss = forward(*batch(), active_start=start)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_broken_graph_costs_only_its_own_variant(capsys):
    """Of three suffixes the second one's graph is broken. All three train right; only that one is named and counted."""
    plain, model = tiny_model(SMALL), tiny_model(SMALL)
    compiled = CompiledModel(model, whole=True, backend=breaks_on(2))
    for start in (0, 1, 2):
        compiled.warm_up(*batch(seed=9), active_start=start)
    said = [line for line in capsys.readouterr().out.splitlines() if "could not be compiled" in line]
    assert len(said) == 1 and said[0].startswith("active_start=1 ") and "no such instruction" in said[0]
    assert compiled.eager_fallbacks == 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for start in (0, 1, 2, 1):
        (loss, grads), (expected_loss, expected) = gradients(compiled, model, start), gradients(plain, plain, start)
        assert torch.equal(loss, expected_loss)
        for name, grad in grads.items():
            assert (grad is None) == (expected[name] is None), name
            assert grad is None or torch.equal(grad, expected[name]), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # the broken one is not tried again
    assert compiled.eager_fallbacks == 1


@pytest.mark.slow
def test_warming_up_leaves_no_trace():
    model = tiny_model(SMALL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    compiled = CompiledModel(model, whole=False, backend="aot_eager")
    compiled.warm_up(*batch(), active_start=1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.slow
def test_memory_running_out_is_no_fault_of_the_graph():
    def backend(graph, inputs):
        raise torch.OutOfMemoryError("out of memory")
    compiled = CompiledModel(tiny_model(SMALL), whole=True, backend=backend)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.warm_up(*batch())
    assert compiled.eager_fallbacks == 0


@pytest.mark.slow
def test_more_variants_than_torch_keeps_by_itself():
    """Three starts of a model, whole: a graph each, none dropped to eager at torch's limit, which is two here. By itself it is
    eight, and nine graphs take a while."""
    model = tiny_model(replace(TINY, n_layer=3))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        compiled = CompiledModel(model, whole=True, backend="eager")
        assert torch._dynamo.config.recompile_limit >= 64
        torch._dynamo.utils.counters.clear()
        for start in range(3):
            compiled.warm_up(*batch(), active_start=start)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 and compiled.eager_fallbacks == 0


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_graph_breaks_are_counted_and_printed_once(capsys, whole):
    """A loss that torch may not trace cuts the graph. Whole, each variant has the break; in parts the loss is simply no graph."""
    model = tiny_model(SMALL)
    model.kernels.loss = torch.compiler.disable(model.kernels.loss)
    if not whole:
        model._embed = cut_in_two(model._embed)
    compiled = CompiledModel(model, whole=whole, backend="eager")
    for start in (0, 1):
        compiled.warm_up(*batch(seed=9), active_start=start)
    said = [line for line in capsys.readouterr().out.splitlines() if "graph break" in line]
    assert compiled.graph_breaks.total() >= (2 if whole else 1) and compiled.eager_fallbacks == 0
    assert len(said) == len(compiled.graph_breaks) == 1 and said[0].endswith(next(iter(compiled.graph_breaks)))
    assert CompiledModel(tiny_model(), whole=True, backend="eager").graph_breaks.total() == 0


def cut_in_two(function):
    def cut(*arguments, **options):
        result = function(*arguments, **options)
        torch._dynamo.graph_break()
        return result + 0
    return cut


def test_the_first_line_that_says_something():
    assert first_line(RuntimeError("\n  \n no compiler \n more")) == "no compiler" and first_line(ValueError()) == "ValueError"


# Machines where compiling fails, and where it only seems to

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


QUESTION = """import torch
from nanochat.runtime.compilation import compile_unavailable_reason
print(compile_unavailable_reason(torch.device("cpu")))"""
LOADED_ANEW = """import functools, os
from torch._inductor import config, cpp_builder
config.cpp.cxx = (None, os.environ.get("CXX", "g++"))
for function in vars(cpp_builder).values():
    if isinstance(function, functools._lru_cache_wrapper):
        function.cache_clear()
"""


def answer(**environment) -> list[str]:
    """What a process of its own prints that asks whether torch.compile works: the answer is the last line. It has torch loaded,
    and is given what torch would read and find out while it is."""
    done = python_c(LOADED_ANEW + QUESTION, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def answer_of_a_start(*, without=(), **environment) -> list[str]:
    """The same of a process that loads torch."""
    own = ("CXX", "PYTHONPATH", "TORCHINDUCTOR_VEC_ISA_OK", *without)  # the last two are conftest.py's
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run([sys.executable, "-c", QUESTION], cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def remove_links(target: Path) -> int:
    """Remove what was made to reach a path; how many there were."""
    links = [link for folder in {tempfile.gettempdir(), "/tmp"} for link in Path(folder).glob(f"nanochat-{os.getuid()}-*")
             if link.is_symlink() and os.readlink(link) == str(target)]
    for link in links:
        link.unlink()
    return len(links)


@pytest.mark.slow
@needs_compiler
def test_a_space_in_the_path_of_the_cache(tmp_path):
    """It is reached by a link, and what is compiled lies where it was asked for."""
    folder = tmp_path / "my cache"
    said, works = answer(TORCHINDUCTOR_CACHE_DIR=str(folder))
    assert works == "None" and said.startswith(f"the compiler's cache folder {folder} is reached by the link ")
    assert any(folder.rglob("*.so")) and remove_links(folder) == 1


@pytest.mark.slow
@needs_compiler
def test_a_space_in_the_paths_of_torch_and_of_temporary_files(tmp_path):
    for name in ("my env", "my files"):
        (tmp_path / name).mkdir()
    (torchs := tmp_path / "my env" / "torch").symlink_to(Path(torch.__file__).parent)
    said, works = answer_of_a_start(without=("TORCHINDUCTOR_CACHE_DIR",), PYTHONPATH=str(tmp_path / "my env"),
                                    TMPDIR=str(tmp_path / "my files"))
    assert works == "None" and "my files" in said
    cache, = (tmp_path / "my files").glob("torchinductor_*")
    assert any(cache.rglob("*.so")) and remove_links(cache) == remove_links(torchs) == 1


@pytest.mark.slow
@needs_compiler
def test_a_cache_folder_that_cannot_be_used_is_replaced(tmp_path):
    (tmp_path / "file").write_text("")
    said, works = answer_of_a_start(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    assert works == "None" and f"{tmp_path / 'file'} cannot be used (File exists): taking {default_cache_dir()}. Set" in said


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["no-such-compiler", "g++ -O1", "true", ""])
def test_a_variable_that_names_no_compiler(tmp_path, compiler):
    assert answer(CXX=compiler, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == [
        f"CXX={compiler!r} is no C++ compiler that runs. Set it to the path of one, without options, or unset it"]


@pytest.mark.slow
@needs_compiler
def test_a_machine_without_openssl(tmp_path):
    """With which torch takes the checksum of headers that it would compile beforehand."""
    for name in ("g++", "as", "ld"):
        (tmp_path / name).symlink_to(shutil.which(name) or shutil.which("c++"))
    assert answer(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")) == ["None"]


@pytest.mark.slow
def test_no_compiler_at_all(tmp_path):
    said, = answer(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert said.startswith("there is no C++ compiler: ") and INSTALL in said


@pytest.mark.slow
@pytest.mark.parametrize("says, told", [
    ("In file included from main.cpp:1:\nmain.cpp:3:10: fatal error: Python.h: No such file or directory",
     "main.cpp:3:10: fatal error: Python.h: No such file or directory. Install the headers of this Python (apt install"),
    ("", f"it failed without a word. Install a C++ compiler that works ({INSTALL})"),
])
def test_a_compiler_that_fails_is_quoted(tmp_path, says, told):
    (compiler := tmp_path / "compiler").write_text(f"""#!/bin/sh
[ "$1" = --version ] && echo 1.0 && exit 0
cat >&2 <<'END'
{says}
END
exit 1
""")
    compiler.chmod(0o755)
    said, = answer(CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert f"{compiler}: {told}" in said


@pytest.mark.parametrize("output, told", [
    ("cc1plus: error: unrecognized command line option '-std=c++20'; did you mean '-std=c++2a'?", "too old"),
    ("a.cpp:1: warning: x\na.cpp:2:10: fatal error: omp.h: No such file or directory\nerror: y", "2:10: fatal error: omp.h"),
    ("/usr/bin/ld: cannot find -lgomp: No such file or directory\ncollect2: error: ld returned 1 exit", "Install OpenMP"),
    ("/tmp/x.s: Assembler messages:\nfatal error: error writing to x.s: No space left on device", "Free some room"),
    ("g++: fatal error: Killed signal terminated program cc1plus", "too little memory"),
])
def test_what_to_do_follows_from_what_the_compiler_says(output, told):
    said = reason(CppCompileError(["g++", "x.cpp"], output))
    assert told in said and "C++ compile error" not in said and len(said.splitlines()) == 1


def test_errors_of_the_system_name_the_file():
    said = reason(PermissionError(13, "Permission denied", "/cache/lock"))
    assert "/cache/lock (Permission denied)" in said and "TORCHINDUCTOR_CACHE_DIR" in said
    assert "Free some room" in reason(OSError(28, "No space left on device", "/cache/x"))
    assert reason(RuntimeError("Failed to find C compiler.")).endswith("Install one (apt install gcc), or set CC to one")


def test_the_default_cache_folder_is_torchs():
    assert default_cache_folder() == default_cache_dir()


def test_a_link_is_made_once_and_never_taken_from_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (target := tmp_path / "with space").mkdir()
    link = Path(path_for_commands(str(target)))
    assert link.parent == tmp_path and link.resolve() == target and str(link) == path_for_commands(str(target))
    assert path_for_commands("/plain/p\u00e4th") == "/plain/p\u00e4th"
    link.unlink()
    link.symlink_to(tmp_path)  # to a folder of someone else's choice
    elsewhere = Path(path_for_commands(str(target)))
    assert elsewhere != link and elsewhere.resolve() == target
    elsewhere.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_recomputed_activations_are_not_kept(whole):
    """By the partitioner alone, without a compiler that rounds otherwise: the same bits, and less kept for the backward pass."""
    kept, results = {}, {}
    for recompute in (False, True):
        model = tiny_model(replace(SMALL, short_conv=0))  # of whose inputs more is kept
        compiled = CompiledModel(model, whole, backend="aot_eager", recompute_activations=recompute)
        compiled.warm_up(*batch(seed=9), active_start=0)
        sizes, own = {}, {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}

        def keep(tensor, sizes=sizes, own=own):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results[recompute] = gradients(compiled, model, 0)
        assert compiled.eager_fallbacks == 0
        kept[recompute] = sum(sizes.values())
        torch._dynamo.reset()
    assert kept[True] < 0.75 * kept[False], kept
    (loss, grads), (expected_loss, expected) = results[True], results[False]
    assert torch.equal(loss, expected_loss) and all(torch.equal(grads[name], expected[name]) for name in expected)
