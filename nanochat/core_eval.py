"""The CORE metric of a base model: the mean over 22 tasks of DCLM (arXiv 2406.11794).

A task is a list of questions, which the model answers by likelihood after a few solved examples (few-shot):
- multiple_choice: one question, several answers; the answer whose tokens have the lowest mean loss is chosen.
- schema: several contexts, one continuation (Winograd: who is "it"?); the context under which it has the lowest loss is chosen.
- language_modeling: every token of the continuation must be the model's most likely one.

Random guessing scores differently in each task, so accuracies are centered: (accuracy - baseline) / (1 - baseline) is 0 for
guessing and 1 for perfect answers. CORE is the mean of the centered accuracies.

The eval bundle is a folder:
    core.yaml            icl_tasks: [{label, icl_task_type, dataset_uri, num_fewshot: [n], continuation_delimiter}, ...]
    eval_meta_data.csv   columns "Eval Task" (the label) and "Random baseline" (in percent), and others
    eval_data/           one .jsonl per dataset_uri

The order of questions, the choice of solved examples and the prompts are those of the public nanochat, so results can be compared
with its published numbers.
"""

import csv
import http.client
import json
import random
import stat
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat.common import Progress, UserError, get_base_dir, print0, resolve
from nanochat.runtime.distributed import all_reduce_sum, broadcast_object, in_step, on_main_rank_first, rank_and_world_size

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CONNECT_TIMEOUT = 10.0       # seconds
MAX_UNPACKED = 4 * 2**30     # bytes: a larger zip is not the eval bundle
FORWARD_TOKENS = 8192        # tokens per forward pass, with padding: limits the memory of the logits
DATA_SEED, FEWSHOT_SEED = 1337, 1234


class CoreUnavailable(UserError):
    """There is no usable eval bundle and none can be downloaded. Training and other evaluations continue without CORE."""


# ---------------------------------------------------------------------------------------------------------------------
# The bundle

def find_bundle(bundle_dir: str | Path | None = None, url: str = BUNDLE_URL) -> Path:
    """The folder of the eval bundle: `bundle_dir`, or `$NANOCHAT_BASE_DIR/eval_bundle`, which is downloaded if missing.

    Under torchrun all ranks must call it; rank 0 does the work.
    Raises: CoreUnavailable, within seconds if there is no network.
    """
    outcome = [None, None]

    def find() -> None:
        try:
            outcome[0] = _find_bundle(bundle_dir, url)
        except UserError as e:  # pass the error on to the other ranks, which wait for the result
            outcome[1] = str(e)
    on_main_rank_first(find, others=lambda: None)  # a download may take longer than a collective waits
    folder, trouble = broadcast_object(outcome)
    if trouble is not None:
        raise CoreUnavailable(trouble)
    return folder


def _find_bundle(bundle_dir, url: str) -> Path:
    folder = resolve(bundle_dir) if bundle_dir else get_base_dir() / "eval_bundle"
    if (folder / "core.yaml").is_file():
        return folder
    if bundle_dir or folder.exists():
        raise CoreUnavailable(f"{folder} has no core.yaml, so it is no eval bundle for the CORE metric. "
                              "It should hold core.yaml, eval_meta_data.csv and eval_data/.")
    _download_bundle(url, folder)
    return folder


def _download_bundle(url: str, folder: Path) -> None:
    """Download and unpack the zip beside `folder`, then rename: an incomplete bundle never has the final name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".eval_bundle_", dir=folder.parent) as scratch:
        archive, unpacked = Path(scratch) / "bundle.zip", Path(scratch) / "unpacked"
        try:
            _download(url, archive)
        except (OSError, ValueError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", None) or e
            raise CoreUnavailable(
                f"the CORE metric needs its eval bundle, and {url} cannot be fetched ({reason}). "
                f"Where there is a network, download and unzip it, then put the folder at {folder}.") from None
        _unpack(archive, unpacked)
        inner = next((p for p in (unpacked / "eval_bundle", unpacked) if (p / "core.yaml").is_file()), None)
        if inner is None:
            raise CoreUnavailable(f"{url} was fetched, but it holds no core.yaml: not the eval bundle it should be.")
        inner.rename(folder)


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as response, open(path, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        progress = Progress("downloading the CORE eval bundle", total=size or None, unit="B")
        while block := response.read(2**20):
            file.write(block)
            progress.update(len(block))
        progress.close()
    if size and path.stat().st_size != size:
        raise OSError(f"the connection broke after {path.stat().st_size} of {size} bytes")


def _unpack(archive: Path, folder: Path) -> None:
    """Unzip into `folder`. Raises: CoreUnavailable for a damaged archive, or a member whose path or link leads outside."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = zipped.infolist()
            if sum(m.file_size for m in members) > MAX_UNPACKED:
                raise CoreUnavailable(f"the eval bundle is refused: it would unpack to over {MAX_UNPACKED >> 30} GiB.")
            for member in members:
                target = (folder / member.filename.replace("\\", "/")).resolve()
                link = stat.S_ISLNK(member.external_attr >> 16)
                if link or not target.is_relative_to(folder.resolve()):
                    raise CoreUnavailable(f"the eval bundle is refused: {member.filename!r} in it points outside.")
            folder.mkdir()
            zipped.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as e:
        raise CoreUnavailable(f"what was fetched as the eval bundle cannot be unpacked ({e}).") from None


