"""The compilers behind torch.compile and our own kernels, C++'s and Triton's: folders that they can write in, paths that they can
take, and the reason when they fail.

When a compiler fails, the user sees its own first error and what to do about it. torch joins the words of the C++ compiler's
command with spaces and splits them again, so a path with a space in it would fall apart; such paths are replaced by links.
A cache folder that cannot be used is replaced as soon as this module is imported, before anything loads torch's compiler.
"""

import functools
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from nanochat.common import UserError, print0

CACHE_FOLDER, TRITON_FOLDER = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
INSTALL = "xcode-select --install" if sys.platform == "darwin" else "apt install g++"
WHAT_TO_DO = {  # by what is found in a compiler's output or in an error of the system
    r"Python\.h": "Install the headers of this Python (apt install python3-dev)",
    r"No space left|Disk quota": "Free some room, or set TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders that have it",
    r"-?std=(c|gnu)\+\+": "The compiler is too old: torch needs one that knows C++20, g++ 11 or later",
    r"omp\.h|-l[gio]*omp": "Install OpenMP (apt install libgomp1, or brew install libomp)",
    r"C compiler": "Install one (apt install gcc), or set CC to one",
    r"No module named 'triton'": "Install Triton (pip install triton)",
    r"Killed|out of memory": "There is too little memory for the compiler: close other programs",
}


def prepare_compiler() -> None:
    """Give torch's compiler a cache folder that it can write in, and paths that its commands can hold."""
    use_writable_cache_folder()
    folder = os.environ[CACHE_FOLDER]
    if (link := path_for_commands(folder)) != folder:
        print0(f"the compiler's cache folder {folder} is reached by the link {link}, as commands cannot hold its path")
        os.environ[CACHE_FOLDER] = link
    from torch._inductor import config
    from torch.utils import cpp_extension
    headers = default_cache_folder()  # where compiled headers go, whatever the cache folder is; openssl takes their checksum
    if not fits_commands(headers) or unwritable_reason(headers) or not shutil.which("openssl"):
        config.cpp_cache_precompile_headers = False
    cpp_extension._TORCH_PATH = path_for_commands(cpp_extension._TORCH_PATH)
    cpp_extension.TORCH_LIB_PATH = os.path.join(cpp_extension._TORCH_PATH, "lib")


def use_writable_cache_folder() -> None:
    """Choose a cache folder for compiled graphs that works. Without one even eager training would fail, as torch makes the folder
    when it loads its compiler."""
    folder = os.path.abspath(os.environ.get(CACHE_FOLDER) or default_cache_folder())
    if trouble := unwritable_reason(folder):
        default = default_cache_folder()
        # where all are full the folder stays: what cannot be compiled says why
        instead = default if not unwritable_reason(default) else folder if os.path.isdir(folder) else tempfile.mkdtemp()
        if instead != folder:
            print0(f"the compiler's cache folder {folder} cannot be used ({trouble}): taking {instead}. "
                   f"Set {CACHE_FOLDER} to a folder that you can write to")
        folder = instead
    os.environ[CACHE_FOLDER] = folder


def default_cache_folder() -> str:
    """The folder that torch would take. Asking torch would load its compiler, which makes the folder."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}"
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as e:
        raise UserError(f"{e.strerror}. Set TMPDIR to a folder that you can write to") from None
    return os.path.join(temporary, "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


@functools.cache
def unwritable_reason(folder: str) -> str | None:
    """Why files cannot be written into a folder, which is made if missing; None where they can."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**18))
    except OSError as e:
        return e.strerror


def fits_commands(path: str) -> bool:
    """Whether a path stays one word when a command is split into words."""
    return os.name != "posix" or not re.search(r"""[\s'"\\]""", path)


def path_for_commands(path: str) -> str:
    """The path, or, where a command cannot hold it, the path of a link to it, which is made if missing. It is the same link each
    time: compiled files are found again by the command that made them."""
    if fits_commands(path):
        return path
    name = f"nanochat-{os.getuid()}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    for folder in filter(fits_commands, (tempfile.gettempdir(), "/tmp", "/var/tmp")):
        link = Path(folder, name)
        try:
            if not link.is_symlink():
                link.symlink_to(path)
        except OSError:  # not writable, or another process was faster
            pass
        if link.is_symlink() and os.readlink(link) == path and link.lstat().st_uid == os.getuid():
            return str(link)
    raise OSError(f"the compiler cannot be given the path {path}, for the space or quote in it, and no folder for temporary "
                  "files takes a link to it. Choose a path without one")


