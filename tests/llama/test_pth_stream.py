"""Files written tensor by tensor: torch.save's in content, loadable as such, bounded in memory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_tokenizers import tiktoken_model

from finetune.errors import InputError
from finetune.llama import architecture as a
from finetune.llama import meta_export, meta_format
from finetune.llama.meta_checkpoint import check_intact
from finetune.llama.meta_layout import weights_of
from finetune.llama.pth_stream import pth_file
from finetune.llama.safetensors_stream import DTYPES, Planned, dtype_name

ROOT = Path(__file__).parents[2]


def random_state(dtype: str) -> dict[str, torch.Tensor]:
    """Matrices of odd sizes, a vector, a slice, a transposed view; a name beyond ASCII."""
    torch.manual_seed(0)
    whole = torch.randn(31, 17, dtype=torch.float64).to(getattr(torch, dtype))
    views = {"slice": whole[3:9], "transposed": whole.T, "norm": whole[0, :5], "naïve": whole}
    return {**views, **{f"layers.{n}.w": whole[: n + 1].clone() for n in range(12)}}


def write(path: Path, state: dict[str, torch.Tensor]) -> None:
    plan = [Planned(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in state.items()]
    with pth_file(path, plan) as append:
        for tensor in state.values():
            append(tensor)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_records_are_those_of_torch_save(dtype, tmp_path):
    state = {name: t.contiguous().clone() for name, t in random_state(dtype).items()}
    write(tmp_path / "ours.pth", state)
    with (tmp_path / "theirs.pth").open("wb") as file:  # a name would name the archive's folder
        torch.save(state, file)
    ours, theirs = records(tmp_path / "ours.pth"), records(tmp_path / "theirs.pth")
    assert theirs.keys() - ours.keys() == {"archive/.data/serialization_id"}
    assert ours == {name: theirs.get(name) for name in ours}


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert {record.compress_type for record in archive.infolist()} == {zipfile.ZIP_STORED}
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("mmap", [True, False])
def test_plain_torch_loads_it(mmap, tmp_path):
    state, path = random_state("bfloat16"), tmp_path / "consolidated.00.é.pth"
    write(path, state)
    check_intact([path])
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
        assert loaded[name].is_contiguous() and loaded[name].data_ptr() % 64 == 0, name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error(tmp_path):
    """torch's own writer ends the process here, when it is cleaned up."""
    (tmp_path / "a.pth").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.pth", {"x": torch.ones(300_000)})


def test_what_was_planned_is_what_is_written(tmp_path):
    plan = [Planned("x", "float32", (2, 3)), Planned("y", "float32", (2,))]
    with pytest.raises(AssertionError), pth_file(tmp_path / "a.pth", plan) as append:
        append(torch.zeros(3, 2))
    with pytest.raises(AssertionError), pth_file(tmp_path / "b.pth", plan) as append:
        append(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(AssertionError), pth_file(tmp_path / "c.pth", plan) as append:
        append(torch.zeros(2, 3))


# --- the export that uses it


def hf_folder(folder: Path, arch: a.Architecture) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    tensors = {w.hf: torch.randn(w.shape).bfloat16() for w in weights_of(arch)}
    save_file(tensors, folder / "model.safetensors")
    a.to_llama_config(arch, "bfloat16").save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiktoken_model(arch.vocab_size))
    return folder


def test_every_weight_is_read_once_for_all_shards(tmp_path, monkeypatch):
    arch = a.scaled_down(a.PRESETS["llama3.1-8b"], 512)
    folder, read = hf_folder(tmp_path / "hf", arch), []
    whole = meta_export._in_metas_order
    monkeypatch.setattr(
        meta_export, "_in_metas_order", lambda *given: read.append(given[1].name) or whole(*given)
    )
    meta_format.export_checkpoint(folder, tmp_path / "meta", 4)
    assert sorted(read) == sorted(weight.hf for weight in weights_of(arch))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    arch = a.scaled_down(a.PRESETS["llama3.1-8b"], 512)
    folder = hf_folder(tmp_path / "hf", arch)
    weights = {w.hf: torch.zeros(w.shape) for w in weights_of(arch)}
    for changed in (torch.zeros(3), torch.zeros(arch.dim, dtype=torch.int8)):
        save_file(weights | {"model.norm.weight": changed}, folder / "model.safetensors")
        with pytest.raises(InputError, match=r"model\.norm\.weight is (\(3,\), config|I8; known)"):
            meta_format.export_checkpoint(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


GROWTH = """
import sys
from pathlib import Path
import torch, safetensors, transformers
from finetune.llama import meta_format, tokenizer

def mib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / (1 << 10)

source, meta, back = map(Path, sys.argv[1:])
tokenizer.load_tokenizer(source / "tokenizer.model", model_folder=source)
before = mib("VmRSS")
meta_format.export_checkpoint(source, meta)
after_export = mib("VmHWM")
meta_format.import_checkpoint(meta, back, max_file_bytes=20_000_000)
print(after_export - before, mib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    spec = {"dim": 1024, "n_layers": 12, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512}
    spec |= {"norm_eps": 1e-5, "multiple_of": 256, "rope_theta": 10000.0, "context": 512}
    source = hf_folder(tmp_path / "hf", a.architecture_of(spec))
    mib = (source / "model.safetensors").stat().st_size / (1 << 20)
    command = [sys.executable, "-c", GROWTH, source, tmp_path / "meta", tmp_path / "back"]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    growth_of_export, growth = map(float, run.stdout.split())
    assert mib > 250
    assert growth_of_export < mib / 3
    assert growth < mib / 2  # with what transformers and torch keep of their own
