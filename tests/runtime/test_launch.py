"""Several processes: the variables that tell each its place, who says what is wrong, and who waits for whom."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from nanochat.cli.launch_environment import launch_problem
from nanochat.common import RankError, UserError
from nanochat.runtime.distributed import on_main_rank_first
from processes import SERVER, started

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_starts")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environ", [{}, {"MASTER_ADDR": "x"}, WHOLE, WHOLE | {"LOCAL_WORLD_SIZE": "2"},
                                     {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}])
def test_complete_or_absent_is_right(environ):
    assert launch_problem(environ) is None


@pytest.mark.parametrize("change, named", [
    ({"RANK": None}, "RANK"), ({"WORLD_SIZE": None}, "WORLD_SIZE"), ({"LOCAL_RANK": None}, "LOCAL_RANK"),
    ({"RANK": ""}, "RANK"), ({"WORLD_SIZE": ""}, "WORLD_SIZE"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE"), ({"RANK": "-1"}, "RANK"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE"), ({"RANK": "2"}, "RANK"), ({"LOCAL_RANK": "5"}, "LOCAL_RANK"),
    ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_WORLD_SIZE"), ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE"),
    ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR"), ({"MASTER_PORT": ""}, "MASTER_PORT"), ({"MASTER_PORT": "99999"}, "MASTER_PORT"),
    ({"RANK": "9" * 30}, "RANK"),
])
def test_half_of_it_is_named(change, named):
    problem = launch_problem({k: v for k, v in (WHOLE | change).items() if v is not None})
    assert problem and named in problem and "unset" in problem and "\n" not in problem


@pytest.mark.parametrize("script", ["base_train", "base_eval", "tok_train", "sample", "prove_resume"])
def test_every_script_looks_first(script):
    done = subprocess.run([sys.executable, "-m", f"scripts.{script}"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"RANK": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error: the environment has RANK") and not done.stdout
    assert len(done.stderr.splitlines()) == 1


def launch(*words, base, module=True):
    return subprocess.run([sys.executable, "-m", "nanochat.runtime.launch", "--standalone", "--nproc_per_node=2",
                           *["-m"] * module, *words],
                          cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("flags, named", [
    (["--depht=3"], "--depht"), (["--data=/no/such/text", "--device-type=cpu", "--model-tag=x"], "/no/such/text"),
    (["--resume-from-step=latest", "--model-tag=none", "--device-type=cpu"], "no checkpoint")])
def test_an_error_of_all_ranks_is_said_once(base, flags, named):
    done = launch("scripts.base_train", *flags, base=base)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and named in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_an_error_is_said_although_rank_0_meets_it_last(base, tmp_path):
    script = tmp_path / "late.py"
    script.write_text("""import os, time
from nanochat.cli.program import cli
from nanochat.common import UserError
def main():
    time.sleep(2 if os.environ["RANK"] == "0" else 0)
    raise UserError("the same on both")
cli(main, parallel=True)""")
    done = launch(str(script), base=base, module=False)
    assert done.returncode == 2 and done.stderr == "error: the same on both\n"


@pytest.mark.slow
def test_the_launcher_passes_on_how_a_process_ended(tmp_path):
    (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-m", "nanochat.runtime.launch", "--standalone", "--nproc_per_node=1",
                           str(tmp_path / "killed.py")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 137 and "signal 9" in done.stderr and "Traceback" not in done.stderr


# ---- rank 0 first

def as_rank(rank, port, scenario, answers):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    try:
        answers.put((rank, "gave", scenario(rank)))
    except UserError as e:
        answers.put((rank, type(e).__name__, str(e)))
    dist.destroy_process_group()


def on_two_ranks(scenario):
    answers, port = SERVER.Queue(), 20000 + os.getpid() % 20000
    ranks = [started(as_rank, rank, port, scenario, answers) for rank in (0, 1)]
    found = sorted(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    return found


def slow_text(rank):
    """Longer than the group's timeout on rank 0; the other finds it done."""
    started = time.monotonic()
    on_main_rank_first(lambda: time.sleep(4) if rank == 0 else None)
    return on_main_rank_first(lambda: "text") if time.monotonic() - started > 3.5 else "too early"


def bad_text(rank):
    def work():
        raise UserError("no such text")
    return on_main_rank_first(work)


def missing_on_one(rank):
    def work():
        if rank == 1:
            raise UserError("not on this machine")
    return on_main_rank_first(work)


@pytest.mark.slow
def test_others_wait_for_rank_0_outside_of_the_groups_timeout():
    assert on_two_ranks(slow_text) == [(0, "gave", "text"), (1, "gave", "text")]


@pytest.mark.slow
def test_what_fails_on_rank_0_fails_everywhere_and_is_said_by_it():
    (_, first, message), (_, second, relayed) = on_two_ranks(bad_text)
    assert first == second == UserError.__name__ and message == "no such text" and message in relayed


@pytest.mark.slow
def test_what_fails_on_one_rank_alone_is_said_by_that_rank():
    assert on_two_ranks(missing_on_one) == [(0, "gave", None), (1, RankError.__name__, "rank 1: not on this machine")]
