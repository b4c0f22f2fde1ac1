"""LoRA (Hu et al. 2021): a frozen network and, for each of its linear layers and convolutions, a low-rank update.

A layer's weight W (out, in) becomes W + B A, with A (R, in) and B (out, R). Only A and B are trained: a few percent of
the network's numbers. B begins at zero, so the student begins as the network itself. With `train.py --lora R`, teacher,
student and EMA share one frozen network; gradients, optimizer and checkpoints are of the updates alone.

Shapes: R rank; a convolution's W is (out, in, k, k), its A (R, in, k, k), its B (out, R, 1, 1). Names are diffusers'.
Files: `lora_files.py`.
"""

import copy

import torch
from torch import Tensor, nn

from support.streams import LORA, stream


class Shared:
    """A frozen layer: a module that has it in this box does not count its weights, and copies of the box share it."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __deepcopy__(self, memo: dict) -> "Shared":
        return self


class Frozen(nn.Module):
    """A layer that is not trained."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.shared = Shared(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.layer(x)


class LowRank(Frozen):
    """A linear layer or convolution plus its update, of scale 1."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int):
        super().__init__(layer)
        if isinstance(layer, nn.Linear):
            self.lora_A = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, layer.out_features, bias=False)
        else:
            like = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            self.lora_A = nn.Conv2d(layer.in_channels, rank, **like, bias=False)
            self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.layer(x) + self.lora_B(self.lora_A(x))

    @property
    def weight(self) -> Tensor:
        """For code that uses a layer's weight without calling the layer, as `unet.Transformer` does."""
        return self.shared.layer.weight + product(self.lora_A.weight, self.lora_B.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.shared.layer.bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """The update of a weight, in the weight's shape: (out, in) or (out, in, k, k)."""
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


def attach(unet: nn.Module, rank: int, seed: int) -> nn.Module:
    """A network with the weights of `unet`, shared with it and frozen, and a new update, fp32. Its parameters and its
    state are those of the update alone."""
    student = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})
    for parent in list(student.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                setattr(parent, name, LowRank(layer, rank))
            elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
                setattr(parent, name, Frozen(layer))
    for i, layer in enumerate(layer for layer in student.modules() if isinstance(layer, LowRank)):
        a = layer.lora_A.weight
        a.data = torch.from_numpy(stream(LORA, seed, i).standard_normal(a.shape, "float32")) / a[0].numel() ** 0.5
        nn.init.zeros_(layer.lora_B.weight)
    return student.to(unet.conv_in.weight.device)


def merged(unet: nn.Module, update: dict[str, Tensor], scale: float = 1.0) -> nn.Module:
    """The network itself, with an update added to its weights. They keep their dtype and device."""
    weights = unet.state_dict()
    for name, a in update.items():
        layer, is_a, _ = name.partition(".lora_A.")
        if is_a:
            w = weights[f"{layer}.weight"]
            a, b = (part.to(w.device, torch.float32) for part in (a, update[f"{layer}.lora_B.weight"]))
            weights[f"{layer}.weight"] = (w.float() + scale * product(a, b)).to(w.dtype)
    unet.load_state_dict(weights, assign=True)
    return unet
