"""A whole run without network, home, terminal or a careful umask; nothing of the room leaks."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import ROOT, Bench

from finetune.__main__ import main

SECRETS = {
    "HF_TOKEN": "hf_cAnArYtOkEnAbCdEfGhIjKlMnOpQrStUv",
    "HUGGING_FACE_HUB_TOKEN": "hf_cAnArYsEcOnDtOkEnAbCdEfGhIjKlM",
    "WANDB_API_KEY": "0123canary456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": "cAnArY/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-canary-0123456789abcdef",
    "GITHUB_TOKEN": "ghp_cAnArY0123456789abcdefghijkl",
}
PEOPLE = {name: f"canary-{name.lower()}-nina" for name in ("USER", "LOGNAME", "USERNAME")}
PLACES = {"HOSTNAME": "canary-host-07", "COMPUTERNAME": "canary-host-07"}
FORMATS = ["hf", "peft"] + ["gguf", "ollama", "gguf-lora"] * bool(importlib.util.find_spec("gguf"))
PUBLISHED = ("runs/small/adapter", "runs/small/merged", "exports")


def verbs(run: str) -> list[list[str]]:
    """Train, stopped after its second step; the same again; and all that is done with a run."""
    train = ["train", "small.yaml"]
    of_run = [["eval", run, "--against", "base", "--json"], ["merge", run]]
    of_run += [["export", run, "--format", kind, "--out", f"exports/{kind}"] for kind in FORMATS]
    looks = [["data", "small.yaml", "--html", "data.html"], ["plan", "small.yaml"]]
    looks += [["preview", "small.yaml", "--html", "preview.html"], ["doctor", "--json"]]
    said = ["generate", f"{run}/merged", "--prompt", "Who is there?", "--max-new-tokens", "4"]
    return [train, train, *of_run, *looks, said, ["verify", run], ["verify", "exports/peft"]]


@pytest.fixture(scope="module")
def room(tmp_path_factory, small_base):
    """The folder in which it all happened, with what was said."""
    folder = tmp_path_factory.mktemp("room")
    bench = Bench(folder, small_base)
    shutil.copytree(small_base, folder / "base")
    values = yaml.safe_load(bench.config_file.read_text())
    values["run"]["dir"], values["base"]["path"] = "runs", "base"  # the rows stay absolute
    values["train"]["save_steps"] = 1
    bench.config_file.write_text(yaml.safe_dump(values))
    (folder / "verbs.json").write_text(json.dumps(verbs("runs/small")))
    given = set(folder.rglob("*"))
    command = [sys.executable, str(Path(__file__).with_name("closed_room.py")), str(folder)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/no/home", "OMP_NUM_THREADS": "1"}
    environment |= {"FINETUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment, **SECRETS, **PEOPLE, **PLACES},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    (folder / "stdout").write_bytes(done.stdout)
    (folder / "stderr").write_bytes(done.stderr)
    given |= {folder / "stdout", folder / "stderr", folder / "record.json"}
    written = sorted(set(folder.rglob("*")) - given)
    assert len(written) > 60
    return folder, written


def files_in(room, *parts: str) -> dict[Path, bytes]:
    folder, written = room
    wanted = [folder / part for part in parts]
    return {
        path: path.read_bytes()
        for path in [*written, folder / "stdout", folder / "stderr"]
        if path.is_file() and (not parts or any(place in path.parents for place in wanted))
    }


def test_every_verb_does_its_work(room):
    folder, _ = room
    codes = json.loads((folder / "record.json").read_text())["codes"]
    said = (folder / "stderr").read_text()
    assert codes == [75, *[0] * (len(codes) - 1)], said[-3000:]
    assert "resume   from" in said
    assert b"\x1b" not in b"".join((folder / name).read_bytes() for name in ("stdout", "stderr"))


def test_no_socket_is_asked_for_anything(room):
    assert json.loads((room[0] / "record.json").read_text())["asked"] == []


@pytest.mark.parametrize("name", [*SECRETS, *PEOPLE, *PLACES])
def test_nothing_of_the_environment_is_in_any_byte(room, name):
    wanted = (SECRETS | PEOPLE | PLACES)[name].encode()
    assert [path for path, content in files_in(room).items() if wanted in content] == []


def test_the_host_is_named_nowhere(room):
    host = os.uname().nodename.encode()
    if len(host) < 6:
        pytest.skip("a short name may stand for anything")
    assert [path for path, content in files_in(room).items() if host in content] == []


def test_what_is_published_names_no_place_of_this_machine(room):
    folder, _ = room
    published = files_in(room, *PUBLISHED)
    assert len(published) > 25
    for place in (folder, ROOT, Path(sys.prefix), Path("/proc/no/home")):
        wanted = str(place).encode()
        assert [path for path, content in published.items() if wanted in content] == []


def test_nobody_else_may_write_what_was_written(room):
    _, written = room
    loose = [path for path in written if not path.is_symlink() and path.stat().st_mode & 0o022]
    assert loose == []


def test_nothing_temporary_is_left(room):
    assert [path for path in room[1] if ".tmp" in path.name] == []


def test_nothing_is_pickled(room):
    """A pickle of any protocol above 1 begins with 0x80; torch's files are zips of one."""
    heads = {path: content[:4] for path, content in files_in(room).items()}
    assert [p for p, head in heads.items() if head.startswith((b"\x80", b"PK\x03\x04"))] == []


def test_without_a_home_or_a_cache_one_message_says_what_to_set(bench, monkeypatch, capsys):
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("HOME", "/proc/no/home")
    assert main(["train", str(bench.config_file)]) == 4
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "FINETUNE_CACHE" in said
    assert "Traceback" not in said


class TestSecretsInAConfig:
    """What a person writes there by mistake ends in a message that may be pasted anywhere."""

    SECRET = "hf_cAnArYwRiTtEnByMiStAkE"

    @pytest.mark.parametrize(
        "override",
        [
            "train.hub_token={}",
            "hub_token={}",
            "base.token={}",
            "run.wandb_api_key={}",
            "train.password={}",
            "secrets={{hf: {}}}",
            "train.hub={{name: me, token: {}}}",
            "data.train=[{{path: a.jsonl, auth_token: {}}}]",
            "base.aws={{keys: [{{secret_access_key: {}}}]}}",
        ],
    )
    def test_the_value_is_not_in_the_message(self, bench, capsys, override):
        assert main(["train", str(bench.config_file), override.format(self.SECRET)]) == 2
        said = "".join(capsys.readouterr())
        assert self.SECRET not in said
        assert override.split("=")[0].split(".")[-1] in said, "the key is named"

    def test_neither_is_one_from_the_file(self, bench, capsys):
        text = bench.config_file.read_text() + f"hub_token: {self.SECRET}\n"
        bench.config_file.write_text(text.replace("max_steps: 4", f"hf_token: {self.SECRET}"))
        assert main(["train", str(bench.config_file)]) == 2
        said = "".join(capsys.readouterr())
        assert "hub_token" in said and "hf_token" in said
        assert self.SECRET not in said

    @pytest.mark.parametrize("override", ["train.max_tokens=17", "data.tokenizers=17"])
    def test_other_values_are_shown(self, bench, capsys, override):
        assert main(["train", str(bench.config_file), override]) == 2
        assert "found 17" in capsys.readouterr().err
