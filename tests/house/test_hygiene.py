"""Calls that run foreign code, read pickles or swallow errors have no place in what we ship."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source_files import ROOT, imported_names, package_files

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
RUNS_TEXT = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


def complaints(source: str) -> Iterator[str]:
    """What is wrong with a source, with its line."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{line}: bare except"
        if isinstance(node, ast.Call):
            yield from (f"{line}: {complaint}" for complaint in _of_call(node))
        yield from (f"{line}: {name}" for name in _pickle_names(node))


def _of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if keywords.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code"
    if keywords.get("shell", "False") != "False":
        yield "shell"
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in RUNS_TEXT:
        yield f"calls {name}"


def _pickle_names(node: ast.AST) -> Iterator[str]:
    """Uses of a pickling module; `pickle` itself may be imported for its exceptions alone."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        names = [f"{node.value.id}.{node.attr}"]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        names = [name for name in imported_names(node) if name != "pickle" or _renamed(node)]
    for name in filter(None, names):
        if name.split(".")[0] in PICKLES and not name.endswith("Error"):
            yield name


def _renamed(node: ast.AST) -> bool:
    return any(alias.asname for alias in getattr(node, "names", []))


FILES = package_files() + [
    path for folder in ("benchmarks", "assets") for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_none_of_them(path):
    assert list(complaints(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "subprocess.run('ls', shell=True)",
        "import pickle\npickle.loads(x)",
        "from pickle import loads",
        "import pickle as p",
        "import dill",
        "def f():\n    from dill import loads",
        "try:\n    f()\nexcept:\n    pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_each_of_them_is_seen(source):
    assert len(list(complaints(source))) >= 1


def test_the_right_forms_are_left_alone():
    fine = "torch.load(p, weights_only=True)\nmodel.eval()\nre.compile(x)\nyaml.safe_load(t)\n"
    fine += "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass"
    assert list(complaints(fine)) == []
