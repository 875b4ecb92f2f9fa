"""Two ranks agree on the best step and on the stop; one that dies at the best changes neither."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from small_runs import (
    ROOT,
    Bench,
    adapter_tensors,
    embedded_rows,
    heldout_lines,
    losses,
    same_bits,
    worst_tensor,
    write_rows,
)
from test_two_ranks import DISTURBED, TWO, launch

from finetune import artifact

# Four rows, two a step: it overfits within a few steps, and stops three evaluations later.
STOP = (
    *("data.packing=false", "train.max_steps=40", "train.learning_rate=0.02"),
    *(
        "train.lr_scheduler_type=constant",
        "train.eval_steps=2",
        "train.load_best_model_at_end=true",
    ),
    "train.early_stopping_patience=3",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, small_base):
    bench = Bench(tmp_path_factory.mktemp("best"), small_base)
    write_rows(bench.train_file, embedded_rows("train", 4))
    write_rows(bench.heldout_file, embedded_rows("heldout", 5))  # three for one rank, two for one
    return bench


def launch_two(bench, *overrides):
    sizes = ("train.per_device_train_batch_size=1", *overrides)
    return launch(*TWO, str(bench.config_file), *STOP, *sizes)


@pytest.fixture(scope="module")
def two(bench):
    done = launch_two(bench, "run.name=two")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("best     step") == 1, "one rank speaks"
    return bench.run_folder("run.name=two")


def best_of(run):
    held = [(step, loss) for step, loss in heldout_lines(run) if step]
    return min(held, key=lambda line: (line[1], line[0]))


def test_the_lowest_loss_of_all_ranks_rows_is_published(two):
    step, loss = best_of(two)
    facts = artifact.verify(two.adapter)["facts"]
    assert (facts["step"], facts["heldout_loss"]) == (step, loss)
    saved = load_file(two.checkpoints / f"step-{step:06d}" / "trained.safetensors")
    renamed = {name.replace(".default.", "."): tensor for name, tensor in saved.items()}
    assert same_bits(renamed, adapter_tensors(two))
    assert len(losses(two)) == step + 6 < 40
    assert two.state()["reason"].startswith(f"stopped early after step {step + 6}")


def test_one_process_decides_the_same(bench, two):
    one = bench.train(*STOP, "run.name=one")
    assert best_of(one)[0] == best_of(two)[0]
    assert heldout_lines(two) == [
        (step, pytest.approx(loss, rel=1e-3)) for step, loss in heldout_lines(one)
    ]
    assert worst_tensor(adapter_tensors(one), adapter_tensors(two)) < 1e-2


@pytest.mark.slow
def test_a_rank_that_dies_in_the_save_of_the_best_changes_nothing(bench, two, tmp_path):
    kept = sorted(int(path.name[5:]) for path in two.checkpoints.glob("step-*"))
    assert best_of(two)[0] == kept[0]
    # Every new lowest loss is a save; the last of them is the best.
    lowest = [loss for step, loss in heldout_lines(two) if step]
    saves = sum(loss < min(lowest[:place], default=9e9) for place, loss in enumerate(lowest))
    fault = f'("0", checkpoint, "save_rng", {saves}, kill)'
    program = tmp_path / "disturbed.py"
    program.write_text(DISTURBED.format(root=str(ROOT), fault=fault))
    sizes = ("train.per_device_train_batch_size=1", "run.name=again")
    done = launch(*TWO[:-1], str(program), str(bench.config_file), *STOP, *sizes)
    run = bench.run_folder("run.name=again")
    assert done.returncode != 0
    assert heldout_lines(run)[-1] == best_of(two)
    assert not (run.checkpoints / f"step-{best_of(two)[0]:06d}").exists()
    done = launch_two(bench, "run.name=again")
    assert done.returncode == 0, done.stderr
    assert heldout_lines(run) == heldout_lines(two)
    assert losses(run) == losses(two)
    assert same_bits(adapter_tensors(run), adapter_tensors(two))
    assert run.state() == two.state()
