"""Where a network convolves: sites, of which a module is one kind and a node of a torch.fx graph the other.

Whoever plans, applies, reverts or reads back works on sites, and never asks which kind one is.
"""

import abc
import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import coconv2d
from coconv_surgery.layers.levels import Levels, check_levels, scale_dilations
from coconv_surgery.layers.metadata import calibrated_on, is_stale, mark_calibrated
from coconv_surgery.layers.switch import is_switchable, set_levels_, to_conv_
from coconv_surgery.tracing.graph_convs import GraphConv
from coconv_surgery.tracing.graph_weights import Weight, WeightSource
from coconv_surgery.tracing.rewriting import is_marked, levels_before, mark, restore, set_levels
from coconv_surgery.tracing.signature import Signature

_BEFORE = "_coconv_before"
_CALIBRATED = "coconv_surgery.calibrated"
_STALE = "coconv_surgery.stale"


class Site(abc.ABC):
    """A place where a network convolves.

    Attributes:
        name: Its qualified name.
        aliases: Other names of the same.
        conv: A description: the module itself, or one on the meta device that has the arguments of a graph's node. It
            may be another kind of convolution, such as a deformable or transposed one, which has some of the
            attributes of an ``nn.Conv2d``.
        weight_source: Where its weight comes from.
        weight_key: The same for sites of one weight, and for no others.
        weight_read: Whether its weight is known to take part in something else as well.
        adapted: Whether it is a part of an adapter, see :mod:`coconv_surgery.layers.adapters`.
        outdated: Why the levels that it has are not those of what it is now, if so.
        fixed: Why it cannot take other levels, if so.
        no_plain_form: Why it cannot become a plain convolution, if so.
    """

    name: str
    aliases: tuple[str, ...]
    conv: nn.Conv2d
    weight_source: WeightSource = WeightSource.PARAMETER
    weight_key: Any
    weight_read: bool = False
    adapted: bool = False
    outdated: str | None = None
    fixed: str | None = None
    no_plain_form: str | None = None

    @property
    @abc.abstractmethod
    def levels(self) -> Levels | None:
        """Its levels, or None if it is not contextual."""

    @property
    def state(self) -> Levels:
        """Its levels; of a plain convolution, the one that it is."""
        return self.levels or self.plain

    @property
    def plain(self) -> Levels:
        """The one level that its plain form is."""
        return Levels(scale_dilations(self.signature.dilation, [1]), (self.signature.out_channels,))

    @functools.cached_property
    def signature(self) -> Signature:
        """What makes it the convolution that a plan means."""
        return Signature.of(self.conv)

    @abc.abstractmethod
    def mark(self) -> None:
        """Keep in mind what it is now, unless that was done before: :meth:`revert` goes back to it."""

    @abc.abstractmethod
    def switch(self, levels: Levels | None) -> None:
        """Give it levels that are known to suit it, or make it plain."""

    @property
    @abc.abstractmethod
    def is_marked(self) -> bool:
        """Whether it keeps in mind what it was."""

    @property
    @abc.abstractmethod
    def before(self) -> Levels:
        """What :meth:`revert` makes it."""

    @abc.abstractmethod
    def revert(self) -> None:
        """Make it what it was when it was marked, or plain if it never was, and forget the mark."""

    @property
    @abc.abstractmethod
    def calibrated(self) -> int:
        """On how many images its kernels were calibrated; 0 if they were not."""

    @property
    @abc.abstractmethod
    def stale(self) -> bool:
        """Whether levels of the network have changed since."""

    @abc.abstractmethod
    def mark_calibrated(self, images: int, *, stale: bool = False) -> None:
        """Keep in mind on how many images its kernels were calibrated, and whether levels have changed since."""

    @abc.abstractmethod
    def watched_in(self, twin: nn.Module) -> list[nn.Module]:
        """The modules that are called where it convolves, in a copy of the network; nodes are replaced by some."""

    @abc.abstractmethod
    def holder(self) -> nn.Module:
        """The module that a switch changes."""


