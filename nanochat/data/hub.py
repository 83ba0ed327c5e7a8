"""Streamed text of the Hugging Face hub: `hf:NAME[:CONFIG][:SPLIT][:COLUMN]`.

A broken connection is resumed where it broke, so no document is lost. By default the libraries wait up to half an hour, some
requests wait for ever, and they print many warnings. Here a hub that does not answer at the start is an error at once; one that
stops answering later gets some minutes, with one line for each new attempt.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from nanochat.common import UserError
from nanochat.data.reading import Reading

HUB_CHARS = 1_000_000_000  # characters read from the hub, unless --max-chars is given
HUB_PRESETS: dict[str, tuple[str, str | None, str]] = {  # name: (repository, config, split)
    "climbmix": ("karpathy/climbmix-400b-shuffle", None, "train"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
    "tinystories": ("roneneldan/TinyStories", None, "train"),
}
ANSWER_SECONDS = 20  # timeout of a request; the libraries' defaults are from 10 s to none
READ_RETRIES = 5  # retries to resume a file; each makes six requests, which take half a minute if they fail at once


def hub_address(source: str, text_column: str = "text") -> tuple[str, str | None, str, str]:
    """Parse `hf:NAME[:CONFIG][:SPLIT][:COLUMN]` into (repository, config, split, column); empty parts take their defaults.

    Raises: UserError for another form.
    """
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise UserError(f"{source!r}: expected hf:NAME[:CONFIG][:SPLIT][:COLUMN], or a preset: "
                        + ", ".join(f"hf:{name}" for name in HUB_PRESETS) + ".")
    repository, default_config, default_split = HUB_PRESETS.get(parts[0], (parts[0], None, "train"))
    config, split, column = [*parts[1:], "", "", ""][:3]
    return repository, config or default_config, split or default_split, column or text_column


def read_hub(source: str, reading: Reading) -> Iterator[str]:
    """The text of each row, in the order of the files.

    Raises: UserError where the dataset, its column or the network is not available.
    """
    name, config, split, column = hub_address(source, reading.text_column)
    reading.text_column = column
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError(f"{source} needs the datasets library: pip install datasets") from None
    _limit_waiting(datasets, huggingface_hub)
    _check_exists(name, source, huggingface_hub)
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        if rows.column_names:  # unknown before the first row where a file is one JSON array
            _check_column(source, column, rows.column_names)
            rows = rows.select_columns([column])  # do not decode other columns; images would need another library
        with closing(iter(rows)) as rows:
            for number, row in enumerate(rows, 1):
                if number == 1:
                    _check_column(source, column, row)
                yield from reading.row(row, f"{source}, row {number}")
    except UserError:
        raise
    except StopIteration:  # raised by the library when it reads the first row
        raise UserError(f"no text in {source}: its files have no rows.") from None
    except Exception as e:  # network and library errors are of too many kinds to list
        raise UserError(f"cannot read {source} from the Hugging Face hub: {_short_message(e)}. "
                        + _advice(e, name)) from None


def _limit_waiting(datasets, huggingface_hub) -> None:
    """Limit the timeouts of both libraries, and their output unless the user has set their verbosity."""
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = READ_RETRIES
    if "HF_HUB_VERBOSITY" not in os.environ:
        huggingface_hub.utils.logging.set_verbosity_error()
    if "DATASETS_VERBOSITY" not in os.environ:  # keep its warnings: one for each new attempt
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it logs what is in the exception too
    huggingface_hub.utils.disable_progress_bars()  # of README.md and other small files

    from huggingface_hub.utils import _http
    if not hasattr(_http, "default_client_factory"):  # before release 1.0, where listing files has no timeout
        return

    def limit(request) -> None:
        waits = request.extensions["timeout"]
        waits.update({kind: min(seconds or ANSWER_SECONDS, ANSWER_SECONDS) for kind, seconds in waits.items()})

    def client():
        made = _http.default_client_factory()
        made.event_hooks["request"].append(limit)  # a hook, as listing files explicitly asks for no timeout
        return made

    huggingface_hub.set_client_factory(client)


def _check_exists(name: str, source: str, huggingface_hub) -> None:
    """Check with one request that the dataset exists, which `load_dataset` takes minutes to find out.

    Raises: UserError if it does not, if the hub does not answer, or if `load_dataset` would read a local folder of this name.
    """
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
        pass  # the hub answers, or must not be asked: load_dataset reports the details
    except Exception as e:
        raise UserError(f"{source}: the hub at {huggingface_hub.constants.ENDPOINT} does not answer ({_short_message(e)}). "
                        "Check the network, or use local text: --data PATH or --data python.") from None


def _check_column(source: str, column: str, columns) -> None:
    """Raises: UserError if `column` is not among `columns`."""
    if column not in columns:
        name, config, split, by_flag = hub_address(source, "")
        flag = "" if by_flag else "--text-column NAME, or "
        raise UserError(f"{source} has no column {column!r}; it has {', '.join(map(repr, columns))}. Name the one with the "
                        f"text: {flag}--data hf:{name}:{config or ''}:{split}:NAME.")


def _short_message(e: Exception) -> str:
    """The message of an exception in one short line: the libraries' messages have many, with example code at the end."""
    text = " ".join(str(e).partition("Example of usage")[0].split())[:300].rstrip(". ")
    return text or type(e).__name__


def _advice(e: Exception, name: str) -> str:
    """What the user can do about an error of the libraries."""
    if type(e).__name__ == "DatasetNotFoundError":  # `_check_exists` found it, so this is about permissions
        return "Ask for access on the dataset's page, then log in: `hf auth login`."
    if isinstance(e, FileNotFoundError):
        return "The dataset has no files of text in a form that the datasets library reads."
    if isinstance(e, OSError) or type(e).__module__.startswith("http"):  # httpx, httpx2, httpcore
        return "Check the network and start again, or use local text: --data PATH or --data python."
    if type(e) is ValueError:  # of load_dataset; its message lists the configs or splits
        return "Write the config and split as in hf:NAME:CONFIG:SPLIT."
    return ("Some of its files cannot be read as they are, and --skip-bad does not apply to the hub. Download the files, "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER`, then --data FOLDER.")
