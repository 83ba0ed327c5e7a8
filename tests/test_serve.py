"""The page for trained models: what it sends, who may ask, whose turn it is, and what is refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest, urlopen

import pytest
import torch

from nanochat.checkpoint_manager import load_model, save_checkpoint
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.serving import LONGEST_QUEUE, Busy, Generator, Request
from nanochat.tokenizer import Tokenizer
from scripts.sample import SamplingFlags
from scripts.serve import LARGEST_BODY, PAGE, ServeFlags, Server
from test_engine import TEXT, make_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base directory with a run `tiny` of two steps with different weights, and a damaged run."""
    base = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train_from_iterator([TEXT], 320)
    model = make_model(tokenizer.get_vocab_size())
    for tag, steps in (("broken", [5]), ("tiny", [10, 20])):
        run = base / "base_checkpoints" / tag
        tokenizer.save(run / "tokenizer")
        for step in steps:
            with torch.no_grad():
                model.lm_head.weight.mul_(-1)
            save_checkpoint(run, step, model.state_dict(), {}, dict(model_config=vars(model.config),
                                                                    tokenizer=tokenizer.fingerprint()))
    (base / "base_checkpoints" / "broken" / "step_000005" / "model.safetensors").write_bytes(b"")
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ["NANOCHAT_BASE_DIR"], str(base)
    yield base
    os.environ["NANOCHAT_BASE_DIR"] = before


def load(tag, step):
    return load_model("base", torch.device("cpu"), "eval", tag, step, dtype="float32")


@pytest.fixture(scope="module")
def server(runs):
    with Server(ServeFlags(port=0), SamplingFlags(max_tokens=5, temperature=0.0)) as server:
        server.generator = Generator(load, "tiny")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def ask(server, request, **headers) -> list[dict]:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    with urlopen(HttpRequest(server.url + "generate", body, headers), timeout=60) as answer:
        return [json.loads(line) for line in answer]


def refusal(server, request=None, path="", **headers) -> tuple[int, str]:
    """Status and message of a request that is refused."""
    with pytest.raises(HTTPError) as e:
        if path or request is None:
            urlopen(HttpRequest(server.url + path, headers=headers), timeout=60)
        else:
            ask(server, request, **headers)
    message = e.value.read().decode()
    assert message.count("\n") == 1 and message.endswith("\n") and "Traceback" not in message
    return e.value.code, message


def text_of(events) -> str:
    return "".join(event["token"]["text"] for event in events[:-1]) + events[-1]["done"]["text"]


# What is generated

@pytest.mark.parametrize("sampling", [dict(temperature=0, max_tokens=12), dict(temperature=1.3, top_k=7, seed=5, max_tokens=30)])
def test_the_text_is_that_of_the_sampler(server, sampling):
    prompt = "größer – 数"
    model, tokenizer, _ = load("tiny", 20)
    tokens = tokenizer(prompt, prepend="<|bos|>")
    events = ask(server, {"prompt": prompt, "model_tag": "tiny"} | sampling)
    assert text_of(events) == "".join(Engine(model, tokenizer).stream_text(tokens, **sampling))
    done = events[-1]["done"]
    assert (done["tag"], done["step"], done["tokens"]) == ("tiny", 20, len(events) - 1)


@torch.no_grad()
def test_probabilities_are_the_models_own(server):
    events = ask(server, {"prompt": "def add", "temperature": 2.0, "top_k": 3, "max_tokens": 6, "model_tag": "tiny"})
    model, tokenizer, _ = load("tiny", 20)
    (sequence,), _ = Engine(model, tokenizer).generate_batch(tokenizer("def add", prepend="<|bos|>"), temperature=2.0, top_k=3,
                                                             max_tokens=6)
    logits = model(torch.tensor([sequence]))[0]
    tokens = [event["token"] for event in events[:-1]]
    first = len(sequence) - len(tokens)
    for i, token in enumerate(tokens):
        p = logits[first + i - 1].softmax(dim=-1)
        id = sequence[first + i]
        assert token["p"] == pytest.approx(p[id].item(), abs=1e-5)
        assert token["name"] == tokenizer.decode_single_token_bytes(id).decode(errors="backslashreplace")
        assert [value for _, value in token["likeliest"]] == pytest.approx(p.topk(8).values.tolist(), abs=1e-5)
        assert token["name"] in [name for name, _ in token["likeliest"][:3]], "top_k is 3"


