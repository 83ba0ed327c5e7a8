"""Evaluate the tokenizer: bytes of text per token, compared with GPT-2's and GPT-4's. `python -m scripts.tok_eval`

The more bytes a token stands for, the more text fits into the context, and the fewer tokens a model is trained on. A larger
vocabulary has more bytes per token, but needs larger embedding tables. GPT-2 (50k) and GPT-4 (100k) are shown if tiktoken has
their files or can download them within a few seconds.
"""

import threading
from dataclasses import dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import format_table, print0
from nanochat.data.sources import SourceFlags

PEERS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
PEER_SECONDS = 5  # timeout for the download of all of them

SAMPLES = {
    "English": """The harbour was quiet that morning. A few gulls walked along the wall as if they owned it, and the
fishermen, who had come back before dawn, were mending their nets and talking about the price of diesel. "It'll rain
by noon," said the oldest of them, without looking up. Nobody answered; he had been right too often. In 1987 there had
been forty boats here. Now there were six, and two of those belonged to a man who lived in the city.
""",
    "code": '''def moving_average(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values at each position."""
    if window < 1:
        raise ValueError(f"window must be positive, got {window}")
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out
''',
    "maths": r"""Let $f \colon [a, b] \to \mathbb{R}$ be continuous. Then there is a $\xi \in (a, b)$ such that
\[ \int_a^b f(x)\,dx = f(\xi)\,(b - a). \]
For $f(x) = x^2$ on $[0, 3]$ we have $\int_0^3 x^2\,dx = 9$, hence $\xi^2 = 3$ and $\xi = \sqrt{3} \approx 1.7320508$.
Moreover $\sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}$, which for $n = 100$ gives $338350$.
""",
    "other scripts": """Утром в гавани было тихо; рыбаки чинили сети и говорили о погоде.
今天早上港口很安静，渔民们在修补渔网。 오늘 아침 항구는 조용했고 어부들은 그물을 손질하고 있었다.
كان الميناء هادئا هذا الصباح. Το λιμάνι ήταν ήσυχο το πρωί. आज सुबह बंदरगाह शांत था। 🐟🌊
""",
}


@dataclass
class TokEvalFlags(SourceFlags):
    """The text to evaluate on, besides built-in samples"""
    max_chars: int = flag(4_000_000, "read at most this many characters; -1 is all")


def main() -> None:
    flags, = parse([TokEvalFlags], prog="python -m scripts.tok_eval", description="Bytes of text per token of the tokenizer.")
    from nanochat.data.sources import iter_documents
    from nanochat.dataset import split_documents
    from nanochat.tokenizer import get_tokenizer
    tokenizers = {"ours": get_tokenizer()}
    fetched = fetch_peers()

    texts = {name: [text] for name, text in SAMPLES.items()}
    documents = iter_documents(flags.data, **flags.reading())
    for split, text in split_documents(documents):
        texts.setdefault(f"{flags.data} ({split})", []).append(text)

    tokenizers |= fetched()
    print0("vocabulary: " + ", ".join(f"{name} {t.get_vocab_size()}" for name, t in tokenizers.items()) + "\n")
    print0("bytes per token, higher is better\n" + format_table([compression(name, text, tokenizers)
                                                                 for name, text in texts.items()]))
    missing = [name for name in PEERS if name not in tokenizers]
    if missing:
        print0(f"\nwithout {', '.join(missing)}: tiktoken has no copy and could not download one in {PEER_SECONDS} s")


def compression(name: str, texts: list[str], tokenizers: dict) -> dict:
    """A row of the table: the size of the text, and its bytes per token for each tokenizer."""
    size = sum(len(text.encode()) for text in texts)
    rates = {label: size / sum(map(len, t.encode(texts))) for label, t in tokenizers.items()}
    return {"text": name, "bytes": size} | {label: round(rate, 2) for label, rate in rates.items()} \
        | {f"ours / {label}": round(rates["ours"] / rate, 2) for label, rate in rates.items() if label != "ours"}


def fetch_peers():
    """Start to load the tokenizers of PEERS. Returns a function that returns those loaded within PEER_SECONDS.

    Uses daemon threads: without a network a download can hang for ever.
    """
    from nanochat.tokenizer import Tokenizer
    found = {}

    def load(label: str, name: str) -> None:
        try:
            found[label] = Tokenizer.from_pretrained(name)
        except Exception:  # no network, no such file, a proxy's error page: `main` reports what is missing
            pass

    threads = [threading.Thread(target=load, args=peer, daemon=True) for peer in PEERS.items()]
    for thread in threads:
        thread.start()

    def collect() -> dict:
        for thread in threads:
            thread.join(PEER_SECONDS / len(threads))
        return {label: found[label] for label in PEERS if label in found}

    return collect


if __name__ == "__main__":
    cli(main)
