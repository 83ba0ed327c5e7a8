"""The tokenizer: byte-level byte-pair encoding (BPE, arXiv 1508.07909), as in GPT-2 and GPT-4.

A regular expression first splits the text into pieces (words with their leading space, digits, punctuation, line breaks); a
token never crosses the border of a piece. Within a piece the 256 bytes are the first tokens, and neighbouring pairs are merged
in the order in which training found them most frequent. So every text can be encoded, and decoding returns the same bytes.

Training uses the library `tokenizers`, encoding uses `tiktoken`; the ordered merges are all that goes from one to the other.
Special tokens have the last ids. `encode` never produces them, so text cannot forge them.

A conversation is rendered into ids and a mask: 1 on tokens that the assistant is trained to produce, 0 on the rest.
"""

import base64
import copy
import hashlib
import json
import os
import re
import shutil
from itertools import chain, count
from pathlib import Path

import tiktoken

from nanochat.common import UserError, get_base_dir, print0
from nanochat.data.text import replace_lone_surrogates
from nanochat.runtime.files import read_json, write_atomic

SPECIAL_TOKENS = [
    "<|bos|>",  # at the start of every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # a call of the Python tool by the assistant
    "<|output_start|>", "<|output_end|>",  # the tool's output
]

# GPT-4's pattern, except that numbers are split into groups of at most two digits instead of three: a thousand three-digit
# tokens would be too many for a small vocabulary.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")

FILE_NAME, FILE_FORMAT, FILE_VERSION = "tokenizer.json", "nanochat-tokenizer", 1

# Longer runs of characters without white space, or of white space only, are cut before encoding. Normal text has none; without
# the cut, megabytes of one letter would be one piece, for which some encoders need quadratic time.
MAX_RUN = 4096
LARGEST_ID = 2**25  # tables are as long as the largest id, and a damaged file must not exhaust the memory


