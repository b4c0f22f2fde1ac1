"""The miniature: a whole Stable Diffusion, small enough for a laptop, trained from scratch on drawn scenes.

    python -m miniature.train    train all parts into weights/miniature (hours on two cores, minutes on a GPU)

In Stable Diffusion's order: a tokenizer, a VAE, a CLIP pair (text tower and vision tower), and the UNet, which sees
latents of the VAE and text of CLIP. The result is a model folder in the official layout.
Read `support/scenes.py` for the images and captions, and `model.py` for the parts. Read `miniature/judge.py` next.
"""

import argparse
import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm, trange

import reflow
from clip_text import BEGIN, END, ClipText, ClipTextConfig, Tokenizer
from evaluation.clip_vision import ClipVision, ClipVisionConfig
from model import MINIATURE, StableDiffusion
from support import official, scenes
from support.datasets import Scenes
from support.devices import Process, choose_device
from support.errors import Parser, one_line_errors
from support.files import replaced, write_json, write_tensors
from support.latents import Latents, cache, name_of
from support.runs import load_checkpoint, save_checkpoint
from support.scenes import TRAIN
from support.streams import CONTRAST, READING, SCENE, stream
from support.weights import read_config
from train import update_ema
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

SAVE_EVERY = 100  # updates
DETAIL = 0.8  # of captions from which places are learned, see scenes.choose_facts; others have half of it

VAE_SETTINGS = official.SD15["vae"] | {
    "block_out_channels": [16, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64,
}  # fmt: skip
TEXT_SETTINGS = official.CLIP_L | {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3,
    "projection_dim": 128,
}  # fmt: skip
VISION_SETTINGS = {
    "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "hidden_act": "quick_gelu",
    "num_hidden_layers": 4, "projection_dim": 128, "image_size": 64, "patch_size": 8,
}  # fmt: skip
UNET_SETTINGS = official.SD15["unet"] | {
    "block_out_channels": [64, 96], "attention_head_dim": [2, 3], "layers_per_block": 1, "norm_num_groups": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 128, "sample_size": 8,
}  # fmt: skip


def fit(network: nn.Module, compute_loss: Callable[[int], Tensor], run: Path, iters: int, lr: float) -> None:
    """Train `network` in place, from the checkpoint in `run` on if there is one. It ends with the EMA of its weights.

    compute_loss(step) draws a batch of its own and returns the loss, a scalar.
    """
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(500, iters // 10 + 1)
    parts = {"network": network, "ema": ema, "optimizer": optimizer}
    start = load_checkpoint(run, parts, {}, iters)
    device = next(network.parameters()).device
    bar = trange(start, iters, initial=start, total=iters, desc=run.name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:  # a straight line up, then a cosine down
            group["lr"] = lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / iters))
        torch.manual_seed(step)  # the noise of a step depends on its number alone, so resuming changes nothing
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = compute_loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, step, 0.999)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == iters:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            save_checkpoint(Process(0, 1, device), run, parts, {}, step + 1)
    network.load_state_dict(ema.state_dict())


def pixels(images: Tensor, args: argparse.Namespace) -> Tensor:
    """uint8 images, on the CPU, as networks take them: in [-1, 1], on the device."""
    return images.to(args.device, non_blocking=True).float() / 127.5 - 1


