"""A device that computes as the CPU does, where what fails on a GPU fails, too: reading a tensor as a NumPy array, and
operations on tensors of both devices. Its name is "meta"."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import reflow

aten = torch.ops.aten


class Elsewhere(torch.Tensor):
    """A tensor on that device; `values` are on the CPU."""

    @staticmethod
    def __new__(cls, values):
        like = {"dtype": values.dtype, "strides": values.stride(), "device": "meta"}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, **like)
        tensor.values_there = values
        return tensor

    def tolist(self):  # a GPU's tensors have it
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    device = kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if not isinstance(x, Elsewhere)]
    if len(here) == len(tensors) and (device is None or device.type == "cpu"):
        return operation(*args, **kwargs)
    if operation not in (aten._to_copy.default, aten.copy_.default) and len(here) < len(tensors):
        assert all(x.ndim == 0 for x in here), f"{operation} on tensors of two devices"
    kwargs = kwargs | ({"device": "cpu"} if device else {})
    args_, kwargs = tree_map_only(Elsewhere, lambda x: x.values_there, (args, kwargs))
    result = operation(*args_, **kwargs)
    if operation._schema.name.endswith("_"):  # in place
        return result if result is None else args[0]
    return result if device and device.type == "cpu" else tree_map_only(torch.Tensor, Elsewhere, result)


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


@contextlib.contextmanager
def other_device():
    """In it, "meta" is that device."""
    tensor = torch.tensor
    reflow.rising_boundaries.cache_clear()
    with pytest.MonkeyPatch.context() as patch, OtherDevice():
        patch.setattr(torch, "tensor", lambda values, device="cpu", **how: tensor(values, **how).to(device))
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        yield
    reflow.rising_boundaries.cache_clear()
