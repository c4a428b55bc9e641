"""What became of a network that was deployed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from coconv_surgery.planning.plan import align


class DeploymentError(ValueError):
    """A network that cannot be deployed; it is as it was."""


@dataclass(frozen=True)
class Deployment:
    """What became of a network that was deployed; it prints as a list.

    Attributes:
        written_out: Levels of each contextual convolution, which are plain convolutions now, by name.
        constant: Other convolutions whose weights were computed, and are constant now.
        folded: Norms that were folded into the convolutions before them, with these.
        merged: Blocks whose branches were merged.
        left: What was left as it was, with the reason.
        difference: Largest difference between what the network and its deployed form compute, relative to the largest
            number.
    """

    written_out: Mapping[str, int] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    difference: float = 0.0

    def summary(self) -> str:
        """Sum it up in one line."""
        levels = sum(self.written_out.values())
        parts = [
            f"{len(self.written_out)} contextual convolutions written out as {levels} plain ones",
            f"{len(self.folded)} norms folded",
            f"{len(self.constant)} weights made constant" if self.constant else "",
            f"{len(self.merged)} blocks merged" if self.merged else "",
            f"{len(self.left)} left as they were" if self.left else "",
            f"largest difference {self.difference:.1e}",
        ]
        return "; ".join(filter(None, parts))

    def __str__(self) -> str:
        if not self.left:
            return self.summary()
        return f"{align([('left as it was', 'why'), *self.left.items()])}\n{self.summary()}"
