"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""

from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.sites import Site
from coconv_surgery.tracing.trace import TracedConv, trace_network

__all__ = ["Site", "TracedConv", "find_sites", "trace_network"]
