"""The switch of a module's class in place, and which contextual class stands for which convolution class."""

import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch.nn as nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from coconv_surgery.layers.arguments import instance, shown
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import Dilation
from coconv_surgery.layers.levels import Levels, SplitRule, complete_levels
from coconv_surgery.layers.rollback import restorer

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
            f"cls={shown(cls)} must derive from CoConv2d and then from the convolution class it stands for: "
            "class CoMyConv2d(CoConv2d, MyConv2d)"
        )
    _CONTEXTUAL.add(cls)
    _REGISTERED[plain_class(cls)] = cls
    _INHERITED.clear()
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
        made = make_subclass(f"Co{cls.__name__}", (_REGISTERED[base], cls), contextual_class, cls)
        _CONTEXTUAL.add(cast(type[CoConv2d], made))
        _INHERITED[cls] = cast(type[CoConv2d], made)
    return _INHERITED[cls]


def is_contextual_name(name: str) -> bool:
    """Whether a class of this name, without its module, is a contextual one."""
    return any(cls.__name__ == name for cls in _CONTEXTUAL)


def is_switchable(conv: nn.Conv2d) -> bool:
    """Whether a convolution's class, plain or contextual, can be switched to the other one."""
    cls = cast(type[nn.Conv2d], type_before_parametrizations(conv))
    return cls in _CONTEXTUAL if issubclass(cls, CoConv2d) else contextual_class(cls) is not None


# What a contextual convolution has besides what every convolution has.
_OWN_NAMES = {name for name in {*dir(CoConv2d)} - {*dir(nn.Conv2d)} if not name.startswith("_")}


def hidden_attributes(conv: nn.Module) -> list[str]:
    """Attributes of a plain convolution that a contextual one would hide behind its own."""
    if isinstance(conv, CoConv2d):
        return []
    return [name for name in sorted(_OWN_NAMES) if has_attribute(conv, name)]


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute, without evaluating it as ``hasattr`` does."""
    held = (vars(module), module._parameters, module._buffers, module._modules)
    return any(name in table for table in held) or hasattr(type(module), name)


def to_coconv_(conv: nn.Conv2d, dilations: Sequence[Dilation], splits: Sequence[int] | SplitRule = "pow2") -> None:
    """Turn a convolution into a :class:`CoConv2d` in place, or give a contextual one new levels.

    Only the module's class changes and the levels are set: parameters, hooks, flags and every reference to the module
    stay what they are. :func:`to_conv_` is the inverse.

    Args:
        conv: An ``nn.Conv2d`` (its parameters may be parametrized), one of a subclass that inherits its forward or is
            known by :func:`register_coconv`, or a :class:`CoConv2d`.
        dilations: Dilation of each level.
        splits: Output channels of each level, or the name of a split rule.

    Raises:
        TypeError: If it is of a subclass with a forward of its own that none is registered for, has attributes that the
            levels would hide, or is a lazy one without weights.
        ValueError: If the convolution cannot be split this way. In any case it is left as it was.

    >>> conv = nn.Conv2d(8, 8, 3, padding=1)
    >>> to_coconv_(conv, (1, 2), (4, 4))
    >>> conv
    CoConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilations=(1, 2), splits=(4, 4))
    """
    instance(conv, "conv", nn.Conv2d, "an nn.Conv2d")
    set_levels_(conv, complete_levels(conv, dilations=dilations, splits=splits))


def set_levels_(conv: nn.Conv2d, levels: Levels) -> None:
    """Do what :func:`to_coconv_` does, with levels that :func:`~coconv_surgery.layers.levels.check_levels` has passed.

    Args:
        conv: As of :func:`to_coconv_`.
        levels: Its levels, in numbers.

    Raises:
        TypeError: As :func:`to_coconv_`.
    """
    if isinstance(conv, LazyModuleMixin) and conv.has_uninitialized_params():
        raise TypeError(f"{type(conv).__name__} has no weights yet and will change its class: run it once first")
    contextual = isinstance(conv, CoConv2d)
    cls = None if contextual else contextual_class(cast(type[nn.Conv2d], type_before_parametrizations(conv)))
    if cls is None and not contextual:
        raise TypeError(f"{type(conv).__name__} has a forward of its own: tell its levels with register_coconv()")
    if hidden := hidden_attributes(conv):
        raise TypeError(f"{type(conv).__name__} has attributes of its own named {', '.join(hidden)}: rename them first")
    with ExitStack() as undo:
        undo.callback(restorer(conv))
        vars(conv)["_coconv_levels"] = levels
        if cls is not None:
            switch_class(conv, cls)
        undo.pop_all()


def to_conv_(coconv: CoConv2d) -> None:
    """Turn a contextual convolution into the plain one it replaces, in place.

    Raises:
        TypeError: If it is not a contextual convolution.
    """
    instance(coconv, "coconv", CoConv2d, "a CoConv2d")
    with ExitStack() as undo:
        undo.callback(restorer(coconv))
        switch_class(coconv, plain_class(cast(type[nn.Conv2d], type_before_parametrizations(coconv))))
        del vars(coconv)["_coconv_levels"]
        undo.pop_all()


def switch_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class in place; what is parametrized stays so."""
    if is_parametrized(module):
        own = type(module)
        members = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), members)
    module.__class__ = cls


class _Quiet:
    """Comes first among the bases of a class that is made for a switch: the user's class is not told of a subclass."""

    def __init_subclass__(cls) -> None:
        pass


def make_subclass(
    name: str,
    bases: tuple[type, ...],
    make: Callable[..., Any],
    *key: Any,
    members: Mapping[str, Any] | None = None,
) -> type:
    """Make a class that modules are switched to; they copy and pickle, though it has no name to be found by.

    Args:
        name: Its name.
        bases: Its bases, the last of which is the class that the modules had.
        make: Makes the class again, in another process.
        *key: What ``make`` is called with.
        members: Further attributes.
    """
    plain = bases[-1]

    def reduce_ex(module: Any, protocol: Any) -> tuple[Any, ...]:
        function, args, *state = cast(Any, plain).__reduce_ex__(module, protocol)
        args = tuple(plain if arg is type(module) else arg for arg in args)
        return (_new_instance, (function, args, make, key), *state)

    body = {"__module__": plain.__module__, "__reduce_ex__": reduce_ex, **(members or {})}
    return types.new_class(name, (_Quiet, *bases), exec_body=lambda namespace: namespace.update(body))


def _new_instance(function: Callable[..., Any], args: tuple[Any, ...], make: Callable[..., Any], key: Any) -> Any:
    module = function(*args)
    module.__class__ = make(*key)
    return module
