"""Records what a function asks of torch, to prove that it never waits for the device and stays small."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# item() and its kin, shapes that depend on values, and constants copied from Python lists to the device
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "lift_fresh",
    "is_nonzero",
}


class Recorder(TorchDispatchMode):
    """Within `with Recorder() as recorder`, collects operators that wait and the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name == "index" and any(_is_mask(index) for index in args[1])):
            self.waiting.append(name)
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool
