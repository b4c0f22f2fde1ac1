"""The paper's figures in miniature, and its scores (tables 1, 2 and 4).

    python -m paper.figures score MODEL ...            prompt accuracy, Frechet distance, CLIP score: rows of --json
    python -m paper.figures table                      the rows of the test split, into paper/README.md and README.md
    python -m paper.figures follow MODEL MODEL ...     how far images are from the first model's, with the same noise
    python -m paper.figures velocities MODEL ...       figure 1a: how alike velocities of different times are
    python -m paper.figures noise MODEL                figure 1b: noise on the direction against noise on the magnitude
    python -m paper.figures guidance                   figure 3: the rows of --json over guidance
    python -m paper.figures side MODEL ...             figure 5: the same seeds, side by side

MODEL is FOLDER, FOLDER:STEPS or FOLDER:STEPS:SAMPLER, as in weights/miniature:4:dpm++. Without steps, a flow takes one
for each window, a diffusion model 32. All but the first three need matplotlib. Read `miniature/judge.py` first.
"""

import argparse
import itertools
import json
import math
import operator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

import fid
import reflow
import sample
from miniature.judge import SPLITS, images_of, prompt_accuracy, reference, set_scores, statistics
from model import StableDiffusion
from support import scenes
from support.captions import read_prompts
from support.devices import choose_device
from support.errors import InputError, Parser, one_line_errors
from support.files import fingerprint, write_between, write_text
from support.images import image_grid, to_pixels, write_png
from support.scenes import TEST
from support.streams import draw_noise

HERE = Path(__file__).parent
PROMPTS = HERE.parent / "docs/demo_prompts.txt"
KINDS = "direction", "magnitude"  # of noise on velocities
SIZES = 0, 0.1, 0.2, 0.3  # of that noise, in lengths of the velocity
FINE = 32  # steps of a trajectory that is looked at closely; of a diffusion model, DDIM steps
LIKENESS = 2.0  # guidance scale at which images look most like drawn scenes, chosen on validation images
NAMES = {  # the models in weights/ and, with the commands for them in paper/README.md, in out/train/
    "miniature": "diffusion model", "proreflow-i": "ProReflow-I", "stage-3": "ProReflow-II",
    "proreflow-i-guided": "ProReflow-I, guided", "proreflow-ii-guided": "ProReflow-II, guided",
}  # fmt: skip
MARKS = "<!-- scores: python -m paper.figures table -->\n", "<!-- end of scores -->"
SUMMARY_MARKS = "<!-- summary: python -m paper.figures table -->\n", "<!-- end of summary -->"
KEY = operator.itemgetter("model", "sampler", "steps", "guidance")  # of a row
SUMMARY = {  # the rows that the project's README shows, with the paper's FID of SD1.5 on COCO-2014, table 2
    ("miniature", "ddim", 32, 2): "10.05", ("miniature", "ddim", 4, 2): "", ("miniature", "dpm++", 4, 2): "22.36",
    ("proreflow-i", "flow", 4, 2): "11.16", ("stage-3", "flow", 4, 2): "10.70", ("stage-3", "flow", 2, 2): "15.44",
    ("proreflow-i-guided", "flow", 4, 1): "", ("proreflow-ii-guided", "flow", 2, 1): "",
}  # fmt: skip
HEAD = ["model", "steps", "guidance", "NFE", "Frechet distance", "CLIP score"]
HEAD += ["prompt accuracy, one item", "two items", "paper's FID"]


def load(spec: str, device: torch.device) -> tuple[str, StableDiffusion, int, str]:
    """MODEL -> its folder's name, the model, the number of steps, the sampler."""
    path, _, how = spec.partition(":")
    steps, _, sampler = how.partition(":")
    if not (steps or "1").isdigit() or sampler not in ("", *sample.SAMPLERS):
        raise InputError(f"{spec}: name a model folder and its steps, as in weights/miniature:32, or :4:dpm++")
    sd = StableDiffusion.load(path, device)
    steps = int(steps or sd.windows or FINE)
    return Path(path).name, sd, steps, sampler or ("flow" if sd.windows else "ddim")


