"""CLIP score: towers and preparation of images are those of transformers, scores are those of the papers."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, TEXT, VOCABULARY, edit, exit_code, randomize, read, refusal, rewrite, write, write_tokenizer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_text import ClipText, ClipTextConfig
from evaluation import clip_score
from evaluation.clip_score import ClipScore, find_prompts
from evaluation.clip_vision import ClipImageConfig, ClipVision, ClipVisionConfig, prepare
from support import scenes
from support.images import save_png
from support.weights import build

NAMES = "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
# As published: text tower, vision tower, its patches, width of what both give, parameters
SIZES = {
    "ViT-B/32": ((512, 2048, 8, 12), (768, 3072, 12, 12), 32, 512, 151_277_313),
    "ViT-L/14": ((768, 3072, 12, 12), (1024, 4096, 16, 24), 14, 768, 427_616_513),
    "ViT-g/14": ((1024, 4096, 16, 24), (1408, 6144, 16, 40), 14, 1024, 1_366_678_273),
}
PROMPTS = ["a red cat", "", "the cat in the red", "a very long cat " * 30]


def make(folder, **both):
    """A CLIP folder as transformers writes it, of random weights; `both` are settings of both towers."""
    write_tokenizer(folder)
    text = TEXT | {"max_position_embeddings": 40} | both
    vision = dict(zip(NAMES, (48, 96, 4, 2))) | {"patch_size": 8, "image_size": 32} | both
    model = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)), 0)
    model.save_pretrained(folder)
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)


def close(ours, theirs):
    """Equal but for rounding, which is measured by the largest value."""
    theirs = getattr(theirs, "pooler_output", theirs)
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def photo(seed, width, height, mode="RGB"):
    """Waves and noise, so that every step of the preparation leaves a trace."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width, 0:4][:2]
    waves = 127 + 90 * np.sin(x / (3 + seed) + np.arange(4)) * np.cos(y / 9)
    image = Image.fromarray((waves + rng.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8), "RGBA")
    return image.convert(mode)


@pytest.mark.parametrize("size", SIZES)
def test_the_towers_have_the_published_number_of_parameters(size):
    text, vision, patch, width, parameters = SIZES[size]
    kind = "CLIPTextModelWithProjection"
    text = build(ClipText, ClipTextConfig(**dict(zip(NAMES, text)), projection_dim=width, architectures=(kind,)))
    vision = ClipVisionConfig(**dict(zip(NAMES, vision)), projection_dim=width, patch_size=patch)
    count = sum(weight.numel() for network in (text, build(ClipVision, vision)) for weight in network.parameters())
    assert count + 1 == parameters  # the temperature, which is not ours


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "small"
    make(folder)
    return folder


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "clip")


def edit_tower(folder, tower, **settings):
    """Change settings of one tower; None takes one out."""
    edited = {k: v for k, v in (read(folder / "config.json")[f"{tower}_config"] | settings).items() if v is not None}
    edit(folder / "config.json", **{f"{tower}_config": edited})


def left_out(folder):
    """What a config may leave out are ViT-B/32's sizes."""
    make(folder, **dict(zip(NAMES, (512, 2048, 8, 1))))
    edit_tower(folder, "text", **dict.fromkeys(NAMES[:3]))


def as_published(folder):
    """With settings of other kinds of models, position counters among the weights, a tower's own projection_dim."""
    for tower in "text", "vision":
        edit_tower(folder, tower, is_decoder=False, top_k=50, hidden_act="gelu", eos_token_id=2, projection_dim=512)
    counters = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
    rewrite(folder / "model.safetensors", lambda tensors: tensors | counters)


def given_twice(folder):
    """`text_config_dict` counts alone, so that what it leaves out is CLIP's default, whatever `text_config` says."""
    for tower in "text", "vision":
        settings = {k: v for k, v in read(folder / "config.json")[f"{tower}_config"].items() if k != "hidden_act"}
        edit(folder / "config.json", **{f"{tower}_config_dict": settings})
        edit_tower(folder, tower, hidden_act="gelu", num_hidden_layers=1)


@pytest.mark.parametrize("change", [left_out, as_published, given_twice])
def test_a_folder_gives_the_features_of_transformers(copy, change):
    change(copy)
    clip, model, images = ClipScore.load(copy), CLIPModel.from_pretrained(copy), [photo(1, 90, 50), photo(2, 32, 32)]
    assert clip.tokenizer([""]).shape == (1, 40)
    with torch.no_grad():
        pixels = torch.stack([prepare(image, clip.image_config) for image in images])
        close(clip.image_features(images), model.get_image_features(pixels))
        close(clip.text_features(PROMPTS), model.get_text_features(clip.tokenizer(PROMPTS)))


