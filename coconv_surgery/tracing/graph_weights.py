"""The weights of a graph's convolutions: where they come from, their shapes, and whether anything else reads them."""

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from coconv_surgery.tracing.graph_convs import GraphConv, upstream


class WeightSource(enum.Enum):
    """Where a convolution's weight comes from."""

    PARAMETER = "a parameter, or computed from parameters alone"
    PART = "a part of a parameter, or parts of several"
    FIXED = "a buffer or constant"
    INPUT = "an input of the graph, or computed from one"
    UNKNOWN = "a computation whose result has no known shape"


@dataclass(frozen=True)
class Weight:
    """A convolution's weight, as far as a graph tells.

    Attributes:
        source: Where it comes from.
        shape: Its shape, if known.
        name: Name of the parameter that it is or is computed from, if there is one.
        key: The same for convolutions of one weight.
        read_elsewhere: Whether the parameter takes part in other things than this weight.
    """

    source: WeightSource
    shape: tuple[int, ...] | None
    name: str | None
    key: Any
    read_elsewhere: bool = False


def find_weights(owner: nn.Module, convs: Sequence[GraphConv]) -> list[Weight]:
    """Find out what the weight of each convolution of a graph is.

    Args:
        owner: The module of the graph.
        convs: All convolutions of the graph.
    """
    steps = [upstream(conv.weight) for conv in convs]
    # Levels of a tied transposed convolution would be another matter: its channels lie the other way.
    own = {node for conv in convs if conv.output_padding is None for node in (conv.node, *conv.parts)}
    on_the_way = {step for path in steps for step in path}
    return [_weight(owner, conv.weight, path, own, on_the_way) for conv, path in zip(convs, steps, strict=True)]


def _weight(
    owner: nn.Module, node: fx.Node, steps: Sequence[fx.Node], own: set[fx.Node], on_the_way: set[fx.Node]
) -> Weight:
    leaves = [step for step in steps if step.op in ("get_attr", "placeholder")]
    tensors = {leaf: attribute(owner, str(leaf.target)) for leaf in leaves if leaf.op == "get_attr"}
    parameters = {leaf: value for leaf, value in tensors.items() if isinstance(value, nn.Parameter)}
    shape = _shape(node, steps, tensors)
    if len(tensors) < len(leaves):
        return Weight(WeightSource.INPUT, shape, None, node)
    if not parameters:
        return Weight(WeightSource.FIXED, shape, None, node)
    main = max(parameters, key=lambda leaf: parameters[leaf].numel())
    name = str(main.target)
    if shape is None:
        return Weight(WeightSource.UNKNOWN, None, name, node)
    if shape != tuple(parameters[main].shape):
        return Weight(WeightSource.PART, shape, name, node)
    read = _is_read_elsewhere(main, own, on_the_way)
    return Weight(WeightSource.PARAMETER, shape, name, id(parameters[main]), read)


def attribute(owner: nn.Module, path: str) -> Any:
    """What a module holds under a path, without calling a property; None if it holds nothing there."""
    value: Any = owner
    for name in path.split("."):
        tables = [vars(value).get(table, {}) for table in ("_parameters", "_buffers", "_modules")]
        value = next((table[name] for table in (*tables, vars(value)) if name in table), None)
        if value is None:
            return None
    return value


def _recorded_shape(node: fx.Node) -> tuple[int, ...] | None:
    for key in ("val", "example_value", "tensor_meta"):
        shape = getattr(node.meta.get(key), "shape", None)
        if shape is not None and all(isinstance(side, int) for side in shape):
            return tuple(shape)
    return None


def _shape(node: fx.Node, steps: Sequence[fx.Node], tensors: Mapping[fx.Node, Any]) -> tuple[int, ...] | None:
    """The shape of what is computed from tensors: as recorded, or by computing without numbers."""
    if node in tensors:
        return tuple(tensors[node].shape)
    if (recorded := _recorded_shape(node)) is not None:
        return recorded
    if any(step.op not in ("get_attr", "call_function", "call_method") for step in steps):
        return None
    values: dict[fx.Node, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for step in steps:
            if step in tensors:
                tensor = tensors[step]
                values[step] = mode.from_tensor(tensor) if isinstance(tensor, torch.Tensor) else tensor
                continue
            try:
                values[step] = compute(step, values)
            except Exception:  # the graph's own code, which may not compute without numbers
                return None
    return tuple(values[node].shape) if isinstance(values[node], torch.Tensor) else None


def compute(step: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Compute a node that calls a function or a method, from the values of those before it."""
    arguments: Any = (step.args, dict(step.kwargs))
    args, kwargs = map_aggregate(arguments, lambda value: values[value] if isinstance(value, fx.Node) else value)
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    return cast(Callable[..., Any], step.target)(*args, **kwargs)


def _is_read_elsewhere(parameter: fx.Node, own: set[fx.Node], on_the_way: set[fx.Node]) -> bool:
    stack = [node for node in parameter.graph.nodes if node.op == "get_attr" and node.target == parameter.target]
    while stack:
        for user in stack.pop().users:
            if user in on_the_way:
                stack.append(user)
            elif user not in own and not _asks_for_a_property(user) and (user.users or user.op == "output"):
                return True
    return False


def _asks_for_a_property(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "type")
    return node.target in (getattr, torch.ops.aten.sym_size.int)
