"""Patterns: globs, and names that look like one."""

import numpy as np
import pytest
import torch.nn as nn

import coconv_surgery as cs


@pytest.fixture
def model():
    """Its convolutions are ``d.a[0].0`` and ``d.a[0].1``."""
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    holder = nn.Module()
    holder.add_module("a[0]", block)
    holder.forward = block.forward
    whole = nn.Sequential()
    whole.add_module("d", holder)
    whole.add_module("last", nn.Conv2d(8, 2, 3, padding=1))
    return whole


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("d.a[0]", ["d.a[0].0", "d.a[0].1"]), ("d.a[0].1", ["d.a[0].1"]), ("d", ["d.a[0].0", "d.a[0].1"])],
)
def test_a_name_stands_for_itself_whatever_characters_it_has(model, pattern, names):
    uniform = cs.UniformPolicy(2)
    included = cs.plan_conversion(model, uniform, input_size=16, include=pattern)
    assert [row.name for row in included.converted] == names
    excluded = cs.plan_conversion(model, uniform, input_size=16, exclude=[pattern], overrides={"last": 2})
    assert {row.name for row in excluded.converted} == {"d.a[0].0", "d.a[0].1", "last"} - set(names)
    overridden = cs.plan_conversion(model, uniform, input_size=16, overrides={pattern: (1, 3)})
    assert [row.name for row in overridden.converted if row.dilations == (1, 3)] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": 5}, "include=5 must be a pattern or a list of patterns"),
        ({"include": b"x"}, "include=b'x' must be a pattern"),
        ({"include": {"d": 1}}, "include={'d': 1} must be a pattern"),
        ({"include": [["a"]]}, "a pattern in include must be a string, not list"),
        ({"exclude": 5}, "exclude=5 must be a pattern"),
        ({"exclude": [None]}, "a pattern in exclude must be a string, not NoneType"),
        ({"exclude": ""}, "exclude: no convolution matches ''"),
        ({"overrides": ["d"]}, "overrides must be a dict of levels by pattern, not list"),
        ({"overrides": "d"}, "overrides must be a dict of levels by pattern, not str"),
        ({"overrides": {1: 2}}, "overrides: the key 1 must be a string, not int"),
        ({"include": "d.a[1]"}, r"include: no convolution matches 'd\.a\[1\]': did you mean 'd\.a\[0\]'"),
    ],
)
def test_what_is_no_pattern_is_named(model, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cs.plan_conversion(model, input_size=16, **arguments)


@pytest.mark.parametrize("several", [tuple, list, set, iter, np.array])
def test_patterns_come_in_any_collection(model, several):
    assert len(cs.plan_conversion(model, "uniform", input_size=16, include=several(["d"])).converted) == 2
