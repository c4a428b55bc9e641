"""Least squares by second moments: kernels that give, from what they see, what is wanted.

For a kernel w, patches x and a target y, the sum of (w·x - y)² over all positions is w·A·w - 2 w·b + c with the moments
A = Σ x xᵀ, b = Σ x y and c = Σ y². They take the same memory however many positions there are.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

_ROWS = 8192
Key = TypeVar("Key")


@dataclass(frozen=True)
class Moments:
    """Second moments of G groups with K numbers a patch and O outputs each, in double precision.

    Attributes:
        gram: A, ``(G, K, K)``.
        cross: b, ``(G, K, O)``.
        energy: c, ``(G, O)``.
        count: Number of positions.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: torch.Tensor
    count: int

    @classmethod
    def of(cls, patches: torch.Tensor, targets: torch.Tensor) -> "Moments":
        """Sum up.

        Args:
            patches: ``(G, P, K)``.
            targets: ``(G, P, O)``.
        """
        parts = zip(torch.split(patches, _ROWS, 1), torch.split(targets, _ROWS, 1), strict=True)
        return functools.reduce(Moments.__add__, (cls._of_some(*part) for part in parts))

    @classmethod
    def _of_some(cls, patches: torch.Tensor, targets: torch.Tensor) -> "Moments":
        gram, cross, energy = patches.mT @ patches, patches.mT @ targets, targets.square().sum(1)
        return cls(_double(gram), _double(cross), _double(energy), patches.shape[1])

    def __add__(self, other: Any) -> "Moments":
        """The moments of both sets of positions."""
        return Moments(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.count + other.count
        )

    def of_mean_free(self, *, with_bias: bool) -> "Moments":
        """The moments of patches without their mean, which is all that kernels without one see.

        Args:
            with_bias: As of :meth:`solve`.
        """
        width = self.gram.shape[-1]
        numbers = width - with_bias
        centre = torch.eye(width).to(self.gram)
        centre[:numbers, :numbers] -= 1 / numbers
        return replace(self, gram=centre @ self.gram @ centre, cross=centre @ self.cross)

    def error(self, kernels: torch.Tensor) -> torch.Tensor:
        """The sum of squared errors of each output.

        Args:
            kernels: ``(G, O, K)``.

        Returns:
            ``(G, O)``.
        """
        error = ((kernels @ self.gram - 2 * self.cross.mT) * kernels).sum(-1) + self.energy
        return error.clamp(min=0)

    def solve(self, kernels: torch.Tensor, ridge: float, *, with_bias: bool) -> torch.Tensor:
        """The kernels of least error, drawn towards given ones.

        Args:
            kernels: What they are drawn towards, ``(G, O, K)``.
            ridge: How strongly: what is added to the diagonal of A, as a share of its mean.
            with_bias: Whether the last number of a kernel is a bias, which is not drawn.

        Returns:
            ``(G, O, K)``.
        """
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        mean = (diagonal[:, :-1] if with_bias else diagonal).mean(-1, keepdim=True)
        added = ridge * torch.where(mean > 0, mean, 1.0).expand_as(diagonal).clone()
        if with_bias:
            added[:, -1] *= 1e-9
        factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag_embed(added))
        change = self.cross - self.gram @ kernels.mT  # the gradient where they are
        solved: torch.Tensor = kernels + torch.cholesky_solve(change, factor).mT
        return torch.where((failed == 0)[:, None, None] & solved.isfinite().all(-1, keepdim=True), solved, kernels)


def add_to(sums: dict[Key, Moments], key: Key, new: Moments) -> None:
    """Add moments to those that are kept under a key, if there are any."""
    sums[key] = sums[key] + new if key in sums else new


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
