"""Train a tokenizer: `python -m scripts.tok_train --data SOURCE`. It becomes the current one of $NANOCHAT_BASE_DIR."""

import time
from dataclasses import dataclass

from nanochat.common import cli, format_duration, get_base_dir, print0
from nanochat.flags import flag, parse


@dataclass
class TokTrainFlags:
    """Tokenizer training"""
    data: str = flag("python", "where the text is: python, a path, glob or folder, or hf:NAME", metavar="SOURCE")
    vocab_size: int = flag(32768, "tokens in all: 256 bytes, the merges, 9 special ones", low=265, high=2**24)
    max_chars: int = flag(2_000_000_000, "read at most this many characters", low=1)
    doc_cap: int = flag(10_000, "learn from at most this many characters of a document", low=1)
    text_column: str = flag("text", "the column of .jsonl and .parquet rows that holds the text", metavar="NAME")
    skip_bad: bool = flag(False, "leave out, and count, what is not valid UTF-8 or JSON")


def main() -> None:
    flags, = parse([TokTrainFlags], prog="python -m scripts.tok_train", description="Train a tokenizer.")
    from nanochat.dataset import train_tokenizer
    from nanochat.sources import Counts
    started, counts = time.monotonic(), Counts()
    tokenizer = train_tokenizer(flags.data, flags.vocab_size, text_column=flags.text_column, skip_bad=flags.skip_bad,
                                max_chars=flags.max_chars, doc_cap=flags.doc_cap, counts=counts)
    path = tokenizer.save(get_base_dir() / "tokenizer")
    seconds = time.monotonic() - started
    print0(f"{path}: vocabulary {tokenizer.get_vocab_size()}, {mean_bytes_per_token(tokenizer, flags):.2f} bytes per "
           f"token on the text it was trained on, {format_duration(seconds)}")
    print0(f"read: {counts.documents} documents; left out: {counts.empty} empty, {counts.unreadable} unreadable, "
           f"{counts.duplicates} duplicates")


def mean_bytes_per_token(tokenizer, flags: TokTrainFlags, chars: int = 2_000_000) -> float:
    """Bytes of text per token over the first `chars` characters of the source."""
    from nanochat.sources import iter_documents
    texts = list(iter_documents(flags.data, text_column=flags.text_column, skip_bad=flags.skip_bad,
                                max_chars=min(chars, flags.max_chars)))
    return sum(len(text.encode()) for text in texts) / sum(map(len, tokenizer.encode(texts)))


if __name__ == "__main__":
    cli(main)