def load_tasks(bundle: Path) -> list[dict]:
    """The tasks of a bundle as dicts: label, type, path (of the questions), num_fewshot, delimiter, baseline (from 0 to 1)."""
    try:
        import yaml
    except ImportError:
        raise CoreUnavailable("the CORE metric needs PyYAML to read its task list: pip install pyyaml.") from None
    try:
        described = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in csv.DictReader(file)}
        tasks = [dict(label=t["label"], type=t["icl_task_type"], path=bundle / "eval_data" / t["dataset_uri"],
                      num_fewshot=int(t["num_fewshot"][0]), delimiter=t.get("continuation_delimiter", " "),
                      baseline=baselines.get(t["label"])) for t in described]
    except OSError as e:
        raise CoreUnavailable(f"the eval bundle {bundle} is damaged: {e.filename}: {e.strerror}.") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as e:
        raise CoreUnavailable(f"the eval bundle {bundle} is damaged: its task list is not as expected ({e!r}).") from e
    for task in tasks:
        if task["baseline"] is None or not 0 <= task["baseline"] < 1:
            raise CoreUnavailable(f"{bundle / 'eval_meta_data.csv'} has no usable random baseline for {task['label']}.")
        if task["type"] not in RENDER:
            raise CoreUnavailable(f"{bundle / 'core.yaml'}: {task['label']} is of the unknown type {task['type']!r}; "
                            f"known: {', '.join(RENDER)}.")
    return tasks


def load_questions(path: Path, max_per_task: int = -1) -> list[dict]:
    """The questions of a task, shuffled with a fixed seed; the first `max_per_task` of them, or all (-1)."""
    try:
        with open(path, encoding="utf-8") as file:
            questions = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as e:
        raise CoreUnavailable(f"the eval bundle is damaged: cannot read {path} ({e}).") from None
    if not questions:
        raise CoreUnavailable(f"the eval bundle is damaged: {path} holds no questions.")
    random.Random(DATA_SEED).shuffle(questions)
    return questions[:max_per_task] if max_per_task > 0 else questions


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: from a question to rows of tokens and the span of each row that is scored

def _solved(examples: list[str]) -> str:
    return "".join(example + "\n\n" for example in examples)


def _multiple_choice(question: dict, fewshot: list[dict], delimiter: str) -> list[str]:
    head = _solved([e["query"] + delimiter + e["choices"][e["gold"]] for e in fewshot])
    return [head + question["query"] + delimiter + choice for choice in question["choices"]]


def _schema(question: dict, fewshot: list[dict], delimiter: str) -> list[str]:
    head = _solved([e["context_options"][e["gold"]] + delimiter + e["continuation"] for e in fewshot])
    return [head + context + delimiter + question["continuation"] for context in question["context_options"]]


def _language_modeling(question: dict, fewshot: list[dict], delimiter: str) -> list[str]:
    """[prompt, prompt + continuation]. The prompt alone is stripped: a space at its end would be a separate token, but belongs to
    the first word of the continuation."""
    head = _solved([e["context"].strip() + delimiter + e["continuation"] for e in fewshot])
    prompt = head + question["context"].strip() + delimiter
    return [prompt.strip(), prompt + question["continuation"]]


RENDER = {"multiple_choice": _multiple_choice, "schema": _schema, "language_modeling": _language_modeling}


def pick_fewshot(questions: list[dict], index: int, n: int) -> list[dict]:
    """`n` solved examples for question `index`: always the same, never the question itself."""
    others = range(len(questions) - 1)  # positions in the list without question `index`
    picked = random.Random(FEWSHOT_SEED + index).sample(others, min(n, len(others)))
    return [questions[i + (i >= index)] for i in picked]


