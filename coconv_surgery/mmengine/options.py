"""The ``surgery=dict(...)`` of a config: which part of a network to convert, and how."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch.nn as nn

from coconv_surgery.layers.arguments import (
    Pair,
    file_to_read,
    flag,
    height_and_width,
    instance,
    mapping,
    sequence,
    whole_number,
    whole_numbers,
)
from coconv_surgery.layers.levels import Levels
from coconv_surgery.planning.patterns import as_list
from coconv_surgery.planning.plan import Plan
from coconv_surgery.planning.policies import Answer, Policy, get_policy, named_policy
from coconv_surgery.surgery import apply_plan, plan_conversion

_WISH = "_coconv_calibration"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How to calibrate a network before its training, see :func:`~coconv_surgery.calibrate`.

    Attributes:
        images: How many training images to look at.
        also: Patterns of plain convolutions to solve as well.
        arrange: Whether channels may change places.
    """

    images: int = 256
    also: str | Sequence[str] | None = None
    arrange: bool = True

    def __post_init__(self) -> None:
        whole_number(self.images, "surgery: calibrate: images", at_least=1)
        flag(self.arrange, "surgery: calibrate: arrange")
        if self.also is not None:
            object.__setattr__(self, "also", as_list(self.also, "surgery: calibrate: also"))


def wished_calibration(network: nn.Module) -> CalibrationOptions | None:
    """How a network, or parts of it, are to be calibrated.

    Raises:
        ValueError: If parts are to be calibrated in different ways.
    """
    wishes = [vars(module)[_WISH] for module in network.modules() if _WISH in vars(module)]
    if any(wish != wishes[0] for wish in wishes):
        raise ValueError(
            f"surgery: calibrate: a network is calibrated whole, and its parts want different things: {wishes}"
        )
    return wishes[0] if wishes else None


@dataclass(frozen=True, kw_only=True)
class SurgeryOptions:
    """The keys of a ``surgery`` dict.

    Attributes:
        policy: Name of a policy, or ``dict(type=name, ...)`` with its arguments; see
            :func:`~coconv_surgery.plan_conversion` for this and the next three.
        include: Glob patterns of convolutions to consider.
        exclude: Glob patterns of convolutions to leave alone.
        overrides: Levels by pattern; ``dict(dilations=..., splits=...)`` stands for
            :class:`~coconv_surgery.Levels`.
        input_size: Side, or (height, width), of the images as the pipeline resizes them.
        pipeline: A data pipeline to read ``input_size`` from instead: the ``scale`` of its last resizing.
        plan: Path of a saved plan, which decides everything: give nothing else with it, except ``calibrate``.
        calibrate: ``dict(images=256)`` to calibrate the network on so many training images before the first iteration;
            keys of :class:`CalibrationOptions`.
    """

    policy: Any = "resolution"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    overrides: Mapping[str, Any] | None = None
    input_size: int | Sequence[int] | None = None
    pipeline: Sequence[Any] | None = None
    plan: str | None = None
    calibrate: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # All is looked at before a network is built.
        for name in ("include", "exclude"):
            if (patterns := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_list(patterns, name))
        self.choices()
        _ = self.image_size, self.calibration

    @classmethod
    def read(cls, surgery: Mapping[str, Any]) -> "SurgeryOptions":
        """Read a ``surgery`` dict.

        Raises:
            TypeError: If it is not a dict.
            ValueError: If it has an unknown key, or keys that exclude each other.
        """
        surgery = mapping(surgery, "surgery", "options", keys=[field.name for field in fields(cls)])
        if surgery.get("plan") is not None and surgery.keys() - {"plan", "calibrate"}:
            others = ", ".join(key for key in surgery if key not in ("plan", "calibrate"))
            raise ValueError(f"surgery: a plan decides everything; leave out {others}")
        if surgery.get("input_size") is not None and surgery.get("pipeline") is not None:
            raise ValueError("surgery: give either input_size or pipeline, not both")
        return cls(**surgery)

    @property
    def image_size(self) -> Pair | None:
        """Height and width of the resized images, where the options give them."""
        if self.pipeline is not None:
            return resized_to(self.pipeline)
        if self.input_size is None:
            return None
        return height_and_width(self.input_size, "surgery: input_size", at_least=1)

    @property
    def calibration(self) -> "CalibrationOptions | None":
        """How to calibrate, if at all."""
        if self.calibrate is None:
            return None
        names = [field.name for field in fields(CalibrationOptions)]
        return CalibrationOptions(**mapping(self.calibrate, "surgery: calibrate", "options", keys=names))

    def saved_plan(self) -> Plan | None:
        """The saved plan, if one is given."""
        return None if self.plan is None else Plan.from_json(file_to_read(self.plan, "surgery: plan"))

    def convert(self, network: nn.Module) -> None:
        """Convert a network that takes one image batch, in place.

        The input size defaults to the one that timm gives for the network.

        Raises:
            ValueError: As :func:`~coconv_surgery.plan_conversion` and :func:`~coconv_surgery.apply_plan`.
        """
        plan = self.saved_plan()
        if plan is None:
            plan = plan_conversion(network, input_size=self.image_size, **self.choices())
        self.apply(network, plan)

    def apply(self, network: nn.Module, plan: Plan) -> nn.Module:
        """Convert a network by a plan, in place, and note how it is to be calibrated."""
        apply_plan(network, plan)
        vars(network).pop(_WISH, None)
        if (wish := self.calibration) is not None:
            vars(network)[_WISH] = wish
        return network

    def choices(self) -> dict[str, Any]:
        """The arguments of :func:`~coconv_surgery.plan_conversion`, except the input size."""
        overrides = {} if self.overrides is None else mapping(self.overrides, "overrides", "levels by pattern")
        overrides = {pattern: _answer(value, f"overrides[{pattern!r}]") for pattern, value in overrides.items()}
        return {
            "policy": _policy(self.policy),
            "include": self.include,
            "exclude": self.exclude,
            "overrides": overrides,
        }


