"""Which convolutions a network has."""

from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import torch
import torch.fx as fx
import torch.nn as nn

from coconv_surgery.tracing.graphs import function_convs, node_conv


def find_convs(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Conv2d]]:
    """All convolutions of a network: modules by their first name, then function calls of a graph.

    Yields:
        Name, other names of the same module, and the module (a description on the meta device for a function call).
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if is_conv(module):
            names[module].append(name)
    for conv, (name, *aliases) in names.items():
        yield name, tuple(aliases), cast(nn.Conv2d, conv)
    if isinstance(model, fx.GraphModule):
        for name, node in function_convs(model):
            yield name, (), node_conv(node, _weight(model, node))


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a 2D convolution: torch's, or another kind that describes itself in the same words."""
    if isinstance(module, nn.Conv2d):
        return True
    kernel = getattr(module, "kernel_size", None)
    named = all(hasattr(module, name) for name in ("in_channels", "out_channels", "weight"))
    return named and isinstance(kernel, tuple | list) and len(kernel) == 2


def weight_id(conv: nn.Conv2d) -> int:
    """The same for convolutions that hold the same weight, and for no others."""
    weight = conv._parameters.get("weight")
    return id(conv if weight is None else weight)


def _weight(model: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    assert isinstance(weight, fx.Node)
    if weight.op == "get_attr":
        owner, _, attribute = str(weight.target).rpartition(".")
        value: torch.Tensor = getattr(model.get_submodule(owner), attribute)
        return value
    described: torch.Tensor = weight.meta["val"]
    return described
