"""Whether two things compute the same, and on what to try them."""

import torch

# Magnitudes of the random numbers that a module is tried on: what clamps or saturates does not do so at all of them.
SCALES = (1e-2, 1.0, 1e3)
_ROUNDING = 1e-6


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors that were computed in double precision differ by no more than rounding, and hold numbers."""
    return found.shape == expected.shape and found.numel() > 0 and difference(found, expected) <= _ROUNDING


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference between two tensors, relative to the largest number; infinite where one alone is not finite.

    NaN where there is no number to compare.
    """
    found, expected = found.to(torch.complex128), expected.to(torch.complex128)
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite):
        return torch.inf
    if not finite.any():
        return torch.nan
    largest = expected[finite].abs().max()
    return float((found - expected)[finite].abs().max() / largest.clamp(min=torch.finfo(torch.float32).tiny))
