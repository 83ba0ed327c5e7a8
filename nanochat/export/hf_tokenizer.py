"""Our tokenizer as a `tokenizer.json` of the library `tokenizers`, which transformers and many other programs read.

The two algorithms are one: split the text by the pattern, then merge pairs of bytes, those of the lowest rank first. What differs
is said here:
- tiktoken knows the ranks of whole tokens, `tokenizers` a list of merges. Each token gets a merge for every way to cut it in two
  other tokens, all of the token's rank.
- A piece that is a token as a whole is taken as it is (`ignore_merges`).
- Runs of more than MAX_RUN characters are cut, by a first split (see `nanochat.tokenizer`).
- Names of special tokens in a text: `tokenizers` takes them for the tokens, our `encode` for text. transformers does as we do
  under `split_special_tokens`, which tokenizer_config.json sets.
"""

from nanochat.tokenizer import MAX_RUN, Tokenizer

END_TOKENS = ("<|assistant_end|>",)  # that end a text, besides bos


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The content of tokenizer.json: it encodes as `tokenizer.encode(text, prepend=bos)` does, or without bos where
    `add_special_tokens=False`."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    vocab = {_text(token): rank for token, rank in tokenizer.ranks.items()}
    by_id = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [dict(id=id, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                         for name, id in by_id],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            _split(rf"\S{{{MAX_RUN}}}(?=\S)|\s{{{MAX_RUN}}}(?=\s)", "MergedWithPrevious"),
            _split(tokenizer.pattern, "Isolated"),
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [_special(bos), _sequence("A", 0)],
            "pair": [_special(bos), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocab | dict(by_id), "merges": _merges(tokenizer.ranks)},
    }


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict:
    """The content of tokenizer_config.json. context: tokens that the model was trained on at once."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.bos_token, "eos_token": tokenizer.bos_token,
            "pad_token": tokenizer.bos_token, "model_max_length": context, "clean_up_tokenization_spaces": False,
            "split_special_tokens": True, "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}


def end_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end a text, bos first: the next document's beginning is this one's end."""
    return [tokenizer.bos_token_id, *(tokenizer.special_tokens[name] for name in END_TOKENS if name in tokenizer.special_tokens)]


def _split(pattern: str, behavior: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _special(name: str, type_id: int = 0) -> dict:
    return {"SpecialToken": {"id": name, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Pairs of tokens that are a token together, by its rank."""
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [[_text(left), _text(right)] for left, right in merges]


def _characters() -> dict[int, str]:
    """GPT-2's table: byte -> the printable character that stands for it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


CHARACTERS = _characters()


def _text(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)
