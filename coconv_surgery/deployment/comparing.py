"""Whether two things compute the same, and on what to try them."""

import torch

from coconv_surgery.tracing.differences import difference

# Magnitudes of the random numbers that a module is tried on: what clamps or saturates does not do so at all of them.
SCALES = (1e-2, 1.0, 1e3, 1e8)
_ROUNDING = 1e-6


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors that were computed in double precision differ by no more than rounding, and hold numbers."""
    return found.shape == expected.shape and found.numel() > 0 and difference(found, expected) <= _ROUNDING
