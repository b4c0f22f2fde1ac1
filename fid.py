"""FID: how far apart two sets of images are in the eyes of a network (Heusel et al. 2017, "GANs Trained by a Two
Time-Scale Update Rule"). The lower the better, and never to be compared across modes, networks or numbers of images.

    python fid.py REFERENCE GENERATED --protocol coco2014-30k         folders of images, or .npz statistics
    torchrun --nproc-per-node 8 fid.py REFERENCE --save-stats F.npz   statistics of a reference, once and for all
    python fid.py REFERENCE GENERATED --clip weights/miniature-clip   in CLIP's eyes: needs no other file

From top to bottom: what a network is shown, the statistics of its features, their distance. The network itself is in
`inception.py`. Read `clip_score.py` next, which asks whether an image shows what its caption says.

Shapes: B batch, C channels, H W, D features (2048 of Inception).
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import lapack
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.devices import choose_device, rank_and_world
from support.errors import InputError, one_line_errors
from support.files import fingerprint, make_folder
from support.images import settings_of_png
from support.inception import PUBLISHED, Inception

WEIGHTS = Path(__file__).parent / "weights" / Path(PUBLISHED).name
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


# ---- What the network is shown ---------------------------------------------------------------------------------------
# Here published FIDs of the same images differ by more than the methods they compare.


def read_image(file: Path) -> Image.Image:
    """Any image as RGB. As in the common tools, transparency is dropped and no EXIF rotation applied."""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255 instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


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
    """RGB image -> (3, 299, 299) as in Parmar et al. 2022, "On Aliased Resizing": PIL's bicubic, which averages what
    it shrinks, on each channel in float32, with neither rounding nor clipping.

    Their network sees (x - 128) / 128 of pixels 0..255; ours sees 2 y - 1, so that y = x / 256.
    """
    channels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    resized = [Image.fromarray(channel).resize((299, 299), Image.Resampling.BICUBIC) for channel in channels]
    return torch.from_numpy(np.stack(resized)) / 256


def legacy(image: Image.Image) -> Tensor:
    """RGB image -> (3, 299, 299) in [0, 1] as most papers before 2022: bilinear without antialiasing."""
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
    """What looks at images. `to_input` runs where images are read, in other processes."""

    name: str  # all that the numbers depend on: they are compared only with numbers of the same name
    size: int  # D
    to_input: Callable[[Image.Image], object]
    features: Callable[[list | Tensor], Tensor]  # a batch of inputs -> (B, D)


def inception_network(weights: Path, mode: str, device: str) -> Network:
    network = Inception().load(weights).to(device)
    which = fingerprint(network.Conv2d_1a_3x3.conv.weight, network.fc.weight)
    return Network(f"mode {mode}, network FID Inception {which}", 2048, MODES[mode], lambda x: network(x.to(device)))


def clip_network(folder: Path, device: str) -> Network:
    from evaluation.clip_score import ClipScore  # only here: the FID network needs nothing of CLIP

    clip = ClipScore.load(folder, device)
    size = clip.vision.cfg.projection_dim
    return Network(f"mode of CLIP, network CLIP {clip.name}", size, Image.Image.copy, clip.image_features)


# ---- Statistics ------------------------------------------------------------------------------------------------------
# Features are summed up as they come, so that a million images need no more memory than ten.


@dataclass
class Statistics:
    mu: np.ndarray  # (D,) mean of the features
    sigma: np.ndarray  # (D, D) their covariance, divided by count - 1
    count: int | None = None  # None and "" where another tool wrote the file
    name: str = ""

    def save(self, file: Path) -> None:
        """In the common tools' format, which is `mu` and `sigma`; they leave our other two alone."""
        partial_file = file.with_name(file.name + ".partial")
        with open(partial_file, "wb") as stream:
            np.savez(stream, mu=self.mu, sigma=self.sigma, count=self.count or 0, name=self.name)
        os.replace(partial_file, file)


