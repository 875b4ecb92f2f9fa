"""A merge: the numbers of base and adapter in one folder, proven, or nothing at all."""

from __future__ import annotations

import json
import shutil

import pytest
import tolerances
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_runs import Bench, adapter_tensors, flip_bit, republish, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune import artifact
from finetune.__main__ import main
from finetune.errors import CheckFailed, InputError
from finetune.merge import merge
from finetune.merging import writing
from finetune.merging.update import LowRank
from finetune.model import weight_files
from finetune.run_folder import RunFolder

IDS = torch.arange(3, 100).unsqueeze(0)


def plain(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def tensors(folder):
    """All weights of a folder, from one file or many."""
    return {name: t for path in weight_files(folder) for name, t in load_file(path).items()}


def merged_by_hand(base, run, scale):
    """W + s·B·A in float64 from the files alone; other tensors as they are."""
    adapter = {n.removeprefix("base_model.model."): t for n, t in adapter_tensors(run).items()}
    expected = tensors(base)
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            a, b = adapter[name].double(), adapter[f"{module}.lora_B.weight"].double()
            expected[f"{module}.weight"] = expected[f"{module}.weight"].double() + scale * b @ a
    return expected


def untimed(result):
    """What merge.json says, without the seconds it took."""
    return {
        key: untimed(value) if isinstance(value, dict) else value
        for key, value in result.items()
        if key != "seconds"
    }


@pytest.fixture(scope="module")
def make(tmp_path_factory, small_base):
    """`make("base.dtype=bfloat16")`: a finished run of these settings, trained once."""
    made = {}

    def build(*settings, base=small_base) -> RunFolder:
        key = (settings, base)
        if key not in made:
            made[key] = Bench(tmp_path_factory.mktemp("run"), base).train(*settings)
        return made[key]

    return build


@pytest.fixture
def copy(make, tmp_path):
    """A copy of such a run, to be merged or spoiled."""

    def build(*settings, **base) -> RunFolder:
        return RunFolder(shutil.copytree(make(*settings, **base).path, tmp_path / "copy"))

    return build


class TestNumbers:
    @pytest.mark.parametrize("kind", ["tied", "untied", "sharded", "rslora", "few targets"])
    def test_plain_transformers_gives_the_logits_of_base_and_adapter(
        self, copy, tmp_path, small_base, untied_base, kind
    ):
        base, settings, scale = small_base, (), 8 / 4
        if kind == "untied":
            base = untied_base
        if kind == "sharded":
            base = write_base(tmp_path / "sharded", "llama3-8b", seed=2, max_shard_size="700KB")
        if kind == "rslora":
            settings, scale = ("adapter.use_rslora=true",), 8 / 2
        if kind == "few targets":
            settings = ("adapter.target_modules=[k_proj, down_proj]",)
        run = copy(*settings, base=base)
        result = merge(run)
        attached = PeftModel.from_pretrained(plain(base), run.adapter).eval()
        merged = plain(run.merged)
        assert (logits(merged) - logits(attached)).abs().max() <= tolerances.MERGED_LOGITS_FLOAT32
        assert (logits(merged) - logits(plain(base))).abs().max() > 0.1, "it was trained"
        assert merged.config.tie_word_embeddings == (base == small_base or kind == "rslora")
        expected, found = merged_by_hand(base, run, scale), tensors(run.merged)
        assert set(found) == set(tensors(base))
        for name, weight in expected.items():
            if weight.dtype == torch.float64:
                worst = (found[name] - weight).abs().max() / weight.abs().max()
                assert worst < 1e-6, name
            else:
                assert torch.equal(found[name], weight), name
        changed = [n for n, w in tensors(base).items() if not torch.equal(found[n], w)]
        assert len(changed) == result["matrices"] == (4 if kind == "few targets" else 14)
        names = [path.name for path in weight_files(run.merged)]
        assert names == [path.name for path in weight_files(base)]
        assert (len(names) > 2) == (kind == "sharded")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_low_precision_base_is_merged_in_float32_and_rounded_once(
        self, copy, small_base, dtype
    ):
        run = copy(f"base.dtype={dtype}")
        merge(run)
        found, type_ = tensors(run.merged), getattr(torch, dtype)
        rounded = {n: t.to(type_) for n, t in tensors(small_base).items()}
        for name, weight in merged_by_hand(small_base, run, 0.0).items():
            assert found[name].dtype == type_
            if weight.dtype != torch.float64:
                assert torch.equal(found[name], rounded[name]), name
        adapter = {n.removeprefix("base_model.model."): t for n, t in adapter_tensors(run).items()}
        for module in {n.rpartition(".lora_")[0] for n in adapter}:
            update = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
            expected = (rounded[f"{module}.weight"].double() + 2 * update.double()).to(type_)
            share = (found[f"{module}.weight"] != expected).double().mean()
            assert share < 1e-3, "but for ties of rounding, the nearest number of the type"
        attached = PeftModel.from_pretrained(plain(small_base, dtype=type_), run.adapter).eval()
        p, q = logits(attached).log_softmax(-1), logits(plain(run.merged)).log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < tolerances.MERGED_KL_LOW_PRECISION
        assert plain(run.merged).dtype == type_

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_another_type_and_another_place(self, copy, tmp_path, dtype):
        run, out = copy(), tmp_path / "elsewhere" / "model"
        result = merge(run, out, dtype)
        assert (result["dtype"], run.merged.exists()) == (dtype, False)
        assert {t.dtype for t in tensors(out).values()} == {getattr(torch, dtype)}
        settings = json.loads((out / "config.json").read_text())
        assert settings["dtype"] == dtype
        assert artifact.findings_of(out) == []
        assert plain(out).dtype == getattr(torch, dtype)

    def test_a_low_precision_base_may_be_merged_into_float32(self, copy, small_base):
        """The base is the one trained on: rounded to bfloat16 first."""
        run = copy("base.dtype=bfloat16")
        merge(run, dtype="float32")
        found = tensors(run.merged)
        name = "model.embed_tokens.weight"
        assert torch.equal(found[name], tensors(small_base)[name].bfloat16().float())

    def test_a_quantized_run_may_be_merged_into_its_unquantized_base(self, copy, small_base):
        pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
        run = copy("base.quantization=nf4")
        result = merge(run, target="full")
        assert 0 < result["proof"]["kl_from_quantized"] < 0.5
        for name, weight in merged_by_hand(small_base, run, 8 / 4).items():
            torch.testing.assert_close(
                tensors(run.merged)[name].double(), weight.double(), rtol=0, atol=1e-6
            )


class TestFolder:
    def test_other_tools_find_what_they_need(self, copy):
        run = copy()
        merge(run)
        tokenizer = AutoTokenizer.from_pretrained(run.merged)
        messages = [{"role": "user", "content": "Add 2 and 3."}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        from finetune.inference import open_folder

        base = open_folder(run.merged, run.config()).base
        assert ids == base.chat_format.prompt(base.tokenizer, messages)
        settings = GenerationConfig.from_pretrained(run.merged)
        assert (settings.eos_token_id, settings.do_sample) == (2, False)
        merged = plain(run.merged)
        assert merged.config.rope_parameters["rope_type"] == "llama3"

    def test_the_proof_is_written_beside_it(self, copy):
        run = copy()
        result = merge(run)
        assert json.loads((run.path / "merge.json").read_text()) == result
        proof = result["proof"]
        assert proof["rows"] == proof["prompts"] == proof["same_text"] == 9
        assert 0 < proof["max_logit_difference"] < 1e-4
        assert proof["kl"] < 1e-9
        facts = artifact.verify(run.merged)["facts"]
        assert facts["adapter_sha256"] == artifact.sha256_of(
            run.adapter / "adapter_model.safetensors"
        )

    def test_merging_twice_changes_nothing(self, copy):
        run = copy()
        first = merge(run)
        before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.path.rglob("*")}
        assert merge(run) == first
        assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.path.rglob("*")} == before

    def test_another_merge_in_its_place_is_refused(self, copy):
        run = copy()
        merge(run)
        with pytest.raises(InputError, match="holds another merge"):
            merge(run, dtype="bfloat16")

    def test_two_merges_side_by_side_keep_their_own_numbers(self, copy):
        run = copy()
        exact = merge(run)
        rounded = merge(run, run.path / "merged-bf16", "bfloat16")
        assert exact["dtype"] != rounded["dtype"]
        assert untimed(merge(run)) == untimed(exact)
        again = merge(run, run.path / "merged-bf16", "bfloat16")
        assert untimed(again) == untimed(rounded)

    def test_a_lost_proof_is_made_again(self, copy):
        """Killed between the folder's rename and the writing of merge.json."""
        run = copy()
        first = merge(run)
        (run.path / "merge.json").unlink()
        assert untimed(merge(run)) == untimed(first)
        assert untimed(json.loads((run.path / "merge.json").read_text())) == untimed(first)

    def test_a_damaged_merge_is_not_taken_for_one(self, copy):
        run = copy()
        merge(run)
        flip_bit(run.merged / "model.safetensors")
        with pytest.raises(CheckFailed, match="model.safetensors"):
            merge(run)

    def test_a_folder_of_someone_elses_is_left_alone(self, copy, tmp_path):
        out = tmp_path / "mine"
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        with pytest.raises((InputError, CheckFailed), match="mine"):
            merge(copy(), out)
        assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def published(run):
    """What a refused merge may not leave."""
    return [p for p in run.path.rglob("*") if "merge" in p.name or ".tmp-" in p.name]


