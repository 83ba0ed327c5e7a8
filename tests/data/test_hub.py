"""Sources `hf:...`, read by the real `datasets` and `huggingface_hub` from a small hub on loopback (hub_server.py).

The clients read their settings when they are imported, so they run in processes of their own. Cases that wait for a client
to give up run beside the others, from the beginning on.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs datasets: pip install datasets")]

ROOT = Path(__file__).parents[2]
READER = """
import json, sys, threading
from nanochat.common import UserError
from nanochat.data import hub
from nanochat.data.sources import Counts, iter_documents
settings, cases = json.loads(sys.argv[1])
vars(hub).update(settings)
for source, options in cases:
    counts = Counts()
    try:
        found = dict(documents=list(iter_documents(source, counts=counts, **options)))
    except UserError as e:
        found = dict(error=str(e))
    print(json.dumps(dict(found, unreadable=counts.unreadable, empty=counts.empty)))
print(json.dumps([thread.name for thread in threading.enumerate() if not thread.daemon]))
"""
IMPATIENT = dict(ANSWER_SECONDS=2, READ_RETRIES=1)  # for hubs that never answer


def lines(name: str, count: int) -> list[str]:
    """Texts of a file. They differ, so that one lost, doubled or out of its place is seen."""
    return [f"{name}, document {i}. " + f"{i * 7919 % 1000} bears went to town.\n" * (1 + i % 20) for i in range(count)]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_datasets(root: Path) -> None:
    from pyarrow import parquet, table
    for name in ("train-0", "train-1", "train-2"):
        write_rows(root / f"me/lines/{name}.jsonl", [dict(id=i, text=text) for i, text in enumerate(lines(name, 400))])
    for name in ("unlucky", "broken", "stuck", "silent", "unlisted", "gated"):
        write_rows(root / f"me/{name}/{name}.jsonl", [dict(text=text) for text in lines(name, 400)])

    for i, name in enumerate(("table/data/train-00000-of-00002", "table/data/train-00001-of-00002", "unlucky-table/unlucky")):
        rows = table(dict(id=list(range(500)), body=lines(f"table-{i}", 500)))
        (root / "me" / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(rows, root / f"me/{name}.parquet", row_group_size=100)

    for name in ("small/train", "small/test", "large/a", "large/b"):
        write_rows(root / f"me/several/{name}.jsonl", [dict(text=text) for text in lines(name, 10)])
    (root / "me/several/README.md").write_text("""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: large
  data_files: large/*.jsonl
---
Two configs.
""")

    good = [dict(text="good")] * 3
    write_rows(root / "me/mixed/a.jsonl", [*good, dict(text=5), dict(text=None), *good])
    write_rows(root / "me/partly/a.jsonl", [*good, dict(other="x"), *good])
    write_rows(root / "me/partly/b.jsonl", [dict(other="no text")])
    (root / "me/array").mkdir()
    (root / "me/array/a.json").write_text(json.dumps([dict(text="one"), dict(other="two"), dict(text="three")]))
    write_rows(root / "me/damaged/a.jsonl", good)
    (root / "me/damaged/b.jsonl").write_text('{"text": "good"}\n{"text": "no end\n{"text": "good"}\n')
    write_rows(root / "me/unlike/a.jsonl", good)
    write_rows(root / "me/unlike/b.jsonl", [dict(text="x", more=1)])
    (root / "me/bare").mkdir()
    (root / "me/bare/README.md").write_text("No data yet.\n")
    write_rows(root / "me/empty/a.jsonl", [])


class Clients:
    """Starts processes that read from a hub; what they print comes back from `answers` and `finish`."""

    def __init__(self, base: Path, hub: Hub):
        self.hub, self.home = hub, base / "huggingface"
        free_of_proxies = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        inherited = {name: value for name, value in free_of_proxies.items() if not name.startswith(("HF_", "DATASETS_"))}
        self.environment = inherited | dict(HF_ENDPOINT=hub.endpoint, HF_HOME=str(self.home), HF_HUB_DISABLE_TELEMETRY="1",
                                            NANOCHAT_BASE_DIR=str(base / "base"), PYTHONPATH=str(ROOT))

    def start(self, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                cwd=cwd, env=self.environment | environment)

    def reader(self, *cases, settings=None, **how) -> subprocess.Popen:
        """A process that reads sources with `iter_documents`; a case is a source, or a source and its options."""
        cases = [(case, {}) if isinstance(case, str) else case for case in cases]
        return self.start("-c", READER, json.dumps([settings or {}, cases]), **how)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def answers(reader: subprocess.Popen, silent: bool = True) -> list[dict]:
    status, out, err = finish(reader)
    *found, threads = map(json.loads, out.splitlines())
    assert status == 0 and threads == ["MainThread"], err
    assert not (silent and err)
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    pytest.importorskip("pyarrow")
    root = tmp_path_factory.mktemp("hub")
    write_datasets(root)
    hub = Hub(root)
    for name in ("unlucky.jsonl", "unlucky.parquet"):  # read once for its columns, then whole
        hub.drops[name] = iter([True, False, True, False])
    hub.drops["broken.jsonl"] = itertools.repeat(True)
    hub.hangs = {f"/datasets/me/stuck/resolve/{COMMIT}/stuck.jsonl",
                 "/api/datasets/me/silent", "/api/datasets/me/unlisted/tree"}
    hub.gated = {"me/gated"}
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory):
    return Clients(tmp_path_factory.mktemp("clients"), hub)


@pytest.fixture(scope="module", autouse=True)
def waiting(clients):
    """The processes that wait for a client to give up."""
    impatient = f"from nanochat.data import hub\nvars(hub).update({IMPATIENT})\nimport runpy\n"
    code = impatient + "runpy.run_module('scripts.tok_train', run_name='__main__', alter_sys=True)"
    processes = dict(broken=clients.start("-c", code, "--data=hf:me/broken", "--vocab-size=300"),
                     stuck=clients.reader("hf:me/stuck", settings=IMPATIENT),
                     silent=clients.reader("hf:me/silent", "hf:me/unlisted", settings=IMPATIENT))
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def test_datasets_are_read_whole_and_in_order(clients):
    whole = [text for name in ("train-0", "train-1", "train-2") for text in lines(name, 400)]
    table = [text for i in range(2) for text in lines(f"table-{i}", 500)]
    found = answers(clients.reader("hf:me/lines", "hf:me/lines", ["hf:me/table", {"text_column": "body"}], "hf:me/table:::body",
                                   "hf:me/several:small", "hf:me/several:small:test", "hf:me/several:large"))
    documents = [answer["documents"] for answer in found]
    assert documents[:2] == [whole, whole]
    assert documents[2:4] == [table, table]
    assert documents[4:] == [lines("small/train", 10), lines("small/test", 10), lines("large/a", 10) + lines("large/b", 10)]


def test_max_chars_stops_reading(clients, hub):
    before = len(hub.requests)
    found = answers(clients.reader(["hf:me/lines", {"max_chars": 1000}], ["hf:me/table:::body", {"max_chars": 1000}]))
    assert [sum(map(len, answer["documents"])) for answer in found] == [1000, 1000]
    asked = [line for line in hub.requests[before:] if line.startswith("GET /datasets/")]
    assert any("train-0" in line for line in asked)
    assert not any(name in line for line in asked for name in ("train-1.jsonl", "train-00001-of-00002"))


def test_bad_rows_are_named_or_counted(clients):
    skip = {"skip_bad": True}
    named, counted, partly, array, array_counted = answers(clients.reader(
        "hf:me/mixed", ["hf:me/mixed", skip], "hf:me/partly", "hf:me/array", ["hf:me/array", skip]))
    assert named["error"].startswith("hf:me/mixed, row 4: column 'text' holds int, not text.")
    assert "--skip-bad" in named["error"]
    assert counted == dict(documents=["good"] * 6, unreadable=1, empty=1)
    # the library fills in what is missing in a row or a file, so it looks like a null
    assert partly == dict(documents=["good"] * 6, unreadable=0, empty=2)
    assert array == array_counted == dict(documents=["one", "three"], unreadable=0, empty=1)


ERRORS = {
    "hf:me/table": ["has no column 'text'; it has 'id', 'body'", "--text-column NAME, or --data hf:me/table::train:NAME"],
    "hf:me/table:::words": ["has no column 'words'; it has 'id', 'body'", "with the text: --data hf:me/table::train:NAME"],
    "hf:me/array:::words": ["has no column 'words'; it has 'text', 'other'"],
    "hf:me/several": ["available configs: ['small', 'large']", "hf:NAME:CONFIG:SPLIT"],
    "hf:me/several:huge": ["'huge' not found. Available: ['small', 'large']", "hf:NAME:CONFIG:SPLIT"],
    "hf:me/lines::dev": ["Bad split: dev. Available splits: ['train']", "hf:NAME:CONFIG:SPLIT"],
    "hf:me/nowhere": ["has no dataset 'me/nowhere'", "hf auth login"],
    "hf:a/b/c": ["'a/b/c' cannot be a dataset's name"],
    "hf:nanochat": ["there is a folder nanochat here", "--data nanochat"],
    "hf:me/gated": ["gated", "hf auth login"],
    "hf:me/bare": ["doesn't contain any data files"],
    "hf:me/empty": ["no text in hf:me/empty"],
    "hf:me/damaged": ["JSON parse error", "hf download --repo-type dataset me/damaged --local-dir FOLDER"],
    "hf:me/unlike": ["column names don't match", "hf download --repo-type dataset me/unlike --local-dir FOLDER"],
}


def test_errors_say_what_is_wrong_and_what_to_do(clients):
    found = answers(clients.reader(*([source, {"skip_bad": True}] for source in ERRORS)))
    for source, answer in zip(ERRORS, found, strict=True):
        for part in [source, *ERRORS[source]]:
            assert part in answer["error"], source
        assert "\n" not in answer["error"] and len(answer["error"]) < 500, source


def test_a_hub_that_cannot_be_reached(clients):
    found, = answers(clients.reader("hf:me/lines", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "the hub at http://127.0.0.1:9 does not answer" in found["error"] and "--data python" in found["error"]


def test_a_connection_that_drops_now_and_then_loses_nothing(clients, hub):
    of_rows, of_table = answers(clients.reader("hf:me/unlucky", "hf:me/unlucky-table:::body"))
    assert of_rows["documents"] == lines("unlucky", 400) and of_table["documents"] == lines("table-2", 500)
    assert not any(next(hub.drops[name], False) for name in ("unlucky.jsonl", "unlucky.parquet")), "all were met"


def test_the_command_line(clients, tmp_path):
    arguments = ["--data=hf:me/lines", "--max-chars=150000"]
    base = dict(NANOCHAT_BASE_DIR=str(tmp_path))
    for module, more, wanted in (("scripts.tok_train", ["--vocab-size=400"], "documents"), ("nanochat.dataset", [], "train")):
        status, out, err = finish(clients.start("-m", module, *arguments, *more, **base))
        assert status == 0 and wanted in out and "Traceback" not in err, err
        assert len(err.splitlines()) < 10, err  # progress, no page of the libraries' warnings
    manifest, = (tmp_path / "tokens").glob("*/manifest.json")
    splits = json.loads(manifest.read_text())["splits"]
    assert splits["train"]["text_bytes"] + splits["val"]["text_bytes"] == 150_000

    status, out, err = finish(clients.start("-m", "nanochat.dataset", "--data=hf:me/table", **base))
    error = [line for line in err.splitlines() if line.startswith("error: hf:me/table has no column 'text'")]
    assert status == 2 and len(error) == 1 and "Traceback" not in err


def test_a_hub_that_never_answers(waiting):
    silent, unlisted = answers(waiting["silent"])
    assert "does not answer" in silent["error"]
    assert "cannot read hf:me/unlisted" in unlisted["error"] and "Check the network" in unlisted["error"]


def test_a_file_that_never_comes(waiting):
    stuck, = answers(waiting["stuck"], silent=False)
    assert "cannot read hf:me/stuck" in stuck["error"] and "Check the network" in stuck["error"]


def test_a_connection_that_always_drops(waiting):
    status, out, err = finish(waiting["broken"])
    assert status == 2 and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == err.splitlines()[-1:]
    assert "cannot read hf:me/broken" in err and "Check the network" in err
    assert len(err.splitlines()) <= 3, err  # a line for each round of attempts
