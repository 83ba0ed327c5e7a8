"""The tokenizer of the public nanochat, read from its `tokenizer.pkl` without unpickling.

A pickle is a program for a small machine, and can call any function of Python. This one is the pickle of a `tiktoken.Encoding`,
whose state is a dict of numbers, strings and bytes. The standard library lists the program's instructions without obeying them
(`pickletools.genops`). Here those that only build such data are followed; any other makes the file refused. No class is
imported, no function called.
"""

import pickletools
from pathlib import Path

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer

ENCODING = "tiktoken.core", "Encoding"  # the one class that may be named, and is not made
BOS = "<|bos|>"
LITERALS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BININT", "BININT1",
            "BININT2"}
MARK = object()


def read_public_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a pickle file. Raises: UserError where it is anything but the pickle of a tiktoken.Encoding."""
    try:
        state = pickled_state(path.read_bytes())
        ranks, special_tokens, pattern = state["mergeable_ranks"], state["special_tokens"], state["pat_str"]
        _check(ranks, special_tokens, pattern)
        return Tokenizer(pattern, ranks, special_tokens, BOS)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}.") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not the pickle of a tiktoken.Encoding, as the public nanochat writes it, and is not read "
                        f"({type(e).__name__}: {str(e)[:100]}). Give a tokenizer of ours with --tokenizer.") from None


def pickled_state(content: bytes) -> dict:
    """The state of the one object in a pickle of protocol 3 to 5. Raises: ValueError for an instruction that does more than
    build data."""
    stack, memo = [], []
    for instruction, argument, _ in pickletools.genops(content):
        name = instruction.name
        if name in LITERALS:
            stack.append(argument)
        elif name == "MARK":
            stack.append(MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("SETITEM", "SETITEMS"):
            begin = len(stack) - 2 if name == "SETITEM" else _last_mark(stack)
            items, stack = stack[begin:], stack[:begin]
            items = [item for item in items if item is not MARK]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            if argument not in (None, len(memo)):
                raise ValueError("values are not remembered in order")
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = tuple(argument.split(" ")) if name == "GLOBAL" else (stack.pop(-2), stack.pop())
            if named != ENCODING:
                raise ValueError(f"it names {'.'.join(map(str, named))}")
            stack.append(ENCODING)
        elif name == "NEWOBJ":
            if (stack.pop(-2), stack.pop()) != (ENCODING, ()):
                raise ValueError("it makes another object")
            stack.append(ENCODING)
        elif name == "BUILD":
            state = stack.pop()
            if stack != [ENCODING] or not isinstance(state, dict):
                raise ValueError("it has no state of an Encoding")
            return state  # what follows can only be STOP, or is never obeyed
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the instruction {name}")
    raise ValueError("it has no end")


def _last_mark(stack: list) -> int:
    return len(stack) - 1 - stack[::-1].index(MARK)


def _check(ranks: dict, special_tokens: dict, pattern: str) -> None:
    """Raises: ValueError for a vocabulary that the public nanochat does not train: ids without gaps, special tokens last."""
    alphabet = {bytes([b]) for b in range(256)}
    if type(pattern) is not str or any(type(token) is not bytes for token in ranks) or not alphabet <= set(ranks):
        raise ValueError("it is no vocabulary over bytes")
    if any(type(name) is not str for name in special_tokens) or BOS not in special_tokens:
        raise ValueError(f"it has no {BOS}")
    if sorted([*ranks.values(), *special_tokens.values()]) != list(range(len(ranks) + len(special_tokens))) \
            or min(special_tokens.values()) != len(ranks):
        raise ValueError("its ids are not in order")
