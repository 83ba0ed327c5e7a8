"""EleutherAI's evaluation harness on an exported model: its figures are ours. The tasks are made here, so no network is needed.

Skipped without the package: pip install 'lm_eval[hf]'
"""

import json
import math
import os

import pytest
import torch

from nanochat.export.hf import write_folder

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("accelerate", reason="lm_eval[hf] is not installed: accelerate is missing")

QUESTIONS = [("def ", ["split", "zebra"]), ("import ", ["json", "blue whale"]), ("return ", ["x y z", "self"])]
TEXT = "the tokens of a document that is longer than a row are cut"

CHOICE = """\
task: our_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.json}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
TEXTS = """\
task: our_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def figures(trained, tmp_path_factory):
    """What the harness finds, by task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    write_folder(trained, folder / "model")
    (folder / "choice.json").write_text("\n".join(json.dumps({"question": q, "choices": c}) for q, c in QUESTIONS))
    (folder / "text.json").write_text(json.dumps({"text": TEXT}))
    for name, task in (("choice", CHOICE), ("text", TEXTS)):
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)))
    from lm_eval.tasks import TaskManager
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluate(task, **model_args):
        found = lm_eval.simple_evaluate(
            model="hf", tasks=[task], task_manager=tasks, device="cpu", bootstrap_iters=0, log_samples=True,
            model_args=dict(pretrained=str(folder / "model"), trust_remote_code=True, dtype="float32", **model_args))
        return found["results"][task], found["samples"][task]
    return {"choice": evaluate("our_choice"), "text": evaluate("our_text", add_bos_token=False)}


@torch.no_grad()
def log_likelihood(model, tokenizer, text: str, begin: int = 0) -> float:
    """Of the tokens from place `begin` on, in nats."""
    tokens = torch.tensor([tokenizer(text, prepend="<|bos|>")])
    logs = model(tokens)[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])
    return logs[begin:].sum().item()


def test_bits_per_byte_are_ours(figures, model, tokenizer):
    ours = -log_likelihood(model, tokenizer, TEXT) / math.log(2) / len(TEXT)
    assert figures["text"][0]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-4)


def test_a_choice_is_the_likelier_text_by_our_model(figures, model, tokenizer):
    """The question is tokenized with its answer, as the harness does."""
    right = 0
    for (question, choices), sample in zip(QUESTIONS, sorted(figures["choice"][1], key=lambda s: s["doc_id"]), strict=True):
        begin = len(tokenizer(question.rstrip(), prepend="<|bos|>")) - 1
        ours = [log_likelihood(model, tokenizer, question + choice, begin) for choice in choices]
        assert [likelihood for likelihood, _ in sample["filtered_resps"]] == pytest.approx(ours, rel=1e-3)
        right += ours[0] > ours[1]
    assert figures["choice"][0]["acc,none"] == pytest.approx(right / len(QUESTIONS))
