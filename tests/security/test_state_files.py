"""A checkpoint that verifies and was written by somebody else: one sentence, or a run that goes on.

Each file of state is mutated with a seed. What a loader lets through has to work: the optimizer
steps, the generators draw, the schedule moves, transformers writes its state again.
"""

from __future__ import annotations

import copy
import json
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import Bench, republish
from test_canaries import start_again
from transformers import TrainerState, get_scheduler

from finetune import artifact, checkpoint
from finetune.errors import CheckFailed, FinetuneError
from finetune.run_folder import RunFolder
from finetune.state_files import MAX_DEPTH, read_state
from finetune.watchdog import SpikeWatch

CASES = 120
DEEP: list = []
for _ in range(MAX_DEPTH + 1):
    DEEP = [DEEP]
VALUES = (
    *(None, True, -1, 0, 1, 3, 625, 1 << 33, 1 << 70, -(1 << 63), 0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "1", [], [0], [[]], {}, {"a": 1}, DEEP, [0] * 5000),
    *({"__tensor__": "nowhere"}, {"__tensor__": [1]}, {"__tensor__": None}),
    *({"__tensor__": f"state/state/{name}"} for name in ("0/exp_avg", "1/exp_avg", "2/step")),
)


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def parts(kind, model):
    """An optimizer and its schedule."""
    classes = {"adamw": torch.optim.AdamW, "fused": torch.optim.AdamW, "sgd": torch.optim.SGD}
    settings = {"fused": {"fused": True}, "sgd": {"momentum": 0.9}}.get(kind, {})
    optimizer = classes[kind](model.parameters(), lr=0.1, **settings)
    return optimizer, get_scheduler("cosine", optimizer, 2, 20)


def step(model, optimizer, schedule):
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def written(folder, kind):
    """A checkpoint's files after three steps."""
    model = small_model()
    optimizer, schedule = parts(kind, model)
    watch, state = SpikeWatch(), TrainerState(global_step=3, epoch=0.5)
    state.log_history.append({"loss": 1.0, "step": 1})
    for _ in range(3):
        step(model, optimizer, schedule)
        watch.look(1.0, 2.0)
    folder.mkdir()
    checkpoint.save_weights(model, folder)
    checkpoint.save_optimizer(optimizer, folder)
    checkpoint.save_scheduler(schedule, folder)
    checkpoint.save_rng([checkpoint.rng_state()], folder)
    artifact.write_json(folder / checkpoint.WATCH, watch.state())
    state.save_to_json(str(folder / checkpoint.TRAINER_STATE))
    artifact._write_manifest(folder, {"step": 3})
    return folder


def goes_on(folder, kind):
    """What a start does with the files, and then some steps."""
    model, watch = small_model(), SpikeWatch()
    optimizer, schedule = parts(kind, model)
    checkpoint.refuse_other_state(folder)
    state = TrainerState.load_from_json(str(folder / checkpoint.TRAINER_STATE))
    checkpoint.load_weights(model, folder)
    checkpoint.load_optimizer(optimizer, folder)
    checkpoint.load_scheduler(schedule, folder)
    watch.load(folder / checkpoint.WATCH)
    checkpoint.load_rng(folder, 0)
    random.random(), random.gauss(0, 1), np.random.rand(700), np.random.randn(), torch.rand(700)
    for _ in range(2):
        step(model, optimizer, schedule)
        watch.look(1.0, 2.0)
    state.global_step += 1
    state.epoch, state.total_flos = state.epoch + 0.1, state.total_flos + 1.0
    state.num_input_tokens_seen += 1
    state.log_history.append({"loss": 1.0})
    state.save_to_json(str(folder / "again.json"))
    (folder / "again.json").unlink()


@pytest.fixture(autouse=True)
def _generators_as_before():
    before = checkpoint.rng_state()
    yield
    checkpoint.restore_rng(before)