# ---- Tokenizer ------------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-pair vocabulary in which every word of the captions is one token, in the official files.

    Sennrich et al. 2016, algorithm 1: merge the most frequent pair until every word is whole. Of equally frequent ones,
    take the first by name, so that a resumed run numbers its words as before.
    """
    captions = " ".join(scenes.caption(TRAIN, i) for i in range(1000)).replace(",", "")
    words, merges = [" ".join(word) + "</w>" for word in sorted(set(captions.split()))], []
    while pairs := Counter(pair for word in words for pair in itertools.pairwise(word.split())):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        pair = re.compile(rf"(?<!\S){' '.join(merges[-1])}(?!\S)")  # with spaces, or an end, around it
        words = [pair.sub("".join(merges[-1]), word) for word in words]
    letters = sorted(ByteLevel.alphabet())
    # The official order: single bytes, bytes that end a word, merges, and the two marks last.
    names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    special = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "vocab.json", {name: i for i, name in enumerate(dict.fromkeys(names))})
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings | special)
    lines = "".join(" ".join(pair) + "\n" for pair in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    return Tokenizer.load(folder)


# ---- VAE ------------------------------------------------------------------------------------------------------------


def train_vae(images: Tensor, args: argparse.Namespace) -> tuple[VAE, dict]:
    """Reconstruction error (L1), and a weak pull of the latents towards a standard normal (KL divergence).

    The weight of the pull grows with the steps. At full strength from the start, it silences channels for good.
    """
    iters = args.iters or 9000
    torch.manual_seed(0)
    vae = VAE(read_config(VAEConfig, VAE_SETTINGS, "VAE")).to(args.device)

    def compute_loss(step: int) -> Tensor:
        few = pixels(images[torch.randint(len(images), (16,))], args)
        mean, log_variance = vae.encode(few)
        decoded = vae.decode(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return (decoded.float() - few).abs().mean() + 3e-4 * step / iters * kl.float().mean()

    fit(vae, compute_loss, args.work / "vae", iters, lr=2e-3)
    with torch.no_grad():
        deviation = vae.encode(pixels(images[:512], args))[0].std().item()
    vae.cfg.scaling_factor = round(1 / deviation, 5)
    return vae, VAE_SETTINGS | {"scaling_factor": vae.cfg.scaling_factor}


# ---- CLIP -----------------------------------------------------------------------------------------------------------


class Clip(nn.Module):
    """Both towers, and the temperature of their contrast."""

    def __init__(self, text_settings: dict):
        super().__init__()
        text_settings = text_settings | {"architectures": ["CLIPTextModelWithProjection"]}
        self.text = ClipText(read_config(ClipTextConfig, text_settings, "text tower"))
        self.vision = ClipVision(read_config(ClipVisionConfig, VISION_SETTINGS, "vision tower"))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for name, weight in self.named_parameters():
            if name.endswith("token_embedding.weight"):
                nn.init.normal_(weight, std=0.5)  # so that words still differ behind the layers
            elif "position_embedding" in name:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


def train_clip(
    tokenizer: Tokenizer, text_settings: dict, drawn: list[scenes.Scene], images: Tensor, args: argparse.Namespace
) -> Clip:
    """First the vision tower learns to see and the text tower to read, then both learn which image has which caption.

    Contrast alone teaches colors and numbers soon, shapes very late, and left and right never.
    """
    torch.manual_seed(0)
    clip = Clip(text_settings).to(args.device)
    on_patches, in_image = (torch.from_numpy(np.stack(part)) for part in zip(*map(image_labels, drawn)))
    width = clip.vision.cfg.hidden_size
    heads = {"patch": nn.Linear(width, 1 + len(KINDS)), "image": nn.Linear(width, in_image.shape[1])}
    seer = nn.ModuleDict({"vision": clip.vision} | heads).to(args.device)

    def seeing_loss(step: int) -> Tensor:
        """What is on each patch? What is in the whole image, and on which side?"""
        which = torch.randint(len(drawn), (64,))
        features = seer["vision"].features(pixels(images[which], args))
        patches, image = seer["patch"](features[:, 1:]), seer["image"](features[:, 0])
        patch_loss = F.cross_entropy(patches.float().flatten(0, 1), on_patches[which].flatten().to(args.device))
        return patch_loss + 0.1 * label_loss(image, in_image[which].to(args.device))

    fit(seer, seeing_loss, args.work / "vision", args.iters or 4000, lr=1.5e-3)
    facts = nn.Linear(clip.text.cfg.hidden_size, stated_facts("a red ring").size)
    reader = nn.ModuleDict({"clip": clip, "facts": facts}).to(args.device)

    def read(captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> their embeddings (B, D) in the space of both towers, and the loss of reading their facts."""
        ids = tokenizer(captions)
        end = (ids != tokenizer.end).sum(dim=1)
        ids = ids[:, : end.max() + 1].to(args.device)  # padding comes after all that counts
        last, _, projected = clip.text(ids)
        said = reader["facts"](last[torch.arange(len(ids), device=args.device), end.to(args.device)])
        stated = torch.from_numpy(np.stack([stated_facts(caption) for caption in captions]))
        return projected, label_loss(said, stated.to(args.device))

    def reading_loss(step: int) -> Tensor:
        """What does the caption say of each color and shape?"""
        rng = stream(READING, TRAIN, step)
        few = [drawn[i] for i in torch.randint(len(drawn), (128,))]
        return read([scenes.say(scenes.some_facts(scene, rng, DETAIL), rng) for scene in few])[1]

    def contrast(step: int) -> Tensor:
        """Radford et al. 2021, figure 3; each image also has four false captions, which differ from the true one in one
        thing. The images of a batch differ in so much that color alone would tell them apart."""
        which, rng = torch.randint(len(drawn), (64,)), stream(CONTRAST, TRAIN, step)
        true = [scenes.say(scenes.some_facts(drawn[i], rng), rng) for i in which]
        false = [scenes.falsify(caption, drawn[i], rng) for i, caption in zip(which, true) for _ in range(4)]
        image = F.normalize(clip.vision(pixels(images[which], args)).float(), dim=-1)
        text, misread = read(true + false)
        text = F.normalize(text.float(), dim=-1)
        scale = clip.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * image @ text[:64].T
        against_false = scale * torch.einsum("bd,bfd->bf", image, text[64:].unflatten(0, (64, 4)))
        target = torch.arange(64, device=logits.device)
        to_text = F.cross_entropy(torch.cat([logits, against_false], dim=1), target)
        return (to_text + F.cross_entropy(logits.T, target)) / 2 + misread

    fit(reader, reading_loss, args.work / "text", args.iters or 4000, lr=1e-3)
    fit(reader, contrast, args.work / "clip", args.iters or 1500, lr=1e-3)
    return clip


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy: the sum over the labels of a sample, the mean over samples."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").sum(dim=1).mean()


