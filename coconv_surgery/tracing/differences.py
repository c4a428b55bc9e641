"""By how much what two networks compute differs."""

import torch


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
    apart, largest = (found - expected)[finite].abs().max(), expected[finite].abs().max()
    return float(apart / largest) if largest > 0 else torch.inf if apart > 0 else 0.0
