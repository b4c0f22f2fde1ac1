"""The Frechet distance between two sets of images as CLIP sees them: `fid.py` with another network.

python -m evaluation.clip_fid REFERENCE GENERATED --clip weights/miniature-clip
"""

from functools import partial
from pathlib import Path

import fid
from evaluation.clip_score import ClipScore
from evaluation.clip_vision import prepare
from support.errors import one_line_errors


def clip_network(folder: Path, device: str) -> fid.Network:
    clip = ClipScore.load(folder, device)
    to_input = partial(prepare, cfg=clip.image_config)
    name = f"mode of CLIP, network CLIP {clip.name}"
    return fid.Network(name, clip.vision.cfg.projection_dim, to_input, clip.image_features)


def main() -> None:
    parser = fid.arguments(__doc__.partition("\n")[0])
    parser.add_argument("--clip", type=Path, required=True, help="CLIP folder")
    with one_line_errors(parser):
        args = parser.parse_args()
        fid.run(args, partial(clip_network, args.clip))


if __name__ == "__main__":
    main()
