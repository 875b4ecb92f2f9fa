"""Task files and questions of the tests of `eval --lm-eval`; what both sides are asked, and how."""

from __future__ import annotations

import importlib.util
import json

import pytest
import yaml
from small_runs import write_rows

from finetune.__main__ import main
from finetune.heldout import score_rows
from finetune.inference import Sampling, continue_prompts
from finetune.llama.tokenizer import encode_text
from finetune.prepared import Document
from finetune.shapes import Example

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness: extra lm-eval"
)


QUESTIONS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 10), "none"], "label": a % 3}
    for a in range(4)
    for b in range(4)
]
PAIRS = [(row["question"], choice) for row in QUESTIONS for choice in row["choices"]]
TEXTS = [
    {"text": " ".join(f"{a} + {b} = {a + b}." for b in range(count))}
    for a, count in ((3, 4), (7, 9))
]


def evaluate(capsys, *argv):
    """`eval … --json`: exit code, the object on stdout, stderr."""
    code = main(["eval", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 2, 3), captured.err
    return code, json.loads(captured.out) if captured.out else None, captured.err


def write_task(folder, name, rows, **settings):
    """A YAML file beside its data."""
    folder.mkdir(exist_ok=True)
    data = write_rows(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 2.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def mean_of(metric):
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def write_choice(folder, rows=QUESTIONS, name="sums", **settings):
    write_task(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        metric_list=[mean_of("acc"), mean_of("acc_norm")],
        **settings,
    )


def write_generation(folder, rows, name="writes"):
    write_task(
        folder,
        name,
        rows,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [], "max_gen_toks": 8, "do_sample": False},
        metric_list=[mean_of("exact_match")],
    )


def write_rolling(folder, rows=TEXTS, name="text"):
    write_task(
        folder,
        name,
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
    )


def answers_of(run, result, task):
    lines = (run.eval / result["tasks"][task]["answers_file"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def own_task(**settings):
    return f"eval.tasks={json.dumps([{'name': 'own', **settings}])}"


def asked(opened, pairs):
    """Log-likelihoods that the harness's wrapper gives, in the order of the pairs."""
    from lm_eval.api.instance import Instance

    from finetune.harness.model import HarnessModel

    model = HarnessModel(opened, 4)
    requests = []
    for question, choice in pairs:
        context, continuation = question, f" {choice}"
        if opened.base.chat_format:
            context = model.apply_chat_template([{"role": "user", "content": question}])
            continuation = choice
        arguments = (context, continuation)
        requests.append(Instance("loglikelihood", {}, arguments, 0))
    return [found for found, _ in model.loglikelihood(requests, disable_tqdm=True)]


def asked_to_write(opened, questions):
    """What it writes, asked by the harness's wrapper."""
    from lm_eval.api.instance import Instance

    from finetune.harness.model import HarnessModel

    model = HarnessModel(opened, 4)
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    prompts = [model.apply_chat_template([{"role": "user", "content": q}]) for q in questions]
    requests = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
    return model.generate_until(requests, disable_tqdm=True)


def scored(opened, pairs):
    """The same by our own held-out loss: of the choice alone, without what ends an answer."""
    tokenizer, chat_format = opened.base.tokenizer, opened.base.chat_format
    documents = []
    for question, choice in pairs:
        if chat_format:
            prompt = chat_format.prompt(tokenizer, [{"role": "user", "content": question}])
            answer = encode_text(tokenizer, choice)
        else:
            prompt = tokenizer.encode(question)
            answer = tokenizer.encode(f"{question} {choice}")[len(prompt) :]
        mask = [False] * len(prompt) + [True] * len(answer)
        documents.append(Document(Example(choice), prompt + answer, mask))
    return [-row.loss_sum for row in score_rows(opened.model, documents, 4, opened.device)]


def written(opened, questions):
    """Answers of our own generation."""
    tokenizer, chat_format = opened.base.tokenizer, opened.base.chat_format
    prompts = [
        chat_format.prompt(tokenizer, [{"role": "user", "content": question}])
        for question in questions
    ]
    continued = continue_prompts(opened, prompts, Sampling(max_new_tokens=8))
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in continued]
