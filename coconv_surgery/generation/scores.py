"""How good generated images are: the columns of Table 7."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.generation.images import GrowingImages, seeded
from coconv_surgery.generation.sampling import Grown
from coconv_surgery.generation.wasserstein import SMALLEST_LEVEL, PatchSet, sliced_wasserstein
from coconv_surgery.layers.arguments import choice, file_to_read, whole_number

try:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.functional.image import structural_similarity_index_measure
    from torchmetrics.image import FrechetInceptionDistance, InceptionScore
    from torchmetrics.image.fid import NoTrainInceptionV3
except ImportError as error:
    message = f"{error.name} is not installed: pip install 'coconv-surgery[generation]'"
    raise ImportError(message, name=error.name) from error

Score = Literal["swd", "ms-ssim", "fid", "is"]
SCORES: tuple[Score, ...] = get_args(Score)
# Images that the reference implementation takes for each.
COUNTS: dict[Score, int] = {"swd": 16_384, "ms-ssim": 20_000, "fid": 50_000, "is": 50_000}
_BATCH = 32
_SOURCE = f"get {URL_INCEPTION_V3}, torch-fidelity's port of the weights that FID and IS are defined by"
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales (Wang et al., 2003)
_WINDOW, _SIGMA = 11, 1.5


def score(
    grown: Grown,
    data: GrowingImages,
    scores: Sequence[Score],
    *,
    count: int | None = None,
    inception: str | Path | None = None,
    mirror: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Compare what a generator makes with real images.

    Args:
        grown: The generator.
        data: Real images.
        scores: Which scores: ``"swd"``, ``"ms-ssim"`` (of generated images alone), ``"fid"`` and ``"is"``.
        count: Images for each score, an even number. Default: as many as the reference implementation takes, see
            :data:`COUNTS`, or as there are real ones.
        inception: File of Inception-v3's weights, which ``"fid"`` and ``"is"`` need.
        mirror: Whether half of the real images are mirrored, as where a training mirrors them.
        seed: Of latents, and of what a score leaves to chance.
        progress: Told what is being computed.

    Returns:
        The scores by name, in the order of Table 7. Sliced Wasserstein distances are times 10³, by level and on
        average.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If they are needed and not given, images are too small for a score, there are too few real ones, or
            an argument is not one that it can be.
    """
    for name in scores:
        choice(name, "scores", SCORES)
    side = grown.resolution
    if data.colours != grown.generator.colours:
        raise ValueError(f"real images of {data.colours} colours, generated ones of {grown.generator.colours}")
    if count is not None and (whole_number(count, "count", at_least=2) % 2 or count > len(data)):
        raise ValueError(f"count={count} must be even, and at most the number of real images, {len(data)}")
    if side > data.resolution:
        raise ValueError(f"the generator makes images of {side}×{side} pixels, larger than the real ones")
    if "swd" in scores and side < SMALLEST_LEVEL:
        raise ValueError(f"images of {side}×{side} pixels are too small for SWD: it starts at {SMALLEST_LEVEL}")
    if "ms-ssim" in scores and side < 128:
        raise ValueError(f"images of {side}×{side} pixels are too small for MS-SSIM, which halves them four times: 128")
    if {"fid", "is"} & set(scores):
        inception = _inception_file(inception)
    found: dict[str, float] = {}
    for name in (name for name in ("is", "fid", "ms-ssim", "swd") if name in scores):
        progress(name)
        most = min(COUNTS[name], len(data)) if count is None and name in ("swd", "fid") else count or COUNTS[name]
        fakes = grown.images(most, seed)
        if name == "swd":
            reals = real_images(data, side, most, seed, mirror=mirror)
            distances = sliced_wasserstein(_patches(reals), _patches(fakes), seed, grown.device)
            found |= {f"SWD×10³ {level}": 1e3 * value for level, value in distances.items()}
            found["SWD×10³ average"] = 1e3 * sum(distances.values()) / len(distances)
        elif name == "ms-ssim":
            found["MS-SSIM"] = _mean_ms_ssim(fakes, grown.device)
        elif name == "fid":
            reals = real_images(data, side, most, seed, mirror=mirror)
            found["FID"] = _frechet(reals, fakes, inception, grown.device)
        else:
            found["IS"], found["IS ±"] = _inception_score(fakes, inception, grown.device, seed)
    return found


