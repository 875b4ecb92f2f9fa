"""What tests of the report share: evaluations written as `eval` keeps them, parts of a page."""

from __future__ import annotations

import json
import shutil
from typing import Any

from page_reader import Element

from finetune.run_folder import RunFolder


def write_result(run: RunFolder, answers: dict[str, list[dict[str, Any]]], **more: Any) -> None:
    """An evaluation with answers of one task, as `eval` keeps it, in place of the run's."""
    shutil.rmtree(run.eval)
    (run.eval / "answers").mkdir(parents=True)
    models = []
    for name, lines in answers.items():
        file = f"answers/heldout.exact_match.{name}.jsonl"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.eval / file).write_text(text, encoding="utf-8")
        score = sum(line["score"] for line in lines) / len(lines)
        task = {"score": score, "answers": len(lines), "errors": 0, "answers_file": file}
        models.append({"model": name, "loss": 1.5, "rows": 9, "tasks": {"exact_match": task}})
    result = {**models[0], "against": models[1:], **more}
    (run.eval / "heldout.json").write_text(json.dumps(result), encoding="utf-8")


def section(page: Element, name: str) -> Element:
    """The section with this id."""
    (found,) = [element for element in page.all() if element.attributes.get("id") == name]
    return found


def rows_of(element: Element) -> dict[str, list[str]]:
    """Every table's rows: first cell -> the others; of equal first cells the last."""
    lines = [[cell.text.strip() for cell in row.all("td")] for row in element.all("tr")]
    return {cells[0]: cells[1:] for cells in lines if cells}
