"""Sliced Wasserstein distance between two sets of images (Karras et al., ICLR 2018, section 5).

Patches of 7×7 pixels are taken from every level of a Laplacian pyramid (Burt and Adelson, 1983), 128 of an image, and
their colours brought to mean 0 and deviation 1 over all patches of a level. The distance of two sets of patches is that
of their projections onto directions of chance, 512 of them, where the Wasserstein distance is the mean difference of
sorted numbers (Rabin et al., 2011).
"""

import torch
import torch.nn.functional as F

from coconv_surgery.generation.images import seeded

SMALLEST_LEVEL = 16
_PATCH, _PER_IMAGE, _DIRECTIONS = 7, 128, 512
_AT_ONCE = 16  # directions, which bounds memory


class PatchSet:
    """The patches of a set of images, level by level.

    Two sets that are to be compared are made with the same arguments, of equally many images.

    Args:
        seed: Of the places that patches are taken from.

    >>> patches = PatchSet()
    >>> patches.add(torch.rand(2, 3, 32, 32))
    >>> patches.sizes()
    {32: (256, 147), 16: (256, 147)}
    """

    def __init__(self, seed: int = 0) -> None:
        self._chance = seeded(seed)
        self._found: dict[int, list[torch.Tensor]] = {}

    def add(self, images: torch.Tensor) -> None:
        """Add images.

        Args:
            images: ``(N, C, H, W)``; the side a power of two, and at least 16.

        Raises:
            ValueError: If they are smaller, or not square.
        """
        side = images.shape[-1]
        if images.shape[-2] != side or side < SMALLEST_LEVEL:
            raise ValueError(
                f"images of {images.shape[-2]}×{side} pixels: the sliced Wasserstein distance takes squares of "
                f"{SMALLEST_LEVEL}×{SMALLEST_LEVEL} or more"
            )
        for level in laplacian_pyramid(images.float(), SMALLEST_LEVEL):
            self._found.setdefault(level.shape[-1], []).append(_patches(level, self._chance))

    def sizes(self) -> dict[int, tuple[int, int]]:
        """How many patches there are, and numbers in each, by side of the level, the largest first."""
        return {side: (sum(map(len, found)), found[0][0].numel()) for side, found in self._found.items()}

    def take(self, side: int) -> torch.Tensor:
        """Take out the patches of a level, normalised: ``(patches, C · 49)``."""
        patches = torch.cat(self._found.pop(side))
        mean, deviation = patches.mean((0, 2), keepdim=True), patches.std((0, 2), unbiased=False, keepdim=True)
        return patches.sub_(mean).div_(deviation.clamp(min=1e-8)).flatten(1)  # images of one colour have no deviation


def sliced_wasserstein(
    reals: PatchSet, fakes: PatchSet, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[int, float]:
    """Distance between two sets of images at each level.

    Args:
        reals: Patches of the one set, which are used up: for 16,384 images of 128×128 pixels they take 5 GB.
        fakes: Patches of the other, which are used up as well.
        seed: Of the directions.
        device: Where to sort.

    Returns:
        Distances by side of the level, the largest side first; 10³ times as much is what Table 7 shows.

    Raises:
        ValueError: If the sets are of different sizes.

    >>> ones, others = PatchSet(), PatchSet()
    >>> for patches in (ones, others):
    ...     patches.add(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    >>> sliced_wasserstein(ones, others)
    {16: 0.0}
    """
    sizes, others = reals.sizes(), fakes.sizes()
    if sizes != others or not sizes:
        raise ValueError(f"sets of patches by side, {sizes} and {others}: give equally many images of one size")
    return {side: distance(reals.take(side).to(device), fakes.take(side).to(device), seed) for side in sizes}


def distance(ones: torch.Tensor, others: torch.Tensor, seed: int = 0) -> float:
    """Sliced Wasserstein distance between two sets of equally many points.

    Args:
        ones: ``(N, D)``.
        others: ``(N, D)``.
        seed: Of the 512 directions.

    >>> distance(torch.zeros(5, 1), torch.full((5, 1), 3.0))
    3.0
    """
    directions = torch.randn(ones.shape[1], _DIRECTIONS, generator=seeded(seed)).to(ones)
    directions /= directions.norm(dim=0)
    total = torch.zeros((), dtype=torch.float64)
    for few in torch.split(directions, _AT_ONCE, dim=1):
        sorted_ones, sorted_others = ((points @ few).sort(dim=0).values for points in (ones, others))
        total += (sorted_ones - sorted_others).abs().mean(0).double().sum().cpu()
    return (total / _DIRECTIONS).item()


def laplacian_pyramid(images: torch.Tensor, smallest: int) -> list[torch.Tensor]:
    """What each halving of images loses, and the smallest ones.

    Args:
        images: ``(N, C, H, W)``.
        smallest: Side of the last level.

    Returns:
        From the largest level to the smallest. Each but the last is its images less those of the next, enlarged.
    """
    levels = [images]
    while levels[-1].shape[-1] > smallest:
        smaller = _blurred(levels[-1])[..., ::2, ::2]
        levels[-1] = levels[-1] - _enlarged(smaller)
        levels.append(smaller)
    return levels


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    spread = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    spread[..., ::2, ::2] = images
    return 4 * _blurred(spread)


def _blurred(images: torch.Tensor) -> torch.Tensor:
    row = images.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = torch.outer(row, row).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])


def _patches(level: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Patches of all images, ``(N · 128, C, 49)``."""
    count, colours, side = level.shape[0], level.shape[1], level.shape[-1]
    corners = torch.randint(side - _PATCH + 1, (2, count, _PER_IMAGE, 1, 1), generator=chance).to(level.device)
    steps = torch.arange(_PATCH, device=level.device)
    places = (corners[0] + steps[:, None]) * side + corners[1] + steps
    flat = places.view(count, 1, -1).expand(-1, colours, -1)
    found = level.flatten(2).gather(2, flat).view(count, colours, _PER_IMAGE, _PATCH**2)
    return found.transpose(1, 2).reshape(-1, colours, _PATCH**2)
