"""The trainer: one stage of ProReflow turns a diffusion model, or the flow of the stage before, into a flow.

    torchrun train.py --stage 1                            8 windows, from the miniature's diffusion model
    torchrun train.py --stage 2                            4 windows, from stage 1: ProReflow-I
    torchrun train.py --stage 3                            2 windows, from stage 2: ProReflow-II
    torchrun train.py --stage 4                            1 window: one step, which the paper left open
    torchrun train.py --stage 2 --teacher BASE --alpha 0   4 windows straight from a diffusion model: PeRFlow

A step: draw latents, noise and times (`data.py`); let the teacher solve each sample's window; show the student a point
of the straight line between the window's ends (`reflow.py`); penalize the error of its predicted velocity (`loss.py`).
The result is a complete model folder, OUT/stage-K, for sample.py, the next stage, or diffusers. OUT/stage-K-run has
checkpoints, log.jsonl and sample sheets (`support/runs.py`). Read `data.py`, `reflow.py` and `loss.py` first.

Shapes: B batch, z latents (B, 4, h, w), tau times (B,), grid (steps + 1, B), v velocities like z.
"""

import argparse
import copy
import functools
import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import data
import reflow
from loss import decomposed_velocity_loss
from model import MINIATURE, StableDiffusion, save_flow
from support import lora, lora_files, memory, runs
from support.captions import read_prompts
from support.checks import is_perflow
from support.devices import Process
from support.errors import InputError, Parser, at_least_0, count, one_line_errors, positive, positive_int, seed
from support.files import read_json
from support.images import image_grid, to_pixels, write_png
from support.loader import Stop
from support.official import flow_scheduler
from support.streams import draw_noise
from unet import RECOMPUTED, UNet, checkpoint_activations

# Stage -> number of windows. Stage k is taught by stage k-1's student, stage 1 by the diffusion model.
STAGES = {1: 8, 2: 4, 3: 2, 4: 1}
TEACHER_STEPS = 32  # of DDIM over all of time, where the teacher is a diffusion model
PROMPTS = Path(__file__).parent / "docs/demo_prompts.txt"  # of the sample sheets

# Settings by the width of the model's text. SD1.5 and SDXL: as PeRFlow published them, not run here at full scale.
# The miniature: chosen on validation data (paper/README.md). starts, gap and cooldown are not in the paper.
# starts: share of times moved to the start of their window, where sampling in one step a window asks the network. At a
# boundary it gets two conflicting targets, of the windows on both sides, and learns their mean. gap: share of each
# window, at its end, without times. cooldown: share of updates, at the end, in which the learning rate falls to zero.
# Batches fit one GPU of 24 GB (SD1.5, 512 pixels) and 80 GB (SDXL, 1024): --dry-run
PUBLISHED = {
    "iters": 10_000, "warmup": 500, "cooldown": 0.0, "ema": 0.9999, "starts": 0.0, "gap": 0.0,
    "gradient_checkpointing": True,
}  # fmt: skip
DEFAULTS = {
    768: PUBLISHED | {"batch_size": 8, "grad_accum_steps": 4, "lr": 8e-5},
    2048: PUBLISHED | {"batch_size": 8, "grad_accum_steps": 2, "lr": 1e-4},
    "smaller": {
        "iters": 600, "warmup": 100, "cooldown": 0.5, "ema": 0.999, "starts": 0.75, "gap": 0.0,
        "gradient_checkpointing": False, "batch_size": 64, "grad_accum_steps": 1, "lr": 3e-4,
    },
}  # fmt: skip


# ---- The method -----------------------------------------------------------------------------------------------------


