"""Contextual convolution.

Paper: Duta, Georgescu, Ionescu, "Contextual Convolutional Neural Networks", ICCV Workshops 2021.

A CoConv splits the output channels of one convolution over several levels. Every level sees the whole input through
kernels of its own dilation, so local detail and context come out of one layer, at the parameters and FLOPs of a plain
convolution (Eqs. 1 to 3).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import torch
import torch.fx
import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized

from coconv_surgery.functional import Dilation, Pair, coconv2d, level_padding, pair

SplitRule = Literal["pow2", "even"]

torch.fx.wrap("coconv2d")  # one node of a graph, as the convolution it replaces is


def split_channels(channels: int, levels: int, rule: SplitRule = "pow2") -> tuple[int, ...]:
    """Share output channels out over levels.

    Args:
        channels: Number of output channels.
        levels: Number of levels, at most ``channels``.
        rule: ``"pow2"`` (Table 1, and the authors' code) works in units of ``channels / P``, with P the next power of
            two ≥ ``levels``; the units left over go one each to the first levels. ``"even"`` (Table 2) shares evenly.

    Returns:
        One count a level, each at least 1. They always sum up to ``channels``: what does not divide goes to the
        first level.

    Raises:
        ValueError: If the rule is unknown or there are more levels than channels.

    >>> split_channels(128, 3)
    (64, 32, 32)
    >>> split_channels(512, 3, "even")
    (172, 170, 170)
    """
    if rule not in get_args(SplitRule):
        raise ValueError(f"unknown split rule {rule!r}: choose one of {', '.join(map(repr, get_args(SplitRule)))}")
    if not 1 <= levels <= channels:
        raise ValueError(f"cannot split {channels} channels over {levels} levels: every level needs at least one")
    if rule == "even":
        shares = [channels // levels] * levels
    else:
        units = 1 << (levels - 1).bit_length()
        spare = units - levels
        shares = [max(1, channels * (2 if level < spare else 1) // units) for level in range(levels)]
    shares[0] += channels - sum(shares)
    return tuple(shares)


def check_levels(conv: nn.Conv2d, dilations: Sequence[Dilation], splits: Sequence[int]) -> None:
    """Check that a convolution can be split into these levels.

    Raises:
        ValueError: With the reason, if it cannot.
    """
    kernel, base = pair(conv.kernel_size), pair(conv.dilation)
    if not dilations or len(dilations) != len(splits):
        raise ValueError(f"dilations {tuple(dilations)} and splits {tuple(splits)} must have one entry for each level")
    if any(channels < 1 for channels in splits) or sum(splits) != conv.out_channels:
        raise ValueError(f"splits {tuple(splits)} must be positive and sum up to the {conv.out_channels} out_channels")
    _, unit = level_units(conv)
    if any(channels % unit for channels in splits):
        raise ValueError(
            f"splits {tuple(splits)} cut through a group: with groups={conv.groups} every level must be a multiple of "
            f"{unit} channels, so that each weight row keeps its input channels"
        )
    if any(min(pair(dilation)) < 1 for dilation in dilations):
        raise ValueError(f"dilations {tuple(dilations)} must be at least 1")
    if is_plain(conv, dilations):
        return
    if kernel == (1, 1):
        raise ValueError("a 1×1 kernel has no dilation: it cannot take several levels")
    if any(side % 2 == 0 for side in kernel):
        raise ValueError(f"kernel_size {kernel} is even: no symmetric padding keeps the output size at other dilations")
    for dilation in dilations:
        if min(level_padding(kernel, conv.padding, base, pair(dilation))) < 0:
            raise ValueError(
                f"dilation {dilation} with padding {conv.padding} would need negative padding to keep the output size: "
                f"use dilations of at least the conv's own, {conv.dilation}"
            )


def is_plain(conv: nn.Conv2d, dilations: Sequence[Dilation]) -> bool:
    """Whether these levels are the convolution itself: one level, at its own dilation."""
    return [pair(dilation) for dilation in dilations] == [pair(conv.dilation)]


def level_units(conv: nn.Conv2d) -> tuple[int, int]:
    """How finely a convolution's outputs can be split: the number of units, and the channels in each.

    A unit is one output channel, or one whole group where the convolution is grouped.
    """
    return (conv.out_channels, 1) if conv.groups == 1 else (conv.groups, conv.out_channels // conv.groups)


def default_levels(
    conv: nn.Conv2d,
    levels: int | None = None,
    dilations: Sequence[Dilation] | None = None,
    splits: Sequence[int] | SplitRule = "pow2",
) -> tuple[tuple[Dilation, ...], tuple[int, ...]]:
    """Fill in what the caller left out: the dilations and splits of every level.

    Args:
        conv: The convolution to be split.
        levels: Number of levels; level k then has k times the convolution's own dilation.
        dilations: Dilation of each level, instead of ``levels``.
        splits: Output channels of each level, or the name of a split rule.

    Raises:
        ValueError: If the convolution cannot be split this way.
    """
    if (levels is None) == (dilations is None):
        raise ValueError("give either levels= (a number) or dilations= (one for each level)")
    if dilations is None:
        assert levels is not None
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1")
        dilations = scale_dilations(conv.dilation, range(1, levels + 1))
    chosen = tuple(_squeeze(dilation) for dilation in dilations)
    if isinstance(splits, str):
        units, size = level_units(conv)
        if len(chosen) > units:
            kind = "groups" if conv.groups > 1 else "out_channels"
            raise ValueError(f"{len(chosen)} levels need at least as many {kind}, and this conv has {units}")
        splits = [share * size for share in split_channels(units, max(1, len(chosen)), splits)]
    check_levels(conv, chosen, splits)
    return chosen, tuple(splits)


def scale_dilations(dilation: int | Sequence[int], factors: Iterable[int]) -> tuple[Dilation, ...]:
    """Multiples of a convolution's own dilation.

    >>> scale_dilations((2, 2), (1, 2, 3))
    (2, 4, 6)
    """
    height, width = pair(dilation)
    return tuple(_squeeze((factor * height, factor * width)) for factor in factors)


class CoConv2d(nn.Conv2d):
    """Contextual 2D convolution: a :class:`torch.nn.Conv2d` whose output channels are split over dilation levels.

    It has the parameters, state-dict keys and FLOPs of the plain convolution (Eq. 2). ``stride``, ``padding``,
    ``dilation`` and ``groups`` are the plain convolution's; each level gets the padding that keeps its output size.

    Args:
        in_channels: Input channels.
        out_channels: Output channels, over all levels.
        kernel_size: Odd along both axes unless there is one level.
        stride: As in :class:`torch.nn.Conv2d`.
        padding: As in :class:`torch.nn.Conv2d`, for the plain convolution.
        dilation: Of the plain convolution.
        groups: A level holds whole groups.
        bias: Whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        levels: Number of levels: level k has k times ``dilation``. Default 1 where ``dilations`` is not given.
        dilations: Dilation of each level, instead of ``levels``.
        splits: Output channels of each level, or a rule, see :func:`split_channels`. Default ``"pow2"``.

    Attributes:
        levels (int): Number of levels.
        dilations (tuple): Dilation of each level, a pair where the axes differ.
        splits (tuple): Output channels of each level.

    Raises:
        ValueError: If the convolution cannot be split this way.

    >>> CoConv2d(64, 64, 3, padding=1, levels=3)
    CoConv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilations=(1, 2, 3), splits=(32, 16, 16))
    """

    dilations: tuple[Dilation, ...]
    splits: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        levels: int | None = None,
        dilations: Sequence[Dilation] | None = None,
        splits: Sequence[int] | SplitRule = "pow2",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if levels is None and dilations is None:
            levels = 1
        self.dilations, self.splits = default_levels(self, levels, dilations, splits)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        levels: int | None = None,
        *,
        dilations: Sequence[Dilation] | None = None,
        splits: Sequence[int] | SplitRule = "pow2",
    ) -> "CoConv2d":
        """Build a contextual convolution that shares a convolution's parameters.

        Args:
            conv: A plain convolution, left as it is. Its parameters are shared, not copied.
            levels: As in the class.
            dilations: As in the class.
            splits: As in the class.

        Raises:
            ValueError: If the convolution cannot be split this way.

        >>> conv = nn.Conv2d(8, 8, 3, padding=1)
        >>> CoConv2d.from_conv(conv, levels=2).weight is conv.weight
        True
        """
        if "weight" not in conv._parameters:
            raise ValueError(
                "the weight is computed from other parameters, as by weight_norm: use to_coconv_() instead"
            )
        if type(conv) not in (nn.Conv2d, CoConv2d):
            raise ValueError(f"a {type(conv).__name__} does more than an nn.Conv2d: use to_coconv_() instead")
        chosen, shares = default_levels(conv, levels, dilations, splits)
        coconv = cls(
            conv.in_channels,
            conv.out_channels,
            pair(conv.kernel_size),
            pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else pair(conv.padding),
            pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
            dilations=chosen,
            splits=shares,
        )
        coconv.weight, coconv.bias = conv.weight, conv.bias
        return coconv.train(conv.training)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.dilations)

    # mmcv's and mmengine's conv-BN evaluation call this method with weights of their own, so it is the one to override.
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if is_plain(self, self.dilations):
            output: torch.Tensor = super()._conv_forward(input, weight, bias)
            return output
        return coconv2d(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            dilations=self.dilations,
            splits=self.splits,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        """The plain convolution's arguments, then the levels."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, dilations={self.dilations}, splits={self.splits}"