def scale_for(sd: StableDiffusion, args: argparse.Namespace) -> float:
    """The guidance scale of --guidance; none for a flow that holds guidance."""
    return 1.0 if sd.guidance == 1 else args.guidance[0]


# ---- Scores ---------------------------------------------------------------------------------------------------------


def score(args: argparse.Namespace) -> None:
    """A row for every model and guidance scale, unless --json has it."""
    for spec in args.models:
        name, sd, steps, sampler = load(spec, args.device)
        for scale in args.guidance:
            key = {"model": name, "weights": name_of(sd), "sampler": sampler, "steps": steps, "guidance": scale}
            key |= {"split": args.split, "prompts": args.count, "images": args.images}
            if not known(key, args.json):
                row = scores(sd, steps, scale, sampler, SPLITS[args.split], args.count, args.images)
                keep([key | row], args.json)


def name_of(sd: StableDiffusion) -> str:
    """Tells a UNet from another of the same folder."""
    return fingerprint(sd.unet.conv_in.weight, sd.unet.conv_out.weight)


def scores(
    sd: StableDiffusion, steps: int, scale: float, sampler: str, seed: int, prompts: int, images: int
) -> dict[str, float]:
    """All scores, without the last two where there are no images; and the number of network evaluations."""
    row = {"evaluations": steps * (1 if scale == 1 else 2)}  # NFE
    row |= prompt_accuracy(sd, steps, scale, seed, prompts, sampler)
    return row | (set_scores(sd, steps, scale, seed, images, sampler) if images else {})


def table(rows: list[dict], prompts: int, columns: list[str] = HEAD) -> str:
    """The rows of the test split with so many prompts of each kind, for models that have a name."""
    lines, order = [columns, ["---"] * len(columns)], list(NAMES)
    rows = [row for row in rows if row["split"] == "test" and row["prompts"] == prompts and row["model"] in NAMES]
    rows.sort(key=lambda row: (order.index(row["model"]), row["sampler"], -row["steps"], row["guidance"]))
    for row in rows:
        model = NAMES[row["model"]] + ("" if row["sampler"] == "flow" else f", {sample.SAMPLERS[row['sampler']]}")
        cells = [model, row["steps"], f"{row['guidance']:g}", row["evaluations"]]
        cells += [f"{row[score]:.2f}" if score in row else "" for score in ("frechet", "clip")]
        cells += [f"{row['one item']:.1%}", f"{row['two items']:.1%}", SUMMARY.get(KEY(row), "")]
        lines.append([cells[HEAD.index(column)] for column in columns])
    return markdown(lines)


def summary(rows: list[dict], prompts: int) -> str:
    """Some of these rows, with fewer columns."""
    rows = [row for row in rows if KEY(row) in SUMMARY and "frechet" in row]
    return table(rows, prompts, [column for column in HEAD if column not in ("guidance", "CLIP score")])


def follow(args: argparse.Namespace) -> None:
    """Mean squared difference of pixels in [-1, 1] from the first model's images. It is a paired measure, so it tells
    small differences between flows of one teacher."""
    seed, first = SPLITS[args.split], None
    captions = [scenes.caption(seed, i) for i in range(args.count)]
    for spec in args.models:
        name, sd, steps, sampler = load(spec, args.device)
        scale = scale_for(sd, args)
        images = np.stack(list(images_of(sd, captions, steps, scale, seed, sampler))) / 127.5
        first = images if first is None else first
        print(f"{name}, {steps} steps, guidance {scale:g}: {np.square(images - first).mean():.4f}", flush=True)


# ---- Velocities and trajectories ------------------------------------------------------------------------------------


def velocity_of(sd: StableDiffusion, prompts: list[str], scale: float) -> reflow.Network:
    """The field (z, tau) -> v that sampling follows. A diffusion model is taken as a flow of FINE windows, whose Euler
    steps are DDIM's."""
    size = sd.image_size()
    uncond = sd.conditions([""], size, size) if scale != 1 else None
    epsilon = sd.epsilon(sd.conditions(prompts, size, size), scale, uncond)
    return reflow.as_velocity(epsilon, sd.alphas_cumprod, sd.windows or FINE, sd.prediction_type)


