"""FID: how far apart two sets of images are in the eyes of a network (Heusel et al. 2017, "GANs Trained by a Two
Time-Scale Update Rule"). The lower the better. It is never compared across modes, networks or numbers of images.

    python fid.py REFERENCE GENERATED --protocol coco2014-30k         folders of images, or .npz statistics
    torchrun --nproc-per-node 8 fid.py REFERENCE --save-stats F.npz   statistics of a reference, once and for all
    python -m evaluation.clip_fid REFERENCE GENERATED --clip DIR      with CLIP as the network

From top to bottom: what the network is shown, the statistics of its features, their distance. The network itself is in
`support/inception.py`. Read `evaluation/clip_score.py` next: does an image show what its caption says?

Shapes: B batch, C channels, H W, D features of an image (2048 of Inception).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import lapack
from torch import Tensor

from support.devices import choose_device, rank_and_world
from support.errors import InputError, Parser, count, one_line_errors, positive_int
from support.files import fingerprint, make_folder
from support.images import find_images, read_image
from support.inception import PUBLISHED, Inception
from support.scoring import Statistics, add_up, check_left_out, read_ahead, settings_of_run

WEIGHTS = Path(__file__).parent / "weights" / Path(PUBLISHED).name


# ---- What the network is shown ---------------------------------------------------------------------------------------
# Here published FIDs of the same images differ by more than the methods they compare. All images are RGB.


def crop_then_resize(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, as large as it can be, then LANCZOS."""
    return center(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)


def resize_then_crop(image: Image.Image, size: int) -> Image.Image:
    """The short side to `size` by LANCZOS, then the square in the middle."""
    scaled = [int(size * side / min(image.size)) for side in image.size]  # rounds as torchvision does, which papers use
    return center(image.resize(scaled, Image.Resampling.LANCZOS), size)


def center(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)  # torchvision's rounding, too
    return image.crop((left, top, left + side, top + side))


def clean(image: Image.Image) -> Tensor:
    """Image -> (3, 299, 299) as in Parmar et al. 2022, "On Aliased Resizing": PIL's bicubic, which averages what it
    shrinks, on each channel in float32, clipped to 0..255 but not rounded.

    Their network sees (x - 128) / 128 of pixels x in 0..255. Ours sees 2 y - 1, so that y = x / 256.
    """
    channels = [channel.convert("F").resize((299, 299), Image.Resampling.BICUBIC) for channel in image.split()]
    return torch.from_numpy(np.stack(channels).clip(0, 255)) / 256


def legacy(image: Image.Image) -> Tensor:
    """Image -> (3, 299, 299) in [0, 1] as in most papers before 2022: bilinear without antialiasing."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return F.interpolate(x[None], (299, 299), mode="bilinear", align_corners=False, antialias=False)[0]


MODES = {"clean": clean, "legacy": legacy}


@dataclass
class Protocol:
    """How a paper computes its FID: the resize mode, what is done to both sets of images before, and how many."""

    mode: str
    crop: Callable[[Image.Image], Image.Image] | None = None
    count: int | None = None  # of generated images


PROTOCOLS = {
    "none": Protocol("clean"),
    "coco2014-30k": Protocol("clean", partial(crop_then_resize, size=256), 30000),  # GigaGAN; all of val2014
    "coco2017-5k": Protocol("legacy", partial(resize_then_crop, size=512), 5000),  # Rectified Diffusion; val2017
    "coco2014-10k": Protocol("clean", partial(crop_then_resize, size=512), 10000),  # DMD2 for SDXL; the same 10k
}


@dataclass
class Network:
    """What looks at images."""

    name: str  # all that the numbers depend on: they are compared only with numbers of the same name
    size: int  # D
    to_input: Callable[[Image.Image], Tensor]  # runs where images are read, in several threads
    features: Callable[[Tensor], Tensor]  # inputs (B, ...) -> (B, D)


def inception_network(weights: Path, mode: str, device: str) -> Network:
    network = Inception().load(weights).to(device)
    which = fingerprint(network.Conv2d_1a_3x3.conv.weight, network.fc.weight)
    return Network(f"mode {mode}, network FID Inception {which}", 2048, MODES[mode], lambda x: network(x.to(device)))


# ---- Statistics ------------------------------------------------------------------------------------------------------
# Features are summed up as they come, so that a million images need no more memory than ten.


@torch.no_grad()
def statistics(folder: Path, network: Network, crop: Callable | None, batch_size: int, workers: int) -> Statistics:
    """Mean and covariance of the features of all images in a folder. Under torchrun, each process takes its share.

    Raises InputError if more than one in a hundred cannot be read (one always may), or fewer than 2 are left.
    """
    rank, world = rank_and_world()
    files = find_images(folder)

    def read(file: Path) -> Tensor:
        image = read_image(file)  # as in the common tools, transparency is dropped and no EXIF rotation applied
        return network.to_input(crop(image) if crop else image)

    # With a 1 after the features x, the sum of the outer products holds all: sum x x^T, sum x, and the count. In
    # float64, because the covariance is a small difference of large sums.
    sums = torch.zeros(network.size + 1, network.size + 1, dtype=torch.float64)
    for batch in read_ahead(files[rank::world], read, batch_size, workers, None if rank else str(folder)):
        features = network.features(torch.stack([x for _, x in batch])).cpu().double()
        x = F.pad(features, (0, 1), value=1.0)  # (B, D + 1)
        sums += x.T @ x
    sums = add_up(sums).numpy()
    count = int(sums[-1, -1])
    check_left_out(len(files) - count, len(files), folder)
    if count < 2:
        raise InputError(f"{folder} has {count} readable image; a covariance needs 2, and a good FID thousands")
    if not np.isfinite(sums).all():
        raise InputError(f"{folder}: the features are not finite; are the network's weights damaged?")
    mu = sums[:-1, -1] / count
    return Statistics(mu, (sums[:-1, :-1] - count * np.outer(mu, mu)) / (count - 1), count, network.name)


# ---- The distance ----------------------------------------------------------------------------------------------------


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2)) for means (D,) and covariances (D, D) (Heusel et al. 2017).

    With C1 = A A^T and C2 = B B^T, the last trace is the sum of the singular values of A^T B: their squares are the
    eigenvalues of A^T C2 A, and so of C1 C2. A matrix root would be slow, and complex where rounding makes a zero
    eigenvalue negative: always, for fewer images than features.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise InputError("means and covariances must be finite")
    root_trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace)


def root(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = sigma, by a Cholesky decomposition that takes the largest pivot first and ends when only
    rounding is left. It is four times as fast as eigenvectors, and as good where sigma is singular."""
    decomposed, pivots, rank, _ = lapack.dpstrf(sigma, lower=True)
    a = np.empty((len(sigma), rank))
    a[pivots - 1] = np.tril(decomposed)[:, :rank]
    if abs(np.sum(a**2) - np.trace(sigma)) > 1e-4 * np.trace(sigma):
        raise InputError("a matrix with negative eigenvalues is no covariance")
    return a