# The contextual class of every convolution class that has one: registered, and made for those that inherit a forward.
_REGISTERED: dict[type[nn.Conv2d], type[CoConv2d]] = {nn.Conv2d: CoConv2d}
_INHERITED: dict[type[nn.Conv2d], type[CoConv2d]] = {}
# All that were ever in use: what one of them replaced can come back, even where another was registered since.
_CONTEXTUAL: set[type[CoConv2d]] = {CoConv2d}
_FORWARD = ("__call__", "forward", "_conv_forward")
_CoConvClass = TypeVar("_CoConvClass", bound=type[CoConv2d])


def register_coconv(cls: _CoConvClass) -> _CoConvClass:
    """Make a subclass of ``nn.Conv2d`` that has a forward of its own eligible for conversion; a class decorator.

    The decorated class derives from :class:`CoConv2d` and from the class it stands for, in this order. It does what
    that class does, but convolves by ``self._conv_forward(input, weight, bias)``, which applies the levels. A
    conversion switches a module from the one class to the other, without calling ``__init__``. Subclasses that inherit
    all of their forward from ``nn.Conv2d`` or from a registered class need no registration.

    Args:
        cls: The contextual class. If the class that it stands for has one already, it replaces that.

    Returns:
        The same class.

    Raises:
        TypeError: If it does not derive from :class:`CoConv2d` and one other convolution class.

    >>> class HalvedConv2d(nn.Conv2d):
    ...     def forward(self, input):
    ...         return F.conv2d(input, self.weight / 2, self.bias, self.stride, self.padding)
    >>> @register_coconv
    ... class CoHalvedConv2d(CoConv2d, HalvedConv2d):
    ...     def forward(self, input):
    ...         return self._conv_forward(input, self.weight / 2, self.bias)
    >>> conv = HalvedConv2d(8, 8, 3, padding=1)
    >>> to_coconv_(conv, (1, 2), (4, 4))
    >>> type(conv).__name__
    'CoHalvedConv2d'
    """
    if not (isinstance(cls, type) and issubclass(cls, CoConv2d)) or plain_class(cls) is nn.Conv2d:
        raise TypeError(
            f"{getattr(cls, '__name__', cls)} must derive from CoConv2d and then from the convolution class it stands "
            "for: class CoMyConv2d(CoConv2d, MyConv2d)"
        )
    _REGISTERED[plain_class(cls)] = cls
    _CONTEXTUAL.add(cls)
    return cls


