"""Networks as the command line names them."""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn

from coconv_surgery.cli.images import image_sides
from coconv_surgery.layers.arguments import kind, near_miss
from coconv_surgery.tracing.inputs import Inputs, InputSize

FORMS = (
    "a name of timm's (or hf_hub:… or local-dir:…), torchvision/NAME, package.module:factory, or the .py of an "
    "MMDetection config"
)
_HUBS = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")
_TORCHVISION = "torchvision/"


def build(target: str, arguments: Mapping[str, Any] | None = None, *, pretrained: bool = False) -> nn.Module:
    """Build the network that a target names.

    Args:
        target: One of :data:`FORMS`.
        arguments: Further arguments of what builds it, such as ``num_classes``.
        pretrained: Whether to load the weights that the library has for it.

    Raises:
        ValueError: If there is no such network, what is named cannot be imported, or a config is given arguments.
        TypeError: If a factory makes something else.
    """
    given = dict(arguments or {})
    if is_config(target):
        if given or pretrained:
            raise ValueError(f"{target} is a config, which says all of its network: change it there")
        return _detector(target)
    if Path(target).is_file():
        raise ValueError(
            f"{target} is a file, which does not say of which architecture its weights are: name the network, and give "
            "the file by --weights"
        )
    if target.startswith(_HUBS) or timm.is_model(target):
        return _module(timm.create_model(target, pretrained=pretrained, **given), target)
    if target.startswith(_TORCHVISION):
        return _of_torchvision(target.removeprefix(_TORCHVISION), given, pretrained)
    if ":" in target:
        return _made(target, {**given, **({"pretrained": True} if pretrained else {})})
    hint = near_miss(target, timm.list_models(), count=3)
    raise ValueError(f"timm has no model {target!r}: {hint or f'give {FORMS}'}")


def inputs_of(network: nn.Module, target: str, input_size: InputSize | None) -> Inputs | None:
    """What to call a network with where its size alone does not say.

    Args:
        network: What :func:`build` has built.
        target: What named it.
        input_size: As the command line has it.

    Returns:
        The inputs of a detector; None for a network that takes images of ``input_size``.

    Raises:
        ValueError: If neither the command nor the config says how large its images are.
    """
    if not is_config(target):
        return None
    from mmengine.config import Config

    from coconv_surgery.mmdet.inputs import example_inputs
    from coconv_surgery.mmengine.options import resized_to

    if input_size is None:
        return example_inputs(network, resized_to(Config.fromfile(target).get("test_pipeline", [])))
    return example_inputs(network, image_sides(input_size))


def is_config(target: str) -> bool:
    """Whether a target is a config of MMDetection."""
    return target.endswith(".py")


def read_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; values are Python's literals, or else text.

    Raises:
        ValueError: If one is not such a pair.

    >>> read_arguments(["num_classes=10", "act_layer=silu", "widths=(8, 16)"])
    {'num_classes': 10, 'act_layer': 'silu', 'widths': (8, 16)}
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--arg {pair}: give it as key=value, such as num_classes=10")
        try:
            found[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[key] = value
    return found


def read_size(value: str) -> int | tuple[int, ...]:
    """Read an input size: ``224``, ``224x320`` or ``3x224x320``; commas do as well.

    >>> read_size("224"), read_size("3x224x320")
    (224, (3, 224, 320))
    """
    sides = tuple(int(side) for side in value.lower().replace("×", "x").replace(",", "x").split("x"))
    return sides[0] if len(sides) == 1 else sides


def _detector(path: str) -> nn.Module:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such config")
    from mmengine.config import Config

    from coconv_surgery.mmdet.building import build_detector

    try:
        model = Config.fromfile(path).get("model")
    except (AttributeError, RuntimeError, SyntaxError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a model: {error or type(error).__name__}") from error
    if model is None:
        raise ValueError(f"{path} is not the config of a model: it has no model=dict(...)")
    return build_detector(model)


def _of_torchvision(name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models

    if name not in list_models():
        hint = near_miss(name, list_models(), count=3) or "torchvision.models.list_models() lists them"
        raise ValueError(f"torchvision has no model {name!r}: {hint}")
    arguments.setdefault("weights", "DEFAULT" if pretrained else None)
    # Its detectors and segmenters load weights of their backbone otherwise.
    if not pretrained and "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        arguments.setdefault("weights_backbone", None)
    return _module(get_model(name, **arguments), name)


def _made(target: str, arguments: dict[str, Any]) -> nn.Module:
    place, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(place)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{target}: {error}. It is read as package.module:factory; else give {FORMS}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(factory):
        raise TypeError(f"{target} is not a function or a class, but {kind(factory)}")
    return _module(factory(**arguments), target)


def _module(made: Any, target: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TypeError(f"{target} makes {kind(made)}, not a torch.nn.Module")
    return made
