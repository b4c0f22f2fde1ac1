"""The text side: CLIP's tokenizer and text transformer (Radford et al. 2021), as Stable Diffusion uses them.

A prompt becomes 77 token ids, and those become one vector each. SD1.5 has one text encoder (CLIP ViT-L/14), SDXL two
(the second is OpenCLIP ViT-bigG/14); a model is described by the fields of `ClipTextConfig`, which are those of the
official `text_encoder/config.json`. Attribute names equal the keys of the official weights.

Shapes: B batch, L = 77 tokens, D width. This is the first file to read; `unet.py` is next.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.errors import InputError
from support.vocabulary import BEGIN, END, read_tokenizer


class Tokenizer:
    """Prompts -> token ids by byte-pair encoding: frequent words are one token, rare ones are spelled with several."""

    def __init__(self, bpe: tokenizers.Tokenizer, pad_token: str = END, length: int = 77):
        self.bpe, self.length = bpe, length
        self.files: dict[str, bytes] = {}  # what it was loaded from, for saving a model
        bpe.no_truncation()  # a tokenizer.json may ask for both; we do them below, and say what is cut off
        bpe.no_padding()
        self.begin, self.end, self.pad = (bpe.token_to_id(t) for t in (BEGIN, END, pad_token))

    @classmethod
    def load(cls, folder: str | Path, pad_token: str | None = None) -> "Tokenizer":
        """Read an official `tokenizer/` folder. pad_token: instead of the folder's own. Raises InputError."""
        bpe, pad, length, files = read_tokenizer(Path(folder), pad_token)
        tokenizer = cls(bpe, pad, length)
        tokenizer.files = files
        return tokenizer

    def __call__(self, prompts: list[str]) -> Tensor:
        """Token ids (B, L), int64: begin, the text, end, padding. What does not fit is cut off, with a notice."""
        rows = []
        for prompt in prompts:
            encoding = self.bpe.encode(prompt, add_special_tokens=False)
            room = self.length - 2
            if len(encoding.ids) > room:
                cut_off = prompt[encoding.offsets[room][0] :]
                print(f"notice: a prompt is longer than {self.length} tokens; ignored: {cut_off!r}", file=sys.stderr)
            row = [self.begin, *encoding.ids[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)  # so also for no prompts at all


def load_tokenizers(path: Path, two: bool) -> list[Tokenizer]:
    """The tokenizers of a model folder, or of a folder that is one tokenizer; SDXL has `two`."""
    if path.is_file():
        raise InputError(f"{path}: a single file holds no tokenizer; give the folder of one (tokenizer=, --tokenizer)")
    folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
    tokenizers = [Tokenizer.load(folder)]
    if two and (path / "tokenizer_2").is_dir():
        tokenizers.append(Tokenizer.load(path / "tokenizer_2"))
    elif two:  # the second one is the same, but for its padding
        tokenizers.append(Tokenizer.load(folder, pad_token="!"))
    return tokenizers


@dataclass
class ClipTextConfig:
    """The fields of `text_encoder/config.json` that we read; the defaults are those a config file may leave out."""

    hidden_size: int = 768  # D
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 768
    architectures: tuple[str, ...] = ("CLIPTextModel",)  # CLIPTextModelWithProjection: with `text_projection`

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be divided among {self.num_attention_heads} heads")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)  # OpenAI's early approximation of gelu, part of their trained weights


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def embedding(count: int, width: int) -> nn.Embedding:
    """Vectors of zeros, to be loaded, or drawn by who trains them. Drawing them here would make `build`,
    whose networks have no memory yet, import torch._dynamo: a third of the time that a program takes to start."""
    return nn.Embedding.from_pretrained(torch.zeros(count, width), freeze=False)


class Embeddings(nn.Module):
    """A vector for every token id, plus a vector for every place in the sentence."""

    def __init__(self, cfg: ClipTextConfig):
        super().__init__()
        self.token_embedding = embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, L) -> (B, L, D)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)  # (B, heads, L, D / heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """One transformer layer; CLIP's vision tower has the same, with attention in both directions (not `causal`)."""

    def __init__(self, cfg, causal: bool):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg.hidden_size, cfg.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(cfg, causal) for _ in range(cfg.num_hidden_layers))


class TextTransformer(nn.Module):
    def __init__(self, cfg: ClipTextConfig):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg, causal=True)  # a token sees itself and those before it
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)


class ClipText(nn.Module):
    def __init__(self, cfg: ClipTextConfig):
        super().__init__()
        self.cfg = cfg
        self.text_model = TextTransformer(cfg)
        if "CLIPTextModelWithProjection" in cfg.architectures:
            self.text_projection = nn.Linear(cfg.hidden_size, cfg.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (B, L) -> three encodings of a text:

        last (B, L, D): after all layers and the final norm; SD1.5's text.
        penultimate (B, L, D): before the last layer, without the final norm; SDXL's text, from both its encoders.
        pooled (B, D): one vector for the sentence, `last` at the end token; projected, in SDXL's second encoder.
        """
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            penultimate, x = x, layer(x)
        last = self.text_model.final_layer_norm(x)

        # Where the first end token is. Old configs say it is 2, which is not so: it is the largest id of all.
        end = (ids if self.cfg.eos_token_id == 2 else (ids == self.cfg.eos_token_id).int()).argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        return last, penultimate, self.text_projection(pooled) if hasattr(self, "text_projection") else pooled
