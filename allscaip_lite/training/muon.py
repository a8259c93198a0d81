"""The optimiser Muon, all matrices of one shape at a time, and fast on every CPU.

In: matrices with gradients. Out: steps whose singular values are all about one (K. Jordan et al.,
2024). PyTorch's takes one matrix after the other, which leaves a GPU waiting for its next order
most of the time, and finds singular values in bfloat16, for which only the newest of CPUs have
instructions: on the others it takes longer than the model's forward and backward passes together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`: the same settings, state and steps, up to the rounding of bfloat16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all matrices that have a gradient; what the closure returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault((weight.shape, weight.device), []).append(weight)
            for weights in alike.values():
                self._step(weights, group)
        return loss

    def _step(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        means = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            updates = torch.stack(torch._foreach_lerp(gradients, means, group["momentum"]))
        else:
            updates = torch.stack(means)
        if updates.device.type != "cpu":
            updates = updates.bfloat16()
        settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        updates = orthogonalized(updates, *settings).to(weights[0].dtype)
        rate, (rows, columns) = group["lr"], weights[0].shape
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        if group["adjust_lr_fn"] == "match_rms_adamw":
            rate *= 0.2 * math.sqrt(max(rows, columns))
        else:
            rate *= math.sqrt(max(1, rows / columns))
        torch._foreach_add_(weights, list(updates.unbind()), alpha=-rate)


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """U V^T of `matrix` (..., m, n) = U S V^T, about: singular values end between 0.7 and 1.2.

    Each of the steps of Newton and Schulz, X <- a X + b (X X^T) X + c (X X^T)² X, does it to every
    singular value alone, x <- a x + b x³ + c x⁵; from below 1 they come near it and stay there.
    """
    a, b, c = coefficients
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
