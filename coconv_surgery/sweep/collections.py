"""Collections of networks to try a conversion on: timm's, torchvision's, transformers' and MMDetection's."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import model_entrypoint

from coconv_surgery.tracing.inputs import Inputs, infer_inputs


@dataclass(frozen=True)
class Collection:
    """A collection of networks.

    Attributes:
        title: Its name, for a reader.
        package: The distribution that it comes from.
        names: Lists the members, those of a family next to each other.
        family: Tells the family of a member.
        build: Builds a member with random weights, in evaluation mode, and says what to call it with; or raises what
            keeps it from being built here. It must be picklable: each process builds its own networks.
    """

    title: str
    package: str
    names: Callable[[], list[str]]
    family: Callable[[str], str]
    build: Callable[[str], tuple[nn.Module, Inputs]]


def _folder(name: str) -> str:
    return name.partition("/")[0]


# -- timm -------------------------------------------------------------------------------------------------------------


def _timm_names() -> list[str]:
    # What this package registers with timm are timm's ResNets, converted already.
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm.")]
    return sorted(names, key=lambda name: (_timm_family(name), name))


def _timm_family(name: str) -> str:
    module: str = model_entrypoint(name).__module__
    return module.rpartition(".")[2]


def _build_timm(name: str) -> tuple[nn.Module, Inputs]:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    return model, infer_inputs(model)


# -- torchvision ------------------------------------------------------------------------------------------------------

_TORCHVISION = {"classification": "", "segmentation": ".segmentation", "detection": ".detection"}


def _torchvision_names() -> list[str]:
    from torchvision.models import list_models

    modules = {kind: importlib.import_module(f"torchvision.models{path}") for kind, path in _TORCHVISION.items()}
    return [f"{kind}/{name}" for kind, module in modules.items() for name in list_models(module)]


def _build_torchvision(name: str) -> tuple[nn.Module, Inputs]:
    from torchvision.models import get_model

    kind, _, model_name = name.partition("/")
    options = {} if kind == "classification" else {"weights_backbone": None}
    model: Any = get_model(model_name, weights=None, **options).eval()
    if kind == "detection":
        model.transform.min_size, model.transform.max_size = (128,), 160  # unless it is built for one size
        return model, Inputs(([torch.zeros(3, 128, 160)],), call=_detect, needs_numbers=True)
    side = 299 if "inception" in model_name else 256 if model_name.startswith("swin_v2") else 224
    return model.to("meta"), Inputs((torch.zeros(1, 3, side, side, device="meta"),))


def _detect(model: nn.Module, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    # How many objects a detector finds says nothing about the shapes of its outputs.
    return [{name: value[:0] for name, value in found.items()} for found in model(images)]


# -- transformers -----------------------------------------------------------------------------------------------------


def _transformers_classes() -> dict[str, tuple[type, type]]:
    """Config and class of the image classifiers that take one image batch, by model type."""
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    found = {}
    for config, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        cls = classes[0] if isinstance(classes, tuple | list) else classes
        # Others take pixels as tokens, or images cut into any number of patches.
        if cls.main_input_name == "pixel_values" and "spatial_shapes" not in inspect.signature(cls.forward).parameters:
            found[config.model_type] = config, cls
    return found


def _transformers_names() -> list[str]:
    return sorted(_transformers_classes())


def _itself(model_type: str) -> str:
    return model_type


def _build_transformers(name: str) -> tuple[nn.Module, Inputs]:
    config_class, model_class = _transformers_classes()[name]
    config = config_class()
    with torch.device("meta"):
        model: nn.Module = model_class(config).eval()
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return model, Inputs(kwargs={"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), *sides)})


# -- MMDetection ------------------------------------------------------------------------------------------------------


def _mmdet_names() -> list[str]:
    from coconv_surgery.sweep.mmdet_configs import list_configs

    return list_configs()


def _build_mmdet(name: str) -> tuple[nn.Module, Inputs]:
    from coconv_surgery.sweep.mmdet_configs import build

    return build(name)


# Each imports its package when it lists or builds, so that the others work without it.
COLLECTIONS: dict[str, Collection] = {
    "timm": Collection("timm", "timm", _timm_names, _timm_family, _build_timm),
    "torchvision": Collection("torchvision", "torchvision", _torchvision_names, _folder, _build_torchvision),
    "transformers": Collection("transformers", "transformers", _transformers_names, _itself, _build_transformers),
    "mmdet": Collection("MMDetection", "mmdet", _mmdet_names, _folder, _build_mmdet),
}
