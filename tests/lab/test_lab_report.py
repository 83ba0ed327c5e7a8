"""The report: the verdict is first, it loads nothing, its numbers are those of the rows, and a browser can read it."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from test_lab_experiments import SimulatedFolder, comparison

from nanochat.common import UserError
from nanochat.lab import experiments
from nanochat.lab.charts import Dots, Lines, save
from nanochat.lab.outputs import write_outputs
from nanochat.lab.report import curve, times_to_target, write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exp")
    simulated = SimulatedFolder(path, candidate={"pace": 0.93})
    verdict, rows = experiments.compare(comparison(simulated), [1, 2], 6)
    write_outputs(path, verdict, rows, "cosine <warm-down>")
    return path


class Page(HTMLParser):
    VOID = {"meta", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.urls, self.texts, self.ids = [], [], [], {}
        self.feed(text)

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
    assert page.ids["verdict"] == json.loads((folder / "verdict.json").read_text())["decision"] == "promote"
    assert text.index('id="verdict"') < text.index("<img") and "width=device-width" in text
    assert "cosine &lt;warm-down&gt;" in text and "python -m scripts.base_train" in text


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
