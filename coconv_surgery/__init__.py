"""Contextual convolution (CoConv) for the networks you already have."""

from coconv_surgery.checkpoint import load_converted, read_plan, save_converted
from coconv_surgery.conv import CoConv2d, coconv2d, split_channels
from coconv_surgery.plan import Plan, PlanError, PlanRow
from coconv_surgery.policy import Levels, Policy, ResolutionPolicy, StagePolicy, TopPolicy, UniformPolicy
from coconv_surgery.surgery import NoChangeWarning, apply_plan, convert, get_plan, plan_conversion, revert

__all__ = [
    "CoConv2d",
    "Levels",
    "NoChangeWarning",
    "Plan",
    "PlanError",
    "PlanRow",
    "Policy",
    "ResolutionPolicy",
    "StagePolicy",
    "TopPolicy",
    "UniformPolicy",
    "apply_plan",
    "coconv2d",
    "convert",
    "get_plan",
    "load_converted",
    "plan_conversion",
    "read_plan",
    "revert",
    "save_converted",
    "split_channels",
]