class TestWhatIsRefused:
    def test_a_run_that_is_not_trained(self, bench):
        from finetune.run_folder import open_run

        with pytest.raises(InputError, match="not trained yet"):
            merge(open_run(bench.load()))

    def test_full_weights(self, bench):
        run = bench.train("adapter={method: none}", "train.max_steps=1")
        with pytest.raises(InputError, match="trained its full weights; they are in model/"):
            merge(run)

    def test_a_base_that_changed(self, copy, tmp_path, small_base):
        base = shutil.copytree(small_base, tmp_path / "base")
        run = copy(base=base)
        flip_bit(base / "model.safetensors", 0.99)
        with pytest.raises(CheckFailed, match="its base has changed since training"):
            merge(run)
        assert published(run) == []

    def test_a_damaged_adapter(self, copy):
        run = copy()
        flip_bit(run.adapter / "adapter_model.safetensors")
        with pytest.raises(CheckFailed, match="adapter_model.safetensors"):
            merge(run)

    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (lambda t: dict(sorted(t.items())[:-1]), "not pairs of lora_A and lora_B"),
            (lambda t: {}, "empty"),
            (lambda t: dict(sorted(t.items())[:-2]), "adapter keys missing"),
            (lambda t: {n.replace("layers.1", "layers.7"): v for n, v in t.items()}, "no such"),
            (lambda t: {n: v.T.contiguous() for n, v in t.items()}, "B·A is"),
        ],
    )
    def test_an_adapter_that_does_not_fit(self, copy, edit, match):
        run = copy()
        weights = run.adapter / "adapter_model.safetensors"
        save_file(edit(load_file(weights)), weights, {"format": "pt"})
        republish(run.adapter)
        with pytest.raises(CheckFailed, match=match):
            merge(run)
        assert published(run) == []

    def test_the_command_line_says_so_in_one_message(self, copy, capsys, small_base):
        run = copy()
        flip_bit(run.adapter / "adapter_model.safetensors")
        assert main(["merge", str(run.path)]) == 3
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("error:") == 1
        assert "Traceback" not in captured.err

    def test_the_command_line_prints_the_proof(self, copy, capsys):
        run = copy()
        assert main(["merge", str(run.path), "--json", "--dtype", "bfloat16"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == json.loads((run.path / "merge.json").read_text())
        assert "14 matrices, bfloat16; logits differ by" in captured.err


class TestProof:
    """A merge that is wrong in one place is not published, whatever the type of its weights."""

    MUTATIONS = {
        "no scale": lambda u, w: w.float() + u.b @ u.a,
        "scale twice": lambda u, w: w.float() + u.scale**2 * u.b @ u.a,
        "scale off by a tenth": lambda u, w: w.float() + 1.1 * u.scale * u.b @ u.a,
        "negated": lambda u, w: w.float() - u.scale * u.b @ u.a,
        "B is zero": lambda u, w: w.float(),
        "B is flipped": lambda u, w: w.float() + u.scale * u.b.flip(0) @ u.a,
        "A is flipped": lambda u, w: w.float() + u.scale * u.b @ u.a.flip(1),
        "not a number": lambda u, w: w.float() * float("nan"),
    }

    @pytest.fixture(params=["float32", "bfloat16", "float16", "float32 to bfloat16"])
    def types(self, request):
        """(type trained in, type merged to)."""
        first, _, second = request.param.partition(" to ")
        return first, second or first

    def refused(self, run, dtype, capsys):
        assert main(["merge", str(run.path), "--dtype", dtype]) == 3
        assert "the merge proof failed, nothing is published" in capsys.readouterr().err
        assert published(run) == []

    @pytest.mark.parametrize("name", MUTATIONS)
    def test_every_matrix_is_wrong(self, copy, types, monkeypatch, capsys, name):
        """Where updates are small, most entries of a low precision round to what they were."""
        run = copy(f"base.dtype={types[0]}", "train.learning_rate=1e-4")
        wrong = self.MUTATIONS[name]
        monkeypatch.setattr(LowRank, "apply", lambda u, w, dtype: wrong(u, w).to(dtype))
        self.refused(run, types[1], capsys)

    @pytest.mark.parametrize("name", ["B is zero", "scale twice"])
    def test_one_matrix_is_wrong(self, copy, types, monkeypatch, capsys, name):
        run = copy(f"base.dtype={types[0]}")
        shape, right = (128, 512), LowRank.apply
        seen = []

        def apply(update, weight, dtype):
            if tuple(weight.shape) == shape and not seen:  # the first down_proj
                seen.append(shape)
                return self.MUTATIONS[name](update, weight).to(dtype)
            return right(update, weight, dtype)

        monkeypatch.setattr(LowRank, "apply", apply)
        self.refused(run, types[1], capsys)
        assert seen

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
    def test_a_tensor_without_an_adapter_is_changed(self, copy, types, monkeypatch, capsys, name):
        """One row of the embedding that no held-out row uses, too."""
        run = copy(f"base.dtype={types[0]}")
        right = writing.merged_pieces

        def pieces(plan, reading, tensor):
            for piece in right(plan, reading, tensor):
                if tensor.stored.name == name:
                    piece = piece.clone()
                    piece[-1] *= 1.1
                yield piece

        monkeypatch.setattr(writing, "merged_pieces", pieces)
        self.refused(run, types[1], capsys)

    def test_a_long_training_with_small_updates_is_proven_too(self, copy):
        """Updates far below a bfloat16 step leave most entries as they were: that is right."""
        run = copy("base.dtype=bfloat16", "train.learning_rate=1e-5")
        proof = merge(run)["proof"]
        assert proof["dtype"] == "bfloat16"
        assert 0.4 < proof["max_weight_error_ulps"] <= 0.5001
