"""Encode a data set once, for `train.py --data`: most of a training step's time that is not the networks'.

python -m tools.cache --out out/latents                                      drawn scenes, for the miniature
torchrun --nproc-per-node 8 -m tools.cache --model DIR --data DIR --out DIR  captioned images, by 8 processes
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data import open_source
from model import MINIATURE, StableDiffusion
from support import errors
from support.devices import choose_device, rank_and_world
from support.errors import InputError, positive_int
from support.files import fingerprint, make_folder, read_json, write_json
from support.latents import Latents, write_latents
from support.loader import load


def cache(sd: StableDiffusion, source: Dataset, count: int, folder: Path, shard: int = 5000, workers: int = 0) -> None:
    """Encode the first `count` images into `folder`, one file for every `shard` of them.

    What is there already is not made again; under torchrun each process makes its share. Raises InputError where the
    folder holds something else: latents of another VAE, of other images, or of another number.
    """
    make_folder(folder)
    vae, note = fingerprint(sd.vae.encoder.conv_in.weight, sd.vae.quant_conv.weight), folder / "made_of.json"
    made_of = {"vae": vae, "count": count, "shard": shard, "source": source.name}
    if note.exists():
        if (before := read_json(note)) != made_of:
            raise InputError(f"{folder} holds other latents ({before}, not {made_of}); choose another --out")
    elif any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds latents that do not say of what; choose another --out")
    rank, world = rank_and_world()
    write_json(aside := folder / f"made_of-{rank}.json", made_of)
    aside.replace(note)
    files = {k: folder / f"{k:05d}.safetensors" for k in range(rank, -(-count // shard), world)}
    todo = {k: range(k * shard, min((k + 1) * shard, count)) for k, file in files.items() if not file.exists()}
    with tqdm(total=sum(map(len, todo.values())), desc="encoding", disable=rank > 0) as bar:
        for k, numbers in todo.items():
            parts, captions, sizes = [], [], []
            for batch in load(source, [numbers[i : i + 16] for i in range(0, len(numbers), 16)], workers):
                parts.append([part.half().cpu() for part in sd.encode_moments(batch["image"])])
                captions += batch["caption"]
                sizes += [batch["time_ids"]] if "time_ids" in batch else []
                bar.update(len(batch["caption"]))
            mean, log_variance = (torch.cat(part) for part in zip(*parts))
            write_latents(files[k], mean, log_variance, captions, torch.cat(sizes) if sizes else None)


def main() -> None:
    parser = errors.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MINIATURE, help="whose VAE encodes")
    parser.add_argument("--out", type=Path, default=Path("out/latents"), help="folder of the latents")
    parser.add_argument("--data", type=Path, help="folder of captioned images, or tar shards; default: drawn scenes")
    parser.add_argument("--size", type=positive_int, help="height and width in pixels; default: the model's")
    parser.add_argument("--count", type=positive_int, help="how many images; default: all; 100,000 scenes")
    parser.add_argument("--workers", type=errors.count, default=0, help="processes that make images")
    args = parser.parse_args()
    with errors.one_line_errors(parser, "stopped; the same command goes on where it was"):
        sd = StableDiffusion.load(args.model, "cpu", None)
        source = open_source(args.data, sd.image_size(args.size))
        if isinstance(source, Latents):
            raise InputError(f"{args.data} holds latents already")
        count = args.count or (len(source) if args.data else 100_000)
        if args.data and count > len(source):
            raise InputError(f"--count {count} is too large: {args.data} holds {len(source)} images")
        sd.vae.to(choose_device(None), torch.float32)
        cache(sd, source, count, args.out, workers=args.workers)


if __name__ == "__main__":
    main()