def load_statistics(file: Path) -> Statistics:
    if not file.is_file():
        raise InputError(f"{file} does not exist; check the path")
    try:
        with np.load(file, allow_pickle=False) as content:
            mu, sigma = (np.asarray(content[key], dtype=np.float64) for key in ("mu", "sigma"))
            count, name = (content[key].item() if key in content else None for key in ("count", "name"))
    except Exception as error:  # NumPy has many ways to say it
        raise InputError(f"{file} is damaged or has no mu and sigma ({error}); make it again") from None
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise InputError(f"{file}: mu {mu.shape} and sigma {sigma.shape} should be (D,) and (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T)):
        raise InputError(f"{file}: mu and sigma are no mean and covariance, which are finite and symmetric")
    return Statistics(mu, sigma, count or None, name or "")


class Images(Dataset):
    """Item i is (input of the network, None), or (None, what is wrong with the file)."""

    def __init__(self, files: list[Path], crop: Callable | None, to_input: Callable):
        self.files, self.crop, self.to_input = files, crop, to_input

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple:
        try:
            image = read_image(self.files[i])
        except Exception as error:  # PIL's readers raise whatever a broken file makes them stumble over
            return None, f"{self.files[i]} ({error})"
        return self.to_input(self.crop(image) if self.crop else image), None


def collate(items: list[tuple]) -> tuple:
    """-> (inputs of the network, what is wrong with the others); sized alike, inputs are one tensor."""
    inputs = [item for item, problem in items if problem is None]
    problems = [problem for _, problem in items if problem is not None]
    return torch.stack(inputs) if inputs and isinstance(inputs[0], Tensor) else inputs, problems


def find_images(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, but for sample.py's overview of the others."""
    if not folder.is_dir():
        raise InputError(f"{folder} is neither a folder of images nor an .npz file of statistics; check the path")
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.name != "sheet.png")
    return sorted(file for file in files if not file.name.startswith("."))


@torch.no_grad()
def statistics(folder: Path, network: Network, crop: Callable | None, batch_size: int, workers: int) -> Statistics:
    """Mean and covariance of the features of all images in a folder. Under torchrun, each process takes its share.

    Raises InputError if more than one in a hundred cannot be read (one always may), or fewer than 2 are left.
    """
    rank, world = rank_and_world()
    files = find_images(folder)
    images = Images(files[rank::world], crop, network.to_input)
    # With a 1 after the features x, the sum of the outer products holds all: sum x x^T, sum x, and the count. In
    # float64, because the covariance is a small difference of large sums.
    sums = torch.zeros(network.size + 1, network.size + 1, dtype=torch.float64)
    batches = DataLoader(images, batch_size, num_workers=workers, collate_fn=collate)
    for inputs, problems in tqdm(batches, desc=f"{folder}, batches of {batch_size}", disable=rank > 0):
        for problem in problems:
            tqdm.write(f"skipped, cannot be read: {problem}", file=sys.stderr)
        if len(inputs):
            x = F.pad(network.features(inputs).cpu().double(), (0, 1), value=1.0)  # (B, D + 1)
            sums += x.T @ x
    if world > 1:
        torch.distributed.all_reduce(sums)
    sums = sums.numpy()
    count = int(sums[-1, -1])
    if len(files) - count > max(1, len(files) // 100):
        raise InputError(f"{folder}: {len(files) - count} of {len(files)} images cannot be read; too many to go on")
    if count < 2:
        raise InputError(f"{folder} has {count} readable images; a covariance needs 2, and a good FID thousands")
    mu = sums[:-1, -1] / count
    if not np.isfinite(sums).all():
        raise InputError(f"{folder}: the features are not finite; are the network's weights damaged?")
    return Statistics(mu, (sums[:-1, :-1] - count * np.outer(mu, mu)) / (count - 1), count, network.name)


# ---- The distance ----------------------------------------------------------------------------------------------------


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2)) for means (D,) and covariances (D, D) (Heusel et al. 2017).

    With C1 = A A^T, C1 C2 has the eigenvalues of the symmetric A^T C2 A, all real and none negative. With C2 = B B^T,
    their square roots are the singular values of A^T B. Neither needs a matrix root, which is slow, and complex where
    rounding makes a zero eigenvalue negative: always, for fewer images than features. And the singular values are
    exact to 1e-16 of the largest one, but the root of a zero eigenvalue that is 1e-16 off is 1e-8.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise InputError(f"features of {len(mu1)} and {len(mu2)} numbers cannot be compared: of two networks?")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise InputError("means and covariances must be finite")
    root_trace = np.linalg.svd(root(sigma1).T @ root(sigma2), compute_uv=False).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace)


