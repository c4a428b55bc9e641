"""Copies of a network whose contextual convolutions are watched: as it is, and as it was before its conversion."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn

from coconv_surgery.calibration.batches import Batch, Stop
from coconv_surgery.calibration.patches import Level, each_level
from coconv_surgery.layers.levels import Levels
from coconv_surgery.planning.patterns import Patterns, as_list, check_patterns, first_match
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.sites import Site
from coconv_surgery.tracing.visit import Visit


@dataclass(frozen=True, eq=False)
class Layer:
    """Sites that convolve with one weight.

    Attributes:
        sites: The sites, of the network itself.
    """

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """The name of the first."""
        return self.sites[0].name

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
        return each_level(self.sites[0].signature, self.levels.dilations, self.splits)

    @property
    def is_contextual(self) -> bool:
        """Whether they compute something else than before the conversion."""
        return self.levels != self.before

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
    layers: dict[Any, list[Site]] = defaultdict(list)
    for site in sites:
        changed = site.levels is not None and site.state != site.before
        if changed or (patterns and first_match((site.name, *site.aliases), patterns) and _is_plain(site)):
            layers[site.weight_key].append(site)
    return [Layer(tuple(group)) for group in layers.values()]


def _is_plain(site: Site) -> bool:
    """Whether a site is a plain convolution, which is watched where a contextual one is."""
    conv = site.signature
    even_same = conv.padding == "same" and any(side % 2 == 0 for side in conv.kernel_size)
    known = isinstance(site.conv, nn.Conv2d) and type(site.conv).forward is nn.Conv2d.forward
    return known and site.state == site.plain and not even_same and not site.no_plain_form


class WatchedNetwork:
    """A copy of a network, of which certain layers are watched.

    Args:
        visit: Makes the copy.
        layers: The layers.
        original: Whether the copy is what the network was before its conversion.

    Attributes:
        model (nn.Module): The copy.
    """

    def __init__(self, visit: Visit, layers: Sequence[Layer], *, original: bool) -> None:
        self.model = visit.twin(fake=False).model
        found = {site.name: site for site in find_sites(self.model)}
        self._see: Callable[[Call], None] | None = None
        self._calls: Counter[Layer] = Counter()
        for layer in layers:
            for site in layer.sites:
                if original and layer.is_contextual:
                    # One level, rather than a plain convolution, so that it is watched in the same way.
                    found[site.name].switch(layer.before)
                for module in found[site.name].watched_in(self.model):
                    self._watch(module, layer, site)
        for module in self.model.modules():
            if isinstance(module, fx.GraphModule):
                module.recompile()
        self.parameters = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def run(self, batch: Batch, see: Callable[[Call], None] | None = None) -> Any:
        """Run it without gradients.

        Args:
            batch: What on.
            see: Called with every call of a watched layer; it may raise :class:`Stop`.

        Returns:
            The outputs; None if it was stopped.
        """
        self._see, self._calls = see, Counter()
        try:
            with torch.no_grad():
                return batch.run(self.model)
        except Stop:
            return None
        finally:
            self._see = None

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

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its parameters and buffers by name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _watch(self, module: nn.Module, layer: Layer, site: Site) -> None:
        cls: Any = type(module)
        here, of_module, network = cls._conv_forward, weakref.ref(module), weakref.ref(self)

        def convolve(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            watched, within = of_module(), network()
            assert watched is not None
            output: torch.Tensor = here(watched, input, weight, bias)
            if within is not None and within._see is not None:
                index = within._calls[layer]
                within._calls[layer] += 1
                batched = (input, output) if input.dim() == 4 else (input[None], output[None])
                within._see(Call(layer, site, watched, index, batched[0], weight, bias, batched[1]))
            return output

        vars(module)["_conv_forward"] = convolve
