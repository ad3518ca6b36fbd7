"""Quick products and kept memory: on where they change nothing, off where they would."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from xded.models import processor


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_products_stay_in_single_precision() -> None:
    processor.use_onednn_products()
    values = torch.randn(408, 176, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(704, 176, generator=torch.Generator().manual_seed(1))
    exact = values.double() @ weights.double().T
    found = torch.nn.functional.linear(values, weights).double()
    assert (found - exact).abs().max() < 1e-4  # bf16 would be 0.2 off
    assert (values.bfloat16() @ weights.bfloat16().T - exact).abs().max() > 1e-2


def test_a_processor_that_rounds_keeps_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if torch.get_float32_matmul_precision() == "medium":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return plain(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not processor.use_onednn_products()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("chosen", ["medium", "high"])
def test_what_somebody_chose_stays(chosen: str) -> None:
    torch.set_float32_matmul_precision(chosen)
    assert not processor.use_onednn_products()
    assert torch.get_float32_matmul_precision() == chosen


def test_a_gpu_keeps_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not processor.use_onednn_products()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_system_without_mallopt_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: None) -> object:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert not processor.keep_freed_memory()


def test_routines_of_many_lengths_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    processor.keep_routines()
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) > 100 * 100  # lengths of an epoch, routines of each


def test_how_many_routines_the_user_wants_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    processor.keep_routines()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


def test_preparing_comes_before_the_first_product() -> None:
    """oneDNN reads the number once: a process that has made a recogniser keeps the routines of its first step."""
    code = (
        "import os, torch\n"
        "from xded.models import processor\n"
        "made = []\n"
        "processor._single_precision = lambda: made.append(os.environ.get('ONEDNN_PRIMITIVE_CACHE_CAPACITY')) or True\n"
        "processor.prepare()\n"
        "print(made)"
    )
    asked = {key: value for key, value in os.environ.items() if key != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    shown = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"['{processor.KEPT_ROUTINES}']"
