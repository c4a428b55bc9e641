"""What a state dict says, beside its tensors, of how their network was converted.

A plain and a converted network have the same weights by name and shape, so one loads into the other and computes
something else. torch keeps a dict of each module in the ``_metadata`` of a state dict, saves it along, and hands every
module its own on loading: there a contextual convolution writes its levels, and compares. It needs no new key.

What drops the metadata says nothing: safetensors, and whoever builds a new dict from the tensors.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn as nn

from coconv_surgery.layers.arguments import shown
from coconv_surgery.layers.levels import Levels

KEY = "coconv_levels"
CONV = "coconv_conv"
CALIBRATED = "coconv_calibrated"  # on how many images its kernels were calibrated, see mark_calibrated()
STALE = "coconv_stale"  # whether levels have changed since
_MARK = "_coconv_calibrated"
_STALE = "_coconv_stale"
_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
DIFFERENT = (
    "the network is not converted as the one that these weights come from was, and would compute something else with "
    "them. coconv_surgery.plan_of() says how that was converted; within coconv_surgery.unchecked_levels() they load "
    "all the same:"
)


class PlainWeightsWarning(UserWarning):
    """Weights in a converted network that come from a plain one, or do not say from which."""


class _Loading:
    """The loading of one network, which a module knows by the list that takes its errors."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        self.converted = False
        self.warned = False
        self.differences: list[str] = []  # which matter once a convolution shows that the weights were converted
        self.compared: str | None = None  # the prefix of the last convolution

    def report(self) -> None:
        """Make the differences errors, if they are."""
        if self.converted and self.differences:
            self.errors += self.differences if DIFFERENT in self.errors else [DIFFERENT, *self.differences]
            self.differences.clear()


class _State(threading.local):
    unchecked = False
    loading = _Loading([])


_state = _State()


@contextmanager
def unchecked_levels() -> Iterator[None]:
    """Load weights into contextual convolutions without a look at the levels that they were trained with.

    It holds for the thread that enters it.

    >>> from coconv_surgery import CoConv2d
    >>> conv = CoConv2d(8, 8, 3, padding=1, dilations=(1, 2))
    >>> other = CoConv2d(8, 8, 3, padding=1, dilations=(1, 3))
    >>> with unchecked_levels():
    ...     other.load_state_dict(conv.state_dict())
    <All keys matched successfully>
    """
    before, _state.unchecked = _state.unchecked, True
    try:
        yield
    finally:
        _state.unchecked = before


def write_levels(state_dict: Mapping[str, Any], prefix: str, levels: Levels, conv: nn.Conv2d | None = None) -> None:
    """Note a convolution's levels in the metadata of a state dict, if it has any.

    Args:
        state_dict: As torch passes it to a module that saves itself.
        prefix: The same.
        levels: The levels.
        conv: The convolution, to note what it is as well.
    """
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is None:
        return
    own = metadata.setdefault(prefix[:-1], {})
    own[KEY] = levels._asdict()
    if conv is not None:
        own[CONV] = {name: _in_numbers(getattr(conv, name)) for name in _ARGUMENTS}
        write_calibrated(state_dict, prefix, calibrated_on(conv), stale=is_stale(conv))


def write_calibrated(state_dict: Mapping[str, Any], prefix: str, images: int, *, stale: bool) -> None:
    """Note in the metadata of a state dict, which has levels there, how a convolution's kernels were calibrated.

    Args:
        state_dict: As of :func:`write_levels`.
        prefix: The same.
        images: On how many images; 0 notes nothing.
        stale: Whether levels of its network have changed since.
    """
    own = getattr(state_dict, "_metadata", {}).get(prefix[:-1], {})
    if images:
        own.update({CALIBRATED: images, STALE: True} if stale else {CALIBRATED: images})


def calibrated_on(conv: nn.Module) -> int:
    """On how many images a convolution's kernels were calibrated; 0 if they were not."""
    images: int = vars(conv).get(_MARK, 0)
    return images


def is_stale(conv: nn.Module) -> bool:
    """Whether levels of its network have changed since a convolution's kernels were calibrated."""
    return _STALE in vars(conv)


def mark_calibrated(conv: nn.Module, images: int, *, stale: bool = False) -> None:
    """Keep in mind on how many images a convolution's kernels were calibrated, until a state dict says otherwise.

    The mark stays when the convolution becomes plain, for its kernels are no plain one's.

    Args:
        conv: The convolution.
        images: How many; 0 for kernels that were not.
        stale: Whether levels of its network have changed since.
    """
    for name in (_MARK, _STALE):
        vars(conv).pop(name, None)
    if not images:
        return
    vars(conv).update({_MARK: images, _STALE: True} if stale else {_MARK: images})
    held = [getattr(hook, "hook", None) for hook in conv._load_state_dict_pre_hooks.values()]
    if _read_mark not in held:
        conv._register_load_state_dict_pre_hook(_read_mark, with_module=True)  # type: ignore[no-untyped-call]


