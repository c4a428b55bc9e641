"""Solve the kernels of a converted network for their levels, layer by layer."""

import contextlib
import contextvars
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from tqdm.auto import tqdm

from coconv_surgery.calibration.arranging import find_arrangement, rearrange
from coconv_surgery.calibration.batches import read_batches
from coconv_surgery.calibration.networks import Call, Layer, WatchedNetwork, find_layers, in_parts, tensors_of
from coconv_surgery.calibration.parameters import OtherReads, that_stay
from coconv_surgery.calibration.report import CalibratedLayer, Calibration, CalibrationError
from coconv_surgery.calibration.solving import record_targets, solve_layer
from coconv_surgery.layers.arguments import Pair, flag, whole_number
from coconv_surgery.layers.rollback import tensor_restorer
from coconv_surgery.planning.notes import noted_plan
from coconv_surgery.planning.patterns import Patterns
from coconv_surgery.tracing.convertible import check_convertible, check_unsharded, path_of
from coconv_surgery.tracing.finding import find_intact_sites
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import in_words, tensors_in
from coconv_surgery.tracing.operations import Leaving, Operations
from coconv_surgery.tracing.sites import calibrated_images
from coconv_surgery.tracing.switching import mark_calibrated
from coconv_surgery.tracing.unseen import unseen
from coconv_surgery.tracing.visit import Visit

_MEMORY = 2**29  # bytes, for what is kept of several layers at a time
_ROUNDING = 1e-3  # of what a network computes, as a share
_FEW = 0.05  # of the numbers, which are small and differ by more than that
_SIZES_APART = 2  # times, by which maps may be larger or smaller than planned


def calibrate(
    model: nn.Module,
    images: Any,
    *,
    max_images: int = 256,
    arrange: bool = True,
    also: Patterns | None = None,
    frozen: bool = True,
    positions: int = 40_000,
    progress: bool = False,
) -> Calibration:
    """Let a trained network that was converted compute what it computed before, as nearly as its levels can.

    It takes a few images without labels and no gradients. Two things are done, both on copies, and then given to the
    parameters that the network has:

    1. Channels change places, where that changes nothing in what the network computes, so that each level gets the
       filters that survive its dilation best. An optimizer's state and averages of the weights that exist already
       would be of the old places: calibrate before there are any, or pass ``arrange=False``.
    2. In the order of the forward pass, the kernels of each contextual convolution are solved by least squares, so that
       for what it sees in the network solved so far, it gives what the plain convolution gave in the original network.

    Args:
        model: A network that was converted, with the weights that it was trained to as a plain one.
        images: Images as the network takes them in evaluation: a tensor ``(N, C, H, W)``, an iterable of batches such
            as a ``DataLoader`` (a batch is a tensor, a tuple of arguments, of which labels at the end are left out, a
            dict of them by name, :class:`~coconv_surgery.Inputs`, or what mmengine's data loaders give to a network of
            mmengine's), or a function that runs the network that it is given.
        max_images: How many of them to use at most. They are read once, and kept in memory.
        arrange: Whether channels may change places.
        also: Glob patterns of plain convolutions to solve as well, by qualified name; ``"*"`` for all. Those behind
            contextual ones make up for some of what these cannot do, above all behind depthwise ones, which have few
            kernels to solve. It takes as much time for each.
        frozen: Whether to change parameters that do not require gradients as well.
        positions: How many positions of each layer's output to look at, at most, chosen at random.
        progress: Whether to show a progress bar.

    Returns:
        What was done, layer by layer. A network without contextual convolutions is left as it is.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place, or another argument is of a wrong kind.
        ValueError: If a pattern matches nothing, or a contextual convolution was pruned.
        CalibrationError: If there are no images, or something else among them, they or what the network computes are
            not finite, they are of another size than the network was converted for, or the network was calibrated
            before. Whatever goes wrong,
            interrupts included, the network is left as it was.

    >>> import timm
    >>> from coconv_surgery import convert
    >>> model = convert(timm.create_model("test_resnet"), input_size=64)
    >>> report = calibrate(model, torch.randn(8, 3, 64, 64))
    >>> all(layer.after <= layer.before for layer in report.solved)
    True
    """
    with ExitStack() as undo:
        report = calibrate_within(
            undo,
            model,
            images,
            max_images=max_images,
            arrange=arrange,
            also=also,
            frozen=frozen,
            positions=positions,
            progress=progress,
        )
        undo.pop_all()
    return report