def root(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = sigma, by a Cholesky decomposition that takes the largest pivot first and ends when what
    is left is rounding: four times as fast as eigenvectors, and as good if sigma is singular or was once float32."""
    decomposed, pivots, rank, _ = lapack.dpstrf(sigma, lower=True)
    a = np.empty((len(sigma), rank))
    a[pivots - 1] = np.tril(decomposed)[:, :rank]
    if abs(np.sum(a**2) - np.trace(sigma)) > 1e-4 * np.trace(sigma):
        raise InputError("a matrix with negative eigenvalues is no covariance")
    return a


def compare(where: str, size: int, name: str, other_where: str, other_size: int, other_name: str) -> None:
    if size != other_size:
        raise InputError(f"{where} has {size} features an image, {other_where} {other_size}: of two networks?")
    if name and other_name and name != other_name:
        raise InputError(f"{where} ({name}) and {other_where} ({other_name}) were not made alike: no comparing them")


def describe(source: Path, statistics: Statistics) -> str:
    """How many images, and what is known of how they were made: sample.py makes all in a folder alike."""
    made = {} if source.suffix == ".npz" else settings_of_png(find_images(source)[0])
    told = [f"{key} {made[key]}" for key in ("steps", "guidance", "seed") if key in made]
    told += [] if statistics.name else ["of another tool, mode and network unknown"]
    return f"{statistics.count or 'an unknown number'} of {source}" + (f" ({', '.join(told)})" if told else "")


def run(args: argparse.Namespace) -> None:
    rank, world = rank_and_world()
    sources = [args.reference] + ([args.generated] if args.generated else [])
    if args.save_stats and args.save_stats.suffix != ".npz" or not (args.save_stats or args.generated):
        raise InputError("give GENERATED to compare with, or --save-stats FILE.npz for the statistics of REFERENCE")
    if args.batch_size < 1 or args.workers < 0:
        raise InputError("--batch-size must be at least 1 and --workers at least 0")
    if args.clip and (args.mode or args.weights != WEIGHTS):
        raise InputError("--clip is another network, with a mode of its own: leave out --mode and --weights")
    if args.save_stats:
        make_folder(args.save_stats.parent)
    known = {source: load_statistics(source) for source in sources if source.suffix == ".npz"}
    protocol = PROTOCOLS[args.protocol]
    if any(source not in known for source in sources):
        device = choose_device(args.device)
        mode = args.mode or protocol.mode
        network = clip_network(args.clip, device) if args.clip else inception_network(args.weights, mode, device)
        network.name += f", protocol {args.protocol}"
        for source, stats in known.items():  # before the work, not after
            compare(str(source), len(stats.mu), stats.name, "this network", network.size, network.name)
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    found = [known.get(s) or statistics(s, network, protocol.crop, args.batch_size, args.workers) for s in sources]
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    if args.save_stats:
        found[0].save(args.save_stats)
        print(f"{args.save_stats}: statistics of {describe(sources[0], found[0])}; {found[0].name}")
    if args.generated:
        reference, generated = found
        compare(str(sources[0]), len(reference.mu), reference.name, str(sources[1]), len(generated.mu), generated.name)
        if protocol.count and generated.count != protocol.count:
            print(f"notice: {args.protocol} means {protocol.count} generated images", file=sys.stderr)
        distance = frechet_distance(reference.mu, reference.sigma, generated.mu, generated.sigma)
        name = reference.name or generated.name or "unknown mode and network"
        images = f"reference {describe(sources[0], reference)}, generated {describe(sources[1], generated)}"
        print(f"{'Frechet distance' if 'CLIP' in name else 'FID'} {distance:z.4f}: {name}; {images}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Frechet distance between two sets of images (FID).")
    parser.add_argument("reference", type=Path, help="folder of images, or .npz file of their statistics")
    parser.add_argument("generated", type=Path, nargs="?", help="the same; may be left out with --save-stats")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=f"the FID network: {WEIGHTS.name}")
    parser.add_argument("--clip", type=Path, help="compare image features of this CLIP folder instead")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="none", help="crop, resize and mode of a paper's FID")
    parser.add_argument("--mode", choices=MODES, help="resize to 299 pixels; default: the protocol's, or clean")
    parser.add_argument("--save-stats", type=Path, metavar="F.npz", help="write the statistics of the reference here")
    parser.add_argument("--batch-size", type=int, default=32, help="images looked at at once")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    with one_line_errors(parser):
        run(parser.parse_args())


if __name__ == "__main__":
    main()
