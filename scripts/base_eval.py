"""Evaluate a base model: `python -m scripts.base_eval`. Up to three evaluations:

- bpb: bits per byte on training and validation tokens of the run (or of `--data`);
- core: the CORE metric, if its eval bundle is there or can be downloaded;
- sample: a few sampled texts.

Prints a table and writes `eval_NNNNNN.json` into the folder of the run, beside `result.json`.
"""

import json
import time
from dataclasses import dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import located, runs_dir, writable_base_dir
from nanochat.cli.program import cli
from nanochat.common import Progress, UserError, format_duration, format_table, is_main_rank, print0
from nanochat.data.sources import SourceFlags
from nanochat.runtime.files import write_atomic
from scripts.sample import ModelFlags

KINDS = ("core", "bpb", "sample")


@dataclass
class EvalFlags(SourceFlags):
    """Evaluation"""
    data: str | None = flag(None, "text for bpb, instead of the run's tokens: python, a path, glob or folder, or hf:NAME[:...]",
                            metavar="SOURCE")
    eval: str = flag("core,bpb,sample", "comma-separated evaluations: core, bpb, sample", metavar="KINDS")
    max_per_task: int = flag(-1, "questions per CORE task; -1 is all")
    device_batch_size: int | None = flag(None, "sequences per forward pass for bpb; by default that of the run", low=1)
    split_tokens: int = flag(-1, "tokens per split for bpb, or all if there are fewer; -1 is --eval-tokens of the run")

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in self.eval.split(",") if kind]

    def validate(self):
        problems = [] if self.data is None else super().validate()
        problems += [f"--eval knows {', '.join(KINDS)}, not {kind!r}" for kind in self.kinds if kind not in KINDS]
        problems += [f"--{name} must be positive, or -1, got {value}"
                     for name, value in (("max-per-task", self.max_per_task), ("split-tokens", self.split_tokens))
                     if value != -1 and value <= 0]
        return problems + ([] if self.kinds else [f"--eval names nothing to do: give any of {', '.join(KINDS)}"])


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
    config, device = state["user_config"], model.get_device()
    num_tokens = config["eval_tokens"] if flags.split_tokens == -1 else flags.split_tokens
    in_training = state.get("numerics_environment", {}).get("rows per micro-batch", config["device_batch_size"])
    rows = flags.device_batch_size or in_training
    result = {"data": flags.data or state["tokens"], "split_tokens": num_tokens}
    for name in ("train", "val"):
        split = tokens.split(name)
        progress = Progress(f"bpb of {name}", total=min(num_tokens, split.num_tokens) // ranks.world_size, unit=" tokens")
        batches = val_batches(split, model.config.sequence_len, rows, num_tokens, ranks.rank, ranks.world_size, device)
        result[name] = evaluate_bpb(model, counted(batches, progress), None, get_token_bytes(device, tokenizer))
        progress.close()
    return result


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
    """Run the selected evaluations. Returns {"bpb": ..., "core": ..., "samples": ...}, without CORE if it is unavailable."""
    from nanochat.core_eval import CoreUnavailable, evaluate_core
    record = {}
    if "bpb" in flags.kinds:
        record["bpb"] = evaluate_splits(flags, model, tokenizer, state, ranks)
    if "core" in flags.kinds:
        try:
            record["core"] = evaluate_core(model, tokenizer, model.get_device(), flags.max_per_task)
            record["core"]["max_per_task"] = flags.max_per_task
        except CoreUnavailable as e:
            if flags.kinds == ["core"]:
                raise
            print0(f"no CORE metric: {e}")
    if "sample" in flags.kinds and is_main_rank():
        record["samples"] = draw_samples(model, tokenizer, state)
    return record


def table(record: dict) -> str:
    """The results as a table, one metric per line."""
    rows = [{"metric": f"bits per byte, {name}", "value": record["bpb"][name]} for name in ("train", "val")
            if "bpb" in record]
    if "core" in record:
        core = record["core"]
        rows += [{"metric": label, "value": accuracy, "centered": core["centered_results"][label]}
                 for label, accuracy in core["results"].items()]
        rows.append({"metric": "CORE", "centered": core["core_metric"]})
    columns = ["metric", "value", "centered"] if "core" in record else ["metric", "value"]
    return format_table(rows, columns) if rows else ""


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
    from nanochat.runtime.device import device_name, dtype_name, evaluation
    from nanochat.runtime.distributed import leave_process_group
    started = time.monotonic()
    model, tokenizer, state, ranks = model_flags.load()
    tag, step = state["model_tag"], state["step"]
    where = {"device": device_name(model.get_device()), "dtype": dtype_name(model.compute_dtype)}
    print0(f"{tag}, step {step} | {where['device']} | {where['dtype']}")
    with evaluation(model):
        record = run_evaluations(flags, model, tokenizer, state, ranks)
    if is_main_rank():
        print(table(record))
        sections = {name: value | where if isinstance(value, dict) else value for name, value in record.items()}
        save({"model_tag": tag, "step": step, **sections}, runs_dir() / tag / f"eval_{step:06d}.json")
        print(f"took {format_duration(time.monotonic() - started)}")
    leave_process_group()


if __name__ == "__main__":
    cli(main, parallel=True)
