"""The optimiser Muon, fast on every CPU: PyTorch's, with its products in single precision there.

In: matrices with gradients. Out: steps whose singular values are all about one (K. Jordan et al.,
2024). PyTorch finds them in bfloat16, for GPUs. Of CPUs only the newest have instructions for it;
on the others the optimiser takes longer than the model's forward and backward passes together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import _muon


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, which it is on a GPU; on a CPU faster, and exact to more digits."""

    def step(self, closure: Callable[[], Tensor] | None = None):  # type: ignore
        # there is no hook for it, hence the private name
        _muon._zeropower_via_newtonschulz = _on_its_device
        try:
            return super().step(closure)
        finally:
            _muon._zeropower_via_newtonschulz = _stock


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """U V^T of `matrix` (m, n) = U S V^T, about: singular values end between 0.7 and 1.2.

    Each of the steps of Newton and Schulz, X <- a X + b (X X^T) X + c (X X^T)² X, does it to every
    singular value alone, x <- a x + b x³ + c x⁵; from below 1 they come near it and stay there.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


_stock = _muon._zeropower_via_newtonschulz


def _on_its_device(matrix: Tensor, *settings) -> Tensor:  # type: ignore[no-untyped-def]
    return (orthogonalized if matrix.device.type == "cpu" else _stock)(matrix, *settings)
