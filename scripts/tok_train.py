"""Train a tokenizer: `python -m scripts.tok_train --data SOURCE`. Training and evaluation then use it by default.

It is written to `$NANOCHAT_BASE_DIR/tokenizer`.
"""

import time
from dataclasses import asdict, dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import writable_base_dir
from nanochat.cli.program import cli
from nanochat.common import format_duration, print0
from nanochat.data.reading import describe_left_out
from nanochat.data.sources import Counts, TokenizerFlags, iter_documents


@dataclass
class TokTrainFlags(TokenizerFlags):
    """The text, and the size of the vocabulary"""
    max_chars: int = flag(2_000_000_000, "read at most this many characters; -1 is all")


def main() -> None:
    flags, = parse([TokTrainFlags], prog="python -m scripts.tok_train", description="Train a byte-level BPE tokenizer.")
    folder = writable_base_dir() / "tokenizer"
    from nanochat.dataset import train_tokenizer
    started, counts = time.monotonic(), Counts()
    tokenizer = train_tokenizer(flags.data, flags.vocab_size, doc_cap=flags.doc_cap, counts=counts, **flags.reading())
    path = tokenizer.save(folder)
    seconds = time.monotonic() - started
    print0(f"{path}: vocabulary {tokenizer.get_vocab_size()}, {mean_bytes_per_token(tokenizer, flags):.2f} bytes per "
           f"token at the start of the text, {format_duration(seconds)}")
    print0(f"read: {counts.documents} documents")
    if left_out := describe_left_out(asdict(counts)):
        print0(f"left out: {left_out}")


def mean_bytes_per_token(tokenizer, flags: TokTrainFlags, chars: int = 2_000_000) -> float:
    """Bytes of text per token over the first `chars` characters of the source."""
    limit = chars if flags.max_chars < 0 else min(chars, flags.max_chars)
    texts = list(iter_documents(flags.data, **flags.reading() | {"max_chars": limit}))
    return sum(len(text.encode()) for text in texts) / sum(map(len, tokenizer.encode(texts)))


if __name__ == "__main__":
    cli(main)
