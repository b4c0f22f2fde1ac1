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
from support.images import find_images, save_png
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
    return model


def close(ours, theirs, tolerance=1e-4):
    """Equal but for rounding, which is measured by the largest value."""
    theirs = getattr(theirs, "pooler_output", theirs)
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def photo(seed, width, height, mode="RGB"):
    """Waves and noise, so that every step of the preparation leaves a trace."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width, 0:4][:2]
    waves = 127 + 90 * np.sin(x / (3 + seed) + np.arange(4)) * np.cos(y / 9)
    image = Image.fromarray((waves + rng.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8), "RGBA")
    return image.convert(mode)


def same_features(clip, model):
    images = [photo(1, 90, 50), photo(2, 32, 32)]
    assert clip.tokenizer([""]).shape == (1, 40)
    with torch.no_grad():
        pixels = torch.stack([prepare(image, clip.image_config) for image in images])
        close(clip.image_features(images), model.get_image_features(pixels))
        close(clip.text_features(PROMPTS), model.get_text_features(clip.tokenizer(PROMPTS)))


def test_both_towers_give_the_features_of_transformers(tmp_path):
    model = make(tmp_path / "a", hidden_act="gelu")
    same_features(ClipScore.load(tmp_path / "a"), model)
    model = make(tmp_path / "b", **dict(zip(NAMES, (512, 2048, 8, 1))))
    edit_tower(tmp_path / "b", "text", **dict.fromkeys(NAMES[:3]))  # a config may leave out what are CLIP's defaults
    same_features(ClipScore.load(tmp_path / "b"), model)


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


@pytest.fixture(scope="module")
def clip(small):
    return ClipScore.load(small)


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "clip")


def edit_tower(folder, tower, **settings):
    """Change settings of one tower; None takes one out."""
    edited = {k: v for k, v in (read(folder / "config.json")[f"{tower}_config"] | settings).items() if v is not None}
    edit(folder / "config.json", **{f"{tower}_config": edited})


# What the configs of OpenAI's models hold beside CLIP's own settings. Their values do not matter,
COMMON = """
    chunk_size_feed_forward diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size id2label label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate temperature tie_encoder_decoder tie_word_embeddings top_k top_p torchscript typical_p
    use_bfloat16"""
# except for these.
EMPTY = {"add_cross_attention": False, "is_decoder": False, "is_encoder_decoder": False, "pruned_heads": {}}
OLD = dict.fromkeys(COMMON.split(), 1) | EMPTY | {"transformers_version": "4.16.0"}


def test_folders_as_they_were_published_load(copy):
    """Old settings, position counters among the weights, a tower's own projection_dim that is not the folder's."""
    model = CLIPModel.from_pretrained(copy)
    edit_tower(copy, "text", **OLD, eos_token_id=2, projection_dim=512)
    edit_tower(copy, "vision", **OLD, projection_dim=512)
    counters = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
    rewrite(copy / "model.safetensors", lambda tensors: tensors | counters)
    same_features(ClipScore.load(copy), model)


def test_settings_given_twice_are_taken_as_transformers_takes_them(copy):
    """`text_config_dict` counts alone, so that what it leaves out is CLIP's default, whatever `text_config` says."""
    for tower in "text", "vision":
        settings = {k: v for k, v in read(copy / "config.json")[f"{tower}_config"].items() if k != "hidden_act"}
        edit(copy / "config.json", **{f"{tower}_config_dict": settings})
        edit_tower(copy, tower, hidden_act="gelu", num_hidden_layers=1)
    same_features(ClipScore.load(copy), CLIPModel.from_pretrained(copy))


def test_other_dtypes_work(small, clip):
    half, image = ClipScore.load(small, dtype=torch.bfloat16), [photo(0, 50, 40)]
    assert half.image_features(image).dtype == half.text_features(["a cat"]).dtype == torch.bfloat16
    close(half.image_features(image).float(), clip.image_features(image), 0.05)
    close(half.text_features(["a cat"]).float(), clip.text_features(["a cat"]), 0.05)
    assert half.similarity(image, ["a cat"]).dtype == torch.float32


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
    (copy / "preprocessor_config.json").unlink()
    default = ClipScore.load(copy).image_config
    assert default == ClipImageConfig(size=32, crop_size=32)  # CLIP's way, at the size that the tower takes
    settings = {  # as today's library writes them
        "data_format": "channels_first", "default_to_square": False, "image_processor_type": "CLIPImageProcessorFast",
        "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 41}, "do_resize": True, "resample": 2,
        "device": None, "pad_size": None, "do_convert_rgb": True, "rescale_factor": 0.00392156862745098,
        "use_square_size": False, "do_pad": False, "image_mean": [0.1, 0.5, 0.9], "image_std": [1, 0.5, 0.2],
    }  # fmt: skip
    write(copy / "processor_config.json", {"image_processor": settings, "processor_class": "CLIPProcessor"})
    image = photo(4, 77, 95)
    prepared = prepare(image, ClipScore.load(copy).image_config)
    expected = CLIPImageProcessorPil(**settings)(image, return_tensors="pt").pixel_values[0]
    assert (prepared - expected).abs().max() < 1e-5
    write(copy / "preprocessor_config.json", {"size": 32, "crop_size": 32})
    assert ClipScore.load(copy).image_config == default  # where there are both, it is the older file's