@pytest.mark.parametrize(
    "width, height, mode",
    [(224, 224, "RGB"), (301, 224, "RGB"), (97, 131, "RGB"), (1001, 333, "RGB"), (225, 640, "RGBA")],
)
def test_images_are_prepared_as_transformers_does(width, height, mode):
    """What is transparent is seen on white."""
    image = photo(width, width, height, mode)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values[0]
    prepared = prepare(image, ClipImageConfig())
    assert prepared.shape == (3, 224, 224) and prepared.dtype == torch.float32
    assert (prepared - expected).abs().max() < 1e-5


def test_the_folder_says_how_images_are_prepared(copy):
    older, newer, image = copy / "preprocessor_config.json", copy / "processor_config.json", photo(4, 77, 95)
    older.unlink()
    default = ClipScore.load(copy).image_config
    assert default == ClipImageConfig(size=32, crop_size=32)  # CLIP's way, at the size that the tower takes
    colors = {"image_mean": [0.1, 0.5, 0.9], "image_std": [1, 0.5, 0.2]}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size=32, resample=2, **colors)
    processor.save_pretrained(copy)
    write(newer, {"image_processor": read(older)})
    older.unlink()
    prepared = prepare(image, ClipScore.load(copy).image_config)
    assert (prepared - processor(image, return_tensors="pt").pixel_values[0]).abs().max() < 1e-5
    write(older, {"size": 32, "crop_size": 32})
    assert ClipScore.load(copy).image_config == default  # where there are both, it is the older file's


def test_the_miniatures_clip_prefers_the_caption_of_the_image():
    clip = ClipScore.load(ROOT / "weights/miniature-clip")
    images, captions = zip(*(scenes.sample(2, i) for i in range(64)))
    own = clip.similarity(np.stack(images), list(captions))
    others = clip.similarity(np.stack(images), [*captions[1:], captions[0]])
    assert own.mean() > others.mean() + 0.05


def lack_a_tensor(folder):
    rewrite(folder / "model.safetensors", lambda t: t | {"head.weight": t.pop("visual_projection.weight")})


def know_another_word(folder):
    write(folder / "vocab.json", read(folder / "vocab.json") | {"more": VOCABULARY})


def preprocess(**settings):
    return lambda folder: edit(folder / "preprocessor_config.json", **settings)


@pytest.mark.parametrize(
    "change, message",
    [
        (shutil.rmtree, "is no CLIP folder: it has no config.json"),
        (lambda folder: edit(folder / "config.json", model_type="siglip"), "describes no CLIP"),
        (lambda folder: edit(folder / "config.json", vision_config=None), "describes no CLIP"),
        (lambda folder: edit_tower(folder, "vision", hidden_act="relu"), "hidden_act = 'relu' is not supported"),
        (lack_a_tensor, "1 missing (visual_projection.weight); 1 that the network does not have (head.weight)"),
        (know_another_word, f"knows {VOCABULARY + 1} tokens, the text tower {VOCABULARY}; they do not fit"),
        (preprocess(size={"height": 32, "width": 32}), "size must be that of the shortest edge"),
        (preprocess(size=24, crop_size=32), "crop_size a square within it"),
        (preprocess(size=40, crop_size=40), "images of 40 pixels, the vision tower takes 32"),
        (preprocess(do_resize=False), "do_resize = False is not supported, only True"),
    ],
)
def test_a_folder_that_is_none_of_ours_is_refused(copy, change, message):
    change(copy)
    assert message in refusal(ClipScore.load, copy)


# ---------------------------------------------------------------- the command


def run(*arguments):
    return exit_code(clip_score, *arguments, "--device", "cpu")


def save(file, image, prompt, seed="7"):
    save_png(np.array(image), file, {"software": "proreflow", "seed": seed, "prompt": prompt, "index": file.stem})