def places(value, path=()):
    """Every path into a JSON value; of long lists a few."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in {0, 1, len(value) - 1} & set(range(len(value))):
            yield from places(value[index], (*path, index))


def mutated(draw, value):
    """Another value, key or length at one place or two."""
    value = {"root": copy.deepcopy(value)}
    for _ in range(draw.randint(1, 2)):
        path = draw.choice([p for p in places(value) if p])
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        kind, other = draw.randrange(6), copy.deepcopy(draw.choice(VALUES))
        if kind == 0 and path != ("root",):
            del inside[path[-1]]
        elif kind == 1 and isinstance(inside[path[-1]], dict):
            inside[path[-1]][draw.choice(["x", "0", "99", "__tensor__", "lr"])] = draw.choice(
                VALUES
            )
        elif kind == 2 and isinstance(inside[path[-1]], list):
            inside[path[-1]].append(other)
        else:
            inside[path[-1]] = other
    return value["root"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("optimizer.json", kind) for kind in ("adamw", "fused", "sgd")),
        *((f"{name}.json", "adamw") for name in ("scheduler", "rng", "watch", "trainer_state")),
    ],
)
def test_whatever_it_holds_it_is_refused_or_gone_on_from(tmp_path, name, kind):
    folder = written(tmp_path / "step-000003", kind)
    whole = json.loads((folder / name).read_text())
    goes_on(folder, kind)
    draw, refused = random.Random(f"{name} {kind}"), []
    for _ in range(CASES):
        value = mutated(draw, whole)
        (folder / name).write_text(json.dumps(value))
        try:
            goes_on(folder, kind)
        except FinetuneError as error:
            refused.append(error)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; {str(value)[:500]}") from error
    assert {error.exit_code for error in refused} <= {2, 3}
    assert all(str(e).startswith(str(folder)) and "\n" not in str(e) for e in refused)
    assert len(refused) > CASES / 6


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {n: v[:1] if v.dim() else v for n, v in t.items()},
        lambda t: {n: v.reshape(-1) for n, v in t.items()},
        lambda t: {n: v * float("nan") for n, v in t.items()},
        lambda t: {n: v.to(torch.int32) for n, v in t.items()},
        lambda t: dict(list(t.items())[:-1]),
    ],
)
def test_moments_that_do_not_fit_are_refused(tmp_path, change):
    folder = written(tmp_path / "step-000003", "adamw")
    path = folder / "optimizer.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(CheckFailed, match="is not what training writes"):
        goes_on(folder, "adamw")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 5000 + "1" + "}" * 5000, "", "\0", "{"])
def test_what_is_no_json_or_has_no_floor_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FinetuneError):
        read_state(tmp_path / "x.json")


def test_what_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no disk
    with pytest.raises(CheckFailed, match="bytes; 268,435,456 are allowed"):
        read_state(tmp_path / "x.json")


class TestInARun:
    """The same through `train`, which ends with the code of a check and a sentence."""

    def forge(self, run, name, value):
        shutil.rmtree(run.checkpoints / "step-000004")  # its end: nothing is drawn after it
        for folder in run.checkpoints.glob("step-*"):
            found = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(value(found) if callable(value) else value))
            republish(folder)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("optimizer.json", {}),
            ("optimizer.json", lambda v: v | {"param_groups": v["param_groups"] * 2}),
            ("optimizer.json", lambda v: v | {"state": {"0": {"step": 3}}}),
            ("scheduler.json", lambda v: v | {"last_epoch": "x"}),
            ("rng.json", [{}]),
            ("rng.json", lambda v: [v[0] | {"numpy": ["MT19937", [0] * 624, 1 << 30, 0, 0.0]}]),
            ("watch.json", {"loss": [None]}),
            ("trainer_state.json", {"global_step": 0, "evil": 1}),
            ("trainer_state.json", lambda v: v | {"global_step": 1}),
            ("trainer_state.json", lambda v: v | {"log_history": [DEEP]}),
        ],
    )
    def test_it_ends_with_a_sentence(self, spoilt_bench, run, ended, name, value):
        self.forge(run, name, value)
        said = ended([2, 3], *start_again(spoilt_bench, run))
        assert name in said and "is not what training writes" in said

    @pytest.mark.parametrize(
        "facts", [{"num_ranks": None}, {"num_ranks": "x"}, {"trained_on": 3}, {"trained_on": {}}]
    )
    def test_so_does_a_manifest_without_its_facts(self, spoilt_bench, run, ended, facts):
        for folder in run.checkpoints.glob("step-*"):
            republish(folder, **facts)
        ended([2, 3], *start_again(spoilt_bench, run))

    @pytest.mark.parametrize("name", ["environment.json", "data.json", "run.json"])
    @pytest.mark.parametrize("text", ["[]", "3", '{"files": 3, "base_fingerprint": [1]}', "{"])
    def test_so_do_the_runs_own_files(self, spoilt_bench, run, ended, name, text):
        argv = start_again(spoilt_bench, run)
        (run.path / name).write_text(text)
        ended([0, 2, 3], *argv)


def _with_ranks(pattern):
    return lambda folder: (folder / "ranks.json").write_text(json.dumps(pattern))


def _with_scores(scores):
    return lambda folder: save_file(scores, folder / "rank_scores.safetensors")


@pytest.fixture(scope="module")
def adalora_bench(tmp_path_factory, small_base):
    """A run of AdaLoRA whose last two steps can be made again."""
    bench = Bench(tmp_path_factory.mktemp("adalora"), small_base)
    values = yaml.safe_load(bench.config_file.read_text())
    values["adapter"] = {"method": "adalora", "init_r": 4, "target_r": 2, "tfinal": 1}
    bench.config_file.write_text(yaml.safe_dump(values))
    shutil.rmtree(bench.train("train.save_steps=2").checkpoints / "step-000004")
    return bench


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda folder: None, 0),
        (_with_ranks({"rank_pattern": {"x": [True]}}), 3),
        (_with_ranks({"rank_pattern": 3}), 3),
        (_with_ranks([]), 3),
        (_with_scores({"ipt/x": torch.zeros(1)}), 3),
        (_with_scores({}), 3),
    ],
)
def test_adaloras_scores_are_looked_at_too(adalora_bench, tmp_path, ended, change, code):
    whole = adalora_bench.run_folder()
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "runs" / "small"))
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace(str(whole.path.parent), str(run.path.parent)))
    change(run.checkpoints / "step-000002")
    republish(run.checkpoints / "step-000002")
    said = ended(code, *start_again(adalora_bench, run))
    assert ("is not what training writes" in said) == (code == 3)
