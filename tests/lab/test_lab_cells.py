"""Claims, rows and folders: no cell is run twice, no row is lost, an abandoned claim is taken over."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from nanochat.common import UserError
from nanochat.lab import claim as claims
from nanochat.lab.cells import Cell, Folder
from nanochat.lab.claim import Claim
from nanochat.lab.plan import read_profile
from nanochat.lab.rows import COLUMNS, REQUIRED_COLUMNS, make_row, number, read_csv, read_rows, write_csv

FLAGS = read_profile("cpu-smoke")
REQUIRED = """timestamp git_commit experiment_name seed depth max_seq_len device_batch_size total_batch_size
target_param_data_ratio warmdown_ratio warmdown_shape target_metric_name target_metric_threshold time_to_target_sec_measured
time_to_target_sec_extrapolated extrapolation_method tok_per_sec_median dt_median_ms wall_time_sec final_train_loss min_val_bpb
peak_mem_mib status""".split()


def test_a_claim_is_given_once(tmp_path):
    path = tmp_path / "x.claim"
    mine = Claim.take(path)
    assert mine and Claim.take(path) is None and mine.heartbeat()
    mine.release()
    assert not path.exists() and Claim.take(path)


def _take_all(folder, barrier, results):
    barrier.wait()
    results.put([n for n in range(100) if Claim.take(folder / f"{n}.claim")])


def test_many_workers_share_claims_without_doubles(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_take_all, args=(tmp_path, barrier, results)) for _ in range(4)]
    for w in workers:
        w.start()
    taken = [n for _ in workers for n in results.get()]
    for w in workers:
        w.join()
    assert sorted(taken) == list(range(100))


@pytest.fixture(scope="module")
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def abandoned(path, pid, host=None, age=0.0, started="1"):
    path.write_text(json.dumps({"host": host or claims.platform.node(), "pid": pid, "started": started, "token": "theirs"}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_dead_workers_claim_is_taken_over_at_once(tmp_path, dead):
    abandoned(tmp_path / "x.claim", dead)
    mine = Claim.take(tmp_path / "x.claim")
    assert mine and mine.heartbeat() and Claim.take(tmp_path / "x.claim") is None


@pytest.mark.parametrize("age, taken", [(10, False), (claims.LEASE_SECONDS + 10, True)])
def test_a_worker_elsewhere_is_alive_while_its_heartbeats_are_recent(tmp_path, age, taken):
    abandoned(tmp_path / "x.claim", 1, host="elsewhere", age=age)
    assert bool(Claim.take(tmp_path / "x.claim")) == taken


def test_a_live_worker_here_keeps_its_claim_without_heartbeats(tmp_path):
    path = tmp_path / "x.claim"
    mine = Claim.take(path)
    os.utime(path, (1, 1))
    assert Claim.take(path) is None and mine.heartbeat()


@pytest.mark.skipif(not claims.Path("/proc/self/stat").exists(), reason="needs /proc, to tell processes with one id apart")
def test_another_process_with_the_same_id_does_not_hold_the_claim(tmp_path):
    abandoned(tmp_path / "x.claim", os.getpid())
    assert Claim.take(tmp_path / "x.claim")


def test_a_worker_whose_claim_was_taken_over_notices_and_does_not_release_it(tmp_path):
    mine = Claim.take(tmp_path / "x.claim")
    abandoned(tmp_path / "x.claim", os.getpid())  # as if another had taken over
    assert not mine.heartbeat()
    mine.release()
    assert (tmp_path / "x.claim").exists()


def _take_over(path, barrier, results):
    barrier.wait()
    results.put(bool(Claim.take(path)))


def test_an_abandoned_claim_goes_to_one(tmp_path, dead):
    context = multiprocessing.get_context("fork")
    for n in range(10):
        abandoned(tmp_path / f"{n}.claim", dead)
        barrier, results = context.Barrier(3), context.Queue()
        workers = [context.Process(target=_take_over, args=(tmp_path / f"{n}.claim", barrier, results)) for _ in range(3)]
        for w in workers:
            w.start()
        assert sum(results.get() for _ in workers) == 1
        for w in workers:
            w.join()


# --- rows ----------------------------------------------------------------------------------------------------------


def test_the_required_columns_come_first_and_in_order():
    assert list(REQUIRED_COLUMNS) == REQUIRED == list(COLUMNS[:len(REQUIRED)]) and len(set(COLUMNS)) == len(COLUMNS)


def result(**fields):
    return {"status": "ok", "exit_code": 0, "steps_done": 100, "tokens_seen": 51200, "val_bpb": 1.5, "min_val_bpb": 1.4,
            "val_curve": [[0, 0.0, 4.0], [100, 3.0, 1.5]], "train_time_sec": 3.0, "git_commit": "abc"} | fields


def test_a_row_has_the_settings_and_the_results():
    row = make_row("exp", "candidate", 7, "id", [*FLAGS, "--warmdown-shape=cosine", "--seed=7"], result(), 0)
    assert (row["experiment_name"], row["seed"], row["depth"], row["max_seq_len"]) == ("exp/candidate", 7, 2, 64)
    assert (row["warmdown_shape"], row["total_batch_size"], row["target_metric_name"]) == ("cosine", 512, "val_bpb")
    assert row["min_val_bpb"] == 1.4 and row["status"] == "ok" and row["val_curve"][-1] == [100, 3.0, 1.5]


def test_a_run_without_a_result_is_a_failed_row():
    row = make_row("exp", "candidate", 7, "id", FLAGS, {}, -9)
    assert row["status"] == "failed" and row["exit_code"] == -9 and "-9" in row["error"] and row["val_bpb"] is None


@pytest.mark.parametrize("value, is_number", [(1.5, True), (0, True), ("nan", False), ("inf", False), (None, False)])
def test_finite_numbers(value, is_number):
    assert (number(value) is not None) == is_number


def write_cell(folder, cell, **fields):
    folder.cell_dir(cell).mkdir(parents=True, exist_ok=True)
    row = make_row(folder.name, cell.variant, cell.seed, cell.id, list(cell.flags), result(**fields), 0)
    (folder.cell_dir(cell) / "row.json").write_text(json.dumps(row))
    write_csv(folder.path)


def _write_cells(path, worker):
    folder = Folder(path, "exp", path / "home")
    for n in range(8):
        write_cell(folder, Cell(f"w{worker}", n, tuple(FLAGS)))


def test_several_writers_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_cells, args=(tmp_path, n)) for n in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    rows = read_csv(tmp_path / "runs.csv")
    assert sorted((r["variant"], r["seed"]) for r in rows) == sorted((f"w{w}", str(n)) for w in range(3) for n in range(8))
    with open(tmp_path / "runs.csv", newline="") as f:
        assert next(csv.reader(f)) == list(COLUMNS)


def test_a_csv_of_another_schema_is_refused(tmp_path):
    (tmp_path / "runs.csv").write_text("timestamp,schema_version\nnow,99\n")
    with pytest.raises(UserError):
        read_csv(tmp_path / "runs.csv")


def test_only_finished_cells_count_and_failed_ones_can_be_tried_again(tmp_path):
    folder = Folder(tmp_path, "exp", tmp_path / "home")
    done, stopped, broken = (Cell(name, 1, tuple(FLAGS)) for name in ("done", "stopped", "broken"))
    write_cell(folder, done)
    write_cell(folder, stopped, status="interrupted")
    write_cell(folder, broken, status="diverged", val_bpb="nan")
    assert folder.row(done) and not folder.row(stopped) and folder.row(broken)["status"] == "diverged"
    again = Folder(tmp_path, "exp", tmp_path / "home", retry_failed=True)
    assert again.row(done) and not again.row(broken) and again.id == folder.id
    assert [row["status"] for row in read_rows(tmp_path)] == ["ok", "interrupted"]


def test_cells_differ_by_variant_seed_and_flags():
    ids = {Cell(v, s, f).id for v in ("a", "b") for s in (1, 2) for f in (("--depth=2",), ("--depth=3",))}
    assert len(ids) == 8 and Cell("a", 1, ("--depth=2",)).id in ids


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        Folder(tmp_path / "file" / "x", "exp", tmp_path / "home")
