"""How good generated images are: the columns of Table 7."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from coconv_surgery.generation.images import GrowingImages, seeded
from coconv_surgery.generation.sampling import Grown
from coconv_surgery.generation.wasserstein import SMALLEST_LEVEL, PatchSet, sliced_wasserstein
from coconv_surgery.layers.arguments import file_to_read

try:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.functional.image import structural_similarity_index_measure
    from torchmetrics.image import FrechetInceptionDistance, InceptionScore
    from torchmetrics.image.fid import NoTrainInceptionV3
except ImportError as error:
    raise ImportError(f"{error.name} is not installed: pip install 'coconv-surgery[generation]'") from error

Score = Literal["swd", "ms-ssim", "fid", "is"]
SCORES: tuple[Score, ...] = get_args(Score)
# Images that the reference implementation takes for each.
COUNTS: dict[Score, int] = {"swd": 16_384, "ms-ssim": 20_000, "fid": 50_000, "is": 50_000}
_BATCH = 32
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales (Wang et al., 2003)
_WINDOW, _SIGMA = 11, 1.5


def score(
    grown: Grown,
    data: GrowingImages,
    scores: Sequence[Score],
    *,
    count: int | None = None,
    inception: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Compare what a generator makes with real images.

    Args:
        grown: The generator.
        data: Real images.
        scores: Which scores: ``"swd"``, ``"ms-ssim"`` (of generated images alone), ``"fid"`` and ``"is"``.
        count: Images for each score. Default: as many as the reference implementation takes, see :data:`COUNTS`; where
            there are fewer real ones, those.
        inception: File of Inception-v3's weights, which ``"fid"`` and ``"is"`` need.
        seed: Of latents, and of what a score leaves to chance.
        progress: Told what is being computed.

    Returns:
        The scores by name, in the order of Table 7. Sliced Wasserstein distances are times 10³, by level and on
        average.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If they are needed and not given, or images are too small for a score.
    """
    side = grown.resolution
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
        most = COUNTS[name] if count is None else count
        most = most if name in ("ms-ssim", "is") else min(most, len(data))
        fakes = grown.images(most, seed)
        if name == "swd":
            distances = sliced_wasserstein(_patches(real_images(data, side, most, seed)), _patches(fakes), seed)
            found |= {f"SWD×10³ {level}": 1e3 * value for level, value in distances.items()}
            found["SWD×10³ average"] = 1e3 * sum(distances.values()) / len(distances)
        elif name == "ms-ssim":
            found["MS-SSIM"] = _mean_ms_ssim(fakes)
        elif name == "fid":
            found["FID"] = _frechet(real_images(data, side, most, seed), fakes, inception)
        else:
            found["IS"], found["IS ±"] = _inception_score(fakes, inception, seed)
    return found


def real_images(data: GrowingImages, side: int, count: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Batches of real images, chosen by chance.

    Args:
        data: All of them.
        side: The side that they are wanted at.
        count: How many.
        seed: Of the choice.
    """
    chosen = iter(torch.randperm(len(data), generator=seeded(seed))[:count].tolist())
    while batch := list(islice(chosen, _BATCH)):
        yield torch.stack([data[index, side] for index in batch])


def ms_ssim(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity of pairs of images (Wang et al., 2003).

    As in ProGAN's reference implementation the window shrinks with the map where that is smaller, so that 128×128
    pixels are enough; from 161 on it is torchmetrics' own.

    Args:
        ones: ``(N, C, H, W)``, from 0 to 255.
        others: ``(N, C, H, W)``.

    Returns:
        ``(N,)``.
    """
    product = torch.ones(len(ones), device=ones.device)
    for scale, weight in enumerate(_WEIGHTS):
        window = min(_WINDOW, ones.shape[-1] - (1 - ones.shape[-1] % 2))
        similarity, contrast = structural_similarity_index_measure(
            ones,
            others,
            sigma=_SIGMA * window / _WINDOW,
            kernel_size=window,
            data_range=255.0,
            reduction="none",
            return_contrast_sensitivity=True,
        )
        last = scale == len(_WEIGHTS) - 1
        product = product * (similarity if last else contrast).clamp(min=0) ** weight
        ones, others = F.avg_pool2d(ones, 2), F.avg_pool2d(others, 2)
    return product


def _patches(batches: Iterator[torch.Tensor]) -> PatchSet:
    patches = PatchSet()
    for images in batches:
        patches.add(images)
    return patches


def _mean_ms_ssim(batches: Iterator[torch.Tensor]) -> float:
    values = [ms_ssim(images[::2].float(), images[1::2].float()) for images in batches]
    return torch.cat(values).double().mean().item()


def _frechet(reals: Iterator[torch.Tensor], fakes: Iterator[torch.Tensor], inception: Any) -> float:
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(inception))
    for batches, real in ((reals, True), (fakes, False)):
        for images in batches:
            metric.update(_in_colour(images), real=real)
    return float(metric.compute())


def _inception_score(fakes: Iterator[torch.Tensor], inception: Any, seed: int) -> tuple[float, float]:
    network = NoTrainInceptionV3("inception-v3-compat", ["logits_unbiased"], str(inception))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps what it computes
        metric = InceptionScore(network)
    for images in fakes:
        metric.update(_in_colour(images))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # it shuffles
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def _in_colour(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1)


def _inception_file(path: str | Path | None) -> Path:
    source = f"get {URL_INCEPTION_V3}, torch-fidelity's port of the weights that FID and IS are defined by"
    if path is None:
        raise ValueError(f"FID and IS need Inception's weights: {source}, and name the file")
    try:
        return file_to_read(path, "inception")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {source}") from None