# ---- The command -----------------------------------------------------------------------------------------------------


def check_alike(where: str, one: Statistics | Network, other_where: str, other: Statistics | Network) -> None:
    if one.size != other.size:
        raise InputError(f"{where} has {one.size} features an image, {other_where} {other.size}: of two networks?")
    if one.name and other.name and one.name != other.name:
        raise InputError(f"{where} ({one.name}) and {other_where} ({other.name}) were not made alike; do not compare")


def describe(source: Path, statistics: Statistics, made: dict[str, str]) -> str:
    """How many images, and what is known of how they were made."""
    known = [f"{key} {made[key]}" for key in ("steps", "guidance", "seed") if key in made]
    known += [] if statistics.name else ["of another tool, mode and network unknown"]
    return f"{statistics.count or 'an unknown number'} of {source}" + (f" ({', '.join(known)})" if known else "")


def run(args: argparse.Namespace, network_on: Callable[[str], Network]) -> None:
    """Compare the images of `args` as a network sees them. `network_on(device)` loads it, where it is needed."""
    sources = [args.reference] + ([args.generated] if args.generated else [])
    if args.save_stats and args.save_stats.suffix != ".npz" or not (args.save_stats or args.generated):
        raise InputError("give GENERATED to compare with, or --save-stats FILE.npz for the statistics of REFERENCE")
    if args.save_stats:
        make_folder(args.save_stats.parent)
    known = {source: Statistics.load(source) for source in sources if source.suffix == ".npz"}
    made = {source: {} if source in known else settings_of_run(source, find_images(source)) for source in sources}
    protocol = PROTOCOLS[args.protocol]
    if any(source not in known for source in sources):
        network = network_on(choose_device(args.device))
        network.name += f", protocol {args.protocol}"
        for source, stats in known.items():  # before the work, not after
            check_alike(str(source), stats, "this network", network)
    found = [known.get(s) or statistics(s, network, protocol.crop, args.batch_size, args.workers) for s in sources]
    if rank_and_world()[0] > 0:
        return
    described = [describe(source, stats, made[source]) for source, stats in zip(sources, found)]
    if args.save_stats:
        found[0].save(args.save_stats)
        print(f"{args.save_stats}: statistics of {described[0]}; {found[0].name}")
    if args.generated:
        reference, generated = found
        check_alike(str(sources[0]), reference, str(sources[1]), generated)
        if protocol.count and generated.count != protocol.count:
            print(f"notice: {args.protocol} means {protocol.count} generated images", file=sys.stderr)
        distance = frechet_distance(reference.mu, reference.sigma, generated.mu, generated.sigma)
        name = reference.name or generated.name or "unknown mode and network"
        label = "Frechet distance" if "CLIP" in name else "FID"
        print(f"{label} {distance:z.4f}: {name}; reference {described[0]}, generated {described[1]}")


def arguments(description: str) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    parser.add_argument("reference", type=Path, help="folder of images, or .npz file of their statistics")
    parser.add_argument("generated", type=Path, nargs="?", help="the same; may be left out with --save-stats")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="none", help="crop, resize and mode of a paper's FID")
    parser.add_argument("--save-stats", type=Path, metavar="F.npz", help="write the statistics of the reference here")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images looked at at once")
    parser.add_argument("--workers", type=count, default=4, help="threads that read images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    return parser


def main() -> None:
    parser = arguments("Frechet distance between two sets of images (FID).")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"the FID network: {WEIGHTS.name}")
    parser.add_argument("--mode", choices=MODES, help="resize to 299 pixels; default: the protocol's, or clean")
    with one_line_errors(parser):
        args = parser.parse_args()
        mode = args.mode or PROTOCOLS[args.protocol].mode
        run(args, lambda device: inception_network(args.weights, mode, device))


if __name__ == "__main__":
    main()
