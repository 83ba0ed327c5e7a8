"""The report: the decision and its numbers are first, in words; it loads nothing; its numbers are those of the rows; a browser
can read it; what is not known is left out."""

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from nanochat.common import UserError
from nanochat.lab.charts import Dots, Estimate, Lines, nice_step, save
from nanochat.lab.decide import Verdict
from nanochat.lab.gates import Gate
from nanochat.lab.outputs import summary, write_outputs
from nanochat.lab.report import cost_in_words, curve, directed, estimates, figure, times_to_target, write_report
from nanochat.lab.rows import COLUMNS

VERDICT = {
    "decision": "promote", "why": "net gain +4.4% <(+3.3% to +5.4%)>", "about": "cosine <warm-down> on lab-cpu",
    "gates": [{"name": "no instability", "outcome": "pass", "detail": "2 runs succeeded"},
              {"name": "validation", "outcome": "unclear", "detail": "1.65 against 1.65"},
              {"name": "resume", "outcome": "fail", "detail": "step 3 has another batch"}],
    "net_gain": {"mean": 0.0438, "low": 0.033, "high": 0.0541}, "time": {"mean": 0.0419, "low": 0.0325, "high": 0.0513},
    "quality": {"mean": 0.0003, "low": -0.0008, "high": 0.0014}, "cost": {"runs": 9, "shared": 6, "seconds": 1834.2},
    "next": "a loss at another depth", "variants": {}}


def row(variant, seed, **fields):
    return dict.fromkeys(COLUMNS) | {
        "variant": variant, "seed": seed, "status": "ok", "steps_done": 100, "train_time_sec": 1.10302, "val_bpb": 2.39785,
        "tok_per_sec_median": 46590.7, "peak_mem_mib": 361.676, "final_train_loss": 3.7, "timestamp": f"2026-{seed}",
        "device": "AMD EPYC", "cell": f"{variant}-s{seed}", "command": "python -m scripts.base_train",
        "val_curve": [[0, 0.0, 4.0], [10, 1.0, 2.0], [20, 2.0, 1.5 + seed / 10]],
        "time_to_target_sec_measured": 1.0 + seed / 10,
        "target_metric_name": "val_bpb", "target_metric_threshold": 2.5} | fields


ROWS = [row(variant, seed) for variant in ("baseline", "candidate") for seed in (1, 2)]


def make(path, verdict, rows=ROWS):
    for found in rows:
        (path / "cells" / found["cell"]).mkdir(parents=True)
        (path / "cells" / found["cell"] / "row.json").write_text(json.dumps(found))
    if verdict:
        (path / "verdict.json").write_text(json.dumps(verdict))
    return write_report(path).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exp")
    make(path, VERDICT)
    return path


class Page(HTMLParser):
    VOID = {"meta", "br", "img", "rect", "path", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open, self.urls, self.texts, self.ids = [], [], [], {}
        self.feed(text)

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.urls += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]
        self.open += [] if tag in self.VOID else [(tag, known.get("id"))]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1][1]:
            self.ids[self.open[-1][1]] = data


def test_the_page_is_complete_has_the_verdict_first_and_loads_nothing(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    pictures = sorted(path.read_bytes() for path in folder.glob("*.png"))
    assert page.open == [] and len(pictures) == 5
    assert sorted(base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in page.urls) == pictures
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)
    assert "default-src 'none'; img-src data:;" in text
    assert page.ids["verdict"] == "promote" and "width=device-width" in text
    assert "cosine &lt;warm-down&gt;" in text and "python -m scripts.base_train" in text


def test_what_was_decided_is_said_in_words_and_in_order(folder):
    texts = [text.strip() for text in Page((folder / "report.html").read_text()).texts]
    order = [": cosine <warm-down> on lab-cpu, against the baseline with 2 seeds on AMD EPYC. A real gain: every gate passed.",
             "net gain +4.4% <(+3.3% to +5.4%)>", "4.1 % less time (3.2 to 5.0)",
             "0.0003 bits per byte worse (-0.0008 to +0.0014)", "4.4 % gained (3.3 to 5.4)", "✓ pass", "? unclear", "✗ fail",
             "a loss at another depth", "9 runs were made for it, 6 more were taken from the store, 30m34s of wall time",
             "Validation over optimizer step", "Runs", "Machine and source"]
    places = [texts.index(text) for text in order]
    assert places == sorted(places)
    assert {"1.1030", "2.3979", "46,591", "361.68"} <= set(texts) and not {"1.10302", "46590.7"} & set(texts)
    assert "eval_time_sec" not in texts  # a column in which nothing is known


