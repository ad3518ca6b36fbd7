"""What makes this processor quick at training and decoding, and changes no result beyond rounding."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST = 2**30  # bytes: no block of a batch is larger
KEPT_ROUTINES = 16_384  # some 60 kB each


@cache
def prepare() -> None:
    """Once a process, before the first recogniser: quick products, and what a step needs is kept for the next one."""
    keep_routines()
    use_onednn_products()
    keep_freed_memory()


def keep_routines() -> None:
    """Lets oneDNN keep the routines that it writes for every shape (unless the user has said how many).

    A length of a batch needs about a hundred, and it keeps 1,024: with 57 lengths in an epoch nearly all were written
    again in every step, a sixth of its time in bf16 and a twelfth in float32. Read when it is used for the first time.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_ROUTINES))


def use_onednn_products() -> bool:
    """Lets oneDNN multiply matrices where its products are single precision; returns whether it does.

    torch gives float32 products to MKL, which uses half of an AMD processor (measured: 96 GFLOP/s against 213 of one
    core with AVX-512). "medium" allows bf16; oneDNN then still multiplies in float32 unless the processor has units
    for bf16 tiles (AMX). Where it has, a product here shows it, and everything stays as it was; as it does on a machine
    with a GPU, where the same switch would round the GPU's products.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest" or torch.cuda.is_available():  # somebody chose
        return False
    torch.set_float32_matmul_precision("medium")
    if _single_precision():
        return True
    torch.set_float32_matmul_precision(before)
    return False


def _single_precision() -> bool:
    """Whether a product keeps what bf16 and TF32 lose: they round 1 + 2^-12 to 1."""
    product = torch.full((256, 256), 1.0 + 2.0**-12) @ torch.ones(256, 256)
    return bool(torch.allclose(product, torch.tensor(256.0 + 2.0**-4), rtol=1e-5, atol=0.0))


def keep_freed_memory() -> bool:
    """Keeps the memory that a step frees for the next one (glibc); returns whether it could.

    Otherwise each step gives its large blocks back to the system and has them cleared again, page by page: a tenth of
    a small step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    wanted = {M_MMAP_THRESHOLD: LARGEST, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: 2**26}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
