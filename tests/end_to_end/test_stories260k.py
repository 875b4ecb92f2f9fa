"""A real pretrained Llama in Meta's layout, end to end: read, fine-tuned, merged, reloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.__main__ import main
from finetune.run_folder import RunFolder

Shared = Callable[[str], Path]

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
CONFIG = """
recipe: sft
run: {{name: stories, dir: {runs}}}
base: {{path: {model}, dtype: float32}}
adapter: {{method: lora, r: 16, lora_alpha: 32}}
data: {{train: {train}, heldout: {heldout}, max_length: 256, on_overflow: error}}
train:
  num_train_epochs: 1
  per_device_train_batch_size: 4
  learning_rate: 5.0e-3
  bf16: false
  save_steps: 100
eval: {{per_device_eval_batch_size: 16}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared: Shared) -> RunFolder:
    """A finished and merged run: 900 rows to train on, 200 held out."""
    model, data = shared("models/stories260K"), shared("data/instructions_1100.json")
    folder = tmp_path_factory.mktemp("stories")
    rows = json.loads(data.read_text(encoding="utf-8"))
    (folder / "train.json").write_text(json.dumps(rows[:900]), encoding="utf-8")
    (folder / "heldout.json").write_text(json.dumps(rows[900:]), encoding="utf-8")
    config = folder / "stories.yaml"
    paths = {
        "runs": folder,
        "model": model,
        "train": folder / "train.json",
        "heldout": folder / "heldout.json",
    }
    config.write_text(CONFIG.format(**paths), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder / "cache"))
        assert main(["train", str(config)]) == 0
        assert main(["merge", str(folder / "stories")]) == 0
        assert main(["eval", str(folder / "stories"), "--against", "base,merged"]) == 0
    return RunFolder(folder / "stories")


def test_it_continues_bos_with_the_documented_text(
    shared: Shared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shared("models/stories260K")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert main(["generate", str(model), "--raw", "--prompt", "", "--max-new-tokens", "90"]) == 0
    assert capsys.readouterr().out.startswith(TEXT)


def test_the_heldout_loss_falls_clearly_and_merging_keeps_it(run: RunFolder) -> None:
    result = json.loads((run.eval / "heldout.json").read_text(encoding="utf-8"))
    base, merged = result["against"]
    assert result["rows"] == 200
    assert result["loss"] < 0.75 * base["loss"]
    assert merged["loss"] == pytest.approx(result["loss"], abs=1e-4)


def test_plain_transformers_gives_the_same_numbers(run: RunFolder) -> None:
    """Loss over every held-out row, padded the ordinary way, without any code of ours."""
    from finetune.data import load_heldout
    from finetune.model import find_base

    config = run.config()
    base = find_base(config, run.path)
    source = Path(config.data.heldout[0].path)
    documents, _ = load_heldout(source, config, base.tokenizer, base.chat_format)
    model = AutoModelForCausalLM.from_pretrained(run.merged)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    total, count = 0.0, 0
    for document in documents:
        messages = [dict(m) for m in document.example.messages]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids == document.input_ids
        labels = [i if t else -100 for i, t in zip(ids, document.train_mask, strict=True)]
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += loss.double().item() * document.num_trained
        count += document.num_trained
    result = json.loads((run.eval / "heldout.json").read_text(encoding="utf-8"))
    assert count == result["tokens"]
    assert total / count == pytest.approx(result["loss"], abs=1e-4)
