"""Continue a prompt with a trained model: `python -m scripts.sample -p "The capital of France is"`.

Without `-p` the prompt is read from standard input. A single sample is streamed; several are printed when complete.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

from nanochat.cli.flags import LARGEST_SEED, flag, parse
from nanochat.cli.program import cli
from nanochat.training.config import DeviceFlags


@dataclass
class ModelFlags(DeviceFlags):
    """The model"""
    model_tag: str | None = flag(None, "name of the run (folder in base_checkpoints); by default the last trained")
    step: int | None = flag(None, "step of the checkpoint; by default the last", low=0)

    def load(self):
        """(model in eval mode on the device, tokenizer, state of the checkpoint, ranks). Raises: UserError if there is none."""
        from nanochat.checkpoint_manager import load_model
        from nanochat.engine import prepare_for_inference
        from nanochat.runtime.device import init_device
        with redirect_stdout(sys.stderr):  # what devices and kernels have to say is no part of a text
            device, ranks = init_device(self.device_type)
            model, tokenizer, state = load_model("base", device, "eval", self.model_tag, self.step, dtype=self.dtype)
            prepare_for_inference(model, state.get("numerics_environment", {}).get("attention"))
        return model, tokenizer, state, ranks


@dataclass
class SamplingFlags:
    """Sampling"""
    max_tokens: int = flag(128, "most tokens to generate", low=1)
    temperature: float = flag(0.8, "0 is greedy: always the most likely token; 1 samples from the model's distribution", low=0)
    top_k: int = flag(50, "sample from this many of the most likely tokens; 0 is all", low=0)
    seed: int = flag(42, "random seed: the same seed gives the same text", low=0, high=LARGEST_SEED)

    def kwargs(self) -> dict:
        return dict(max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, seed=self.seed)


@dataclass
class PromptFlags:
    """The prompt"""
    prompt: list[str] = flag([], "text to continue, one or several; by default standard input",
                             aliases=("-p",), metavar="TEXT")
    num_samples: int = flag(1, "continuations per prompt", low=1, high=4096)


def main(argv: list[str] | None = None) -> None:
    model_flags, sampling, output = parse([ModelFlags, SamplingFlags, PromptFlags], argv,
                                          prog="python -m scripts.sample", description="Continue a prompt with a trained model.")
    prompts = output.prompt
    if not prompts:
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D.", file=sys.stderr)
        prompts = [sys.stdin.read().removesuffix("\n")]
    model, tokenizer, state, _ = model_flags.load()
    print(f"{state['model_tag']}, step {state['step']}", file=sys.stderr)

    from nanochat.engine import Engine
    engine = Engine(model, tokenizer)
    for prompt in prompts:
        tokens = tokenizer(prompt, prepend=tokenizer.get_bos_token_id())
        if output.num_samples == 1:
            print(prompt, end="", flush=True)
            for text in engine.stream_text(tokens, **sampling.kwargs()):
                print(text, end="", flush=True)
            print(flush=True)
            continue
        sequences, _ = engine.generate_batch(tokens, output.num_samples, **sampling.kwargs())
        for n, sequence in enumerate(sequences, 1):
            continuation = tokenizer.decode(sequence[len(tokens):])
            print(f"--- sample {n} of {output.num_samples}\n{prompt}{continuation}", flush=True)


if __name__ == "__main__":
    cli(main, for_its_output=True)
