"""Models for other programs, and from them: `python -m scripts.export`.

    python -m scripts.export --to hf --out DIR --model-tag NAME             a folder for Hugging Face's transformers
    python -m scripts.export --to safetensors --out FILE --model-tag NAME   one file of weights, with shape and tokenizer
    python -m scripts.export --to checkpoint --out DIR --model-tag NAME     a checkpoint of several ranks in the files of one
    python -m scripts.export --from nanochat PATH --model-tag NAME          a checkpoint of the public nanochat becomes a run
    python -m scripts.export --from safetensors FILE --model-tag NAME       such a file becomes a run again
"""

import re
from dataclasses import dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import output_problem, runs_dir
from nanochat.cli.program import cli
from nanochat.common import UserError, resolve

SOURCES = ("nanochat", "safetensors")
NO_GGUF = ("--to gguf: GGUF files name an architecture that llama.cpp knows, and it knows none with value embeddings, smear, "
           "backout and a soft cap of the logits, so nothing could run the file. Use --to hf")


@dataclass
class ExportFlags:
    """What to export, or to import"""
    to: str | None = flag(None, "hf: a folder for transformers; safetensors: one file of weights; checkpoint: a training "
                          "checkpoint whose optimizer state is one file, however many ranks saved it",
                          metavar="{hf,safetensors,checkpoint}", choices=("hf", "safetensors", "checkpoint", "gguf"))
    out: str | None = flag(None, "the folder (hf, checkpoint) or file (safetensors) to write", metavar="PATH")
    dtype: str = flag("float32", "of the weights: float32 computes what we compute, bfloat16 takes half the space",
                      choices=("float32", "bfloat16"))
    overwrite: bool = flag(False, "replace a file, or the files of an earlier export in a folder")
    import_from: list[str] = flag([], "make a run of a model: `nanochat PATH` (a checkpoint folder of the public nanochat) or "
                                  "`safetensors FILE`", metavar="KIND PATH", aliases=("--from",))
    tokenizer: str | None = flag(None, "tokenizer of the model to import, ours or the public nanochat's tokenizer.pkl, a file or "
                                 "its folder; by default the one near it", metavar="PATH")
    model_tag: str | None = flag(None, "name of the run; by default, to export, the one trained last", metavar="NAME")
    step: int | None = flag(None, "step of the checkpoint; by default the last", low=0)

    def validate(self) -> list[str]:
        problems = []
        if bool(self.to) == bool(self.import_from):
            problems.append("give --to FORMAT to export a model, or --from KIND PATH to import one")
        if self.to == "gguf":
            return [NO_GGUF]
        if self.dtype != "float32" and self.to != "hf":
            problems.append("--dtype would do nothing without --to hf: take it back")
        if self.overwrite and self.to == "checkpoint":
            problems.append("--overwrite would do nothing with --to checkpoint, which goes into a new folder: take it back")
        if self.overwrite and not self.to:
            problems.append("--overwrite would do nothing without --to: an import never replaces a run")
        if self.to and not self.out:
            problems.append("--to needs --out PATH, where to write")
        if self.to and self.tokenizer:
            problems.append("--tokenizer is for --from: an exported model takes its run's own")
        if self.to == "safetensors" and self.out:
            problems += self._file_problems(self.out)
        if self.import_from:
            problems += self._import_problems()
        return problems

    def _file_problems(self, out: str) -> list[str]:
        if problem := output_problem(out):
            return [f"--out {problem}"]
        return [f"--out {out} is there already: choose another name, or add --overwrite"] \
            if resolve(out).exists() and not self.overwrite else []

    def _import_problems(self) -> list[str]:
        problems = []
        if len(self.import_from) != 2 or self.import_from[0] not in SOURCES:
            problems.append(f"--from takes a kind ({' or '.join(SOURCES)}) and a path, got {' '.join(self.import_from)!r}")
        elif self.import_from[0] == "safetensors" and (self.step is not None or self.tokenizer):
            problems.append("--step and --tokenizer are for --from nanochat: a safetensors file has one model and its tokenizer")
        if not self.model_tag or not re.fullmatch(r"[\w.+-]*[\w+-]", self.model_tag):
            problems.append("--from needs --model-tag NAME, of letters, digits, '.', '_', '+' and '-', for the run that it makes")
        if self.out:
            problems.append("--out is for --to: an imported model becomes a run, named by --model-tag")
        return problems


def export_model(flags: ExportFlags) -> None:
    from nanochat.export.hf import folder_problem, write_folder
    from nanochat.export.single_file import write_file
    from nanochat.export.trained import read_run
    out = resolve(flags.out)
    if flags.to == "hf" and (problem := folder_problem(out, flags.overwrite)):
        raise UserError(f"--out {problem}.")
    if flags.to == "checkpoint" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already: name a new folder.")
    trained = read_run(flags.model_tag, flags.step)
    if flags.to == "hf":
        write_folder(trained, out, flags.dtype, flags.overwrite)
    elif flags.to == "checkpoint":
        from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
        save_checkpoint(out, trained.step, *load_checkpoint(runs_dir() / trained.name, trained.step))
    else:
        write_file(trained, out)
    print(f"wrote {out}: {trained.name}, step {trained.step}, {trained.num_params:,} parameters")


def import_model(flags: ExportFlags) -> None:
    from nanochat.export.trained import resume_command, write_run
    kind, path = flags.import_from[0], resolve(flags.import_from[1])
    if kind == "nanochat":
        from nanochat.export.public_nanochat import read_public
        trained = read_public(path, flags.step, resolve(flags.tokenizer) if flags.tokenizer else None)
    else:
        from nanochat.export.single_file import read_file
        trained = read_file(path)
    folder = write_run(trained, flags.model_tag)
    print(f"wrote {folder}: {trained.num_params:,} parameters, " + ("with" if trained.moments else "without")
          + " the optimizer's moments")
    print(f"to use it:    python -m scripts.sample --model-tag={flags.model_tag}\n"
          f"to train it:  {resume_command(trained, flags.model_tag)}")


def main(argv: list[str] | None = None) -> None:
    flags, = parse([ExportFlags], argv, prog="python -m scripts.export", description="Models for other programs, and from them.")
    export_model(flags) if flags.to else import_model(flags)


if __name__ == "__main__":
    cli(main)
