"""The network that FID looks with: Inception v3 as TensorFlow published it in 2015 (Szegedy et al. 2015, "Rethinking
the Inception Architecture", section 6).

It is not the one that PyTorch's users know: its pools differ in four places, marked (!). Attribute names equal the keys
of the published file. Read `fid.py` first, which says what the network is shown and what becomes of its features.

Shapes: B batch, C channels, H W.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from support.errors import InputError
from support.files import listed

PUBLISHED = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class Conv(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """Mean of each 3 x 3 neighborhood, at the border of the places that exist: the padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, c: int, c_pool: int):
        super().__init__()
        self.branch1x1 = Conv(c, 64, 1)
        self.branch5x5_1 = Conv(c, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(c, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(c, c_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        twice_three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([one, five, twice_three, self.branch_pool(average(x))], dim=1)  # (!) 1 of 4


class InceptionB(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.branch3x3 = Conv(c, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = Conv(c, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        twice_three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice_three, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """A 7 x 7 convolution as a row and a column of 7, which is as wide a view for 2 / 7 of the price."""

    def __init__(self, c: int, c7: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(c, 192, 1)
        self.branch7x7_1 = Conv(c, c7, 1)
        self.branch7x7_2 = Conv(c7, c7, row)
        self.branch7x7_3 = Conv(c7, 192, column)
        self.branch7x7dbl_1 = Conv(c, c7, 1)
        self.branch7x7dbl_2 = Conv(c7, c7, column)
        self.branch7x7dbl_3 = Conv(c7, c7, row)
        self.branch7x7dbl_4 = Conv(c7, c7, column)
        self.branch7x7dbl_5 = Conv(c7, 192, row)
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice_seven = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice_seven = self.branch7x7dbl_5(self.branch7x7dbl_4(twice_seven))
        pooled = self.branch_pool(average(x))  # (!) 2 of 4
        return torch.cat([self.branch1x1(x), seven, twice_seven, pooled], dim=1)


class InceptionD(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.branch3x3_1 = Conv(c, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = Conv(c, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven_three = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven_three, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    def __init__(self, c: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(c, 320, 1)
        self.branch3x3_1 = Conv(c, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(c, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(c, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice_three = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(twice_three), self.branch3x3dbl_3b(twice_three)]
        return torch.cat([*parts, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The FID network; `Inception().load(file)(images)` is its features."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average)  # (!) 3 of 4
        self.Mixed_7c = InceptionE(2048, partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))  # (!) 4 of 4
        # The classes are of no use to FID. But 1008 of them tell this file from PyTorch's own Inception, which has 1000
        # and otherwise the same tensors, and would pass for it.
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 299, 299) in [0, 1], made by `clean` or `legacy` -> features (B, 2048), the last average."""
        if images.shape[1:] != (3, 299, 299):
            raise InputError(f"the FID network takes images (B, 3, 299, 299), not {tuple(images.shape)}")
        # On GPUs, convolutions round to 10 bits (TF32) unless told otherwise; that is no longer the same FID.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * images - 1)))  # (B, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (B, 192, 71, 71)
            x = F.max_pool2d(x, 3, stride=2)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))

    def load(self, file: str | Path) -> "Inception":
        """Take the weights of the published file, or of a .safetensors copy of it. Raises InputError if they differ in
        any name, shape or precision from what this network has."""
        found, problems = read_weights(Path(file)), []
        # counters of training, which not every version of PyTorch wrote
        wanted = {name: w for name, w in self.state_dict().items() if not name.endswith("num_batches_tracked")}
        found = {name: w for name, w in found.items() if not name.endswith("num_batches_tracked")}
        if missing := sorted(wanted.keys() - found.keys()):
            problems.append(f"{len(missing)} missing ({listed(missing)})")
        if extra := sorted(found.keys() - wanted.keys()):
            problems.append(f"{len(extra)} that it does not have ({listed(extra)})")
        for name in sorted(wanted.keys() & found.keys()):
            kind, due = (f"{w.dtype} {tuple(w.shape)}" for w in (found[name], wanted[name]))
            if kind != due:
                problems.append(f"{name} is {kind}, should be {due}")
        if problems:
            raise InputError(f"{file}: not the tensors of the FID network: {listed(problems, 4)}; get {PUBLISHED}")
        self.load_state_dict(self.state_dict() | found)
        return self


def read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"the FID network {file} is missing; get it from {PUBLISHED} or give its path with --weights")
    try:
        # the published file is a pickle, of which weights_only reads tensors and refuses whatever would run code
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("not only tensors")
        return state
    except Exception as error:  # both readers have many ways to say it
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InputError(
            f"{file} is damaged, truncated or no plain state dict ({reason[0]}); get {PUBLISHED}"
        ) from None
