"""CLIP score: towers and preparation of images are those of transformers, scores are those of the papers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BEGIN, END, VOCABULARY, edit, exit_code, randomize, read, refusal, rewrite, write, write_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_text import ClipText, ClipTextConfig
from evaluation import clip_score
from evaluation.clip_score import ClipImageConfig, ClipScore, ClipVision, ClipVisionConfig
from support import scenes
from support.images import save_png
from support.weights import build, read_config

ROOT = Path(clip_score.__file__).parent
SHIPPED = ROOT / "weights/miniature-clip"
# As published: text tower, vision tower (width, hidden, heads, layers, patch), shared width, activation, parameters
SIZES = {
    "ViT-B/32": ((512, 2048, 8, 12), (768, 3072, 12, 12, 32), 512, "quick_gelu", 151_277_313),
    "ViT-B/16": ((512, 2048, 8, 12), (768, 3072, 12, 12, 16), 512, "quick_gelu", 149_620_737),
    "ViT-L/14": ((768, 3072, 12, 12), (1024, 4096, 16, 24, 14), 768, "quick_gelu", 427_616_513),
    "ViT-g/14": ((1024, 4096, 16, 24), (1408, 6144, 16, 40, 14), 1024, "gelu", 1_366_678_273),
}
PROMPTS = ["a red cat", "", "the cat in the red", "a very long cat " * 30]


def config_of(text, vision, projection, act, vocabulary=49408, image_size=224, length=77):
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "vocab_size": vocabulary}
    ends["max_position_embeddings"] = length
    common = {"hidden_act": act, "projection_dim": projection}
    return {
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": dict(zip(names, text)) | ends | common,
        "vision_config": dict(zip(names, vision)) | common | {"image_size": image_size},
    }


def make(folder, text, vision, projection, act, vocabulary=VOCABULARY, image_size=224, length=77):
    """A CLIP folder as transformers writes it, of random weights; its tokenizer has `vocabulary` tokens."""
    write_tokenizer(folder)
    tokens = [token for token in read(folder / "vocab.json") if token not in (BEGIN, END)]
    tokens += [f"unused{i}" for i in range(vocabulary - 2 - len(tokens))] + [BEGIN, END]
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    config = CLIPConfig(**config_of(text, vision, projection, act, vocabulary, image_size, length))
    model = randomize(CLIPModel(config), 0)
    model.save_pretrained(folder)
    crop = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(folder)
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
    if mode == "I;16":
        return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 2)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def same_features(clip, model, images, prompts=PROMPTS):
    assert clip.tokenizer([""]).shape == (1, model.config.text_config.max_position_embeddings)
    with torch.no_grad():
        pixels = torch.stack([clip_score.prepare(image, clip.image_config) for image in images])
        close(clip.image_features(images), model.get_image_features(pixels))
        close(clip.text_features(prompts), model.get_text_features(clip.tokenizer(prompts)))


@pytest.mark.parametrize("size", SIZES)
def test_both_towers_give_the_features_of_transformers(tmp_path, size):
    """At the official widths, and ViT-B/32 whole; of the others, whose layers are all alike, one of each tower."""
    text, vision, *rest, _ = SIZES[size]
    if size == "ViT-B/32":
        model = make(tmp_path, text, vision, *rest, vocabulary=49408)
    else:
        model = make(tmp_path, (*text[:3], 1), (*vision[:3], 1, vision[4]), *rest)
    if size == "ViT-B/32":  # a config may leave out what are CLIP's defaults
        config = read(tmp_path / "config.json")
        for name in "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "hidden_act":
            del config["text_config"][name]
        write(tmp_path / "config.json", config)
    clip = ClipScore.load(tmp_path)
    assert clip.image_features([photo(0, 40, 50)]).shape[1] == SIZES[size][2]
    same_features(clip, model, [photo(1, 300, 260), photo(2, 224, 224)], PROMPTS[:3])
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_the_towers_have_the_published_number_of_parameters(size):
    *sizes, parameters = SIZES[size]
    config, count = config_of(*sizes), 1  # the temperature, which is not ours
    for tower, network, config_class in ("text", ClipText, ClipTextConfig), ("vision", ClipVision, ClipVisionConfig):
        found = clip_score.tower_settings(config, tower, "config.json")
        found |= {"architectures": ["CLIPTextModelWithProjection"]}
        network = build(network, read_config(config_class, found, "config.json"))
        count += sum(weight.numel() for weight in network.parameters())
    assert count == parameters


# ---------------------------------------------------------------- a small one, for all the rest

SMALL = (32, 64, 4, 2), (48, 96, 4, 2, 8), 24, "quick_gelu"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "small"
    make(folder, *SMALL, image_size=32, length=40)
    return folder


@pytest.fixture(scope="module")
def clip(small):
    return ClipScore.load(small)


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "clip")


def edit_tower(folder, tower, **settings):
    edit(folder / "config.json", **{f"{tower}_config": read(folder / "config.json")[f"{tower}_config"] | settings})


# What the configs of OpenAI's models hold beside CLIP's own settings.
OLD = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "is_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "task_specific_params": None, "temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "typical_p": 1.0,
    "transformers_version": "4.16.0.dev0", "use_bfloat16": False,
}  # fmt: skip


def test_folders_as_they_were_published_load(copy):
    """Old settings, position counters among the weights, a tower's own projection_dim that is not the folder's."""
    edit_tower(copy, "text", **OLD, eos_token_id=2, projection_dim=512)
    edit_tower(copy, "vision", **OLD, projection_dim=512)
    edit(copy / "config.json", text_config_dict=None, vision_config_dict=None)
    model = CLIPModel.from_pretrained(copy)
    counters = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
    rewrite(copy / "model.safetensors", lambda tensors: tensors | counters)
    same_features(ClipScore.load(copy), model, [photo(1, 90, 50)])


def test_settings_given_twice_are_taken_as_transformers_takes_them(copy):
    """`text_config_dict` counts alone, so that what it leaves out is CLIP's default, whatever `text_config` says."""
    config = read(copy / "config.json")
    for tower in "text", "vision":
        config[f"{tower}_config_dict"] = config[f"{tower}_config"]
        config[f"{tower}_config"] = config[f"{tower}_config"] | {"hidden_act": "gelu", "num_hidden_layers": 1}
        del config[f"{tower}_config_dict"]["hidden_act"]
    write(copy / "config.json", config)
    same_features(ClipScore.load(copy), CLIPModel.from_pretrained(copy), [photo(1, 90, 50)])


