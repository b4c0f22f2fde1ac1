"""The trainer: one stage of ProReflow turns a diffusion model, or the flow of the stage before, into a flow.

    torchrun train.py --stage 1                            8 windows, from the miniature's diffusion model
    torchrun train.py --stage 2                            4 windows, from stage 1: ProReflow-I
    torchrun train.py --stage 3                            2 windows, from stage 2: ProReflow-II
    torchrun train.py --stage 4                            1 window: one step, which the paper left open
    torchrun train.py --stage 2 --teacher BASE --alpha 0   4 windows straight from a diffusion model: PeRFlow

A step: draw latents, noise and times (`data.py`); let the teacher solve each sample's window; show the student a point
of the straight line between the window's ends (`reflow.py`); punish what its velocity there is off (`loss.py`). The
result is a whole model folder, OUT/stage-K, for sample.py, the next stage, or diffusers. Beside it, OUT/stage-K-run has
checkpoints, log.jsonl and sheets of samples (`runs.py`). Read `data.py`, `reflow.py` and `loss.py` before this file.
"""

import argparse
import copy
import functools
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import Dataset

import checkpoint
import data
import reflow
import sample
from loss import decomposed_velocity_loss
from model import InputError, StableDiffusion
from runs import Log, Stop, checkpoints, flow_scheduler, load_checkpoint, save_checkpoint, save_flow
from unet import ResnetBlock, Transformer, UNet

# stage: windows of the student. Its teacher is the student of the stage before; that of the first, a diffusion model.
STAGES = {1: 8, 2: 4, 3: 2, 4: 1}
CONDITIONS = "text", "pooled", "time_ids"  # of a batch: what a network is told besides z and tau
TEACHER_STEPS = 32  # of DDIM over the whole path, where the teacher is a diffusion model

# Settings that depend on the size of the model, by the width of its text: for SD1.5 and SDXL as PeRFlow published them,
# not tried here at full scale; for the miniature by the sweep in docs/results/sweep.md.
PUBLISHED = {"iters": 10_000, "points": 1, "starts": 0.0, "warmup": 500, "ema": 0.9999, "cooldown": 0.0}
DEFAULTS = {
    768: PUBLISHED | {"batch_size": 32, "lr": 8e-5},
    2048: PUBLISHED | {"batch_size": 16, "lr": 1e-4},
    "smaller": {
        "iters": 600, "batch_size": 64, "points": 1, "starts": 0.75, "lr": 3e-4, "warmup": 100, "ema": 0.999,
        "cooldown": 0.5,
    },
}  # fmt: skip

# STARTS: `--starts 0` draws times evenly, as the paper says. But sampling in one step per window and the next stage's
# teacher ask a flow at the starts of its windows only, and just there the network has two things to say: at tau the
# best jump through this window, at tau + 1 that through the window before. Networks are smooth in time, so it learns
# the mean of both, and pictures get worse while the loss falls. With most points at the starts it tells the two apart.
# `--starts 1` trains nothing else: best for as many steps as windows, of no use for more (docs/results/sweep.md).


