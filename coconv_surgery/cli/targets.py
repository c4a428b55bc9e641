"""Networks as the command line names them."""

import ast
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn as nn

from coconv_surgery.checkpoint.converted import check_sizes, load_converted
from coconv_surgery.checkpoint.header import is_json, network_in_header, read_header
from coconv_surgery.checkpoint.hub import coconv_converted
from coconv_surgery.checkpoint.origin import plan_for, read_plan
from coconv_surgery.checkpoint.reading import is_safetensors
from coconv_surgery.cli.images import image_sides
from coconv_surgery.layers.arguments import Pair, kind, near_miss, shown
from coconv_surgery.paper.counting import count as count_cost
from coconv_surgery.planning.notes import size_planned_for
from coconv_surgery.planning.plan import Plan
from coconv_surgery.planning.policies import get_policy
from coconv_surgery.surgery import apply_plan, complete_plan, plan_conversion
from coconv_surgery.tracing.inputs import Inputs, InputSize, infer_inputs
from coconv_surgery.tracing.objects import in_short

FORMS = (
    "a name of timm's (or hf_hub:… or local-dir:…), torchvision/NAME, package.module:factory, a file that coconv "
    "convert wrote, or the .py of an MMDetection config"
)
_HUBS = ("hf-hub:", "hf_hub:", "local-dir:", "local_dir:")
_TORCHVISION = "torchvision/"
_FILES = {".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin"}
# What of a builder's arguments reads files, and a file may not ask for.
_READING = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
_READING |= {"weights", "weights_backbone"}
# What of them brings weights of the whole network.
_BRINGING = ("pretrained", "weights")
_CHANNELS = 3  # of a detector's images


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
    if not target:
        raise ValueError(f"an empty name names no network: give {FORMS}")
    if is_config(target):
        _refuse_arguments(target, {**given, **({"pretrained": True} if pretrained else {})})
        return _detector(target)
    if Path(target).is_file():
        return _of_file(target, given, pretrained)
    if Path(target).suffix in _FILES and not target.startswith(_HUBS):
        raise FileNotFoundError(f"there is no file {shown(target)}")
    if _is_of_library(target):
        return _of_library(target, given, pretrained)
    if is_factory(target):
        return _module(factory_of(target), {**given, **({"pretrained": True} if pretrained else {})}, target)
    if Path(target).is_dir():
        raise ValueError(f"{target} is a folder: give local-dir:{target} if save_for_hf wrote it, else {FORMS}")
    hint = near_miss(target, timm.list_models(), count=3)
    raise ValueError(f"timm has no model {target!r}: {hint or f'give {FORMS}'}")


def inputs_of(network: nn.Module, target: str, input_size: InputSize | None) -> Inputs:
    """What to call a network with.

    Args:
        network: What :func:`build` has built, with the weights that it is to have.
        target: What named it.
        input_size: As the command line has it. Default: the size that a conversion was planned for, or else what the
            network or the config says.

    Raises:
        ValueError: If nothing says how large its images are.
    """
    if is_config(target):
        from coconv_surgery.mmdet.inputs import example_inputs

        return example_inputs(network, sides_of_config(target, input_size))
    if input_size is not None:
        return infer_inputs(network, input_size)
    try:
        return infer_inputs(network, size_planned_for(network))
    except ValueError as error:
        name = target or type(network).__name__
        raise ValueError(
            f"{name} does not say how large its input is: give --input-size 224, 224x320 or 3x224x320"
        ) from error


def is_config(target: str) -> bool:
    """Whether a target is a config of MMDetection."""
    return target.endswith(".py")


def is_factory(target: str) -> bool:
    """Whether a target is a function of a module, which makes a network and may load its weights."""
    return ":" in target and not target.startswith(_HUBS)


def is_file(target: str) -> bool:
    """Whether a target is a file of weights."""
    return Path(target).is_file() and not is_config(target)