def test_shards_load_and_other_dtypes_work(copy, clip):
    tensors = list(load_file(copy / "model.safetensors").items())
    parts = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for name, part in parts.items():
        save_file(part, copy / name)
    write(
        copy / "model.safetensors.index.json",
        {"weight_map": {key: name for name, part in parts.items() for key in part}},
    )
    (copy / "model.safetensors").unlink()
    sharded, image = ClipScore.load(copy, dtype=torch.bfloat16), [photo(0, 50, 40)]
    assert sharded.image_features(image).dtype == sharded.text_features(["a cat"]).dtype == torch.bfloat16
    close(sharded.image_features(image).float(), clip.image_features(image), 0.05)
    close(sharded.text_features(["a cat"]).float(), clip.text_features(["a cat"]), 0.05)
    assert sharded.similarity(image, ["a cat"]).dtype == torch.float32


PHOTOS = [
    (224, 224, "RGB"), (301, 224, "RGB"), (97, 131, "RGB"), (1001, 333, "RGB"), (10, 7, "RGB"), (225, 640, "RGB"),
    (300, 201, "L"), (251, 400, "RGBA"), (240, 260, "LA"), (333, 250, "P"), (229, 500, "1"), (400, 300, "CMYK"),
    (260, 231, "I;16"),
]  # fmt: skip


@pytest.mark.parametrize("width, height, mode", PHOTOS)
def test_images_are_prepared_as_transformers_does(width, height, mode):
    image = photo(width, width, height, mode)
    same_preparation(image)