@dataclass
class Process:
    """This process among those that `torchrun` started; alone without it."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> "Process":
        rank, world = sample.processes()
        device = torch.device(sample.choose_device(device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world, device)

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.world == 1:
            return numbers
        total = numbers.clone()
        dist.all_reduce(total)
        return total / self.world


def velocity_of(sd: StableDiffusion, unet: nn.Module, batch: dict, windows: int) -> reflow.Network:
    """A UNet as the velocity field of a flow of so many windows, with the texts of this batch."""
    return reflow.as_velocity(epsilon_of(unet, batch, shift=0), sd.alphas_cumprod, windows, sd.prediction_type)


def epsilon_of(unet: nn.Module, batch: dict, shift: int) -> reflow.Network:
    """(z, tau) -> what the UNet sees as noise, fp32; without guidance, so this is one evaluation."""
    dtype = next(unet.parameters()).dtype

    def epsilon(z: Tensor, tau: Tensor) -> Tensor:
        return unet(z.to(dtype), tau - shift, batch["text"], batch["pooled"], batch["time_ids"]).float()

    return epsilon


def teacher_solver(sd: StableDiffusion, batch: dict, guidance: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """(z, grid) -> where the teacher leads: DDIM of a diffusion model, Euler steps of a flow (see `solve_window`).

    The paper's guidance is 1. With more, at twice the evaluations, the path that is learned holds it for good, and the
    flow is sampled without: `--teacher-guidance`.
    """
    told = batch if guidance == 1 else without_and_with_caption(sd, batch)
    told = told | {"text": sd.unet.text_keys_values(told["text"])}  # computed once for all steps
    alone = epsilon_of(sd.unet, told, shift=0 if sd.windows else 1)

    def guided(z: Tensor, tau: Tensor) -> Tensor:
        negative, positive = alone(torch.cat([z, z]), torch.cat([tau, tau])).chunk(2)
        return negative + guidance * (positive - negative)

    epsilon = alone if guidance == 1 else guided
    if sd.windows is None:
        return lambda z, grid: reflow.ddim(epsilon, z, sd.alphas_cumprod, grid)
    velocity = reflow.as_velocity(epsilon, sd.alphas_cumprod, sd.windows, sd.prediction_type)
    return lambda z, grid: reflow.euler(velocity, z, grid)


def without_and_with_caption(sd: StableDiffusion, batch: dict) -> dict:
    """The conditions of a batch twice over, as classifier-free guidance compares them (`sample.guided_epsilon`)."""
    text, pooled = sd.encode_prompt([""])
    twice = {"text": torch.cat([text.expand_as(batch["text"]), batch["text"]]), "pooled": None, "time_ids": None}
    if pooled is not None:  # SDXL
        twice["pooled"] = torch.cat([pooled.expand_as(batch["pooled"]), batch["pooled"]])
        twice["time_ids"] = batch["time_ids"].repeat(2, 1)
    return twice


def solver_steps(sd: StableDiffusion, windows: int, steps: int | None) -> int:
    """Teacher steps in each window of the student: a diffusion model's share of 32, one for each window of a flow."""
    whole = sd.windows or TEACHER_STEPS
    if sd.windows == windows or whole % windows:
        kind = f"a flow of {whole} windows" if sd.windows else f"{whole} teacher steps"
        raise InputError(f"{kind} cannot be merged into {windows} windows; take a smaller divisor of {whole}")
    share = whole // windows
    if steps and sd.windows and steps % share:
        raise InputError(
            f"--solver-steps {steps} is no multiple of {share}, the teacher's windows in one of the student's"
        )
    return steps or share


def evaluations_of_path(steps: int, points: int, guidance: float) -> int:
    """What a path costs in evaluations of a network: the teacher's steps, and the student's points, each three, since a
    backward pass takes as long as two forward passes."""
    return steps * (1 if guidance == 1 else 2) + 3 * points


def prepare(sd: StableDiffusion, items: dict, device: torch.device) -> dict:
    """What a batch of samples becomes for the networks: latents at the UNet's scale, texts, SDXL's picture sizes."""
    # Read before they move: on a GPU, each of these looks would wait for all work that is under way there.
    captions = ["" if dropped else caption for caption, dropped in zip(items["caption"], items["dropped"])]
    items = {
        name: part.to(device, non_blocking=True) if torch.is_tensor(part) else part for name, part in items.items()
    }
    if "image" in items:
        weight = sd.vae.encoder.conv_in.weight
        with torch.no_grad():
            items["mean"], items["log_variance"] = sd.vae.encode(items["image"].to(weight.dtype))
    deviation = (0.5 * items["log_variance"].float()).exp()
    z_0 = (items["mean"].float() + deviation * items["posterior"]) * sd.vae.cfg.scaling_factor
    text, pooled = sd.encode_prompt(captions)
    height, width = (n * sd.downscale for n in z_0.shape[2:])
    time_ids = items.get("time_ids", sd.time_ids(len(z_0), height, width))
    return {
        "z_0": z_0, "noise": items["noise"], "tau": items["tau"],
        "text": text, "pooled": pooled, "time_ids": time_ids,
    }  # fmt: skip


