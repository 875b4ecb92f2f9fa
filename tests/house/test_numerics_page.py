"""docs/numerics.md repeats every tolerance of the suite, with its value."""

from __future__ import annotations

import ast

from source_files import ROOT


def test_the_page_has_every_tolerance_with_its_value() -> None:
    tree = ast.parse((ROOT / "tests" / "tolerances.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in page if line[:1] == "|"]
    stated = {name: float(value) for name, value in (c for c in cells if c[0] in values)}
    assert values
    assert stated == values
