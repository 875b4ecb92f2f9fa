"""Every method through `merge` itself: proven, shown, and what plain transformers then loads."""

from __future__ import annotations

import json

import pytest
import tolerances
from method_cases import MERGED, attached, logits, plain
from small_runs import adapter_tensors

from finetune import artifact
from finetune.__main__ import main
from finetune.inference import open_variant
from finetune.merging.plan import TARGETS
from finetune.merging.update import ByPeft, LowRank, read_updates
from finetune.methods import why_not_merged

CASES = [(name, "full") for name in MERGED]
CASES += [
    (name, target)
    for name in ("qlora nf4", "qlora fp4", "qdora nf4", "qlora int8")
    for target in TARGETS
]
BY_PEFT = (
    "dora",
    "qdora",
    "vera",
    "loha",
    "lokr",
    "oft",
    "boft",
    "hra",
    "ia3",
    "miss",
    "ln_tuning",
)


def merged(done, folder, capsys, *options):
    """What merge.json says, and what was shown."""
    assert main(["merge", str(done.run.path), "--out", str(folder), "--json", *options]) == 0
    captured = capsys.readouterr()
    record = json.loads((folder.parent / "merge.json").read_text())
    assert json.loads(captured.out) == record
    return record, captured.err


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_merged_is_attached(trained, tmp_path, capsys, name, target, kind):
    done, folder = trained(name, kind), tmp_path / "merged"
    record, shown = merged(done, folder, capsys, f"--base={target}")
    updates = read_updates(done.run.adapter)
    used = ByPeft if name.split()[0] in BY_PEFT else LowRank
    assert {type(update) for update in updates.values()} == {used}
    assert {n for u in updates.values() for n in u.parts} == set(adapter_tensors(done.run))
    assert (record["matrices"], record["base_weights"]) == (len(updates), target)
    assert record["tied"] == (kind == "tied")
    proof = record["proof"]
    assert proof["max_weight_error_ulps"] <= 0.51
    assert (proof["unchanged"], proof["changed_unasked"]) == ([], [])
    for words in (
        f"{len(updates)} matrices, float32",
        f"logits differ by {proof['max_logit_difference']:.1e} at most, KL {proof['kl']:.1e}",
        f"same greedy text on {proof['same_text']} of {proof['prompts']} prompts",
    ):
        assert words in shown
    assert artifact.findings_of(folder) == []
    if target == "full":
        expected = logits(attached(done.run, done.base))
    else:
        expected = logits(open_variant(done.run, "adapter").model)
    worst = (logits(plain(folder)) - expected).abs().max()
    if name == "qlora int8" and target == "dequantized":  # activations are rounded as well
        assert worst < (logits(plain(done.base)) - expected).abs().max()
        return
    assert worst <= tolerances.MERGED_LOGITS_FLOAT32


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "trainable_tokens"])
def test_what_no_weights_can_hold_says_why(trained, tmp_path, capsys, name):
    done = trained(name)
    assert main(["merge", str(done.run.path), "--out", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert why_not_merged(done.run.config().adapter) in error
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "name", ["dora", "vera", "loha", "lokr", "oft", "ia3", "miss", "ln_tuning"]
)
def test_in_bfloat16(trained, tmp_path, capsys, name):
    done, folder = trained(name, "tied", "bfloat16"), tmp_path / "merged"
    proof = merged(done, folder, capsys)[0]["proof"]
    assert proof["dtype"] == "bfloat16"
    assert proof["max_weight_error_ulps"] <= 0.51
    p = logits(attached(done.run, done.base, "bfloat16")).log_softmax(-1)
    q = logits(plain(folder, "bfloat16")).log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl < tolerances.MERGED_KL_LOW_PRECISION
