"""Images of a folder, as a timm network takes them."""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Subset

from coconv_surgery.calibration.batches import BATCH
from coconv_surgery.tracing.inputs import InputSize


def image_sides(input_size: InputSize) -> tuple[int, ...]:
    """Height and width of an input size.

    >>> image_sides(224), image_sides((3, 224, 320))
    ((224, 224), (224, 320))
    """
    return (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]


def image_batches(
    model: nn.Module, folder: Path, count: int, input_size: int | tuple[int, ...] | None = None
) -> DataLoader[Any]:
    """Load images of a folder and all folders in it, as timm's evaluation does.

    Args:
        model: A network of timm's, which says how it was trained.
        folder: The folder.
        count: How many images at most, chosen at random, the same ones each time.
        input_size: Side, or (height, width), instead of the network's.

    Returns:
        Batches of images and of labels that mean nothing.

    Raises:
        ValueError: If there are none, or one of those that were chosen cannot be read.
    """
    arguments: dict[str, Any] = {}
    if input_size is not None:
        arguments["input_size"] = (3, *image_sides(input_size))
    config = resolve_model_data_config(model, args=arguments)
    try:
        found = ImageDataset(str(folder), transform=create_transform(**config, is_training=False))
    except RuntimeError as error:
        raise ValueError(f"{folder} has no images to calibrate on: {error}") from error
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:count].tolist()
    for index in chosen:
        _check_image(found.filename(index, absolute=True))
    return DataLoader(cast(Any, Subset(found, chosen)), batch_size=BATCH)


def _check_image(path: str) -> None:
    """See that an image can be read: timm takes the next one in place of one that cannot."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no image that can be read ({error}): take it out of the folder") from error