def _read_mark(
    conv: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    kernels = state_dict.get(f"{prefix}weight")
    levels = getattr(conv, "contextual_levels", None)
    if kernels is None or (KEY in metadata and levels_differ(metadata, levels) is not None):
        return  # none are loaded
    told = metadata.get(CALIBRATED)
    if isinstance(told, int):
        mark_calibrated(conv, told, stale=STALE in metadata)
    elif "version" in metadata:  # else they may be a state of this network that somebody has kept
        mark_calibrated(conv, 0)


def compare_plain(
    state_dict: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """Report weights of a contextual convolution that come into a plain one: a hook before loading.

    Args:
        state_dict: As torch passes it, like all that follow.
        prefix: The same.
        metadata: The same.
        strict: The same.
        missing_keys: The same.
        unexpected_keys: The same.
        errors: The same.
    """
    # A contextual one has compared by itself, and so has one with such a hook of a larger network as well.
    if _state.loading.errors is not errors or _state.loading.compared != prefix:
        may_load(None, state_dict, prefix, metadata, errors)


def forget_levels(state_dict: Mapping[str, Any]) -> None:
    """Take all levels out of a state dict's metadata."""
    for metadata in getattr(state_dict, "_metadata", {}).values():
        metadata.pop(KEY, None)


def may_load(
    levels: Levels | None,
    state_dict: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    errors: list[str],
) -> bool:
    """Compare what a state dict says of a convolution with its levels.

    Args:
        levels: The convolution's levels, or None if it computes what a plain one does.
        state_dict: As torch passes it to a module that is loaded.
        prefix: The same.
        metadata: The module's own part of the metadata.
        errors: Takes the error if they differ, as torch's ``error_msgs``.

    Returns:
        Whether to load it: they agree, or it does not say, or nothing that was loaded before it was contextual.

    Warns:
        PlainWeightsWarning: Once for a network, if it is contextual, and the weights are not or do not say.
    """
    if _state.unchecked or not any(name.startswith(prefix) for name in state_dict):
        return True
    if _state.loading.errors is not errors:
        _state.loading = _Loading(errors)
    loading, difference = _state.loading, levels_differ(metadata, levels)
    loading.compared = prefix
    loading.converted |= KEY in metadata
    if difference is not None:
        loading.differences.append(f"{prefix[:-1]}: {difference}")
    loading.report()
    if levels is not None and KEY not in metadata and not (loading.converted or loading.warned):
        loading.warned = True
        _warn(known="version" in metadata)
    return difference is None or not loading.converted


def levels_differ(metadata: Mapping[str, Any], levels: Levels | None) -> str | None:
    """Say in words where the levels of a convolution are not those that its part of the metadata tells.

    That a convolution was plain counts in weights of a converted network alone; others start a fine-tuning.

    Args:
        metadata: Its part.
        levels: Its levels, or None of what is no contextual convolution.

    Returns:
        The difference; None if there is none, or nothing is told, or levels are not to be checked.
    """
    own, noted = None if levels is None else levels._asdict(), metadata.get(KEY)
    if own == noted or _state.unchecked or (noted is None and "version" not in metadata):
        return None
    mine, theirs = ("plain" if told is None else _in_words(told) for told in (own, noted))
    return f"{mine}, the weights come from {'a plain one' if noted is None else theirs}"


def _warn(*, known: bool) -> None:
    said = (
        "come from plain convolutions where this network has contextual ones: outputs are wrong until it is fine-tuned"
        if known
        else "do not say how their network was converted: if not as this one is, outputs are wrong until this one is "
        "fine-tuned; load_converted() reads files that say it"
    )
    # Explicit, as warn() shows what comes from one place once: this is for every network that is loaded.
    warnings.warn_explicit(f"these weights {said}", PlainWeightsWarning, __name__, 0)


def _in_numbers(value: Any) -> Any:
    # The safe loader knows Python's own alone.
    if isinstance(value, str):
        return value
    return tuple(map(_in_numbers, value)) if isinstance(value, tuple) else int(value)


def _in_words(levels: Any) -> str:
    if not (isinstance(levels, Mapping) and levels.keys() == set(Levels._fields)):
        return f"something unknown ({shown(levels)})"
    return f"dilations {shown(levels['dilations'])} with {shown(levels['splits'])} channels"