def loss_of(
    student: nn.Module,
    teacher: StableDiffusion,
    batch: dict,
    windows: int,
    steps: int,
    alpha: float,
    guidance: float = 1.0,
    walked: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a stage on a prepared batch, and its two parts: one training triple per point. walked: what
    `own_starts` made of the first samples."""
    with torch.no_grad():
        path = reflow.solve_window(
            teacher_solver(teacher, batch, guidance), batch["z_0"], batch["noise"], batch["tau"][:, 0], windows, steps,
            teacher.alphas_cumprod, walked,
        )  # fmt: skip
        points = batch["tau"].shape[1]  # a solved path is dear, so it may serve for several points
        path = [part.repeat_interleave(points, dim=0) for part in path]
        tau = batch["tau"].flatten()
        z_t, v = reflow.straight_line(*path, tau)
    conditions = {
        name: None if batch[name] is None else batch[name].repeat_interleave(points, dim=0) for name in CONDITIONS
    }
    return decomposed_velocity_loss(velocity_of(teacher, student, conditions, windows)(z_t, tau), v, alpha)


@torch.no_grad()
def own_starts(average: UNet, teacher: StableDiffusion, batch: dict, windows: int, share: float) -> Tensor | None:
    """For the first samples of a batch, a `share` of it: starts of their windows on the student's own path from noise.

    Starts at noised pictures are those of sampling only as far as the paths do lead to such: not with guidance in them,
    and not with what the student has got wrong so far. What the teacher makes of its own points corrects that (as in
    DMD2, Yin et al. 2024, section 4.5). Not the paper's.
    """
    count = round(share * len(batch["noise"]))
    if count == 0:
        return None
    few = {name: part if part is None else part[:count] for name, part in batch.items()}
    velocity = velocity_of(teacher, average, few, windows)
    return reflow.start_on_path(velocity, few["noise"], few["tau"][:, 0], windows)


def recompute_activations(unet: UNet) -> None:
    """Gradient checkpointing: keep only the inputs of each block, and compute the rest again on the way back."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock | Transformer):
            module.forward = functools.partial(recompute, module.forward, use_reentrant=False)


def add_gradient(
    network: nn.Module,
    average: UNet,
    teacher: StableDiffusion,
    items: dict,
    steps: int,
    last: bool,
    args: argparse.Namespace,
) -> Tensor:
    """One part of an update: its loss and the loss's two parts, (3,), not yet waited for on a GPU. Gradients travel
    between processes once, with the last part."""
    batch = prepare(teacher, items, teacher.device)
    alone = nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()
    with alone:
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=teacher.dtype == torch.bfloat16):
            walked = own_starts(average, teacher, batch, args.windows, args.own_starts)
            loss, both = loss_of(
                network, teacher, batch, args.windows, steps, args.alpha, args.teacher_guidance, walked
            )
        (loss / args.accumulate).backward()
    return torch.stack([loss.detach(), both["mse"], both["cos"]])


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Up in a straight line while warming up, constant, and down to zero over the last share, `cooldown`."""
    left = (args.iters - step) / max(args.cooldown * args.iters, 1)
    return args.lr * min((step + 1) / max(args.warmup, 1), 1, left)


@torch.no_grad()
def update_average(average: UNet, network: UNet, step: int, decay: float) -> None:
    """Exponential moving average of the weights; young ones are forgotten faster, so that the start does not linger."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def settle(args: argparse.Namespace) -> None:
    """Fill in what the command line left open, and refuse what cannot be, before any work."""
    if args.stage is None and not (args.windows and args.teacher):
        raise InputError("name a --stage; or, for a stage of your own, --windows and --teacher")
    args.name = args.name or (f"stage-{args.stage}" if args.stage else f"windows-{args.windows}")
    args.windows = args.windows or STAGES[args.stage]
    before = args.out / f"stage-{args.stage - 1}" if args.stage else None
    args.teacher = args.teacher or (args.model or sample.MINIATURE if args.stage == 1 else before)
    args.student = args.student or args.teacher
    for path in args.teacher, args.student:
        if not path.exists():
            hint = f"train stage {args.stage - 1} first, or name a --teacher" if path == before else "check the path"
            raise InputError(f"the model {path} does not exist; {hint}")
        if path.is_file():
            raise InputError(f"{path} is a single file; make a folder of it: python convert.py {path} FOLDER")
    configs = checkpoint.read_json(args.teacher / "unet/config.json")
    defaults = DEFAULTS.get(configs.get("cross_attention_dim"), DEFAULTS["smaller"])
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in "windows", "iters", "batch_size", "accumulate", "points", "log_every", "save_every":
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name, share in ("--starts", args.starts), ("--own-starts", args.own_starts):
        if not 0 <= share <= 1:
            raise InputError(f"{name} is a share, from 0 to 1, not {share}")
    if args.workers < 0 or args.solver_steps is not None and args.solver_steps < 1:
        raise InputError("--workers must be at least 0, and --solver-steps at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"seed must be from 0 to 2^32 - 1, not {args.seed}")
    if args.sample_every:
        sample.read_prompts(args.sample_prompts)  # now, since the first sheet is far away


def load_networks(args: argparse.Namespace, device: torch.device) -> tuple[StableDiffusion, UNet]:
    """The teacher with all its parts, frozen, in the low precision of the device; and the student's UNet, in fp32."""
    low = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = StableDiffusion.load(args.teacher, device, low)
    # Weights are views of the mapped file until they are used: of this second model, just two parts take memory.
    stored = StableDiffusion.load(args.student, "cpu", None)
    teacher.vae = stored.vae.to(device, torch.float32)  # its rounding errors would be in every target
    return teacher, stored.unet.to(device, torch.float32).requires_grad_(True)


def source_of(args: argparse.Namespace, latent: tuple[int, ...], sd: StableDiffusion) -> Dataset:
    """The data to train on, for latents (4, h, w) of this model."""
    size = latent[1] * sd.downscale
    source = data.open_source(args.data, size, args.augment)
    if isinstance(source, data.Pictures):
        return source
    note = args.data / "made_of.json" if args.data else None
    if note and note.exists() and checkpoint.read_json(note).get("vae") != data.fingerprint(sd.vae):
        raise InputError(f"{args.data} holds latents of another VAE; make them with this model: data.py cache")
    item = source[0]
    height, width = [n * sd.downscale for n in item["mean"].shape[1:]] if args.data else item["image"].shape[1:]
    if (height, width) != (size, size):
        found = f"the data's pictures are {height} x {width}"
        raise InputError(f"{found}, not of size {size}; choose other --data or --size")
    return source


def batches_from(start: int, args: argparse.Namespace, teacher: StableDiffusion, process: Process) -> Iterator[dict]:
    """What this process is to train on from update `start` on: the parts of one update after the other."""
    size = sample.check_size(teacher, args.size) // teacher.downscale
    latent = (teacher.unet.cfg.in_channels, size, size)
    source, borders = source_of(args, latent, teacher), reflow.borders(args.windows)
    samples = data.Samples(source, args.seed, latent, borders, args.points, args.starts)
    first, count = start * args.accumulate, (args.iters - start) * args.accumulate
    return iter(data.batches(samples, first, count, args.batch_size, process.rank, process.world, args.workers))


@torch.no_grad()
def draw_sheet(teacher: StableDiffusion, average: UNet, args: argparse.Namespace, file: Path) -> None:
    """The same pictures every time, by the student of now: one step per window, at least 4."""
    flow = copy.copy(teacher)
    flow.unet = average
    flow.configs = teacher.configs | {"scheduler": flow_scheduler(teacher, args.windows, args.teacher_guidance)}
    prompts = sample.read_prompts(args.sample_prompts)[:16]
    with torch.autocast(teacher.device.type, torch.bfloat16, enabled=teacher.device.type != "cpu"):
        images = sample.generate(flow, prompts, max(args.windows, 4), args.guidance, seed=0, size=args.size)
    sample.contact_sheet(list(images), prompts, 8).save(file.with_suffix(".partial"), format="PNG")
    os.replace(file.with_suffix(".partial"), file)


def run(args: argparse.Namespace) -> None:
    settle(args)
    process = Process.start(args.device)
    folder, result = args.out / f"{args.name}-run", args.out / args.name
    if process.rank == 0:
        sample.make_folder(folder)
    if checkpoints(folder) and not args.resume:
        raise InputError(f"{checkpoints(folder)[-1]} is there already; go on with --resume, or choose another --out")

    teacher, student = load_networks(args, process.device)
    steps = solver_steps(teacher, args.windows, args.solver_steps)
    average = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    parts = {"student": student, "average": average, "optimizer": optimizer}
    settings = {name: str(getattr(args, name)) for name in KEPT} | {"processes": str(process.world)}
    start = load_checkpoint(folder, parts, settings, process.device)
    if args.recompute:
        recompute_activations(student)
    if args.compile:
        student.compile()
        teacher.unet.compile()
    network = student if process.world == 1 else DistributedDataParallel(student)

    items = batches_from(start, args, teacher, process)
    log = Log(folder, start, args, quiet=process.rank > 0)
    each = evaluations_of_path(steps, args.points, args.teacher_guidance) + args.own_starts * (args.windows - 1)
    evaluations = process.world * args.accumulate * args.batch_size * each
    stop = Stop()

    with closing(log.bar):  # so that what is said after an error has a line of its own
        for step in range(start, args.iters):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            numbers, left_out = torch.zeros(6, device=process.device), 0
            for part in range(args.accumulate):
                drawn = next(items)
                left_out += int(drawn.pop("left_out", torch.zeros(1)).sum())
                last = part == args.accumulate - 1
                numbers[:3] += add_gradient(network, average, teacher, drawn, steps, last, args) / args.accumulate
            numbers[3] = nn.utils.clip_grad_norm_(student.parameters(), 1.0)  # of the average: the same everywhere
            numbers[4], numbers[5] = stop.asked, left_out
            loss, mse, cos, norm, stopping, left_out = process.mean(numbers).tolist()  # here alone a GPU is waited for
            if not math.isfinite(norm):
                report_divergence(step, numbers[0], process, folder)
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, student, step, args.ema)
            shown = {"loss": loss, "mse": mse, "cos": cos, "grad_norm": norm, "lr": group["lr"]}
            shown["left_out"] = left_out * process.world
            log.add(step + 1, shown, evaluations)

            done = step + 1
            if process.rank == 0 and (done == args.iters or stopping or done % args.save_every == 0):
                save_checkpoint(folder, done, parts, settings)
            if process.rank == 0 and args.sample_every and (done == args.iters or done % args.sample_every == 0):
                draw_sheet(teacher, average, args, folder / f"sheet-{done:07d}.png")
            if stopping and done < args.iters:
                raise KeyboardInterrupt
    stop.restore()
    if process.rank == 0:
        scheduler = flow_scheduler(teacher, args.windows, args.teacher_guidance)
        save_flow(average, scheduler, args.teacher, result, getattr(torch, args.save_dtype))
        print(f"{result} is ready: python sample.py --model {result} --steps {max(args.windows, 4)} --prompt ...")
    if process.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def report_divergence(step: int, loss: Tensor, process: Process, folder: Path) -> None:
    """Stop, in all processes, before the weights are touched."""
    bad = torch.zeros(process.world, device=process.device)
    bad[process.rank] = not loss.isfinite()
    ranks = (process.mean(bad) > 0).nonzero().flatten().tolist()
    where = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
    good = checkpoints(folder)[-1] if checkpoints(folder) else "none was written yet"
    raise InputError(f"{where} is not finite in update {step + 1}; last good checkpoint: {good}. Try a lower --lr")