class ModuleSite(Site):
    """A module that convolves.

    Args:
        name: Its name.
        aliases: Other names.
        conv: The module.
        adapted: Whether it is a part of an adapter.
    """

    def __init__(self, name: str, aliases: tuple[str, ...], conv: nn.Conv2d, *, adapted: bool = False) -> None:
        self.name, self.aliases, self.conv, self.adapted = name, aliases, conv, adapted
        weight = conv._parameters.get("weight")
        self.weight_key = id(conv if weight is None else weight)

    @property
    def levels(self) -> Levels | None:
        """Its levels, or None if it is not contextual."""
        return Levels(self.conv.dilations, self.conv.splits) if isinstance(self.conv, CoConv2d) else None

    @property
    def outdated(self) -> str | None:  # type: ignore[override]
        """Why the levels that it has are not those of what it is now, if so."""
        if (levels := self.levels) is None:
            return None
        try:
            check_levels(self.conv, levels.dilations, cast(tuple[int, ...], levels.splits))
        except ValueError as error:
            return str(error)
        return None

    def mark(self) -> None:
        """Keep in mind what it is now."""
        vars(self.conv).setdefault(_BEFORE, self.levels)

    def switch(self, levels: Levels | None) -> None:
        """Give it levels, or make it the plain convolution."""
        if levels is not None:
            set_levels_(self.conv, levels)
        elif isinstance(self.conv, CoConv2d) and is_switchable(self.conv):
            to_conv_(self.conv)
        if levels is None and vars(self.conv).get(_BEFORE, levels) is None:
            vars(self.conv).pop(_BEFORE, None)

    @property
    def is_marked(self) -> bool:
        """Whether it keeps in mind what it was."""
        return _BEFORE in vars(self.conv)

    @property
    def before(self) -> Levels:
        """What it was when it was marked, or plain."""
        return vars(self.conv).get(_BEFORE) or self.plain

    def revert(self) -> None:
        """Make it what it was when it was marked, or plain."""
        self.switch(vars(self.conv).pop(_BEFORE, None))

    @property
    def calibrated(self) -> int:
        """On how many images its kernels were calibrated."""
        return calibrated_on(self.conv)

    @property
    def stale(self) -> bool:
        """Whether levels of the network have changed since."""
        return is_stale(self.conv)

    def mark_calibrated(self, images: int, *, stale: bool = False) -> None:
        """Keep in mind on how many images its kernels were calibrated, and whether levels have changed since."""
        mark_calibrated(self.conv, images, stale=stale)

    def watched_in(self, twin: nn.Module) -> list[nn.Module]:
        """The module of the same name."""
        return [twin.get_submodule(self.name)]

    def holder(self) -> nn.Module:
        """The convolution."""
        return self.conv


