"""Folders of the Hugging Face hub, written and read by timm, that rebuild a converted network."""

from contextlib import ExitStack
from typing import Any

import timm
import torch.nn as nn
from timm.models import register_model

from coconv_surgery.layers.arguments import instance
from coconv_surgery.layers.metadata import unchecked_levels
from coconv_surgery.planning.notes import is_guarded
from coconv_surgery.planning.plan import read_plan_text
from coconv_surgery.surgery import apply_plan, complete_plan, get_plan
from coconv_surgery.tracing.finding import find_intact_sites
from coconv_surgery.tracing.switching import mark_calibrated

__all__ = ["hub_arguments"]  # timm adds the name of the network


def hub_arguments(model: nn.Module) -> dict[str, Any]:
    """What timm's ``save_for_hf`` and ``push_to_hf_hub`` must be told of a converted network.

    timm writes down which network a folder holds, and would build the plain one again. With these arguments the folder
    holds the plan too, and where ``coconv_surgery`` is imported ``timm.create_model`` builds the converted network::

        timm.models.save_for_hf(model, "folder", **cs.hub_arguments(model))
        timm.create_model("local-dir:folder", pretrained=True, num_classes=10)

    Where it is not imported, timm says that it knows no model ``coconv_converted``.

    Args:
        model: A network that timm built.

    Returns:
        Keyword arguments.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If timm did not build it, or it is guarded, see :func:`guard`: the folder needs no guard.
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"timm did not build {type(model).__name__}, so it cannot build it again: use save_converted()"
        )
    if any(map(is_guarded, model.modules())):
        raise ValueError(
            "the network holds a guard, which timm would find unexpected: take it out by guard(model, False)"
        )
    return {
        "model_config": {"architecture": coconv_converted.__name__},
        "model_args": {"network": name, "plan": get_plan(model).to_json()},
    }


@register_model  # type: ignore[untyped-decorator]
def coconv_converted(pretrained: bool = False, *, network: str, plan: str, **kwargs: Any) -> nn.Module:
    """A converted network that timm built: what a folder written with :func:`hub_arguments` names.

    Args:
        pretrained: Whether to load the folder's weights.
        network: timm's name of it.
        plan: Its plan, as JSON.
        **kwargs: As of :func:`timm.create_model`.

    Raises:
        PlanError: If the plan is none, or does not fit the network.
    """
    told = read_plan_text(plan, "the plan in the folder's config.json")
    with unchecked_levels():  # the folder's weights are those of this plan
        model: nn.Module = timm.create_model(network, pretrained=pretrained, **kwargs)
    apply_plan(model, complete_plan(model, told))  # of other input channels than the folder's, for one
    if pretrained:
        with ExitStack() as undo:
            mark_calibrated(find_intact_sites(model), told.calibrated, undo, stale=told.stale)
            undo.pop_all()
    return model
