"""Sites switched together, and what puts all of them back."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch.fx as fx
import torch.nn as nn

from coconv_surgery.layers.levels import Levels
from coconv_surgery.layers.rollback import restorer
from coconv_surgery.tracing.sites import Site, graphs_of


def switch_sites(changes: Iterable[tuple[Site, Levels | None]], undo: ExitStack) -> None:
    """Give sites levels, or make them plain.

    Args:
        changes: Sites and their levels, None for plain.
        undo: Takes what puts everything back.
    """
    changes = list(changes)
    _remember([site for site, _ in changes], undo)
    for site, levels in changes:
        site.switch(levels)
    _recompile(site for site, _ in changes)


def revert_sites(sites: Iterable[Site], undo: ExitStack) -> None:
    """Make sites what they were before their first switch.

    Args:
        sites: The sites.
        undo: Takes what puts everything back.
    """
    sites = list(sites)
    _remember(sites, undo)
    for site in sites:
        site.revert()
    _recompile(sites)


def _remember(sites: Iterable[Site], undo: ExitStack) -> None:
    for holder in {id(holder): holder for holder in (site.holder() for site in sites)}.values():
        undo.callback(_graph_restorer(holder) if graphs_of(holder) else restorer(holder))


def _recompile(sites: Iterable[Site]) -> None:
    for holder in {id(holder): holder for holder in (site.holder() for site in sites)}.values():
        if isinstance(holder, fx.GraphModule):
            holder.recompile()


def _graph_restorer(owner: nn.Module) -> Callable[[], None]:
    copies = {id(graph): copy.deepcopy(graph) for graph in graphs_of(owner).values()}
    by_name: Mapping[str, fx.Graph] = {name: copies[id(graph)] for name, graph in graphs_of(owner).items()}

    def restore_graphs() -> None:
        vars(owner).update(by_name)
        for graph in copies.values():
            graph.owning_module = cast(Any, owner)
        if isinstance(owner, fx.GraphModule):
            owner.recompile()

    return restore_graphs
