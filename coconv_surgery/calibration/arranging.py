"""Which channels of a layer go to which of its levels.

Levels are consecutive slices of a convolution's output channels, so a conversion gives a channel its dilation by where
it happens to be. Some filters survive a dilation well and others do not. Where channels can change places without a
change in what the network computes, each goes to the level that costs it least, seen over all layers that share them.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence

import torch

from coconv_surgery.calibration.batches import Batch
from coconv_surgery.calibration.channels import Order, find_orders
from coconv_surgery.calibration.moments import Moments, add_to
from coconv_surgery.calibration.networks import Call, Layer, WatchedNetwork, in_parts, tensors_of
from coconv_surgery.calibration.patches import Level, patches_at, sample_positions, values_at

_RIDGE = 1e-3
_FEWER = 4  # times fewer positions say which channels to exchange than solve the kernels
_ENOUGH = 1e-9  # a share of the cost, below which an exchange is rounding
Costs = dict[str, tuple[Layer, torch.Tensor]]


def find_arrangement(
    original: WatchedNetwork,
    layers: Mapping[Layer, str],
    batches: Sequence[Batch],
    positions: int,
    memory: int,
    stay: Container[str],
) -> tuple[list[tuple[Order, torch.Tensor]], int, set[str]]:
    """Decide which channels change places.

    Args:
        original: The network before its conversion.
        layers: The layers, with the names of their weights.
        batches: What to look at.
        positions: How many positions of each layer's output to look at.
        memory: Bytes for moments at a time.
        stay: Names of parameters that are to stay as they are.

    Returns:
        Orders of channels, with which channel each place gets; how many channels there are that could change places to
        some effect; and the names of what may read them unseen.
    """
    training = functools.partial(original.run, batches[0], training=True)
    orders, unseen = find_orders(original.model, lambda: map(original.run, batches), training)
    orders = [order for order in orders if not any(side.name in stay for side in order.sides)]
    names = {side.name for order in orders for side in order.sides if side.dim == 0}
    costs: Costs = {}
    movable = {layer: name for layer, name in layers.items() if name in names}
    for some in in_parts(movable, _bytes, memory):
        weights = {layer: movable[layer] for layer in some}
        costs |= _costs(original, weights, batches, max(1, positions // _FEWER))
    found, channels = [], 0
    for order in orders:
        shared = [name for name in sorted(side.name for side in order.sides if side.dim == 0) if name in costs]
        if shared:
            places = _assign(order, {name: costs[name] for name in shared})
            channels += len(places)
            if not torch.equal(places, torch.arange(len(places))):
                found.append((order, places))
    return found, channels, unseen


def rearrange(network: WatchedNetwork, arrangement: Sequence[tuple[Order, torch.Tensor]]) -> None:
    """Let the channels of a network change places."""
    tensors = tensors_of(network.model)
    with torch.no_grad():
        for order, places in arrangement:
            for side in order.sides:
                tensor = tensors[side.name]
                tensor.copy_(tensor.index_select(side.dim, places.to(tensor.device)))
    network.remember()


def assign_levels(costs: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Put each channel where it costs little.

    As long as it pays, channels go round in a cycle of places (Klein, 1967), so that the end is the best there is.

    Args:
        costs: What each channel costs in each kind of place, ``(channels, kinds)``.
        levels: The kind of each place, ``(channels,)``.

    Returns:
        Which channel each place gets, ``(channels,)``. Places whose kind does not change keep their channels.
    """
    own = levels.clone()
    kinds = costs.shape[1]
    while (cycle := _gainful_cycle(costs, own, kinds)) is not None:
        for channel, kind in cycle:
            own[channel] = kind
    places = torch.arange(len(levels))
    for level in range(kinds):
        leaves = ((levels == level) & (own != level)).nonzero().flatten()
        comes = ((levels != level) & (own == level)).nonzero().flatten()
        places[leaves] = comes
    return places


