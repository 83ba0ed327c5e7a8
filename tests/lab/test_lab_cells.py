"""Claims, rows, folders and the store: no cell is run twice, no row is lost, an abandoned claim is taken over, and nothing is
shared that would come out otherwise."""

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
from nanochat.lab.plan import make_variants, read_profile
from nanochat.lab.rows import BY_THE_LAB, COLUMNS, REQUIRED_COLUMNS, make_row, number, read_csv, read_rows, write_csv
from nanochat.runtime.provenance import source_fingerprint

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


def test_a_result_cannot_say_what_the_lab_finds_out():
    row = make_row("exp", "candidate", 7, "id", FLAGS, result(source_fingerprint="f", **dict.fromkeys(BY_THE_LAB, "claimed")), 0)
    assert row["source_fingerprint"] == "f" and {row[name] for name in BY_THE_LAB} == {None}


@pytest.mark.parametrize("value, is_number", [(1.5, True), (0, True), ("nan", False), ("inf", False), (None, False)])
def test_finite_numbers(value, is_number):
    assert (number(value) is not None) == is_number


def write_cell(folder, cell, more=None, **fields):
    folder.cell_dir(cell).mkdir(parents=True, exist_ok=True)
    row = make_row(folder.name, cell.variant, cell.seed, cell.id, list(cell.flags), result(**fields), 0)
    folder.write_row(cell, row | {"flags": cell.flags} | (more or {}))
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
    assert sorted(row["status"] for row in read_rows(tmp_path)) == ["interrupted", "ok"]
    assert [again.failures(cell) for cell in (done, stopped, broken)] == [0, 0, 1]
    write_cell(again, broken, status="oom")
    third = Folder(tmp_path, "exp", tmp_path / "home", retry_failed=True)
    assert third.failures(broken) == 2
    kept = [json.loads(path.read_text())["status"] for path in sorted(folder.cell_dir(broken).glob("row.json~*"))]
    assert kept == ["diverged", "oom"]


def test_a_run_that_is_tried_again_counts_its_failures(tmp_path):
    """A real run, which fails at once: a file in its folder is not base_train's."""
    cell = Cell("candidate", 1, tuple(FLAGS))
    for failures in range(3):
        folder = Folder(tmp_path, "exp", tmp_path / "home", retry_failed=True)
        folder.data_is_ready = True
        folder.run_dir(cell).mkdir(parents=True, exist_ok=True)
        (folder.run_dir(cell) / "notes.txt").touch()
        row, = folder.run([cell])
        assert (row["status"], row["exit_code"], row["failures_before"]) == ("failed", 2, failures) and row["lab_time_sec"] > 0
    assert [row["failures_before"] for row in read_csv(tmp_path / "runs.csv")] == ["2"]
    assert (folder.cell_dir(cell) / "log.txt").read_text().count("notes.txt") == 3


def test_a_row_of_before_there_were_evaluations_stays_a_row(tmp_path):
    """Nothing is trained or evaluated: the base directory has no text."""
    folder, cell = Folder(tmp_path, "exp", tmp_path / "home"), Cell("baseline", 1, tuple(FLAGS), shared=True)
    write_cell(folder, cell)
    row = json.loads((folder.cell_dir(cell) / "row.json").read_text())
    old = {name: value for name, value in row.items() if name not in BY_THE_LAB}
    folder.write_row(cell, old)
    found, = folder.run([cell])
    assert found == old | dict.fromkeys(BY_THE_LAB) and read_rows(tmp_path) == [found]
    assert read_csv(tmp_path / "runs.csv")[0]["lab_val_bpb"] == ""


def test_seeds_that_are_left_out_show(tmp_path):
    folder, other = Folder(tmp_path, "exp", tmp_path / "home"), (*FLAGS, "--warmdown-shape=cosine")
    for seed in (1, 2, 3):
        write_cell(folder, Cell("baseline", seed, tuple(FLAGS)))
        write_cell(folder, Cell("candidate", seed, other), status="diverged" if seed == 3 else "ok")
    write_cell(folder, Cell("candidate", 4, other), status="interrupted")
    write_cell(folder, Cell("candidate", 5, (*FLAGS, "--warmdown-ratio=0.5")))  # another candidate of this name
    cells = [Cell("baseline", 1, tuple(FLAGS), shared=True), Cell("candidate", 1, other), Cell("candidate", 2, other)]
    assert folder.other_seeds(cells) == {"baseline": [2, 3], "candidate": [3]}
    assert folder.other_seeds([*cells, Cell("candidate", 3, other)])["baseline"] == [2, 3]
    assert folder.other_seeds([Cell("new", 1, other)]) == {}


