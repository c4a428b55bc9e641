"""Sites switched together, and what puts all of them back."""

import copy
from collections.abc import Callable, Iterable, Mapping
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
    changes, sites = list(changes), list(sites)
    if not changes:
        return
    calibrated = _calibrated(sites)
    contextual = [site for site in sites if site.levels is not None and not site.is_marked]
    touched = [*contextual, *(site for site, _ in changes)]
    _remember(touched, undo)
    for site in touched:
        site.mark()
    for site, levels in changes:
        site.switch(levels)
    _mark_stale(calibrated, undo)
    _recompile(site for site, _ in changes)


def revert_sites(sites: Iterable[Site], undo: ExitStack) -> None:
    """Make sites what they were before the first switch.

    Args:
        sites: The sites.
        undo: Takes what puts everything back.
    """
    sites = list(sites)
    calibrated = _calibrated(sites)
    _remember(sites, undo)
    for site in sites:
        site.revert()
    _mark_stale(calibrated, undo)
    _recompile(sites)


def mark_calibrated(sites: Iterable[Site], images: int, undo: ExitStack, *, stale: bool = False) -> None:
    """Let the sites that a conversion changed keep in mind on how many images they were calibrated.

    Args:
        sites: The sites of a network.
        images: How many; 0 for kernels that were not.
        undo: Takes what puts everything back.
        stale: Whether levels of the network have changed since.
    """
    for site in filter(is_changed, sites):
        _mark(site, images, stale, undo)


def _mark_stale(calibrated: Mapping[Site, int], undo: ExitStack) -> None:
    """Let sites that were calibrated keep in mind that levels have changed since."""
    for site, images in calibrated.items():
        _mark(site, images, True, undo)


def _mark(site: Site, images: int, stale: bool, undo: ExitStack) -> None:
    undo.callback(site.mark_calibrated, site.calibrated, stale=site.stale)
    site.mark_calibrated(images, stale=stale)


def _calibrated(sites: Iterable[Site]) -> dict[Site, int]:
    return {site: site.calibrated for site in sites if site.calibrated}


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
