"""The page: every section, nothing from outside, every text a text, no place of this machine."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest
from page_reader import IN_REPORTS, read_page
from reported import rows_of, section, write_result

from finetune.__main__ import main as command
from finetune.reports.facts import read_facts

SECTIONS = ["curves", "comparison", "samples", "masks", "data", "merge", "config", "environment"]
HOSTILE = [
    '"><img src=x onerror="alert(1)">',
    "</script><script>alert(1)</script></style>&amp;</div>",
    "url(http://example.org/x) @import 'x'; {{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x1b]0;title\x07 \u202ebidi",
    "",
    "x" * 5000,
]


def test_every_section_is_there_in_order_after_the_verdict(whole, report):
    page, found = report(whole)
    assert [s.attributes["id"] for s in page.all("section")] == SECTIONS
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert ids.index("verdict") < ids.index("curves")
    assert {a.attributes["href"][1:] for a in page.all("a")} == set(SECTIONS)
    assert found["state"] == "finished"
    assert found["bytes"] < 2_000_000
    assert Path(found["report"]) == whole.path / "report.html"
    headline = section(page, "verdict").all("h2")[0].text
    assert found["verdict"].startswith(headline)


def test_the_page_says_again_what_the_command_line_says(whole, report, capsys):
    page, found = report(whole)
    assert command(["report", str(whole.path)]) == 0
    printed = capsys.readouterr().out
    for sentence in (p.text for p in section(page, "verdict").all("p")):
        plain = sentence.replace("\u00a0", " ").strip()
        assert plain.removeprefix("Not known: ") in printed.replace("`", "")
    assert f"({found['bytes'] / 1000:,.0f} kB)" in printed


def test_the_same_run_gives_the_same_bytes(whole, tmp_path):
    files = [tmp_path / name for name in ("one.html", "two.html")]
    for file in files:
        assert command(["report", str(whole.path), "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_texts_of_rows_stay_texts(run, report):
    def lines(model):
        return [
            {
                "where": f"{text[:30]}:{i}",
                "prompt": text,
                "expected": [text],
                "written": text + model,
            }
            | {"score": float(model == "adapter")}
            for i, text in enumerate(HOSTILE)
        ]

    changed = [{"where": HOSTILE[0], "loss": 1.0, "loss_of_other": 2.0}]
    group = {HOSTILE[0]: {HOSTILE[1]: [1, 2]}}
    write_result(
        run,
        {name: lines(name) for name in ("adapter", "base")},
        compared={"base": {"most_changed": changed, HOSTILE[1]: {"difference": 0.5}}},
        by_source={HOSTILE[0]: {"loss": 1.0}, HOSTILE[1]: {"loss": 2.0}},
        exact_match=1.0,
        groups=group,
        data=HOSTILE[1],
        created=HOSTILE[0],
    )
    ledger = json.loads((run.path / "data.json").read_text())
    ledger["train"]["dropped"] = {HOSTILE[0]: [HOSTILE[1]]}
    ledger["train"]["notes"].append(HOSTILE[1])
    (run.path / "data.json").write_text(json.dumps(ledger))
    run.write_state(state="failed", exit_code=4, reason=HOSTILE[1])
    page, _ = report(run)  # read_page refuses what is not the template's own
    texts = [e.text for e in section(page, "samples").all(with_class="text")]
    assert HOSTILE[0] in texts
    assert "<U+001B>[31mred" in "".join(texts)
    assert max(text.count("x") for text in texts) == 1500
    assert "… and 3,500 characters more" in section(page, "samples").text
    assert HOSTILE[0] in section(page, "comparison").text


def test_a_run_may_have_any_name(run, report):
    renamed = run.path.rename(run.path.with_name("<b> & 'x'"))
    page, _ = report(type(run)(renamed))
    assert page.all("h1")[0].text == "<b> & 'x'"


def test_no_place_of_this_machine_and_no_secret_is_in_the_page(run, report, tmp_path, monkeypatch):
    secret = "hf_" + "aB3" * 10
    run.write_state(
        state="failed",
        exit_code=4,
        reason=f"[Errno 28] '/home/jane doe/deep/x.bin', see ../other/{run.path}/y; {secret}",
    )
    with run.metrics.open("a") as file:
        file.write(
            json.dumps({"step": 12, "loss": 1.0, "spikes": [f"/home/jane/deep/x.txt {secret}"]})
            + "\n"
        )
    _, found = report(run, "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    for hidden in (str(tmp_path), str(run.path.parent), "/tmp", "jane", secret, str(Path.home())):
        assert hidden not in page.replace("</tmp", ""), hidden
        assert hidden == str(tmp_path) or hidden not in found["verdict"]
    assert socket.gethostname() not in page
    assert getpass.getuser() == "root" or getpass.getuser() not in page
    assert "…/train.jsonl:1" in page
    assert "…/x.bin" in page and "[a secret, left out]" in page


def test_samples_are_chosen_by_rule(run, report):
    rows = range(60)
    right = {"adapter": lambda i: i % 2 == 0, "base": lambda i: i % 3 == 0}
    right["merged"] = right["adapter"]

    def lines(model):
        return [
            {"where": f"rows.jsonl:{i}", "prompt": f"question {i}", "expected": [f"yes {i}"]}
            | {"written": f"yes {i}" if right[model](i) else f"no {i}"}
            | {"score": float(right[model](i))}
            for i in rows
        ]

    answers = {name: lines(name) for name in right}
    answers["merged"][0]["written"] = "another"
    write_result(run, answers)
    page, _ = report(run)
    part = section(page, "samples")
    shown = [
        (article.all(with_class="badge")[0].text, int(article.all(with_class="place")[0].text[11:]))
        for article in part.all("article")
    ]
    assert [place for why, place in shown if why == "one of the first rows"] == [0, 1, 2]
    helped = [place for why, place in shown if why == "adapter right, base wrong"]
    wrong = [place for why, place in shown if why == "adapter wrong"]
    assert len(helped) == len(wrong) == 3
    assert all(i % 2 == 0 and i % 3 for i in helped)
    assert all(i % 2 for i in wrong)
    assert min(wrong) < 20 < 40 < max(wrong)  # over the whole file
    assert "adapter right, base wrong, 20 rows" in part.text  # 2, 4, 8, 10 … of 60
    assert "adapter wrong, 30 rows" in part.text
    models = [[r.text.split()[0] for r in a.all(with_class="role")] for a in part.all("article")]
    assert models[0] == [
        "prompt",
        "expected",
        "base",
        "adapter",
        "merged",
    ]  # it differs there alone
    assert all(names == ["prompt", "expected", "base", "adapter"] for names in models[1:])


def test_masks_are_the_first_training_rows(whole, report):
    from finetune.data import load_data
    from finetune.model import read_tokenizer

    page, _ = report(whole)
    config = whole.config()
    documents = load_data(config, *read_tokenizer(config)).train[:3]
    articles = section(page, "masks").all("article")
    assert len(articles) == 3
    for article, document in zip(articles, documents, strict=True):
        tokens = article.all("b") + article.all("i")
        assert len(tokens) == len(document.input_ids)
        assert len(article.all("b")) == document.num_trained
        ids = {int(t.attributes["title"].split()[1]) for t in article.all("b")}
        assert ids <= set(document.input_ids)


def test_rows_that_are_held_out_are_not_shown_as_trained(bench, report):
    settings = ["data.heldout=[]", "data.heldout_fraction=0.5", "data.max_length=128"]
    run = bench.train(*settings, "train.max_steps=1")
    from finetune.data import load_data
    from finetune.model import read_tokenizer

    page, _ = report(run)
    data = load_data(run.config(), *read_tokenizer(run.config()))
    trained = [f"…/{Path(d.example.where).name}" for d in data.train[:3]]
    places = [a.all(with_class="place")[0].text for a in section(page, "masks").all("article")]
    assert [place.rsplit(": ", 1)[0] for place in places] == trained
    assert trained != [f"…/train.jsonl:{n}" for n in (1, 2, 3)]


def test_data_or_base_that_are_gone_or_changed_are_said(bench, report):
    run = bench.train("train.max_steps=1")
    bench.train_file.write_text(bench.train_file.read_text().replace("?", "??"))
    page, _ = report(run)
    assert "Changed since the run: train.jsonl" in section(page, "masks").text
    bench.train_file.unlink()
    page, _ = report(run)
    part = section(page, "masks")
    assert not part.all("article")
    assert "cannot be shown any more" in part.text and "no such file" in part.text
    text = run.config_file.read_text().replace(str(bench.base), str(bench.base) + "-gone")
    run.config_file.write_text(text)
    page, _ = report(run)
    assert "cannot be shown any more" in section(page, "masks").text


def test_the_config_is_there_with_origins_and_commands(whole, report):
    page, _ = report(whole)
    facts = read_facts(whole)
    rows = rows_of(section(page, "config"))
    assert rows["train.max_steps"] == ["12", "override"]
    assert rows["adapter.r"][0] == "4" and rows["adapter.r"][1].startswith("…/small.yaml:")
    assert rows["train.max_grad_norm"][1] == "default"
    assert set(rows) == {s.key for s in facts.settings}
    commands = section(page, "environment").all("pre")[0].text
    assert "python -m finetune train …/small.yaml" in commands.replace("'", "")
    assert "train.max_steps=12" in commands
    assert "--against base,merged" in commands
    assert "torch==" in commands and "+cpu" not in commands


def test_out_names_another_file(whole, tmp_path, capsys):
    assert command(["report", str(whole.path), "--out", str(tmp_path / "a.html")]) == 0
    read_page((tmp_path / "a.html").read_text(), IN_REPORTS)
    for wrong, said in (("a.txt", "ends in .html"), ("none/a.html", "no folder")):
        assert command(["report", str(whole.path), "--out", str(tmp_path / wrong)]) == 2
        assert f"--out {tmp_path / wrong}" in (error := capsys.readouterr().err) and said in error


@pytest.mark.parametrize("name", ["empty", "nowhere", "file"])
def test_what_is_no_run_is_refused(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert command(["report", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is no run with config.yaml" in captured.err
    assert not list(tmp_path.rglob("*.html"))
