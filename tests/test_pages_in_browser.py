"""The page of `scripts.serve` and the report of a run in a real browser, as wide as a phone and as a screen: what a reader does
there works, nothing scrolls sideways, the console stays empty, and no other machine is asked for anything.

Where playwright or a Chromium is missing, these tests are skipped. To have both:

    pip install playwright && playwright install chromium
"""

import os
import re
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nanochat.features import FEATURES
from nanochat.serving import Generator
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from processes import tiny_flags, trained
from scripts.sample import SamplingFlags
from scripts.serve import ServeFlags, Server
from test_serve import load, runs  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS_PER_TOKEN = 0.02  # of the model: so many pass that a reader can stop it, and sees the text grow
wide = pytest.mark.parametrize("width", [400, 1200])


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        path = next(filter(None, map(shutil.which, NAMES)), None) or p.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(f"there is no browser: neither of {', '.join(NAMES)} nor playwright's own")
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"] * (os.name == "posix" and os.geteuid() == 0))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(runs):  # noqa: F811
    """Of a server whose model takes a while for a token."""
    def load_slow(tag, step):
        model, *others = load(tag, step)
        model.register_forward_hook(lambda *_: time.sleep(SECONDS_PER_TOKEN))
        return model, *others
    with Server(ServeFlags(port=0), SamplingFlags(max_tokens=30, temperature=1.5, seed=1)) as server:
        server.generator = Generator(load_slow, "tiny")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


@contextmanager
def opened(browser, url, width, errors=0, **options):
    """The page at an address. At the end: so many errors on its console, no request to other hosts, no scrolling sideways."""
    context = browser.new_context(viewport={"width": width, "height": 700}, **options)
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(30_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    assert len(said) == errors, said
    assert {urlsplit(address).netloc for address in asked if not address.startswith("data:")} == {urlsplit(url).netloc}
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "scrolls sideways"
    context.close()


def generate(page, prompt, **numbers):
    page.wait_for_function("document.getElementById('tag').value")
    page.fill("#prompt", prompt)
    for name, value in numbers.items():
        page.fill(f"#{name}", str(value))
    page.click("#start")


def ended(page) -> str:
    """The line of a text that has come to its end."""
    page.wait_for_selector("#start:enabled")
    return page.inner_text("#status")


@wide
def test_a_text_grows_token_by_token_and_tells_probabilities(browser, url, width):
    with opened(browser, url, width) as page:
        page.evaluate("""() => {
            window.counts = [];
            new MutationObserver(() => counts.push(document.querySelectorAll("#text .token").length))
                .observe(document.getElementById("text"), {childList: true});
        }""")
        generate(page, "def größer(数):")
        assert re.match(r"tiny, step 20: \d+ tokens in .* ended by: ", ended(page))
        counts = page.evaluate("counts")
        assert len(set(counts)) >= 3 and counts == sorted(counts), "it was seen while it grew"
        assert page.inner_text("#text .prompt") == "def größer(数):"

        page.hover("#text .token >> nth=2")
        about = page.locator("#about")
        rows = about.locator("div").all_inner_texts()
        assert about.is_visible() and len(rows) >= 8 and all(row.rstrip().endswith("%") for row in rows)
        assert about.locator(".taken").count() == 1
        box = about.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        page.mouse.move(1, 1)
        assert not about.is_visible()
        page.focus("#text")
        page.keyboard.press("ArrowRight")
        assert about.is_visible(), "without a mouse"
        page.keyboard.press("Escape")
        assert not about.is_visible()


@wide
def test_stop_stops(browser, url, width):
    with opened(browser, url, width) as page:
        generate(page, "class", max_tokens=1000)
        page.wait_for_selector("#text .token >> nth=1")
        page.click("#stop")
        said = ended(page)
        count = int(re.fullmatch(r"stopped after (\d+) tokens", said)[1])
        assert 2 <= count == page.evaluate("tokens.length")
        generate(page, "class", max_tokens=3)
        assert "3 tokens" in ended(page), "the next one is answered"


def test_the_model_is_picked_and_greedy_text_is_the_same_again(browser, url):
    with opened(browser, url, 400) as page:
        texts = []
        for step in ("10", "20", "10"):
            page.wait_for_function("document.getElementById('tag').value")
            page.select_option("#step", step)
            generate(page, "def", temperature=0, max_tokens=8)
            assert ended(page).startswith(f"tiny, step {step}: ")
            texts.append(page.inner_text("#text"))
        assert texts[0] == texts[2] != texts[1]


def test_what_cannot_be_generated_is_said_on_the_page(browser, url):
    """The browser notes both refusals on its console."""
    with opened(browser, url, 400, errors=2) as page:
        generate(page, "x y " * 2500)
        assert "Shorten the prompt" in ended(page) and page.get_attribute("#status", "class") == "error"
        page.select_option("#tag", "broken")
        generate(page, "x")
        assert "damaged" in ended(page)
        page.select_option("#tag", "tiny")
        generate(page, "<img src=x onerror=alert(1)> & <b>")
        assert ended(page).startswith("tiny") and page.locator("#text img, #text b").count() == 0, "text is not markup"


@wide
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_run(browser, report, width, scheme):
    with opened(browser, report.as_uri(), width, color_scheme=scheme) as page:
        assert "ok: 6 of 6 steps" in page.inner_text("body")
        boxes = [box.bounding_box() for box in page.locator("svg").all()]
        assert boxes and all(box["width"] > 100 and box["x"] + box["width"] <= width for box in boxes)
        background, text = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        brightness = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (background, text)]
        assert (brightness[0] < brightness[1]) == (scheme == "dark"), "legible"


@pytest.fixture(scope="module")
def report(base):
    return trained(build_run(parse_config(FEATURES, tiny_flags(base, "seen", "--num-iterations=6")))).plan.run_dir / "report.html"