def has_weights_of_chance(
    target: str, arguments: Mapping[str, Any], checkpoint: Path | None, *, pretrained: bool
) -> bool:
    """Whether a network's weights are those that it was made with; what a factory makes may have trained ones.

    Args:
        target: What names it.
        arguments: What builds it is given.
        checkpoint: A file of weights, if one is loaded.
        pretrained: Whether the library's weights are.
    """
    brought = checkpoint is not None or pretrained or any(arguments.get(name) for name in _BRINGING)
    return not (brought or is_factory(target) or is_file(target))


def describe(target: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a file is told of the network whose weights it holds, as of :func:`~coconv_surgery.save_converted`.

    Returns:
        That; None if the arguments cannot be written down.
    """
    if is_file(target):
        told = network_in_header(read_header(target), target)
        return told and describe(told["target"], {**told["arguments"], **arguments})
    network = {"target": target, "arguments": dict(arguments)}
    return network if is_json(network) else None


def plan_as_chosen(
    network: nn.Module, target: str, *, policy: str, input_size: InputSize | None, **choices: Any
) -> Plan:
    """Plan the conversion of a network by what the command line has.

    Args:
        network: What :func:`build` has built.
        target: What named it.
        policy: The policy's name.
        input_size: The size, if one was given.
        **choices: Patterns and settings of the policy; those that are empty or None were not given.
    """
    inputs = inputs_of(network, target, input_size)
    return plan_conversion(network, policy, example_inputs=inputs, **_given(choices))


def check_policy(policy: str, **choices: Any) -> None:
    """Check a policy and its settings before there is a network.

    Args:
        policy: Its name.
        **choices: All that the command line has, as :func:`plan_as_chosen`.

    Raises:
        ValueError: If there is no such policy, or the settings do not suit it.
    """
    others = inspect.signature(plan_conversion).parameters
    get_policy(policy, **{name: value for name, value in _given(choices).items() if name not in others})


def _given(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if value not in (None, ())}


def convert_as_chosen(network: nn.Module, **choices: Any) -> nn.Module:
    """Convert a network in place by what the command line has, as :func:`plan_as_chosen`."""
    return apply_plan(network, plan_as_chosen(network, "", **choices))


def replay(network: nn.Module, plan: Plan) -> nn.Module:
    """Convert a network in place by a plan, which may be of one with other classes, or of one within another."""
    return apply_plan(network, complete_plan(network, plan_for(network, plan)))


def read_plan_file(path: Path) -> Plan:
    """Read a plan, of a file of its own or of one of weights.

    Raises:
        PlanError: If there is none.
        CheckpointError: If it is a file of weights that tells no plan.
    """
    with open(path, "rb") as file:
        is_text = b"\0" not in file.read(1024)
    return Plan.from_json(path) if is_text else read_plan(path)


def count(network: nn.Module, target: str, input_size: InputSize | None) -> tuple[int, int, str]:
    """Count what a network costs.

    Args:
        network: As of :func:`inputs_of`.
        target: As there.
        input_size: As there.

    Returns:
        Its parameters, its multiply-adds, and the size of the input that takes them.
    """
    if is_config(target):
        from coconv_surgery.mmdet.flops import count_complexity

        sides = sides_of_config(target, input_size)
        return *count_complexity(network, cast(Pair, sides)), "×".join(map(str, sides))
    inputs = inputs_of(network, target, input_size)
    cost = count_cost(network.eval(), *inputs.args, **inputs.kwargs)
    return cost.parameters, cost.multiply_adds, str(inputs)


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


def _refuse_arguments(config: str, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise ValueError(f"{config} is a config, which says all of its network: change it there")


def sides_of_config(config: str, input_size: InputSize | None) -> tuple[int, ...]:
    """Height and width of a detector's images.

    Args:
        config: A config of MMDetection.
        input_size: As the command line has it. Default: that of its pipeline for tests.

    Raises:
        ValueError: If it has other channels than a detector's images have.
    """
    if input_size is not None:
        if not isinstance(input_size, int) and len(input_size) > 2 and input_size[0] != _CHANNELS:
            raise ValueError(f"the images of {config} have {_CHANNELS} channels: give --input-size HxW")
        return image_sides(input_size)
    from mmengine.config import Config

    from coconv_surgery.mmengine.options import resized_to

    return tuple(resized_to(Config.fromfile(config).get("test_pipeline", [])))


def _is_of_library(target: str) -> bool:
    return target.startswith((*_HUBS, _TORCHVISION)) or timm.is_model(target)


def _of_library(target: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    if target.startswith(_TORCHVISION):
        return _of_torchvision(target, arguments, pretrained)
    if "checkpoint_path" in arguments:
        raise ValueError("--arg checkpoint_path: give a file of weights by --checkpoint")
    return _module(functools.partial(timm.create_model, target, pretrained=pretrained), arguments, target)


def _of_file(path: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        raise ValueError(f"{path} holds the weights of its network: leave out --pretrained")
    told = network_in_header(read_header(path), path) if is_safetensors(path) else None
    if told is None:
        raise ValueError(
            f"{path} is a file that does not say of which network its weights are: name the network, and give the file "
            "by --weights"
        )
    name, given = told["target"], told["arguments"]
    # What a file says is not to be trusted: it may name a library's network, and no code, and no other file.
    is_ours = timm.is_model(name) and name != coconv_converted.__name__  # which reads a folder or a hub
    if not (is_ours or name.startswith(_TORCHVISION)) or given.keys() & _READING:
        raise ValueError(
            f"{path} holds the weights of {shown(name)}, and a file may not name code or other files: if you trust it, "
            "name that as the TARGET, and give the file by --weights"
        )
    make = functools.partial(_of_library, name, {**given, **arguments}, False)
    _check_sizes(make, path)
    return load_converted(make(), path)


def _check_sizes(make: Callable[[], nn.Module], path: str) -> None:
    """Compare the sizes that a file asks for with those that it holds, before they cost memory."""
    try:
        with torch.device("meta"):
            network = make()
    except ValueError:  # torchvision's RegNets compute with tensors
        return
    check_sizes(network, path)


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


def _of_torchvision(target: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    from torchvision.models import get_model, get_model_builder, list_models

    name = target.removeprefix(_TORCHVISION)
    if name not in list_models():
        hint = near_miss(name, list_models(), count=3) or "torchvision.models.list_models() lists them"
        raise ValueError(f"torchvision has no model {name!r}: {hint}")
    arguments.setdefault("weights", "DEFAULT" if pretrained else None)
    # Its detectors and segmenters load weights of their backbone otherwise.
    if not pretrained and "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        arguments.setdefault("weights_backbone", None)
    return _module(functools.partial(get_model, name), arguments, target)


def factory_of(target: str) -> Callable[..., Any]:
    """The function or class that a target names.

    Args:
        target: As :func:`is_factory` has it.

    Raises:
        ValueError: If it cannot be imported.
        TypeError: If it is something else.
    """
    place, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(place)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        why = error if isinstance(error, ImportError | AttributeError) else in_short(error)
        raise ValueError(f"{target}: {why}. It is read as package.module:factory; else give {FORMS}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(factory):
        raise TypeError(f"{target} is not a function or a class, but {kind(factory)}")
    return cast(Callable[..., Any], factory)


def _module(make: Callable[..., Any], arguments: Mapping[str, Any], target: str) -> nn.Module:
    try:
        made = make(**arguments)
    except (Exception, SystemExit) as error:  # whatever the network's own code raises
        given = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items() if value is not None)
        raise ValueError(
            f"{shown(target)} cannot be built{f' with {given}' if given else ''}: {in_short(error)}"
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"{target} makes {kind(made)}, not a torch.nn.Module")
    return made
