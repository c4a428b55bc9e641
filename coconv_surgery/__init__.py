"""Contextual convolution (CoConv) for the networks you already have."""

import coconv_surgery.layers.timm_convs  # noqa: F401  registers them
from coconv_surgery.calibration import CalibratedLayer, Calibration, CalibrationError, calibrate
from coconv_surgery.checkpoint import (
    CheckpointError,
    guard,
    hub_arguments,
    load_converted,
    plan_of,
    read_plan,
    save_converted,
)
from coconv_surgery.deployment import Deployment, DeploymentError, deploy, get_deployment
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.depthwise import build_depthwise
from coconv_surgery.layers.functional import coconv2d
from coconv_surgery.layers.levels import Levels, split_channels
from coconv_surgery.layers.metadata import PlainWeightsWarning, unchecked_levels
from coconv_surgery.layers.switch import register_coconv, to_coconv_, to_conv_
from coconv_surgery.planning.plan import Plan, PlanError, PlanRow
from coconv_surgery.planning.policies import Policy, ResolutionPolicy, StagePolicy, TopPolicy, UniformPolicy
from coconv_surgery.planning.reasons import Reason
from coconv_surgery.receptive.effective import EffectiveField, effective_receptive_field
from coconv_surgery.receptive.theoretical import FieldReport, LayerField, receptive_fields
from coconv_surgery.surgery import (
    CalibratedWeightsWarning,
    NoChangeWarning,
    PlainCopyWarning,
    apply_plan,
    convert,
    get_plan,
    plan_conversion,
    revert,
)
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.zoo import CoResNet, export_authors_state_dict, load_authors_checkpoint

__version__ = "0.1.0"

__all__ = [
    "CalibratedLayer",
    "CalibratedWeightsWarning",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "CoConv2d",
    "CoResNet",
    "Deployment",
    "DeploymentError",
    "EffectiveField",
    "FieldReport",
    "Inputs",
    "LayerField",
    "Levels",
    "NoChangeWarning",
    "PlainCopyWarning",
    "PlainWeightsWarning",
    "Plan",
    "PlanError",
    "PlanRow",
    "Policy",
    "Reason",
    "ResolutionPolicy",
    "StagePolicy",
    "TopPolicy",
    "UniformPolicy",
    "apply_plan",
    "build_depthwise",
    "calibrate",
    "coconv2d",
    "convert",
    "deploy",
    "effective_receptive_field",
    "export_authors_state_dict",
    "get_deployment",
    "get_plan",
    "guard",
    "hub_arguments",
    "load_authors_checkpoint",
    "load_converted",
    "plan_conversion",
    "plan_of",
    "read_plan",
    "receptive_fields",
    "register_coconv",
    "revert",
    "save_converted",
    "split_channels",
    "to_coconv_",
    "to_conv_",
    "unchecked_levels",
]
