"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""

import contextvars
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn as nn

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.tracing.fx_map import GraphMap, map_graphs
from coconv_surgery.tracing.inputs import BlankInputs, Inputs
from coconv_surgery.tracing.objects import in_words
from coconv_surgery.tracing.observer import Call, Observation, observe
from coconv_surgery.tracing.sites import Site
from coconv_surgery.tracing.twin import NetworkError, Twin
from coconv_surgery.tracing.unseen import unseen, without_logs
from coconv_surgery.tracing.visit import Visit, garbage_stays


@dataclass(frozen=True)
class TracedConv:
    """One convolution of a network, as seen by the trace.

    Attributes:
        site: Where it is.
        calls: Its calls in one forward pass, in order, and those of other sites that hold the same weight.
        network_size: Height and width of the network's input, if it has an image for one.
        nodes: Names of the graph nodes that call it, as far as torch.fx can trace.
        untraced: Why torch.fx could not trace to it, if so: the module, and the reason.
        weight_read: Whether its weight takes part in the forward pass outside its own convolution.
    """

    site: Site
    calls: tuple[Call, ...] = ()
    network_size: Pair | None = None
    nodes: tuple[str, ...] = ()
    untraced: str | None = None
    weight_read: bool = False

    @property
    def name(self) -> str:
        """Its qualified name."""
        return self.site.name

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the same."""
        return self.site.aliases

    @property
    def conv(self) -> nn.Conv2d:
        """The module; for a node of a graph, a description of it on the meta device.

        It may be another kind of convolution, such as a deformable or transposed one, which has some of the attributes
        of an ``nn.Conv2d``.
        """
        return self.site.conv


@dataclass(frozen=True)
class Trace:
    """What a trace found.

    Attributes:
        convs: One entry for each site, in their order.
        how: How torch.fx went through the network, and where map sizes come from, for a reader.
    """

    convs: tuple[TracedConv, ...]
    how: str


def trace_network(model: nn.Module, sites: Sequence[Site], inputs: Inputs) -> Trace:
    """Trace every convolution of a network; the network is neither run nor changed.

    torch.fx says which graph nodes call a convolution. Map sizes and dataflow come from one forward pass in evaluation
    mode of a twin without data, or, for a network whose control flow needs numbers, of a real copy.

    Args:
        model: The network.
        sites: Where it convolves, see :func:`~coconv_surgery.tracing.finding.find_sites`.
        inputs: What to call it with.

    Raises:
        ValueError: If the network does not run on these inputs.
    """
    with unseen(model), without_logs(), garbage_stays(), Visit(model, inputs) as visit:
        graphs, paths, observed = contextvars.copy_context().run(_look, visit, sites, inputs)
        visit.error = observed if isinstance(observed, NetworkError) else None
    if isinstance(observed, NetworkError):
        cause, size = observed.__cause__, " × ".join(map(str, inputs.image_size or ()))
        raise ValueError(
            f"{type(model).__name__} does not run on {f'a {size} input' if size else 'these inputs'} "
            f"({in_words(cause)}): give input_size= or example_inputs= that suit it"
        ) from cause
    tied: dict[Any, list[Site]] = defaultdict(list)
    for site in sites:
        tied[site.weight_key].append(site)
    traced = tuple(
        TracedConv(
            site=site,
            calls=tuple(call for other in tied[site.weight_key] for call in observed.calls.get(other.name, ())),
            network_size=inputs.image_size,
            nodes=tuple(node for path in paths[site.name] for node in graphs.calls.get(path, ())),
            untraced=next(
                (None if path in graphs.calls else graphs.why_unseen(path) for path in paths[site.name]), None
            ),
            weight_read=site.weight_read
            or site.name in observed.weight_reads
            or not all(isinstance(other.conv, nn.Conv2d) for other in tied[site.weight_key]),
        )
        for site in sites
    )
    apart = len(graphs.failures)
    whole = "torch.fx, whole" if not apart else f"torch.fx, around {apart} module{'s' if apart > 1 else ''}"
    return Trace(traced, f"{whole}; sizes from {'shapes alone' if observed.fake else 'a real forward pass'}")


def _look(
    visit: Visit, sites: Sequence[Site], inputs: Inputs
) -> tuple[GraphMap, dict[str, list[str]], Observation | NetworkError]:
    # A network that does not run with gradients on is run with them as it wants them.
    ways = [(fake, see_through) for fake in (True, False) for see_through in (True, False)]
    error = NetworkError()
    for fake, see_through in ways[2:] if inputs.needs_numbers else ways:
        if not see_through and not error.hidden:
            continue
        if not fake and isinstance(inputs, BlankInputs):
            error.__cause__ = MemoryError("it needs numbers, not just shapes, and there would be too many of them")
            break
        twin = visit.twin(fake=fake)
        watched = _watch(twin, sites)
        own = dict(visit.model.named_parameters())
        originals = {id(parameter): name for name, parameter in own.items()}
        untrained = {name for name, parameter in own.items() if not parameter.requires_grad}
        frozen = {id(copied): own[name] for name, copied in twin.model.named_parameters() if name in untrained}
        try:
            observed = observe(twin, watched, inputs, originals, frozen, see_through=see_through)
        except NetworkError as raised:
            error = raised
            continue
        paths: dict[str, list[str]] = defaultdict(list)
        for path, module in twin.model.named_modules(remove_duplicate=False):
            if module in watched:
                paths[watched[module]].append(path)
        # Behind the run, which would find the proxies that the network's code keeps.
        return map_graphs(twin.model, inputs), paths, observed
    return GraphMap(), {}, error


def _watch(twin: Twin, sites: Sequence[Site]) -> dict[nn.Module, str]:
    """Where a twin convolves: modules, by the names of their sites."""
    watched = {module: site.name for site in sites for module in site.watched_in(twin.model)}
    for module in twin.model.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()
    return watched
