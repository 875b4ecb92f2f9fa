"""A merge that dies, meets a full disk or a changing base leaves nothing that looks whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, Bench, flip_bit, republish

from finetune import artifact
from finetune import merge as merging
from finetune.__main__ import main
from finetune.errors import CheckFailed
from finetune.merge import merge
from finetune.run_folder import RunFolder

# Runs in a process of its own, with one thread, and forks for every point; the proof, which only
# reads, is left out of it. Arguments: the run, kill|limit, the first point, the step, --add's.
SWEEP = """
import builtins, io, json, os, resource, shutil, signal, sys
import torch
torch.set_num_threads(1)
from finetune import artifact, merge as merging
from finetune.errors import FinetuneError, exit_code_of
from finetune.merging import members, writing
from finetune.run_folder import RunFolder

run, kind, start, step = RunFolder(__import__("pathlib").Path(sys.argv[1])), *sys.argv[2:5]
combination = members.asked_for(run, sys.argv[5:])
merging.prove = lambda *_: {"prompts": 0, "same_text": 0}
merging.plan_merge(run, None, None, combination)  # imports what is imported late

def kill_at(point):
    left = [point]
    def dies(call):
        def wrapped(*args, **settings):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **settings)
        return wrapped
    for name in ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dies(getattr(os, name)))
    io.open = builtins.open = dies(io.open)
    content = writing.file_content
    def pieces(*args):
        for piece in content(*args):
            dies(lambda: None)()
            yield piece
    writing.file_content = pieces

def limit_at(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def attempt(prepare, point):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if prepare:
            prepare(point)
        try:
            merging.merge(run, None, None, None, combination)
            code = 0
        except BaseException as error:
            code = exit_code_of(error)
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

seen, point = [], int(start)
while True:
    code = attempt(kill_at if kind == "kill" else limit_at, point)
    whole = run.merged.exists()
    findings = artifact.findings_of(run.merged) if whole else []
    left = [p.name for p in run.path.iterdir() if p.name.startswith(".merged.tmp-")]
    again = attempt(None, 0)
    findings += artifact.findings_of(run.merged) + artifact.findings_of(run.adapter)
    stale = [p.name for p in run.path.iterdir() if ".tmp-" in p.name]
    hashes = artifact.read_manifest(run.merged)["files"]["model.safetensors"]["sha256"]
    seen.append([point, code, whole, bool(left), again, findings, stale, hashes])
    shutil.rmtree(run.merged); (run.path / "merge.json").unlink()
    if code == 0:
        break
    point += int(step)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_base) -> RunFolder:
    return Bench(tmp_path_factory.mktemp("run"), small_base).train("train.max_steps=2")


@pytest.fixture
def run(trained, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))


