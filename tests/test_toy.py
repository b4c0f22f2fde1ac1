"""The toy in the plane: the method, its study and its figures, each with few updates."""

import functools

import pytest
import torch
from PIL import Image

import reflow
from paper import figures, toy, toy_study


def test_reflow_brings_four_steps_closer_to_the_teachers_thirty_two():
    torch.manual_seed(0)
    noise = torch.randn(300, 2)
    teacher = toy.fit("teacher", toy.Net(), toy.diffusion_loss, 300)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss_of = functools.partial(toy.reflow_loss, windows=4, teacher=(teacher, 32), alpha=0.1)
    student = toy.fit("student", teacher, loss_of, 100)
    ends = {name: toy.trajectory(net, m, m, noise)[1][-1] for name, net, m in
            (("goal", teacher, 32), ("untrained", teacher, 4), ("trained", student, 4))}  # fmt: skip
    distance = {name: (z - ends["goal"]).square().mean() for name, z in ends.items()}
    assert distance["trained"] < 0.5 * distance["untrained"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("at_start, gap", [(0, 0), (0, 0.5), (0.5, 0.25), (1, 0)])
def test_times_lie_where_they_should(at_start, gap, monkeypatch):
    asked = []
    net = toy.Net()
    monkeypatch.setattr(net, "forward", lambda z, tau: asked.append(tau) or torch.zeros_like(z))
    toy.reflow_loss(net, 4, (toy.Net(), 32), 0, at_start, gap, n=4000)
    start, end = reflow.window_of(asked[0], 4)
    r = (start - asked[0]) / (start - end)
    assert (r == 0).float().mean() == pytest.approx(at_start + (1 - at_start) / (250 * (1 - gap)), abs=0.03)
    assert at_start == 1 or 1 - gap - 0.05 < r.max() < 1 - gap


@pytest.mark.slow
def test_the_image_and_the_animation_are_written(tmp_path):
    toy.main(tmp_path, share=0.005)
    with Image.open(tmp_path / "toy.png") as still, Image.open(tmp_path / "toy.webp") as moving:
        assert still.size == moving.size == (1000, 500) and moving.n_frames > 20


def test_networks_side_by_side_answer_and_learn_like_each_alone():
    torch.manual_seed(0)
    nets = [toy.Net() for _ in range(3)]
    z, tau = torch.randn(12, 2), torch.randint(1, 1001, (12,))
    together = toy_study.SideBySide(nets)
    alone = torch.cat([net(*share) for net, share in zip(nets, zip(z.split(4), tau.split(4)))])
    torch.testing.assert_close(together(z, tau), alone)
    together(z, tau).square().sum().backward()
    alone.square().sum().backward()
    for i, net in enumerate(nets):
        for stacked, parameter in zip(together.stacked, net.parameters()):
            torch.testing.assert_close(stacked.grad[i], parameter.grad)


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    file, runs = tmp_path / "rows.json", toy_study.all_runs()
    small = [runs[0], runs[8], toy_study.run_of([8, 4, 2], toy_study.STARTS, cost=24)]
    toy_study.study(file, small[:1], teacher_updates=2, n=3)
    first = figures.read_rows(file)
    toy_study.study(file, small, teacher_updates=2, n=3)
    rows = figures.read_rows(file)
    assert rows[: len(first)] == first
    steps = [(row.get("path"), row["steps"]) for row in rows]
    assert steps == [([8], 8), (None, 32), ([8, 4, 2], 2), ([8, 4, 2], 4), ([8, 4, 2], 8)]
    assert all(len(set(row["distance"])) == toy_study.SEEDS for row in rows)
    monkeypatch.setattr(toy_study, "measure", None)
    toy_study.study(file, small, teacher_updates=2, n=3)


@pytest.mark.slow
def test_the_kept_rows_are_those_of_the_study_and_draw_its_figures(tmp_path):
    rows = figures.read_rows(toy_study.FILE)
    assert all(any(run.items() <= row.items() for row in rows) for run in toy_study.all_runs())
    toy_study.draw_study(rows, tmp_path / "study.png")
    flows = {name: (toy.Net(), windows) for name, windows in [("teacher", 32), *toy.PANELS[2:]]}
    toy_study.draw_targets(flows, tmp_path / "targets.png")
    assert {file.name for file in tmp_path.iterdir()} == {"study.png", "targets.png"}
