"""Copies of a network whose contextual convolutions are watched: as it is, and as it was before its conversion."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import _disable_current_modes

from coconv_surgery.calibration.batches import Batch, Stop
from coconv_surgery.calibration.patches import Level, each_level
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.levels import Levels
from coconv_surgery.layers.rollback import refill, restorer
from coconv_surgery.planning.patterns import Patterns, as_list, check_patterns, first_match
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.signature import Signature
from coconv_surgery.tracing.sites import Site, is_changed
from coconv_surgery.tracing.visit import Visit


@dataclass(frozen=True, eq=False)
class Layer:
    """Sites that convolve with one weight: mostly one. What it says of levels is of the first.

    Attributes:
        sites: The sites, of the network itself.
    """

    sites: tuple[Site, ...]

    @property
    def differs(self) -> str | None:
        """Why its sites cannot be solved together, if so."""
        first = self.sites[0]
        kinds = {(site.state, site.before, site.signature.groups) for site in self.sites}
        if len(kinds) == 1:
            return None
        others = ", ".join(site.name for site in self.sites if site is not first)
        return f"its kernels are also those of {others}, which convolves otherwise"

    @property
    def name(self) -> str:
        """The name of the first."""
        return self.sites[0].name

    @property
    def signature(self) -> Signature:
        """The plain convolution."""
        return self.sites[0].signature

    @property
    def levels(self) -> Levels:
        """Their levels."""
        return self.sites[0].state

    @property
    def splits(self) -> tuple[int, ...]:
        """Output channels of each level."""
        return cast(tuple[int, ...], self.levels.splits)  # numbers: the conversion saw to it

    def each_level(self) -> list[Level]:
        """Its levels, one by one."""
        return each_level(self.signature, self.levels.dilations, self.splits)

    @property
    def is_contextual(self) -> bool:
        """Whether they compute something else than before the conversion."""
        return any(map(is_changed, self.sites))

    @property
    def before(self) -> Levels:
        """What they were before the conversion."""
        return self.sites[0].before


@dataclass(frozen=True)
class Call:
    """One call of a convolution.

    Attributes:
        layer: Its layer.
        site: Its site.
        module: What convolves, in the copy.
        index: Which call of the layer in this run it is.
        input: ``(N, C, H, W)``, padded if the convolution pads by itself.
        weight: The kernels that it convolves with.
        bias: Its bias.
        output: ``(N, C, H, W)``.
    """

    layer: Layer
    site: Site
    module: nn.Module
    index: int
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    output: torch.Tensor


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def find_layers(sites: Sequence[Site], also: Patterns | None = None) -> list[Layer]:
    """The layers that a conversion changed, and plain ones by name.

    Args:
        sites: Where a network convolves.
        also: Patterns of plain convolutions.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    patterns = None if also is None else as_list(also, "also")
    if patterns is not None:
        check_patterns({"also": patterns}, [name for site in sites for name in (site.name, *site.aliases)])
    groups: dict[Any, list[Site]] = defaultdict(list)
    wanted = set()
    for site in sites:
        groups[site.weight_key].append(site)
        if is_changed(site) or (patterns and first_match((site.name, *site.aliases), patterns) and _is_plain(site)):
            wanted.add(site.weight_key)
    return [Layer(tuple(group)) for key, group in groups.items() if key in wanted]


def _is_plain(site: Site) -> bool:
    """Whether a site is a plain convolution, which is watched where a contextual one is."""
    conv = site.signature
    even_same = conv.padding == "same" and any(side % 2 == 0 for side in conv.kernel_size)
    known = isinstance(site.conv, nn.Conv2d) and type(site.conv).forward in (nn.Conv2d.forward, CoConv2d.forward)
    return known and site.state == site.plain and not even_same and not site.no_plain_form


def in_parts(layers: Iterable[Layer], size: Callable[[Layer], int], limit: int) -> Iterator[list[Layer]]:
    """Layers in their order, as many at a time as a limit allows for what is kept of them, and at least one."""
    part: list[Layer] = []
    for layer in layers:
        if part and sum(map(size, part)) + size(layer) > limit:
            yield part
            part = []
        part.append(layer)
    if part:
        yield part


