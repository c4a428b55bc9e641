"""Networks and weights on disk, and what they say of the conversion."""

from coconv_surgery.checkpoint import timm_loading
from coconv_surgery.checkpoint.converted import load_converted, save_converted
from coconv_surgery.checkpoint.guard import guard
from coconv_surgery.checkpoint.hub import hub_arguments
from coconv_surgery.checkpoint.origin import plan_of, read_plan
from coconv_surgery.checkpoint.reading import CheckpointError

__all__ = [
    "CheckpointError",
    "guard",
    "hub_arguments",
    "load_converted",
    "plan_of",
    "read_plan",
    "save_converted",
]

timm_loading.keep_metadata()