# What a resumed run must have in common with the interrupted one.
KEPT = ("teacher", "student", "windows", "alpha", "batch_size", "accumulate", "points", "solver_steps", "lr", "warmup")
KEPT += ("starts", "own_starts", "cooldown", "teacher_guidance", "ema", "seed", "size", "data", "augment", "iters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=STAGES, help="8, 4, 2 or 1 windows, from the stage before")
    parser.add_argument("--windows", type=int, help="so many windows instead")
    parser.add_argument("--model", type=Path, help="stage 1: the diffusion model's folder; default: the miniature")
    parser.add_argument("--teacher", type=Path, help="whose path is learned; default: --model, then the stage before")
    parser.add_argument("--student", type=Path, help="whose weights the student starts from; default: the teacher's")
    parser.add_argument("--data", type=Path, help="latents, captioned pictures or 'DIR/*.tar'; default: drawn scenes")
    parser.add_argument("--augment", action="store_true", help="crop pictures at random places, mirror half of them")
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="folder of all stages")
    parser.add_argument("--name", help="name of the result in --out; default: stage-K")
    parser.add_argument("--alpha", type=float, default=0.1, help="weight of the direction; 0: plain squared error")
    parser.add_argument("--iters", type=int, help="updates; default by model, see DEFAULTS")
    parser.add_argument("--batch-size", type=int, help="samples per process, and per part of an update")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of an update")
    parser.add_argument("--points", type=int, help="points shown of each solved path; more: a cheaper teacher")
    parser.add_argument("--starts", type=float, help="share of the points that lie at their window's start, see STARTS")
    parser.add_argument("--own-starts", type=float, default=0.0, help="share of paths that begin on the student's own")
    parser.add_argument("--solver-steps", type=int, help="teacher's steps per window; default: its share of all")
    parser.add_argument("--teacher-guidance", type=float, default=1.0, help="of the paths learned; the paper's is 1")
    parser.add_argument("--lr", type=float, help="learning rate; default by model")
    parser.add_argument("--warmup", type=int, help="updates until the learning rate is reached; default by model")
    parser.add_argument("--cooldown", type=float, help="share of the updates in which it falls to zero, at the end")
    parser.add_argument("--ema", type=float, help="decay of the moving average of weights, which is what is kept")
    parser.add_argument("--seed", type=int, default=0, help="of data order, noise and times")
    parser.add_argument("--size", type=int, help="height and width of pictures; default: the model's")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--save-every", type=int, default=500, help="updates between checkpoints")
    parser.add_argument("--log-every", type=int, default=20, help="updates between lines of log.jsonl")
    parser.add_argument("--sample-every", type=int, default=1000, help="updates between sample sheets; 0: none")
    parser.add_argument("--sample-prompts", type=Path, default=Path(__file__).parent / "docs/demo_prompts.txt")
    parser.add_argument("--guidance", type=float, help="of the sample sheets; default: as for sample.py")
    parser.add_argument("--save-dtype", choices=["float16", "float32"], default="float16", help="of the result")
    parser.add_argument("--device", help="cpu, cuda, ...; default: this process's GPU if there is one")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks: slow start, then faster")
    args = parser.parse_args()
    try:
        with checkpoint.one_line_errors(
            parser, "stopped; the same command with --resume goes on from the last checkpoint"
        ):
            run(args)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would take the end of its readers for a failure
        for reader in multiprocessing.active_children():  # they take no notice of gentler signals
            reader.kill()


if __name__ == "__main__":
    main()
