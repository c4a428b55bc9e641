"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""

import contextlib
import inspect
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.functional import Pair
from coconv_surgery.tracing.fx_map import GraphMap, map_graphs
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.observer import Call, Observation, observe
from coconv_surgery.tracing.sites import Site
from coconv_surgery.tracing.twin import FORWARD_ERRORS, Twin


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
    cuda = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(cuda), _random_numbers_kept(), saved_tensors_hooks(_as_it_is, _as_it_is):
        graphs, paths, observed = _trace(model, sites, inputs)
    tied: dict[Any, list[str]] = defaultdict(list)
    for site in sites:
        tied[site.weight_key].append(site.name)
    traced = tuple(
        TracedConv(
            site=site,
            calls=tuple(call for other in tied[site.weight_key] for call in observed.calls.get(other, ())),
            network_size=inputs.image_size,
            nodes=tuple(node for path in paths[site.name] for node in graphs.calls.get(path, ())),
            untraced=next(
                (None if path in graphs.calls else graphs.why_unseen(path) for path in paths[site.name]), None
            ),
            weight_read=site.weight_read or site.name in observed.weight_reads,
        )
        for site in sites
    )
    apart = len(graphs.failures)
    whole = "torch.fx, whole" if not apart else f"torch.fx, around {apart} module{'s' if apart > 1 else ''}"
    return Trace(traced, f"{whole}; sizes from {'shapes alone' if observed.fake else 'a real forward pass'}")


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Give Python's and numpy's random generators back as they were."""
    numpy: Any = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    # Hooks on saved tensors that lie around planning are not called while others do nothing.
    return tensor


def _trace(
    model: nn.Module, sites: Sequence[Site], inputs: Inputs
) -> tuple[GraphMap, dict[str, list[str]], Observation]:
    twin = Twin(model)
    watched = _watch(twin, sites)
    paths: dict[str, list[str]] = defaultdict(list)
    for path, module in twin.model.named_modules(remove_duplicate=False):
        if module in watched:
            paths[watched[module]].append(path)
    graphs = map_graphs(twin.model, _constants(twin.model, inputs))
    if not inputs.needs_numbers:
        try:
            return graphs, paths, observe(twin, watched, inputs)
        except FORWARD_ERRORS:
            pass
    try:
        twin = Twin(model, fake=False)
        return graphs, paths, observe(twin, _watch(twin, sites), inputs)
    except FORWARD_ERRORS as error:
        size = " × ".join(map(str, inputs.image_size or ()))
        raise ValueError(
            f"{type(model).__name__} does not run on {f'a {size} input' if size else 'these inputs'} "
            f"({type(error).__name__}: {error}): give input_size= or example_inputs= that suit it"
        ) from error


def _watch(twin: Twin, sites: Sequence[Site]) -> dict[nn.Module, str]:
    """Where a twin convolves: modules, by the names of their sites."""
    watched = {module: site.name for site in sites for module in site.watched_in(twin.model)}
    for module in twin.model.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()
    return watched


def _constants(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of ``forward`` that hold no tensors, and its defaults: tracing takes them as they are."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = dict(zip((p.name for p in named), inputs.args, strict=False)) | dict(inputs.kwargs)
    values = {p.name: given.get(p.name, p.default) for p in named if p.name in given or p.default is not p.empty}
    return {
        name: value
        for name, value in values.items()
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    }