def resized_to(pipeline: Sequence[Any]) -> Pair:
    """Height and width of the images that leave a data pipeline, before padding.

    mmcv's ``scale`` is (width, height). With ``keep_ratio`` it is (long side, short side), and the image is taken to
    be landscape.

    Args:
        pipeline: Configs of the transforms.

    Raises:
        ValueError: If no transform resizes to one scale.

    >>> resized_to([dict(type="Resize", scale=(1333, 800), keep_ratio=True)])
    (800, 1333)
    """
    scales = [transform for transform in _transforms(pipeline) if isinstance(transform.get("scale"), Sequence)]
    if not scales:
        raise ValueError("surgery: pipeline has no transform with scale=(width, height): give input_size instead")
    form = "is not (width, height): give input_size instead"
    width, height = whole_numbers(scales[-1]["scale"], "surgery: pipeline: scale", form, lengths=[2])
    return (min(width, height), max(width, height)) if scales[-1].get("keep_ratio") else (height, width)


def _transforms(tree: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, Mapping):
        yield tree
        yield from _transforms(tree.get("transforms", ()))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for branch in sequence(tree, "surgery: pipeline", "must be a list of transforms"):
            yield from _transforms(branch)


def _policy(policy: Any) -> str | Policy:
    if not isinstance(policy, Mapping):
        get_policy(policy)
        return cast(str | Policy, policy)
    settings = mapping(policy, "policy", "a type and its settings")
    name = instance(settings.pop("type", None), "the type of policy", str, "a name, as in dict(type='stage')")
    settings.pop("_scope_", None)
    return named_policy(name, **settings)


def _answer(value: Any, name: str) -> Answer | None:
    if not isinstance(value, Mapping):
        return cast(Answer | None, value)
    given = mapping(value, name, "dilations and splits", keys=Levels._fields)
    if "dilations" not in given:
        raise ValueError(f"{name} must have dilations, one for each level")
    return Levels(**given)
