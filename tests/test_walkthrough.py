"""The walkthrough shows what the code does today."""

import re
from pathlib import Path

import pytest

from tools import walkthrough

NUMBER = re.compile(r"-?\d+\.\d+")  # integers are exact


def test_the_page_holds_what_its_code_prints_and_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(walkthrough.DOCS.parent)  # the page names weights/ as a reader in the repository does
    page = (walkthrough.DOCS / "walkthrough.md").read_text(encoding="utf-8")
    again = walkthrough.rerun(page, tmp_path)
    assert NUMBER.sub("#", again) == NUMBER.sub("#", page)
    before, now = ([float(number) for number in NUMBER.findall(text)] for text in (page, again))
    assert now == pytest.approx(before, rel=0.02, abs=0.05)  # other machines round differently
    shown = {Path(name).name for name in re.findall(r"\]\((walkthrough/[^)]+)\)", page)}
    assert shown == {file.name for file in tmp_path.iterdir()} and shown


def test_outputs_are_put_below_their_code_and_old_ones_replaced(tmp_path):
    page = "one\n```python\nx = 2\nprint(x)\n```\n\n```text\n1\n```\ntwo\n```python\nx += 1\n```\nthree\n"
    once = walkthrough.rerun(page, tmp_path)
    assert once == page.replace("```text\n1\n", "```text\n2\n") == walkthrough.rerun(once, tmp_path)