def test_what_is_transparent_is_seen_on_white():
    half = photo(1, 250, 240)
    half.putalpha(100)
    same_preparation(half)
    same_preparation(half.convert("LA"))
    palette = photo(2, 250, 240, "P")
    palette.info["transparency"] = palette.getpixel((125, 120))
    same_preparation(palette)
    assert clip_score.prepare(palette, ClipImageConfig())[0].max() == pytest.approx((1 - 0.48145466) / 0.26862954)


def same_preparation(image):
    expected = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values[0]
    prepared = clip_score.prepare(image, ClipImageConfig())
    assert prepared.shape == (3, 224, 224) and prepared.dtype == torch.float32
    assert (prepared - expected).abs().max() < 1e-5


def test_the_folder_says_how_images_are_prepared(copy):
    settings = {"size": 41, "crop_size": 32, "image_mean": [0.1, 0.5, 0.9], "image_std": [1, 0.5, 0.2], "resample": 2}
    (copy / "preprocessor_config.json").unlink()
    default = ClipScore.load(copy).image_config
    assert default == ClipImageConfig(size=32, crop_size=32)  # CLIP's way, at the size that the tower takes
    image = photo(4, 77, 95)
    write(copy / "processor_config.json", {"image_processor": settings, "processor_class": "CLIPProcessor"})
    prepared = clip_score.prepare(image, ClipScore.load(copy).image_config)
    keywords = settings | {"size": {"shortest_edge": 41}, "crop_size": {"height": 32, "width": 32}}
    expected = CLIPImageProcessorPil(**keywords)(image, return_tensors="pt").pixel_values[0]
    assert (prepared - expected).abs().max() < 1e-5
    write(copy / "preprocessor_config.json", settings | {"size": 32})
    assert ClipScore.load(copy).image_config.size == 32  # where there are both, it is the older file's


def test_images_may_be_an_array(clip):
    array = np.stack([np.array(photo(i, 40, 50)) for i in (1, 2)])
    assert torch.equal(clip.image_features(array), clip.image_features([Image.fromarray(image) for image in array]))


def test_similarity_is_the_cosine_of_each_image_with_its_own_prompt(clip):
    images, prompts = [photo(i, 40, 50) for i in range(3)], ["a red cat", "the cat", "red"]
    pairs = zip(clip.image_features(images).double().numpy(), clip.text_features(prompts).double().numpy())
    expected = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in pairs]
    assert clip.similarity(images, prompts).tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="3 images cannot be compared with 1 prompts"):
        clip.similarity(images, ["a red cat"])
    with pytest.raises(TypeError, match="a list of strings"):
        clip.text_features("a red cat")


@pytest.mark.parametrize(
    "convention, asked, expected",
    [
        ("logits", ["a cat", "Two dogs."], [96, -100]),
        ("prefix", ["A photo depicts a cat", "A photo depicts Two dogs."], [0.96, -1]),  # not cut off at 0
    ],
)
def test_the_conventions_are_those_of_the_papers(clip, monkeypatch, convention, asked, expected):
    heard = []
    monkeypatch.setattr(clip, "image_features", lambdan images: torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    monkeypatch.setattr(clip, "text_features", lambda p: heard.extend(p) or torch.tensor([[4.0, 3.0], [-2.0, 0.0]]))
    assert clip.score([None, None], ["a cat", "Two dogs."], convention).tolist() == pytest.approx(expected)
    assert heard == asked


@pytest.mark.skipif(not SHIPPED.exists(), reason="no weights in this checkout")
def test_the_miniatures_clip_prefers_a_image_s_own_caption():
    clip = ClipScore.load(SHIPPED)
    images, captions = zip(*(scenes.sample(2, i) for i in range(64)))
    own = clip.similarity(np.stack(images), list(captions))
    others = clip.similarity(np.stack(images), [*captions[1:], captions[0]])
    assert own.mean() > others.mean() + 0.05


# ---------------------------------------------------------------- refusals


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("visual_projection.weight"), "1 missing (visual_projection.weight)"),
        (without("text_projection.weight", "text_model.final_layer_norm.bias"), "2 missing (text_model.final_layer_"),
        (lambda t: t | {"head.weight": torch.zeros(3)}, "1 that the network does not have (head.weight)"),
        (lambda t: t | {"text_projection.weight": torch.zeros(24, 33)}, "text_projection.weight is (24, 33), should"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copy, change, message):
    rewrite(copy / "model.safetensors", change)
    assert message in refusal(ClipScore.load, copy)


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
def test_a_setting_of_a_tower_that_needs_other_code_is_refused(copy, tower):
    for setting in {"is_decoder": True}, {"rotary": False}, {"hidden_act": "relu"}:
        shutil.copy(copy / "config.json", copy / "kept.json")
        edit_tower(copy, tower, **setting)
        assert f"{next(iter(setting))} = {next(iter(setting.values()))!r} is not" in refusal(ClipScore.load, copy)
        shutil.copy(copy / "kept.json", copy / "config.json")


