"""Sites switched together, and what puts all of them back."""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch.fx as fx
import torch.nn as nn

from coconv_surgery.layers.levels import Levels
from coconv_surgery.layers.rollback import restorer
from coconv_surgery.tracing.sites import Site, graphs_of, is_changed


def switch_sites(sites: Iterable[Site], changes: Iterable[tuple[Site, Levels | None]], undo: ExitStack) -> None:
    """Give some sites of a network levels, or make them plain.

    Args:
        sites: All sites of the network; if one is switched, those that are contextual already are marked as such.
        changes: Those to be switched, and their levels, None for plain.
        undo: Takes what puts everything back.
    """
    changes = list(changes)
    if not changes:
        return
    contextual = [site for site in sites if site.levels is not None and not site.is_marked]
    touched = [*contextual, *(site for site, _ in changes)]
    _remember(touched, undo)
    for site in touched:
        site.mark()
    for site, levels in changes:
        site.switch(levels)
    _recompile(site for site, _ in changes)


def revert_sites(sites: Iterable[Site], undo: ExitStack) -> None:
    """Make sites what they were before the first switch.

    Args:
        sites: The sites.
        undo: Takes what puts everything back.
    """
    sites = list(sites)
    _remember(sites, undo)
    for site in sites:
        site.revert()
    _recompile(sites)


def mark_calibrated(sites: Iterable[Site], images: int, undo: ExitStack) -> None:
    """Let the sites that a conversion changed keep in mind on how many images they were calibrated.

    Args:
        sites: The sites of a network.
        images: How many; 0 for kernels that were not.
        undo: Takes what puts everything back.
    """
    for site in filter(is_changed, sites):
        undo.callback(site.mark_calibrated, site.calibrated)
        site.mark_calibrated(images)


def _remember(sites: Iterable[Site], undo: ExitStack) -> None:
    for holder in _holders(sites):
        undo.callback(_graph_restorer(holder) if isinstance(holder, fx.GraphModule) else restorer(holder))


def _recompile(sites: Iterable[Site]) -> None:
    for holder in _holders(sites):
        if isinstance(holder, fx.GraphModule):
            holder.recompile()


def _holders(sites: Iterable[Site]) -> Iterable[nn.Module]:
    """What holds some sites, each once."""
    return dict.fromkeys(site.holder() for site in sites)


def _graph_restorer(owner: fx.GraphModule) -> Callable[[], None]:
    """Remember the graphs of a module, to be put back into the same objects; their nodes are new ones then."""
    graphs = {id(graph): graph for graph in graphs_of(owner).values()}.values()
    kept = [(graph, copy.deepcopy(graph)) for graph in graphs]

    def restore_graphs() -> None:
        for graph, content in kept:
            vars(graph).update(vars(content))
            for node in (graph._root, *graph.nodes):
                node.graph = graph
            graph.owning_module = owner
        owner.recompile()

    return restore_graphs