def teacher_trajectory(
    teacher: StableDiffusion, batch: dict, args: argparse.Namespace, epsilon: reflow.Network | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's solution of each sample's window: (grid, z_s, z_e). epsilon: by default without guidance."""
    grid = reflow.solver_grid(batch["tau"], args.windows, args.solver_steps)
    z_s = reflow.add_noise(batch["z_0"], batch["noise"], reflow.alpha_bar(teacher.alphas_cumprod, grid[0]))
    return grid, z_s, solve(teacher, epsilon or teacher.epsilon(batch["conditions"]), z_s, grid)


def solve(teacher: StableDiffusion, epsilon: reflow.Network, z: Tensor, grid: Tensor) -> Tensor:
    """From z at grid[0] to grid[-1]: DDIM steps of a diffusion model, Euler steps of a flow."""
    if teacher.windows is None:
        return reflow.ddim(epsilon, z, teacher.alphas_cumprod, grid)
    velocity = reflow.as_velocity(epsilon, teacher.alphas_cumprod, teacher.windows, teacher.prediction_type)
    return reflow.euler(velocity, z, grid)


def compute_loss(
    student: nn.Module, teacher: StableDiffusion, batch: dict, trajectory: tuple, windows: int, alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a stage on one batch, and its two parts."""
    grid, z_s, z_e = trajectory
    z_t, v = reflow.straight_line(grid[0], grid[-1], z_s, z_e, batch["tau"])
    epsilon = teacher.epsilon(batch["conditions"], unet=student)
    velocity = reflow.as_velocity(epsilon, teacher.alphas_cumprod, windows, teacher.prediction_type)
    return decomposed_velocity_loss(velocity(z_t, batch["tau"]), v, alpha)


def solver_steps(sd: StableDiffusion, windows: int, steps: int | None = None) -> int:
    """Teacher steps in each window of the student: of a diffusion model, so many that all are about 32; of a flow, one
    for each of its windows."""
    if sd.windows is None:
        share = max(round(TEACHER_STEPS / windows), 1)
    elif windows < sd.windows and sd.windows % windows == 0:
        share = sd.windows // windows
    else:
        fitting = ", ".join(str(n) for n in range(1, sd.windows) if sd.windows % n == 0) or "no other number"
        raise InputError(f"the teacher, a flow of {sd.windows} windows, merges into {fitting} of them, not {windows}")
    if steps and (steps * windows > reflow.NOISE or sd.windows and steps % share):
        raise InputError(f"--solver-steps {steps} must be a multiple of {share}, at most {reflow.NOISE // windows}")
    return steps or share


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """A straight line up, then constant; with a cooldown, a straight line down at the end."""
    left = (args.iters - step) / max(args.cooldown * args.iters, 1)
    return args.lr * min((step + 1) / max(args.warmup, 1), 1, left)


@torch.no_grad()
def update_ema(ema: UNet, student: UNet, step: int, decay: float) -> None:
    """Exponential moving average. The decay is smaller early on, so the initial weights do not dominate."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - decay)


# ---- A run ----------------------------------------------------------------------------------------------------------


def settle(args: argparse.Namespace) -> None:
    """Fill in what the command line left open, and refuse what cannot be, before any work."""
    if args.stage is None and not (args.windows and args.teacher):
        raise InputError("name a --stage, or --windows and --teacher (these two: python -m paper.variants)")
    args.name = args.name or (f"stage-{args.stage}" if args.stage else f"windows-{args.windows}")
    args.run, args.result = args.out / f"{args.name}-run", args.out / args.name
    args.windows = args.windows or STAGES[args.stage]
    before = args.out / f"stage-{args.stage - 1}" if args.stage else None
    args.teacher = args.teacher or (args.model or MINIATURE if args.stage == 1 else before)
    args.student = args.student or args.teacher
    is_update = args.lora and (args.teacher / lora_files.NAME).exists()  # of a model, by the stage before
    args.base = args.model or MINIATURE if is_update else args.teacher
    runs.check_models(args, before)
    configs = read_json(args.teacher / "unet/config.json")
    for name, value in DEFAULTS.get(configs.get("cross_attention_dim"), DEFAULTS["smaller"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def load_networks(args: argparse.Namespace, device: torch.device) -> tuple[StableDiffusion, UNet]:
    """The teacher with all its parts, frozen, in the low precision of the device; and the student's UNet, in fp32."""
    low = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = StableDiffusion.load(args.base, device, low)
    # Weights are views of the mapped file until they are used: of these, just one part each takes memory.
    exact = StableDiffusion.load(args.base, "cpu", None)
    # The VAE is exact: its rounding errors would be in every target.
    teacher.vae = teacher.networks["vae"] = exact.vae.to(device, torch.float32)
    if args.lora:
        return teacher, add_lora(teacher, args)
    student = exact if args.student == args.teacher else StableDiffusion.load(args.student, "cpu", None)
    kinds = [(sd.unet.cfg, sd.prediction_type, is_perflow(sd.configs["scheduler"])) for sd in (exact, student)]
    if kinds[0] != kinds[1]:
        raise InputError(f"the student {args.student} is not built as the teacher {args.teacher}; choose another")
    return teacher, student.unet.to(device, torch.float32).requires_grad_(True)


def add_lora(teacher: StableDiffusion, args: argparse.Namespace) -> UNet:
    """The student is the frozen base and an update of rank --lora. So is its teacher, if a stage before made it."""
    student = lora.attach(teacher.unet, args.lora, args.seed)
    if args.base != args.teacher:
        update, teacher.configs["scheduler"] = lora_files.read_stage_before(args, teacher.unet)
        student.load_state_dict(update)
        teacher.unet = copy.deepcopy(student)
    return student.requires_grad_(True)


def begin(args: argparse.Namespace, process: Process) -> tuple:
    """What training needs, from the last checkpoint if there is one: (teacher, parts, samples, settings, start)."""
    settle(args)
    if process.rank == 0:
        runs.claim(args)
    teacher, student = load_networks(args, process.device)
    args.solver_steps = solver_steps(teacher, args.windows, args.solver_steps)
    samples = data.open_samples(args, teacher)
    ema = copy.deepcopy(student).requires_grad_(False)
    adam = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "fused": process.device.type == "cuda"}
    optimizer = process.sharded(AdamW)(student.parameters(), lr=args.lr, **adam)
    parts = {"student": student, "ema": ema, "optimizer": optimizer}
    settings = runs.settings_of(args, samples.source, args.batch_size * args.grad_accum_steps * process.world)
    return teacher, parts, samples, settings, runs.load_checkpoint(args.run, parts, settings, args.iters)


