"""Turn a model into another form: single file, model folder, or a flow's difference from its base.

python -m tools.convert v1-5-pruned-emaonly.safetensors OUT --tokenizer DIR    a single file -> a model folder
python -m tools.convert BASE OUT --delta FILE --windows 4 --prediction-type diff_eps   base + PeRFlow's difference
python -m tools.convert FOLDER OUT.safetensors                                 and back: a folder -> a single file
python -m tools.convert FLOW OUT.safetensors --difference-from BASE            a flow -> its difference, as PeRFlow's
"""

import argparse
from pathlib import Path

import torch

from model import StableDiffusion, shapes, write_file
from support import layouts
from support.errors import InputError, one_line_errors
from support.weights import assign, build, tensor_names
from unet import UNet


def add_delta(sd: StableDiffusion, file: str | Path, windows: int, prediction_type: str) -> None:
    """Turn a diffusion model into a flow by adding published weight differences to its UNet, in place.

    PeRFlow publishes its flows so; for SD1.5: 4 windows, prediction_type "diff_eps". Raises InputError.
    """
    file = Path(file)
    delta = build(UNet, sd.unet.cfg)
    sources = layouts.sources_in_folder("unet", delta.state_dict(), set())
    stored = dict.fromkeys(tensor_names(file), file)
    assign(delta, sources, stored, sd.device, torch.float32, str(file))
    for weight, difference in zip(sd.unet.parameters(), delta.parameters(), strict=True):
        weight.data = (weight.float() + difference).to(weight.dtype)
    sd.configs["scheduler"] |= {
        "_class_name": "PeRFlowScheduler", "num_time_windows": windows, "prediction_type": prediction_type,
    }  # fmt: skip


def save_delta(flow: StableDiffusion, base: StableDiffusion, file: str | Path) -> None:
    """Write the difference of two UNets, as `add_delta` and PeRFlow's tools read it: added to another model with the
    base's architecture, it makes a flow of that one. In the flow's dtype. Raises InputError."""
    if shapes(flow.unet) != shapes(base.unet):
        raise InputError(f"{file}: the two UNets are not built alike; name the model that the flow was made of")
    ours, theirs = flow.unet.state_dict(), base.unet.state_dict()
    write_file(Path(file), {key: (w.float() - theirs[key].float()).to(w.dtype) for key, w in ours.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a single .safetensors file of SD1.5 or SDXL, or a model folder")
    parser.add_argument("out", help="the model folder to write, or a .safetensors file")
    parser.add_argument("--tokenizer", help="folder of the tokenizer(s); single files hold none")
    parser.add_argument("--delta", help="safetensors file of UNet weight differences to add, as PeRFlow publishes them")
    parser.add_argument("--windows", type=int, help="with --delta: the number of windows of the flow")
    parser.add_argument("--prediction-type", choices=["ddim_eps", "diff_eps"], help="with --delta: what it predicts")
    parser.add_argument("--difference-from", metavar="BASE", help="write the UNet's difference from this model's alone")
    args = parser.parse_args()
    if args.delta and not (args.windows and args.prediction_type):
        parser.error("--delta also needs --windows and --prediction-type (PeRFlow's SD1.5: 4 and diff_eps)")
    if args.difference_from and not args.out.endswith(".safetensors"):
        parser.error("--difference-from writes one file: let OUT end in .safetensors")
    with one_line_errors(parser):
        sd = StableDiffusion.load(args.source, dtype=None, tokenizer=args.tokenizer)
        if args.delta:
            add_delta(sd, args.delta, args.windows, args.prediction_type)
        if args.difference_from:
            save_delta(sd, StableDiffusion.load(args.difference_from, dtype=None, tokenizer=args.tokenizer), args.out)
        else:
            sd.save(args.out)
    print(f"wrote {args.out}")
    if sd.windows and args.out.endswith(".safetensors"):
        print(f"it does not say that it is a flow of {sd.windows} windows, {sd.prediction_type}; its user has to know")


if __name__ == "__main__":
    main()
