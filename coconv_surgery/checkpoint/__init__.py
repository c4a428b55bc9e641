"""A converted network on disk."""

from coconv_surgery.checkpoint.converted import check_loadable, load_converted, read_plan, save_converted

__all__ = ["check_loadable", "load_converted", "read_plan", "save_converted"]