def calibrate_within(
    undo: ExitStack,
    model: nn.Module,
    images: Any,
    *,
    max_images: int = 256,
    arrange: bool = True,
    also: Patterns | None = None,
    frozen: bool = True,
    positions: int = 40_000,
    progress: bool = False,
) -> Calibration:
    """Do what :func:`calibrate` does, as a part of a larger change.

    Args:
        undo: Takes what puts everything back.
        model: As of :func:`calibrate`, like all that follow.
        images: As of :func:`calibrate`.
        max_images: As of :func:`calibrate`.
        arrange: As of :func:`calibrate`.
        also: As of :func:`calibrate`.
        frozen: As of :func:`calibrate`.
        positions: As of :func:`calibrate`.
        progress: As of :func:`calibrate`.
    """
    start = time.perf_counter()
    check_convertible(model)
    limit = whole_number(max_images, "max_images", at_least=1)
    positions = whole_number(positions, "positions", at_least=1)
    arrange, frozen, progress = flag(arrange, "arrange"), flag(frozen, "frozen"), flag(progress, "progress")
    _check_weights(model)
    sites = find_intact_sites(model)
    if before := calibrated_images(sites):
        raise CalibrationError(
            f"the network was calibrated on {before:,} images before, and its kernels are not the trained ones any "
            "more: load those into a network that is built anew, and calibrate that"
        )
    layers, plan = find_layers(sites, also), noted_plan(model)
    stay = that_stay(model, frozen=frozen)
    sizes = {row.name: row.output_sizes for row in plan.converted} if plan else {}
    with unseen(model), _without_autocast(model), Visit(model, Inputs()) as visit:
        # In a function of its own, so that nothing here holds the copies when the visit ends.
        wanted = functools.partial(_calibrate_copies, arrange=arrange, stay=stay, progress=progress)
        arguments = (visit, layers, images, limit, positions, sizes)
        changed, report = contextvars.copy_context().run(wanted, *arguments)
    _give(model, changed, undo)
    if report.solved:
        mark_calibrated(sites, report.images, undo)
    return replace(report, seconds=time.perf_counter() - start)


def _calibrate_copies(*arguments: Any, **choices: Any) -> tuple[dict[str, torch.Tensor], Calibration]:
    work = _Work(*arguments)
    work.do(**choices)
    return work.changed, Calibration(tuple(work.rows), work.images, work.arranged, note="; ".join(work.notes) or None)