def test_the_model_is_chosen_among_the_runs(server):
    known = json.loads(urlopen(server.url + "models").read())
    assert known["models"] == [{"tag": "tiny", "steps": [10, 20]}, {"tag": "broken", "steps": [5]}]
    assert known["sampling"] == {"max_tokens": 5, "temperature": 0.0, "top_k": 50, "seed": 42}
    first, second = (ask(server, {"model_tag": "tiny", "step": step, "prompt": "def"}) for step in (10, 20))
    assert [events[-1]["done"]["step"] for events in (first, second)] == [10, 20] and text_of(first) != text_of(second)
    assert ask(server, {"prompt": "def"})[-1]["done"]["step"] == 20, "the one in memory"
    code, said = refusal(server, {"model_tag": "broken"})
    assert code == 400 and "damaged" in said
    assert text_of(ask(server, {"model_tag": "tiny", "step": 10, "prompt": "def"})) == text_of(first)


def test_a_checkpoint_that_was_written_again_is_loaded_again(runs):
    generator = Generator(load, "tiny", 20)
    request = Request("def", "tiny", 20, dict(temperature=0, max_tokens=4))
    before = list(generator.events(request))
    model, _, state = load("tiny", 10)
    saved = load("tiny", 20)[0].state_dict()
    try:
        save_checkpoint(runs / "base_checkpoints" / "tiny", 20, model.state_dict(), {}, state)
        assert text_of(list(generator.events(request))) != text_of(before)
    finally:
        save_checkpoint(runs / "base_checkpoints" / "tiny", 20, saved, {}, state)


def test_why_a_text_ended(server):
    assert ask(server, {"max_tokens": 3})[-1]["done"]["ended"] == "max tokens"
    context = load("tiny", 20)[0].max_seq_len
    tokens = ask(server, {"prompt": "a" * (context - 4), "max_tokens": 50, "temperature": 0})
    assert tokens[-1]["done"]["ended"] in ("the model's context is full", "the model ended the text")


# What is refused

