"""Files of every kind, packed in every way; everything that is not read is named or counted; nothing bad gets through."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.data.compression import DECOMPRESS
from nanochat.data.files import READERS, find_files
from nanochat.data.sources import Counts, iter_documents, source_identity
from nanochat.dataset import TokenDataset, prepare_tokens
from nanochat.tokenizer import Tokenizer

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

TEXTS = ["One document,\nwith \"quotes\" and Größe.\r\n", "你好, 世界 🙂\tzwei", "x" * 200_000 + " a long one"]
TEXT_KINDS = (".txt", ".md", ".py", ".rst", ".tex", ".html", ".htm")
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
           ".zst": lambda content: zstandard.ZstdCompressor().compress(content)}


def table(texts):
    return pa.table({"id": list(range(len(texts))), "text": texts})


def as_parquet(texts) -> bytes:
    from pyarrow import parquet
    out = io.BytesIO()
    parquet.write_table(table(texts), out)
    return out.getvalue()


def as_arrow(texts, new=None) -> bytes:
    out = io.BytesIO()
    rows = table(texts)
    with (new or pa.ipc.new_file)(out, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)
    return out.getvalue()


def as_csv(texts, delimiter=",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def as_jsonl(texts) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


ROW_KINDS = {".json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
             ".jsonl": as_jsonl, ".ndjson": as_jsonl, ".csv": as_csv, ".tsv": lambda texts: as_csv(texts, "\t"),
             ".parquet": as_parquet, ".arrow": lambda texts: as_arrow(texts, pa.ipc.new_stream), ".feather": as_arrow}
ARCHIVES = {".zip": None, ".tar": "", ".tgz": ".gz", ".tar.gz": ".gz", ".tar.xz": ".xz", ".tar.bz2": ".bz2", ".tar.zst": ".zst"}


def content_of(kind: str) -> bytes:
    return TEXTS[0].encode() if kind in TEXT_KINDS else ROW_KINDS[kind](TEXTS)


def texts_of(kind: str) -> list[str]:
    return TEXTS[:1] if kind in TEXT_KINDS else TEXTS


def as_archive(kind: str, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    if kind == ".zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return PACKERS[ARCHIVES[kind]](out.getvalue())


def read(source, **options) -> tuple[list[str], Counts]:
    counts = Counts()
    return list(iter_documents(str(source), counts=counts, **options)), counts


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with one good file in it."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("fine")
    return tmp_path / "corpus"


# ---- every kind

def test_every_kind_is_here():
    assert set(READERS) == {*TEXT_KINDS, *ROW_KINDS, ".zip", ".tar"} and set(DECOMPRESS) == set(PACKERS) - {""}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", [*TEXT_KINDS, *ROW_KINDS])
def test_every_kind_and_compression(tmp_path, kind, packing):
    (tmp_path / f"file{kind.upper()}{packing}").write_bytes(PACKERS[packing](content_of(kind)))
    documents, counts = read(tmp_path)
    assert documents == texts_of(kind) and counts.files == 1 and not counts.left_out


@pytest.mark.parametrize("archive", ARCHIVES)
def test_every_kind_in_every_archive(tmp_path, archive):
    members = {f"folder/{i:02d}{kind}{packing}": PACKERS[packing](content_of(kind))
               for i, kind in enumerate([*TEXT_KINDS, *ROW_KINDS]) for packing in ("", ".gz", ".zst")}
    backwards = dict(reversed(members.items())) | {"folder/inner.zip": as_archive(".zip", {"x.txt": b"x"}),
                                                   "image.png": b"\x89PNG", ".hidden.txt": b"x", "empty.txt": b""}
    (tmp_path / f"all{archive}").write_bytes(as_archive(archive, backwards))
    documents, counts = read(tmp_path)
    assert documents == [text for kind in [*TEXT_KINDS, *ROW_KINDS] for _ in range(3) for text in texts_of(kind)]
    assert counts.left_out == {"archive within an archive": 1, ".png": 1, "hidden": 1, "empty file": 1}
    assert counts.examples["archive within an archive"].endswith(f"all{archive}/folder/inner.zip")


@pytest.mark.parametrize("content, documents", [
    ('["one", {"text": "two"}, {"text": null}]', ["one", "two"]), ('{"text": "one"}', ["one"]), ('"one"', ["one"]),
    ('{"text": "one"}\n\n{"text": "two"}\n', ["one", "two"]), ('"one"\n"two"', ["one", "two"]),
    (' [ "one" , "two" ] \n', ["one", "two"]), ('\ufeff["one"]', ["one"]),
])
def test_shapes_of_json(tmp_path, content, documents):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    assert read(tmp_path)[0] == documents


def test_csv_of_other_programs(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,n\rone,1\r\"two\rlines\",2\r")  # old Macintosh line ends
    (tmp_path / "b.csv").write_bytes(codecs.BOM_UTF8 + b"n,text\r\n1,three\r\n\r\n2,four,,\r\n")  # Excel's mark, empty fields
    assert read(tmp_path)[0] == ["one", "two\rlines", "three", "four"]


@pytest.mark.parametrize("mark, encoding", [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                                            (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le"),
                                            (codecs.BOM_UTF32_BE, "utf-32-be")])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_byte_order_marks_never_reach_a_document(tmp_path, mark, encoding, packing):
    content = {"a.txt": TEXTS[0] + "\ufeff" + TEXTS[1], "b.jsonl": as_jsonl(TEXTS).decode(), "c.json": '["x\\ufeffy"]',
               "d.csv": as_csv(TEXTS).decode(), "e.log": "unknown"}
    for name, text in content.items():
        (tmp_path / (name + packing)).write_bytes(PACKERS[packing](mark + text.encode(encoding)))
    assert read(tmp_path)[0] == [TEXTS[0] + TEXTS[1], *TEXTS, "xy", *TEXTS]
    assert read(tmp_path / f"e.log{packing}")[0] == ["unknown"]


def test_zstd_of_several_frames_and_long_windows(tmp_path):
    frames = [zstandard.ZstdCompressor().compress(text.encode()) for text in TEXTS]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    params = zstandard.ZstdCompressionParameters(window_log=28)  # zstd --long=28; more than decoders allow by default
    long = zstandard.ZstdCompressor(compression_params=params).compressobj()
    (tmp_path / "b.txt.zst").write_bytes(long.compress(b"long") + long.flush())
    assert read(tmp_path)[0] == ["".join(TEXTS), "long"]


def test_a_file_of_another_name_is_text_if_it_looks_so(tmp_path):
    for name in ("notes", "x.log", "y.doc"):
        (tmp_path / name).write_text("words")
        assert read(tmp_path / name)[0] == ["words"]
    for content in (b"\xff\xfe\xfa", b"a\0b"):
        (tmp_path / "y.doc").write_bytes(content)
        with pytest.raises(UserError, match="y.doc is not text, and of no known kind. Known: .txt .md .*parquet.*zst"):
            read(tmp_path / "y.doc", skip_bad=True)


@pytest.mark.parametrize("library, kind", [("zstandard", ".txt.zst"), ("pyarrow", ".parquet"), ("pyarrow", ".arrow")])
def test_a_missing_library_is_named(tmp_path, library, kind):
    (tmp_path / f"x{kind}").write_bytes(b"x")
    code = (f"import sys; sys.modules[{library!r}] = None\n"  # what Python does where an import must fail
            "from nanochat.cli.program import cli\nfrom nanochat.data.sources import iter_documents\n"
            f"cli(lambda: next(iter_documents({str(tmp_path)!r}, skip_bad=True)) and 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"pip install {library}" in done.stderr and "extra" in done.stderr


# ---- what is left out

@pytest.mark.parametrize("kind, make", [
    (".png", lambda d: (d / "x.PNG").write_bytes(b"\x89PNG")),
    (".log.gz", lambda d: (d / "x.log.gz").write_bytes(gzip.compress(b"a"))),
    ("no known suffix", lambda d: (d / "Makefile").write_text("all:")),
    ("hidden", lambda d: (d / ".x.txt").write_text("a")),
    ("hidden", lambda d: [(d / ".git").mkdir(), (d / ".git" / "x.txt").write_text("a")]),
    ("empty file", lambda d: (d / "x.txt").write_bytes(b"")),
    ("dead link", lambda d: (d / "x.txt").symlink_to(d / "nowhere")),
    ("dead link", lambda d: (d / "x.txt").symlink_to(d / "x.txt")),
    ("pipe or device", lambda d: os.mkfifo(d / "x.txt")),
    ("link to a folder above", lambda d: (d / "up").symlink_to("..")),
    ("link or device in an archive", lambda d: make_tar_with_a_link(d / "x.tar")),
])
def test_what_is_left_out_is_counted(folder, kind, make):
    (folder.parent / "beside.txt").write_text("not in the folder")
    make(folder)
    documents, counts = read(folder)
    assert documents == ["fine"] and counts.left_out == {kind: 1} and not counts.unreadable
    assert Path(counts.examples[kind]).is_relative_to(folder)
    kinds = ["hidden"] if kind == "hidden" else [kind]  # a glob does not find hidden files
    if kind not in ("hidden", "link to a folder above"):
        assert list(read(folder / "*")[1].left_out) == kinds


def make_tar_with_a_link(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("link.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "elsewhere.txt"
        archive.addfile(info)


def test_what_may_not_be_read_is_counted():
    if not hasattr(os, "geteuid"):
        pytest.skip("POSIX permissions")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder, user = Path(name), os.geteuid()
        for made in ("a.txt", "b.txt"):
            (folder / made).write_text(made)
        (folder / "closed").mkdir()
        os.chmod(folder / "b.txt", 0)
        os.chmod(folder / "closed", 0)
        try:
            if user == 0:
                os.seteuid(65534)  # nobody: what root may read is no test
            documents, counts = read(folder)
            with pytest.raises(UserError, match="b.txt may not be read"):
                read(folder / "b.txt")
        finally:
            os.seteuid(user)
    assert documents == ["a.txt"]
    assert counts.left_out == {"not permitted to be read": 1, "folder that cannot be read": 1}


def test_linked_folders_are_read_once(folder, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("linked")
    for link in ("0", "1"):
        (folder / link).symlink_to(tmp_path / "elsewhere")
    (folder / "2").mkdir()
    (folder / "2" / "loop").symlink_to(folder / "2")
    (folder / "2" / "c.txt").write_text("real")
    (folder / "1st").symlink_to(folder / "2")
    documents, counts = read(folder)
    assert documents == ["linked", "real", "fine"] and not counts.left_out
    found = [file.path.relative_to(folder).as_posix() for file in find_files(str(folder))]
    assert found == ["0/deep/b.txt", "2/c.txt", "a.txt"]


def test_globs(folder):
    (folder / "[b]").mkdir()
    (folder / "[b]" / "x.txt").write_text("in brackets")
    assert read(folder / "*.txt")[0] == ["fine"]
    assert read(folder / "**" / "*.txt")[0] == ["in brackets", "fine"]
    assert read(folder / "[b]")[0] == ["in brackets"]  # a path that exists is no pattern
    assert read(folder / "*")[1].left_out == {"folder": 1}


def test_relative_globs_from_a_folder_with_brackets(tmp_path, monkeypatch):
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a.txt").write_text("here")
    monkeypatch.setenv("NANOCHAT_CWD", str(tmp_path / "[x]"))
    assert read("*.txt")[0] == ["here"] and read("a.txt")[0] == ["here"]


def test_names_in_any_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    corpus = os.fsencode(tmp_path) + b"/gr\xf6\xdfe"
    os.mkdir(corpus)
    for name in (b"b\xff.txt", b"a\xe4.txt", "ü.txt".encode(), b"z\xf1.t\xf1t"):
        with open(corpus + b"/" + name, "wb") as f:
            f.write(b"words " * 200)
    documents, counts = read(os.fsdecode(corpus))
    assert len(documents) == 3 and counts.left_out == {"no known suffix": 1}
    tok = Tokenizer.train_from_iterator(documents, 300)
    dataset = TokenDataset.open(prepare_tokens(os.fsdecode(corpus), tok))
    assert "no known suffix" in dataset.left_out() and dataset.summary().encode("utf-8", "surrogateescape")


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="can be read only once.*Write it to a file"):
            read(source)
    script, root = f"{sys.executable} -m scripts.tok_train --data <(echo words)", Path(__file__).parents[2]
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == 2 and "is a pipe or a device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("make, message", [
    (lambda d: None, "nothing was found"),
    (lambda d: (d / "x.png").write_text("a"), r"left out: 1 .png \(.*x.png\)\). Known: .txt .*parquet.*zst"),
    (lambda d: (d / "x.txt").write_text(" \n"), "no text in.*1 file.*1 empty"),
    (lambda d: (d / "x.csv").write_text("body,id\na,1\n"), "no text in.*x.csv has no column 'text'; it has 'body', 'id'"),
    (lambda d: (d / "x.parquet").write_bytes(b"PAR1"), "no text in.*1 unreadable .cannot read .*x.parquet"),
])
def test_corpora_without_text(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        read(tmp_path, skip_bad=True)


@pytest.mark.parametrize("name, message", [("nowhere", "no such file or folder"), ("*.txt", "nothing was found"),
                                           ("\0", "no such file"), ("a" * 5000, "no such file.*too long")])
def test_paths_that_are_not_there(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


# ---- what is bad

NOISE = random.Random(0).randbytes(3000)  # cannot be compressed
ZIP = as_archive(".zip", {"a.txt": b"good", "b.txt": b"better" * 999})


def encrypted_zip() -> bytes:
    """ZIP whose first member says that it is encrypted."""
    content = bytearray(ZIP)
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(b ^ 0x55 for b in content[at:at + 8]) + content[at + 8:]


# (name, content, what is said without --skip-bad, documents with it)
BAD = [
    ("x.txt", b"good\nb\xffd", "x.txt: byte 6 is not UTF-8", []),
    ("x.txt", codecs.BOM_UTF16_LE + b"a\0\0", "x.txt: byte 4 is not UTF-16", []),
    ("x.jsonl", b'{"text": "good"}\n{"text": "b\xffd"}\n"also"', "line 2: byte 28 of the file is not UTF-8", ["good", "also"]),
    ("x.jsonl", b'{"text": "good"}\n\n{"text": "bad\n', "x.jsonl, line 3 is not valid JSON", ["good"]),
    ("x.jsonl", b'{"text": "good"}\n[1]\n', "x.jsonl, line 2 is not a JSON object", ["good"]),
    ("x.jsonl", b'{"text": "good"}\n{"text": 5}\n', "x.jsonl, line 2: column 'text' holds int, not text", ["good"]),
    ("x.jsonl", b'{"text": "good"}\n{"id": 5}\n"also"', "x.jsonl, line 2 has no column 'text'; it has 'id'. Name",
     ["good", "also"]),
    ("x.jsonl", b"[" * 100_000 + b'\n"good"', "x.jsonl, line 1 is not valid JSON", ["good"]),
    ("x.json", b'["good", "cut', "x.json is not valid JSON after row 1", ["good"]),
    ("x.json", b'["good"] "more"', "x.json is not valid JSON after row 1", ["good"]),
    ("x.json", b'["good", 5, "also"]', "x.json, row 2 is not a JSON object or string", ["good", "also"]),
    ("x.json", b'["good", {"body": ""}, "also"]', "x.json, row 2 has no column 'text'; it has 'body'", ["good", "also"]),
    ("x.json", b'{"text": "good"}\n{"te', "x.json, line 2 is not valid JSON", ["good"]),
    ("x.json", b'"b\xffd"', "x.json: byte 2 is not UTF-8", []),
    ("x.csv", b"id,body\n1,a\n", "x.csv has no column 'text'; it has 'id', 'body'", []),
    ("x.csv", b"id,text\n1,good\n2,a, cut\n3\n3,also", "x.csv, line 3 has 3 fields, and the header 2", ["good", "also"]),
    ("x.csv", b"id,text\n1,b\xffd\n2,good\n", "x.csv, line 2: its text is not UTF-8", ["good"]),
    ("x.tsv", b"id\ttext\n1\n2\tgood\n", "x.tsv, line 2 has 1 fields, and the header 2", ["good"]),
    ("x.parquet", as_parquet(["good"])[:-9], "cannot read .*x.parquet", []),
    ("x.parquet", as_parquet([5]), "x.parquet, row 1: column 'text' holds int, not text", []),
    ("x.arrow", as_arrow(["good"])[:-400], "cannot read .*x.arrow", []),
    ("x.arrow", as_arrow(["good", "also", "cut"], pa.ipc.new_stream)[:-100], "cannot read .*x.arrow", ["good", "also"]),
    ("x.txt.gz", b"not gzip", "cannot read .*x.txt.gz: Not a gzipped file", []),
    ("x.jsonl.gz", gzip.compress(b'"good"\n' + NOISE.hex().encode())[:1000], "cannot read .*x.jsonl.gz", ["good"]),
    ("x.jsonl.bz2", bz2.compress(b'"good"\n')[:20], "cannot read .*x.jsonl.bz2", []),
    ("x.jsonl.xz", damaged(lzma.compress(b'"good"\n' * 9), 30), "cannot read .*x.jsonl.xz", []),
    ("x.txt.zst", b"not zstd", "cannot read .*x.txt.zst", []),
    ("x.jsonl.zst", PACKERS[".zst"](b'"good"\n') + PACKERS[".zst"](b'"cut"\n' * 99)[:-5], "x.jsonl.zst: it ends within",
     ["good"]),
    ("x.zip", b"not zip", "cannot read .*x.zip", []),
    ("x.zip", encrypted_zip(), "x.zip/a.txt is encrypted", ["better" * 999]),
    ("x.zip", damaged(ZIP, ZIP.index(b"b.txt") + 6), "cannot read .*x.zip/b.txt", ["good"]),
    ("x.tar", b"not tar" * 100, "cannot read .*x.tar", []),
    ("x.tar", damaged(as_archive(".tar", {"a.txt": b"good", "b.txt": b""}), 1024 + 148), "x.tar: a damaged header", ["good"]),
    ("x.tar", as_archive(".tar", {"a.txt": b"good", "b.txt": b"bad" * 999})[:3000], "cannot read .*x.tar", ["good"]),
    ("x.tgz", as_archive(".tgz", {"a.txt": b"good", "b.txt": NOISE})[:2000], "cannot read .*x.tgz", ["good"]),
]


@pytest.mark.parametrize("name, content, message, documents", BAD, ids=[f"{case[0]}-{i}" for i, case in enumerate(BAD)])
def test_bad_files_and_rows_are_named_or_left_out(folder, name, content, message, documents):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{message}.*--skip-bad"):
        read(folder / name)
    found, counts = read(folder, skip_bad=True)
    assert found == ["fine", *documents]
    assert 1 <= counts.unreadable + sum(counts.left_out.values()) <= 2
    assert all(name in example and "--" not in example for example in counts.examples.values()) and counts.examples
    if documents or not counts.left_out:  # nothing that has begun to be read is left out unasked
        with pytest.raises(UserError, match=message):
            read(folder)


def test_the_missing_key_of_the_cases(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(3)] + [{"meta": 1}] + [{"text": f"document {i}"} for i in range(4, 6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents, counts = read(tmp_path, skip_bad=True)
    assert len(documents) == counts.documents == 5 and counts.unreadable == 1


def test_utf8_is_checked_value_by_value_in_tables(tmp_path):
    bad = pa.array([b"good", b"b\xffd", None, b"also"], pa.binary())
    for name, texts in (("a.arrow", bad.view(pa.string())), ("b.arrow", bad), ("c.arrow", bad.cast(pa.large_binary()))):
        with pa.ipc.new_file(str(tmp_path / name), pa.schema([("text", texts.type)])) as writer:
            writer.write_batch(pa.record_batch([texts], names=["text"]))
        with pytest.raises(UserError, match=f"{name}, row 2: byte 1 of its text is not UTF-8"):
            read(tmp_path / name)
        assert read(tmp_path / name, skip_bad=True)[0] == ["good", "also"]


def test_dictionaries_are_text(tmp_path):
    texts = pa.array(["one", "two", "one"]).dictionary_encode()
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), pa.schema([("text", texts.type)])) as writer:
        writer.write_batch(pa.record_batch([texts], names=["text"]))
    assert read(tmp_path)[0] == ["one", "two", "one"]


# ---- identity, and how much is read

def test_what_changes_the_identity_of_a_source(folder):
    before = source_identity(str(folder))
    (folder / "x.png").write_text("a")
    (folder / ".hidden.txt").write_text("a")
    assert source_identity(str(folder)) == before
    (folder / "b.html.zst").write_bytes(PACKERS[".zst"](b"more"))
    assert source_identity(str(folder)) != before


def test_a_long_file_of_rows_is_not_read_at_once(tmp_path):
    """The first row of an endless compressed file, before the rest was even written."""
    read_end, write_end = os.pipe()
    writer = threading.Thread(target=lambda: os.write(write_end, gzip.compress(b'"first"\n' * 100_000)[:400]))
    writer.start()
    from nanochat.data.files import _read
    from nanochat.data.reading import Reading
    texts = _read(open(read_end, "rb", buffering=0), "x.jsonl.gz", "x", Reading("text", False, Counts()))
    assert next(texts) == "first"
    writer.join()
    os.close(write_end)


# ---- anything

@settings(max_examples=150)
@given(data=st.data(), sample=st.sampled_from(
    [(f"x{kind}{end}", pack(content_of(kind)[:5000])) for kind in (".txt", ".json", ".csv") for end, pack in PACKERS.items()]
    + [(f"x{kind}", ROW_KINDS[kind](TEXTS[:2])) for kind in (".parquet", ".arrow", ".feather")]
    + [(f"x{kind}", as_archive(kind, {"a.txt": b"good", "b.csv": as_csv(TEXTS[:2])})) for kind in ARCHIVES]))
def test_changed_bytes_are_read_or_named(tmp_path_factory, data, sample):
    name, content = sample
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[at:at + data.draw(st.sampled_from([1, 50, 9999]))]
        content = content or bytearray(b"x")
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    for skip_bad in (False, True):
        try:
            assert all(text.encode() and text.strip() for text in iter_documents(str(path), skip_bad=skip_bad))
        except UserError as e:
            assert name in str(e)
    path.unlink()


def test_settings_and_tables_beside_text_are_no_text(tmp_path):
    """A project's folder: what has no text column anywhere is of another kind there; named by the user it is bad."""
    (tmp_path / "README.md").write_text("about it")
    for name, content in (("package.json", '{"name": "x", "files": ["text"]}'), ("prices.csv", "a,b\n1,2\n"), ("t.tsv", "a\tb\n"),
                          ("numbers.json", "[1, 2]"), ("rows.json", '[{"body": "x"}]')):
        (tmp_path / name).write_text(content)
    (tmp_path / "not.txt.gz").write_bytes(b"plain")
    (tmp_path / "list.json").write_text('["a string", "another"]')
    counts = Counts()
    found = list(iter_documents(str(tmp_path), counts=counts, skip_bad=True))
    assert sorted(found) == ["a string", "about it", "another"]
    assert counts.left_out == {"without a column 'text'": 4, "not packed as .gz": 1} and counts.unreadable == 1  # package.json
    for name, message in (("prices.csv", "'a', 'b'"), ("rows.json", "'body'"), ("not.txt.gz", "not.txt.gz")):
        with pytest.raises(UserError, match=message):
            list(iter_documents(str(tmp_path / name)))
