"""Generation for several readers at once, who take turns: one model in memory, one text at a time, token by token with the
probabilities that the model gave. `scripts/serve.py` shows it as a page.

    generator = Generator(load)
    with closing(generator.events(Request("The planets are", sampling={"max_tokens": 32}))) as events:
        for event in events: ...       # {"waiting": 2}, {"token": {...}}, and at the end {"done": {...}}
"""

import codecs
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nanochat.cli.paths import list_steps, runs_dir, step_dir
from nanochat.common import UserError

ALTERNATIVES = 8    # likeliest tokens that are told beside each token
LONGEST_QUEUE = 16  # requests, the one that is answered included


class Busy(UserError):
    """Too many requests wait already."""


@dataclass
class Request:
    """What to generate. Without a run it is the model in memory; without a step the run's last one. sampling: for `Engine`."""
    prompt: str = ""
    tag: str | None = None
    step: int | None = None
    sampling: dict = field(default_factory=dict)


class Generator:
    """The model in memory, and the queue of those who wait for it.

    load: (tag, step), None for the default -> (model, tokenizer, state of the checkpoint); UserError where there is none.
    tag, step: which checkpoint is in memory.
    """

    seconds_between_reports = 1.0  # to who waits

    def __init__(self, load: Callable[[str | None, int | None], tuple], tag: str | None = None, step: int | None = None):
        self.load = load
        self.queue: deque[object] = deque()
        self.moved = threading.Condition()  # the queue has
        self.logits = None                  # (1, V), of the token that is sampled next
        self._load(tag, step)

    def _load(self, tag: str | None, step: int | None) -> None:
        from nanochat.engine import Engine
        self.engine = self.logits = None  # or two models would be in memory
        model, tokenizer, state = self.load(tag, step)
        model.register_forward_hook(self._keep_logits)
        self.engine, self.tag, self.step = Engine(model, tokenizer), state["model_tag"], state["step"]
        self.loaded = self._identity(self.tag, self.step)

    def _choose(self, tag: str | None, step: int | None) -> None:
        """Have the checkpoint of a request in memory."""
        if tag is None and self.engine is not None:
            return
        tag = tag or self.tag
        step = max(list_steps(runs_dir() / tag), default=None) if step is None else step
        if self.engine is None or step is None or self._identity(tag, step) != self.loaded:
            self._load(tag, step)

    def _identity(self, tag: str, step: int) -> tuple:
        """What tells a checkpoint from one that another run leaves under the same name."""
        path = step_dir(runs_dir() / tag, step)
        return tag, step, path.stat().st_mtime_ns if path.exists() else None

    def _keep_logits(self, model, inputs, logits) -> None:
        self.logits = logits[:, -1]

    def events(self, request: Request) -> Iterator[dict]:
        """What happens with a request. To be closed, also before its end: the next in the queue waits for that.

        {"waiting": n}   n requests are before this one; each second
        {"token": {"text", "name", "p", "likeliest": [[name, p], ...]}}   p: the model's own, before temperature and top-k
        {"done": {"tag", "step", "tokens", "seconds", "ended": why, "text": what was left of an unfinished character}}

        Raises: UserError for a model that cannot be loaded, or a prompt that is too long for it. Busy.
        """
        ticket = object()
        with self.moved:
            if len(self.queue) >= LONGEST_QUEUE:
                raise Busy(f"{len(self.queue)} requests are waiting already: try again later")
            self.queue.append(ticket)
        try:
            while waiting := self._before(ticket):
                yield {"waiting": waiting}  # who sends it on notices, too, when the reader has gone
            yield from self._generate(request)
        finally:
            with self.moved:
                self.queue.remove(ticket)
                self.moved.notify_all()

    def _before(self, ticket) -> int:
        """How many are before this one in the queue. Waits a little for there to be none."""
        with self.moved:
            self.moved.wait_for(lambda: self.queue[0] is ticket, timeout=self.seconds_between_reports)
            return self.queue.index(ticket)

    def _generate(self, request: Request) -> Iterator[dict]:
        self._choose(request.tag, request.step)
        engine, began, token, count = self.engine, time.monotonic(), None, 0
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens = engine.tokenizer(request.prompt, prepend=engine.tokenizer.get_bos_token_id())
        for (token,), _ in engine.generate(tokens, **request.sampling):
            count += 1
            yield {"token": self._describe(token, decoder)}
        ended = ("the model ended the text" if token in engine.end_tokens else
                 "max tokens" if count == request.sampling.get("max_tokens") else "the model's context is full")
        yield {"done": {"tag": self.tag, "step": self.step, "tokens": count, "seconds": time.monotonic() - began, "ended": ended,
                        "text": decoder.decode(b"", final=True)}}

    def _describe(self, token: int, decoder) -> dict:
        """A sampled token. It may end inside a character: its text waits until that is complete."""
        p = self.logits[0].float().softmax(dim=-1)
        values, ids = p.topk(min(ALTERNATIVES, len(p)))
        piece = self.engine.tokenizer.decode_single_token_bytes
        text = "" if token in self.engine.end_tokens else decoder.decode(piece(token))
        return {"text": text, "name": _name(piece(token)), "p": p[token].item(),
                "likeliest": [[_name(piece(id)), value] for id, value in zip(ids.tolist(), values.tolist(), strict=True)]}


def _name(token: bytes) -> str:
    """A token as text; bytes that are no whole character as \\xe2."""
    return token.decode("utf-8", errors="backslashreplace")
