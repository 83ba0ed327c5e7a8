"""The command line of the attempts: the list, how scripts are run, tables that compare results."""

import json
import subprocess
import sys

import pytest

from nanochat.benchmarks import attempts_cli as attempts
from nanochat.common import UserError

NAMES = {"matrix_approx_bench", "loss_aware_low_rank_recovery", "data_aware_low_rank_plus_diag",
         "structured_sparsity_mlp_bench", "attention_backend_bench", "dynamic_block_update_schedule_bench"}


def result(tmp_path, name, **rows):
    content = dict(schema_version=1, script="attempts/x/y.py", argv=["--json-out=a b.json"], git_commit="0123456789",
                   device="CPU", torch_version="2", config={}, results=rows, traces={}, elapsed_sec=1.0)
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return str(path)


def test_it_lists_every_attempt_with_its_question(capsys):
    assert set(attempts.scripts()) == NAMES
    attempts.main(["list"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in NAMES) and "Do low-rank layers save time" in shown


def test_the_commands_that_run_them():
    chosen = ["matrix_approx_bench", "attention_backend_bench"]
    assert attempts.commands(chosen, ["--preset", "smoke"]) == [
        [sys.executable, str(attempts.scripts()[name]), "--preset", "smoke"] for name in chosen]
    recorded = attempts.commands(["all"], ["--record"])
    assert len(recorded) == len(NAMES)
    for _, script, *flags in recorded:
        _, container, file = script.split("/")
        assert flags[-1] == f"--json-out=attempts/results/{container}/{file[:-3]}.json"
        assert ("--equal-time-budget" in flags) == ("container_d" in container)


def test_the_exit_status_is_that_of_the_attempt(tmp_path):
    command = [sys.executable, "-m", "scripts.attempts", "run", "matrix_approx_bench", "--shares=0"]
    done = subprocess.run(command, cwd=attempts.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--shares" in done.stderr


@pytest.mark.parametrize("argv, names", [
    (["run", "matrix"], "matrix"),
    (["run"], "matrix_approx_bench"),
    (["run", "all", "--json-out=x"], "--json-out"),
    (["run", "all", "--record", "--preset=smoke"], "--preset"),
    (["sho"], "sho"),
    (["list", "--all"], "--all"),
    (["show", "/no/such.json"], "/no/such.json"),
    (["show", "--metrics=x"], "--metrics"),
])
def test_wrong_commands(argv, names):
    with pytest.raises(UserError, match=names):
        attempts.main(argv)


def test_one_result_is_a_table(tmp_path, capsys):
    row = {"bpb": 1.5, "ms": {"median": 2.0, "q1": 1, "q3": 3, "n": 5}, "curve": [1, 2], "why": "because"}
    path = result(tmp_path, "a.json", dense=row)
    attempts.main(["show", path])
    shown = capsys.readouterr().out
    assert "a.json" in shown and "python attempts/x/y.py '--json-out=a b.json'" in shown
    header, row = shown.splitlines()[-2:]
    assert header.split() == ["variant", "bpb", "ms", "why"] and row.split() == ["dense", "1.5", "2", "because"]


def test_a_wide_result_is_several_tables_and_equal_fields_are_shown_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = {name: {"heads": 4} | {f"a_long_field_{i}": i + len(name) for i in range(5)} | {"why": 80 * "x"}
            for name in ("one", "three")}
    attempts.main(["show", result(tmp_path, "a.json", **rows)])
    shown = capsys.readouterr().out.splitlines()
    first = shown.index("in all variants: heads 4, why " + 57 * "x" + "...") + 1
    assert [line.split() for line in shown[first:first + 4]] == [
        ["variant", "a_long_field_0", "a_long_field_1"], ["one", "3", "4"], ["three", "5", "6"], []]
    assert [line.split()[1:] for line in shown if line.startswith("three")] == [["5", "6"], ["7", "8"], ["9"]]


def test_two_results_are_compared(tmp_path, capsys):
    first = result(tmp_path, "a.json", dense={"kind": "x", "bpb": 2.0}, low={"bpb": 3.0}, gone={"bpb": 1.0})
    last = result(tmp_path, "b.json", dense={"kind": "x", "bpb": 1.0}, low={"bpb": 3.0})
    attempts.main(["show", first, last])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert shown == [["variant", "a", "b", "last", "/", "first"], ["dense", "2", "1", "0.5"], ["low", "3", "3", "1"],
                     ["gone", "1", "NA", "NA"]]
    with pytest.raises(UserError, match="--metric loss.*kind, bpb"):
        attempts.main(["show", first, last, "--metric", "loss"])
    with pytest.raises(UserError, match="--metric"):
        attempts.main(["show", first, first])


def test_a_plot_of_one_field(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [result(tmp_path, f"{i}.json", dense={"bpb": 2.0 + i}, none={"bpb": None}) for i in range(2)]
    attempts.main(["show", *paths, "--plot", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 5_000
    with pytest.raises(UserError, match="--plot"):
        attempts.main(["show", paths[0], "--plot", str(tmp_path / "y.png")])


def test_a_file_that_is_no_result_is_named(tmp_path):
    for text in ("[]", "{", '{"results": {}, "script": "x"}', '{"script": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="bad.json"):
            attempts.main(["show", str(tmp_path / "bad.json")])