def middle(image):
    """The square in the middle, shrunk to 256 by LANCZOS, as GigaGAN and DMD2 do before CLIP's own preparation."""
    left, top = ((side - min(image.size)) // 2 for side in image.size)
    square = image.crop((left, top, left + min(image.size), top + min(image.size)))
    return square.resize((256, 256), Image.Resampling.LANCZOS)


@pytest.mark.parametrize(
    "convention, scale, prefix, crop, formula",
    [
        ("logits", 100, "", lambda image: image, "100 x cosine(image, prompt)"),
        ("prefix", 1, "A photo depicts ", middle, 'cosine(image, "A photo depicts " + prompt)'),
    ],
)
def test_scores_are_those_of_the_papers_by_transformers(
    small, tmp_path, capsys, convention, scale, prefix, crop, formula
):
    images, prompts = [photo(1, 600, 400), photo(2, 300, 310), photo(3, 40, 50)], ["a red cat", "", "cat on cat"]
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        save(tmp_path / f"{i:05d}.png", image, prompt)
    photo(9, 90, 90).save(tmp_path / "sheet.png")  # sample.py's sheet, which is not one
    model, processor = CLIPModel.from_pretrained(small), CLIPImageProcessorPil.from_pretrained(small)
    ids = ClipScore.load(small).tokenizer([prefix + prompt for prompt in prompts])
    pixels = processor([crop(image) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(ids, pixels)
    expected = scale * (out.image_embeds * out.text_embeds).sum(dim=1).mean().item()
    assert run(tmp_path, "--clip", small, "--batch-size", 2, "--convention", convention) == 0
    score, said = capsys.readouterr().out.removeprefix("CLIP score ").split(": mean of ")
    assert float(score) == pytest.approx(expected, abs=1e-4 * scale)
    assert said == f"{formula} over 3 images, by small (2 layers of 48, patches of 8 pixels)\n"


WORDS = ["a red cat", "the cat", "red", "in the red", "cat on cat"]
COCO = {
    "images": [{"id": i + 40, "file_name": f"val/COCO_val2014_{44 - i:012d}.jpg"} for i in range(4)],
    "annotations": [{"image_id": i + 40, "id": 9 - i, "caption": word} for i, word in enumerate(WORDS)],
}


@pytest.mark.parametrize(
    "names, prompts, expected",
    [
        (["2.png", "0.webp", "1.JPG", "more/3.png", "00004.bmp"], WORDS, [2, 0, 1, 3, 4]),
        (["img_2.png", "img_10.png"], ["a"] * 12, "10 of 12 images of the prompts"),
        (["1.png", "2.png"], ["a", "b"], "has no prompt for {folder}/2.png"),
        (["1.png", "more/1.png"], ["a", "b"], "{folder}/1.png and {folder}/more/1.png have one number"),
        # by file name first (whose numbers may be others' ids), then by id
        (["COCO_val2014_000000000044.png", "COCO_val2014_000000000042.png", "44.png"], COCO, [0, 2, 4]),
        (["COCO_val2014_000000000044.png", "cat.png"], COCO, "has no prompt for {folder}/cat.png"),
        (["00000.png", "00001.png"], COCO, "has no prompt for {folder}/00000.png"),  # not by order
    ],
)
def test_images_of_others_find_their_prompts_by_name(tmp_path, names, prompts, expected):
    files = [tmp_path / name for name in names]
    source = tmp_path / ("prompts.json" if prompts is COCO else "prompts.txt")
    source.write_text(json.dumps(prompts) if prompts is COCO else "\n".join(prompts))
    if isinstance(expected, str):
        assert expected.format(folder=tmp_path) in refusal(find_prompts, files, source)
    else:
        assert find_prompts(files, source) == [WORDS[k] for k in expected]


def test_a_prompt_of_another_tool_is_none_and_images_of_sample_py_keep_theirs(tmp_path, small, capsys):
    info, lines = PngInfo(), tmp_path / "p.txt"
    info.add_text("prompt", '{"3": {"class_type": "KSampler"}}')  # ComfyUI's graph
    photo(1, 40, 50).save(tmp_path / "0.png", pnginfo=info)
    lines.write_text("a cat")
    message = "0.png does not hold its prompt, as images of sample.py do; give --prompts"
    assert message in refusal(find_prompts, [tmp_path / "0.png"], None)
    assert find_prompts([tmp_path / "0.png"], lines) == ["a cat"]
    save(tmp_path / "0.png", photo(1, 40, 50), "")
    assert "images of sample.py, which hold their prompts" in refusal(find_prompts, [tmp_path / "0.png"], lines)
    save(tmp_path / "1.png", photo(1, 40, 50), "", seed="8")
    assert run(tmp_path, "--clip", small) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds images of several runs (seed 7 and 8)")
