"""Talk to a model in the terminal: `python -m scripts.chat_cli`. Ctrl-D or `quit` ends, `clear` starts a new conversation.

In *chat* mode the conversation is rendered with the special tokens that mark the turns, and kept as context; it makes sense for
models tuned on conversations. In *completion* mode the model continues what you type, which is what a base model can do, and
the default for one.
"""

import sys
from dataclasses import dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import UserError
from scripts.sample import ModelFlags, SamplingFlags


@dataclass
class ChatFlags:
    """The conversation"""
    prompt: str | None = flag(None, "answer this prompt and exit", aliases=("-p",), metavar="TEXT")
    complete: bool = flag(False, "completion mode: continue the text, without chat tokens; the default for a base model")
    chat: bool = flag(False, "chat mode also for a base model, which was not trained on conversations")

    def validate(self):
        return ["--complete and --chat exclude each other: give one of them"] if self.complete and self.chat else []


class Conversation:
    """The token ids of the conversation so far."""

    def __init__(self, tokenizer, chat: bool):
        self.tokenizer, self.chat = tokenizer, chat
        self.clear()

    def clear(self) -> None:
        self.ids = [self.tokenizer.get_bos_token_id()]

    def ask(self, text: str) -> list[int]:
        """The ids of the prompt for the model's next turn. In completion mode earlier turns are not part of it."""
        if not self.chat:
            self.clear()
            return self.ids + self.tokenizer(text)
        names = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>")
        start, end, answer_start = map(self.tokenizer.encode_special, names)
        return self.ids + [start, *self.tokenizer(text), end, answer_start]

    def answered(self, asked: list[int], answer: str) -> None:
        """Add the turn to the context of the next."""
        if self.chat:
            self.ids = asked + self.tokenizer(answer, append="<|assistant_end|>")


def answer(engine, conversation: Conversation, text: str, sampling: dict) -> None:
    """Stream the answer to `text` to standard output. Ctrl-C stops it."""
    asked, pieces = conversation.ask(text), []
    try:
        for piece in engine.stream_text(asked, **sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    conversation.answered(asked, "".join(pieces))


def main(argv: list[str] | None = None) -> None:
    model_flags, sampling, flags = parse([ModelFlags, SamplingFlags, ChatFlags], argv,
                                         prog="python -m scripts.chat_cli", description="Talk to a trained model.")
    model, tokenizer, state, _ = model_flags.load()
    from nanochat.engine import Engine
    engine, conversation = Engine(model, tokenizer), Conversation(tokenizer, chat=flags.chat)
    print(f"{state['model_tag']}, step {state['step']}", file=sys.stderr)
    if flags.chat:
        print("This is a base model, not tuned on conversations: do not expect sensible answers.", file=sys.stderr)
    elif not flags.complete:
        print("This is a base model without chat tuning: it continues what you type (as with --complete). "
              "--chat uses chat mode anyway.", file=sys.stderr)
    if flags.prompt is not None:
        answer(engine, conversation, flags.prompt, sampling.kwargs())
        return
    print("Ctrl-D or 'quit' ends, 'clear' starts a new conversation, Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            text = input("\n> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip().lower() in ("quit", "exit"):
            return
        if text.strip().lower() == "clear":
            conversation.clear()
        elif text.strip():
            try:
                answer(engine, conversation, text, sampling.kwargs())
            except UserError as e:  # too long for the model: only this turn is lost
                print(f"error: {e} Or type 'clear'.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        import readline  # noqa: F401  (line editing and history at the prompt, if Python has it)
    except ImportError:
        pass
    cli(main, for_its_output=True)
