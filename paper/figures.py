"""The paper's figures and tables in miniature: every claim as a command, with what came out in docs/.

    python figures.py score MODEL ... --steps 4 2      tables 1, 2, 4: accuracy, Frechet distance, CLIP score
    python figures.py table                            what `score` measured on the test split, into the README
    python figures.py errors MODEL ... --teacher DIR   what a stage has learned, window by window
    python figures.py velocities MODEL ...             figure 1a: how alike velocities of different times are
    python figures.py noise MODEL                      figure 1b: noise on the direction against noise on the magnitude
    python figures.py guidance MODEL:STEPS ...         figure 3: scores over guidance, and one over the other
    python figures.py paths MODEL ...                  how straight paths are: on a plane, and as a number
    python figures.py side MODEL:STEPS ...             figure 5: the same seeds, side by side

MODEL is a model folder: a diffusion model, which is solved by DDIM, or a flow. Needs matplotlib for all but `score` and
`side`. Read `miniature.py` first: prompts, judge and features are those of `miniature.py --evaluate`.
"""

import argparse
import copy
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import fid
import reflow
import sample
import train
from evaluation.clip_score import ClipScore
from miniature import train as miniature
from miniature.train import TEST, VALIDATION, statistics
from model import MINIATURE, StableDiffusion, flow_scheduler
from support import scenes
from support.captions import read_prompts
from support.errors import InputError, one_line_errors
from support.files import fingerprint, write_between, write_text
from support.images import image_grid, to_pixels
from support.streams import draw_noise

FINE = 32  # steps of a path that is looked at closely; of a diffusion model, this many DDIM steps
SPLITS = {"validation": VALIDATION, "test": TEST}  # settings are chosen on one, reported on the other


# ---- Scores ---------------------------------------------------------------------------------------------------------


def score(args: argparse.Namespace) -> None:
    """A row for every model, number of steps and guidance. Rows are kept in --json, and not made again."""
    models = [(path.name, StableDiffusion.load(path, args.device)) for path in args.models]
    if args.ideal:
        models = [(f"{name}, ideal", ideal_flow(sd, args.ideal)) for name, sd in models]
    for (name, sd), steps, guidance in itertools.product(models, args.steps, args.guidance):
        if steps >= (sd.windows or 1):
            row_of(name, sd, steps, args.sampler, guidance, args)


def row_of(
    name: str, sd: StableDiffusion, steps: int, sampler: str | None, guidance: float, args: argparse.Namespace
) -> dict:
    """The scores of a model, measured now or kept from before."""
    weights = fingerprint(sd.unet.conv_in.weight, sd.unet.conv_out.weight)
    sampler = sample.check_sampler(sd, sampler, steps)
    key = {"model": name, "weights": weights, "sampler": sampler, "steps": steps, "guidance": guidance}
    key |= {"split": args.split, "prompts": args.count, "images": args.images}
    if row := known(key, args.json):
        return row
    row = key | kept_to(sd, steps, guidance, sampler, SPLITS[args.split], args.count)
    told = f"one item {row['one item']:.1%}, two {row['two items']:.1%} of {args.count}"
    if args.images:
        clip, drawn = reference(args.clip, args.device, SPLITS[args.split], args.images)
        row |= likeness(sd, steps, guidance, sampler, SPLITS[args.split], args.images, clip, drawn)
        told += f"; Frechet {row['frechet']:.2f}, CLIP {row['clip']:.2f} of {args.images}"
    print(f"{name} ({sampler}), {steps} steps, guidance {guidance:g}: {told}", flush=True)
    write_rows(args.json, kept(args.json) + [row])  # read again: another `score` may run beside this one
    return row


@functools.cache
def reference(folder: Path, device: str, seed: int, images: int) -> tuple[ClipScore, tuple]:
    """The CLIP that judges, and the mean and covariance of so many drawn scenes in its features."""
    clip = ClipScore.load(folder, device)
    drawn = (scenes.sample(seed, i)[0] for i in tqdm(range(images), desc="drawing scenes", leave=False))
    return clip, statistics(drawn, clip)


