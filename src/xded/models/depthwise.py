"""Depth-wise convolution over time, whose gradients on a processor are convolutions as quick as itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise(values: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Convolves each channel with its own kernel, with zeros around: [B, T, D], [D, 1, K odd] and [D] -> [B, T, D]."""
    if values.is_cuda or not torch.is_grad_enabled():
        return _convolve(values, kernel, bias)
    bias = None if bias is None else bias.to(values.dtype)
    convolved: Tensor = _Depthwise.apply(values, kernel.to(values.dtype), bias)
    return convolved


def _convolve(values: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    # as a convolution in two dimensions: [B, T, D] is then its channels-last layout, and no copy is made
    columns, padding = values.transpose(1, 2)[:, :, None], (0, kernel.shape[2] // 2)
    return F.conv2d(columns, kernel[:, :, None], bias, padding=padding, groups=len(kernel))[:, :, 0].transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    """The same with gradients of its own: torch's take ten times as long as the convolution."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, kernel)
        return _convolve(values, kernel, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        values, kernel = ctx.saved_tensors
        batch, frames, width = values.shape
        half = kernel.shape[2] // 2
        of_values, of_kernel, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            of_values = _convolve(gradient, kernel.flip(2))
        if ctx.needs_input_grad[1]:
            # every channel of every recording, convolved with its own gradient
            rows = F.pad(values.transpose(1, 2), (half, half)).reshape(1, batch * width, frames + 2 * half)
            kernels = gradient.transpose(1, 2).reshape(batch * width, 1, frames)
            of_kernel = F.conv1d(rows, kernels, groups=batch * width).view(batch, width, -1).sum(0)[:, None]
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 1))
        return of_values, of_kernel, of_bias
