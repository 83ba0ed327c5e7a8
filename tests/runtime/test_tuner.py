"""The tuner: what it measures decides, ties do not, and a choice is remembered by machine and problem."""

import json
import time

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat.runtime.tuner import NEGLIGIBLE, TIE, Tuner, fastest, measure

CPU = torch.device("cpu")


def sleeper(seconds, calls=None):
    """A candidate that takes so long, and notes its calls."""
    def call():
        if calls is not None:
            calls.append(seconds)
        time.sleep(seconds)
    return lambda: call


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(1e-6, 10), min_size=1, max_size=6))
def test_no_candidate_is_much_faster_than_the_chosen_one(seconds):
    assert seconds[fastest(seconds)] <= min(seconds.values()) * (1 + TIE)


def test_the_fastest_is_chosen_and_its_times_are_in_milliseconds(tmp_path):
    choice = Tuner(CPU, tmp_path).choose("sleep", {"slow": sleeper(0.02), "quick": sleeper(0.008), "slower": sleeper(0.1)})
    assert (choice.name, choice.reason) == ("quick", "measured")
    assert choice.milliseconds["quick"] == pytest.approx(8, rel=0.5) and choice.milliseconds["slow"] > 15
    assert str(choice).startswith("quick (measured: quick ")  # fastest first


def test_a_choice_is_remembered_for_the_same_problem_and_candidates_only(tmp_path):
    calls = []
    def choose(problem, **candidates):
        return Tuner(CPU, tmp_path).choose(problem, {n: sleeper(s, calls) for n, s in candidates.items()})
    first = choose("p", a=0.02, b=0.005)
    assert calls and first.name == "b"
    calls.clear()
    again = choose("p", a=0.001, b=0.02)  # other times: not asked for
    assert again.name == "b" and again.reason == "measured before" and again.milliseconds == first.milliseconds and not calls
    assert choose("q", a=0.005, b=0.02).name == "a" and calls
    assert choose("p", a=0.005, c=0.02).name == "a", "another set of candidates"
    assert choose("q", a=0.02, b=0.02).reason == "measured before"


def test_what_is_short_counts_by_how_much_of_it_there_is(tmp_path):
    def choose(times_in_use):
        candidates = {"first": sleeper(NEGLIGIBLE / 4), "quicker": lambda: lambda: None}
        return Tuner(CPU, folder=None).choose("p", candidates, times_in_use)
    assert (choose(1).name, choose(1).reason) == ("first", "too short to matter")
    assert (choose(100).name, choose(100).reason) == ("quicker", "measured")


def test_a_gpu_s_own_time_decides(device):
    """A candidate that takes the program longer to launch, and the GPU less to run, is the faster one in a step."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")

    def candidate(launching, cycles):
        return lambda: lambda: (time.sleep(launching), torch.cuda._sleep(cycles))
    candidates = {"soon launched": candidate(0, 2_000_000), "soon done": candidate(0.005, 500_000)}
    assert Tuner(device, folder=None).choose("p", candidates).name == "soon done"


def test_one_candidate_is_taken_without_a_call(tmp_path):
    calls = []
    assert Tuner(CPU, tmp_path).choose("p", {"a": sleeper(0.1, calls)}).name == "a" and not calls


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choices": 3}', '{"choices": {"p": {"name": "a"}}}',
                                     '{"choices": {"p": {"name": "z", "milliseconds": {"a": 1, "b": 2}}}}'])
def test_a_damaged_memory_counts_as_none(tmp_path, content):
    tuner = Tuner(CPU, tmp_path)
    tuner.path.write_text(content)
    assert tuner.choose("p", {"a": sleeper(0.01), "b": sleeper(0.001)}).reason == "measured"
    assert json.loads(tuner.path.read_text())["choices"]["p"]["name"] in ("a", "b")


def test_a_folder_that_cannot_be_written_costs_the_memory_alone(tmp_path):
    (tmp_path / "file").write_text("")
    assert Tuner(CPU, tmp_path / "file").choose("p", {"a": sleeper(0.02), "b": sleeper(0.005)}).name == "b"


def test_a_candidate_that_is_far_behind_is_not_timed_again():
    calls = []
    measure({"a": sleeper(0.001)(), "b": sleeper(0.02, calls)()}, CPU)
    assert len(calls) == 3  # the first one, and two that are timed
