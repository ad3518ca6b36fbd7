"""Depth-wise convolution: the values and gradients of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xded.models.depthwise import depthwise


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((3, 9, 5), (5, 1, 7), (5,))  # B, T, D; D, 1, K; D
    values, kernel, bias = (torch.randn(shape, generator=random, dtype=dtype, requires_grad=True) for shape in shapes)
    return values, kernel, bias


def plain(values: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv1d(values.transpose(1, 2), kernel, bias, padding=3, groups=5).transpose(1, 2)


def test_gradients_are_those_of_torch() -> None:
    values, kernel, bias = inputs(torch.double)
    gradient = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    expected = plain(values, kernel, bias)
    found = depthwise(values, kernel, bias)
    torch.testing.assert_close(found, expected)
    of_torch = torch.autograd.grad(expected, (values, kernel, bias), gradient)
    torch.testing.assert_close(torch.autograd.grad(found, (values, kernel, bias), gradient), of_torch)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_can_be_asked_for_alone(wanted: int) -> None:
    pair = inputs(torch.double)[:2]
    frozen = pair[1 - wanted].detach()
    values, kernel = (pair[0], frozen) if wanted == 0 else (frozen, pair[1])
    found = torch.autograd.grad(depthwise(values, kernel, None).sum(), pair[wanted])[0]
    both = torch.autograd.grad(depthwise(*pair, None).sum(), pair)
    torch.testing.assert_close(found, both[wanted])


def test_mixed_precision_keeps_the_type_of_the_values() -> None:
    values, kernel, bias = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = values.bfloat16()
        found = depthwise(half, kernel, bias)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert kernel.grad is not None
    assert kernel.grad.dtype == torch.float32


def test_nothing_of_its_own_without_gradients() -> None:
    values, kernel, bias = inputs(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(depthwise(values, kernel, bias), plain(values, kernel, bias))
