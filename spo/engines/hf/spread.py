"""A model on several cards: runs of its decoder blocks lie on each, everything else on the first.

A block gets its inputs on its own card and the last one gives its output back to the first, so that
whoever calls the model sees one device. Only what hooks onto a block meets another: it must move
its own tensors to the hidden state's device. Blocks wait for one another, as in a pipeline of one
batch: several cards make room, not speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def spread(model: nn.Module, blocks: Sequence[nn.Module], devices: Sequence[str]) -> None:
    """Move a model onto several devices, about as many bytes on each.

    Args:
        model: any model around the blocks; its inputs and outputs are on the first device.
        blocks: decoder blocks, in the order in which they compute.
        devices: at least one, in the order of the blocks.
    """
    places = [torch.device(devices[i]) for i in shares(model, blocks, len(devices))]
    for block, place in zip(blocks, places, strict=True):
        block.to(place)
        block.register_forward_pre_hook(_brings_to(place), with_kwargs=True)
    home = torch.device(devices[0])
    blocks[-1].register_forward_hook(lambda _, __, output: moved(output, home))
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(home), recurse=False)


def shares(model: nn.Module, blocks: Sequence[nn.Module], count: int) -> list[int]:
    """For each block which of `count` devices holds it; what is no block counts for the first."""
    sizes = [_bytes(block) for block in blocks]
    filled = _bytes(model) - sum(sizes)
    share = (filled + sum(sizes)) / count
    found = []
    for size in sizes:
        found.append(min(int((filled + size / 2) / share), count - 1))
        filled += size
    return found


def moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor in it on a device; caches and other objects are left alone."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return value


def _brings_to(device: torch.device) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return moved(args, device), moved(kwargs, device)

    return hook


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
