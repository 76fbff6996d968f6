"""Recorder of the operators that would make the host wait for a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Synchronisations(TorchDispatchMode):
    """Operators for which a GPU's host has to wait, because their result or its shape is read on the host.

    ``lift_fresh`` marks a tensor made from Python numbers: a copy to the device waits for it, too.
    """

    NAMES = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = [index for index in arguments[1] if index is not None] if name == "index" else []
        if name in self.NAMES or any(index.dtype in (torch.bool, torch.uint8) for index in masks):
            self.found.append(name)
        return function(*arguments, **options or {})
