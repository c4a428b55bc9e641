"""What a calibration did."""

from dataclasses import dataclass

from coconv_surgery.planning.plan import align


class CalibrationError(ValueError):
    """A calibration that cannot be done; the network is as it was."""


@dataclass(frozen=True)
class CalibratedLayer:
    """One contextual convolution. Errors are of its output, relative to the wanted one (root mean squares).

    Attributes:
        name: Its qualified name.
        before: Error with the trained kernels, on images held out.
        after: Error with the solved ones, on the same images.
        ridge: How strongly each level's kernels are drawn towards the trained ones; None where those were kept.
        positions: How many positions of its output were looked at.
        skipped: Why it was left as it was, or None.
        note: What else there is to know.
    """

    name: str
    before: float | None = None
    after: float | None = None
    ridge: tuple[float | None, ...] = ()
    positions: int = 0
    skipped: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Calibration:
    """What a calibration did; it prints as a table.

    Attributes:
        layers: Its layers, in the order of the forward pass.
        images: How many images it looked at.
        arranged: How many channels changed places, of how many.
        seconds: How long it took.
        note: What else there is to know.
    """

    layers: tuple[CalibratedLayer, ...]
    images: int
    arranged: tuple[int, int]
    seconds: float = 0.0
    note: str | None = None

    @property
    def solved(self) -> tuple[CalibratedLayer, ...]:
        """The layers that were not skipped."""
        return tuple(layer for layer in self.layers if layer.skipped is None)

    def summary(self) -> str:
        """Sum it up in one line."""
        moved, channels = self.arranged
        skipped = len(self.layers) - len(self.solved)
        return (
            f"{len(self.solved)} convolutions solved on {self.images} images in {self.seconds:.1f} s"
            + (f", {skipped} skipped" if skipped else "")
            + f"; {moved:,} of {channels:,} channels changed places"
            + (f"; {self.note}" if self.note else "")
        )

    def __str__(self) -> str:
        header = ("conv", "error before", "after", "ridge", "positions", "")
        return f"{align([header, *map(_cells, self.layers)])}\n{self.summary()}"


def _cells(layer: CalibratedLayer) -> tuple[str, ...]:
    said = layer.skipped or layer.note or ""
    if layer.before is None or layer.after is None:
        return (layer.name, "", "", "", "", said)
    ridge = ", ".join("kept" if value is None else f"{value:g}" for value in layer.ridge)
    return (layer.name, f"{layer.before:.3f}", f"{layer.after:.3f}", ridge, f"{layer.positions:,}", said)
