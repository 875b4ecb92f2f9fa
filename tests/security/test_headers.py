"""Safetensors headers as somebody would write them who means harm.

What the house's own readers, and the base loader, make of each: an error of the house, or the right
values; never another exception, a hang, or memory for what a header only claims.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import same_bits

from finetune.__main__ import main
from finetune.errors import FinetuneError, InputError
from finetune.llama.architecture import from_llama_config
from finetune.llama.meta_layout import weights_of
from finetune.llama.safetensors_pieces import HashedReading, stored_tensors
from finetune.llama.stored_weights import stored_weights
from finetune.model import find_base, load_model

CASES_PER_KIND = 400
DTYPES = ["F64", "F32", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "", "F32 ", None, 3]
NUMBERS = [-1, 0, 1, 2, 7, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 0.5]
VALUES = [*NUMBERS, None, True, "x", "", [], {}, [0, 4], [4, 0], [[0]], float("nan")]
TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor(2.0, dtype=torch.float64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path.read_bytes()


def parts(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def flipped(draw, content):
    """Some bits of the length or the header are others."""
    changed = bytearray(content)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(draw.randint(1, 3)):
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(draw, content):
    """The file ends early, or goes on."""
    if draw.random() < 0.2:
        return content + draw.randbytes(draw.randint(1, 64))
    return content[: draw.randrange(len(content))]


def of_another_length(draw, content):
    """The header says that it is longer or shorter than it is."""
    header, body = parts(content)
    length = draw.choice([draw.getrandbits(64), draw.getrandbits(40), draw.randrange(600)])
    return joined(header, body, length)


def with_another_entry(draw, content):
    """A type, a shape, offsets or a whole entry that cannot be."""
    header, body = parts(content)
    entry = header[draw.choice(list(TENSORS))]
    key = draw.choice(["dtype", "shape", "data_offsets", "more"])
    if key == "dtype":
        entry[key] = draw.choice(DTYPES)
    elif key == "more" or draw.random() < 0.3:
        entry[key] = draw.choice(VALUES)
    else:
        old = entry[key] or [0, 0]
        entry[key] = [draw.choice([number, *NUMBERS]) for number in old]
    if draw.random() < 0.2:
        header[draw.choice(list(TENSORS))] = draw.choice(VALUES)
    return joined(header, body)


def with_other_names(draw, content):
    """Names twice, overlapping or missing tensors, metadata that is none, another document."""
    header, body = parts(content)
    one, other = draw.sample(list(TENSORS), 2)
    kind = draw.randrange(6)
    if kind == 0:
        return joined(json.dumps(header).replace(f'"{one}"', f'"{other}"').encode(), body)
    if kind == 1:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 2:
        del header[one]
    elif kind == 3:
        header["__metadata__"] = draw.choice(VALUES)
    elif kind == 4:
        header[draw.choice(["\0", "../x", "x" * 70_000, "\ud800"])] = header.pop(one)
    else:
        return joined(draw.choice([b"[" * 50_000, b"[]", b"null", b"\xff" * 9, b"{}", b""]), body)
    return joined(header, body)


KINDS = [flipped, cut, of_another_length, with_another_entry, with_other_names]


def read_by_us(path) -> dict[str, torch.Tensor]:
    """Every tensor through both of the house's ways of reading, which agree."""
    found = {stored.name: stored.read() for stored in stored_tensors(path)}
    with HashedReading(path) as reading:
        again = {stored.name: reading.tensor(stored) for stored in stored_tensors(path)}
        reading.finish()
    assert list(found) == list(again)
    assert same_bits(bits_of(found), bits_of(again))
    return found


def bits_of(tensors):
    """Their bytes: a number that is none is equal to itself."""
    return {n: t.reshape(-1).contiguous().view(torch.uint8) for n, t in tensors.items()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_header_is_refused_or_read_as_the_library_reads_it(kind, good, tmp_path):
    draw, path = random.Random(kind.__name__), tmp_path / "model.safetensors"
    refused, begun = 0, time.monotonic()
    tracemalloc.start()
    for number in range(CASES_PER_KIND):
        path.write_bytes(kind(draw, good))
        try:
            found = read_by_us(path)
        except FinetuneError as error:
            refused += str(path) in str(error)
            continue
        expected = load_file(path)
        assert found.keys() == expected.keys(), number
        assert all(found[name].shape == expected[name].shape for name in found)
        assert same_bits(bits_of(found), bits_of(expected)), number
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > CASES_PER_KIND // 4
    assert peak < 30 << 20
    assert time.monotonic() - begun < 60


def test_the_good_file_is_read(good, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(good)
    assert same_bits(read_by_us(path), TENSORS)


class TestBase:
    """A whole folder through the loader that training uses."""

    @pytest.fixture
    def folder(self, small_base, tmp_path):
        return shutil.copytree(small_base, tmp_path / "base")

    def load(self, bench, folder):
        config = bench.load(f"base.path={folder}").config
        base = find_base(config, bench.folder / "run")
        return load_model(base, config.base, torch.device("cpu"))

    def test_a_spoilt_header_is_refused_or_the_same_model(self, bench, folder):
        whole = {n: p.clone() for n, p in self.load(bench, folder).named_parameters()}
        path, draw, refused = folder / "model.safetensors", random.Random(4), 0
        content = path.read_bytes()
        for number in range(40):
            path.write_bytes((flipped, cut, of_another_length)[number % 3](draw, content))
            try:
                assert same_bits(dict(self.load(bench, folder).named_parameters()), whole)
            except FinetuneError as error:
                refused += str(folder) in str(error)
        assert refused > 30

    def test_the_export_reads_shapes_from_the_header_alone(self, folder):
        arch = from_llama_config(json.loads((folder / "config.json").read_text()))
        path, draw, refused = folder / "model.safetensors", random.Random(5), 0
        content = path.read_bytes()
        for _ in range(60):
            path.write_bytes(flipped(draw, content))
            try:
                stored = stored_weights(folder, arch, weights_of(arch))
                assert all(one.weight.shape == one.read().shape for one in stored)
            except InputError:
                refused += 1
        assert refused > 30

    @pytest.mark.parametrize(
        "claim",
        [
            {"num_hidden_layers": 10**9},
            {"vocab_size": 10**12},
            {"intermediate_size": 1 << 50},
            {"hidden_size": 1 << 40, "head_dim": 1 << 37},
        ],
    )
    def test_a_size_that_no_file_has_is_refused_at_once(self, bench, folder, claim):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | claim))
        begun = time.monotonic()
        with pytest.raises(InputError, match="the weight files hold"):
            self.load(bench, folder)
        assert time.monotonic() - begun < 5

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_base_with_a_weight_that_is_no_number_trains_nothing(
        self, bench, folder, value, capsys
    ):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][3, 4] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert main(["train", str(bench.config_file), f"base.path={folder}"]) == 4
        said = capsys.readouterr().err
        assert said.count("error:") == 1 and "nan" in said
        assert not bench.run_folder().adapter.exists()
