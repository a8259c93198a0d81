"""What makes PySCF faster on the labels of `dft`, with the same numbers: products, and blocks.

PySCF's wheels bring an OpenBLAS of 2018, which takes a newer processor for an old one; on AMD's of
the last years its products take up to four times as long as those of NumPy's own, and they are half
of a label. And PySCF integrates over so many points of the grid at once that they fit in no cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from pyscf.dft import numint
from pyscf.lib import numpy_helper

POINTS = 10 * numint.BLKSIZE  # of a grid at a time, 560


@contextmanager
def products_by_numpy() -> Iterator[None]:
    """PySCF multiplies real matrices by NumPy's BLAS as long as the `with` lasts.

    PySCF has no hook for it, hence the name `pyscf.lib.numpy_helper._dgemm` is replaced.
    """
    stock = numpy_helper._dgemm
    numpy_helper._dgemm = _product
    try:
        yield
    finally:
        numpy_helper._dgemm = stock


def _product(
    turn_a: str,
    turn_b: str,
    m: int,
    n: int,
    k: int,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    alpha: float = 1,
    beta: float = 0,
    *offsets: int,
) -> np.ndarray:
    """c = alpha a b + beta c, c (m, n); a and b are given turned over where their flag is "T"."""
    assert not any(offsets), "parts of matrices are not for this function"
    a, b = (x.T if turn == "T" else x for x, turn in ((a, turn_a), (b, turn_b)))
    if beta == 0:
        np.matmul(a, b, out=c)  # whatever stood there, even what is no number
        if alpha != 1:
            c *= alpha
    else:
        c *= beta
        c += alpha * (a @ b)
    return c


class SmallBlocks(numint.NumInt):  # type: ignore[misc]
    """PySCF's integrator, a few hundred points of the grid at a time: what is made of them, some
    megabytes, stays in the processor's cache. PySCF itself takes as many as memory allows.
    """

    def block_loop(self, *arguments: Any, **named: Any) -> Iterator[tuple[np.ndarray, ...]]:
        """PySCF's loop over blocks of points: basis functions, mask, weights, coordinates."""
        named["blksize"] = named.get("blksize") or POINTS
        return super().block_loop(*arguments, **named)
