"""The options of a surgery dict: what they take, and what they say of anything else."""

import re

import numpy as np
import pytest
from nonsense import NONSENSE, check

from coconv_surgery import Levels, StagePolicy
from coconv_surgery.mmengine import CoConvPlanHook, SurgeryOptions


def read(**surgery):
    options = SurgeryOptions.read(surgery)
    options.saved_plan()
    return options


@pytest.mark.parametrize(
    "policy", [{"type": "stage(3,3,2,1)"}, {"type": "stage", "stages": (3, 3, 2, 1)}, {"type": "stage(3, 3, 2, 1)"}]
)
def test_a_policys_numbers_may_stand_in_its_name(policy):
    assert read(policy=policy).choices()["policy"] == StagePolicy((3, 3, 2, 1))


def test_a_policys_settings_stand_beside_numbers_in_its_name():
    policy = {"type": "stage(3,3,2,1)", "min_channels": np.int64(8), "_scope_": "mmdet"}
    assert read(policy=policy).choices()["policy"] == StagePolicy((3, 3, 2, 1), min_channels=8)


def test_levels_are_written_as_a_dict():
    overrides = {"a": {"dilations": (1, 3)}, "b": {"dilations": (1, 2), "splits": "even"}, "c": 2, "d": None}
    assert read(overrides=overrides).choices()["overrides"] == {
        **overrides,
        "a": Levels((1, 3)),
        "b": Levels((1, 2), "even"),
    }


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ({"policy": {}}, "the type of policy must be a name, as in dict(type='stage'), not NoneType"),
        ({"policy": {"type": 5}}, "the type of policy must be a name, as in dict(type='stage'), not int"),
        ({"policy": {"type": "stage(4,,3)"}}, "unknown policy 'stage(4,,3)': did you mean 'stage'?"),
        ({"policy": {"type": "stage", "nonsense": 1}}, "policy 'stage' has no key 'nonsense': Its keys are stages"),
        ({"policy": {"type": "resolution", "max_levels": 1.5}}, "max_levels=1.5 must be a whole number"),
        ({"max_levels": 1.5}, "surgery has no key 'max_levels': Its keys are policy"),
        ({"overrides": ["a"]}, "overrides must be a dict of levels by pattern, not list"),
        ({"overrides": {"*": {"foo": 1}}}, "overrides['*'] has no key 'foo': Its keys are dilations, splits"),
        ({"overrides": {"*": {"splits": "even"}}}, "overrides['*'] must have dilations, one for each level"),
        ({"plan": 5}, "surgery: plan must be the path of a file, not int"),
        ({"plan": "none.json"}, "surgery: plan='none.json': there is no such file"),
        ({"plan": "."}, "surgery: plan='.' is a folder"),
        ({"pipeline": "x"}, "surgery: pipeline has no transform with scale=(width, height): give input_size instead"),
        ({"pipeline": [{"scale": (8, 2.5)}]}, "pipeline: scale=(8, 2.5) is not (width, height): give input_size"),
        ({"pipeline": range(10**9)}, "surgery: pipeline=range(0, 1000000000) has more than 65,536 entries"),
        ({"input_size": 2.5}, "input_size=2.5 must be a whole number of at least 1, or (height, width)"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_clear_error_before_a_network_is_built(surgery, message):
    with pytest.raises((OSError, TypeError, ValueError), match=re.escape(message)):
        read(**surgery)


OPTIONS = [
    ("surgery", SurgeryOptions.read, {"{}"}),
    ("policy", lambda v: read(policy=v), ()),
    ("policy", lambda v: read(policy={"type": v}), ()),
    ("stages", lambda v: read(policy={"type": "stage", "stages": v}), ()),
    ("include", lambda v: read(include=v), {"None", "x", "", "[]"}),
    ("exclude", lambda v: read(exclude=v), {"None", "x", "", "[]"}),
    ("overrides", lambda v: read(overrides=v), {"None", "{}"}),
    ("input_size", lambda v: read(input_size=v), {"None", "array"}),
    ("pipeline", lambda v: read(pipeline=v), {"None"}),
    ("scale", lambda v: read(pipeline=[{"scale": v}]), ()),
    ("plan", lambda v: read(plan=v), {"None"}),
    ("strict", CoConvPlanHook, {"True"}),
]


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize(("name", "call", "taken"), OPTIONS, ids=[f"{i}-{row[0]}" for i, row in enumerate(OPTIONS)])
def test_nonsense_is_taken_or_refused_by_a_message_that_names_the_option(name, call, taken, nonsense):
    check(call, name, NONSENSE[nonsense](), nonsense in taken)