class WatchedNetwork:
    """A copy of a network, of which certain layers are watched.

    Args:
        visit: Makes the copy.
        layers: The layers.
        original: Whether the copy is what the network was before its conversion.

    Attributes:
        model (nn.Module): The copy.
        convolves (bool): Whether one of the layers is convolving right now.
    """

    def __init__(self, visit: Visit, layers: Sequence[Layer], *, original: bool) -> None:
        self.model = visit.twin(fake=False).model
        found = {site.name: site for site in find_sites(self.model)}
        self._see: Callable[[Call], None] | None = None
        self.convolves = False
        self._calls: Counter[Layer] = Counter()
        for layer in layers:
            for site in layer.sites:
                if original and is_changed(site):
                    # One level, rather than a plain convolution, so that it is watched in the same way.
                    found[site.name].switch(site.before)
                for module in found[site.name].watched_in(self.model):
                    self._watch(module, layer, site)
        for module in self.model.modules():
            if isinstance(module, fx.GraphModule):
                module.recompile()
        self.parameters = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.remember()

    def remember(self) -> None:
        """Keep in mind what it is now: each run starts there, whatever a network keeps from one call to the next."""
        self._restore = [restorer(module) for module in self.model.modules()]
        tables = [
            table for module in self.model.modules() for table in (module._parameters, module._buffers, module._modules)
        ]
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = [(table, table.copy()) for table in tables]
        self._numbers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    def put_back(self) -> None:
        """Make it what was kept in mind."""
        for put_back in self._restore:
            put_back()
        for table, content in self._tables:
            refill(table, content)  # without what a first run makes
        for buffer, numbers in self._numbers:
            buffer.copy_(numbers)

    def run(self, batch: Batch, see: Callable[[Call], None] | None = None, *, training: bool = False) -> Any:
        """Run it without gradients.

        Args:
            batch: What on.
            see: Called with every call of a watched layer; it may raise :class:`Stop`.
            training: Whether modules that hold others are in training mode: what they run then, they run, and norms and
                dropout compute as in evaluation.

        Returns:
            The outputs; None if it was stopped.
        """
        self._see, self._calls = see, Counter()
        with _disable_current_modes():  # whoever watches the run sees the run alone
            self.put_back()
            before = [(parameter, parameter.detach().clone()) for parameter in self.model.parameters() if training]
            for module in self.model.modules():
                holds = any(True for _ in module.children()) and not isinstance(module, _NormBase)
                module.training |= training and holds
        torch.manual_seed(0)
        torch.clear_autocast_cache()  # which may hold weights as they were before
        try:
            with torch.no_grad():
                return batch.run(self.model)
        except Stop:
            return None
        finally:
            self._see = None
            with _disable_current_modes(), torch.no_grad():
                for parameter, numbers in before:  # which a training may write
                    parameter.copy_(numbers)
                if training:
                    self.put_back()

    def kernels_of(self, call: Call) -> torch.Tensor:
        """The kernels that a convolution has now, where they are computed from its parameters."""
        found: list[torch.Tensor] = []

        def see(again: Call) -> None:
            found.append(again.weight)
            raise Stop

        self._see = see
        try:
            with torch.no_grad():
                call.module(call.input[:1])
        except Stop:
            pass
        finally:
            self._see = None
        return found[0]

    def _watch(self, module: nn.Module, layer: Layer, site: Site) -> None:
        cls: Any = type(module)
        here, of_module, network = cls._conv_forward, weakref.ref(module), weakref.ref(self)

        def convolve(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            watched, within = of_module(), network()
            assert watched is not None
            if within is None:
                alone: torch.Tensor = here(watched, input, weight, bias)
                return alone
            within.convolves = True
            try:
                output: torch.Tensor = here(watched, input, weight, bias)
            finally:
                within.convolves = False
            if within._see is not None:
                index = within._calls[layer]
                within._calls[layer] += 1
                batched = (input, output) if input.dim() == 4 else (input[None], output[None])
                within._see(Call(layer, site, watched, index, batched[0], weight, bias, batched[1]))
            return output

        vars(module)["_conv_forward"] = convolve
