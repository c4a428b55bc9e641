"""A converted network on disk."""

from coconv_surgery.checkpoint.converted import load_converted, read_plan, save_converted

__all__ = ["load_converted", "read_plan", "save_converted"]