def cause_of(error: Exception) -> Exception:
    """What a compiler's backend raised, which torch wraps."""
    return getattr(error, "inner_exception", error)


def first_line(error: Exception) -> str:
    cause = cause_of(error)
    return next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__).strip()


def reason(error: Exception) -> str:
    """Why something could not be compiled, in a line: the compiler's own first error where it came to that; and what to do."""
    from torch._inductor import config, exc
    cause, compiler = cause_of(error), config.cpp.cxx[-1]
    if isinstance(cause, exc.InvalidCxxCompiler) or isinstance(cause, OSError) and cause.filename == compiler or (
            isinstance(cause, IndexError) and makes_nothing(compiler)):  # torch looks into what it has made, or said
        if "CXX" in os.environ:
            return f"CXX={compiler!r} is no C++ compiler that runs. Set it to the path of one, without options, or unset it"
        return f"there is no C++ compiler: {compiler} is missing or does not run. Install it ({INSTALL}), or set CXX to one"
    if isinstance(cause, exc.CppCompileError):
        said = first_error(cause.output)
        return f"{compiler}: {said}. " + (what_to_do(cause.output) or f"Install a C++ compiler that works ({INSTALL}), or set "
                                          "CXX to one")
    if isinstance(cause, OSError) and cause.filename is not None and cause.filename == os.environ.get("CC"):  # Triton calls it
        return f"CC={cause.filename!r} is no C compiler that runs. Set it to the path of one, without options, or unset it"
    if isinstance(cause, OSError) and cause.filename:
        return (f"the compiler's files cannot be kept in {cause.filename} ({cause.strerror}). "
                + (what_to_do(str(cause)) or f"Set {folder_variable(cause.filename)} to a folder that you can write to"))
    if isinstance(cause, subprocess.CalledProcessError):  # Triton's compiler, whose words are not caught
        return f"{cause.cmd[0]} failed, and has said why above. Where Python.h is missing, apt install python3-dev"
    advice = what_to_do(str(cause))
    return first_line(cause) + (f". {advice}" if advice else "")


def folder_variable(path: str) -> str:
    """The variable that moves the folder where this file of a compiler was to be kept: Triton has one of its own."""
    folders = [path, *map(str, Path(path).parents)]
    of_triton = os.environ.get(TRITON_FOLDER) in folders or ".triton" in Path(path).parts
    return TRITON_FOLDER if of_triton else CACHE_FOLDER


def failure_reason(attempt: Callable[[], object]) -> str | None:
    """Why an attempt to compile something fails, in a line, with what to do; None where it does not."""
    try:
        attempt()
    except Exception as e:  # a missing or broken tool chain may raise anything
        return reason(e)


def triton_runs_on(device_type: str) -> bool:
    """Whether our kernels in Triton run on devices of this type. It may be asked at every call: the answer is kept."""
    return device_type == "cuda" and triton_unavailable_reason() is None


@functools.cache
def triton_unavailable_reason() -> str | None:
    """Why kernels in Triton do not run on the GPU, with what to do; None where they do. The reason is printed, once."""
    if why := failure_reason(launch_triton_kernel):
        print0(f"kernels in Triton cannot be used, PyTorch takes their place, slower: {why}")
    return why


def launch_triton_kernel() -> None:
    """Launch a kernel that does nothing. That Triton can be imported does not say that it works: at the first launch on a machine
    it compiles C code of its own, with a C compiler and Python.h, which small containers lack."""
    import torch
    import triton

    @triton.jit
    def nothing(x):
        pass
    nothing[1,](torch.empty(1, device="cuda"))
    torch.cuda.synchronize()


def makes_nothing(compiler: str) -> bool:
    """Whether a program that runs as a compiler leaves no result."""
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder, "a.cpp")).write_text("int a;")
        subprocess.run([compiler, "-c", source, "-o", source.with_suffix(".o")], capture_output=True)
        return not source.with_suffix(".o").exists()


def first_error(output: str) -> str:
    """The first line of a compiler's output that says what is wrong, else the first that says anything."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"error|cannot|not found|No such file|unrecognized|Killed", line)]
    return (wrong or lines or ["it failed without a word"])[0].rstrip(".")


def what_to_do(output: str) -> str | None:
    return next((advice for found, advice in WHAT_TO_DO.items() if re.search(found, output)), None)


use_writable_cache_folder()
