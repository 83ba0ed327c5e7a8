"""Evaluate a base model: `python -m scripts.base_eval`. Up to three evaluations:

- bpb: bits per byte on training and validation tokens of the run (or of `--data`);
- core: the CORE metric, if its eval bundle is there (`--core-bundle`) or can be downloaded;
- sample: a few sampled texts.

    python -m scripts.base_eval --text FILE ...     only bits per byte, of these texts as they are: files, folders, any source

Prints a table and writes `eval_NNNNNN.json` into the folder of the run, beside `result.json`.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import located, runs_dir, writable_base_dir
from nanochat.cli.program import cli
from nanochat.common import Progress, UserError, format_duration, format_table, is_main_rank, print0
from nanochat.data.sources import SourceFlags, iter_documents, source_identity
from nanochat.runtime.files import write_atomic
from scripts.sample import ModelFlags

KINDS = ("core", "bpb", "sample")
NO_TOKENS = "the model was imported without its text. Give one with --data or --text."
SORTED_BATCHES = 16  # batches of text whose rows are sorted by length, so that little of them is padding


@dataclass
class EvalFlags(SourceFlags):
    """Evaluation"""
    data: str | None = flag(None, "text for bpb, instead of the run's tokens: python, a path, glob or folder, or hf:NAME[:...]",
                            metavar="SOURCE")
    text: list[str] = flag([], "bits per byte of these texts, each by itself and all of it: sources as for --data",
                           metavar="SOURCE")
    eval: str | None = flag(None, "comma-separated evaluations: core, bpb, sample; by default all three, beside --text none",
                            metavar="KINDS")
    core_bundle: str | None = flag(None, "folder of the CORE metric's eval bundle; by default eval_bundle in the base directory, "
                                   "downloaded if it is missing", metavar="DIR")
    max_per_task: int = flag(-1, "questions per CORE task; -1 is all")
    device_batch_size: int | None = flag(None, "sequences per forward pass for bpb; by default that of the run", low=1)
    split_tokens: int = flag(-1, "tokens per split for bpb, or all if there are fewer; -1 is --eval-tokens of the run")

    @property
    def kinds(self) -> list[str]:
        chosen = self.eval if self.eval is not None else "" if self.text else ",".join(KINDS)
        return [kind for kind in chosen.split(",") if kind]

    def validate(self):
        problems = SourceFlags("python" if self.data is None else self.data, max_chars=self.max_chars).validate()
        problems += ["--text must name a source of text"] if "" in map(str.strip, self.text) else []
        problems += [f"--eval knows {', '.join(KINDS)}, not {kind!r}" for kind in self.kinds if kind not in KINDS]
        problems += [f"--{name} must be positive, or -1, got {value}"
                     for name, value in (("max-per-task", self.max_per_task), ("split-tokens", self.split_tokens))
                     if value != -1 and value <= 0]
        if self.core_bundle and "core" not in self.kinds:
            problems.append("--core-bundle would do nothing without core in --eval: add it, or leave out --core-bundle")
        return problems + ([] if self.kinds or self.text else [f"--eval names nothing to do: give any of {', '.join(KINDS)}"])


def evaluate_splits(flags: EvalFlags, model, tokenizer, state: dict, ranks) -> dict:
    """Bits per byte of both splits, {"train": ..., "val": ...}, on the run's token dataset or that of `--data`."""
    from nanochat.dataloader import val_batches
    from nanochat.dataset import TokenDataset, prepare_tokens
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.runtime.distributed import on_main_rank_first
    from nanochat.tokenizer import get_token_bytes
    tokens = on_main_rank_first(lambda: TokenDataset.open(
        prepare_tokens(flags.data, tokenizer, **flags.reading()) if flags.data else located(state["tokens"])))
    if tokens.tokenizer_fingerprint != tokenizer.fingerprint():
        raise UserError(f"the tokens in {state['tokens']} were made with another tokenizer than the model's. "
                        "Give the text with --data to tokenize it again.")
    device = model.get_device()
    num_tokens = state["user_config"]["eval_tokens"] if flags.split_tokens == -1 else flags.split_tokens
    rows = batch_rows(flags, state)
    result = {"data": flags.data or state["tokens"], "split_tokens": num_tokens}
    for name in ("train", "val"):
        split = tokens.split(name)
        progress = Progress(f"bpb of {name}", total=min(num_tokens, split.num_tokens) // ranks.world_size, unit=" tokens")
        batches = val_batches(split, model.config.sequence_len, rows, num_tokens, ranks.rank, ranks.world_size, device)
        result[name] = evaluate_bpb(model, counted(batches, progress), None, get_token_bytes(device, tokenizer))
        progress.close()
    return result


def batch_rows(flags: EvalFlags, state: dict) -> int:
    """Rows of a forward pass: those of the run's training, unless --device-batch-size says another number."""
    in_training = state.get("numerics_environment", {}).get("rows per micro-batch", state["user_config"]["device_batch_size"])
    return flags.device_batch_size or in_training


def evaluate_texts(flags: EvalFlags, model, tokenizer, state: dict, ranks) -> list[dict]:
    """Bits per byte of each source of --text: {"text", "documents", "bytes", "tokens", "bpb"}.

    All of a text is evaluated, each document by itself. (`evaluate_splits` reads rows as training packs them, with several
    documents in one.)
    """
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.tokenizer import get_token_bytes
    results, device = [], model.get_device()
    for source in flags.text:
        result = {"text": source, "documents": 0, "bytes": 0, "tokens": 0}
        progress = Progress(f"bpb of {source}", unit=" tokens")
        rows = text_rows(text_documents(source, flags), tokenizer, model.config.sequence_len, result)
        batches = text_batches(islice(rows, ranks.rank, None, ranks.world_size), batch_rows(flags, state), device)
        result["bpb"] = evaluate_bpb(model, counted(batches, progress), None, get_token_bytes(device, tokenizer))
        progress.close()
        results.append(result)
    return results


@contextmanager
def naming_text():
    """Errors about a source name the flag that was typed: --text."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace("--data", "--text")) from None


def text_documents(source: str, flags: EvalFlags) -> Iterator[str]:
    """The documents of a source of --text."""
    with naming_text():
        yield from iter_documents(source, **flags.reading())


def text_rows(documents: Iterable[str], tokenizer, row_len: int, counts: dict) -> Iterator[list[int]]:
    """Rows of BOS and up to `row_len` tokens of a document, so that every token is predicted once, in the context of its row."""
    for text in documents:
        ids = tokenizer(text)
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(ids)
        for start in range(0, len(ids), row_len):
            yield [tokenizer.get_bos_token_id(), *ids[start:start + row_len]]


def text_batches(rows: Iterator[list[int]], batch_size: int, device) -> Iterator[tuple]:
    """(inputs, targets) of rows of different lengths: int64 (B, T) on the device, padded on the right, where targets are -1."""
    import torch
    while group := sorted(islice(rows, SORTED_BATCHES * batch_size), key=len):
        for part in (group[i:i + batch_size] for i in range(0, len(group), batch_size)):
            ids = torch.full((len(part), len(part[-1])), -1)
            for i, row in enumerate(part):
                ids[i, :len(row)] = torch.tensor(row)
            yield ids[:, :-1].clamp(min=0).to(device), ids[:, 1:].contiguous().to(device)


def counted(batches, progress: Progress):
    """Pass on the batches and update the progress bar."""
    for x, y in batches:
        yield x, y
        progress.update(x.numel())


def draw_samples(model, tokenizer, state: dict) -> list[str]:
    """Generate and print greedy continuations of a few prompts and two unconditional samples."""
    from nanochat.engine import SAMPLE_TOKENS, Engine, sample_prompts
    engine, texts = Engine(model, tokenizer), []
    prompts = sample_prompts(state["user_config"].get("data", ""))
    for prompt, temperature, seed in [*((p, 0.0, 0) for p in prompts), ("", 1.0, 1), ("", 1.0, 2)]:
        texts.append(engine.complete(prompt, max_tokens=SAMPLE_TOKENS, temperature=temperature, seed=seed))
        print(f"--- {'greedy' if temperature == 0 else 'unconditional'}\n{texts[-1]}", flush=True)
    return texts


def run_evaluations(flags: EvalFlags, model, tokenizer, state: dict, ranks) -> dict:
    """Run the selected evaluations. Returns {"text": ..., "bpb": ..., "core": ..., "samples": ...}, those that were possible."""
    from nanochat.core_eval import CoreUnavailable, evaluate_core
    record = {}
    if flags.text:
        record["text"] = {"sources": evaluate_texts(flags, model, tokenizer, state, ranks)}
    if "bpb" in flags.kinds:
        if flags.data or state["tokens"]:
            record["bpb"] = evaluate_splits(flags, model, tokenizer, state, ranks)
        elif flags.kinds == ["bpb"]:
            raise UserError(NO_TOKENS)
        else:
            print0(f"no bits per byte: {NO_TOKENS}")
    if "core" in flags.kinds:
        try:
            record["core"] = evaluate_core(model, tokenizer, model.get_device(), flags.max_per_task, flags.core_bundle)
            record["core"]["max_per_task"] = flags.max_per_task
        except CoreUnavailable as e:
            if flags.kinds == ["core"]:
                raise
            print0(f"no CORE metric: {e}")
    if "sample" in flags.kinds and is_main_rank():
        record["samples"] = draw_samples(model, tokenizer, state)
    return record


def tables(record: dict) -> str:
    """The results: a table of the texts, and one with a metric per line."""
    texts = ""
    if "text" in record:
        texts = format_table([{"bits per byte" if name == "bpb" else name: value for name, value in source.items()}
                              for source in record["text"]["sources"]])
    rows = [{"metric": f"bits per byte, {name}", "value": record["bpb"][name]} for name in ("train", "val")
            if "bpb" in record]
    if "core" in record:
        core = record["core"]
        rows += [{"metric": label, "value": accuracy, "centered": core["centered_results"][label]}
                 for label, accuracy in core["results"].items()]
        rows.append({"metric": "CORE", "centered": core["core_metric"]})
    columns = ["metric", "value", "centered"] if "core" in record else ["metric", "value"]
    return "\n\n".join(filter(None, [texts, format_table(rows, columns) if rows else ""]))


def save(record: dict, path) -> None:
    """Write the results, and keep those of earlier evaluations of this step that were not repeated."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        earlier = {}
    write_atomic(path, json.dumps(earlier | record, indent=1))
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    flags, model_flags = parse([EvalFlags, ModelFlags], argv, prog="python -m scripts.base_eval",
                               description="Evaluate a base model.")
    writable_base_dir()
    with naming_text():
        for source in flags.text:
            source_identity(source)  # before the model is loaded: a file that is not there is an error
    from nanochat.runtime.compute_dtype import dtype_name
    from nanochat.runtime.device import device_name, evaluation
    from nanochat.runtime.distributed import leave_process_group
    started = time.monotonic()
    model, tokenizer, state, ranks = model_flags.load()
    tag, step = state["model_tag"], state["step"]
    where = {"device": device_name(model.get_device()), "dtype": dtype_name(model.compute_dtype)}
    print0(f"{tag}, step {step} | {where['device']} | {where['dtype']}")
    with evaluation(model):
        record = run_evaluations(flags, model, tokenizer, state, ranks)
    if is_main_rank():
        print(tables(record))
        sections = {name: value | where if isinstance(value, dict) else value for name, value in record.items()}
        save({"model_tag": tag, "step": step, **sections}, runs_dir() / tag / f"eval_{step:06d}.json")
        print(f"took {format_duration(time.monotonic() - started)}")
    leave_process_group()


if __name__ == "__main__":
    cli(main, parallel=True)