def test_images_may_be_an_array_or_prepared(clip):
    array = np.stack([np.array(photo(i, 40, 50)) for i in (1, 2)])
    images = [Image.fromarray(image) for image in array]
    prepared = torch.stack([prepare(image, clip.image_config) for image in images])
    assert torch.equal(clip.image_features(array), clip.image_features(images))
    assert torch.equal(clip.image_features(prepared), clip.image_features(images))


def test_similarity_is_the_cosine_of_each_image_with_its_own_prompt(clip):
    images, prompts = [photo(i, 40, 50) for i in range(3)], ["a red cat", "the cat", "red"]
    pairs = zip(clip.image_features(images).double().numpy(), clip.text_features(prompts).double().numpy())
    expected = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in pairs]
    assert clip.similarity(images, prompts).tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="3 images cannot be compared with 1 prompts"):
        clip.similarity(images, ["a red cat"])
    with pytest.raises(TypeError, match="a list of strings"):
        clip.text_features("a red cat")


def test_the_conventions_are_those_of_the_papers(clip, monkeypatch):
    """The prefix goes with the square in the middle, shrunk to 256 by LANCZOS before CLIP's own preparation."""
    images, prompts, seen, heard = [photo(1, 600, 400), photo(2, 300, 310)], ["a cat", "Two dogs."], [], []
    crops = [images[0].crop((100, 0, 500, 400)), images[1].crop((0, 5, 300, 305))]
    crops = [crop.resize((256, 256), Image.Resampling.LANCZOS) for crop in crops]
    one, two = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    monkeypatch.setattr(clip, "image_features", lambda images: seen.append(images) or one)
    monkeypatch.setattr(clip, "text_features", lambda prompts: heard.append(prompts) or two)
    assert clip.score(images, prompts, "logits").tolist() == pytest.approx([96, -100])
    assert clip.score(images, prompts, "prefix").tolist() == pytest.approx([0.96, -1])  # not cut off at 0
    assert heard == [prompts, ["A photo depicts a cat", "A photo depicts Two dogs."]]
    for shown, expected in zip(seen, (images, crops)):
        assert all(np.array_equal(image, other) for image, other in zip(shown, expected))


def test_the_miniatures_clip_prefers_the_caption_of_the_image():
    clip = ClipScore.load(ROOT / "weights/miniature-clip")
    images, captions = zip(*(scenes.sample(2, i) for i in range(64)))
    own = clip.similarity(np.stack(images), list(captions))
    others = clip.similarity(np.stack(images), [*captions[1:], captions[0]])
    assert own.mean() > others.mean() + 0.05


# ---------------------------------------------------------------- refusals


def test_tensors_that_do_not_fit_are_refused(copy):
    rewrite(copy / "model.safetensors", lambda t: t | {"head.weight": t.pop("visual_projection.weight")})
    expected = "1 missing (visual_projection.weight); 1 that the network does not have (head.weight)"
    assert expected in refusal(ClipScore.load, copy)