class _Work:
    """A calibration of copies.

    Args:
        visit: Makes them.
        layers: What to solve.
        images: As of :func:`calibrate`, like the next two.
        limit: How many of them.
        positions: How many positions of a layer's output.
        sizes: Heights and widths of the output that each convolution was converted for, where known.

    Attributes:
        changed (dict[str, torch.Tensor]): The numbers of the parameters and buffers that are to change.
        rows (list[CalibratedLayer]): What was done to each layer.
        images (int): How many images there were.
        arranged (tuple[int, int]): How many channels changed places, of how many that could.
        notes (list[str]): What else there is to know.
    """

    def __init__(
        self,
        visit: Visit,
        layers: Sequence[Layer],
        images: Any,
        limit: int,
        positions: int,
        sizes: Mapping[str, Sequence[Pair]],
    ) -> None:
        self.changed: dict[str, torch.Tensor] = {}
        self.rows: list[CalibratedLayer] = []
        self.arranged = (0, 0)
        self.notes: list[str] = []
        self._model, self._positions = visit.model, positions
        self._original = WatchedNetwork(visit, layers, original=True)
        # A function may do to the network what it likes: it gets a copy of its own.
        model = visit.twin(fake=False).model if callable(images) else self._original.model
        self._batches = read_batches(model, images, limit)
        self.images = sum(batch.images for batch in self._batches)
        if left_out := max(batch.left_out for batch in self._batches):
            self.notes.append(
                f"the last {left_out} of each batch taken for labels: give Inputs if the network is to have them"
            )
        self._network = WatchedNetwork(visit, layers, original=False)
        self._layers, self._sizes = layers, sizes
        # What the first run of the original network shows.
        self._outputs: list[torch.Tensor] = []
        self._calls: Counter[Layer] = Counter()
        self._weights: dict[Layer, str] = {}

    def do(self, *, arrange: bool, stay: Mapping[str, str], progress: bool) -> None:
        """Do it all.

        Args:
            arrange: As of :func:`calibrate`.
            stay: Parameters that are to stay as they are, with the reason.
            progress: As of :func:`calibrate`.
        """
        ordered, reads = self._in_order()
        stay = {**stay, **reads}
        # Nothing is to be made up for before the first contextual one.
        first = next((number for number, layer in enumerate(ordered) if layer.is_contextual), len(ordered))
        self._layers = ordered[first:]
        if arrange and self._layers:
            self._arrange(stay)
        with tqdm(total=len(self._layers), disable=not progress, desc="calibrating", unit="conv") as bar:
            for some in in_parts(self._layers, self._bytes, _MEMORY):
                targets = record_targets(self._original, some, self._calls, self._batches, self._positions)
                for layer in some:
                    row = solve_layer(self._network, layer, targets.pop(layer), self._batches, stay)
                    self.rows.append(row)
                    bar.update()
        own = tensors_of(self._model)
        self._network.put_back()  # what a run has left behind
        for name, tensor in tensors_of(self._network.model).items():
            if not torch.equal(tensor, own[name]):
                self.changed[name] = tensor.detach().clone()

    def _in_order(self) -> tuple[list[Layer], dict[str, str]]:
        """The layers in the order of the forward pass, and which parameters are read by others.

        Layers that do not run come last.
        """
        parameters = self._original.parameters
        used: set[str] = set()

        def see(call: Call) -> None:
            self._calls[call.layer] += 1
            if (name := parameters.get(id(call.weight))) is not None:
                self._weights[call.layer] = name
            used.update(parameters[id(part)] for part in (call.weight, call.bias) if id(part) in parameters)
            self._check_size(call)

        self._outputs = self._run_original(see)
        reads = OtherReads(self._original.model, lambda: self._original.convolves)
        # A run of its own: where it is watched, torch may compute otherwise.
        with Operations(reads.see), Leaving(reads.leave):
            self._run_original()
        for number in range(1, len(self._batches)):
            self._run_original(self._check_size, number)
        if not _same(self._outputs, self._run_original()):
            raise CalibrationError(
                f"{type(self._model).__name__} does not compute the same twice from the same images: there is nothing "
                "to solve its kernels for"
            )
        ordered = [*self._calls, *(layer for layer in self._layers if layer not in self._calls)]
        return ordered, reads.reasons(used)

    def _check_size(self, call: Call) -> None:
        planned = self._sizes.get(call.site.name)
        if not planned:
            return
        found = min(call.output.shape[-2:])
        least, most = min(map(min, planned)), max(map(min, planned))
        if not least / _SIZES_APART <= found <= most * _SIZES_APART:
            height, width = planned[0]
            raise CalibrationError(
                f"{call.site.name} was converted for maps of {height}×{width}, and these images give it "
                f"{'×'.join(map(str, call.output.shape[-2:]))}: give images of the size that the network was converted "
                "for, or convert it for theirs"
            )

    def _bytes(self, layer: Layer) -> int:
        """What is kept of a layer's output takes."""
        return 4 * self._positions * layer.signature.out_channels

    def _run_original(self, see: Callable[[Call], None] | None = None, number: int = 0) -> list[torch.Tensor]:
        """What the original network returns for a batch."""
        try:
            return list(tensors_in(self._original.run(self._batches[number], see)))
        except CalibrationError:
            raise
        except Exception as error:  # whatever the network's own code raises
            raise CalibrationError(
                f"{type(self._model).__name__} does not run on these images (batch {number}: {in_words(error)}): give "
                "them as it takes them in evaluation"
            ) from error

    def _arrange(self, stay: Mapping[str, str]) -> None:
        """Let channels change places in both networks, if that changes nothing in what the original computes."""
        weights = {layer: name for layer, name in self._weights.items() if layer.is_contextual}
        arrangement, channels, unseen = find_arrangement(
            self._original, weights, self._batches, self._positions, _MEMORY, stay
        )
        rearrange(self._original, arrangement)
        numbers = any(output.is_floating_point() for output in self._outputs)
        if not numbers or not _same(self._outputs, self._run_original()):
            rearrange(self._original, [(order, places.argsort()) for order, places in arrangement])
            self.notes.append(
                "no channels changed places: the network returns something else then, or no numbers to tell by"
            )
            return
        rearrange(self._network, arrangement)
        moved = sum(int((places != torch.arange(len(places))).sum()) for _, places in arrangement)
        self.arranged = (moved, channels)
        if moved and unseen:
            self.notes.append(
                f"what took no part in any run, as {min(unseen)}, may read a part of the channels that changed places, "
                "or several maps at once: give arrange=False if so"
            )


def _same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether outputs are the same but for rounding."""
    return len(before) == len(after) and all(map(_alike, before, after))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether nearly all numbers differ by little: not of the largest of them, which would hide the others."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return one.dtype == other.dtype
    share = max(_ROUNDING, 8 * torch.finfo(one.dtype).eps)
    one, other = one.double(), other.double()
    apart = ~((one - other).abs() <= share * (one.abs() + other.abs()))
    return float((apart & ~(one.isnan() & other.isnan())).double().mean()) <= _FEW


def _check_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        check_unsharded(module, path_of(name), "calibrate the network before it is sharded")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CalibrationError(f"{name} is on the meta device and has no numbers: load the trained weights first")
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise CalibrationError(
                f"{name} was made in inference mode and cannot change: make the network outside of it"
            )
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise CalibrationError(f"{name} holds numbers that are not finite: calibration needs trained weights")


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Let copies compute in the network's own precision, in which their errors are told apart."""
    devices = {"cpu", *(parameter.device.type for parameter in model.parameters())}
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _give(model: nn.Module, changed: Mapping[str, torch.Tensor], undo: ExitStack) -> None:
    """Put numbers into a network's parameters and buffers."""
    own = tensors_of(model)
    undo.callback(tensor_restorer(own[name] for name in changed))
    with torch.no_grad():
        for name, numbers in changed.items():
            own[name].copy_(numbers)
