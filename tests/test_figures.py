"""The experiments' tools: what they measure is what they say they measure."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from helpers import exit_code

import reflow
import sample
from miniature import train as miniature
from model import MINIATURE, StableDiffusion, flow_scheduler, save_flow
from paper import figures
from support import scenes
from support.streams import draw_noise

MODEL = MINIATURE


def run(*arguments):
    return exit_code(figures, *arguments)


def test_a_straight_path_walked_evenly_deviates_by_nothing_and_a_bent_one_by_what_it_is_bent():
    t = torch.tensor([1.0, 0.75, 0.5, 0.0])
    start, end = torch.randn(2, 3, 5).unbind(0)
    line = torch.stack([start + (1 - at) * (end - start) for at in t])
    assert figures.deviation(t, line).abs().max() < 1e-6
    bent = line.clone()
    bent[2] += 0.4 * (end - start).norm(dim=1, keepdim=True) * torch.eye(3, 5)
    torch.testing.assert_close(figures.deviation(t, bent), torch.full((3,), 0.1))  # 0.4 at one of four times


@pytest.mark.parametrize("size", [0.0, 0.1, 0.5])
def test_both_kinds_of_noise_are_equally_long_and_each_leaves_the_other_part_alone(size):
    v = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    length = v.flatten(1).norm(dim=1)

    def noisy(kind):
        field = figures.perturbed(lambda z, tau: z, size, kind, torch.Generator().manual_seed(0))
        return field(v, torch.zeros(50))

    for kind in "direction", "magnitude":
        off = (noisy(kind) - v).flatten(1).norm(dim=1)
        torch.testing.assert_close(off, size * length, rtol=1e-4, atol=1e-4)
    turned, longer = noisy("direction").flatten(1), noisy("magnitude").flatten(1)
    torch.testing.assert_close(turned.norm(dim=1), length)
    cosine = torch.cosine_similarity(longer, v.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(50))
    assert size == 0 or 10 < (longer.norm(dim=1) > length).sum() < 40


def test_a_diffusion_models_path_is_the_one_of_ddim():
    sd = StableDiffusion.load(MODEL)
    velocity = figures.velocity_of(sd, ["a red circle"], 3.0)
    z = draw_noise(0, [0], (4, 8, 8))
    grid = torch.tensor(reflow.borders(figures.FINE))
    with torch.no_grad():
        ours = sd.decode(reflow.euler(velocity, z, grid))
    theirs = sample.generate(sd, ["a red circle"], figures.FINE, 3.0, seed=0)
    assert np.abs(((ours + 1) * 127.5).permute(0, 2, 3, 1).numpy() - theirs).max() <= 1


def test_scores_are_rows_that_say_all_and_are_not_made_twice(tmp_path, monkeypatch, capsys):
    arguments = ["score", MODEL, "--guidance", 1, 2, "--count", 2, "--images", 4, "--json", tmp_path / "rows.json"]
    assert run(*arguments, "--steps", 2) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["guidance"], row["evaluations"]) for row in rows] == [(1.0, 2), (2.0, 4)]
    assert {row["split"] for row in rows} == {"validation"} and {row["sampler"] for row in rows} == {"ddim"}
    seeds = set()
    prompt = scenes.prompt
    monkeypatch.setattr(scenes, "prompt", lambda seed, *rest: seeds.add(seed) or prompt(seed, *rest))
    assert run(*arguments, "--steps", 2) == 0 and not seeds
    assert run(*arguments, "--steps", 1, "--split", "test") == 0 and seeds == {miniature.TEST}
    again = json.loads((tmp_path / "rows.json").read_text())
    assert again[:2] == rows and len(again) == 4
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_without_guidance_four_steps_of_an_ideal_flow_are_its_teachers_32():
    sd = StableDiffusion.load(MODEL)
    flow, prompts = figures.ideal_flow(sd, 4), ["a red circle", "a blue ring"]

    def images(model, steps, guidance):
        return sample.generate(model, prompts, steps, guidance, seed=3).astype(int)

    assert np.abs(images(flow, 4, 1.0) - images(sd, 32, 1.0)).max() <= 1
    assert np.abs(images(flow, 4, 4.0) - images(sd, 32, 4.0)).max() > 20  # of whole windows, it is another thing
    with pytest.raises(figures.InputError, match="a diffusion model"):
        figures.ideal_flow(flow, 2)


def test_an_ideal_flow_is_scored_as_what_it_is_of(tmp_path, capsys):
    arguments = ["--steps", 2, "--count", 1, "--images", 0, "--json", tmp_path / "rows.json"]
    assert run("score", MODEL, "--ideal", 2, *arguments) == 0
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert (row["model"], row["sampler"], row["evaluations"]) == ("miniature, ideal", "flow", 2)
    assert run("score", MODEL, "--ideal", 5, *arguments) == 2
    assert "a divisor of 32" in capsys.readouterr().err


def test_prompts_alone_are_scored_without_a_frechet_distance(tmp_path):
    arguments = ["score", MODEL, "--steps", 1, "--count", 2, "--images", 0, "--json", tmp_path / "rows.json"]
    assert run(*arguments) == 0
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert {"one item", "two items"} < row.keys() and "frechet" not in row


def test_the_table_shows_images_at_each_guidance_but_4_where_it_shows_prompts_alone(tmp_path):
    at = {"model": "proreflow-i", "sampler": "flow", "steps": 4, "split": "test", "one item": 0.5, "two items": 0.25}
    at |= {"evaluations": 8, "prompts": 200}
    rows = [at | {"guidance": 2, "frechet": 7.0, "clip": 50.0}, at | {"guidance": 4, "one item": 0.75}]
    rows.append(at | {"guidance": 3.0, "frechet": 8.0, "clip": 52.0})
    rows.append(at | {"model": "miniature", "guidance": 2, "frechet": 6.0, "clip": 51.0, "split": "validation"})
    rows.append(at | {"guidance": 3, "prompts": 1000})  # another precision: not beside the others
    figures.write_rows(tmp_path / "rows.json", rows)
    lines = figures.table(argparse.Namespace(json=tmp_path / "rows.json", count=200)).splitlines()
    assert lines[2:] == [
        "| proreflow-i | flow | 4 | 2 | 8 | 7.00 | 50.00 | 50.0% | 25.0% | 75.0% | 25.0% | 11.16 |",
        "| proreflow-i | flow | 4 | 3 | 8 | 8.00 | 52.00 | 50.0% | 25.0% |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {13}


def test_side_by_side_needs_steps_and_draws_a_row_for_each(tmp_path, capsys):
    for spec in MODEL, f"{MODEL}:many", f"{MODEL}:4:heun":
        assert run("side", spec, "--out", tmp_path) == 2
        assert "name a model folder and its steps" in capsys.readouterr().err
    assert run("side", f"{MODEL}:1", f"{MODEL}:2:dpm++", "--out", tmp_path) == 0
    assert (tmp_path / "side.png").exists()


def test_side_by_side_a_flow_whose_paths_hold_guidance_gets_no_more_of_it(tmp_path, monkeypatch):
    sd, asked, generate = StableDiffusion.load(MODEL), [], sample.generate
    for name, guidance in ("plain", 1.0), ("guided", 2.0):
        save_flow(sd.unet, flow_scheduler(sd, 1, guidance), MODEL, tmp_path / name, torch.float32)
    monkeypatch.setattr(sample, "generate", lambda *given, **how: asked.append(given[3]) or generate(*given, **how))
    assert run("side", f"{tmp_path}/plain:1", f"{tmp_path}/guided:1", "--guidance", 6, "--out", tmp_path) == 0
    assert asked == [6.0, 1.0]


def test_scores_over_guidance_are_kept_like_any_other(tmp_path):
    arguments = ["--guidance", 1, 3, "--count", 2, "--images", 4, "--out", tmp_path, "--json", tmp_path / "rows.json"]
    assert run("guidance", f"{MODEL}:1:dpm++", f"{MODEL}:2", *arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["steps"], row["guidance"]) for row in rows] == [(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0)]
    assert [row["sampler"] for row in rows] == ["dpm++", "dpm++", "ddim", "ddim"]
    assert (tmp_path / "guidance.png").exists()
    assert run("score", MODEL, "--steps", 2, *arguments) == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_a_flow_whose_paths_hold_guidance_is_one_point_of_the_figure_over_guidance(tmp_path):
    sd = StableDiffusion.load(MODEL)
    save_flow(sd.unet, flow_scheduler(sd, 1, 2.5), MODEL, tmp_path / "guided", torch.float32)
    arguments = ["--guidance", 3, 4, "--count", 1, "--images", 4, "--out", tmp_path, "--json", tmp_path / "rows.json"]
    assert run("guidance", f"{tmp_path}/guided:1", *arguments) == 0
    assert [row["guidance"] for row in json.loads((tmp_path / "rows.json").read_text())] == [1.0]


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run("paths", MODEL, "--count", 2) == 2
    assert "figures need matplotlib: pip install -r requirements-dev.txt" in capsys.readouterr().err


def test_images_of_paths_and_velocities_are_written_with_their_numbers(tmp_path, capsys):
    for what in "paths", "velocities":
        assert run(what, MODEL, "--count", 6, "--out", tmp_path) == 0
        assert (tmp_path / f"{what}.png").exists()
    out = capsys.readouterr().out
    assert "mean distance from the chord" in out and "cosine 0.9" in out  # neighbors are alike


def test_a_student_that_learned_nothing_has_the_errors_of_its_teachers_weights(tmp_path, capsys):
    teacher = StableDiffusion.load(MODEL)
    save_flow(teacher.unet, flow_scheduler(teacher, 8), MODEL, tmp_path / "same", torch.float32)
    assert run("errors", tmp_path / "same", "--count", 3) == 0
    lines = dict(line.strip().split(": ") for line in capsys.readouterr().out.splitlines())
    assert len(lines) == 4 and lines["start, untrained"] == lines["start, same"] != lines["even, same"]
    assert len(lines["even, untrained"].removeprefix("1 - cos").split()) == 8


def test_the_readme_shows_the_scores_that_were_measured():
    args = argparse.Namespace(json=figures.README.parent / "docs/results/scores.json", count=200)
    shown = figures.README.read_text(encoding="utf-8").split(figures.MARKS[0])[1].split(figures.MARKS[1])[0]
    assert shown == figures.table(args) and "| proreflow-i | flow | 4 |" in shown
