"""Detectors that are converted while their configs build them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn as nn
from mmdet.registry import MODELS

from coconv_surgery.layers.arguments import instance, near_miss
from coconv_surgery.mmdet.inputs import example_inputs
from coconv_surgery.mmengine.options import SurgeryOptions
from coconv_surgery.planning.plan import Plan, PlanRow
from coconv_surgery.surgery import get_plan, plan_conversion


def build_converted(detector_type: str, surgery: Mapping[str, Any], **detector: Any) -> nn.Module:
    """Build the detector that ``dict(type='CoConvSurgery', detector_type=..., surgery=..., ...)`` stands for.

    On top of any detector's config, this keeps the config's shape, so that mmdet's tools find ``cfg.model.backbone``
    and the like where they expect them::

        _base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
        custom_imports = dict(imports=['coconv_surgery.mmdet'], allow_failed_imports=False)
        model = dict(
            type='CoConvSurgery',
            detector_type='RetinaNet',
            surgery=dict(pipeline={{_base_.test_pipeline}}, include=['backbone.*']),
        )

    A builder sees the model's config but not the data's: either ``pipeline`` or ``input_size=(800, 1333)`` says how
    large the images are. They are padded as the detector's data preprocessor pads them.

    Convolutions that the config itself makes contextual, such as those of a CoResNet, keep their levels.

    The map sizes come from a forward pass in mode ``"tensor"``. Where that needs numbers (the proposals of two-stage
    detectors), it is a real pass on the CPU at the full image size: some seconds and gigabytes. To save them, save the
    plan and give ``surgery=dict(plan='coconv_plan.json')``.

    Args:
        detector_type: The ``type`` that the config had.
        surgery: What to convert; the keys of :class:`~coconv_surgery.mmengine.SurgeryOptions`.
        **detector: The other keys of the model's config.

    Returns:
        The detector, an instance of its own class, with contextual convolutions.

    Raises:
        ValueError: If the detector type or a key of ``surgery`` is unknown, the image size is missing, or as
            :func:`~coconv_surgery.plan_conversion`.
    """
    options = SurgeryOptions.read(surgery)
    if MODELS.get(instance(detector_type, "detector_type", str, "the name of a detector")) is None:
        hint = near_miss(detector_type, MODELS.module_dict) or "is its module among custom_imports?"
        raise ValueError(f"unknown detector_type {detector_type!r}: {hint}")
    size, plan, choices = options.image_size, options.saved_plan(), options.choices()
    if size is None and plan is None:
        raise ValueError(
            "surgery: how large are the images? Give input_size=(height, width), or the pipeline that resizes them: "
            "pipeline={{_base_.test_pipeline}}"
        )
    model: nn.Module = MODELS.build(dict(type=detector_type, **detector))
    if plan is None:
        assert size is not None
        plan = _keep_contextual(plan_conversion(model, example_inputs=example_inputs(model, size), **choices), model)
    return options.apply(model, plan)


def _keep_contextual(plan: Plan, model: nn.Module) -> Plan:
    found = {row.name: row for row in get_plan(model).converted}

    def keep(row: PlanRow) -> PlanRow:
        own = found.get(row.name)
        return row if own is None else replace(row, dilations=own.dilations, splits=own.splits, reason=None)

    return replace(plan, rows=tuple(map(keep, plan.rows)))
