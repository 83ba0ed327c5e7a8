"""Text as UTF-8 can hold it. No torch."""


def replace_lone_surrogates(text: str) -> str:
    """`text` with each half of a broken UTF-16 pair, which JSON may carry and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
