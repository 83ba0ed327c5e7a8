"""Token datasets: text of any source, tokenized once and stored on disk. `python -m nanochat.dataset --data SOURCE`

Split. About a twentieth of the text is for validation, at most 8 million characters; text that is appended does not change the
split of earlier text (nanochat/data/split.py). Validation documents are never trained on.

Files. `$NANOCHAT_BASE_DIR/tokens/<name>/` has, for each split, shards of token ids (`.bin`: uint16, or uint32 for vocabularies
beyond 65536; every document begins with BOS) and the lengths of their documents (`.lengths.npy`), and `manifest.json` with
counts and checksums, including its own. The folder is written under a temporary name and renamed when complete, so a folder with
the final name is always complete.

Damage. Opening a dataset compares the size of every file, and its checksum unless this machine has checked the same file before
(same size, modification times and inode; noted in `checked.json`). So checking costs about a second per GB, once, and a file that
was copied, edited or replaced is found. Damage that the file system does not see, by a failing disk, is found by `--verify`,
which reads everything.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import writable_base_dir
from nanochat.cli.program import cli
from nanochat.common import Progress, UserError, format_table, get_base_dir, print0
from nanochat.data.reading import describe_left_out
from nanochat.data.sources import Counts, SourceFlags, expected_bytes, iter_documents, source_identity
from nanochat.data.split import VAL_CHARS, section_end, separate_documents, split_documents
from nanochat.runtime.files import file_digest, read_json, read_sealed, seal, write_atomic
from nanochat.tokenizer import Tokenizer, get_tokenizer

SHARD_TOKENS = 100_000_000
ENCODE_CHARS = 4_000_000  # characters per call of the tokenizer, which encodes on several threads
SCHEMA_VERSION = 3
CHECKED = "checked.json"  # files whose checksums were compared: see the top of this file
LEARNED_CHARS = 20_000_000  # enough text to train a tokenizer; --doc-cap limits only text beyond this
PIECE = 1000  # characters of a piece of a long document that the tokenizer learns from, or a tenth of --doc-cap


# ---- tokenizer and tokens

def train_tokenizer(source: str, vocab_size: int, *, text_column: str = "text", skip_bad: bool = False,
                    max_chars: int = 2_000_000_000, doc_cap: int = 10_000, counts: Counts | None = None) -> Tokenizer:
    """Train a tokenizer on the training documents of a source, with about `doc_cap` characters of each.

    The cap prevents a few very long documents from deciding the merges. With less than LEARNED_CHARS of text in total, more of
    the long documents is used. If the text has too few pairs to merge, the vocabulary is smaller than `vocab_size`, and a line
    says so.
    """
    counts = Counts() if counts is None else counts
    documents = iter_documents(source, text_column=text_column, skip_bad=skip_bad, max_chars=max_chars, counts=counts)
    progress = Progress(f"reading {source} for the tokenizer", total=expected_bytes(source, max_chars), unit="B")
    read = trained_on = learned = 0  # characters

    def counted():
        nonlocal read
        for text in documents:
            read += len(text)
            progress.update(len(text))
            yield text

    def training():
        nonlocal trained_on
        for name, text in split_documents(counted(), counts):
            if name == "train":
                trained_on += len(text)
                yield text

    def texts():
        nonlocal learned
        for text in learning_sample(training(), doc_cap):
            learned += len(text)
            yield text
        progress.close()
        print0("merging the most frequent pairs ...")

    tokenizer = Tokenizer.train_from_iterator(texts(), vocab_size)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        more = [name for name, cut in (("--doc-cap", learned < trained_on), ("--max-chars", read == max_chars)) if cut]
        if more:
            print0(f"the {learned:,} characters that the tokenizer learns from have pairs for a vocabulary of {found} only, "
                   f"not {vocab_size}; a larger {' or '.join(more)} uses more of the text")
        else:
            print0(f"the text has pairs for a vocabulary of {found} only, not {vocab_size}")
    return tokenizer


def learning_sample(texts: Iterable[str], doc_cap: int) -> Iterator[str]:
    """Yield the text that a tokenizer learns from: short documents whole, and about `doc_cap` characters of each longer one, in
    pieces spread over it. If that is less than LEARNED_CHARS in total, more pieces follow until it is not."""
    reserve, stride, seen, size, learned = [], 1, 0, 0, 0  # reserve: every stride-th unused piece, so that memory is limited
    piece_size = min(PIECE, max(doc_cap // 10, 100))
    for text in texts:
        if len(text) <= doc_cap:
            learned += len(text)
            yield text
            continue
        taken = start = 0
        while start < len(text):
            end = section_end(text, start, piece_size)
            piece, start = text[start:end], end
            if taken < doc_cap * end / len(text):
                taken += len(piece)
                yield piece
                continue
            if seen % stride == 0:
                reserve.append(piece)
                size += len(piece)
            seen += 1
            while size > LEARNED_CHARS and len(reserve) > 1:
                reserve, stride = reserve[::2], 2 * stride
                size = sum(map(len, reserve))
        learned += taken
    share, passed, taken = min(1, max(0, LEARNED_CHARS - learned) / max(size, 1)), 0, 0
    for piece in reserve:
        passed += len(piece)
        if taken < share * passed:
            taken += len(piece)
            yield piece


def prepare_tokens(source: str, tokenizer: Tokenizer, *, val_source: str | None = None, text_column: str = "text",
                   skip_bad: bool = False, max_chars: int = -1, force: bool = False) -> Path:
    """Tokenize a source into a token dataset, unless it exists already. Returns its folder.

    The name of the folder contains a hash of everything that decides its content: the tokenizer, the arguments, and path, size
    and modification time of each local file. Changes of `python` and `hf:` are not seen: use `force` to prepare them again.
    val_source: read completely if local, up to VAL_CHARS characters from the hub.
    Raises: UserError for bad text, a damaged dataset of this name, or a disk that cannot be written.
    """
    recipe = dict(source=source, val_source=val_source or None, text_column=text_column, skip_bad=skip_bad,
                  max_chars=max_chars, tokenizer_fingerprint=tokenizer.fingerprint())
    identities = [source_identity(s) for s in (source, val_source) if s]
    key = json.dumps([SCHEMA_VERSION, recipe, identities])
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", source if source.startswith("hf:") else Path(source).stem).strip("-.")[-40:]
    folder = get_base_dir() / "tokens" / f"{slug}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
    if folder.exists() and not force:
        TokenDataset.open(folder)
        return folder

    counts = Counts()
    options = dict(text_column=text_column, skip_bad=skip_bad, counts=counts)
    documents = iter_documents(source, max_chars=max_chars, **options)
    if val_source:
        limit = VAL_CHARS if val_source.startswith("hf:") else -1
        labelled = separate_documents(documents, iter_documents(val_source, max_chars=limit, **options), counts)
    else:
        labelled = split_documents(documents, counts)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    progress = Progress(f"encoding {source}", total=expected_bytes(source, max_chars), unit="B")
    try:
        temporary.mkdir(parents=True)
        splits = _write_splits(temporary, labelled, tokenizer, progress)
        manifest = dict(schema_version=SCHEMA_VERSION, **recipe, vocab_size=tokenizer.get_vocab_size(),
                        bos=tokenizer.get_bos_token_id(), dtype=_dtype(tokenizer).name, counts=asdict(counts),
                        python=sys.version.split()[0], splits=splits)
        write_atomic(temporary / "manifest.json", seal(manifest))
        TokenDataset(temporary, manifest)._note_checked()
        _put_in_place(temporary, folder)
    except OSError as e:
        raise UserError(f"cannot write tokens to {folder.parent}: {e.strerror or e}. Free some space, or set "
                        "NANOCHAT_BASE_DIR to a folder that can be written.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_splits(folder: Path, labelled: Iterable[tuple[str, str]], tokenizer: Tokenizer, progress: Progress) -> dict:
    """Tokenize ("train" | "val", text) pairs into shards. Returns the `splits` of the manifest."""
    writers = {name: _ShardWriter(folder, name, _dtype(tokenizer)) for name in ("train", "val")}
    for batch in _batches(labelled, ENCODE_CHARS):
        texts = [text for _, text in batch]
        encoded = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id(), num_threads=os.cpu_count() or 1)
        for (name, text), ids in zip(batch, encoded, strict=True):
            size = len(text.encode())
            writers[name].add(ids, size)
            progress.update(size)
    progress.close()
    splits = {name: writer.close() for name, writer in writers.items()}
    for name, other in (("train", "validation"), ("val", "training")):
        if not splits[name]["docs"]:
            raise UserError(f"no document is left for {name}: all that was read is also in {other}.")
    return splits


def _batches(labelled: Iterable[tuple[str, str]], chars: int) -> Iterator[list[tuple[str, str]]]:
    """Lists of consecutive pairs with at least `chars` characters, the last perhaps fewer."""
    batch, size = [], 0
    for name, text in labelled:
        batch.append((name, text))
        size += len(text)
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Appends documents to the numbered shards of one split; a document is never in two shards."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.docs = self.tokens = self.text_bytes = 0
        self.file, self.lengths, self.shards = None, [], []

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append a document of `text_bytes` bytes of text."""
        if self.file is None:
            self.file = open(self.folder / f"{self.split}_{len(self.shards):06d}.bin", "wb")
        self.file.write(np.array(ids, self.dtype).tobytes())
        self.lengths.append(len(ids))
        self.docs, self.tokens, self.text_bytes = self.docs + 1, self.tokens + len(ids), self.text_bytes + text_bytes
        if self.file.tell() >= SHARD_TOKENS * self.dtype.itemsize:
            self._end_shard()

    def _end_shard(self) -> None:
        _sync(self.file)
        self.file.close()
        path = Path(self.file.name)
        with open(path.with_suffix(".lengths.npy"), "wb") as f:
            np.save(f, np.array(self.lengths, np.uint32))
            _sync(f)
        self.shards.append([dict(name=p.name, bytes=p.stat().st_size, sha256=file_digest(p))
                            for p in (path, Path(f.name))])
        self.file, self.lengths = None, []

    def close(self) -> dict:
        """Finish the last shard. Returns the split's entry in the manifest."""
        if self.file is not None:
            self._end_shard()
        return dict(docs=self.docs, tokens=self.tokens, text_bytes=self.text_bytes, shards=self.shards)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`, replacing an older one."""
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---- reading tokens

class Split:
    """The documents of one split as memory-mapped tokens. Each begins with BOS, which its length includes."""

    def __init__(self, shards: list[np.ndarray], lengths: list[np.ndarray], bos: int):
        """shards: token ids of each shard (tokens,).   lengths: of the documents in each shard (documents,)."""
        self.bos = bos
        self.doc_lengths = np.concatenate(lengths).astype(np.int64)
        self.num_docs, self.num_tokens = len(self.doc_lengths), int(self.doc_lengths.sum())
        self._shards = shards
        self._shard_of_doc = np.repeat(np.arange(len(shards)), [len(part) for part in lengths])
        self._start_of_doc = np.concatenate([np.cumsum(part, dtype=np.int64) - part for part in lengths])

    def doc(self, i: int) -> np.ndarray:
        """Token ids (doc_lengths[i],) of document i, a view of the file."""
        return self.tokens(i, 0, int(self.doc_lengths[i]))

    def tokens(self, i: int, start: int, count: int) -> np.ndarray:
        """Token ids (count,) of document i from position `start` on, a view of the file."""
        begin = self._start_of_doc[i] + start
        return self._shards[self._shard_of_doc[i]][begin:begin + count]


class TokenDataset:
    """A token dataset on disk; open it with `TokenDataset.open(folder)`."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.vocab_size: int = manifest["vocab_size"]
        self.bos: int = manifest["bos"]
        self._splits = {}

    @classmethod
    def open(cls, folder) -> "TokenDataset":
        """Open a folder that `prepare_tokens` made.

        Raises: UserError that names a file which is missing, has a wrong size, or changed since its checksum was compared.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            raise UserError(f"{folder} is no token dataset: it has no manifest.json. Make one with "
                            "`python -m nanochat.dataset`.")
        try:
            manifest = read_sealed(folder / "manifest.json", SCHEMA_VERSION)
            dataset = cls(folder, manifest)
            dataset._check_manifest()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{folder / 'manifest.json'} is damaged ({type(e).__name__}: {e}). {_REMEDY}") from None
        checked = dataset._checked()
        dataset._check([file for file in dataset._files() if checked.get(file["name"]) != _stamp(folder / file["name"])])
        return dataset

    def split(self, name: str) -> Split:
        """The split `train` or `val`. Its files stay open, so a run can read them even if the folder is deleted."""
        if name not in self._splits:
            self._splits[name] = self._open_split(name)
        return self._splits[name]

    def _open_split(self, name: str) -> Split:
        shards, lengths = [], []
        for tokens_file, lengths_file in self.manifest["splits"][name]["shards"]:
            path = self.folder / lengths_file["name"]
            try:
                # an ndarray view of the memory map: slicing np.memmap itself is several times slower
                shards.append(np.asarray(np.memmap(self.folder / tokens_file["name"], self.manifest["dtype"], mode="r")))
                lengths.append(np.load(path, allow_pickle=False))
                if lengths[-1].dtype != np.uint32 or lengths[-1].ndim != 1 or lengths[-1].sum() != len(shards[-1]):
                    raise ValueError("the lengths do not add up")
            except Exception:  # numpy raises many kinds of errors for a damaged header
                raise UserError(f"token shard {path} is damaged or not {tokens_file['name']}'s. {_REMEDY}") from None
        return Split(shards, lengths, self.bos)

    def verify(self) -> None:
        """Compare the checksums of all files. Raises: UserError that names the first file that differs."""
        self._check(self._files())

    def fingerprint(self) -> str:
        """Hash of all tokens of both splits, 32 hex digits."""
        splits = [[file["sha256"] for shard in self.manifest["splits"][name]["shards"] for file in shard]
                  for name in ("train", "val")]
        return hashlib.blake2b(json.dumps(splits).encode(), digest_size=16).hexdigest()

    def summary(self) -> str:
        """A table of the splits (a document that was cut counts once per part), and what was read and skipped."""
        rows = [{"split": name, "documents": s["docs"], "tokens": s["tokens"], "text bytes": s["text_bytes"],
                 "bytes/token": round(s["text_bytes"] / (s["tokens"] - s["docs"]), 3), "shards": len(s["shards"])}
                for name, s in self.manifest["splits"].items()]
        counts = self.manifest["counts"]
        files = f" in {counts['files']} files" if counts["files"] else ""
        return f"{format_table(rows)}\nread: {counts['documents']} documents{files}\n{self.left_out()}".rstrip("\n")

    def left_out(self) -> str:
        """One line about text of the source that is in neither split; "" if there is none."""
        found = describe_left_out(self.manifest["counts"])
        return f"left out: {found}" if found else ""

    def _check_manifest(self) -> None:
        """Raises: ValueError, KeyError, TypeError or AttributeError for a manifest that `prepare_tokens` would not write."""
        manifest = self.manifest
        if manifest["dtype"] not in ("uint16", "uint32") or set(manifest["splits"]) != {"train", "val"} or \
                set(manifest["counts"]) != set(asdict(Counts())) or not 0 <= self.bos < self.vocab_size:
            raise ValueError("it is not of a token dataset")
        describe_left_out(manifest["counts"])
        for split in manifest["splits"].values():
            if not split["tokens"] > split["docs"] > 0 <= split["text_bytes"] or {len(s) for s in split["shards"]} != {2}:
                raise ValueError("the numbers of a split cannot be")
        for file in self._files():
            if Path(file["name"]).name != file["name"] or [type(file["bytes"]), type(file["sha256"])] != [int, str]:
                raise ValueError(f"{file['name']!r} is not a file of the folder")

    def _files(self) -> list[dict]:
        return [file for split in self.manifest["splits"].values() for shard in split["shards"] for file in shard]

    def _check(self, files: list[dict]) -> None:
        """Compare the sizes of these files, then their checksums. Raises: UserError."""
        for file in files:
            path = self.folder / file["name"]
            actual = path.stat().st_size if path.is_file() else None
            if actual != file["bytes"]:
                state = "is missing" if actual is None else f"has {actual} bytes instead of {file['bytes']}"
                raise UserError(f"token shard {path} {state}. {_REMEDY}")
        progress = Progress("checking the tokens", total=sum(file["bytes"] for file in files), unit="B")
        for file in files:
            if file_digest(self.folder / file["name"], progress) != file["sha256"]:
                raise UserError(f"token shard {self.folder / file['name']} has changed since it was written. {_REMEDY}")
        if files:
            self._note_checked()

    def _checked(self) -> dict:
        """File name -> `_stamp` at its last check on this machine."""
        try:
            return read_json(self.folder / CHECKED)
        except (OSError, ValueError):
            return {}

    def _note_checked(self) -> None:
        """Note that all files match the manifest. In a read-only folder this fails, and they are checked each time."""
        with suppress(OSError):
            stamps = {file["name"]: _stamp(self.folder / file["name"]) for file in self._files()}
            write_atomic(self.folder / CHECKED, json.dumps(stamps, indent=1))


def _stamp(path: Path) -> list[int] | None:
    """File attributes that change when a file is written, replaced or copied."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


_REMEDY = "Prepare the tokens again: `python -m nanochat.dataset --force` with the same --data, or delete the folder."


# ---- command line

@dataclass
class PrepareFlags(SourceFlags):
    """The text to tokenize"""
    val_data: str | None = flag(None, "a source of validation text; by default a part of --data is held out", metavar="SOURCE")
    force: bool = flag(False, "tokenize again even if the dataset exists")
    verify: bool = flag(False, "read all files and compare their checksums")


def main() -> None:
    flags, = parse([PrepareFlags], prog="python -m nanochat.dataset", description="Tokenize text and store it on disk.")
    writable_base_dir()
    folder = prepare_tokens(flags.data, get_tokenizer(), val_source=flags.val_data, force=flags.force, **flags.reading())
    dataset = TokenDataset.open(folder)
    if flags.verify:
        dataset.verify()
        print0("all checksums match")
    print0(f"{flags.data} -> {folder}\n\n{dataset.summary()}")


if __name__ == "__main__":
    cli(main)