@torch.no_grad()
def velocities(args: argparse.Namespace) -> None:
    """Figure 1a. Entry (i, j): mean over trajectories of |v_i - v_j| / mean |v|, and of the cosine of v_i and v_j."""
    figure, axes = panels(2, len(args.models))
    prompts, grid = [scenes.prompt(TEST, i) for i in range(args.count)], torch.tensor(reflow.boundaries(FINE))
    for column, spec in enumerate(args.models):
        name, sd, *_ = load(spec, args.device)
        z, seen = draw_noise(TEST, list(range(args.count)), (4, 8, 8)).to(sd.device), []
        velocity = velocity_of(sd, prompts, args.guidance[0])
        for step in zip(grid, grid[1:]):
            seen.append(velocity(z, step[0].to(z.device).expand(len(z))).flatten(1))
            z = reflow.euler(velocity, z, torch.stack(step))
        v = torch.stack(seen, dim=1).cpu()  # (B, FINE, D)
        distance = (torch.cdist(v, v) / v.norm(dim=2).mean()).mean(0)
        cosine = torch.cosine_similarity(v[:, :, None], v[:, None], dim=3).mean(0)
        measures = (distance, 1.5, "|v - v'| / |v|"), (cosine, 1, "cosine")
        for axis, (matrix, most, what) in zip(axes[:, column], measures):
            image = axis.imshow(matrix.numpy(), vmin=0, vmax=most, extent=(1, 0, 0, 1))
            axis.set(title=NAMES.get(name, name), xlabel="time t of v'", ylabel="time t of v")
            figure.colorbar(image, ax=axis, fraction=0.045, label=what)
        print(f"{name}: cosine {cosine.diagonal(FINE // 2).mean():.3f} for times 0.5 apart")
    save(figure, args.out / "velocities.png")


def perturbed(velocity: reflow.Network, size: float, kind: str) -> reflow.Network:
    """The same field with noise of length size |v| on every velocity, on one of its two parts only:

    direction    v turned by the angle 2 asin(size / 2) towards a random direction; |v| stays
    magnitude    (1 + size) v or (1 - size) v, at random; the direction stays
    """

    def noisy(z: Tensor, tau: Tensor) -> Tensor:
        v = velocity(z, tau).flatten(1)
        if kind == "magnitude":
            sign = torch.randint(2, (len(v), 1)).to(v) * 2 - 1
            return (v * (1 + size * sign)).view_as(z)
        other = torch.randn(v.shape).to(v)
        across = F.normalize(other - v * (other * v).sum(1, keepdim=True) / v.square().sum(1, keepdim=True))
        angle = 2 * math.asin(size / 2)
        return (math.cos(angle) * v + math.sin(angle) * v.norm(dim=1, keepdim=True) * across).view_as(z)

    return noisy


@torch.no_grad()
def noise(args: argparse.Namespace) -> None:
    """Figure 1b: the score where every velocity has an error of the same length, in direction or in magnitude only."""
    _, sd, steps, _ = load(args.models[0], args.device)
    clip, drawn = reference(args.device, TEST, args.images)
    captions = [scenes.caption(TEST, i) for i in range(args.images)]
    grid = reflow.sampling_grid(steps if sd.windows else FINE, sd.windows or FINE)
    figure, axes = panels(1, 1)
    for kind in KINDS:
        distances = []
        for size in SIZES:
            torch.manual_seed(0)
            made = []
            for first in trange(0, args.images, 100, desc=f"{kind}, {size:g}", leave=False):
                few = captions[first : first + 100]
                z = draw_noise(TEST, list(range(first, first + len(few))), (4, 8, 8)).to(sd.device)
                field = perturbed(velocity_of(sd, few, args.guidance[0]), size, kind)
                made.extend(to_pixels(sd.decode(reflow.euler(field, z, grid))))
            distances.append(fid.frechet_distance(*statistics(made, clip), *drawn))
            print(f"noise of {size:g} |v| on the {kind}: Frechet distance {distances[-1]:.2f}", flush=True)
        axes[0, 0].plot(SIZES, distances, marker="o", label=f"noise on the {kind}")
    axes[0, 0].set(xlabel="length of the noise / |v|", ylabel="Frechet distance")
    save(figure, args.out / "noise.png")


