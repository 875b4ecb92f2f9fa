"""Templates of a base are never rendered by us, and templates in rows are text like any other."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest
from jinja2.exceptions import TemplateError
from small_runs import write_rows
from transformers import AutoTokenizer

from finetune import merge

SSTI = (
    "{{ 1336 + 1 }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ namespace.__init__.__globals__['sys'].modules['os'].system('touch CANARY') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{{ '%s' | format(messages) | attr('__class__') }}",
    "{{ messages | attr('__class__') | attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ raise_exception.__globals__ }}{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{% for key in messages.__init__.__globals__ %}{{ key }}{% endfor %}",
    "${1336 + 1} #{1336 + 1} <%= 1336 + 1 %> {1336 + 1}",
)
NEVER_ENDS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def folder(small_base, tmp_path):
    return shutil.copytree(small_base, tmp_path / "base")


def set_template(folder, text: str, place: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(text)
    else:
        settings["chat_template"] = text
    path.write_text(json.dumps(settings))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", ["jinja", "settings"])
@pytest.mark.parametrize("text", [NEVER_ENDS, "{{ raise_exception('rendered') }}", "{% not a one"])
def test_a_bases_template_is_never_rendered(bench, folder, ended, place, text):
    set_template(folder, text, place)
    run = bench.train(f"base.path={folder}", "train.max_steps=1")
    if text == NEVER_ENDS:
        merge.merge(run)
        ended(0, "eval", run.path, "--against", "merged")
        ended(0, "generate", run.path, "--prompt", "x", "--max-new-tokens", "2")


@pytest.mark.parametrize("text", SSTI)
def test_where_transformers_renders_it_a_template_has_no_way_out(
    small_base, folder, canary, monkeypatch, text
):
    monkeypatch.chdir(folder)
    set_template(folder, text.replace("CANARY", str(canary.path)), "jinja")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except (TemplateError, TypeError, ValueError, AttributeError):
        return
    assert "root:" not in shown and "__builtins__" not in shown and "<class" not in shown


def test_in_a_row_it_stays_text(bench, canary, ended, capsys):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
        for text in (text.replace("CANARY", str(canary.path)) for text in SSTI)
    ]
    write_rows(bench.train_file, rows)
    settings = (bench.config_file, "data.max_length=512", "train.max_steps=1")
    pages = [bench.folder / "data.html", bench.folder / "preview.html"]
    ended(0, "train", *settings)
    ended(0, "data", *settings, "--html", pages[0])
    ended(0, "preview", *settings, "--rows", len(rows), "--html", pages[1])
    shown = html.unescape(re.sub("<[^>]*>", "", pages[1].read_text()))
    assert "1336 + 1" in shown
    for page in pages:
        assert "1337" not in page.read_text() and "&lt;class" not in page.read_text()
