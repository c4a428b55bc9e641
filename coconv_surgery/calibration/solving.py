"""One layer: what it sees, what it should give, and the kernels that come closest to that."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from coconv_surgery.calibration.batches import Batch, Stop
from coconv_surgery.calibration.moments import Moments, add_to
from coconv_surgery.calibration.networks import Call, Layer, WatchedNetwork
from coconv_surgery.calibration.patches import Positions, patches_at, sample_positions, values_at, wide
from coconv_surgery.calibration.report import CalibratedLayer, CalibrationError
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import coconv2d

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_HELD_OUT = 4  # every fourth image
_ALIKE = 0.5  # cosine of what two networks compute, above which they run on the same things
_NOT_RUN = "did not run on these images"
_OTHER_THINGS = "it runs on other things than before the conversion: solved for its own inputs"


class Target(NamedTuple):
    """What a call of the original convolution gave.

    Attributes:
        shape: Shape of its output.
        at: Positions.
        values: Its output there, ``(P, C)``.
    """

    shape: torch.Size
    at: Positions
    values: torch.Tensor


Targets = dict[Layer, dict[tuple[int, int], Target]]  # by the batch, and the call within


def record_targets(
    original: WatchedNetwork,
    layers: Sequence[Layer],
    calls: Mapping[Layer, int],
    batches: Sequence[Batch],
    positions: int,
) -> Targets:
    """What layers gave before the conversion.

    Args:
        original: The network before its conversion.
        layers: The layers.
        calls: How often each runs in the first batch, if it does.
        batches: What it is run on.
        positions: How many positions of each layer's output are kept, at most.
    """
    targets: Targets = {layer: {} for layer in layers}

    def see(call: Call, number: int) -> None:
        if call.layer in targets:
            limit = max(1, positions // (len(batches) * calls.get(call.layer, 1)))
            at = sample_positions(call.output.shape, limit, number * 1009 + call.index, call.output.device)
            targets[call.layer][number, call.index] = Target(call.output.shape, at, values_at(call.output, at))

    for number, batch in enumerate(batches):
        original.run(batch, functools.partial(see, number=number))
    return targets


def solve_layer(
    network: WatchedNetwork,
    layer: Layer,
    targets: dict[tuple[int, int], Target],
    batches: Sequence[Batch],
    stay: Mapping[str, str],
) -> CalibratedLayer:
    """Solve the kernels of a layer, in the copy of the network.

    Args:
        network: The converted network, whose earlier layers are solved already.
        layer: The layer.
        targets: What it gave before the conversion.
        batches: What the network is run on.
        stay: Parameters that are to stay as they are, with the reason.

    Raises:
        CalibrationError: If the network computes numbers that are not finite.
    """
    if not targets:
        return CalibratedLayer(layer.name, skipped=_NOT_RUN)
    seen = _Seen(network, layer, targets, batches, stay)
    for number, batch in enumerate(batches):
        network.run(batch, functools.partial(seen.add, number=number))
        if seen.obstacle is not None:
            return CalibratedLayer(layer.name, skipped=seen.obstacle)
    return seen.solve() if seen.call is not None else CalibratedLayer(layer.name, skipped=_NOT_RUN)


class _Seen:
    """What a layer has seen, summed up."""

    def __init__(
        self,
        network: WatchedNetwork,
        layer: Layer,
        targets: dict[tuple[int, int], Target],
        batches: Sequence[Batch],
        stay: Mapping[str, str],
    ) -> None:
        self.call: Call | None = None
        self.obstacle: str | None = None
        self._network, self._layer, self._targets, self._stay = network, layer, targets, stay
        self._last = {number: max(index for other, index in targets if other == number) for number, _ in targets}
        self._first_image = list(accumulate((batch.images for batch in batches), initial=0))
        self._solves_bias = False
        self._computed = False  # its kernels, from other parameters
        self._sums: dict[tuple[int, bool], Moments] = {}
        self._products: list[torch.Tensor] = []
        self._comparable = True
        self._positions = 0

    def add(self, call: Call, number: int) -> None:
        """Take in one call, in a run on a batch of that number."""
        if call.layer is not self._layer:
            return
        if self.call is None:
            self.call, self._computed = call, id(call.weight) not in self._network.parameters
            self.obstacle, self._solves_bias = self._why_not(call), self._has_bias_of_its_own(call)
        if self.obstacle is not None:
            raise Stop
        target = self._targets.get((number, call.index))
        if target is None or target.shape != call.output.shape:
            self._comparable = False
            limit = max(len(target.values) for target in self._targets.values())
            at = sample_positions(call.output.shape, limit, number, call.output.device)
            target = Target(call.output.shape, at, values_at(call.output, at))
        given = values_at(_as_before(call), target.at)
        self._products.append(torch.stack([(target.values * given).sum(), target.values.norm() * given.norm()]))
        # What the original gave, and what its kernels give for what is seen here.
        wanted = torch.stack((target.values, given), dim=-1)
        if call.bias is not None and not self._solves_bias:
            wanted = wanted - wide(call.bias)[:, None]
        held_out = self._is_held_out(target.at, number)
        for index, level in enumerate(self._layer.each_level()):
            patches = patches_at(call.input, call.site.signature, level, target.at)
            if self._solves_bias:
                patches = F.pad(patches, (0, 1), value=1.0)
            of_level = wanted[:, level.channels].reshape(len(wanted), len(patches), -1).transpose(0, 1)
            for is_held in (False, True):
                chosen = (held_out == is_held).nonzero().flatten()
                add_to(self._sums, (index, is_held), Moments.of(patches[:, chosen], of_level[:, chosen]))
        self._positions += len(wanted)
        if call.index == self._last.get(number):
            raise Stop

    def solve(self) -> CalibratedLayer:
        """Solve all levels, and give them to the network."""
        assert self.call is not None
        trained, paired = self._trained(self.call), self._paired()
        solved, ridges, errors = trained.clone(), [], torch.zeros(3, dtype=torch.float64)
        for index, level in enumerate(self._layer.each_level()):
            fit, held = self._fit_and_held_out(index, paired)
            own = trained[level.channels].view(len(fit.gram), -1, trained.shape[1])
            tried: dict[float | None, torch.Tensor] = {None: own}
            tried |= {ridge: fit.solve(own, ridge, with_bias=self._solves_bias) for ridge in _RIDGES}
            costs = {ridge: held.error(kernels).sum().item() for ridge, kernels in tried.items()}
            ridge = min(costs, key=lambda ridge: costs[ridge])
            if ridge is not None:
                final = (fit + held).solve(own, ridge, with_bias=self._solves_bias)
                solved[level.channels] = final.reshape(-1, trained.shape[1])
            ridges.append(ridge)
            errors += torch.tensor([costs[None], costs[ridge], held.energy.sum()])
        before, after, energy = errors.tolist()
        if energy == 0:
            return CalibratedLayer(self._layer.name, skipped="its output is zero on these images")
        put_back = self._write(solved)
        if self._computed:
            after = self._error(paired)
            if after >= before:
                put_back()
                return CalibratedLayer(self._layer.name, skipped="its standardised kernels get no better")
        return CalibratedLayer(
            self._layer.name,
            (before / energy) ** 0.5,
            (after / energy) ** 0.5,
            tuple(ridges),
            self._positions,
            note=None if paired else _OTHER_THINGS,
        )

    def _why_not(self, call: Call) -> str | None:
        """Why the layer cannot be solved, if so."""
        if (differs := self._layer.differs) is not None:
            return differs
        written = {"weight": call.weight}
        if self._computed:
            module, alone = call.module, len(self._layer.sites) == 1
            new = module.parameters_for(call.weight) if isinstance(module, CoConv2d) and alone else None
            if new is None:
                return "its kernels are computed from other parameters"
            written = {name: getattr(module, name) for name in new}
        names = [self._network.parameters.get(id(tensor), "") for tensor in written.values()]
        return next((self._stay[name] for name in names if name in self._stay), None)

    def _has_bias_of_its_own(self, call: Call) -> bool:
        """Whether there is one bias in all calls, which nothing else has."""
        name = self._network.parameters.get(id(call.bias))
        if name is None or name in self._stay or len(self._layer.sites) > 1:
            return False
        named = self._network.model.named_parameters(remove_duplicate=False)
        holders = {name.rpartition(".")[0] for name, parameter in named if parameter is call.bias}
        return len(holders) == 1 or holders <= {call.site.name, *call.site.aliases}

    def _is_held_out(self, at: Positions, number: int) -> torch.Tensor:
        """Whether positions are of images that are held out; of too few images, some positions are."""
        if self._first_image[-1] < _HELD_OUT:
            return torch.arange(len(at.image), device=at.image.device) % _HELD_OUT == _HELD_OUT - 1
        # A call may be on other things than images, such as regions; they are taken in turn as well.
        return (at.image + self._first_image[number]) % _HELD_OUT == _HELD_OUT - 1

    def _paired(self) -> bool:
        """Whether the two networks run on the same things at the same places here."""
        both, norms = torch.stack(self._products).double().sum(0).tolist()
        return self._comparable and both >= _ALIKE * norms

    def _fit_and_held_out(self, index: int, paired: bool) -> tuple[Moments, Moments]:
        """The moments of a level on images to fit and on images held out; where there is one kind alone, twice that."""
        outputs = slice(0 if paired else 1, None, 2)
        found = []
        for is_held in (False, True):
            sums = self._sums[index, is_held]
            sums = replace(sums, cross=sums.cross[..., outputs], energy=sums.energy[..., outputs])
            found.append(sums.of_mean_free(with_bias=self._solves_bias) if self._computed else sums)
        fit, held = found
        if not all(part.isfinite().all() for sums in found for part in (sums.gram, sums.cross, sums.energy)):
            raise CalibrationError(
                f"{self._layer.name} computes numbers that are not finite on these images: its weights, or those "
                "before it, hold NaN or are too large"
            )
        return (fit if fit.count else held), (held if held.count else fit)

    def _trained(self, call: Call) -> torch.Tensor:
        """The kernels that it has, and their biases behind, ``(O, K)``."""
        kernels = call.weight.detach().flatten(1)
        if self._solves_bias and call.bias is not None:
            kernels = torch.cat((kernels, call.bias.detach()[:, None]), dim=1)
        return kernels.to(next(iter(self._sums.values())).gram)

    def _write(self, solved: torch.Tensor) -> Callable[[], None]:
        """Give it kernels, and biases behind; what is returned takes them back."""
        assert self.call is not None
        weight, bias, module = self.call.weight, self.call.bias, self.call.module
        kernels = (solved[:, :-1] if self._solves_bias else solved).to(weight).view_as(weight)
        own, new = [weight], [kernels]
        if self._computed and isinstance(module, CoConv2d):
            named = module.parameters_for(kernels) or {}
            own, new = [getattr(module, name) for name in named], [*named.values()]
        if self._solves_bias and bias is not None:
            own.append(bias)
            new.append(solved[:, -1])
        trained = [tensor.detach().clone() for tensor in own]
        _copy(own, new)
        return functools.partial(_copy, own, trained)

    def _error(self, paired: bool) -> float:
        """Its squared error on images held out, with the kernels that it computes now."""
        assert self.call is not None
        now = self._trained(replace(self.call, weight=self._network.kernels_of(self.call)))
        total = 0.0
        for index, level in enumerate(self._layer.each_level()):
            _, held = self._fit_and_held_out(index, paired)
            total += held.error(now[level.channels].view(len(held.gram), -1, now.shape[1])).sum().item()
        return total


@torch.no_grad()
def _copy(tensors: Iterable[torch.Tensor], numbers: Iterable[torch.Tensor]) -> None:
    for tensor, new in zip(tensors, numbers, strict=True):
        tensor.copy_(new)


def _as_before(call: Call) -> torch.Tensor:
    """What a convolution would give for the same input, had it not been converted."""
    conv, levels = call.site.signature, call.layer.before
    with torch.no_grad():
        return coconv2d(
            call.input,
            call.weight,
            call.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            dilations=levels.dilations,
            splits=tuple(map(int, levels.splits)),
            padding_mode=conv.padding_mode,
        )
