"""What a network is called with while it is traced."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map_only

from coconv_surgery.layers.arguments import Pair, flag, instance, kind, mapping, whole_numbers
from coconv_surgery.tracing.objects import tensors_in

InputSize = int | Sequence[int]
_MOST_NUMBERS = 2**24


@dataclass(frozen=True)
class Inputs:
    """What to call a network with.

    Attributes:
        args: Inputs by position.
        kwargs: Inputs by name.
        call: What to call instead of the network, with the network before the inputs: for one that needs more than a
            call, or for a copy of it some preparation, which the trace gives it.
        needs_numbers: Whether the network's control flow is known to need numbers, so that shapes alone do not do.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    needs_numbers: bool = False

    def __post_init__(self) -> None:
        instance(self.args, "args", (tuple, list), "a tuple of inputs")
        mapping(self.kwargs, "kwargs", "inputs by name")
        if self.call is not None and not callable(self.call):
            raise TypeError(f"call must be a function of the network and its inputs, not {kind(self.call)}")
        flag(self.needs_numbers, "needs_numbers")

    @property
    def image_size(self) -> Pair | None:
        """Height and width of the first image batch among the inputs."""
        images = (tensor for tensor in tensors_in(self.args, self.kwargs) if tensor.dim() in (3, 4))
        return next(((image.shape[-2], image.shape[-1]) for image in images), None)

    def run(self, model: nn.Module) -> Any:
        """Run a network on a copy of them."""
        inputs = tree_map_only(
            torch.Tensor, lambda tensor: tensor.detach().clone(), (tuple(self.args), {**self.kwargs})
        )
        args, kwargs = copy.deepcopy(inputs)
        return model(*args, **kwargs) if self.call is None else self.call(model, *args, **kwargs)

    def __str__(self) -> str:
        tensors = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]
        return ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors)


class BlankInputs(Inputs):
    """An image that is too large to fill it with numbers: its memory is never touched, and it is for shapes alone."""


def infer_inputs(
    model: nn.Module,
    input_size: InputSize | None = None,
    example_inputs: Any = None,
    otherwise: InputSize | None = None,
) -> Inputs:
    """Find out what to call a network with.

    Args:
        model: The network.
        input_size: Side, (height, width) or (channels, height, width) of an image. Default: what timm says of the
            network, or what a graph of ``torch.export`` has recorded, or the ``example_input_array`` that a network
            has, as Lightning's modules do.
        example_inputs: The inputs themselves: a tensor, a tuple of arguments, a dict of them by name, or
            :class:`Inputs`.
        otherwise: An ``input_size`` for a network of which nothing tells.

    Raises:
        TypeError: If ``example_inputs`` are of a wrong kind.
        ValueError: If nothing tells, if both are given, or if ``input_size`` is not a size.
    """
    if example_inputs is not None:
        if input_size is not None:
            raise ValueError("give either input_size= or example_inputs=, not both")
        return _given_inputs(example_inputs, "example_inputs")
    if input_size is None and isinstance(model, fx.GraphModule) and (recorded := _recorded_inputs(model)):
        return recorded
    if input_size is None:
        if (example := _attribute(model, "example_input_array")) is not None:
            return _given_inputs(example, f"the example_input_array of {type(model).__name__}")
        input_size = _configured_size(model) or otherwise
    if input_size is None:
        raise ValueError(
            f"{type(model).__name__} does not say how large its input is: give input_size=224, (height, width) or "
            "(channels, height, width), or example_inputs= if it takes more than one image batch"
        )
    form = "is no size: give a side, (height, width) or (channels, height, width) in whole numbers"
    sides = whole_numbers(input_size, "input_size", form, lengths=(2, 3), alone=2)
    shape = sides if len(sides) == 3 else (_image_channels(model), *sides)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the global one alone
    try:
        if math.prod(shape) > _MOST_NUMBERS:
            return BlankInputs((torch.empty(1, *shape, dtype=parameter.dtype, device=parameter.device),))
        image = torch.rand(1, *shape, generator=generator, device="cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"input_size={input_size!r} is too large: there is no memory for such an image") from error
    return Inputs((image.to(parameter.device, parameter.dtype),))


def _given_inputs(inputs: Any, name: str) -> Inputs:
    if isinstance(inputs, Inputs):
        return inputs
    if isinstance(inputs, Mapping):
        return Inputs(kwargs=mapping(inputs, name, "inputs by name"))
    if isinstance(inputs, torch.Tensor):
        return Inputs((inputs,))
    what = "a tensor, a tuple of arguments, a dict of them by name, or Inputs"
    return Inputs(tuple(instance(inputs, name, (tuple, list), what)))


def _attribute(model: nn.Module, name: str) -> Any:
    try:
        return getattr(model, name, None)
    except Exception:  # whatever a property of the network raises
        return None


def _configured_size(model: nn.Module) -> Pair | None:
    config = _attribute(model, "pretrained_cfg") or _attribute(model, "default_cfg")
    size = config.get("input_size") if isinstance(config, Mapping) else None
    return (size[-2], size[-1]) if size else None


def _image_channels(model: nn.Module, colours: int = 3) -> int:
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), colours)
    # Some stems move 2×2 pixels or more into channels before the first convolution.
    return first if first < 4 * colours else colours


def _recorded_inputs(model: fx.GraphModule) -> Inputs | None:
    values = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"]
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    # A size that the export left open has the one that it was exported with as a hint.
    shapes = [[size if isinstance(size, int) else size.node.hint for size in value.shape] for value in values]
    return Inputs(
        tuple(torch.zeros(shape, dtype=v.dtype, device=v.device) for shape, v in zip(shapes, values, strict=True))
    )