@pytest.mark.parametrize("mean, low, high, says", [
    (0.041, 0.032, 0.05, "4.1 % less time (3.2 to 5.0)"), (-0.02, -0.03, -0.01, "2.0 % more time (1.0 to 3.0)"),
    (0.005, -0.01, 0.02, "0.5 % less time (-1.0 to +2.0)"), (-0.005, -0.02, 0.01, "0.5 % more time (-1.0 to +2.0)"),
    (0.01, None, 0.02, "1.0 % less time (interval not known)"), (0.0, 0.0, 0.0, "exactly the same")])
def test_an_interval_is_in_the_direction_of_its_word(mean, low, high, says):
    assert directed(mean, low, high, "% less time", "% more time", "{:.1%}") == says


def test_better_is_to_the_right_of_every_chart():
    known = {"time": {"mean": math.log(2), "low": 0.0, "high": 1.0}, "quality": {"mean": 0.1, "low": 0.05, "high": 0.2},
             "net_gain": {"mean": 0.03, "low": None, "high": None}}
    (_, _, time), (_, words, quality), (_, _, gain) = estimates(known, "nats")
    assert (time.mean, time.low) == (0.5, 0.0) and time.margin == pytest.approx(1 - 1 / 1.03)
    assert (quality.mean, quality.low, quality.high, quality.margin) == (-0.1, -0.2, -0.05, -0.005) and not quality.required
    assert words == "0.1000 nats worse (0.0500 to 0.2000)" and gain.low is None and gain.margin == pytest.approx(math.log(1.03))


def test_an_estimate_is_drawn_to_scale():
    def drawn(low, high, required=True):
        chart = Estimate(0.04, low, high, 0.03, "3 %", "less time", "{:g}".format, required)
        svg = chart.svg("about")
        ticks = {float(label): float(x) for x, label in re.findall(r'<text x="([\d.]+)" y="51">([-\d.e]+)<', svg)}
        scale = (ticks[0.04] - ticks[0.0]) / 0.04
        found = [re.search(pattern, svg) for pattern in (
            r'circle cx="([\d.]+)"', r'"margin" d="M([\d.]+) ', r'"zero" d="M([\d.]+) ', r'"range" d="M([\d.]+) 25H([\d.]+)"')]
        *places, bar = ([(float(x) - ticks[0.0]) / scale for x in match.groups()] if match else None for match in found)
        return [place for place, in places], bar, svg
    places, bar, svg = drawn(0.02, 0.06)
    assert places == pytest.approx([0.04, 0.03, 0.0], abs=2e-4) and bar == pytest.approx([0.02, 0.06], abs=2e-4)
    assert 'class="good"' in svg and 'class="bad"' in drawn(0.02, 0.06, required=False)[2]
    assert drawn(0.02, None)[1][1] > 0.04 and drawn(None, None)[1] is None  # to the edge; no bar
    assert [nice_step(least) for least in (0.011, 0.02, 3.0, 60.0)] == pytest.approx([0.02, 0.02, 5, 100])


@pytest.mark.parametrize("value, says", [
    (None, "-"), (12345678, "12,345,678"), (46590.7, "46,591"), (1826.13, "1,826.1"), (361.676, "361.68"), (1.10302, "1.1030"),
    (-0.00031, "-0.0003"), (True, "True"), (math.inf, "inf"), ("3/3", "3/3")])
def test_numbers_have_one_format(value, says):
    assert figure(value) == says


@pytest.mark.parametrize("verdict, has", [
    ({}, "not decided yet"), ({"decision": "keep optional", "why": "an old one", "gates": [], "net_gain": None}, "an old one"),
    ({"decision": "no change", "why": "the same bits", "time": None, "quality": None}, "It makes no difference.")])
def test_what_is_not_known_is_left_out(tmp_path, verdict, has):
    bare = row("baseline", 1, val_curve=[], tok_per_sec_median=None, peak_mem_mib=None, time_to_target_sec_measured=None)
    text = make(tmp_path, verdict, [bare])
    assert has in text and "<svg" not in text and "Gates" not in text and "What " not in text and Page(text).open == []


