import csv
import http.server
import json
import random
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nanochat import core_eval
from nanochat.checkpoint_manager import build_model
from nanochat.core_eval import CoreUnavailable, evaluate_core, evaluate_task, find_bundle, load_questions, load_tasks
from nanochat.recipe.shape import GPTConfig
from nanochat.tokenizer import Tokenizer

CHOICE = [
    {"query": "The sky is", "choices": ["green", "blue", "a kind of very old cheese"], "gold": 1},
    {"query": "Grass is", "choices": ["green", "blue", "a stone"], "gold": 0},
    {"query": "Snow is", "choices": ["black", "hot", "white"], "gold": 2},
    {"query": "Two and two are", "choices": ["five", "four", "nine"], "gold": 1},
]
SCHEMA = [
    {"context_options": ["It fell because the cup", "It fell because the dog"], "continuation": "was wet.", "gold": 0},
    {"context_options": ["He ate since he", "He ate since the soup"], "continuation": "was hungry.", "gold": 0},
]
SAYINGS = ["Better late than never", "Look before you leap", "Time is money", "Less is more", "Haste makes waste"]
LANGUAGE = [{"context": f"  {start}\n", "continuation": last} for start, last in (s.rsplit(" ", 1) for s in SAYINGS)]
TASKS = [  # label, type, questions, few-shot, delimiter, baseline in percent
    ("colors", "multiple_choice", CHOICE, 0, None, 25),
    ("colors_2shot", "multiple_choice", CHOICE, 2, "\nAnswer: ", 40),
    ("cups", "schema", SCHEMA, 0, None, 50),
    ("sayings", "language_modeling", LANGUAGE, 0, None, 0),
    ("sayings_3shot", "language_modeling", LANGUAGE, 3, None, 0),
]
# What the model is to believe: all the colors, that of snow wrongly, all cups, three sayings of five.
COLORS = {q["query"]: "black" if q["query"] == "Snow is" else q["choices"][q["gold"]] for q in CHOICE}
KNOWN = ([query + d + answer for query, answer in COLORS.items() for d in (" ", "\nAnswer: ")]
         + [q["context_options"][0] + " " + q["continuation"] for q in SCHEMA] + SAYINGS[:3])
EXPECTED = {"colors": 0.75, "colors_2shot": 0.75, "cups": 1.0, "sayings": 0.6, "sayings_3shot": 0.6}


