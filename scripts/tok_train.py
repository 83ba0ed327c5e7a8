"""Train a tokenizer: `python -m scripts.tok_train --data SOURCE`. It becomes the current one of $NANOCHAT_BASE_DIR."""

import time
from dataclasses import dataclass

from nanochat.common import cli, format_duration, get_base_dir, print0
from nanochat.flags import flag, parse
from nanochat.sources import Counts, SourceFlags, iter_documents


@dataclass
class TokTrainFlags(SourceFlags):
    """The text, and the vocabulary to learn from it"""
    vocab_size: int = flag(32768, "tokens in all: 256 bytes, the merges, 9 special ones", low=265, high=2**24)
    max_chars: int = flag(2_000_000_000, "read at most this many characters; -1 is all")
    doc_cap: int = flag(10_000, "learn from at most this many characters of a document", low=1)


def main() -> None:
    flags, = parse([TokTrainFlags], prog="python -m scripts.tok_train", description="Train a tokenizer.")
    from nanochat.dataset import train_tokenizer
    started, counts = time.monotonic(), Counts()
    tokenizer = train_tokenizer(flags.data, flags.vocab_size, doc_cap=flags.doc_cap, counts=counts, **flags.reading())
    path = tokenizer.save(get_base_dir() / "tokenizer")
    seconds = time.monotonic() - started
    print0(f"{path}: vocabulary {tokenizer.get_vocab_size()}, {mean_bytes_per_token(tokenizer, flags):.2f} bytes per "
           f"token on the text it was trained on, {format_duration(seconds)}")
    print0(f"read: {counts.documents} documents; left out: {counts.empty} empty, {counts.unreadable} unreadable, "
           f"{counts.duplicates} duplicates")


def mean_bytes_per_token(tokenizer, flags: TokTrainFlags, chars: int = 2_000_000) -> float:
    """Bytes of text per token over the first `chars` characters of the source."""
    limit = chars if flags.max_chars < 0 else min(chars, flags.max_chars)
    texts = list(iter_documents(flags.data, **flags.reading() | {"max_chars": limit}))
    return sum(len(text.encode()) for text in texts) / sum(map(len, tokenizer.encode(texts)))


if __name__ == "__main__":
    cli(main)