@pytest.mark.parametrize("request_, words", [
    (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[" * 10_000, "not JSON"), (b"", "not JSON"), ([], "object"),
    ({"promt": "x"}, "promt"), ({"help": 1}, "help"), ({"config": "/etc/passwd"}, "config"), ({"prompt": 3}, "prompt"),
    ({"temperature": -1}, "at least 0"), ({"temperature": "a\nb"}, "temperature"), ({"temperature": True}, "temperature"),
    (b'{"temperature": NaN}', "temperature"), ({"top_k": 1.5}, "top-k"), ({"max_tokens": 0}, "at least 1"),
    ({"max_tokens": [1]}, "max_tokens"), (b'{"seed": 1e400}', "seed"), ({"seed": "--help"}, "seed"),
    ({"model_tag": "../tiny"}, "no trained run"), ({"model_tag": ""}, "no trained run"),
    ({"model_tag": ["tiny"]}, "no trained run"), ({"model_tag": "tiny", "step": 15}, "no checkpoint of step"),
    ({"model_tag": "tiny", "step": "20"}, "no checkpoint"), ({"model_tag": "tiny", "step": True}, "no checkpoint"),
    ({"step": 20}, "model_tag"), ({"temperature": -1, "seed": -1}, "2 problems"),
    ({"prompt": "a " * 5000}, "Shorten the prompt")
], ids=str)
def test_wrong_input_is_one_clear_line(server, request_, words):
    code, said = refusal(server, request_)
    assert code == 400 and words in said, said
    assert not server.generator.queue, "nobody waits for it"


@pytest.mark.parametrize("host, code", [
    ("evil.example", 403), ("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("localhost:80@evil.example", 403),
    ("", 403), ("localhost", 200), ("LOCALHOST:99", 200), ("127.0.0.1", 200), ("[::1]:99", 200)])
@pytest.mark.parametrize("path", ["", "models"])
def test_names_that_only_lead_here_are_refused(server, host, code, path):
    """DNS rebinding: a page of another site whose name comes to mean this machine."""
    if code == 200:
        assert urlopen(HttpRequest(server.url + path, headers={"Host": host})).status == 200
    else:
        assert refusal(server, path=path, Host=host)[0] == 403


def test_other_pages_cannot_ask(server):
    assert refusal(server, {}, Origin="http://evil.example")[0] == 403
    assert refusal(server, {}, Origin="null")[0] == 403
    assert refusal(server, {}, Host="evil.example", Origin="http://evil.example")[0] == 403
    assert len(ask(server, {"max_tokens": 1}, Origin=server.url.rstrip("/"))) == 2


def test_the_size_of_a_request_is_limited(server):
    code, said = refusal(server, b'{"prompt": "' + b"a" * LARGEST_BODY + b'"}')
    assert code == 413 and f"{LARGEST_BODY:,}" in said
    for headers, code in ((b"", 411), (b"Content-Length: -1\r\n", 411), (b"Content-Length: 9e9\r\n", 411),
                          (b"Transfer-Encoding: chunked\r\n", 411)):
        answer = raw(server, b"POST /generate HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
        assert answer.startswith(b"HTTP/1.0 %d" % code)


def raw(server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_what_is_not_there(server):
    assert refusal(server, path="none")[0] == refusal(server, path="../serve.py")[0] == 404
    assert b"501" in raw(server, b"PUT / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert b"Bad request" in raw(server, b"\x16\x03\x01\r\n\r\n"), "TLS, to a server without it"


def test_where_it_listens(server, capfd):
    with pytest.raises(UserError, match=f"--port {server.port}"):
        Server(ServeFlags(port=server.port), SamplingFlags())
    with pytest.raises(UserError, match="--host no such host"):
        Server(ServeFlags(host="no such host", port=0), SamplingFlags())
    assert server.is_loopback
    with Server(ServeFlags(host="0.0.0.0", port=0), SamplingFlags()) as everywhere:
        assert not everywhere.is_loopback


# Turns

def test_requests_take_turns_in_their_order(runs):
    generator = Generator(load, "tiny")
    generator.seconds_between_reports = 0.01
    first = generator.events(Request("a", sampling=dict(max_tokens=3)))
    next(first)
    others = [generator.events(Request("a", sampling=dict(max_tokens=2))) for _ in range(2)]
    assert [next(events) for events in others] == [{"waiting": 1}, {"waiting": 2}]
    first.close()
    assert next(others[1]) == {"waiting": 1} and "token" in next(others[0]) and "done" in list(others[0])[-1]
    assert ["token" in event for event in others[1]] == [True, True, False]
    assert not generator.queue


def test_too_many_do_not_wait(runs):
    generator = Generator(load, "tiny")
    generator.queue.extend(range(LONGEST_QUEUE))
    with pytest.raises(Busy, match="try again"):
        next(generator.events(Request()))


def test_a_reader_who_goes_away_ends_the_text(server):
    body = b'{"max_tokens": 1000000, "temperature": 1.5}'
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(b"POST /generate HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert connection.recv(20).startswith(b"HTTP/1.0 200") and server.generator.queue
    connection.close()
    deadline = time.monotonic() + 30
    while server.generator.queue and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.generator.queue
    assert len(ask(server, {"max_tokens": 2})) == 3


def test_an_error_in_the_middle_is_the_last_line(server, monkeypatch, capfd):
    """And the next one is answered."""
    def two_steps(self, *args, generate=Engine.generate, **sampling):
        yield from islice(generate(self, *args, **sampling), 2)
        raise RuntimeError("out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", two_steps)
        events = ask(server, {"max_tokens": 9})
    assert ["token" in event for event in events] == [True, True, False] and "RuntimeError" in events[-1]["error"]
    assert len(ask(server, {"max_tokens": 2})) == 3


# The page and the program

def test_the_page_needs_no_network(server):
    with urlopen(server.url) as answer:
        page = answer.read().decode()
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert page == PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|src=|@import|url\(", page)
    used, there = set(re.findall(r'\$\("(\w+)"\)', page)), set(re.findall(r'id="(\w+)"', page))
    assert used <= there and "viewport" in page and "prefers-color-scheme: dark" in page


@pytest.mark.slow
def test_by_its_command(runs):
    command = [sys.executable, "-m", "scripts.serve", "--device-type=cpu", "--dtype=float32", "--port=0", "--host=0.0.0.0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"NANOCHAT_NATIVE": "0"}) as process:
        url = re.search(r"tiny, step 20: open (\S+)", process.stdout.readline())[1].replace("0.0.0.0", "127.0.0.1")
        with closing(urlopen(HttpRequest(url + "generate", b'{"max_tokens": 2}', {"Host": "my-machine"}))) as answer:
            assert "done" in json.loads(answer.read().splitlines()[-1])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "warning: --host 0.0.0.0" in errors and "Traceback" not in errors