def common_prefix(rows: list[list[int]]) -> int:
    """Number of tokens at the start that all rows share."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


def rows_and_spans(question: dict, fewshot: list[dict], task: dict, tokenizer, max_len: int | None):
    """The rows of a question and their scored spans: [(tokens, start, end), ...].

    A row longer than `max_len` is cropped on the left, where the solved examples are. A span has at least one token and never
    the first of a row, which has no prediction.
    """
    prompts = RENDER[task["type"]](question, fewshot, task["delimiter"])
    rows = tokenizer(prompts, prepend=tokenizer.get_bos_token_id())
    if task["type"] == "multiple_choice":
        starts = [common_prefix(rows)] * len(rows)
    elif task["type"] == "schema":
        shared = common_prefix([row[::-1] for row in rows])
        starts = [len(row) - shared for row in rows]
    else:
        starts = [common_prefix(rows)]  # the first row's length, unless a token spans the boundary
        rows = rows[1:]
    spans = []
    for row, start in zip(rows, starts, strict=True):
        cropped = 0 if max_len is None else max(0, len(row) - max_len)
        row, start = row[cropped:], start - cropped
        spans.append((row, max(1, min(start, len(row) - 1)), len(row)))
    return spans


# ---------------------------------------------------------------------------------------------------------------------
# Scoring

def prepare(questions: list[dict], indices: Iterable[int], task: dict, tokenizer, max_len: int | None):
    """Yield (spans, gold) per question: its rows and spans, and the index of the correct row (None for language_modeling)."""
    for index in indices:
        question = questions[index]
        try:
            fewshot = pick_fewshot(questions, index, task["num_fewshot"])
            spans = rows_and_spans(question, fewshot, task, tokenizer, max_len)
            gold = None if task["type"] == "language_modeling" else question["gold"]
        except (KeyError, TypeError, IndexError) as e:
            raise CoreUnavailable(f"the eval bundle is damaged: {task['path']}: malformed question ({e!r}).") from e
        yield spans, gold


def batched(prepared: Iterable[tuple]) -> Iterator[list[tuple]]:
    """Group consecutive questions into batches of at most FORWARD_TOKENS tokens with padding."""
    batch, rows, longest = [], 0, 0
    for spans, gold in prepared:
        length = max(len(row) for row, _, _ in spans)
        if batch and (rows + len(spans)) * max(longest, length) > FORWARD_TOKENS:
            yield batch
            batch, rows, longest = [], 0, 0
        batch.append((spans, gold))
        rows, longest = rows + len(spans), max(longest, length)
    if batch:
        yield batch


@torch.no_grad()
def count_correct(model, batch: list[tuple], device, pad: int) -> int:
    """Number of correct answers in a batch. Rows are padded on the right, which a causal model does not see."""
    rows = [row for spans, _ in batch for row, _, _ in spans]
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
    row_logits = iter(model(ids.to(device)))  # (T, V) per row
    correct = []
    for spans, gold in batch:
        losses = []  # per row: mean loss of its span; for language_modeling, share of tokens that are not the most likely
        for row, start, end in spans:
            logits = next(row_logits)[start - 1:end - 1]              # (n, V): logits at t predict token t + 1
            targets = torch.tensor(row[start:end], device=device)     # (n,)
            losses.append((logits.argmax(dim=-1) != targets).float().mean() if gold is None
                          else F.cross_entropy(logits, targets))
        losses = torch.stack(losses)
        correct.append(losses[0] == 0 if gold is None else losses.argmin() == gold)
    return int(torch.stack(correct).sum())


def evaluate_task(model, tokenizer, device, task: dict, questions: list[dict]) -> float:
    """Accuracy on one task, the same on every rank. Rank r of n answers the questions r, r + n, ..."""
    rank, world_size = rank_and_world_size()
    mine = range(rank, len(questions), world_size)
    progress = Progress(f"  {task['label']}", total=len(mine), unit=" questions")
    correct = torch.zeros(1, device=device)
    max_len = getattr(model, "max_seq_len", None)
    batches: Iterable[list[tuple]] = batched(prepare(questions, mine, task, tokenizer, max_len))
    if getattr(model, "called_in_step", False):  # ranks divide its weights
        batches = in_step(batches, [], device)
    for batch in batches:
        if not batch:
            model(torch.zeros((1, 2), dtype=torch.long, device=device))  # another rank has one more
            continue
        correct += count_correct(model, batch, device, pad=tokenizer.get_bos_token_id())
        progress.update(len(batch))
    progress.close()
    return all_reduce_sum(correct).item() / len(questions)


def evaluate_core(model, tokenizer, device, max_per_task: int = -1, bundle_dir: str | Path | None = None) -> dict:
    """The CORE metric of `model`: a function from ids (B, T) to logits (B, T, V).

    max_per_task: questions per task; -1 takes all.
    Returns `results` {label: accuracy}, `centered_results` {label: centered accuracy} and `core_metric`, their mean.
    Raises: CoreUnavailable if there is no bundle. Call it within `nanochat.runtime.device.evaluation(model)`.
    """
    tasks = load_tasks(find_bundle(bundle_dir))
    results, centered = {}, {}
    for n, task in enumerate(tasks, 1):
        label, baseline = task["label"], task["baseline"]
        questions = load_questions(task["path"], max_per_task)
        results[label] = evaluate_task(model, tokenizer, device, task, questions)
        centered[label] = (results[label] - baseline) / (1 - baseline)
        print0(f"CORE {n}/{len(tasks)} {label} ({task['num_fewshot']}-shot, {len(questions)} questions): "
               f"accuracy {results[label]:.4f} | centered {centered[label]:.4f}")
    return {"results": results, "centered_results": centered, "core_metric": sum(centered.values()) / len(centered)}