def plain_class(cls: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """The class that a contextual class stands for; any other class is its own.

    >>> plain_class(CoConv2d).__name__
    'Conv2d'
    """
    if not issubclass(cls, CoConv2d):
        return cls
    behind = cls.__mro__[cls.__mro__.index(CoConv2d) + 1 :]
    return next(base for base in behind if issubclass(base, nn.Conv2d))


def contextual_class(cls: type[nn.Conv2d]) -> type[CoConv2d] | None:
    """The class that a convolution of some class is switched to, or None where it has a forward that none is known for.

    A class that inherits its forward gets the contextual class of the one that it inherits from, mixed with itself.
    """
    if cls in _REGISTERED:
        return _REGISTERED[cls]
    if cls not in _INHERITED:
        bases = (base for base in cls.__mro__ if base in _REGISTERED)
        base = next((base for base in bases if all(getattr(cls, n) is getattr(base, n) for n in _FORWARD)), None)
        if base is None:
            return None
        members = {"__module__": cls.__module__, "__reduce_ex__": _reduce_ex}
        _INHERITED[cls] = type(f"Co{cls.__name__}", (_REGISTERED[base], cls), members)
        _CONTEXTUAL.add(_INHERITED[cls])
    return _INHERITED[cls]


def is_switchable(conv: nn.Conv2d) -> bool:
    """Whether a convolution's class, plain or contextual, can be switched to the other one."""
    cls = _class_of(conv)
    return cls in _CONTEXTUAL if issubclass(cls, CoConv2d) else contextual_class(cls) is not None


def to_coconv_(conv: nn.Conv2d, dilations: Sequence[Dilation], splits: Sequence[int]) -> None:
    """Turn a convolution into a :class:`CoConv2d` in place, or give a contextual one new levels.

    Only the module's class changes and the levels are set: parameters, hooks, flags and every reference to the module
    stay what they are. :func:`to_conv_` is the inverse.

    Args:
        conv: An ``nn.Conv2d`` (its parameters may be parametrized), one of a subclass that inherits its forward or is
            known by :func:`register_coconv`, or a :class:`CoConv2d`.
        dilations: Dilation of each level.
        splits: Output channels of each level.

    Raises:
        TypeError: If it is of a subclass with a forward of its own that none is registered for.
        ValueError: If the convolution cannot be split this way. In either case it is left as it was.

    >>> conv = nn.Conv2d(8, 8, 3, padding=1)
    >>> to_coconv_(conv, (1, 2), (4, 4))
    >>> conv
    CoConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilations=(1, 2), splits=(4, 4))
    """
    check_levels(conv, dilations, splits)
    if not isinstance(conv, CoConv2d):
        cls = contextual_class(_class_of(conv))
        if cls is None:
            raise TypeError(f"{type(conv).__name__} has a forward of its own: tell its levels with register_coconv()")
        _switch_class(conv, cls)
    coconv = cast(CoConv2d, conv)
    coconv.dilations, coconv.splits = tuple(dilations), tuple(splits)


def to_conv_(coconv: CoConv2d) -> None:
    """Turn a contextual convolution into the plain one it replaces, in place.

    Raises:
        TypeError: If it is no contextual convolution.
    """
    if not isinstance(coconv, CoConv2d):
        raise TypeError(f"to_conv_ takes a CoConv2d, not a {type(coconv).__name__}")
    _switch_class(coconv, plain_class(type(coconv)))
    del coconv.dilations, coconv.splits


def _class_of(conv: nn.Conv2d) -> type[nn.Conv2d]:
    # torch gives each parametrized module a class of its own, derived from the class it had.
    return cast(type[nn.Conv2d], type(conv).__base__) if is_parametrized(conv) else type(conv)


def _switch_class(module: nn.Conv2d, cls: type[nn.Conv2d]) -> None:
    if is_parametrized(module):
        own = type(module)
        members = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    module.__class__ = cls


def _reduce_ex(self: CoConv2d, protocol: Any) -> tuple[Any, ...]:
    # A class that contextual_class() made has no name that it could be unpickled by.
    state: Any = cast(Any, self).__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _new_instance, (plain_class(type(self)),), state


def _new_instance(plain: type[nn.Conv2d]) -> CoConv2d:
    cls = contextual_class(plain)
    assert cls is not None
    return cls.__new__(cls)


def _squeeze(dilation: Dilation) -> Dilation:
    height, width = pair(dilation)
    return height if height == width else (height, width)
