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
