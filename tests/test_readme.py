"""What the README and the walkthrough say is so: commands are understood, links lead somewhere, counts agree."""

import argparse
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import exit_code

import fid
import sample
import train
from evaluation import clip_score
from model import FLOW

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^    ((?:python|torchrun) .*?)(?:  +#.*|   +\S.*)?$|`(python \S+\.py[^`]*)`", re.MULTILINE)


def commands():
    for file in [ROOT / "README.md", *sorted(ROOT.glob("*.py"))]:
        text = file.read_text(encoding="utf-8")
        text = text if file.suffix == ".md" else text.partition('"""')[2].partition('"""')[0]
        for match in COMMAND.finditer(text):
            line = next(filter(None, match.groups()))
            if "-m " not in line and re.search(r"\w+\.py", line):
                yield pytest.param(line, id=f"{file.name}: {line}")


class Understood(Exception):
    pass


@pytest.mark.parametrize("line", list(commands()))
def test_a_command_is_one_that_its_program_understands(line, monkeypatch):
    words = shlex.split(line.replace("...", ""))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    file = ROOT / words[script]
    assert file.exists(), f"{file} does not exist"
    if file.parent != ROOT or "parse_args" not in file.read_text(encoding="utf-8"):
        return
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", words[script:])
    with pytest.raises(Understood):
        module.main()


@pytest.mark.parametrize("page", ["README.md", "docs/walkthrough.md"])
def test_links_lead_to_files_that_exist(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE))
    assert told and told <= targets


def test_line_counts_are_those_of_the_files():
    rows = re.findall(r"^\| (\[`.*?) \|.*\| ([\d, ]+) \|$", README, re.MULTILINE)
    assert len(rows) > 10
    for names, counts in rows:
        files = re.findall(r"\((\w+\.py)\)", names)
        actual = [len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files]
        told = [int(count) for count in counts.split(",")]
        assert len(told) == len(actual), names
        assert all(abs(a - b) <= 0.1 * a for a, b in zip(actual, told)), f"{names}: {actual}, not {told}"


def told(program: str, *having: str) -> list[list[str]]:
    """The arguments of the README's commands for a program, in their order, that hold all of these words."""
    lines = [match.group(1) for match in COMMAND.finditer(README) if match.group(1)]
    words = [shlex.split(line) for line in lines if f" {program}.py " in line and all(word in line for word in having)]
    assert words
    return [line[line.index(f"{program}.py") + 1 :] for line in words]


def test_the_commands_that_need_nothing_but_this_repository_run(tmp_path, monkeypatch, capsys):
    """All four stages with one update each, images of the last one, and their scores, as the README has them."""
    monkeypatch.chdir(ROOT)
    stages = [line for line in told("train", "--stage") if "--model" not in line]
    assert [line[:2] for line in stages] == [["--stage", str(stage)] for stage in (1, 2, 3, 4)]
    for line in stages:
        short = ["--iters", 1, "--batch-size", 2, "--sample-every", 0, "--out", tmp_path]
        assert exit_code(train, *line, *short) == 0
    [prompts] = told("sample", "--steps 4 --prompt ")
    for name, model in ("ours", FLOW), ("new", tmp_path / "stage-4"):
        assert exit_code(sample, *prompts, "--model", model, "--n", 2, "--out", tmp_path / name) == 0
    folders = {"REFERENCE": tmp_path / "ours", "GENERATED": tmp_path / "new"}
    [line] = told("fid", "--clip weights/miniature-clip")
    assert exit_code(fid, *(folders.get(word, word) for word in line)) == 0
    [line] = told("clip_score", "python clip_score.py GENERATED")
    line[line.index("--clip") + 1] = "weights/miniature-clip"
    assert exit_code(clip_score, *(folders.get(word, word) for word in line)) == 0
    assert "4 images" in capsys.readouterr().out