KINDS = list(itertools.product(scenes.SHAPES, scenes.COLORS, scenes.SIZES))


def image_labels(scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """What lies on each 8 x 8 patch, (64,): 0 for the background, else 1 + its place in KINDS. And of the whole image
    in zeros and ones: is there one of this kind, and is there one of this shape and color on this side?"""
    sides = "on the left", "on the right", "at the top", "at the bottom"
    most, patches = np.full((8, 8), 0.25), np.zeros((8, 8), np.int64)
    whole, sided = np.zeros(len(KINDS), np.float32), np.zeros((len(KINDS) // 2, 4), np.float32)
    for item in scene.items:
        kind = KINDS.index((item.shape, item.color, item.size))
        covered = scenes.coverage(item.shape, item.x, item.y, item.radius, item.tilt)
        share = covered.reshape(8, 8, 8, 8).mean(axis=(1, 3))
        patches[share > most] = 1 + kind
        most = np.maximum(most, share)
        whole[kind] = 1
        sided[kind // 2] = [scenes.lies(item, side, 0.05) for side in sides]
    return patches.flatten(), np.concatenate([whole, sided.flatten()])


def stated_facts(caption: str) -> np.ndarray:
    """What a caption says of each color and shape, in zeros and ones: is it named, as small, as big; as left, middle or
    right and as top, middle or bottom of the image; and the same six again, of the other item that is named."""
    facts = scenes.claims(caption)
    stated = np.zeros((len(KINDS) // 2, 15), np.float32)
    for name, toward in zip(facts.items, (1, -1)):
        row = stated[KINDS.index((name.shape, name.color, "small")) // 2]
        row[0] = 1
        if name.size:
            row[1 + list(scenes.SIZES).index(name.size)] = 1
        for axis in 0, 1:
            if name.position and (side := scenes.POSITIONS[name.position][axis]) is not None:
                row[4 + 3 * axis + side] = 1
            if facts.relation and (side := scenes.RELATIONS[facts.relation][axis]):
                row[10 + 3 * axis + toward * side] = 1
    return stated.flatten()


def save_clip(clip: Clip, tokenizer: Tokenizer, text_settings: dict, folder: Path) -> None:
    """Write the pair as a CLIP folder of the usual layout, for `evaluation/clip_score.py` and other libraries."""
    towers = {"text_config": text_settings, "vision_config": VISION_SETTINGS}
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 128}
    halves = {"crop_size": 64, "size": 64, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    state = {name.removeprefix("text.").removeprefix("vision."): w.half() for name, w in clip.state_dict().items()}
    with replaced(folder) as aside:
        write_json(aside / "config.json", config | towers)
        write_json(aside / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"} | halves)
        write_tensors(aside / "model.safetensors", state)
        for name, content in tokenizer.files.items():
            (aside / name).write_bytes(content)


# ---- UNet -----------------------------------------------------------------------------------------------------------


def train_unet(sd: StableDiffusion, args: argparse.Namespace) -> None:
    """Predict the noise in a noisy latent (Ho et al. 2020, algorithm 1), without the caption one time in ten."""
    # The UNet sees every scene many times, so latents and texts are made once. Another VAE has another folder.
    folder = args.work / f"latents-{args.scenes}-{name_of(sd.vae)}"
    cache(sd, Scenes(TRAIN), args.scenes, folder)
    latents = Latents(folder)
    known = [latents[i] for i in range(len(latents))]
    mean = torch.stack([item["mean"] for item in known]).to(args.device)
    deviation = torch.stack([(0.5 * item["log_variance"]).exp() for item in known]).to(args.device)
    detailed = [scenes.caption(TRAIN, i, DETAIL) for i in trange(len(known), desc="writing detailed captions")]
    captions = [(item["caption"], more) for item, more in zip(known, detailed)]
    number = {caption: i for i, caption in enumerate(dict.fromkeys([*itertools.chain(*captions), ""]))}
    blocks = (list(number)[i : i + 1000] for i in trange(0, len(number), 1000, desc="encoding captions"))
    texts = torch.cat([sd.encode_prompt(block)[0].half() for block in blocks])
    which = torch.tensor([[number[caption] for caption in both] for both in captions]).to(args.device)
    iters = args.iters or 50_000

    def compute_loss(step: int) -> Tensor:
        # Where things go is decided while nearly all is noise. With all times and captions from the start, the UNet
        # ignores "left" for tens of thousands of updates. So the first tenth is of noisy times and detailed captions.
        first = step < iters // 10
        pick = torch.randint(len(mean), (64,), device=args.device)
        z = sd.vae.cfg.scaling_factor * (mean[pick] + deviation[pick] * torch.randn_like(mean[pick]))
        t = torch.randint(400 if first else 0, 1000, (len(z),), device=args.device)
        noise, a = torch.randn_like(z), sd.alphas_cumprod[t]
        caption = which[pick, torch.randint(1 if first else 0, 2, (len(z),), device=args.device)]
        uncond = torch.rand(len(z), device=args.device) < 0.1
        text = texts[caption.masked_fill(uncond, number[""])].float()
        predicted = sd.unet(reflow.add_noise(z, noise, a), t, text)
        # Weighted as an error of the velocity (Salimans & Ho 2022, "SNR + 1"): a plain error of the noise hardly counts
        # at the noisy times.
        return ((predicted.float() - noise).square() / reflow.append_dims(a, z)).mean()

    fit(sd.unet, compute_loss, args.work / "unet", iters, lr=1e-3)


# ---- All of it ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    args.device = torch.device(choose_device(args.device))
    drawn = [scenes.make_scene(stream(SCENE, TRAIN, i)) for i in range(min(args.scenes, 40_000))]
    images = torch.from_numpy(np.stack([scenes.draw(scene) for scene in tqdm(drawn, desc="drawing scenes")]))
    images = images.permute(0, 3, 1, 2)
    vae, vae_settings = train_vae(images, args)

    tokenizer = make_tokenizer(args.work / "tokenizer")
    begin, end = tokenizer.begin, tokenizer.end
    ids = {"vocab_size": end + 1, "bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    text_settings = TEXT_SETTINGS | ids
    clip = train_clip(tokenizer, text_settings, drawn, images, args)
    save_clip(clip, tokenizer, text_settings, args.out.with_name(f"{args.out.name}-clip"))
    del clip.text.text_projection  # Stable Diffusion's text encoder does without

    torch.manual_seed(0)
    unet = UNet(read_config(UNetConfig, UNET_SETTINGS, "UNet"))
    nn.init.zeros_(unet.conv_out.weight)
    configs = {
        "model_index": official.SD15["model_index"], "scheduler": official.SCHEDULER, "unet": UNET_SETTINGS,
        "vae": vae_settings, "text_encoder": text_settings,
    }  # fmt: skip
    networks = {"unet": unet.to(args.device), "vae": vae, "text_encoder": clip.text}
    sd = StableDiffusion(networks, [tokenizer], configs)
    train_unet(sd, args)
    for network in sd.networks.values():
        network.requires_grad_(False).half()
    sd.save(args.out)
    print(f"{args.out} is ready: python -m paper.figures score {args.out}:32 --guidance 4")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MINIATURE, help="model folder to write; the CLIP is OUT-clip")
    parser.add_argument("--work", type=Path, default=Path("out/miniature"), help="folder of checkpoints")
    parser.add_argument("--iters", type=int, help="updates of each part, for a quick try")
    parser.add_argument("--scenes", type=int, default=100_000, help="number of scenes that the UNet trains on")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    args = parser.parse_args()
    with one_line_errors(parser, "stopped; the same command goes on from the last checkpoint"):
        train(args)


if __name__ == "__main__":
    main()