class Tokenizer:
    """Byte-level BPE with special tokens. Create one with `train_from_iterator`, `from_directory` or `from_pretrained`."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int], bos_token="<|bos|>"):
        """ranks: bytes of a token -> its id, which is also its merge priority.   special_tokens: name -> id."""
        self.pattern, self.ranks, self.special_tokens, self.bos_token = pattern, ranks, special_tokens, bos_token
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)
        self.bos_token_id = special_tokens[bos_token]

    # ---- making, saving, loading

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size: int) -> "Tokenizer":
        """Train on an iterator of str.

        vocab_size: 256 bytes, merges and special tokens. Smaller in the result if the text has too few pairs to merge.
        Raises: UserError if it is too small for the bytes and the special tokens.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"a vocabulary of {vocab_size} is too small: the 256 bytes and the {len(SPECIAL_TOKENS)} "
                            f"special tokens alone are {smallest}.")
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        texts = (part for text in text_iterator for part in _cut_long_runs(replace_lone_surrogates(text)))
        model.train_from_iterator(texts, trainer)
        merges = json.loads(model.to_str())["model"]["merges"]
        ranks = _ranks_from_merges(merges)
        return cls(SPLIT_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "Tokenizer":
        """A published encoding such as `gpt2` or `cl100k_base`, which tiktoken downloads and caches."""
        encoding = tiktoken.get_encoding(tiktoken_name)
        return cls(encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens, bos_token="<|endoftext|>")

    @classmethod
    def from_directory(cls, directory) -> "Tokenizer":
        """Load what `save` wrote. Raises: UserError if it is missing or damaged."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            pickles = sorted(Path(directory).glob("*.pkl"))
            why = f" {pickles[0].name} is a pickle, which can run code when loaded, and is not read." if pickles else ""
            raise UserError(f"no tokenizer at {path}.{why} Train one with `python -m scripts.tok_train`.")
        try:
            content = read_json(path)
            if content["format"] != FILE_FORMAT or content["version"] != FILE_VERSION:
                raise ValueError(f"its format is {content['format']} {content['version']}")
            tokens = [base64.b64decode(token, validate=True) for token in content["tokens"]]
            ranks = {token: rank for rank, token in enumerate(tokens) if token}  # an empty token marks an unused id
            special_tokens = {str(name): int(rank) for name, rank in content["special_tokens"].items()}
            _check_ranks(tokens, special_tokens)
            tokenizer = cls(content["pattern"], ranks, special_tokens, content["bos_token"])
            if content.get("fingerprint", tokenizer.fingerprint()) != tokenizer.fingerprint():
                raise ValueError("it does not match its fingerprint")
            return tokenizer
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
            raise UserError(f"{path} is damaged or is not a tokenizer of this project ({type(e).__name__}: "
                            f"{str(e)[:100]}). Train one with `python -m scripts.tok_train`.") from None

    def save(self, directory) -> Path:
        """Write `tokenizer.json` into `directory` atomically. It is plain JSON: loading it runs no code.

        A different tokenizer that is there is kept as `tokenizer.json~1`, `~2`, ..., as models may depend on it.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokens = [b""] * (max(self.ranks.values()) + 1)
        for token, rank in self.ranks.items():
            tokens[rank] = token
        content = dict(format=FILE_FORMAT, version=FILE_VERSION, fingerprint=self.fingerprint(), pattern=self.pattern,
                       bos_token=self.bos_token, special_tokens=self.special_tokens,
                       tokens=[base64.b64encode(t).decode() for t in tokens])
        path = directory / FILE_NAME
        if path.exists() and not self._is_in(directory):
            print0(f"the previous tokenizer in {directory} is now {_keep(path).name}")
        write_atomic(path, json.dumps(content, indent=0))
        return path

    def _is_in(self, directory: Path) -> bool:
        try:
            return Tokenizer.from_directory(directory).fingerprint() == self.fingerprint()
        except UserError:
            return False

    def fingerprint(self) -> str:
        """Hash of the pattern, the tokens in their order, and the special tokens: 32 hex digits."""
        parts = [self.pattern, sorted(self.special_tokens.items()), sorted((r, t.hex()) for t, r in self.ranks.items())]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    # ---- vocabulary

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_special_tokens(self) -> set[str]:
        return set(self.special_tokens)

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    def encode_special(self, text: str) -> int:
        """The id of a special token. Raises: KeyError."""
        return self.special_tokens[text]

    def id_to_token(self, id: int) -> str:
        return self.decode([id])

    def decode_single_token_bytes(self, id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(id)

    def token_bytes(self):
        """Bytes of text per token, 0 for special tokens: numpy int32 (vocab_size,)."""
        import numpy as np
        lengths = np.zeros(self.get_vocab_size(), dtype=np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    # ---- encoding and decoding

    def encode(self, text, prepend=None, append=None, num_threads: int = 8):
        """Encode a str into a list of ids, or a list of str into a list of such lists, on `num_threads` threads.

        prepend, append: id or name of a special token at the start or end of each text.
        Names of special tokens in the text are encoded as ordinary text. A lone surrogate, which UTF-8 cannot encode, becomes
        U+FFFD.
        """
        before = [] if prepend is None else [self._special_id(prepend)]
        after = [] if append is None else [self._special_id(append)]
        texts = [text] if isinstance(text, str) else list(text)
        parts = [_cut_long_runs(replace_lone_surrogates(t)) for t in texts]
        encoded = iter(self.encoding.encode_ordinary_batch(list(chain.from_iterable(parts)), num_threads=num_threads)
                       if len(texts) > 1 else map(self.encoding.encode_ordinary, chain.from_iterable(parts)))
        ids = [list(chain(before, *(next(encoded) for _ in part), after)) for part in parts]
        return ids[0] if isinstance(text, str) else ids

    __call__ = encode

    def decode(self, ids) -> str:
        """Decode ids to text. Invalid UTF-8, such as an incomplete character, becomes U+FFFD."""
        return self.encoding.decode(list(ids))

    def _special_id(self, token) -> int:
        return token if isinstance(token, int) else self.encode_special(token)

    # ---- conversations

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Render a conversation into (ids, mask) of the same length, cut at `max_tokens`.

        conversation: {"messages": [{"role", "content"}, ...]}. User and assistant take turns; a system message may come first
        and is merged into the first user message. The assistant's content is a str or a list of parts
        {"type": "text" | "python" | "python_output", "text": str}.
        mask: 1 on the assistant's text, tool calls and end tokens, which it is trained on; 0 on tool output and the rest.
        Raises: UserError for messages out of order.
        """
        ids, mask = [self.bos_token_id], [0]

        def add(tokens: list[int], supervised: int) -> None:
            ids.extend(tokens)
            mask.extend([supervised] * len(tokens))

        def special(name: str) -> list[int]:
            return [self.encode_special(f"<|{name}|>")]

        for message in _turns(conversation):
            if message["role"] == "user":
                add(special("user_start") + self.encode(message["content"]) + special("user_end"), supervised=0)
                continue
            add(special("assistant_start"), supervised=0)
            for kind, text in _parts(message["content"]):
                if kind == "text":
                    add(self.encode(text), supervised=1)
                elif kind == "python":
                    add(special("python_start") + self.encode(text) + special("python_end"), supervised=1)
                else:
                    add(special("output_start") + self.encode(text) + special("output_end"), supervised=0)
            add(special("assistant_end"), supervised=1)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids of a prompt: the conversation without its last message, the assistant's, plus <|assistant_start|>."""
        messages = _turns(conversation)
        if messages[-1]["role"] != "assistant":
            raise UserError("a conversation to complete ends with the assistant's message, which is then left out.")
        ids, _ = self.render_conversation({"messages": messages[:-1]}, max_tokens=None)
        return ids + [self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(self, ids, mask) -> str:
        """Tokens separated by `|` for a terminal: green where mask is 1, red where it is 0."""
        red, green, reset = ("", "", "") if os.environ.get("NO_COLOR") else ("\033[91m", "\033[92m", "\033[0m")
        return "|".join(f"{green if trained else red}{self.decode([id])}{reset}" for id, trained in zip(ids, mask, strict=True))


def _keep(path: Path) -> Path:
    """Give a file a second name, the first free one of NAME~1, NAME~2, ..., before it is replaced. It never disappears."""
    for number in count(1):
        try:
            kept = path.with_name(f"{path.name}~{number}")
            os.link(path, kept)
            return kept
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            if not kept.exists():
                shutil.copyfile(path, kept)
                return kept


RustBPETokenizer = Tokenizer  # its name in the public nanochat


def get_tokenizer(directory=None) -> Tokenizer:
    """The tokenizer in `directory`, by default `$NANOCHAT_BASE_DIR/tokenizer`."""
    return Tokenizer.from_directory(directory or get_base_dir() / "tokenizer")


def get_token_bytes(device="cpu", tokenizer: Tokenizer | None = None):
    """Bytes of text per token, 0 for special tokens: torch int32 (vocab_size,) on `device`. For `evaluate_bpb`."""
    import torch
    return torch.from_numpy((tokenizer or get_tokenizer()).token_bytes()).to(device)


def _cut_long_runs(text: str) -> list[str]:
    """Split `text` so that no part has a run of more than MAX_RUN characters that are all or none white space.

    Normal text is one part. The check is cheap: such a run covers at least one aligned window of half its length, so only
    those windows are checked.
    """
    half = MAX_RUN // 2
    windows = (text[i:i + half] for i in range(0, len(text) - half + 1, half))
    if not any(len(window.split(None, 1)) < 2 for window in windows):
        return [text]
    parts, begin = [], 0
    for run in re.finditer(r"\S+|\s+", text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            parts.append(text[begin:cut])
            begin = cut
    return [*parts, text[begin:]]


def _ranks_from_merges(merges: list) -> dict[bytes, int]:
    """Token bytes -> rank, from the merges of `tokenizers`, which writes bytes as printable characters by GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in merges:
        token = bytes(byte_of[c] for c in left + right)
        ranks.setdefault(token, len(ranks))
    return ranks


def _check_ranks(tokens: list[bytes], special_tokens: dict[str, int]) -> None:
    """Raises: ValueError for a vocabulary that no training produces."""
    used = [token for token in tokens if token]
    if len(set(used)) != len(used):
        raise ValueError("a token occurs twice")
    if len({token for token in used if len(token) == 1}) != 256:
        raise ValueError("some of the 256 bytes have no token")
    if not special_tokens or min(special_tokens.values()) < len(tokens):
        raise ValueError("special tokens must come after all others")
    if max(special_tokens.values()) >= LARGEST_ID:
        raise ValueError(f"ids end at {LARGEST_ID:,}")


def _turns(conversation: dict) -> list[dict]:
    """A checked copy of the messages, with a system message merged into the first user message. Raises: UserError."""
    messages = copy.deepcopy(conversation["messages"])
    if messages and messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise UserError("a system message must be followed by a message of the user.")
        messages[1]["content"] = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = messages[1:]
    if not messages:
        raise UserError("a conversation needs at least one message.")
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise UserError(f"message {i} of the conversation is from {message['role']!r}, expected {expected!r}: "
                            "user and assistant take turns, the user first.")
        if expected == "user" and not isinstance(message["content"], str):
            raise UserError(f"message {i} of the conversation: the user's content must be a string.")
    return messages


def _parts(content) -> list[tuple[str, str]]:
    """The content of an assistant message as (type, text) pairs. Raises: UserError for an unknown type."""
    if isinstance(content, str):
        return [("text", content)]
    pairs = [(part["type"], part["text"]) for part in content]
    for kind, _ in pairs:
        if kind not in ("text", "python", "python_output"):
            raise UserError(f"the assistant's message has a part of type {kind!r}; known: text, python, python_output.")
    return pairs
