"""Turn a model into another form: single file, model folder, flow, or a flow's difference from its base.

python -m tools.convert v1-5-pruned-emaonly.safetensors OUT --tokenizer DIR    a single file -> a model folder
python -m tools.convert FOLDER OUT.safetensors                                 and back: a folder -> a single file
python -m tools.convert MODEL OUT --windows 4 --prediction-type ddim_eps       weights that are a flow -> a flow
python -m tools.convert BASE OUT --delta FILE --windows 4 --prediction-type diff_eps   base + PeRFlow's difference
python -m tools.convert FLOW OUT.safetensors --difference-from BASE            a flow -> its difference, as PeRFlow's

Files of weights alone do not say that they are a flow; --windows and --prediction-type do. Flows trained here are
"epsilon". PeRFlow's are "ddim_eps" (SDXL) or "diff_eps" (SD1.5), and take a time index that is greater by one. Single
files that this command writes of a flow hold both in their metadata, so they need no such options.
"""

import argparse
from pathlib import Path

import torch

from model import StableDiffusion
from support import layouts
from support.checks import check_scheduler
from support.errors import InputError, one_line_errors
from support.files import write_tensors
from support.folders import tensor_names
from support.official import flow_scheduler
from support.weights import assign, build
from unet import UNet


def declare_flow(sd: StableDiffusion, windows: int, prediction_type: str) -> None:
    """Say that a model's weights are those of a flow, in place. Raises InputError if it is another one already."""
    scheduler = flow_scheduler(sd, windows, prediction_type=prediction_type)
    check_scheduler(scheduler, "--windows")
    said = [sd.windows, sd.configs["scheduler"].get("prediction_type", "ddim_eps")]
    if sd.windows and said != [windows, prediction_type]:
        raise InputError(f"the model is a flow of {said[0]} windows, {said[1]}, already; leave the options out")
    sd.configs["scheduler"] = scheduler


def add_delta(sd: StableDiffusion, file: Path) -> None:
    """Add weight differences, such as PeRFlow publishes, to the UNet of a diffusion model, in place. InputError."""
    if sd.windows:
        raise InputError(f"the model is a flow of {sd.windows} windows already; add {file} to a diffusion model")
    delta = build(UNet, sd.unet.cfg)
    stored = dict.fromkeys(tensor_names(file), file)
    sources = layouts.sources_in_folder(delta.state_dict(), stored.keys())
    assign(delta, sources, stored, sd.device, torch.float32, str(file))
    lost = total = 0.0
    for weight, difference in zip(sd.unet.parameters(), delta.parameters(), strict=True):
        exact = weight.float() + difference
        weight.data = exact.to(weight.dtype)
        lost, total = lost + (weight.float() - exact).abs().sum().item(), total + difference.abs().sum().item()
    if not total > 10 * lost:
        share = f"{lost / total:.0%} of the difference would be lost" if total else "the difference is all zeros"
        raise InputError(f"{file}: in {sd.dtype}, {share}; add it to a base stored in float32")


def save_delta(flow: StableDiffusion, base: StableDiffusion, file: Path) -> None:
    """Write the difference of two UNets, as `add_delta` and PeRFlow's tools read it: added to another model with the
    base's architecture, it makes a flow of that one. In the flow's dtype. Raises InputError."""
    if flow.unet.cfg != base.unet.cfg:
        raise InputError(f"{file}: the two UNets are not built alike; name the model that the flow was trained from")
    ours, theirs = flow.unet.state_dict(), base.unet.state_dict()
    write_tensors(file, {key: (w.float() - theirs[key].float()).to(w.dtype) for key, w in ours.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a single .safetensors file of SD1.5 or SDXL, or a model folder")
    parser.add_argument("out", type=Path, help="the model folder to write, or a .safetensors file")
    parser.add_argument("--tokenizer", help="folder of the tokenizer(s); single files hold none")
    parser.add_argument("--variant", help="which of a folder's weight files, such as v0-fix or fp16")
    parser.add_argument("--windows", type=int, help="the weights are those of a flow of this many windows")
    parser.add_argument("--prediction-type", choices=["epsilon", "ddim_eps", "diff_eps"], help="of that flow (above)")
    parser.add_argument("--delta", type=Path, help="safetensors file of UNet weight differences to add")
    parser.add_argument("--difference-from", metavar="BASE", help="write the UNet's difference from this model's alone")
    args = parser.parse_args()
    is_flow = args.windows is not None
    if is_flow != (args.prediction_type is not None) or args.delta and not is_flow:
        parser.error("a flow needs both --windows and --prediction-type (PeRFlow's SD1.5: 4 and diff_eps)")
    if args.difference_from and (is_flow or args.out.suffix != ".safetensors"):
        parser.error("--difference-from writes weights alone: let OUT end in .safetensors, and leave --windows out")
    with one_line_errors(parser):
        sd = StableDiffusion.load(args.source, dtype=None, tokenizer=args.tokenizer, variant=args.variant)
        if args.delta:
            add_delta(sd, args.delta)
        if is_flow:
            declare_flow(sd, args.windows, args.prediction_type)
        if args.difference_from:
            base = StableDiffusion.load(args.difference_from, dtype=None, tokenizer=args.tokenizer)
            save_delta(sd, base, args.out)
        else:
            sd.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