def guidance(args: argparse.Namespace) -> None:
    """Figure 3, of the rows in --json: Frechet distance and prompt accuracy (mean of both kinds) over guidance, and one
    over the other, where further left and up is better."""
    figure, axes = panels(1, 3)
    curves = {}
    for row in sorted(read_rows(args.json), key=KEY):
        if row["split"] == args.split and "frechet" in row:
            curves.setdefault(KEY(row)[:3], []).append(row)
    for (name, sampler, steps), rows in curves.items():
        values = {"guidance scale": [row["guidance"] for row in rows]}
        values["Frechet distance"] = [row["frechet"] for row in rows]
        values["prompt accuracy"] = [(row["one item"] + row["two items"]) / 2 for row in rows]
        for axis, (x, y) in zip(axes[0], itertools.combinations(values, 2)):
            axis.plot(values[x], values[y], marker="o", label=f"{NAMES.get(name, name)}, {sampler}, {steps} steps")
            axis.set(xlabel=x, ylabel=y)
    save(figure, args.out / "guidance.png")


def side(args: argparse.Namespace) -> None:
    """Figure 5: a row for each MODEL, a column for each prompt; the same noise in every row."""
    prompts, images, captions = read_prompts(PROMPTS)[:8], [], []
    for spec in args.models:
        name, sd, steps, sampler = load(spec, args.device)
        scale = scale_for(sd, args)
        images += list(sample.generate(sd, prompts, steps, scale, seed=0, sampler=sampler))
        captions += [f"{NAMES.get(name, name)}, {sampler}, {steps} steps"] + [""] * (len(prompts) - 1)
    write_png(image_grid(images, captions, len(prompts)), args.out / "side.png")


# ---- Rows in a JSON file, tables, and panels -------------------------------------------------------------------------


def read_rows(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def known(key: dict, file: Path) -> bool:
    """Does the file hold a row with these values?"""
    return any(key.items() <= row.items() for row in read_rows(file))


def keep(new: list[dict], file: Path) -> None:
    for row in new:
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    rows = read_rows(file) + new  # read again: another command may have added some
    write_text(file, "[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")


def markdown(lines: list[list]) -> str:
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def panels(rows: int, columns: int, width: float = 4, height: float = 3.2, **sharing):
    """A figure of panels, each so many inches large: the figure, and its axes (rows, columns)."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("figures need matplotlib: pip install -r requirements-dev.txt") from None
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **sharing)


def save(figure, file: Path) -> None:
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    print(f"wrote {file}")


COMMANDS = {command.__name__: command for command in (score, follow, velocities, noise, guidance, side)}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COMMANDS, "table"])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="`score` and `guidance` take several")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="captions, prompts and noise of scores")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind, and trajectories")
    parser.add_argument("--images", type=int, default=1000, help="of a Frechet distance; 0: prompt accuracy alone")
    parser.add_argument("--out", type=Path, default=Path("out/figures"), help="folder for images")
    parser.add_argument("--json", type=Path, default=HERE / "results/scores.json", help="where rows are kept")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    args = parser.parse_args()
    with one_line_errors(parser):
        args.device = torch.device(choose_device(args.device))
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "table":
            rows = read_rows(args.json)
            write_between(HERE.parent / "README.md", SUMMARY_MARKS, summary(rows, args.count))
            return write_between(HERE / "README.md", MARKS, table(rows, args.count))
        if not args.models and args.what != "guidance":
            raise InputError(f"{args.what} needs a MODEL, such as weights/miniature")
        COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