def dry_run(args: argparse.Namespace) -> None:
    """Instead of a run: print what it would hold on each GPU, and how long it would take."""
    settle(args)
    teacher = StableDiffusion.load(args.teacher, "cpu", None)  # mapped, not read
    args.solver_steps = solver_steps(teacher, args.windows, args.solver_steps)
    memory.dry_run(args, teacher.networks, data.open_samples(args, teacher).shape, RECOMPUTED)


@torch.no_grad()
def draw_sheet(teacher: StableDiffusion, ema: UNet, args: argparse.Namespace, file: Path) -> None:
    """The same images every time, by the student as it is now, in one step per window or four steps."""
    prompts, size = read_prompts(PROMPTS)[:16], teacher.image_size()
    latent = teacher.unet.cfg.in_channels, size // teacher.downscale, size // teacher.downscale
    uncond, guidance_scale, images = teacher.conditions([""], size, size), teacher.guidance, []
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=teacher.device.type != "cpu"):
        for i in range(0, len(prompts), 4):
            conditions = teacher.conditions(prompts[i : i + 4], size, size)
            epsilon = teacher.epsilon(conditions, guidance_scale, uncond, unet=ema)
            velocity = reflow.as_velocity(epsilon, teacher.alphas_cumprod, args.windows, teacher.prediction_type)
            z = draw_noise(0, range(i, i + 4), latent).to(teacher.device)
            z = reflow.euler(velocity, z, reflow.sampling_grid(max(args.windows, 4), args.windows))
            images += list(to_pixels(teacher.decode(z)))
    write_png(image_grid(images, prompts, 8), file)