class NodeSite(Site):
    """Nodes of a graph that convolve with one weight in one way.

    Args:
        name: Its name.
        aliases: Other names.
        owner: The module of the graph, and its own name.
        convs: The nodes, described.
        weight: Their weight.
    """

    def __init__(
        self, name: str, aliases: tuple[str, ...], owner: tuple[str, nn.Module], convs: list[GraphConv], weight: Weight
    ) -> None:
        self.name, self.aliases, self._convs = name, aliases, convs
        self._owner_name, self._owner = owner
        self.weight_source, self.weight_key, self.weight_read = weight.source, weight.key, weight.read_elsewhere
        first = convs[0]
        self.fixed, self.no_plain_form = first.fixed, first.no_plain_form
        self.conv = _describe(first, weight.shape)

    @property
    def levels(self) -> Levels | None:
        """Its levels, or None if it is not contextual."""
        return self._convs[0].levels

    def mark(self) -> None:
        """Keep in mind what its nodes are now."""
        for conv in self._convs:
            mark(conv)

    def switch(self, levels: Levels | None) -> None:
        """Give its nodes levels, or make them plain convolutions."""
        self._convs = [set_levels(conv, levels) for conv in self._convs]

    @property
    def is_marked(self) -> bool:
        """Whether its nodes keep in mind what they were."""
        return any(is_marked(conv) for conv in self._convs)

    @property
    def before(self) -> Levels:
        """What its nodes were when they were marked, or plain."""
        return levels_before(self._convs[0]) or self.plain

    def revert(self) -> None:
        """Make its nodes what they were when they were marked, or plain."""
        self._convs = [restore(conv) for conv in self._convs]

    @property
    def calibrated(self) -> int:
        """On how many images its kernels were calibrated, as far as its nodes know; loading does not tell them."""
        return max(int(conv.node.meta.get(_CALIBRATED, 0)) for conv in self._convs)

    @property
    def stale(self) -> bool:
        """Whether levels of the network have changed since."""
        return any(_STALE in conv.node.meta for conv in self._convs)

    def mark_calibrated(self, images: int, *, stale: bool = False) -> None:
        """Keep in mind on how many images its kernels were calibrated, and whether levels have changed since."""
        for conv in self._convs:
            for name, value in ((_CALIBRATED, images), (_STALE, stale)):
                conv.node.meta.pop(name, None)
                if value:
                    conv.node.meta[name] = value

    def watched_in(self, twin: nn.Module) -> list[nn.Module]:
        """Replaces its nodes in a copy of the network, of which the graph is one that is called, by one module."""
        owner = twin.get_submodule(self._owner_name)
        watched = WatchedConv(self._convs[0])
        name = f"coconv_site_{len(owner._modules)}"
        owner._modules[name] = watched  # add_module() would call the hooks on all modules
        for graph in graphs_of(owner).values():
            nodes = {node.name: node for node in graph.nodes}
            for conv in self._convs:
                if (node := nodes.get(conv.node.name)) is not None:
                    arguments = (conv.input, conv.weight, conv.bias)
                    node.op, node.target = "call_module", name
                    node.args = tuple(None if source is None else nodes[source.name] for source in arguments)
                    node.kwargs = {}
        return [watched]

    def holder(self) -> nn.Module:
        """The module of the graph."""
        return self._owner


class WatchedConv(nn.Module):
    """Stands for a graph's convolution in a copy of the network, where it is called and watched as a module is."""

    def __init__(self, conv: GraphConv) -> None:
        super().__init__()
        self.kind = replace(conv, node=None, input=None, weight=None, bias=None, parts=())  # type: ignore[arg-type]

    def forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve as the node does."""
        return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kind = self.kind
        if kind.output_padding is not None:
            numbers = (kind.stride, kind.padding, kind.output_padding, kind.groups, kind.dilation)
            return F.conv_transpose2d(input, weight, bias, *numbers)  # type: ignore[arg-type]
        levels = kind.levels or Levels((kind.dilation,), (weight.shape[0],))
        return coconv2d(
            input,
            weight,
            bias,
            kind.stride,
            kind.padding,
            kind.dilation,
            kind.groups,
            dilations=levels.dilations,
            splits=cast(tuple[int, ...], levels.splits),
            padding_mode=kind.padding_mode,
        )


def is_changed(site: Site) -> bool:
    """Whether a site is contextual where it was something else before its conversion."""
    return site.levels is not None and site.state != site.before


def calibrated_images(sites: Iterable[Site]) -> int:
    """On how many images the kernels of some sites were calibrated; 0 if none were."""
    return max((site.calibrated for site in sites), default=0)


def pass_mark_on(source: nn.Module, conv: nn.Module) -> None:
    """Let a convolution that was made of another one keep in mind what that was."""
    if _BEFORE in vars(source):
        vars(conv)[_BEFORE] = vars(source)[_BEFORE]


def graphs_of(module: nn.Module) -> dict[str, fx.Graph]:
    """The graphs that a module runs, by attribute: none, one, or one each for training and evaluation."""
    if not isinstance(module, fx.GraphModule):
        return {}
    return {name: value for name, value in vars(module).items() if isinstance(value, fx.Graph)}


def _describe(conv: GraphConv, shape: tuple[int, ...] | None) -> nn.Conv2d:
    transposed = conv.output_padding is not None
    first, second, *kernel = shape or (conv.groups, 1, 1, 1)
    inputs, outputs = (first, second * conv.groups) if transposed else (second * conv.groups, first)
    kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    described = kind(
        inputs,
        outputs,
        tuple(kernel),
        conv.stride,
        conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    if shape is None:
        described.in_channels, described.out_channels, described.kernel_size = 0, 0, (0, 0)
    return cast(nn.Conv2d, described)