def make_tokenizer():
    return Tokenizer.train_from_iterator(["the word is followed by green blue was wet because he ate since"] * 9, 300)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_bundle(folder: Path) -> Path:
    (folder / "eval_data" / "sub").mkdir(parents=True)
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline"])
        writer.writerows([label, "tests, mostly", baseline] for label, *_, baseline in TASKS)
    lines = ["icl_tasks:"]
    for label, kind, questions, fewshot, delimiter, _ in TASKS:
        lines += ["-", f"  label: {label}", f"  dataset_uri: sub/{label}.jsonl", f"  num_fewshot: [{fewshot}]",
                  f"  icl_task_type: {kind}"]
        lines += [f"  continuation_delimiter: {json.dumps(delimiter)}"] if delimiter else []
        (folder / "eval_data" / "sub" / f"{label}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "core.yaml").write_text("\n".join(lines))
    return folder


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


class Knows(nn.Module):
    """A model that knows some texts by heart: after up to the last MEMORY tokens of a text it expects the next one.

    An input to the evaluation, with answers known beforehand.
    """
    MEMORY = 40

    def __init__(self, texts, tokenizer, max_seq_len=None):
        super().__init__()
        self.vocab_size, self.max_seq_len, self.longest, self.next = tokenizer.get_vocab_size(), max_seq_len, 0, {}
        for text in texts:
            ids = tokenizer(text)
            for i in range(1, len(ids)):
                for n in range(3, self.MEMORY + 1):
                    self.next[tuple(ids[max(0, i - n):i])] = ids[i]

    def forward(self, ids):
        self.longest = max(self.longest, ids.size(1))
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                for n in range(self.MEMORY, 2, -1):
                    following = self.next.get(tuple(row[max(0, t + 1 - n):t + 1]))
                    if following is not None:
                        logits[b, t, following] = 10.0
                        break
        return logits


def test_core_of_a_model_with_known_answers(bundle, tokenizer):
    core = evaluate_core(Knows(KNOWN, tokenizer), tokenizer, torch.device("cpu"), bundle_dir=bundle)
    assert core["results"] == pytest.approx(EXPECTED)
    assert core["centered_results"] == pytest.approx({
        "colors": 0.5 / 0.75, "colors_2shot": 0.35 / 0.6, "cups": 1.0, "sayings": 0.6, "sayings_3shot": 0.6})
    assert core["core_metric"] == pytest.approx((2 / 3 + 7 / 12 + 1.0 + 0.6 + 0.6) / 5)


def test_a_model_that_knows_nothing_predicts_no_text(bundle, tokenizer):
    core = evaluate_core(Knows([], tokenizer), tokenizer, torch.device("cpu"), bundle_dir=bundle)
    assert core["results"]["sayings"] == core["results"]["sayings_3shot"] == 0.0


def test_max_per_task_takes_the_first_of_a_fixed_shuffle(bundle):
    path = bundle / "eval_data/sub/sayings.jsonl"
    everything = load_questions(path)
    shuffled = list(LANGUAGE)
    random.Random(1337).shuffle(shuffled)
    assert everything == shuffled != LANGUAGE
    assert load_questions(path, 2) == everything[:2] and len(load_questions(path, 99)) == 5


def test_max_per_task_reaches_the_accuracy(bundle, tokenizer):
    core = evaluate_core(Knows(KNOWN, tokenizer), tokenizer, torch.device("cpu"), max_per_task=1, bundle_dir=bundle)
    known = load_questions(bundle / "eval_data/sub/sayings.jsonl", 1)[0] in LANGUAGE[:3]
    assert core["results"]["sayings"] == float(known)


def test_prompts_are_those_of_the_public_evaluation():
    assert core_eval.RENDER["multiple_choice"](CHOICE[0], CHOICE[1:3], "\nA: ") == [
        "Grass is\nA: green\n\nSnow is\nA: white\n\nThe sky is\nA: " + choice for choice in CHOICE[0]["choices"]]
    assert core_eval.RENDER["schema"](SCHEMA[1], SCHEMA[:1], " ") == [
        "It fell because the cup was wet.\n\nHe ate since he was hungry.",
        "It fell because the cup was wet.\n\nHe ate since the soup was hungry."]
    assert core_eval.RENDER["language_modeling"](LANGUAGE[0], LANGUAGE[1:2], " ") == [
        "Look before you leap\n\nBetter late than",
        "Look before you leap\n\nBetter late than never"]


@pytest.mark.parametrize("size, n", [(11, 10), (300, 10), (2, 1), (40, 0)])
def test_fewshot_examples_are_those_of_the_public_evaluation(size, n):
    questions = [{"n": i} for i in range(size)]
    for index in range(size):
        others = [i for i in range(size) if i != index]
        expected = [questions[i] for i in random.Random(1234 + index).sample(others, n)]
        assert core_eval.pick_fewshot(questions, index, n) == expected
    assert len(core_eval.pick_fewshot(questions, 0, size + 5)) == size - 1  # no more than there are


def spans(question, kind, tokenizer, max_len=None, fewshot=(), delimiter=" "):
    task = {"type": kind, "delimiter": delimiter}
    return core_eval.rows_and_spans(question, list(fewshot), task, tokenizer, max_len)


def test_what_is_scored_is_what_differs_or_follows(tokenizer):
    bos = tokenizer.get_bos_token_id()
    for row, start, end in spans(CHOICE[0], "multiple_choice", tokenizer):
        assert row[0] == bos and end == len(row) and tokenizer.decode(row[1:start]) == "The sky is"
    (first, start, _), (second, other, _) = spans(SCHEMA[1], "schema", tokenizer)
    assert first[start:] == second[other:] and first[start - 1] != second[other - 1]
    assert "was hungry." in tokenizer.decode(first[start:])
    (row, start, end), = spans(LANGUAGE[0], "language_modeling", tokenizer)
    assert tokenizer.decode(row[start:end]) == " never"


def test_a_continuation_is_right_if_every_token_is(tokenizer):
    (row, start, end), = spans({"context": "a b", "continuation": "green blue wet"}, "language_modeling", tokenizer)
    assert end - start >= 3
    for wrong in (None, *range(start, end)):
        def model(ids, wrong=wrong):
            logits = nn.functional.one_hot(ids.roll(-1, dims=1), tokenizer.get_vocab_size()).float()
            if wrong is not None:
                logits[0, wrong - 1] *= -1
            return logits

        right = core_eval.count_correct(model, [([(row, start, end)], None)], torch.device("cpu"), pad=0)
        assert right == (wrong is None)


def test_long_rows_are_cropped_on_the_left(bundle, tokenizer):
    whole, cropped = (spans(CHOICE[0], "multiple_choice", tokenizer, max_len, CHOICE[1:]) for max_len in (None, 40))
    assert max(len(row) for row, _, _ in whole) > 50
    for (row, start, _), (short, short_start, short_end) in zip(whole, cropped, strict=True):
        assert short == row[-40:] and short_end == len(short) and short[short_start:] == row[start:][-39:]
    for row, start, end in spans(CHOICE[0], "multiple_choice", tokenizer, 3):
        assert len(row) == 3 and 1 <= start < end == 3  # cropped into the answer: what is left of it is scored
    model = Knows(KNOWN, tokenizer, max_seq_len=40)
    core = evaluate_core(model, tokenizer, torch.device("cpu"), bundle_dir=bundle)
    assert core["results"] == pytest.approx(EXPECTED) and model.longest == 40


def test_an_answer_that_is_the_beginning_of_another_is_scored(tokenizer):
    question = {"query": "It is", "choices": ["green", "green blue"], "gold": 0}
    assert all(1 <= start < end for _, start, end in spans(question, "multiple_choice", tokenizer))


def real_model(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=64, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2,
                       n_embd=32)
    model = build_model(config, torch.float32, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=2 * p.size(1) ** -0.5)
    return model


def test_batching_changes_no_result(bundle, tokenizer, monkeypatch):
    model, device = real_model(tokenizer), torch.device("cpu")
    together = evaluate_core(model, tokenizer, device, bundle_dir=bundle)
    monkeypatch.setattr(core_eval, "FORWARD_TOKENS", 1)  # every question by itself, so hardly any padding
    assert evaluate_core(model, tokenizer, device, bundle_dir=bundle) == together


def test_the_answer_with_the_lowest_mean_loss_is_chosen(bundle, tokenizer):
    """Against the definition, a row at a time, on a real model."""
    model, questions, right = real_model(tokenizer), CHOICE * 3, 0
    for question in questions:
        rows = spans(question, "multiple_choice", tokenizer)
        losses = []
        for row, start, end in rows:
            with torch.no_grad():
                log_p = model(torch.tensor([row]))[0].log_softmax(-1)
            losses.append(-sum(log_p[t - 1, row[t]].item() for t in range(start, end)) / (end - start))
        right += losses.index(min(losses)) == question["gold"]
    task = load_tasks(bundle)[0]
    assert evaluate_task(model, tokenizer, torch.device("cpu"), task, questions) == right / len(questions)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    tokenizer = make_tokenizer()
    core = evaluate_core(Knows(KNOWN, tokenizer), tokenizer, torch.device("cpu"), bundle_dir=Path(folder, "bundle"))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(core["results"]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_questions(bundle, tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == pytest.approx(EXPECTED)


# ---- fetching the bundle

@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "base"


@pytest.fixture
def serve(tmp_path):
    """A web server on this machine that gives every request the same bytes; returns its address."""
    servers = []

    def start(content: bytes, claimed: int | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(claimed or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/eval_bundle.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def zipped(tmp_path, bundle, extra=()) -> bytes:
    path = tmp_path / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in bundle.rglob("*"):
            archive.write(file, Path("eval_bundle") / file.relative_to(bundle))
        for info, content in extra:
            archive.writestr(info, content)
    return path.read_bytes()


def test_the_bundle_is_fetched_once(base_dir, bundle, tmp_path, serve):
    found = find_bundle(url=serve(zipped(tmp_path, bundle)))
    assert found == base_dir / "eval_bundle" and [t["label"] for t in load_tasks(found)] == [t[0] for t in TASKS]
    assert find_bundle(url="http://127.0.0.1:1/nobody-listens") == found
    assert [p.name for p in base_dir.iterdir()] == ["eval_bundle"]  # nothing temporary is left


def test_without_a_network_the_message_says_where_the_bundle_goes(base_dir):
    with pytest.raises(CoreUnavailable, match=f"cannot be fetched.*{base_dir / 'eval_bundle'}"):
        find_bundle(url="http://127.0.0.1:1/eval_bundle.zip")
    assert list(base_dir.iterdir()) == []
    with pytest.raises(CoreUnavailable, match="no core.yaml"):
        find_bundle(bundle_dir=base_dir)


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize("member", ["../../slipped", "eval_bundle/../../slipped", "/slipped", "..\\slipped", link("a")],
                         ids=str)
def test_a_zip_that_reaches_outside_is_refused(base_dir, bundle, tmp_path, serve, member):
    with pytest.raises(CoreUnavailable, match="refused"):
        find_bundle(url=serve(zipped(tmp_path, bundle, [(member, "/etc")])))
    assert list(base_dir.iterdir()) == [] and not list(tmp_path.rglob("slipped*")) and not Path("/slipped").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda content: content[:-200], "cannot be unpacked"),
    (lambda content: b"<html>Log in to the hotel's network</html>", "cannot be unpacked"),
    (lambda content: content.replace(b"icl_tasks", b"icl_tasls"), "cannot be unpacked"),
])
def test_a_damaged_zip_leaves_nothing(base_dir, bundle, tmp_path, serve, damage, words):
    with pytest.raises(CoreUnavailable, match=words):
        find_bundle(url=serve(damage(zipped(tmp_path, bundle))))
    assert list(base_dir.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(base_dir, bundle, tmp_path, serve):
    content = zipped(tmp_path, bundle)
    with pytest.raises(CoreUnavailable, match="connection broke|cannot be fetched"):
        find_bundle(url=serve(content, claimed=len(content) + 5000))
    assert list(base_dir.iterdir()) == []


@pytest.mark.parametrize("damage, words", [
    (lambda b: (b / "eval_data/sub/colors.jsonl").unlink(), "colors.jsonl"),
    (lambda b: (b / "eval_data/sub/colors.jsonl").write_text("{nope"), "colors.jsonl"),
    (lambda b: (b / "eval_data/sub/colors.jsonl").write_text(""), "no questions"),
    (lambda b: (b / "eval_data/sub/colors.jsonl").write_text('{"query": "a"}\n'), "malformed question"),
    (lambda b: (b / "eval_meta_data.csv").unlink(), "eval_meta_data.csv"),
    (lambda b: (b / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncups,50\n"), "baseline for colors"),
    (lambda b: (b / "core.yaml").write_text("icl_tasks: [{label: colors}]"), "task list"),
    (lambda b: (b / "core.yaml").write_text("icl_tasks: {"), "task list"),
    (lambda b: (b / "core.yaml").write_text((b / "core.yaml").read_text().replace(": schema", ": riddle")), "riddle"),
])
def test_a_damaged_bundle_is_named(bundle, tokenizer, damage, words):
    damage(bundle)
    with pytest.raises(CoreUnavailable, match=words):
        evaluate_core(Knows([], tokenizer), tokenizer, torch.device("cpu"), bundle_dir=bundle)


def test_without_pyyaml_the_message_says_so(bundle, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)  # what Python does for a package that is not installed
    with pytest.raises(CoreUnavailable, match="pip install pyyaml"):
        evaluate_core(Knows([], tokenizer), tokenizer, torch.device("cpu"), bundle_dir=bundle)
