"""How a progressive GAN grows: by the number of real images that its discriminator has seen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from coconv_surgery.layers.arguments import mapping, shown, whole_number
from coconv_surgery.zoo.progan import SMALLEST, resolution_index

# The reference implementation's for one GPU, preset v2.
_BATCHES = {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4, 1024: 4}


class Step(NamedTuple):
    """What one training step is about.

    Attributes:
        phase: Index of the phase: the first resolution, a fade-in, that resolution, the next fade-in, …
        resolution: Side of the images.
        fade: Share of the newest blocks when the step is done, from more than 0 to 1.
        batch: Real images, over all processes.
    """

    phase: int
    resolution: int
    fade: float
    batch: int


class Phase(NamedTuple):
    """A part of a training.

    Attributes:
        resolution: Side of the images.
        fades: Whether the newest blocks fade in.
        begin: Real images seen before.
        end: Real images seen when it ends, or a few more: a batch is of one phase.
    """

    resolution: int
    fades: bool
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The schedule: each resolution is trained for a while, and the next one faded in.

    Attributes:
        resolution: Side of the images in the end.
        images: Real images in total. Default: the CoConv paper's 12 million (section 5.1), as the ProGAN paper.
        stabilise: Real images for a resolution that has faded in; the last one gets all that remain.
        fade: Real images for a fade-in; 0 for none.
        batches: Batch size by resolution, over all processes. Those that are not given are the reference
            implementation's for one GPU.
        start: Side of the images in the beginning.
        phases: All phases, in their order.

    Raises:
        TypeError: If ``batches`` are not a dict.
        ValueError: If an argument is not a number that it can be, or there are too few images to grow, in all or in a
            phase.

    >>> growth = Growth(resolution=8, images=100, stabilise=20, fade=40, batches={4: 20, 8: 20})
    >>> [growth.at(seen).fade for seen in (0, 20, 40, 60)]
    [1.0, 0.5, 1.0, 1.0]
    >>> growth.steps()
    5
    """

    resolution: int
    images: int = 12_000_000
    stabilise: int = 600_000
    fade: int = 600_000
    batches: Mapping[int, int] = field(default_factory=dict)
    start: int = SMALLEST
    phases: tuple[Phase, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        last, first = resolution_index(self.resolution), resolution_index(self.start)
        if first > last:
            raise ValueError(f"start={self.start} is larger than resolution={self.resolution}, in which growth ends")
        for name, least in (("images", 1), ("stabilise", 0), ("fade", 0)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, at_least=least))
        object.__setattr__(self, "batches", _batches(self.batches))
        object.__setattr__(self, "phases", tuple(self._phases()))
        if self.images <= (reached := self.phases[-1].begin):
            raise ValueError(
                f"images={self.images} end before {self.resolution}×{self.resolution} pixels are faded in, after "
                f"{reached} images: give more, or lower stabilise={self.stabilise} and fade={self.fade}"
            )
        for phase, steps in self._shares(0):
            if steps == 0:
                raise ValueError(
                    f"the {phase.end - phase.begin} images of a phase at {phase.resolution}×{phase.resolution} pixels "
                    "are fewer than a batch has: give more images, or smaller batches"
                )

    def at(self, seen: int) -> Step:
        """What the step is about that begins after so many real images."""
        index = next((n for n, phase in enumerate(self.phases) if seen < phase.end), len(self.phases) - 1)
        phase = self.phases[index]
        batch = self.batches[phase.resolution]
        fade = min(1.0, (seen + batch - phase.begin) / (phase.end - phase.begin)) if phase.fades else 1.0
        return Step(index, phase.resolution, fade, batch)

    def walk(self, seen: int = 0) -> Iterator[tuple[int, Step]]:
        """All steps that remain after so many real images, each with the images seen before."""
        while seen < self.images:
            step = self.at(seen)
            yield seen, step
            seen += step.batch

    def steps(self, seen: int = 0) -> int:
        """How many steps remain after so many real images."""
        return sum(steps for _, steps in self._shares(seen))

    def _shares(self, seen: int) -> Iterator[tuple[Phase, int]]:
        """How many steps each phase has, after so many real images."""
        for phase in self.phases:
            batch = self.batches[phase.resolution]
            steps = max(0, -(-(phase.end - seen) // batch))
            seen += steps * batch
            yield phase, steps

    def _phases(self) -> Iterator[Phase]:
        begin, resolution = 0, self.start
        while True:
            if self.fade and resolution > self.start:
                yield Phase(resolution, True, begin, begin + self.fade)
                begin += self.fade
            if resolution == self.resolution:
                yield Phase(resolution, False, begin, self.images)
                return
            if self.stabilise:
                yield Phase(resolution, False, begin, begin + self.stabilise)
                begin += self.stabilise
            resolution *= 2


def _batches(given: Mapping[int, int]) -> Mapping[int, int]:
    # A config's keys may be strings: those of a command line always are.
    sizes = {str(key): value for key, value in given.items()} if isinstance(given, Mapping) else given
    sizes = mapping(sizes, "batches", "batch sizes by resolution", keys=[str(side) for side in _BATCHES])
    for side, size in sizes.items():
        if whole_number(size, f"batches[{side}]", at_least=1) % min(size, 4):
            raise ValueError(f"batches[{side}]={shown(size)} must be at most 4, or a multiple of 4")
    return {**_BATCHES, **{int(side): int(size) for side, size in sizes.items()}}