def _gainful_cycle(costs: torch.Tensor, own: torch.Tensor, kinds: int) -> list[tuple[int, int]] | None:
    """Channels that go round, each to a place of the next one's kind, with these kinds; None if none gain by it."""
    gains = costs - costs.gather(1, own[:, None])
    least = torch.full((kinds, kinds), torch.inf, dtype=costs.dtype)
    movers = torch.zeros(kinds, kinds, dtype=torch.long)
    for kind in range(kinds):
        among = (own == kind).nonzero().flatten()
        if len(among):
            least[kind], chosen = gains[among].min(dim=0)
            movers[kind] = among[chosen]
    best, after = least.clone(), torch.arange(kinds).repeat(kinds, 1)
    best.fill_diagonal_(0)
    smallest = -_ENOUGH * float(costs.gather(1, own[:, None]).abs().sum())
    for middle in range(kinds):  # Floyd and Warshall's shortest paths
        through = best[:, middle, None] + best[None, middle]
        start = int(through.diagonal().argmin())
        if through[start, start] < smallest:
            around = _simple([start, *_path(after, start, middle), *_path(after, middle, start)])
            return [(int(movers[kind, other]), other) for kind, other in itertools.pairwise(around)]
        shorter = through < best
        best, after = torch.where(shorter, through, best), torch.where(shorter, after[:, middle, None], after)
    return None


def _path(after: torch.Tensor, start: int, end: int) -> list[int]:
    """The kinds on the way, without the first."""
    path = [start]
    while path[-1] != end:
        path.append(int(after[path[-1], end]))
    return path[1:]


def _simple(around: list[int]) -> list[int]:
    """A way around without loops on the way."""
    way = around[:1]
    for kind in around[1:-1]:
        way = way[: way.index(kind) + 1] if kind in way else [*way, kind]
    return [*way, around[-1]]


def _bytes(layer: Layer) -> int:
    """What the moments of a layer take."""
    conv = layer.signature
    width = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
    return 8 * conv.groups * width * (width + conv.out_channels // conv.groups) * len(layer.levels.dilations)


def _costs(original: WatchedNetwork, layers: dict[Layer, str], batches: Sequence[Batch], positions: int) -> Costs:
    """The error of each channel at each level, ``(channels, levels)``, by the name of the weight."""
    moments: dict[Layer, dict[int, Moments]] = defaultdict(dict)
    kernels: dict[Layer, torch.Tensor] = {}

    def see(call: Call, number: int) -> None:
        if call.layer not in layers:
            return
        conv, kernels[call.layer] = call.site.signature, call.weight
        limit = max(1, positions // len(batches))
        at = sample_positions(call.output.shape, limit, number, call.output.device)
        wanted = values_at(call.output, at)
        if call.bias is not None:
            wanted = wanted - call.bias
        wanted = wanted.view(len(wanted), conv.groups, -1).transpose(0, 1)
        everything = slice(0, conv.groups)
        for index, level in enumerate(call.layer.each_level()):
            patches = patches_at(call.input, conv, Level(level.dilation, level.channels, everything), at)
            add_to(moments[call.layer], index, Moments.of(patches, wanted))

    for number, batch in enumerate(batches):
        original.run(batch, functools.partial(see, number=number))
    return {name: (layer, _errors(moments[layer], kernels[layer])) for layer, name in layers.items()}


def _errors(moments: dict[int, Moments], weight: torch.Tensor) -> torch.Tensor:
    errors = []
    for own in moments.values():
        groups, width, _ = own.cross.shape
        kernels = weight.detach().to(own.gram).reshape(groups, -1, width)
        solved = own.solve(kernels, _RIDGE, with_bias=False)
        errors.append(own.error(solved).flatten() / own.count)
    return torch.stack(errors, dim=1).cpu()


def _assign(order: Order, costs: Costs) -> torch.Tensor:
    """Decide about channels that several layers may share: their costs add up."""
    total, places = torch.zeros(()), []
    for name, (layer, errors) in costs.items():
        scale = order.scales.get(name)
        scaled = errors if scale is None else errors * scale.double().cpu().square()[:, None]
        of_place = torch.cat([torch.full((count,), level) for level, count in enumerate(layer.splits)])
        places.append(of_place)
        total = total + scaled[:, of_place]
    _, kinds = torch.unique(torch.stack(places, dim=1), dim=0, return_inverse=True)
    # Places of one kind have the same level in every layer, so that one of them stands for all.
    representative = torch.stack([(kinds == kind).nonzero()[0, 0] for kind in range(int(kinds.max()) + 1)])
    return assign_levels(total[:, representative], kinds)
