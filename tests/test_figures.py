"""The figures and scores: what they measure is what they say they measure."""

import json
import sys

import numpy as np
import pytest
import torch
from elsewhere import other_device
from helpers import exit_code

import reflow
import sample
from model import FLOW, MINIATURE, StableDiffusion, save_flow
from paper import figures
from support import scenes
from support.official import flow_scheduler
from support.scenes import TEST
from support.streams import draw_noise


def run(*arguments):
    return exit_code(figures, *arguments)


def test_both_kinds_of_noise_are_equally_long_and_each_leaves_the_other_part_alone():
    v = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    length = v.flatten(1).norm(dim=1)

    def noisy(kind):
        return figures.perturbed(lambda z, tau: z, 0.5, kind)(v, torch.zeros(50))

    for kind in "direction", "magnitude":
        off = (noisy(kind) - v).flatten(1).norm(dim=1)
        torch.testing.assert_close(off, 0.5 * length, rtol=1e-4, atol=1e-4)
    turned, longer = noisy("direction").flatten(1), noisy("magnitude").flatten(1)
    torch.testing.assert_close(turned.norm(dim=1), length)
    torch.testing.assert_close(torch.cosine_similarity(longer, v.flatten(1)), torch.ones(50))
    assert 10 < (longer.norm(dim=1) > length).sum() < 40


def test_a_diffusion_models_trajectory_is_the_one_of_ddim():
    sd = StableDiffusion.load(MINIATURE)
    velocity = figures.velocity_of(sd, ["a red circle"], 3.0)
    grid = torch.tensor(reflow.boundaries(figures.FINE))
    with torch.no_grad():
        ours = sd.decode(reflow.euler(velocity, draw_noise(0, [0], (4, 8, 8)), grid))
    theirs = sample.generate(sd, ["a red circle"], figures.FINE, 3.0, seed=0)
    assert np.abs(((ours + 1) * 127.5).permute(0, 2, 3, 1).numpy() - theirs).max() <= 1


def test_a_model_follows_itself_and_fewer_steps_do_less(capsys, tmp_path):
    options = ["--count", 3, "--guidance", 2, "--device", "cpu", "--out", tmp_path]
    assert run("follow", *(f"{MINIATURE}:{steps}" for steps in (4, 4, 2, 1)), *options) == 0
    lines = capsys.readouterr().out.splitlines()
    _, same, two, one = (float(line.rpartition(": ")[2]) for line in lines)
    assert same == 0 < two < one and lines[-1].startswith("miniature, 1 steps, guidance 2: ")


def test_scores_are_rows_that_say_all_and_are_not_measured_twice(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    options = ["--count", 2, "--json", file, "--out", tmp_path, "--device", "cpu", "--images"]
    assert run("score", f"{MINIATURE}:2", *options, 4, "--guidance", 1, 2) == 0
    rows = json.loads(file.read_text())
    assert [(row["guidance"], row["evaluations"]) for row in rows] == [(1.0, 2), (2.0, 4)]
    assert {row["split"] for row in rows} == {"validation"} and {row["sampler"] for row in rows} == {"ddim"}
    assert {"one item", "two items", "frechet", "clip"} < rows[0].keys()
    seeds, prompt = set(), scenes.prompt
    monkeypatch.setattr(scenes, "prompt", lambda seed, *rest: seeds.add(seed) or prompt(seed, *rest))
    assert run("score", f"{MINIATURE}:2", *options, 4) == 0 and not seeds
    assert run("score", f"{MINIATURE}:1:dpm++", *options, 0, "--split", "test") == 0 and seeds == {TEST}
    *again, alone = json.loads(file.read_text())
    assert again == rows and alone["sampler"] == "dpm++" and "frechet" not in alone


def test_the_table_shows_the_rows_of_the_test_split_with_equally_many_prompts():
    at = {"model": "proreflow-i", "sampler": "flow", "steps": 4, "split": "test", "one item": 0.5, "two items": 0.25}
    at |= {"evaluations": 8, "prompts": 200, "guidance": 4.0}
    rows = [
        at,
        at | {"guidance": 2.0, "frechet": 7.0, "clip": 50.0},
        at | {"prompts": 1000},
        at | {"split": "validation"},
    ]
    assert figures.table(rows, 200).splitlines()[2:] == [
        "| ProReflow-I | 4 | 2 | 8 | 7.00 | 50.00 | 50.0% | 25.0% | 11.16 |",
        "| ProReflow-I | 4 | 4 | 8 |  |  | 50.0% | 25.0% |  |",
    ]


def test_side_by_side_draws_a_row_for_each_model_and_no_more_guidance_for_a_guided_flow(tmp_path, monkeypatch, capsys):
    for spec in f"{MINIATURE}:many", f"{MINIATURE}:4:heun":
        assert run("side", spec, "--out", tmp_path) == 2
        assert "name a model folder and its steps" in capsys.readouterr().err
    sd, asked, generate = StableDiffusion.load(MINIATURE), [], sample.generate
    save_flow(sd.unet, flow_scheduler(sd, 1, 2.0), sd, tmp_path / "guided", torch.float32)
    monkeypatch.setattr(sample, "generate", lambda *given, **how: asked.append(given[2:4]) or generate(*given, **how))
    assert run("side", f"{MINIATURE}:2", tmp_path / "guided", "--guidance", 6, "--out", tmp_path) == 0
    assert asked == [(2, 6.0), (1, 1.0)] and (tmp_path / "side.png").exists()


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert run("guidance") == 2
    assert "figures need matplotlib: pip install -r requirements-dev.txt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", figures.COMMANDS)
def test_figures_are_made_on_another_device_with_named_axes_and_a_legend_of_their_curves(what, tmp_path, monkeypatch):
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, file: drawn.extend(figure.axes) or save(figure, file))
    monkeypatch.setattr(figures, "SIZES", (0.1,))
    monkeypatch.setattr(figures, "FINE", 4)
    file = figures.HERE / "results/guidance.json" if what == "guidance" else tmp_path / "rows.json"
    small = ["--guidance", 2, "--split", "test", "--count", 2, "--images", 4, "--json", file, "--out", tmp_path]
    with other_device():
        assert run(what, FLOW, *small, "--device", "meta") == 0
    for axis in drawn:
        assert axis.get_ylabel() and (axis.get_xlabel() or axis.get_label() == "<colorbar>")
        assert bool(axis.lines) == bool(axis.get_legend())
    assert what in ("score", "follow") or (tmp_path / f"{what}.png").exists()