def kept_to(
    sd: StableDiffusion, steps: int, guidance: float, sampler: str, seed: int, prompts: int
) -> dict[str, float]:
    """How many of `prompts` prompts of this seed that name one item a model keeps to, and of as many that name two."""
    right = [miniature.accuracy(sd, steps, guidance, seed, named, prompts, sampler) for named in (1, 2)]
    return {"evaluations": steps * (1 if guidance == 1 else 2), "one item": right[0], "two items": right[1]}


def likeness(
    sd: StableDiffusion,
    steps: int,
    guidance: float,
    sampler: str,
    seed: int,
    images: int,
    clip: ClipScore,
    drawn: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """How close so many images of this seed's captions are to `drawn` (mean, covariance), and to their captions."""
    captions = [scenes.sample(seed, i)[1] for i in range(images)]
    made = np.stack(list(miniature.images_of(sd, captions, steps, guidance, seed, sampler)))
    fit = [clip.score(made[i : i + 100], captions[i : i + 100], "logits") for i in range(0, len(made), 100)]
    return {
        "frechet": round(fid.frechet_distance(*statistics(made, clip), *drawn), 3),
        "clip": round(torch.cat(fit).mean().item(), 3),
    }


def kept(file: Path) -> list[dict]:
    return json.loads(file.read_text()) if file.exists() else []


def known(key: dict, file: Path) -> dict | None:
    """The kept row that says all that `key` does."""
    return next((row for row in kept(file) if key.items() <= row.items()), None)


def write_rows(file: Path, rows: list[dict]) -> None:
    write_text(file, "[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


@torch.no_grad()
def errors(args: argparse.Namespace) -> None:
    """How far a stage's velocities are off, window by window from noise to image: at the starts of windows, where
    sampling in few steps asks, and at even times, where the paper trains. First, the teacher's weights as they are."""
    teacher = StableDiffusion.load(args.teacher, args.device)
    students = [StableDiffusion.load(path, args.device) for path in args.models]
    windows = students[0].windows
    samples = data.Samples(data.Scenes(VALIDATION), 0, (4, 8, 8), windows)
    items = torch.utils.data.default_collate([samples[i] | {"uncond": False} for i in range(args.count)])
    batch = train.prepare(teacher, items, torch.device(args.device))
    settings = argparse.Namespace(windows=windows, solver_steps=train.solver_steps(teacher, windows))
    for where in "start", "even":
        table = {name: [] for name in ["untrained", *(path.name for path in args.models)]}
        for start, end in zip(reflow.boundaries(windows), reflow.boundaries(windows)[1:]):
            place = (batch["tau"] - 1) * (start - end) // reflow.NOISE  # that in 1..1000, in this window
            tau = torch.full_like(batch["tau"], start) if where == "start" else end + 1 + place
            here = batch | {"tau": tau}
            trajectory = train.teacher_trajectory(teacher, teacher.unet, here, settings)
            for name, sd in zip(table, [teacher, *students]):
                loss = train.compute_loss(sd.unet, teacher, here, trajectory, windows, 0)
                table[name].append(loss[1])
        for name, parts in table.items():
            for part in "mse", "cos":
                told = " ".join(f"{window[part]:.4f}" for window in parts)
                print(f"{where:>5}, {name}: {'1 - cos' if part == 'cos' else 'mse'} {told}", flush=True)


README, MARKS = (
    Path(__file__).parent / "README.md",
    ("<!-- scores: python figures.py table -->\n", "<!-- end of scores -->"),
)


# Shipped in weights/, but for stage-3, ProReflow-II as the paper trains it, and guided-1, of one step: the README says
# with which commands those are made.
SHOWN = ["miniature", "miniature, ideal", "proreflow-i", "stage-3"]
SHOWN += ["proreflow-i-guided", "proreflow-ii-guided", "guided-1"]
# What the paper measured with SD1.5: FID of 30,000 captions of COCO-2014, its table 2.
PAPER = {("miniature", "ddim", 32): 10.05, ("miniature", "dpm++", 4): 22.36, ("proreflow-i", "flow", 4): 11.16}
PAPER |= {("stage-3", "flow", 4): 10.70, ("stage-3", "flow", 2): 15.44}


def table(args: argparse.Namespace) -> str:
    """Rows of the test split in --json, as the README shows them: images at guidance 2, where they look best, or at
    what was asked for; prompts kept to there, and at 4, which is `sample.py`'s."""
    head = "model", "sampler", "steps", "guidance", "evaluations", "Frechet", "CLIP", "one item", "two items"
    lines = [[*head, "one, guidance 4", "two, guidance 4", "paper's FID, SD1.5"], ["---"] * (len(head) + 3)]
    rows = [row for row in kept(args.json) if row["split"] == "test" and row["model"] in SHOWN]
    rows = [row for row in rows if row["prompts"] == args.count]
    clear = {(row["model"], row["sampler"], row["steps"]): row for row in rows if row["guidance"] == 4}
    rows = [row for row in rows if row["guidance"] != 4]
    rows.sort(key=lambda row: (SHOWN.index(row["model"]), row["sampler"], -row["steps"], row["guidance"]))
    for row in rows:
        key = row["model"], row["sampler"], row["steps"]
        usual = row["guidance"] == miniature.LIKENESS
        cells = [*map(str, key), f"{row['guidance']:g}", str(row["evaluations"])]
        cells += [f"{row[name]:.2f}" if name in row else "" for name in ("frechet", "clip")]
        for at in row, clear.get(key) if usual else None:
            cells += [f"{at[kind]:.1%}" if at else "" for kind in ("one item", "two items")]
        lines.append([*cells, f"{PAPER[key]:.2f}" if usual and key in PAPER else ""])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_table(args: argparse.Namespace) -> None:
    write_between(README, MARKS, table(args))


class IdealUNet(nn.Module):
    """A flow's network that has learned without errors, to tell those of training from those of the method: asked at
    the start of a window, it walks the teacher's whole path through it, and answers with the noise that leads there."""

    def __init__(self, teacher: StableDiffusion, windows: int):
        super().__init__()
        self.unet, self.windows, self.alphas_cumprod = teacher.unet, windows, teacher.alphas_cumprod
        self.cfg, self.conv_in, self.conv_out = self.unet.cfg, self.unet.conv_in, self.unet.conv_out
        self.text_keys_values = self.unet.text_keys_values

    def forward(self, x: Tensor, tau: Tensor, *conditions) -> Tensor:
        grid = reflow.solver_grid(tau, self.windows, FINE // self.windows)
        z_e = reflow.ddim(lambda z, at: self.unet(z, at - 1, *conditions), x, self.alphas_cumprod, grid)
        lam, eta = reflow.ddim_coefficients(*(reflow.alpha_bar(self.alphas_cumprod, at) for at in (grid[0], grid[-1])))
        return (z_e - reflow.append_dims(lam, x) * x) / reflow.append_dims(eta, x)


def ideal_flow(teacher: StableDiffusion, windows: int) -> StableDiffusion:
    """What training a diffusion model to so many windows could reach at best, to be sampled in as many steps."""
    if teacher.windows or FINE % windows:
        raise InputError(f"--ideal needs a diffusion model, and a divisor of {FINE} windows")
    flow = copy.copy(teacher)
    flow.unet = IdealUNet(teacher, windows)
    flow.configs = teacher.configs | {"scheduler": flow_scheduler(teacher, windows)}
    return flow


# ---- Paths and velocities -------------------------------------------------------------------------------------------


def velocity_of(sd: StableDiffusion, prompts: list[str], guidance: float) -> reflow.Network:
    """The field (z, tau) -> v that sampling follows. A diffusion model is taken as a flow of FINE windows, whose Euler
    steps are DDIM's."""
    size = sd.image_size()
    uncond = sd.conditions([""], size, size) if guidance != 1 else None
    epsilon = sd.epsilon(sd.conditions(prompts, size, size), guidance, uncond)
    return reflow.as_velocity(epsilon, sd.alphas_cumprod, sd.windows or FINE, sd.prediction_type)


@torch.no_grad()
def path_of(sd: StableDiffusion, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Sampling paths in FINE steps: times (FINE + 1,), from 1 to 0, and latents (FINE + 1, B, D)."""
    prompts = [scenes.prompt(TEST, i) for i in range(args.count)]
    size = sd.image_size() // sd.downscale
    z = draw_noise(TEST, list(range(args.count)), (sd.unet.cfg.in_channels, size, size)).to(sd.device)
    velocity, grid = velocity_of(sd, prompts, args.guidance[0]), torch.tensor(reflow.boundaries(FINE))
    path = [z]
    for step in zip(grid, grid[1:]):
        path.append(reflow.euler(velocity, path[-1], torch.stack(step)))
    return grid / reflow.NOISE, torch.stack(path).flatten(2).cpu()


def velocities(args: argparse.Namespace) -> None:
    """Figure 1a. Entry (i, j): mean over paths of |v_i - v_j|, relative to the mean |v|, and of cos(v_i, v_j)."""
    plt = pyplot()

    figure, axes = plt.subplots(2, len(args.models), figsize=(2.6 * len(args.models), 4.6), squeeze=False)
    for column, path in enumerate(args.models):
        t, z = path_of(StableDiffusion.load(path, args.device), args)
        v = ((z[1:] - z[:-1]) / (t[1:] - t[:-1]).view(-1, 1, 1)).transpose(0, 1)  # (B, FINE, D)
        length = v.norm(dim=2)
        distance = (torch.cdist(v, v) / length.mean()).mean(0)
        cosine = ((v @ v.transpose(1, 2)) / (length[:, :, None] * length[:, None])).mean(0)
        shown = ((distance, 0, 1.5, "distance"), (cosine, 0, 1, "cosine"))
        for axis, (matrix, low, high, name) in zip(axes[:, column], shown):
            image = axis.imshow(matrix.numpy(), vmin=low, vmax=high, extent=(1, 0, 0, 1), cmap="viridis")
            axis.set_title(f"{path.name}: {name}", fontsize=8)
            axis.tick_params(labelsize=6)
            figure.colorbar(image, ax=axis, fraction=0.045).ax.tick_params(labelsize=6)
        apart = [FINE // 8, FINE // 2]
        told = [f"{cosine.diagonal(k).mean():.3f} for times {k / FINE:g} apart" for k in apart]
        print(f"{path.name}: cosine {', '.join(told)}; distance {distance.diagonal(apart[1]).mean():.3f} at {0.5:g}")
    save(figure, args.out / "velocities.png")


def paths(args: argparse.Namespace) -> None:
    """Paths on the plane of their chord and their largest deviation, and how far from the chord they are."""
    plt = pyplot()

    figure, axes = plt.subplots(1, len(args.models), figsize=(2.6 * len(args.models), 2.4), squeeze=False, sharey=True)
    for axis, path in zip(axes[0], args.models):
        t, z = path_of(StableDiffusion.load(path, args.device), args)
        whole = deviation(t, z).mean()
        parts = torch.stack([deviation(t[i : i + 5], z[i : i + 5]) for i in range(0, FINE, 4)]).mean()
        print(f"{path.name}: mean distance from the chord, in its lengths: {whole:.4f}; within eighths {parts:.4f}")
        for one in z[:, :6].unbind(1):
            chord = one[-1] - one[0]
            along = (one - one[0]) @ chord / chord.square().sum()
            off = one - one[0] - along[:, None] * chord
            aside = off @ torch.linalg.svd(off, full_matrices=False)[2][0] / chord.norm()
            axis.plot(along.numpy(), (aside * aside.sum().sign()).numpy(), linewidth=0.8)
        axis.set_title(f"{path.name}: {whole:.3f}", fontsize=8)
        axis.tick_params(labelsize=6)
    save(figure, args.out / "paths.png")


def deviation(t: Tensor, z: Tensor) -> Tensor:
    """How far paths z (N, B, D) are from the straight line between their ends at the same time, mean over times, as a
    share of that line's length: (B,)."""
    r = ((t - t[0]) / (t[-1] - t[0])).view(-1, 1, 1)
    line = z[0] + r * (z[-1] - z[0])
    return (z - line).norm(dim=2).mean(0) / (z[-1] - z[0]).norm(dim=1)


def perturbed(velocity: reflow.Network, size: float, kind: str, generator: torch.Generator) -> reflow.Network:
    """The same field with noise of length size |v| on every velocity, on one of its two parts only:

    direction    v turned by the angle 2 asin(size / 2) towards a random direction; |v| stays
    magnitude    (1 + size) v or (1 - size) v, by chance; the direction stays
    """

    def noisy(z: Tensor, tau: Tensor) -> Tensor:
        v = velocity(z, tau)
        flat = v.flatten(1)
        if kind == "magnitude":
            sign = torch.randint(0, 2, (len(flat), 1), generator=generator) * 2 - 1
            return (flat * (1 + size * sign.to(flat))).view_as(v)
        other = torch.randn(flat.shape, generator=generator).to(flat)
        other -= flat * (other * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True)
        other *= flat.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
        angle = 2 * np.arcsin(size / 2)
        return (np.cos(angle) * flat + np.sin(angle) * other).view_as(v)

    return noisy


@torch.no_grad()
def noise(args: argparse.Namespace) -> None:
    """Figure 1b: the score when every velocity is off by the same length, in direction only or in magnitude only."""
    plt = pyplot()

    sd = StableDiffusion.load(args.models[0], args.device)
    clip, drawn = reference(args.clip, args.device, TEST, args.images)
    captions = [scenes.sample(TEST, i)[1] for i in range(args.images)]
    grid = reflow.sampling_grid(max(8, sd.windows) if sd.windows else FINE, sd.windows or FINE)
    curves = {"direction": [], "magnitude": []}
    for kind, curve in curves.items():
        for size in args.sizes:
            generator = torch.Generator().manual_seed(0)
            made = []
            for first in tqdm(range(0, len(captions), 100), desc=f"{kind}, {size:g}", leave=False):
                few = captions[first : first + 100]
                z = draw_noise(TEST, list(range(first, first + len(few))), (4, 8, 8)).to(sd.device)
                field = perturbed(velocity_of(sd, few, args.guidance[0]), size, kind, generator)
                made.extend(to_pixels(sd.decode(reflow.euler(field, z, grid))))
            curve.append(fid.frechet_distance(*statistics(made, clip), *drawn))
            print(f"noise of {size:g} |v| on the {kind}: Frechet distance {curve[-1]:.2f}", flush=True)
    figure, axis = plt.subplots(figsize=(4, 3))
    for kind, curve in curves.items():
        axis.plot(args.sizes, curve, marker="o", label=f"noise on the {kind}")
    axis.set_xlabel("noise / |v|")
    axis.set_ylabel("Frechet distance")
    axis.legend()
    save(figure, args.out / "noise.png")


def pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("figures need matplotlib: pip install -r requirements-dev.txt") from None
    return plt


def save(figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    print(f"wrote {file}")


def guidance(args: argparse.Namespace) -> None:
    """Figure 3: the Frechet distance and the share of prompts kept to (mean of both kinds) over guidance; and one over
    the other, where further left and up is better at every guidance."""
    plt = pyplot()
    if not args.images:
        raise InputError("guidance needs --images for its Frechet distances")

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for path, steps, sampler in map(specified, args.models):
        sd = StableDiffusion.load(path, args.device)
        held = sd.configs["scheduler"].get("trained_guidance")  # by its paths: such a flow is a single point
        scales = [held] if held else args.guidance
        rows = [row_of(path.name, sd, steps, sampler, sd.guidance_or_none(scale), args) for scale in scales]
        frechet, right = [row["frechet"] for row in rows], [(row["one item"] + row["two items"]) / 2 for row in rows]
        name = f"{path.name}, {rows[0]['sampler']} {steps}"
        for axis, x, y in zip(axes, (scales, scales, frechet), (frechet, right, right)):
            axis.plot(x, y, marker="o", markersize=3, label=name)
    words = "guidance", "Frechet distance", "prompts kept to"
    for axis, x, y in zip(axes, (0, 0, 1), (1, 2, 2)):
        axis.set_xlabel(words[x])
        axis.set_ylabel(words[y])
    axes[2].legend(fontsize=6, loc="lower left")
    save(figure, args.out / "guidance.png")


def specified(spec: Path) -> tuple[Path, int, str | None]:
    """ "DIR:4" -> the folder, the number of steps it is sampled in, and None for the usual sampler; "DIR:4:dpm++"."""
    path, *how = str(spec).split(":")
    if not 1 <= len(how) <= 2 or not how[0].isdigit() or how[1:] not in ([], *([name] for name in sample.SAMPLERS)):
        raise InputError(f"{spec}: name a model folder and its steps, as in weights/miniature:32, or :4:dpm++")
    return Path(path), int(how[0]), *(how[1:] or [None])


# ---- Side by side ---------------------------------------------------------------------------------------------------


def side(args: argparse.Namespace) -> None:
    """Figure 5: a row for each MODEL:STEPS[:SAMPLER], a column for each prompt; the same noise in every row."""
    prompts = read_prompts(args.prompts)[:8]
    images, names = [], []
    for path, steps, sampler in map(specified, args.models):
        sd = StableDiffusion.load(path, args.device)
        scale = sd.guidance_or_none(args.guidance[0])
        images += list(sample.generate(sd, prompts, steps, scale, seed=0, sampler=sampler))
        names += [f"{path.name}, {sampler or ''} {steps} steps"] + [""] * (len(prompts) - 1)
    args.out.mkdir(parents=True, exist_ok=True)
    image_grid(images, names, len(prompts)).save(args.out / "side.png")
    print(f"wrote {args.out / 'side.png'}")


COMMANDS = {
    "score": score,
    "table": write_table,
    "errors": errors,
    "velocities": velocities,
    "noise": noise,
    "guidance": guidance,
    "paths": paths,
    "side": side,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument(
        "models", type=Path, nargs="*", help="model folders; for `side` and `guidance` with :STEPS or :STEPS:SAMPLER"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[4], help="of `score`")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="`score` and `guidance` take several")
    parser.add_argument("--sampler", choices=sample.SAMPLERS, help="of `score`; default: flow or ddim")
    parser.add_argument("--ideal", type=int, metavar="WINDOWS", help="`score` the flow that MODEL could at best become")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="captions and seeds that `score` uses")
    parser.add_argument("--teacher", type=Path, default=MINIATURE, help="of `errors`")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind, and paths")
    parser.add_argument("--images", type=int, default=1000, help="of a Frechet distance; 0: prompts alone")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0, 0.05, 0.1, 0.2, 0.3], help="of `noise`, in |v|")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "docs/demo_prompts.txt")
    parser.add_argument("--clip", type=Path, default=Path(__file__).parent / "weights/miniature-clip")
    parser.add_argument("--out", type=Path, default=Path("out/figures"), help="folder for images")
    results = Path(__file__).parent / "docs/results/scores.json"
    parser.add_argument("--json", type=Path, default=results, help="where `score` keeps its rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with one_line_errors(parser):
        if not args.models and args.what != "table":
            raise InputError(f"{args.what} needs a model folder")
        COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