def real_images(
    data: GrowingImages, side: int, count: int, seed: int = 0, *, mirror: bool = False
) -> Iterator[torch.Tensor]:
    """Batches of real images, chosen by chance.

    Args:
        data: All of them.
        side: The side that they are wanted at.
        count: How many.
        seed: Of the choice.
        mirror: Whether every other one is mirrored.
    """
    chosen = iter(torch.randperm(len(data), generator=seeded(seed))[:count].tolist())
    while batch := list(islice(chosen, _BATCH)):
        images = torch.stack([data[index, side] for index in batch])
        if mirror:
            images[::2] = images[::2].flip(3)
        yield images


def ms_ssim(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity of pairs of images (Wang et al., 2003).

    As in ProGAN's reference implementation the window shrinks with the map where that is smaller, so that 128×128
    pixels are enough, and only whole windows count. Theirs shrinks to 8 pixels, this one to 7.

    Args:
        ones: ``(N, C, H, W)``, from 0 to 255.
        others: ``(N, C, H, W)``.

    Returns:
        ``(N,)``.
    """
    product = torch.ones(len(ones), device=ones.device)
    for scale, weight in enumerate(_WEIGHTS):
        window = min(_WINDOW, ones.shape[-1] - (1 - ones.shape[-1] % 2))
        last = scale == len(_WEIGHTS) - 1
        _, found = structural_similarity_index_measure(
            ones,
            others,
            sigma=_SIGMA * window / _WINDOW,
            kernel_size=window,
            data_range=255.0,
            reduction="none",
            return_full_image=last,
            return_contrast_sensitivity=not last,
        )
        if last:  # at the border, windows are filled up
            border = window // 2
            found = found[..., border:-border, border:-border].mean((1, 2, 3))
        product = product * found.clamp(min=0) ** weight
        ones, others = F.avg_pool2d(ones, 2), F.avg_pool2d(others, 2)
    return product


def _patches(batches: Iterator[torch.Tensor]) -> PatchSet:
    patches = PatchSet()
    for images in batches:
        patches.add(images)
    return patches


def _mean_ms_ssim(batches: Iterator[torch.Tensor], device: torch.device) -> float:
    moved = (images.to(device).float() for images in batches)
    values = [ms_ssim(images[::2], images[1::2]) for images in moved]
    return torch.cat(values).double().mean().item()


def _frechet(
    reals: Iterator[torch.Tensor], fakes: Iterator[torch.Tensor], inception: Any, device: torch.device
) -> float:
    metric = FrechetInceptionDistance(_inception(inception, "2048")).to(device)
    for batches, real in ((reals, True), (fakes, False)):
        for images in batches:
            metric.update(_in_colour(images).to(device), real=real)
    return float(metric.compute())


def _inception_score(
    fakes: Iterator[torch.Tensor], inception: Any, device: torch.device, seed: int
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps what it computes
        metric = InceptionScore(_inception(inception, "logits_unbiased")).to(device)
    for images in fakes:
        metric.update(_in_colour(images).to(device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # it shuffles
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def _inception(path: Path, feature: str) -> nn.Module:
    try:
        network: nn.Module = NoTrainInceptionV3("inception-v3-compat", [feature], str(path))
    except (RuntimeError, UnpicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not hold Inception's weights: {_SOURCE}") from error
    return network


def _in_colour(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1)


def _inception_file(path: str | Path | None) -> Path:
    if path is None:
        raise ValueError(f"FID and IS need Inception's weights: {_SOURCE}, and name the file")
    try:
        return file_to_read(path, "inception")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {_SOURCE}") from None
