"""Text of the Hugging Face hub, streamed: `hf:NAME[:CONFIG][:SPLIT][:COLUMN]`.

A connection that breaks is taken up again where it broke; no document is lost in silence. The libraries would wait for half
an hour, some of their requests for ever, and print a page of warnings meanwhile. Here a hub that does not answer at the
start is an error at once, one that stops answering in the middle is given some minutes, with a line for each new attempt.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from nanochat.common import UserError
from nanochat.data.reading import Reading

HUB_CHARS = 1_000_000_000  # what is read of a dataset on the hub unless --max-chars says otherwise
HUB_PRESETS: dict[str, tuple[str, str | None, str]] = {  # name: (repository, config, split)
    "climbmix": ("karpathy/climbmix-400b-shuffle", None, "train"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
    "tinystories": ("roneneldan/TinyStories", None, "train"),
}
ANSWER_SECONDS = 20  # how long one request may wait; by default the libraries' waits are 10 s to endless
READ_RETRIES = 5  # rounds of attempts to go on with a file; each is six requests, half a minute if they fail at once


def hub_address(source: str, text_column: str = "text") -> tuple[str, str | None, str, str]:
    """(repository, config, split, column) of `hf:NAME[:CONFIG][:SPLIT][:COLUMN]`; an empty part takes its default."""
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise UserError(f"{source!r}: expected hf:NAME[:CONFIG][:SPLIT][:COLUMN], or a preset: "
                        + ", ".join(f"hf:{name}" for name in HUB_PRESETS) + ".")
    repository, default_config, default_split = HUB_PRESETS.get(parts[0], (parts[0], None, "train"))
    config, split, column = [*parts[1:], "", "", ""][:3]
    return repository, config or default_config, split or default_split, column or text_column


def read_hub(source: str, reading: Reading) -> Iterator[str]:
    """The text of each row, in the order of the files."""
    name, config, split, column = hub_address(source, reading.text_column)
    reading.text_column = column
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError(f"{source} needs the datasets library: pip install datasets") from None
    _limit_patience(datasets, huggingface_hub)
    _find(name, source, huggingface_hub)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        if rows.column_names:  # not known beforehand where a file is one JSON array
            _check_column(source, column, rows.column_names)
            rows = rows.select_columns([column])  # others need not be decoded; images could not without a library more
        with closing(iter(rows)) as rows:
            for number, row in enumerate(rows, 1):
                if number == 1:
                    _check_column(source, column, row)
                yield from reading.row(row, f"{source}, row {number}")
    except UserError:
        raise
    except StopIteration:  # of the library, when it looks at the first row
        raise UserError(f"no text in {source}: its files have no rows.") from None
    except Exception as e:  # what fails on the way to a hub is of too many kinds to list
        raise UserError(f"cannot read {source} from the Hugging Face hub: {_what_was_said(e)}. "
                        + _advice(e, name)) from None


def _limit_patience(datasets, huggingface_hub) -> None:
    """Bound the waits of both libraries, and what they print, unless the user has set their verbosity."""
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = READ_RETRIES
    if "HF_HUB_VERBOSITY" not in os.environ:
        huggingface_hub.utils.logging.set_verbosity_error()
    if "DATASETS_VERBOSITY" not in os.environ:  # its warnings stay: they tell of each new attempt
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs is in the exception, too
    huggingface_hub.utils.disable_progress_bars()  # those of README.md and the like

    from huggingface_hub.utils import _http
    if not hasattr(_http, "default_client_factory"):  # before 1.0; its listing of files can wait for ever
        return

    def limit(request) -> None:
        waits = request.extensions["timeout"]
        waits.update({kind: min(seconds or ANSWER_SECONDS, ANSWER_SECONDS) for kind, seconds in waits.items()})

    def client():
        made = _http.default_client_factory()
        made.event_hooks["request"].append(limit)  # a default would not do: listing files asks for no limit explicitly
        return made

    huggingface_hub.set_client_factory(client)


def _find(name: str, source: str, huggingface_hub) -> None:
    """UserError if the dataset is not on the hub or the hub does not answer: one request, where `load_dataset` takes minutes
    to find out, and would read a local folder of this name."""
    errors = huggingface_hub.errors
    if Path(name).is_dir():
        raise UserError(f"{source}: there is a folder {name} here, which the datasets library would read instead of the hub. "
                        f"To read the folder: --data {name}; to read the hub, start from another folder.")
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=ANSWER_SECONDS)
    except errors.HFValidationError:
        raise UserError(f"{source}: {name!r} cannot be a dataset's name. The hub has names like owner/dataset.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{source}: the hub at {huggingface_hub.constants.ENDPOINT} has no dataset {name!r} that you may read. "
                        "Check the name; if the dataset is private, log in first: `hf auth login`.") from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
        pass  # it answers, or is not to be asked: what is to be said about that, load_dataset says
    except Exception as e:
        raise UserError(f"{source}: the hub at {huggingface_hub.constants.ENDPOINT} does not answer ({_what_was_said(e)}). "
                        "Check the network, or use local text: --data PATH or --data python.") from None


def _check_column(source: str, column: str, columns) -> None:
    if column not in columns:
        name, config, split, by_flag = hub_address(source, "")
        flag = "" if by_flag else "--text-column NAME, or "
        raise UserError(f"{source} has no column {column!r}; it has {', '.join(map(repr, columns))}. Name the one with the "
                        f"text: {flag}--data hf:{name}:{config or ''}:{split}:NAME.")


def _what_was_said(e: Exception) -> str:
    """An exception as part of one line: the libraries' messages go over many, with an example of Python at the end."""
    text = " ".join(str(e).partition("Example of usage")[0].split())[:300].rstrip(". ")
    return text or type(e).__name__


def _advice(e: Exception, name: str) -> str:
    if type(e).__name__ == "DatasetNotFoundError":  # it was found before, so this is about rights
        return "Ask for access on the dataset's page, then log in: `hf auth login`."
    if isinstance(e, FileNotFoundError):
        return "The dataset has no files of text in a form that the datasets library reads."
    if isinstance(e, OSError) or type(e).__module__.startswith("http"):  # httpx, httpx2, httpcore
        return "Check the network and start again, or use local text: --data PATH or --data python."
    if type(e) is ValueError:  # of load_dataset, which lists the configs or splits there are
        return "Write the config and split as in hf:NAME:CONFIG:SPLIT."
    return ("Some of its files cannot be read as they are, and --skip-bad has no say in the datasets library. Fetch the files, "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER`, then --data FOLDER.")