def sweep(run, *arguments):
    """A list of (point, exit code, folder there, stage left, second exit code, …)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SWEEP, str(run.path), *arguments]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert len({hashes for *_, hashes in seen}) == 1, "every merge gives the same bytes"
    for point, _, _, _, again, findings, stale, _ in seen:
        assert (again, findings, stale) == (0, [], []), point
    return seen


@pytest.mark.parametrize(("step", "least"), [pytest.param(1, 40, marks=pytest.mark.slow), (7, 5)])
def test_killed_at_every_file_operation(run, step, least):
    *killed, last = sweep(run, "kill", "0", str(step))
    assert {code for _, code, *_ in killed} == {-9}
    assert last[1] == 0
    assert len(killed) > least
    assert any(whole for _, _, whole, *_ in killed), "killed before merge.json was written"
    assert any(left for _, _, _, left, *_ in killed), "what is left is swept by the next merge"


def test_a_disk_that_is_full_at_any_byte(run):
    """Every file may grow to this size only; the largest is 2.4 MB."""
    *refused, last = sweep(run, "limit", "0", "233000")
    assert {code for _, code, *_ in refused} == {4}
    assert not any(whole or left for _, _, whole, left, *_ in refused), "the stage is removed"
    assert len(refused) > 8
    assert last[0] > 2_000_000


def test_a_merge_of_two_adapters_is_killed(run, tmp_path, small_base):
    other = Bench(tmp_path, small_base).train("train.max_steps=2", "run.seed=1")
    *killed, last = sweep(run, "kill", "0", "17", f"{other.path}:0.5")
    assert ({code for _, code, *_ in killed}, last[1]) == ({-9}, 0)
    assert any(left for _, _, _, left, *_ in killed)


def nothing_published(run):
    return [p.name for p in run.path.iterdir() if "merge" in p.name or ".tmp-" in p.name] == []


def test_a_merge_proven_again_needs_no_space(run, monkeypatch):
    merge(run)
    (run.path / "merge.json").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert merge(run)["proof"]["rows"] > 0


def test_an_old_merge_outlives_a_base_that_changed(run, tmp_path, small_base):
    """Another merge beside it is refused, and so is a plan; nothing of either is left."""
    base = shutil.copytree(small_base, tmp_path / "base")
    config = run.config_file.read_text().replace(str(small_base), str(base))
    run.config_file.write_text(config)
    merge(run)
    before = artifact.read_manifest(run.merged)
    flip_bit(base / "model.safetensors", 0.99)
    for arguments in (["--out", str(run.path / "other")], ["--plan", "--out", str(tmp_path / "o")]):
        assert main(["merge", str(run.path), *arguments]) == 3
    assert artifact.verify(run.merged) == before
    assert not [p for p in run.path.iterdir() if p.name == "other" or ".tmp-" in p.name]


def test_too_little_space_is_told_before_a_byte_is_written(run, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert main(["merge", str(run.path)]) == 4
    assert "1,000 bytes are free, the merge needs" in capsys.readouterr().err
    assert nothing_published(run)


@pytest.mark.parametrize("place", ["a file", "/proc"])
def test_a_place_that_cannot_be_written(run, tmp_path, capsys, place):
    (tmp_path / "a file").write_text("")
    out = (tmp_path / place if place == "a file" else Path(place)) / "merged"
    assert main(["merge", str(run.path), "--out", str(out)]) == 4
    assert capsys.readouterr().err.count("error:") == 1
    assert nothing_published(run)


def test_a_base_that_changes_while_it_is_merged(run, tmp_path, small_base, monkeypatch, capsys):
    base = shutil.copytree(small_base, tmp_path / "base")
    config = run.config_file.read_text().replace(str(small_base), str(base))
    run.config_file.write_text(config)
    right = merging.write_merged

    def changed(plan, *rest):
        flip_bit(base / "model.safetensors", 0.99)
        return right(plan, *rest)

    monkeypatch.setattr(merging, "write_merged", changed)
    assert main(["merge", str(run.path)]) == 3
    assert "changed while it was merged; nothing is published" in capsys.readouterr().err
    assert nothing_published(run)


def test_a_merged_folder_is_no_base_for_the_same_adapter(run, tmp_path, small_base):
    """Even where base and fingerprint were made to fit by hand."""
    merge(run)
    merged = shutil.move(run.merged, tmp_path / "merged")
    (run.path / "merge.json").unlink()
    config = run.config_file.read_text().replace(str(small_base), str(merged))
    run.config_file.write_text(config)
    with pytest.raises(CheckFailed, match="this adapter is merged into it already"):
        merge(run)
    from finetune.model import find_base

    republish(run.adapter, base_fingerprint=find_base(run.config(), run.path).fingerprint())
    with pytest.raises(CheckFailed, match="this adapter is merged into it already"):
        merge(run)
    assert nothing_published(run)


def test_a_manifest_says_what_was_merged(run):
    merge(run)
    facts = artifact.verify(run.merged)["facts"]
    assert facts["merged_adapters"] == [facts["adapter_sha256"]]
    assert (facts["kind"], facts["base_weights"], facts["tied"]) == ("merged", "full", True)


def test_a_plan_writes_nothing(run, capsys):
    assert main(["merge", str(run.path), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tied"], plan["dtype"], len(plan["tensors"])) == (True, "float32", 20)
    (line,) = [t for t in plan["tensors"] if t["name"].endswith("layers.1.mlp.up_proj.weight")]
    assert [part.rpartition("up_proj.")[2] for part in line["adapter"]] == [
        "lora_A.weight",
        "lora_B.weight",
    ]
    assert nothing_published(run)
