"""The FID network: Inception v3 as TensorFlow published it in 2015 (Szegedy et al. 2015, "Rethinking the Inception
Architecture", section 6). Its pools differ from those of PyTorch's own Inception in four places, marked (!). Attribute
names equal the keys of the published file. Read `fid.py` first, which says what the network is shown.

Shapes: B batch, C channels, H W.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.errors import InputError

PUBLISHED = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


class Conv(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # of places that exist
largest = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
shrink = partial(F.max_pool2d, kernel_size=3, stride=2)

# The branches of each kind of block, and the convolutions of each branch: (outputs, kernel, stride). A kernel of 7 x 7
# becomes a row and a column, which see as much for 2 / 7 of the cost. BOTH is a row and a column of 3 side by side.
ROW, COLUMN, BOTH = (1, 7), (7, 1), "row and column"
A = {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}
B = {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
D = {"3x3": [(192, 1), (320, 3, 2)], "7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, 2)]}
E = {"1x1": [(320, 1)], "3x3": [(384, 1), (384, BOTH)], "3x3dbl": [(448, 1), (384, 3), (384, BOTH)]}


def c_branches(n: int) -> dict[str, list[tuple]]:
    twice = [(n, 1), (n, COLUMN), (n, ROW), (n, COLUMN), (192, ROW)]
    return {"1x1": [(192, 1)], "7x7": [(n, 1), (n, ROW), (192, COLUMN)], "7x7dbl": twice}


class Block(nn.Module):
    """Branches side by side, and a pool, after it a convolution to `c_pool`. Their names are those in the file."""

    def __init__(self, c_in: int, branches: dict[str, list[tuple]], pool: Callable, c_pool: int | None = None):
        super().__init__()
        self.branches, self.pool = [], pool
        for kind, convs in branches.items():
            c, names = c_in, []  # of the convolutions, one place after the other
            for place, (c_out, *how) in enumerate(convs, 1):
                name = f"branch{kind}_{place}" if len(convs) > 1 else f"branch{kind}"
                parts = {f"{name}a": [(1, 3)], f"{name}b": [(3, 1)]} if how == [BOTH] else {name: how}
                for part in parts:
                    self.add_module(part, Conv(c, c_out, *parts[part]))
                names.append(list(parts))
                c = c_out
            self.branches.append(names)
        self.branch_pool = Conv(c_in, c_pool, 1) if c_pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for names in self.branches:
            y = x
            for parts in names:
                y = torch.cat([getattr(self, part)(y) for part in parts], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """The FID network; `Inception().load(file)(images)` is its features."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b = Block(192, A, average, 32)  # (!) in all of A
        self.Mixed_5c = Block(256, A, average, 64)
        self.Mixed_5d = Block(288, A, average, 64)
        self.Mixed_6a = Block(288, B, shrink)
        self.Mixed_6b = Block(768, c_branches(128), average, 192)  # (!) in all of C
        self.Mixed_6c = Block(768, c_branches(160), average, 192)
        self.Mixed_6d = Block(768, c_branches(160), average, 192)
        self.Mixed_6e = Block(768, c_branches(192), average, 192)
        self.Mixed_7a = Block(768, D, shrink)
        self.Mixed_7b = Block(1280, E, average, 192)  # (!)
        self.Mixed_7c = Block(2048, E, largest, 192)  # (!)
        self.fc = nn.Linear(2048, 1008)  # not used, but it tells this file from PyTorch's own, of 1000 classes
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 299, 299) in [0, 1], made by `clean` or `legacy` -> features (B, 2048), the last average."""
        # On GPUs, convolutions round to 10 bits (TF32) by default; that is no longer the same FID.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * images - 1)))  # (B, 64, 147, 147)
            x = shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(shrink(x))))  # (B, 192, 35, 35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))

    def load(self, file: Path) -> "Inception":
        """Take the weights of the published file. Raises InputError if any does not fit."""
        if not file.is_file():
            raise InputError(f"the FID network {file} is missing; get {PUBLISHED} or give its path with --weights")
        try:  # the published file is a pickle: weights_only reads its tensors and refuses whatever would run code
            state = torch.load(file, map_location="cpu", weights_only=True)
            if odd := [name for name, w in state.items() if w.dtype not in (torch.float32, torch.int64)]:
                raise ValueError(f"{odd[0]} is {state[odd[0]].dtype}")
            self.load_state_dict(dict(state))
        except Exception as error:  # the readers have many ways to say it
            unsafe = type(error).__name__ == "UnpicklingError"
            reason = "no plain file of tensors" if unsafe else " ".join(f"{error}".split())[:300]
            raise InputError(f"{file} is damaged or not the FID network ({reason}); get {PUBLISHED}") from None
        return self
