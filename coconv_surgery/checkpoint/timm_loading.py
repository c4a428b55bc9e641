"""timm keeps what a file says of its network's levels, so that a contextual convolution can compare them.

timm's loader takes the tensors out of a file, and leaves the metadata that torch saved with them, or the header of a
safetensors file, behind.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import timm.models._builder as timm_builder
import timm.models._helpers as timm_helpers

from coconv_surgery.checkpoint.origin import plan_of
from coconv_surgery.layers.levels import Levels
from coconv_surgery.layers.metadata import write_calibrated, write_levels


def keep_metadata() -> None:
    """Let timm's ``load_checkpoint`` and ``load_pretrained``, so ``create_model``, keep levels; it may be repeated."""
    timm_helpers.clean_state_dict = _clean_state_dict
    timm_helpers.load_state_dict = timm_builder.load_state_dict = _load_state_dict


_upstream_clean_state_dict = timm_helpers.clean_state_dict
_upstream_load_state_dict = timm_helpers.load_state_dict


def _clean_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    cleaned: dict[str, Any] = _upstream_clean_state_dict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    return cleaned if metadata is None else _with_metadata(cleaned, _upstream_clean_state_dict(metadata))


def _load_state_dict(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    state: dict[str, Any] = _upstream_load_state_dict(checkpoint_path, *args, **kwargs)
    if not str(checkpoint_path).endswith(".safetensors"):
        return state
    plan = plan_of(checkpoint_path)
    if plan is None:
        return state
    state = _with_metadata(state, {row.name: {"version": 1} for row in plan.rows})  # as torch notes every module
    for row in plan.converted:
        write_levels(state, f"{row.name}.", Levels(row.dilations, row.splits))
        write_calibrated(state, f"{row.name}.", plan.calibrated, stale=plan.stale)
    return state


def _with_metadata(state: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    held: Any = OrderedDict(state)  # a plain dict has no attributes
    held._metadata = metadata
    return cast(dict[str, Any], held)
