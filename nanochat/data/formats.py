"""File formats: how the bytes of one decompressed file become documents.

A file of text is one document. In a file of rows (JSON, CSV, Parquet, Arrow) each row is one, and its text is in the column
`reading.text_column`. Every reader is a function (stream, path for messages, Reading) -> iterator of documents.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nanochat.common import UserError
from nanochat.data.compression import Damaged, seekable
from nanochat.data.reading import COLUMN_HINT, Reading


class UnexpectedKind(Exception):
    """A file holds something else than its name says.

    kind: what to count it as, where the file was found in a folder.   hint: what to do, where the user named it.
    """

    def __init__(self, kind: str, problem: str, hint: str = "Repair it"):
        super().__init__(problem)
        self.kind, self.hint = kind, hint


def without_column(where: str, columns: list[str], reading: Reading) -> UnexpectedKind:
    """The error for a table, or a file of objects, that nowhere has the text column."""
    problem = reading.missing_column(where, columns)
    return UnexpectedKind(f"without a column {reading.text_column!r}", problem, COLUMN_HINT)


# ---- text

_MARKS = [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]  # UTF-32 first: its mark begins with UTF-16's


def encoding_of(start: bytes) -> str:
    """Encoding by the byte-order mark; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def _decode(content: bytes, where: str, reading: Reading) -> Iterator[str]:
    """Yield the decoded text; nothing if it is bad and was counted."""
    encoding = encoding_of(content)
    try:
        yield content.decode(encoding)
    except UnicodeDecodeError as e:
        reading.bad(f"{where}: byte {e.start} is not {encoding.upper()}")


