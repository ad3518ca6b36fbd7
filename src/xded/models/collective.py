"""What the processes that train one run say to each other; in a process that is alone, nothing is said.

The group of processes is torch.distributed's. Nothing but numbers and JSON goes through it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Processes that train this run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them; the first one, 0, writes, validates and talks."""
    return dist.get_rank() if count() > 1 else 0


class _Sum(torch.autograd.Function):
    """Sum over the processes. Each of their losses depends on it, so that the gradient is a sum over them too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def total(own: Tensor) -> Tensor:
    """Sum of a tensor over all processes, with a gradient."""
    return own if count() == 1 else _Sum.apply(own)


def everyones(own: Any) -> list[Any]:
    """What every process has, by rank: anything that JSON can say."""
    if count() == 1:
        return [own]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    text = torch.frombuffer(bytearray(json.dumps(own), "utf-8"), dtype=torch.uint8).to(device)
    lengths = torch.zeros(count(), dtype=torch.int64, device=device)
    lengths[rank()] = len(text)
    dist.all_reduce(lengths)
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in range(count())]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, lengths.tolist(), strict=True)]


def leave() -> None:
    """Closes the connections to the other processes; without any, nothing happens."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
