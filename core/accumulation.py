"""A batch that passes the network in parts and is learnt from as a whole: less memory, the same gradient.

Losses are not sums over images: their normalisers count the positives of the whole batch (on all ranks), and
assignments look at the outputs. So the outputs of all parts are computed first, without keeping what a backward pass
needs; the loss of the whole batch gives the gradient of these outputs; then each part passes the network again and
takes its share of that gradient back into the weights (the gradient cache of Gao et al. 2021, arXiv 2101.06983). One
more forward pass buys the activations of one part instead of those of the batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from core.types import Batch, Targets

LossOf = Callable[[Any, Targets], dict[str, Tensor]]  # outputs and targets of a batch to named scalars


def backward_in_parts(
    network: nn.Module, loss_of: LossOf, batch: Batch, parts: int, precision: torch.autocast
) -> dict[str, Tensor]:
    """Gradients of a batch's loss, added up in the parameters, part by part.

    Equal to those of the whole batch at once up to the rounding of sums, for any loss. Batch norm that learns sees the
    statistics of each part, as it sees those of each rank; its running statistics move once. The network must draw no
    random numbers.

    Args:
        network: called as network(images, sizes); plain, compiled, or one of several ranks.
        loss_of: the batch's loss; looks at its outputs and targets only.
        batch: of this rank, on the device.
        parts: number of parts; must divide the images.
        precision: the autocast context of the forward passes.

    Returns:
        The named scalars.
    """
    pieces = split(batch, parts)
    plain = network.module if isinstance(network, DistributedDataParallel) else network
    outputs, learned, layout = whole_outputs(plain, pieces, precision)
    losses = loss_of(pytree.tree_unflatten(outputs, layout), batch.targets)
    total_loss(losses).backward()
    gradients = [leaf.grad if learns else None for leaf, learns in zip(outputs, learned, strict=True)]
    shares = [None if gradient is None else gradient.chunk(parts) for gradient in gradients]
    del outputs, gradients
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        alone = network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()
        with alone:
            with precision:
                again = pytree.tree_leaves(network(piece.images, piece.sizes))
            used = [(leaf, share[index]) for leaf, share in zip(again, shares, strict=True) if share is not None]
            torch.autograd.backward([leaf for leaf, _ in used], [share for _, share in used])
    return losses


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms whose name begins with loss; the others are only logged."""
    return torch.stack([term for name, term in losses.items() if name.startswith("loss")]).sum()


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch's images in order, in parts of equal size."""
    if len(batch.images) % parts:
        raise ValueError(f"{len(batch.images)} images cannot be cut into {parts} equal parts")
    return [Batch(*tensors) for tensors in zip(*(tensor.chunk(parts) for tensor in batch), strict=True)]


def whole_outputs(
    network: nn.Module, pieces: list[Batch], precision: torch.autocast
) -> tuple[list[Any], list[bool], Any]:
    """The leaves of the network's outputs for all parts together, which of them depend on weights, and their layout.

    Those that do are joined along the images and take a gradient; the others, such as anchors, are the first part's.
    """
    found: list[list[Any]] = []
    learned: list[bool] = []
    layout = None
    for index, piece in enumerate(pieces):
        with torch.set_grad_enabled(index == 0), still_statistics(network), precision:
            leaves, layout = pytree.tree_flatten(network(piece.images, piece.sizes))
        if index == 0:  # with a graph, which tells what depends on weights and is dropped at once
            learned = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        found.append([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        del leaves
    outputs = []
    for column, learns in zip(zip(*found, strict=True), learned, strict=True):
        outputs.append(torch.cat(column).requires_grad_() if learns else column[0])
    return outputs, learned, layout


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Running statistics of batch norm stay as they are, though it computes with those of its input."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
