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

from coconv_surgery.layers.arguments import shown
from coconv_surgery.layers.levels import Levels

KEY = "coconv_levels"
DIFFERENT = (
    "the network is not converted as the one that these weights come from was, and would compute something else with "
    "them. coconv_surgery.plan_of() says how that was converted; within coconv_surgery.unchecked_levels() they load "
    "all the same:"
)


class PlainWeightsWarning(UserWarning):
    """Weights in a converted network that come from a plain one, or do not say from which."""


class _Loading(threading.local):
    unchecked = False
    warned: list[str] | None = None  # the errors of the last network that was warned of, as it stands for the loading


_loading = _Loading()


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
    before, _loading.unchecked = _loading.unchecked, True
    try:
        yield
    finally:
        _loading.unchecked = before


def write_levels(state_dict: Mapping[str, Any], prefix: str, levels: Levels | None) -> None:
    """Note a convolution's levels in the metadata of a state dict, if it has any.

    Args:
        state_dict: As torch passes it to a module that saves itself.
        prefix: The same.
        levels: The levels, or None of a plain convolution.
    """
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None and levels is not None:
        metadata.setdefault(prefix[:-1], {})[KEY] = levels._asdict()


def may_load(
    state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], levels: Levels | None, errors: list[str]
) -> bool:
    """Compare what a state dict says of a convolution with its levels.

    Args:
        state_dict: As torch passes it to a module that is loaded.
        prefix: The same.
        metadata: The module's own part of the metadata.
        levels: The levels, or None of a plain convolution.
        errors: Takes the error if they differ, as torch's ``error_msgs``.

    Returns:
        Whether they agree, or it does not say.

    Warns:
        PlainWeightsWarning: Once for a network, if it is contextual, and the weights are not or do not say.
    """
    if _loading.unchecked or not any(name.startswith(prefix) for name in state_dict):
        return True
    noted = metadata.get(KEY)
    if noted is None:
        if levels is not None and _loading.warned is not errors:
            _loading.warned = errors
            _warn(known=bool(metadata))
        return True
    if levels is not None and noted == levels._asdict():
        return True
    if DIFFERENT not in errors:
        errors.append(DIFFERENT)
    own = "a plain convolution" if levels is None else _in_words(levels._asdict())
    errors.append(f"{prefix[:-1]}: {own}, the weights come from {_in_words(noted)}")
    return False


def _warn(*, known: bool) -> None:
    origin = "come from a network that was not converted" if known else "do not say how their network was converted"
    advice = "" if known else "; load_converted() reads files that do"
    warnings.warn(
        f"these weights {origin}: if it was otherwise than this one, or not at all, the outputs are wrong until it is "
        f"fine-tuned{advice}",
        PlainWeightsWarning,
        stacklevel=3,
    )


def _in_words(levels: Any) -> str:
    if not (isinstance(levels, Mapping) and levels.keys() == set(Levels._fields)):
        return f"something unknown ({shown(levels)})"
    return f"dilations {shown(levels['dilations'])} with {shown(levels['splits'])} channels"
