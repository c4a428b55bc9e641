"""Which sites a network has."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch.nn as nn

from coconv_surgery.layers.adapters import is_adapter
from coconv_surgery.layers.functional import level_padding, pair
from coconv_surgery.layers.switch import has_attribute
from coconv_surgery.tracing.graph_convs import GraphConv, find_graph_convs
from coconv_surgery.tracing.graph_weights import Weight, find_weights
from coconv_surgery.tracing.sites import ModuleSite, NodeSite, Site, graphs_of


def find_sites(model: nn.Module) -> list[Site]:
    """All places where a network convolves: modules in the order of ``named_modules()``, then the nodes of graphs.

    A module or a graph that has several names is found once, under the first. The nodes of one graph that convolve
    with one weight in one way are one site, named by the module that holds the weight where that tells; a name that is
    taken gets a counter.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    adapted = {part for module in names if is_adapter(module) for part in module.modules()}
    sites: list[Site] = [
        ModuleSite(first, tuple(aliases), cast(nn.Conv2d, module), adapted=module in adapted)
        for module, (first, *aliases) in names.items()
        if is_conv(module)
    ]
    taken = {name for site in sites for name in (site.name, *site.aliases)}
    for module, owner_names in names.items():
        sites.extend(_node_sites(owner_names, module, taken))
    return sites


def find_intact_sites(model: nn.Module) -> list[Site]:
    """All places where a network convolves, as :func:`find_sites`, none of which has levels that do not suit it.

    Raises:
        ValueError: If one has, as after its channels were pruned; all are named.
    """
    sites = find_sites(model)
    if outdated := [f"{site.name} ({site.outdated})" for site in sites if site.outdated]:
        raise ValueError(
            f"{'; '.join(outdated)}: changed since its conversion, as by pruning. revert() makes plain convolutions "
            "of all, of the channels that they have now; change them, and convert() then"
        )
    return sites


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a 2D convolution: torch's, or another kind that describes itself in the same words.

    Nothing of the module is evaluated: reading a weight may compute it, and a property may do anything.
    """
    if isinstance(module, nn.Conv2d):
        return True
    kernel = vars(module).get("kernel_size", vars(type(module)).get("kernel_size"))
    named = all(has_attribute(module, name) for name in ("in_channels", "out_channels", "weight"))
    return named and isinstance(kernel, tuple | list) and len(kernel) == 2


def _node_sites(owner_names: list[str], owner: nn.Module, taken: set[str]) -> Iterator[Site]:
    alike: dict[Any, tuple[Weight, list[GraphConv]]] = {}
    for graph in {id(graph): graph for graph in graphs_of(owner).values()}.values():
        convs = find_graph_convs(graph)
        for conv, weight in zip(convs, find_weights(owner, convs), strict=True):
            if weight.shape is not None and len(weight.shape) != 4:
                continue
            conv = _with_kernel(conv, weight)
            _, nodes = alike.setdefault((weight.key, conv.arguments), (weight, []))
            nodes.append(conv)
    for weight, nodes in alike.values():
        local = weight.name.removesuffix(".weight") if weight.name is not None else nodes[0].node.name
        if local == "weight" and len(alike) == 1 and not owner._modules:
            local = ""  # the graph is nothing but the convolution
        name, *aliases = [".".join(filter(None, (prefix, local))) for prefix in owner_names]
        count = 1
        while name in taken:
            count += 1
            name = f"{name.partition('#')[0]}#{count}"
        taken.add(name)
        yield NodeSite(name, tuple(aliases), (owner_names[0], owner), nodes, weight)


def _with_kernel(conv: GraphConv, weight: Weight) -> GraphConv:
    """Add the kernel to a description, and whether levels read off an export are not what they look like."""
    if weight.shape is None:
        return replace(
            conv, no_plain_form="the shape of its weight is not known" if conv.levels else conv.no_plain_form
        )
    height, width = weight.shape[2:]
    kernel = (height, width)
    levels = conv.levels.dilations if conv.levels is not None else ()
    expected = tuple(level_padding(kernel, conv.padding, conv.dilation, pair(dilation)) for dilation in levels)
    other = "its levels are padded in a way of their own" if conv.paddings and conv.paddings != expected else None
    return replace(conv, kernel=kernel, fixed=conv.fixed or other, no_plain_form=conv.no_plain_form or other)
