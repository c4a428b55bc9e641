"""Theoretical receptive fields: which pixels the convolutions of a network can see, whatever its weights."""

import contextvars
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn as nn

from coconv_surgery.layers.arguments import Pair, flag, instance
from coconv_surgery.planning.notes import inputs_for
from coconv_surgery.planning.patterns import Patterns, as_list, check_patterns, first_match
from coconv_surgery.planning.plan import align
from coconv_surgery.receptive.rules import Map
from coconv_surgery.receptive.spots import Mask
from coconv_surgery.receptive.watching import Watch
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.inputs import BlankInputs, Inputs, InputSize
from coconv_surgery.tracing.objects import in_words
from coconv_surgery.tracing.sites import Site
from coconv_surgery.tracing.switching import revert_sites
from coconv_surgery.tracing.twin import NetworkError
from coconv_surgery.tracing.unseen import unseen, without_logs
from coconv_surgery.tracing.visit import Visit, garbage_stays


@dataclass(frozen=True)
class LayerField:
    """The receptive field of a convolution: the pixels that the middle of its output can see.

    Attributes:
        name: Qualified name of the convolution.
        size: Height and width in pixels of the box around the field, what lies beyond the edges of the image included;
            where operations that read the whole image take part, within them. None if it is not known.
        pixels: How many pixels of that box it sees: a dilated kernel has holes. None if it is not known.
        mask: ``(height, width)`` of the input: the pixels of the image that it sees. None if it is not known.
        through: Operations on the way that mix all positions of a map, by torch's names, such as a global pool.
        unknown: Why it is not known, if so.
    """

    name: str
    size: Pair | None
    pixels: int | None
    mask: Mask | None
    through: tuple[str, ...] = ()
    unknown: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it sees every pixel of the image."""
        return self.mask is not None and bool(self.mask.all())

    @property
    def remark(self) -> str:
        """What a reader should know of it."""
        if self.unknown:
            return f"unknown: {self.unknown}"
        seen = "whole image" if self.whole else ""
        return f"through {', '.join(self.through)}{seen and f': {seen}'}" if self.through else seen


@dataclass(frozen=True)
class FieldReport:
    """Receptive fields of a network's convolutions, in the order of their calls; prints as a table.

    Attributes:
        rows: One for each convolution.
        input_size: Height and width of the image.
    """

    rows: tuple[LayerField, ...]
    input_size: Pair

    def __getitem__(self, name: str) -> LayerField:
        """The field of a convolution, by its name."""
        return {row.name: row for row in self.rows}[name]

    def cells(self) -> list[tuple[str, ...]]:
        """The table: a header and a row for each convolution, as text."""
        return [("conv", "field", "pixels seen", "of image", "remark"), *map(_cells, self.rows)]

    def __str__(self) -> str:
        return align(self.cells())


def receptive_fields(
    model: nn.Module,
    input_size: InputSize | None = None,
    *,
    names: Patterns | None = None,
    example_inputs: Any = None,
    reverted: bool = False,
) -> FieldReport:
    """Find the theoretical receptive fields of a network's convolutions, plain or contextual.

    One forward pass of a copy shows which operation reads which positions; the field of the middle of an output is
    followed from there to the image. Weights play no part. Channels are counted together: the field is that of all
    output channels, and exact where layers mix the channels between one level and the next; elsewhere no pixel is
    missing, but some may be too many. Pixels that weigh nothing in sum, or only with some inputs, count as seen.

    Args:
        model: The network; it is neither run nor changed.
        input_size: Side, (height, width) or (channels, height, width) of the input. Default: what timm says of the
            network, or else what its conversion was planned for.
        names: Glob patterns of convolutions; that of a module stands for all within. Default: all.
        example_inputs: What to call the network with instead, as in :func:`~coconv_surgery.plan_conversion`.
        reverted: Whether to look at what :func:`~coconv_surgery.revert` would make of it: the network before.

    Returns:
        The fields. What cannot be known is said there.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If the input size cannot be known or does not suit the network, or a pattern matches nothing.

    >>> from torch import nn
    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> print(receptive_fields(chain, 16))
    conv  field  pixels seen  of image  remark
    ────  ─────  ───────────  ────────  ──────
    0     5×5    9            3.5 %
    2     7×7    49           19.1 %
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    flag(reverted, "reverted")
    patterns = None if names is None else as_list(names, "names")
    with unseen(model):
        sites = find_sites(model)
        if patterns is not None:
            check_patterns({"names": patterns}, [name for site in sites for name in (site.name, *site.aliases)])
        inputs = inputs_for(model, input_size, example_inputs)
        if inputs.image_size is None:
            raise ValueError("example_inputs hold no batch of images, of which a convolution could see pixels")
        wanted = [site for site in sites if patterns is None or first_match((site.name, *site.aliases), patterns)]
        with without_logs(), garbage_stays(), Visit(model, inputs) as visit:
            found = contextvars.copy_context().run(_look, visit, wanted, inputs, inputs.image_size, reverted)
            visit.error = found if isinstance(found, NetworkError) else None
    if isinstance(found, NetworkError):
        cause = found.__cause__
        raise ValueError(
            f"{type(model).__name__} does not run on these inputs ({in_words(cause)}): give input_size= or "
            "example_inputs= that suit it"
        ) from cause
    return FieldReport(found, inputs.image_size)