def test_a_tokenizer_of_another_model_is_refused(copy):
    write(copy / "vocab.json", read(copy / "vocab.json") | {"more": VOCABULARY})
    message = f"the tokenizer knows {VOCABULARY + 1} tokens, the text tower {VOCABULARY}; they do not fit"
    assert message in refusal(ClipScore.load, copy)
    (copy / "vocab.json").unlink()
    assert "holds no tokenizer" in refusal(ClipScore.load, copy)


def test_a_missing_folder_says_where_there_are_some(copy, tmp_path):
    message = refusal(ClipScore.load, tmp_path / "nowhere")
    assert "nowhere is no CLIP folder: it has no config.json" in message and "Hugging Face hub" in message
    assert "openai/clip-vit-large-patch14" in message and "laion/CLIP-ViT-g-14-laion2B-s12B-b42K" in message
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "is a pickle, which can run any code when it is opened" in refusal(ClipScore.load, copy)
    (copy / "pytorch_model.bin").unlink()
    assert "model.safetensors is missing" in refusal(ClipScore.load, copy)


# ---------------------------------------------------------------- the command


def run(*arguments):
    return exit_code(clip_score, *arguments)


CAPTIONS = ["a red cat", "the cat", "", "in the red", "cat on cat"]


@pytest.fixture
def images(tmp_path):
    """Five images by sample.py, and its sheet of all of them, which is not one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        save_png(np.array(photo(i, 40, 50)), folder / f"{i:05d}.png", {"prompt": caption})
    photo(9, 90, 90).save(folder / "sheet.png")
    return folder


def expected_score(clip, which=range(5), captions=CAPTIONS):
    """Their mean score, computed one by one."""
    return 100 * np.mean([clip.similarity([photo(i, 40, 50)], [captions[i]]).item() for i in which])


def test_the_command_prints_one_line_that_says_what_it_is(clip, small, images, capsys):
    assert run(images, "--clip", small, "--batch-size", 2, "--device", "cpu") == 0
    assert capsys.readouterr().out == (
        f"CLIP score {expected_score(clip):.4f}: mean of 100 x cosine(image, prompt) over 5 images, "
        "by small (2 layers of 48, patches of 8 pixels)\n"
    )
    assert run(images, "--clip", small, "--convention", "prefix", "--device", "cpu") == 0
    score = expected_score(clip, captions=["A photo depicts " + caption for caption in CAPTIONS]) / 100
    assert capsys.readouterr().out.startswith(
        f'CLIP score {score:.4f}: mean of cosine(image, "A photo depicts " + prompt) over 5 images, by small ('
    )


def test_prompts_may_come_from_a_file_in_the_order_of_file_names(clip, small, tmp_path, capsys):
    folder, captions = tmp_path / "images", ["a red cat", "the cat", "red", "in the red", "cat on cat"]
    (folder / "more").mkdir(parents=True)
    names = ["2.png", "10.webp", "COCO_000000000042.JPG", "COCO_100000000007.png", "more/1.png"]
    modes = ["RGB", "RGB", "L", "P", "RGBA"]
    for i, (name, mode) in enumerate(zip(names, modes)):
        photo(i, 40, 50, mode).save(folder / name)
    (tmp_path / "lines.txt").write_text("\n".join(captions))
    annotations = [{"image_id": 100 * i, "id": i, "caption": caption} for i, caption in enumerate(captions)]
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": annotations[::-1]}))
    images = [Image.open(folder / name) for name in names]
    assert [image.mode for image in images] == modes
    score = 100 * clip.similarity(images, captions).mean()
    for prompts in "lines.txt", "coco.json":
        arguments = [folder, "--clip", small, "--prompts", tmp_path / prompts, "--device", "cpu"]
        assert run(*arguments) == 0
        assert capsys.readouterr().out.startswith(f"CLIP score {score:.4f}: ")


def test_numbers_in_names_are_sorted_by_value(tmp_path):
    names = ["99999.png", "100000.png", "a2b.png", "a10.png", "a10b1/3.jpg", "b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert [str(file.relative_to(tmp_path)) for file in clip_score.find_images(tmp_path)] == names


def test_two_processes_find_the_score_of_one_and_an_unreadable_image_is_named(clip, small, images):
    damaged = images / "00003.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    command = [str(ROOT / "clip_score.py"), str(images), "--clip", str(small), "--batch-size", "2", "--device", "cpu"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *command], capture_output=True, text=True, env=environment)
    score = expected_score(clip, which=[0, 1, 2, 4])
    assert done.stdout.startswith(f"CLIP score {score:.4f}: ") and done.stdout.count("\n") == 1, done.stderr
    assert " over 4 images, by small" in done.stdout
    assert done.stderr.count(f"notice: 1 of 5 images cannot be read: {damaged}\n") == 1


def test_an_unreadable_image_keeps_the_others_with_their_own_prompts(clip, small, images, capsys):
    (images / "00001.png").write_text("no image")
    (images.parent / "p.txt").write_text("\n".join(caption or "a" for caption in CAPTIONS))
    assert run(images, "--clip", small, "--prompts", images.parent / "p.txt", "--device", "cpu") == 0
    score = expected_score(clip, which=[0, 2, 3, 4], captions=[caption or "a" for caption in CAPTIONS])
    assert capsys.readouterr().out.startswith(f"CLIP score {score:.4f}: ")


def test_too_many_unreadable_images_are_an_error(small, images, capsys):
    for name in "00001.png", "00004.png":
        (images / name).write_text("no image")
    assert run(images, "--clip", small, "--device", "cpu") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 2 of 5 images cannot be read (") and "00001.png, " in error
    for i in (0, 2, 3):
        (images / f"{i:05d}.png").unlink()
    (images / "00001.png").unlink()
    assert run(images, "--clip", small, "--device", "cpu") == 2
    assert "error: 1 of 1 images cannot be read (" in capsys.readouterr().err


def test_a_image_without_a_prompt_is_an_error(small, images, capsys):
    photo(0, 40, 50).save(images / "00002.png")
    assert run(images, "--clip", small, "--device", "cpu") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "00002.png does not say its prompt" in error and "--prompts" in error


def test_a_wrong_argument_is_one_clear_line_and_exit_code_2(small, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    for arguments, message in [
        ([tmp_path / "empty", "--clip", small], "empty holds no images (.png, .jpg, .jpeg, .webp)"),
        ([tmp_path / "three.txt", "--clip", small], "three.txt is not a folder"),
        ([images, "--clip", tmp_path / "nowhere"], "nowhere is no CLIP folder"),
        ([images, "--clip", small, "--prompts", tmp_path / "three.txt"], "three.txt holds 3 prompts, "),
        ([images, "--clip", small, "--prompts", tmp_path / "none.txt"], "cannot read the prompts in"),
        ([images, "--clip", small, "--batch-size", "0"], "--batch-size must be at least 1"),
        ([images, "--clip", small, "--device", "nothing"], "device nothing cannot be used here"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