def test_a_report_over_depths_names_the_numbers_of_each(tmp_path):
    by_depth = {"2": VERDICT, "4": VERDICT | {"time": {"mean": -0.01, "low": -0.02, "high": -0.005}}}
    table = [{"variant": v, "depth": d, "val_bpb": 2 - d / 10, "tokens_trained": 100, "flops_per_token": 10**9 * d}
             for v in ("baseline", "candidate") for d in (2, 4)]
    text = make(tmp_path, VERDICT | {"by_depth": by_depth, "series": table}, [])
    texts = Page(text).texts
    assert {"4.1 % less time (3.2 to 5.0)", "1.0 % more time (0.5 to 2.0)"} <= set(texts)
    assert ": cosine <warm-down> on lab-cpu, against the baseline at depths 2, 4. A real gain: every gate passed." in texts
    assert (tmp_path / "scaling.png").exists()


@pytest.mark.parametrize("cost, says", [
    ({}, ""), ({"runs": 0, "shared": 0, "seconds": 0.5}, "0 runs were made for it, 500ms of wall time")])
def test_cost(cost, says):
    assert cost_in_words(cost) == says


def test_outputs_end_with_the_verdict(tmp_path, capsys):
    verdict = Verdict("reject", "it is slower", (Gate("no instability", "pass", "2 runs"),), next="a faster one")
    rows = {"baseline": ROWS[:2], "candidate": [row("candidate", 1, status="failed")]}
    for found in (row for group in rows.values() for row in group):
        (tmp_path / "cells" / found["cell"]).mkdir(parents=True)
        (tmp_path / "cells" / found["cell"] / "row.json").write_text(json.dumps(found))
    assert write_outputs(tmp_path, verdict, rows, "a test", cost={"runs": 3, "shared": 0, "seconds": 60.0}) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "verdict: reject (it is slower)" and "pass    no instability: 2 runs" in printed
    assert "next: a faster one" in printed and "cost: 3 runs were made for it, 1m00s of wall time" in printed
    assert json.loads((tmp_path / "verdict.json").read_text())["cost"]["runs"] == 3
    assert summary([row("x", 1, lab_val_bpb=2.5), row("x", 2, lab_val_bpb=2.7)])["val_bpb"] == pytest.approx(2.6)


def test_curves_and_times_are_the_rows():
    rows = [{"status": "ok", "val_curve": [[0, 0.0, 4.0], [10, 1.0, 2.0], [20, 2.0, 1.5]], "time_to_target_sec_measured": 1.5},
            {"status": "ok", "val_curve": [[0, 0.0, 4.0], [10, 3.0, 2.2], [20, 4.0, 1.7]], "time_to_target_sec_measured": 2.5}]
    assert curve(rows, "step") == [(10, pytest.approx(2.1), 2.0, 2.2), (20, pytest.approx(1.6), 1.5, 1.7)]
    assert [p[0] for p in curve(rows, "time")] == [2.0, 3.0]
    never = [{"status": "ok", "time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": 3.0,
              "time_to_target_sec_low": 2.0, "time_to_target_sec_high": None}]
    found = times_to_target({"a": rows, "one": rows[:1], "b": never})
    assert found.values == {"a": [1.5, 2.5], "one": [1.5], "b (extrapolated)": [3.0]}
    assert found.intervals == {"a": (0.0, pytest.approx(2 + 12.7062 * 0.5, rel=1e-4)), "b (extrapolated)": (2.0, 3.0)}
    assert times_to_target({"c": [{**never[0], "time_to_target_sec_extrapolated": None}]}) is None


def test_a_chart_shows_its_data(tmp_path):
    """The mean, the band, the dots and the interval are read from the figure."""
    lines, dots = Figure(), Figure()
    Lines("x", "y", {"a": [(1.0, 2.0, 1.5, 2.5), (3.0, 1.0, 1.0, 1.0)]}, log_x=True).draw(lines)
    axes, = lines.axes
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 2.0], [3.0, 1.0]] and axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.0e+00", "3.0e+00"]
    assert {2.5, 1.5} <= set(axes.collections[0].get_paths()[0].vertices[:, 1])
    Dots("s", {"a": [3.0, 4.0], "b": [5.0]}, {"a": (2.0, 5.0)}).draw(dots)
    axes, = dots.axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[2.0, 0.0], [5.0, 0.0]], [[3.0, 0.0], [4.0, 0.0]], [[5.0, 1.0]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"] and axes.yaxis_inverted()
    assert save(Lines("x", "y", {}), tmp_path / "none.png") == "" == save(Dots("x", {}), tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError):
        write_report(tmp_path)


def test_a_browser_reads_the_verdict(folder, tmp_path):
    browser = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)
    if not browser:
        pytest.skip("no Chromium here")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
                           (folder / "report.html").as_uri()], capture_output=True, text=True, timeout=60)
    assert re.search(r'id="verdict">promote<', done.stdout)
