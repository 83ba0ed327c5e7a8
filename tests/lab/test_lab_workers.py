"""Workers of the lab: each has GPUs or cores of its own, and whoever is not given enough is told."""

import os

import pytest

from nanochat.common import UserError
from nanochat.lab import workers
from nanochat.lab.cli import main
from nanochat.lab.workers import WorkerFlags, places

SMOKE = ["run", "--profile", "cpu-smoke"]


def test_a_run_of_two_processes_has_two_gpus_of_its_own():
    assert [place.environment for place in places(WorkerFlags(gpus=[4, 5, 7]))] == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in "457"]
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(WorkerFlags(gpus=[0, 1, 2, 3]), processes=2)] == [
        "0,1", "2,3"]
    with pytest.raises(UserError, match="3 GPUs"):
        places(WorkerFlags(gpus=[0, 1, 2]), processes=2)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no core can be chosen here")
def test_cores_are_divided_and_none_is_shared(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 4, 6, 7, 8})
    found = places(WorkerFlags(workers=3))
    assert [place.cores for place in found] == [{0, 1}, {2, 4}, {6, 7}], "of 7 cores each has as many as the others"
    assert all(place.environment == {"OMP_NUM_THREADS": "2"} for place in found)
    with pytest.raises(UserError, match="each worker needs one"):
        places(WorkerFlags(workers=8))


@pytest.mark.parametrize("flags, named", [
    (["--gpus", "0", "0"], "twice"), (["--gpus", "0", "1", "--workers", "2"], "not both"), (["--workers", "99999"], "cores"),
    (["--submit-options", "a=1"], "--submit-options would do nothing"),
    (["--submit", "slurm", "--submit-options", "partition"], "NAME=VALUE"),
    (["--gpus", "0", "--submit", "local"], "not both")])
def test_wrong_workers_are_refused_before_anything_starts(flags, named):
    with pytest.raises(UserError) as caught:
        main([*SMOKE, *flags])
    assert named in str(caught.value)


def test_one_worker_of_several_records_the_verdict(monkeypatch):
    seen = []
    for number in (None, "0", "1"):
        monkeypatch.setenv(workers.WORKER, number) if number else monkeypatch.delenv(workers.WORKER, raising=False)
        seen.append((workers.is_worker(), workers.is_assistant()))
    assert seen == [(False, False), (True, False), (True, True)]
