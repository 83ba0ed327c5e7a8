"""Repair of text that UTF-8 cannot encode. No torch."""


def replace_lone_surrogates(text: str) -> str:
    """Replace every lone surrogate (half of a UTF-16 pair, which JSON can contain and UTF-8 cannot) by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