def run(
    args: argparse.Namespace, trajectory: Callable = teacher_trajectory, criterion: Callable = compute_loss
) -> None:
    """Train one stage. trajectory, criterion: what is learned, and by which loss, instead of the paper's."""
    if args.dry_run:
        return dry_run(args)
    process = Process.start(args.device)
    teacher, parts, samples, settings, start = runs.together(process, lambda: begin(args, process))
    runs.together(process, lambda: runs.same_as_first(process, settings | {"checkpoint": start}, args))
    student, ema, optimizer = parts.values()
    base = StableDiffusion.load(args.base, "cpu", None)  # mapped, not read: its folder may be gone at the end
    save = functools.partial(runs.save_checkpoint, process, args.run, parts, settings)
    if args.gradient_checkpointing:
        checkpoint_activations(student)
    if args.compile:
        student.compile()
        teacher.unet.compile()
    network = student if process.world == 1 else DistributedDataParallel(student, gradient_as_bucket_view=True)
    log = runs.Log(args, start, quiet=process.rank > 0)
    with Stop() as stop, closing(log.bar):  # so that what is said after an error has a line of its own
        first, number = start * args.grad_accum_steps, (args.iters - start) * args.grad_accum_steps
        batches = iter(data.batches(samples, first, number, args.batch_size, process.rank, process.world, args.workers))
        for step in range(start, args.iters):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            numbers, left_out = torch.zeros(4, device=process.device), 0
            for part in range(args.grad_accum_steps):
                items = stop.next(batches)
                if any(process.gather(items is None)):
                    save(step)
                    process.end()
                    raise KeyboardInterrupt
                left_out += int(items.pop("left_out", torch.zeros(1)).sum())
                batch = data.prepare(teacher, items, process.device)
                # Gradients travel between processes once, with the last part.
                wait = process.world > 1 and part < args.grad_accum_steps - 1
                with network.no_sync() if wait else nullcontext():
                    with torch.autocast(process.device.type, torch.bfloat16, enabled=process.device.type != "cpu"):
                        with torch.no_grad():
                            path = trajectory(teacher, batch, args)
                        loss, both = criterion(network, teacher, batch, path, args.windows, args.alpha)
                    (loss / args.grad_accum_steps).backward()
                numbers[:3] += torch.stack([loss.detach(), both["mse"], both["cos"]]) / args.grad_accum_steps
            # Gradients are already averaged, so every rank sees the same norm.
            numbers[3] = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            everyone = process.gather([*numbers.tolist(), left_out])  # tolist: here alone a GPU is waited for
            loss, mse, cos, norm, left_out = (sum(column) / process.world for column in zip(*everyone))
            if not math.isfinite(norm):
                runs.report_divergence(step + 1, [numbers[0] for numbers in everyone], args.run)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, student, step, args.ema)
            shown = {"loss": loss, "mse": mse, "cos": cos, "grad_norm": norm, "lr": group["lr"]}
            log.add(step + 1, shown | {"left_out": left_out * process.world})

            done = step + 1
            if done == args.iters or done % args.save_every == 0:
                save(done)
            if process.rank == 0 and args.sample_every and (done == args.iters or done % args.sample_every == 0):
                draw_sheet(teacher, ema, args, args.run / f"sheet-{done:07d}.png")
    if process.rank == 0:
        scheduler = flow_scheduler(teacher, args.windows, args.teacher_guidance)
        with runs.recorded(args):
            unet = lora.merged(base.unet, ema.state_dict()) if args.lora else ema
            save_flow(unet, scheduler, base, args.result, torch.float16)
            if args.lora:
                lora_files.write(args.result, ema.state_dict(), scheduler, settings["base"])
    process.end()


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paper = parser.add_argument_group("the method")
    paper.add_argument("--stage", type=int, choices=STAGES, help="8, 4, 2 or 1 windows, taught by the stage before")
    paper.add_argument("--model", type=Path, help="folder of the diffusion model; default: the miniature")
    paper.add_argument("--teacher", type=Path, help="whose trajectories are learned; default: the stage before")
    paper.add_argument("--data", type=Path, help="latents, captioned images or 'DIR/*.tar'; default: drawn scenes")
    paper.add_argument("--out", type=Path, default=Path("out/train"), help="folder of all stages")
    paper.add_argument("--alpha", type=at_least_0, default=0.1, help="weight of the direction term; 0: squared error")
    paper.add_argument("--iters", type=positive_int, help="number of updates; default: by model, as the next two")
    paper.add_argument("--batch-size", type=positive_int, help="samples per process and forward pass")
    paper.add_argument("--lr", type=positive, help="learning rate, after the warm-up")
    paper.add_argument("--seed", type=seed, default=0, help="of data order, noise and times")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--accumulate", dest="grad_accum_steps", type=positive_int, help="forward passes per update")
    machine.add_argument("--workers", type=count, default=0, help="processes that read data")
    machine.add_argument("--save-every", type=positive_int, default=500, help="updates between checkpoints")
    machine.add_argument("--sample-every", type=count, default=1000, help="updates between sample sheets; 0: none")
    machine.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    switch = {"dest": "gradient_checkpointing", "action": argparse.BooleanOptionalAction}
    machine.add_argument("--recompute", **switch, help="gradient checkpointing: less memory, more time")
    machine.add_argument("--compile", action="store_true", help="torch.compile both networks: slow start, then faster")
    machine.add_argument("--device", help="cpu, cuda, ...; default: this process's GPU if there is one")
    rate = {"nargs": "?", "const": 400.0, "type": positive, "metavar": "TFLOPS"}
    machine.add_argument("--dry-run", **rate, help="only print memory, and time at this speed (default: 400)")
    ours = parser.add_argument_group("not in the paper (more: python -m paper.variants)")
    ours.add_argument("--lora", type=positive_int, help="train only a low-rank update of this rank: less memory")
    # Set by paper/variants.py alone, or by DEFAULTS.
    variants = "name windows student solver_steps warmup ema starts gap cooldown".split()
    parser.set_defaults(**dict.fromkeys(variants), augment=False, epsilon_loss=False, teacher_guidance=1.0, reuse=1)
    return parser


def main(parser: Parser, start: Callable[[argparse.Namespace], None]) -> None:
    with one_line_errors(parser, "stopped; the same command with --resume goes on from the last checkpoint"):
        start(parser.parse_args())


if __name__ == "__main__":
    main(arguments(), run)
