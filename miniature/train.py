"""The miniature: a whole Stable Diffusion, small enough for a laptop, trained from nothing on drawn scenes.

    python miniature.py                 train all of it into weights/miniature (hours on two cores, minutes on a GPU)
    python miniature.py --evaluate      how good is it? accuracy on unseen prompts, Frechet distance over steps

In Stable Diffusion's order: a tokenizer, a VAE, a CLIP pair (text tower and vision tower), and the denoiser, which
sees latents of the VAE and text of CLIP. The result is an official model folder that the same classes load.
Read `scenes.py` for the images and captions, and `model.py` for the parts.
"""

import argparse
import copy
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import fid
import sample
from clip_text import BEGIN, END, ClipText, ClipTextConfig, Tokenizer
from evaluation.clip_score import ClipScore, ClipVision, ClipVisionConfig
from model import StableDiffusion
from support import layouts, scenes
from support.errors import InputError, one_line_errors
from support.files import fingerprint, replace_folder, write_json, write_tensors
from support.streams import CONTRAST, READING, SCENE, stream
from support.weights import read_config
from tools.cache import cache
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

TRAIN, VALIDATION, TEST = 0, 1, 2  # seeds of scenes.sample: what is trained on, chosen by, reported on
DETAIL = 0.8  # of captions from which places are learned, see scenes.choose_facts; others have half of it
LIKENESS = 2.0  # guidance at which images look most like drawn scenes; chosen on validation images, see README
ROOT = Path(__file__).parent

VAE_SETTINGS = {
    "_class_name": "AutoencoderKL", "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 1,
    "norm_num_groups": 8, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "act_fn": "silu",
    "sample_size": 64, "force_upcast": False,
}  # fmt: skip
TEXT_SETTINGS = layouts.CLIP_L | {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3,
    "projection_dim": 128, "architectures": ["CLIPTextModelWithProjection"],
}  # fmt: skip
VISION_SETTINGS = {
    "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
    "num_hidden_layers": 4, "projection_dim": 128, "image_size": 64, "patch_size": 8, "hidden_act": "quick_gelu",
}  # fmt: skip
UNET_SETTINGS = {
    "_class_name": "UNet2DConditionModel", "block_out_channels": [64, 96], "attention_head_dim": [2, 3],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 16, "cross_attention_dim": 128, "in_channels": 4, "out_channels": 4,
    "sample_size": 8, "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0,
}  # fmt: skip


def batches(seed: int, first: int, count: int, size: int, workers: int) -> DataLoader:
    numbers = range(first * size, (first + count) * size)
    return DataLoader(data.Scenes(seed), size, sampler=numbers, num_workers=workers)


