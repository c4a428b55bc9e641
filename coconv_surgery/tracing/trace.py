"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.functional import Pair
from coconv_surgery.tracing.graphs import GraphMap, map_graphs
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.observer import Call, Observation, observe
from coconv_surgery.tracing.sites import find_convs, weight_id
from coconv_surgery.tracing.twin import FORWARD_ERRORS, Twin


@dataclass(frozen=True)
class TracedConv:
    """One convolution of a network, as seen by the trace.

    Attributes:
        name: Its qualified name.
        aliases: Other names of the same module.
        conv: The module; for a convolution that is a function call in a graph, a description of it on the meta device.
            It may be another kind of convolution, such as a deformable or transposed one, which has some of the
            attributes of an ``nn.Conv2d``.
        calls: Its calls in one forward pass, in order, and those of other modules that hold the same weight.
        network_size: Height and width of the network's input, if it has an image for one.
        nodes: Names of the graph nodes that call it, as far as torch.fx can trace.
        untraced: Why torch.fx could not trace to it, if so: the module, and the reason.
        weight_read: Whether its weight takes part in the forward pass outside its own forward.
    """

    name: str
    conv: nn.Conv2d
    aliases: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    network_size: Pair | None = None
    nodes: tuple[str, ...] = ()
    untraced: str | None = None
    weight_read: bool = False


@dataclass(frozen=True)
class Trace:
    """What a trace found.

    Attributes:
        convs: One entry for each module that is a 2D convolution of some kind, and for each convolution called as a
            function in a graph module, in the order of ``model.named_modules()``.
        how: How torch.fx went through the network, and where map sizes come from, for a reader.
    """

    convs: tuple[TracedConv, ...]
    how: str


def trace_network(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace every convolution of a network; the network is neither run nor changed.

    torch.fx says which graph nodes call a convolution. Map sizes and dataflow come from one forward pass in evaluation
    mode of a twin without data, or, for a network whose control flow needs numbers, of a real copy.

    Args:
        model: The network.
        inputs: What to call it with.

    Raises:
        ValueError: If the network does not run on these inputs.
    """
    cuda = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(cuda):
        graphs, observed = _trace(model, inputs)
    convs = list(find_convs(model))
    tied: dict[int, list[str]] = defaultdict(list)
    for name, _, conv in convs:
        tied[weight_id(conv)].append(name)
    traced = tuple(
        TracedConv(
            name=name,
            conv=conv,
            aliases=aliases,
            calls=tuple(call for other in tied[weight_id(conv)] for call in observed.calls.get(other, ())),
            network_size=inputs.image_size,
            nodes=tuple(node for alias in (name, *aliases) for node in _nodes(graphs, alias)),
            untraced=None if _nodes(graphs, name) else graphs.why_unseen(name),
            weight_read=name in observed.weight_reads,
        )
        for name, aliases, conv in convs
    )
    apart = len(graphs.failures)
    whole = "torch.fx, whole" if not apart else f"torch.fx, around {apart} module{'s' if apart > 1 else ''}"
    return Trace(traced, f"{whole}; sizes from {'shapes alone' if observed.fake else 'a real forward pass'}")


def _trace(model: nn.Module, inputs: Inputs) -> tuple[GraphMap, Observation]:
    twin = Twin(model)
    graphs = map_graphs(twin.model, _constants(twin.model, inputs))
    if not inputs.needs_numbers:
        try:
            return graphs, observe(twin, inputs)
        except FORWARD_ERRORS:
            pass
    try:
        return graphs, observe(Twin(model, fake=False), inputs)
    except FORWARD_ERRORS as error:
        size = " × ".join(map(str, inputs.image_size or ()))
        raise ValueError(
            f"{type(model).__name__} does not run on {f'a {size} input' if size else 'these inputs'} "
            f"({type(error).__name__}: {error}): give input_size= or example_inputs= that suit it"
        ) from error


def _nodes(graphs: GraphMap, name: str) -> list[str]:
    return graphs.calls.get(name, [])


def _constants(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of ``forward`` that are no tensors, and its defaults: tracing takes them as they are."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = dict(zip((p.name for p in named), inputs.args, strict=False)) | dict(inputs.kwargs)
    values = {p.name: given.get(p.name, p.default) for p in named if p.name in given or p.default is not p.empty}
    return {
        name: value
        for name, value in values.items()
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    }