def revert_copy(model: nn.Module) -> None:
    """Make every convolution of a copy what it was before its conversion."""
    sites = [site for site in find_sites(model) if site.is_marked or site.levels is not None]
    revert_sites(sites, ExitStack())


def watched_convs(model: nn.Module, sites: Sequence[Site]) -> dict[nn.Module, str]:
    """The modules of a copy of a network that are called where some of its sites convolve, with their names."""
    convs = {module: site.name for site in sites for module in site.watched_in(model)}
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()
    return convs


def _look(
    visit: Visit, sites: Sequence[Site], inputs: Inputs, size: Pair, reverted: bool
) -> tuple[LayerField, ...] | NetworkError:
    error = NetworkError()
    for fake in (False,) if inputs.needs_numbers else (True, False):
        if not fake and isinstance(inputs, BlankInputs):
            error.__cause__ = MemoryError("it needs numbers, not just shapes, and there would be too many of them")
            break
        twin = visit.twin(fake=fake)
        if reverted:
            revert_copy(twin.model)
        convs = watched_convs(twin.model, sites)
        watch = Watch()
        try:
            twin.run(inputs.args, dict(inputs.kwargs), functools.partial(_run, watch, convs, inputs.call))
        except NetworkError as raised:
            error = raised
            continue
        called = [*watch.outputs, *(site.name for site in sites if site.name not in watch.outputs)]
        return tuple(_field(watch, name, size) for name in called)
    return error


def _run(watch: Watch, convs: Any, call: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return watch.run(model, convs, *args, call=call, **kwargs)


def _field(watch: Watch, name: str, size: Pair) -> LayerField:
    calls = watch.outputs.get(name)
    if not calls:
        return LayerField(name, None, None, None, unknown="it is not called")
    fields = [_of_map(name, watch, place, size) for place in calls if place is not None]
    if not fields:
        return LayerField(name, None, None, None, unknown="what it reads does not come from the image")
    # A convolution that is called on several maps: the largest field, or the one that is not known.
    return max(fields, key=lambda found: (found.unknown is not None, found.pixels or 0))


def _of_map(name: str, watch: Watch, place: Map, size: Pair) -> LayerField:
    seen = watch.seen_from(place, padded=False)
    if seen.unknown:
        return LayerField(name, None, None, None, seen.through, f"no rule for {', '.join(seen.unknown)}")
    if seen.spots is None:
        return LayerField(name, None, None, None, unknown="what it reads does not come from the image")
    # Where the whole image is read, there is nothing beyond its edges.
    spots = seen.spots if seen.through else watch.seen_from(place, padded=True).spots or seen.spots
    return LayerField(name, spots.extent, int(spots.mask.sum()), seen.spots.within(*size), seen.through)


def _cells(row: LayerField) -> tuple[str, ...]:
    if row.size is None or row.mask is None:
        return (row.name, "–", "–", "–", row.remark)
    share = f"{100 * row.mask.mean():.1f} %"
    return (row.name, "×".join(map(str, row.size)), f"{row.pixels:,}", share, row.remark)
