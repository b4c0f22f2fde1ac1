"""What the pages say is so: commands are understood and run, links lead somewhere, numbers are those of their files."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import exit_code

import train
from model import FLOW, WEIGHTS
from paper import figures

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "paper/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [file for file in sorted(ROOT.glob("**/*.py")) if file.relative_to(ROOT).parts[0] not in (".venv", "tests")]
COMMAND = re.compile(
    r"^ *(?:srun )?((?:python|torchrun) \S.*?)(?:  +\S.*| # .*)?$|`((?:python|torchrun) [^`\n]+)`", re.M
)
README = PAGES[0].read_text(encoding="utf-8")


def commands(page: Path) -> list[str]:
    """The commands on a page, or in a module's docstring."""
    text = page.read_text(encoding="utf-8")
    text = text.partition('"""')[2].partition('"""')[0] if page.suffix == ".py" else text
    return [next(filter(None, match.groups())) for match in COMMAND.finditer(text)]


def program_of(line: str) -> tuple[str, list[str]] | None:
    """`torchrun --nproc-per-node 8 -m tools.cache --out X` -> ("tools.cache", ["--out", "X"]). None: not ours."""
    words = shlex.split(line.replace("...", ""))
    for i, word in enumerate(words):
        if word in ("-m", "--module"):
            return (words[i + 1], words[i + 2 :]) if (ROOT / words[i + 1].split(".")[0]).is_dir() else None
        if word.endswith(".py"):
            assert (ROOT / word).exists(), f"{word} does not exist"
            return word.removesuffix(".py").replace("/", "."), words[i + 1 :]
    return None


def run(name: str, *arguments: object) -> int:
    """The exit code of a program."""
    module = importlib.import_module(name)
    if module is train:
        module = SimpleNamespace(__file__=train.__file__, main=lambda: train.main(train.arguments(), train.run))
    return exit_code(module, *arguments)


def test_every_command_is_one_that_its_program_understands(monkeypatch):
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: parse(self) and self.exit(77))
    wrong, count = [], 0
    lines = [(page.name, line) for page in PAGES + MODULES for line in commands(page)]
    for where, line in lines:
        name, arguments = program_of(line) or ("", [])
        file = ROOT / f"{name.replace('.', '/')}.py"
        source = file.read_text(encoding="utf-8") if file.is_file() else ""
        if name and "__main__" not in source:
            wrong.append(f"{where}: {line}: no such program")
        elif "parse_args" in source or "train.main" in source:
            count += 1
            if run(name, *arguments) != 77:
                wrong.append(f"{where}: {line}")
    assert wrong == []
    assert count > 80


def test_links_lead_to_files_that_exist():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
            target = page.parent / link if link else page
            assert "://" in link or target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], anchor


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {"demo", "test"} <= set(re.findall(r"(?:^ +|`)make ([a-z]+)", pages, re.MULTILINE)) <= targets


def test_the_readme_is_short_and_names_every_root_module():
    assert len(README.splitlines()) <= 250 and len(README.split()) <= 2500
    rows = re.findall(r"^\| \[`(\w+\.py)`\]", README, re.MULTILINE)
    assert len(rows) == 10 and set(rows) == {file.name for file in ROOT.glob("*.py")}


def test_numbers_are_those_of_their_files():
    rows = figures.read_rows(figures.HERE / "results/scores.json")
    page = (figures.HERE / "README.md").read_text(encoding="utf-8")
    assert figures.table(rows, 200).join(figures.MARKS) in page
    assert figures.summary(rows, 200).join(figures.SUMMARY_MARKS) in README
    for name in "times", "lora", "levers":
        for row in figures.read_rows(figures.HERE / f"results/{name}.json"):
            assert f"{row['frechet']:.2f}" in page
    speed = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for row in (row for file in ROOT.glob("docs/speed/*.json") for row in json.loads(file.read_text())["rows"]):
        [line] = [line for line in speed.splitlines() if line.startswith(f"| {row['what']} |")]
        assert f"| {row['ours']:.3g} s | {row['theirs']:.3g} s | {row['ratio']:.2f} ({row['spread'][0]:.2f} to " in line


@pytest.mark.slow
def test_the_memory_table_is_what_the_program_prints(capsys):
    page = (ROOT / "docs/real-models.md").read_text(encoding="utf-8")
    assert run("tools.memory") == 0
    assert f"tools.memory -->\n```\n{capsys.readouterr().out}```\n<!-- end of memory" in page


@pytest.mark.slow
def test_the_commands_that_need_nothing_but_this_repository_run(tmp_path, monkeypatch, capsys):
    """All four stages of the README with one update each, images of the last one, and their scores."""
    monkeypatch.chdir(ROOT)
    lines = list(filter(None, map(program_of, commands(PAGES[0]))))
    stages = [words for name, words in lines if name == "train" and words[:1] == ["--stage"] and len(words) == 2]
    assert [stage for _, stage in stages] == ["1", "2", "3", "4"]
    for words in stages:
        short = ["--iters", "1", "--batch-size", "2", "--sample-every", "0", "--out", str(tmp_path)]
        assert run("train", *words, *short) == 0
    prompts = next(words for name, words in lines if name == "sample")
    for name, model in ("ours", FLOW), ("new", tmp_path / "stage-4"):
        assert run("sample", *prompts, "--model", model, "--out", tmp_path / name) == 0
    clip = ["--clip", WEIGHTS / "miniature-clip"]
    assert run("evaluation.clip_score", tmp_path / "new", *clip) == 0
    assert "2 images" in capsys.readouterr().out
    assert run("evaluation.clip_fid", tmp_path / "ours", tmp_path / "new", *clip) == 0