def read_text(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """A file of text: one document."""
    yield from _decode(stream.read(), where, reading)


# ---- rows

def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines as UTF-8 with their line ends, without a byte-order mark. UTF-16 and UTF-32 files are decoded as a whole."""
    lines = iter(stream)
    first = next(lines, b"")
    if (encoding := encoding_of(first)) != "utf-8":
        lines = io.BytesIO((first + stream.read()).decode(encoding).encode())
    elif first:
        yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _read_jsonl(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """One JSON row per line."""
    offset = 0
    for number, line in enumerate(_lines(stream), 1):
        place, begin = f"{where}, line {number}", offset
        offset += len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as e:
            reading.bad(f"{place}: byte {begin + e.start} of the file is not UTF-8")
        except (ValueError, RecursionError) as e:
            reading.bad(f"{place} is not valid JSON: {e}")
        else:
            yield from reading.row(row, place)


def _read_json(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """A JSON array of rows, a single row, or lines of JSON."""
    content = stream.read()
    for text in _decode(content, where, reading):
        text = text.lstrip("\ufeff")
        rows_of_text = text.lstrip("[" + _JSON_SPACE).startswith('"')
        if not rows_of_text and json.dumps(reading.text_column) not in text:
            raise without_column(where, _first_keys(text), reading)
        if text.lstrip(_JSON_SPACE).startswith("["):
            yield from _read_json_array(text, where, reading)
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            yield from _read_jsonl(io.BytesIO(text.encode()), where, reading)
        else:
            yield from reading.row(row, where)


_JSON_SPACE = " \t\r\n"


def _first_keys(text: str) -> list[str]:
    """Keys of the object that a JSON text begins with, or []."""
    try:
        first, _ = json.JSONDecoder().raw_decode(text.lstrip("[" + _JSON_SPACE))
        return list(first) if isinstance(first, dict) else []
    except (ValueError, RecursionError):
        return []


def _read_json_array(text: str, where: str, reading: Reading) -> Iterator[str]:
    """The rows of an array one at a time, so that rows before an error are read."""
    decode, number, at = json.JSONDecoder().raw_decode, 0, _skip_space(text, 0) + 1
    try:
        more = text[(at := _skip_space(text, at)):at + 1] != "]"
        while more:
            row, at = decode(text, _skip_space(text, at))
            number, at = number + 1, _skip_space(text, at)
            yield from reading.row(row, f"{where}, row {number}")
            more = text[at:at + 1] == ","
            at += more
        if text[at:at + 1] != "]" or _skip_space(text, at + 1) != len(text):
            raise ValueError("the array does not end where it should")
    except (ValueError, RecursionError) as e:
        reading.bad(f"{where} is not valid JSON after row {number}: {e}")


def _skip_space(text: str, at: int) -> int:
    """Position of the first character from `at` on that is not white space."""
    while text[at:at + 1] and text[at] in _JSON_SPACE:
        at += 1
    return at


def _read_csv(stream: BinaryIO, where: str, reading: Reading, delimiter: str = ",") -> Iterator[str]:
    """A table whose first row names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default is 128 kB, less than a long document
    rows, header = csv.reader(_csv_lines(stream), delimiter=delimiter), None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            reading.bad(f"{where}, line {rows.line_num}: {e}")
            continue
        if not row:
            continue
        place = f"{where}, line {rows.line_num}"
        if header is None:
            header = row
            if reading.text_column not in header:
                raise without_column(where, header, reading)
            column = header.index(reading.text_column)
        elif len(row) <= column or any(row[len(header):]):  # the text may have been cut at a comma
            reading.bad(f"{place} has {len(row)} fields, and the header {len(header)}")
        else:
            try:
                row[column].encode()
            except UnicodeEncodeError:
                reading.bad(f"{place}: its text is not UTF-8")
            else:
                yield row[column]


def _csv_lines(stream: BinaryIO) -> Iterator[str]:
    for line in _lines(stream):
        text = line.decode("utf-8", "surrogateescape")  # bytes that are not UTF-8 make one row bad, not the file
        yield from re.split(r"(?<=\r)(?!\n|\Z)", text) if "\r" in text else (text,)  # some programs end lines with \r


def _read_tsv(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    return _read_csv(stream, where, reading, delimiter="\t")


def _pyarrow(where: str):
    try:
        import pyarrow
        return pyarrow
    except ImportError:
        raise UserError(f"reading {where} needs pyarrow: pip install pyarrow (it is in the extra `data`)") from None


def _read_parquet(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    def columns(stream):
        from pyarrow import parquet
        with parquet.ParquetFile(stream) as table:
            if reading.check_column(where, table.schema_arrow.names):
                for batch in table.iter_batches(batch_size=1024, columns=[reading.text_column]):
                    yield batch.column(0)
    return _read_columns(columns, stream, where, reading)


def _read_arrow(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """Arrow's IPC formats: files (feather is one), and streams, as the `datasets` library writes them."""
    def columns(stream):
        from pyarrow import ipc
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        table = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
        names = table.schema.names
        if reading.check_column(where, names):
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
            for batch in batches:
                yield batch.column(names.index(reading.text_column))
    return _read_columns(columns, stream, where, reading)


def _read_columns(columns: Callable, stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """The documents of a table. columns: function from a seekable stream to arrow arrays of the text column."""
    pyarrow, number = _pyarrow(where), 0
    stream, damage = seekable(stream)
    try:
        for column in columns(stream):
            column.validate()
            if pyarrow.types.is_string(column.type):  # as bytes: text that is not UTF-8 is then one bad row
                column = column.cast(pyarrow.binary())
            elif pyarrow.types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())
            column.validate(full=True)  # a damaged file may point outside of its buffers
            is_text = pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)
            for value in column:
                number, place = number + 1, f"{where}, row {number + 1}"
                try:
                    value = value.as_py()
                    value = value.decode() if is_text and value is not None else value
                except UnicodeDecodeError as e:
                    reading.bad(f"{place}: byte {e.start} of its text is not UTF-8")
                else:
                    yield from reading.text(value, place)
    except pyarrow.ArrowException as e:
        raise Damaged(damage or e) from None
    if damage:
        raise damage


FORMATS: dict[str, Callable[[BinaryIO, str, Reading], Iterator[str]]] = {
    ".txt": read_text, ".md": read_text, ".py": read_text, ".rst": read_text, ".tex": read_text, ".html": read_text,
    ".htm": read_text, ".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv,
    ".tsv": _read_tsv, ".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow}