def test_what_a_verdict_costs():
    rows = [{"shared_from": None, "lab_time_sec": 10.0, "lab_val_time_sec": 2.0}, {"shared_from": None, "lab_time_sec": 5.0},
            {"shared_from": "/store", "lab_time_sec": 100.0, "lab_val_time_sec": 7.0}]
    assert Folder.cost(rows) == {"runs": 2, "shared": 1, "seconds": 17.0} and Folder.cost([])["seconds"] == 0


def test_cells_differ_by_variant_seed_and_flags():
    ids = {Cell(v, s, f).id for v in ("a", "b") for s in (1, 2) for f in (("--depth=2",), ("--depth=3",))}
    assert len(ids) == 8 and Cell("a", 1, ("--depth=2",)).id in ids


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        Folder(tmp_path / "file" / "x", "exp", tmp_path / "home")


def test_no_variant_has_the_name_of_another_at_a_share_of_its_steps():
    longer = {"x": "--lr-multiplier=x1.1", "x-50": "--lr-multiplier=x0.9"}
    with pytest.raises(UserError, match="x and x-50"):
        make_variants(FLAGS, "", longer, "steps")
    assert len(make_variants(FLAGS, "", {"y": longer["x"], "x-50": longer["x-50"], "x-a": "--lr-multiplier=x2"}, "steps")[1]) == 3


# --- the store -----------------------------------------------------------------------------------------------------

SHARED = Cell("baseline", 1, tuple(FLAGS), shared=True)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Makes experiments whose data are ready."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def make(name, text="text", **options):
        folder = Folder(tmp_path / name, name, tmp_path / "home", **options)
        folder.text = {"sources": text}
        return folder
    return make


def test_experiments_share_a_cell_where_it_comes_out_the_same(experiment, tmp_path, monkeypatch):
    one, two = experiment("one").home(SHARED), experiment("two").home(SHARED)
    assert one.path == two.path and one.path.parent == tmp_path / "lab/shared" and one.run_dir(SHARED) == two.run_dir(SHARED)
    others = [experiment("text", text="other").home(SHARED), experiment("two-ranks", processes=2).home(SHARED)]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    others.append(experiment("threads").home(SHARED))
    assert len({one.path, *(store.path for store in others)}) == 4
    for apart in (experiment("kept", keep_checkpoints=True), experiment("shown", show_output=True)):
        assert apart.home(SHARED) is apart
    own = experiment("own")
    assert own.home(Cell("candidate", 1, SHARED.flags)) is own
    write_cell(own, SHARED)
    assert own.home(SHARED) is own  # it has been run here already


def test_a_stored_run_is_taken_with_its_records(experiment):
    first, second = experiment("first"), experiment("second")
    store = first.home(SHARED)
    write_cell(store, SHARED, source_fingerprint=source_fingerprint(), more={
        "lab_val_bpb": 1.5, "trained_for": first.id, "failures_before": 0, "lab_time_sec": 3.0})
    for name in ("result.json", "metrics.jsonl", "log.txt"):
        (store.cell_dir(SHARED) / name).write_text(name)
    second.data_is_ready = first.data_is_ready = True
    write_cell(second, SHARED, status="oom")
    second = experiment("second", retry_failed=True)
    second.data_is_ready = True
    (own,), (taken,) = first.run([SHARED]), second.run([SHARED])
    assert own["shared_from"] is None and taken["shared_from"] == str(store.path)
    assert (own["experiment_name"], taken["experiment_name"]) == ("first/baseline", "second/baseline")
    assert (own["failures_before"], taken["failures_before"]) == (0, 1) and taken["lab_val_bpb"] == 1.5
    assert [(second.cell_dir(SHARED) / name).read_text() for name in ("result.json", "log.txt")] == ["result.json", "log.txt"]
    assert [row["experiment_name"] for row in read_csv(second.path / "runs.csv")] == ["second/baseline"]
    assert Folder.cost([own, taken]) == {"runs": 1, "shared": 1, "seconds": 3.0}


@pytest.mark.parametrize("fields, more, aside", [
    ({"status": "diverged"}, {"lab_val_bpb": 1.5}, 1),                 # it failed
    ({"source_fingerprint": "other"}, {"lab_val_bpb": 1.5}, 0),        # of a source that was changed while it waited
    ({}, {}, 0)])                                                      # never evaluated, and its checkpoint is gone
def test_a_stored_run_that_is_not_sound_is_run_again(experiment, fields, more, aside):
    store = experiment("one").home(SHARED)
    write_cell(store, SHARED, **{"source_fingerprint": source_fingerprint()} | fields, more=more)
    assert not store.has(SHARED)
    store.prepare_cell(SHARED)
    assert not store.row(SHARED) and store.failures(SHARED) == aside
    store.source = "before the source was changed"
    with pytest.raises(UserError, match="start it again"):
        store.prepare_cell(SHARED)