@pytest.mark.parametrize(
    "file, settings, message",
    [
        ("config.json", {"model_type": "siglip"}, "describes no CLIP"),
        ("config.json", {"vision_config": None}, "describes no CLIP"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "size must be that of the shortest edge"),
        ("preprocessor_config.json", {"size": 24, "crop_size": 32}, "crop_size a square within it"),
        ("preprocessor_config.json", {"size": 40, "crop_size": 40}, "images of 40 pixels, the vision tower takes 32"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize = False is not supported, only True"),
        ("preprocessor_config.json", {"resample": 77}, "77 is not a valid Resampling"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean and image_std must be three numbers"),
    ],
)
def test_settings_that_are_not_supported_are_refused(copy, file, settings, message):
    edit(copy / file, **settings)
    assert message in refusal(ClipScore.load, copy)


@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("setting, value", [("is_decoder", True), ("rotary", False), ("hidden_act", "relu")])
def test_a_setting_of_a_tower_that_needs_other_code_is_refused(copy, tower, setting, value):
    edit_tower(copy, tower, **{setting: value})
    assert f"{setting} = {value!r} is not" in refusal(ClipScore.load, copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    write(copy / "vocab.json", read(copy / "vocab.json") | {"more": VOCABULARY})
    message = f"the tokenizer knows {VOCABULARY + 1} tokens, the text tower {VOCABULARY}; they do not fit"
    assert message in refusal(ClipScore.load, copy)


def test_a_missing_folder_says_where_there_are_some(tmp_path):
    message = refusal(ClipScore.load, tmp_path / "nowhere")
    assert "nowhere is no CLIP folder: it has no config.json" in message and "Hugging Face hub" in message


# ---------------------------------------------------------------- the command


def run(*arguments):
    return exit_code(clip_score, *arguments, "--device", "cpu")


CAPTIONS = ["a red cat", "the cat", "", "in the red", "cat on cat"]
OURS = {"software": "proreflow", "seed": "7", "weights": "abc"}


@pytest.fixture
def images(tmp_path):
    """Five images by sample.py, and its sheet of all of them, which is not one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        save_png(np.array(photo(i, 40, 50)), folder / f"{i:05d}.png", OURS | {"prompt": caption, "index": str(i)})
    photo(9, 90, 90).save(folder / "sheet.png")
    return folder


def test_the_command_prints_one_line_that_says_what_it_is(clip, small, images, capsys):
    own = [clip.similarity([photo(i, 40, 50)], [CAPTIONS[i]]).item() for i in range(5)]
    assert run(images, "--clip", small, "--batch-size", 2) == 0
    assert capsys.readouterr().out == (
        f"CLIP score {100 * np.mean(own):.4f}: mean of 100 x cosine(image, prompt) over 5 images, "
        "by small (2 layers of 48, patches of 8 pixels)\n"
    )
    assert run(images, "--clip", small, "--convention", "prefix") == 0
    score = np.mean([clip.score([photo(i, 40, 50)], [CAPTIONS[i]], "prefix").item() for i in range(5)])
    assert capsys.readouterr().out.startswith(
        f'CLIP score {score:.4f}: mean of cosine(image, "A photo depicts " + prompt) over 5 images, by small ('
    )


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
        (["a0.png", "b1.png"], ["a", "b"], "has no prompt for {folder}/b1.png"),
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


def test_a_prompt_of_another_tool_is_none(tmp_path):
    info = PngInfo()
    info.add_text("prompt", '{"3": {"class_type": "KSampler"}}')  # ComfyUI's graph
    photo(1, 40, 50).save(tmp_path / "0.png", pnginfo=info)
    message = "0.png does not hold its prompt, as images of sample.py do; give --prompts"
    assert message in refusal(find_prompts, [tmp_path / "0.png"], None)
    (tmp_path / "p.txt").write_text("a cat")
    assert find_prompts([tmp_path / "0.png"], tmp_path / "p.txt") == ["a cat"]


def test_images_of_sample_py_keep_their_own_prompts(images):
    """They are numbered as the prompts were, not by image ids; a file of other prompts is refused."""
    files, captions = find_images(images), [caption or "-" for caption in CAPTIONS]
    save_png(np.array(photo(2, 40, 50)), files[2], OURS | {"prompt": "-", "index": "2"})
    annotations = [{"image_id": (i + 1) % 5, "id": i, "caption": caption} for i, caption in enumerate(captions)]
    for name, content in ("p.txt", "\n".join(captions)), ("p.json", json.dumps({"annotations": annotations})):
        (images / name).write_text(content)
        assert find_prompts(files, images / name) == captions
    (images / "p.txt").write_text("\n".join(captions[::-1]))
    assert "00000.png was not made of the prompt that " in refusal(find_prompts, files, images / "p.txt")


def test_scores_that_are_not_finite_are_an_error(copy, images, capsys):
    name = "text_projection.weight"
    rewrite(copy / "model.safetensors", lambda tensors: tensors | {name: tensors[name] * torch.inf})
    assert run(images, "--clip", copy) == 2
    assert "the scores are not finite" in capsys.readouterr().err


def test_images_of_several_runs_are_one_clear_line_and_exit_code_2(small, images, capsys):
    save_png(np.zeros((9, 9, 3), np.uint8), images / "00005.png", OURS | {"seed": "8", "prompt": "a", "index": "5"})
    assert run(images, "--clip", small) == 2
    assert capsys.readouterr().err.startswith(f"error: {images} holds images of several runs (seed 7 and 8)")