def fit(
    name: str,
    network: nn.Module,
    loss_of: Callable[[object, int], Tensor],
    batches_of: Callable[[int, int], Iterator],
    args: argparse.Namespace,
    iterations: int,
    lr: float,
    low_precision: bool,
) -> nn.Module:
    """Train `network`, resuming where an earlier run stopped; returns the moving average of its weights (EMA).

    batches_of(first, count) yields the batches of steps first, first + 1, ...; loss_of(batch, step) is a scalar.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(500, iterations // 10 + 1)

    def rate(step: int) -> float:  # up in a straight line, down along a cosine
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / iterations, 1)))

    file, start = args.work / f"{name}.state", 0
    if file.exists():
        try:
            state = torch.load(file, map_location=args.device, weights_only=True)
            network.load_state_dict(state["network"])
            average.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
        except Exception:  # torch.load and load_state_dict have many ways to say it
            raise InputError(f"{file} is damaged or of other settings; remove it to train {name} anew") from None
        start = state["step"]
    saved, losses = time.time(), None
    bar = tqdm(total=iterations, initial=start, desc=name, mininterval=5)
    for step, batch in enumerate(batches_of(start, iterations - start), start):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step)
        torch.manual_seed(step)  # the noise of a step depends on its number alone, so resuming changes nothing
        with torch.autocast(args.device, torch.bfloat16, enabled=low_precision):
            loss = loss_of(batch, step)
        if not loss.isfinite():
            raise InputError(f"{name}: the loss is {loss.item()} at step {step}; run again to go on from {file}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        losses = loss.detach() if losses is None else losses.lerp(loss.detach(), 0.02)
        bar.update()
        bar.set_postfix_str(f"loss {losses.item():.4f}" if step % 20 == 0 else bar.postfix or "", refresh=False)
        if time.time() - saved > 120 or step + 1 == iterations:
            saved = time.time()
            state = {"network": network, "average": average, "optimizer": optimizer}
            state = {key: part.state_dict() for key, part in state.items()} | {"step": step + 1}
            torch.save(state, file.with_suffix(".partial"))
            os.replace(file.with_suffix(".partial"), file)
    bar.close()
    return average


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-pair vocabulary in which every word of the captions is one token, in the official files.

    Sennrich et al. 2016, algorithm 1: merge the pair that is seen most often, until every word is whole. Of pairs seen
    equally often, the first by name: a run that is resumed must not number its words anew.
    """
    words, merges = [[*word[:-1], word[-1] + "</w>"] for word in scenes.words()], []
    while pairs := Counter(itertools.chain.from_iterable(map(itertools.pairwise, words))):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = [merged(word, *merges[-1]) for word in words]
    letters = sorted(ByteLevel.alphabet())
    # The official order: single bytes, bytes that end a word, merges, and the two marks last.
    names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {name: i for i, name in enumerate(dict.fromkeys(names))})
    lines = "".join(" ".join(pair) + "\n" for pair in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", settings | special)
    return Tokenizer.load(folder)


def merged(word: list[str], first: str, second: str) -> list[str]:
    """The parts of a word, with each `first` that `second` follows made one with it."""
    parts = []
    for part in word:
        if parts and (parts[-1], part) == (first, second):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def train_vae(args: argparse.Namespace) -> tuple[VAE, dict]:
    """Reconstruction error (L1) plus a weak pull of the latents towards a standard normal (KL divergence).

    The pull grows with the steps: at full strength from the start, it silences channels before they are of use.
    """
    iterations = args.iters or 9000
    torch.manual_seed(0)
    vae = VAE(settings_of(VAEConfig, VAE_SETTINGS)).to(args.device)

    def loss_of(batch, step: int) -> Tensor:
        images = batch["image"].to(args.device)
        mean, log_variance = vae.encode(images)
        decoded = vae.decode(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return (decoded.float() - images).abs().mean() + 3e-4 * step / iterations * kl.float().mean()

    def drawn(first: int, count: int):
        return batches(TRAIN, first, count, 16, args.workers)

    average = fit("vae", vae, loss_of, drawn, args, iterations, lr=2e-3, low_precision=True)
    images = torch.stack([data.Scenes(TRAIN)[i]["image"] for i in range(512)]).to(args.device)
    with torch.no_grad():
        scale = 1 / average.encode(images)[0].std().item()
    settings = VAE_SETTINGS | {"scaling_factor": round(scale, 5)}
    average.cfg.scaling_factor = settings["scaling_factor"]
    return average, settings


class Clip(nn.Module):
    """The two towers and the temperature of their contrast."""

    def __init__(self):
        super().__init__()
        self.text = ClipText(settings_of(ClipTextConfig, TEXT_SETTINGS))
        self.vision = ClipVision(settings_of(ClipVisionConfig, VISION_SETTINGS))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def train_clip(tokenizer: Tokenizer, args: argparse.Namespace) -> Clip:
    """First the vision tower learns to see and the text tower to read; then both, what belongs to what."""
    torch.manual_seed(0)
    clip = Clip()
    for name, weight in clip.named_parameters():
        if name == "text.text_model.embeddings.token_embedding.weight":
            nn.init.normal_(weight, std=0.5)  # so that every word is still to be told from others behind the layers
        elif "position_embedding" in name:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    clip.to(args.device)
    count = min(args.scenes, 40_000)
    drawn = [scenes.make_scene(stream(SCENE, TRAIN, i)) for i in range(count)]
    images = torch.from_numpy(np.stack([scenes.draw(scene) for scene in tqdm(drawn, desc="drawing scenes")]))
    images = images.permute(0, 3, 1, 2)

    def steps(first: int, number: int):
        return range(first, first + number)

    there, whole = (torch.from_numpy(np.stack(part)) for part in zip(*map(labels_of, drawn)))
    width = VISION_SETTINGS["hidden_size"]
    heads = {"patch": nn.Linear(width, 1 + len(KINDS)), "whole": nn.Linear(width, whole.shape[1])}
    seer = nn.ModuleDict({"vision": clip.vision} | heads).to(args.device)

    def labelling_loss(_, step: int) -> Tensor:
        """Contrast alone teaches colors and numbers, and for very long no shapes. So first: what is on each patch, and
        what is in the whole image, on which sides?"""
        which = torch.randint(count, (64,))
        seen = seer["vision"].features(images[which].to(args.device).float() / 127.5 - 1)
        patches, image = seer["patch"](seen[:, 1:]).float(), seer["whole"](seen[:, 0]).float()
        wrong = F.binary_cross_entropy_with_logits(image, whole[which].to(args.device), reduction="none")
        on_patches = F.cross_entropy(patches.flatten(0, 1), there[which].flatten().to(args.device))
        return on_patches + 0.1 * wrong.sum(dim=1).mean()

    seer = fit("vision", seer, labelling_loss, steps, args, args.iters or 4000, lr=1.5e-3, low_precision=True)
    clip.vision.load_state_dict(seer["vision"].state_dict())

    reader = nn.ModuleDict({"clip": clip, "told": nn.Linear(TEXT_SETTINGS["hidden_size"], told_in("a red ring").size)})
    reader.to(args.device)

    def read(captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> their vectors (B, D) in the space of both towers, and the loss of reading their facts."""
        ids = tokenizer(captions)
        end = (ids != tokenizer.end).sum(dim=1)
        ids = ids[:, : end.max() + 1].to(args.device)  # padding comes after what counts
        last, _, projected = clip.text(ids)
        facts = torch.from_numpy(np.stack([told_in(caption) for caption in captions])).to(args.device)
        told = reader["told"](last[torch.arange(len(ids)), end.to(args.device)]).float()
        return projected, F.binary_cross_entropy_with_logits(told, facts, reduction="none").sum(dim=1).mean()

    def reading_loss(_, step: int) -> Tensor:
        """Contrast alone never makes the text tower tell left from right, so that a UNet which sees its text could not
        either. So first: what does the caption say of each color and shape?"""
        rng = stream(READING, TRAIN, step)
        few = [drawn[i] for i in torch.randint(count, (128,))]
        return read([scenes.say(scenes.some_facts(scene, rng, DETAIL), rng) for scene in few])[1]

    def contrast(_, step: int) -> Tensor:
        """Radford et al. 2021, figure 3; and each image's caption is also to be told from four false ones.

        These differ from it in one thing, while the images of a batch differ in so much that color alone would do.
        """
        which, rng = torch.randint(count, (64,)), stream(CONTRAST, TRAIN, step)
        captions = [scenes.captions(drawn[i], rng, wrong=4) for i in which]
        image = F.normalize(clip.vision(images[which].to(args.device).float() / 127.5 - 1).float(), dim=-1)
        text, misread = read([told[0] for told in captions] + [false for told in captions for false in told[1:]])
        text = F.normalize(text.float(), dim=-1)
        true, false = text[:64], text[64:].unflatten(0, (64, 4))
        scale = clip.logit_scale.clamp(max=math.log(100)).exp()
        logits, against_false = scale * image @ true.T, scale * torch.einsum("bd,bfd->bf", image, false)
        target = torch.arange(64, device=logits.device)
        to_text = F.cross_entropy(torch.cat([logits, against_false], dim=1), target)
        return (to_text + F.cross_entropy(logits.T, target)) / 2 + misread

    best = fit("text", reader, reading_loss, steps, args, args.iters or 4000, lr=1e-3, low_precision=True)
    reader.load_state_dict(best.state_dict())
    return fit("clip", reader, contrast, steps, args, args.iters or 1500, lr=1e-3, low_precision=True)["clip"]


KINDS = list(itertools.product(scenes.SHAPES, scenes.COLORS, scenes.SIZES))
SIDES = "on the left", "on the right", "at the top", "at the bottom"


def labels_of(scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """What lies on each 8 x 8 patch, (64,): 0 for the background, else 1 + its place in KINDS. And of the whole image
    in zeros and ones: is there one of this kind, and is there one of this shape and color on this side?"""
    most, patches = np.full((8, 8), 0.25), np.zeros((8, 8), np.int64)
    whole, sided = np.zeros(len(KINDS), np.float32), np.zeros((len(KINDS) // 2, 4), np.float32)
    for item in scene.items:
        kind = KINDS.index((item.shape, item.color, item.size))
        covered = scenes.coverage(item.shape, item.x, item.y, item.radius, item.tilt)
        share = covered.reshape(8, 8, 8, 8).mean(axis=(1, 3))
        patches[share > most] = 1 + kind
        most = np.maximum(most, share)
        whole[kind] = 1
        sided[kind // 2] = [scenes.lies(item, side, 0.05) for side in SIDES]
    return patches.flatten(), np.concatenate([whole, sided.flatten()])


def told_in(caption: str) -> np.ndarray:
    """What a caption says of each color and shape, in zeros and ones: is it named, as small, as big; as left, middle or
    right and as top, middle or bottom of the image; and the same six again, of the other item that is named."""
    facts = scenes.claims(caption)
    told = np.zeros((len(KINDS) // 2, 15), np.float32)
    for name, toward in zip(facts.items, (1, -1)):
        row = told[KINDS.index((name.shape, name.color, "small")) // 2]
        row[0] = 1
        if name.size:
            row[1 + list(scenes.SIZES).index(name.size)] = 1
        for axis in 0, 1:
            if name.position and (side := scenes.POSITIONS[name.position][axis]) is not None:
                row[4 + 3 * axis + side] = 1
            if facts.relation and (side := scenes.RELATIONS[facts.relation][axis]):
                row[10 + 3 * axis + toward * side] = 1
    return told.flatten()


@torch.no_grad()
def encode_texts(text: ClipText, ids: Tensor, device: str) -> Tensor:
    """(N, L) token ids -> (N, L, D) fp16: the text encoder is frozen, so its work is done once."""
    return torch.cat([text(few.to(device))[0].half() for few in tqdm(ids.split(1000), desc="reading captions")])


def train_unet(sd: StableDiffusion, args: argparse.Namespace) -> UNet:
    """Predict the noise in a noisy latent (Ho et al. 2020, algorithm 1), with the caption left out one time in ten."""
    # Encoded once, since the UNet sees every scene many times; another VAE makes another folder.
    folder = args.work / f"latents-{args.scenes}-{fingerprint(sd.vae.encoder.conv_in.weight, sd.vae.quant_conv.weight)}"
    cache(sd, data.Scenes(TRAIN), args.scenes, folder, workers=args.workers)
    known = data.Latents(folder)
    mean, log_variance = (
        torch.cat([part[name] for part in known.parts]).to(args.device) for name in ("mean", "log_variance")
    )
    scale = sd.vae.cfg.scaling_factor
    captions = [
        (known[i]["caption"], scenes.detailed_caption(TRAIN, i, DETAIL))
        for i in tqdm(range(len(known)), desc="telling scenes")
    ]
    different = {caption: i for i, caption in enumerate(dict.fromkeys(itertools.chain(*captions)))}
    ids = sd.tokenizers[0]([*different, ""])
    texts = encode_texts(sd.text_encoders[0], ids, args.device)  # the last is the empty one
    which = torch.tensor([[different[caption] for caption in both] for both in captions]).to(args.device)
    unet, iterations = sd.unet.requires_grad_(True), args.iters or 50_000

    def loss_of(_, step: int) -> Tensor:
        # Where things go is decided while nearly all is noise. Shown all times and captions, a network paints well
        # and does not heed "left" in tens of thousands of updates; so the first tenth shows only what teaches it that.
        first = step < iterations // 10
        pick = torch.randint(len(mean), (args.batch_size,), device=args.device)
        z = mean[pick].float()
        z = scale * (z + (0.5 * log_variance[pick].float()).exp() * torch.randn_like(z))
        t = torch.randint(400 if first else 0, 1000, (len(z),), device=args.device)
        noise = torch.randn_like(z)
        a = sd.alphas_cumprod[t].view(-1, 1, 1, 1)
        dropped = torch.rand(len(z), device=args.device) < 0.1
        told = which[pick, torch.randint(1 if first else 0, 2, (len(z),), device=args.device)]
        text = texts[torch.where(dropped, len(texts) - 1, told)].float()
        predicted = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, text)
        # Weighted as an error of the velocity (Salimans & Ho 2022, "SNR + 1"): where things go is decided at times when
        # nearly all is noise, and there a plain error of the noise hardly counts.
        return ((predicted.float() - noise).square() / a).mean()

    def steps(first: int, count: int):
        return range(first, first + count)

    on_gpu = args.device != "cpu"
    # Trained on from a model, it is not the run that made that model, whose finished state may still be there.
    name = f"unet-{fingerprint(unet.conv_in.weight, unet.conv_out.weight)}" if args.init else "unet"
    if args.compile:
        unet.compile()
    return fit(name, unet, loss_of, steps, args, iterations, lr=1e-3, low_precision=on_gpu)


def settings_of(config_class: type, settings: dict):
    return read_config(config_class, settings, config_class.__name__)


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part in ("vae", "all") and not args.init:
        vae, vae_settings = train_vae(args)
    if args.part in ("clip", "all") and not args.init:
        tokenizer = make_tokenizer(args.work / "tokenizer")
        begin, end = tokenizer.begin, tokenizer.end
        TEXT_SETTINGS.update(vocab_size=end + 1, bos_token_id=begin, eos_token_id=end, pad_token_id=end)
        clip = train_clip(tokenizer, args)
        save_clip(clip, tokenizer, args.clip)
    if args.part != "all":
        return

    if args.init:
        sd = StableDiffusion.load(args.init, args.device)
    else:
        torch.manual_seed(0)
        unet = UNet(settings_of(UNetConfig, UNET_SETTINGS))
        nn.init.zeros_(unet.conv_out.weight)
        del clip.text.text_projection  # CLIP's own affair, not part of Stable Diffusion's text encoder
        configs = {
            "model_index": layouts.SD15["model_index"], "scheduler": layouts.SCHEDULER, "unet": UNET_SETTINGS,
            "vae": vae_settings, "text_encoder": TEXT_SETTINGS | {"architectures": ["CLIPTextModel"]},
        }  # fmt: skip
        networks = {"unet": unet.to(args.device), "vae": vae, "text_encoder": clip.text}
        sd = StableDiffusion(networks, [tokenizer], configs)
    sd.networks["unet"] = train_unet(sd, args)
    for network in sd.networks.values():
        network.requires_grad_(False).half()
    sd.save(args.out)
    print(f"wrote {args.out}")


def save_clip(clip: Clip, tokenizer: Tokenizer, folder: Path) -> None:
    """The CLIP pair as a CLIP folder of the usual layout, for clip_score.py and other libraries."""
    aside = folder.with_name(folder.name + ".partial")
    write_json(aside / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 128,
        "text_config": TEXT_SETTINGS, "vision_config": VISION_SETTINGS,
    })  # fmt: skip
    halves = {"crop_size": 64, "size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    write_json(aside / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"} | halves)
    state = {name.removeprefix("text.").removeprefix("vision."): w.half() for name, w in clip.state_dict().items()}
    write_tensors(aside / "model.safetensors", state)
    for name, content in tokenizer.files.items():
        (aside / name).write_bytes(content)
    replace_folder(aside, folder)


def images_of(
    sd: StableDiffusion, prompts: list[str], steps: int, guidance: float, seed: int, sampler: str | None = None
) -> Iterator[np.ndarray]:
    """Images of the prompts, uint8 (64, 64, 3), one after the other; image i has noise (seed, i)."""
    for first in tqdm(range(0, len(prompts), 100), desc=f"{steps} steps, guidance {guidance:g}", leave=False):
        few = prompts[first : first + 100]
        indices = list(range(first, first + len(few)))
        yield from sample.generate(sd, few, steps, guidance, seed, sampler=sampler, indices=indices)


def accuracy(
    sd: StableDiffusion, steps: int, guidance: float, seed: int, named: int, count: int, sampler: str | None = None
) -> float:
    """Share of prompts that name one or two items of which the image shows all that they say."""
    prompts = [scenes.prompt(seed, i, named) for i in range(count)]
    images = images_of(sd, prompts, steps, guidance, seed, sampler)
    return sum(scenes.judge(image, prompt) for image, prompt in zip(images, prompts)) / count


def statistics(images: Iterable[np.ndarray], clip: ClipScore) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the images' features in the miniature's own CLIP."""
    images = np.stack(list(images))
    features = torch.cat([clip.image_features(images[i : i + 200]) for i in range(0, len(images), 200)])
    return features.double().numpy().mean(axis=0), np.cov(features.double().numpy(), rowvar=False)


def evaluate(args: argparse.Namespace) -> None:
    """Choose the guidance on validation prompts, then report on test prompts. For diffusion models and for flows.

    The Frechet distance is that of images at guidance LIKENESS: more of it takes away variety.
    """
    sd, count = StableDiffusion.load(args.out, args.device), args.count
    if sd.windows:
        runs = [("flow", steps) for steps in (8, 4, 2, 1) if steps >= sd.windows]
    else:
        runs = [("ddim", steps) for steps in (32, 16, 8, 4)] + [("dpm++", steps) for steps in (8, 4)]
    likeness, given = sd.guidance_or_none(LIKENESS), args.guidance
    if likeness == 1:  # this flow's paths hold guidance: there is none to choose
        given = likeness
    scores = {given: 0.0} if given else {}
    for guidance in (2.0, 3.0, 4.0, 5.0, 7.0) if not scores else ():
        sampler, steps = runs[0] if sd.windows else runs[1]
        one, two = (accuracy(sd, steps, guidance, VALIDATION, named, count, sampler) for named in (1, 2))
        print(f"validation, guidance {guidance:g}: one item {one:.1%}, two {two:.1%}", flush=True)
        scores[guidance] = one + two
    best = max(scores, key=scores.get)

    print(f"test: {count} prompts a kind at guidance {best:g}, {args.images} images at {likeness:g}")
    if args.images:
        clip = ClipScore.load(args.clip, args.device)
        parts = range(args.images), range(args.images, 2 * args.images)
        drawn = [statistics((scenes.sample(TEST, i)[0] for i in part), clip) for part in parts]
        captions = [scenes.sample(TEST, i)[1] for i in parts[0]]
        apart = fid.frechet_distance(*drawn[0], *drawn[1])
        print(f"(in features of its CLIP, two such sets of drawn scenes are {apart:.2f} apart)")
    print("| sampler | steps | one item | two items | Frechet distance |\n|---|---|---|---|---|")
    for sampler, steps in runs:
        one, two = (accuracy(sd, steps, best, TEST, named, count, sampler) for named in (1, 2))
        distance = ""
        if args.images:
            made = statistics(images_of(sd, captions, steps, likeness, TEST, sampler), clip)
            distance = f"{fid.frechet_distance(*made, *drawn[0]):.2f}"
        print(f"| {sampler} | {steps} | {one:.1%} | {two:.1%} | {distance} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "weights/miniature", help="the model folder to write")
    parser.add_argument("--clip", type=Path, default=ROOT / "weights/miniature-clip", help="the CLIP folder to write")
    parser.add_argument("--work", type=Path, default=ROOT / "out/miniature", help="checkpoints, to resume from")
    parser.add_argument("--part", choices=["vae", "clip", "all"], default="all", help="train only this part")
    parser.add_argument("--init", type=Path, help="train the UNet of this model folder on; leave its other parts alone")
    parser.add_argument("--iters", type=int, help="training steps of each part, instead of the default; for a taste")
    parser.add_argument("--evaluate", action="store_true", help="do not train; measure what is in --out")
    parser.add_argument("--count", type=int, default=1000, help="with --evaluate: prompts of each kind")
    parser.add_argument("--images", type=int, default=1000, help="of a Frechet distance, with --evaluate; 0: none")
    parser.add_argument("--guidance", type=float, help="with --evaluate: take this one, do not look for the best")
    parser.add_argument("--batch-size", type=int, default=64, help="of the UNet")
    parser.add_argument("--scenes", type=int, default=100_000, help="how many scenes the UNet sees, again and again")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the UNet: starts slowly, needs a C++ compiler"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    args = parser.parse_args()
    with one_line_errors(parser, "stopped; the same command goes on from the last checkpoint"):
        evaluate(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main()
