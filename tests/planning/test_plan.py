"""The plan: table, summary, JSON, replay."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coconv_surgery as cs
from coconv_surgery.planning.plan import Plan, PlanError, PlanRow, Signature

pairs = st.tuples(st.integers(1, 9), st.integers(1, 9))
signatures = st.builds(
    Signature,
    in_channels=st.integers(1, 99),
    out_channels=st.integers(1, 99),
    kernel_size=pairs,
    stride=pairs,
    padding=st.one_of(pairs, st.sampled_from(["same", "valid"])),
    dilation=pairs,
    groups=st.integers(1, 9),
    padding_mode=st.sampled_from(["zeros", "reflect"]),
)
reasons = st.text().filter(str.strip)
whys = st.one_of(
    st.tuples(st.none(), st.none()),
    st.tuples(reasons, st.none()),
    st.tuples(reasons, st.sampled_from(cs.Reason)),
)
rows = st.builds(
    lambda why, levels, **fields: PlanRow(
        reason=why[0],
        reason_key=why[1],
        dilations=tuple(d for d, _ in levels),
        splits=tuple(s for _, s in levels),
        **fields,
    ),
    why=whys,
    levels=st.lists(st.tuples(st.one_of(st.integers(1, 9), pairs), st.integers(1, 99)), min_size=1),
    name=st.text(),
    signature=signatures,
    calls=st.integers(0, 9),
    output_sizes=st.lists(pairs).map(tuple),
    aliases=st.lists(st.text()).map(tuple),
    untraced=st.none() | st.text(),
)
plans = st.builds(
    Plan, rows=st.lists(rows).map(tuple), policy=st.text(), input=st.text(), parameters=st.integers(0, 10**9)
)


@given(plans)
@settings(deadline=None)
def test_json_gives_the_same_plan_back(plan):
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_replays_on_a_fresh_network(net, image, tmp_path):
    fresh = type(net)().eval()
    fresh.load_state_dict(net.state_dict())
    cs.convert(net, input_size=32)
    cs.get_plan(net).to_json(tmp_path / "plan.json")
    cs.apply_plan(fresh, Plan.from_json(tmp_path / "plan.json"))
    assert torch.equal(fresh(image), net(image))


@pytest.mark.parametrize("reason", ["", "\t "])
def test_a_reason_that_says_nothing_is_refused(net, reason):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    data["rows"][0]["reason"] = reason
    with pytest.raises(cs.PlanError, match=r"row 'stem': reason=.* must say why, or be None"):
        Plan.from_json(json.dumps(data))


def test_a_plan_edited_by_hand_is_what_is_applied(net):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    data["rows"][0] |= {"dilations": [1, 6], "splits": [2, 6]}
    cs.apply_plan(net, Plan.from_json(json.dumps(data)))
    assert (net.stem.dilations, net.stem.splits) == ((1, 6), (2, 6))


def test_an_impossible_edit_is_refused(net):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    data["rows"][0]["splits"] = [4, 2, 3]
    with pytest.raises(PlanError, match=r"stem \(splits \(4, 2, 3\) must be positive and sum up to the 8"):
        cs.apply_plan(net, Plan.from_json(json.dumps(data)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"rows": []}', "is not a plan"),
        (
            '{"format": "coconv-plan", "version": 99}',
            "plan version 99, of a later release; this release reads version 1; update",
        ),
        ('{"format": "coconv-plan", "version": "one"}', "has no plan version that there is"),
        ('{"format": "coconv-plan", "version": 1, "rows": [{}]}', "not a complete plan"),
        ('{"format": "coconv-plan", "version": 1, "rows": [], "extra": 1}', "not a complete plan"),
    ],
)
def test_what_is_not_a_plan_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x9c\xff", "plan.json is not JSON"),
        (b"[" * 10**6, "plan.json is not JSON"),
        (b"[]", "plan.json is not a plan"),
        (b'{"format": ' + b"9" * 5000 + b"}", "plan.json is not JSON"),
        (b'{"format": "coconv-plan", "version": 1, "rows": ' + b"[" * 500 + b"]" * 500 + b"}", "must be a dict of its"),
    ],
    ids=["binary", "nested", "list", "digits", "nested rows"],
)
def test_a_file_that_is_not_a_plan_is_named(content, message, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("none.json", FileNotFoundError, r"source='none\.json': there is no such file"),
        (".", IsADirectoryError, r"source='\.' is a folder: name a file in it"),
        ("", IsADirectoryError, "source='' is a folder"),
        (None, TypeError, "source must be JSON text or the path of a file, not NoneType"),
        (b"{}", TypeError, "source must be JSON text or the path of a file, not bytes"),
    ],
)
def test_a_source_that_is_no_file_is_named(source, error, message):
    with pytest.raises(error, match=message):
        Plan.from_json(source)


def test_the_table_is_aligned_and_leaves_out_other_kernels(net):
    plan = cs.plan_conversion(net, input_size=32)
    header, rule, stem, *_ = plan.table().splitlines()
    assert header.index("dilations") == stem.index("1, 2, 3")
    assert set(rule) == {"─", " "}
    assert "body.2" not in plan.table()
    assert "body.2" in plan.table(every_conv=True)
    assert str(plan).splitlines()[-1] == plan.summary()


def test_the_summary_counts_by_reason(net):
    summary = cs.plan_conversion(net, input_size=32).summary()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert summary == f"3 convs: 2 converted, 1 left alone (1 kernel 1×1); {parameters:,} parameters before = after"


def test_diff_names_what_differs_and_nothing_else(net):
    plan = cs.plan_conversion(net, input_size=32)
    assert plan.diff(cs.plan_conversion(net, input_size=40)) == []
    assert plan.diff(cs.plan_conversion(net, input_size=32, exclude="stem")) == [
        "stem: dilations 1, 2, 3 with 4, 2, 2 channels became dilations 1 with 8 channels"
    ]


def edited(net, **changes):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    data["rows"][1] |= changes
    return json.dumps(data)


def test_a_reason_written_into_a_row_leaves_its_conv_plain(net):
    cs.apply_plan(net, Plan.from_json(edited(net, reason="not this one")))
    assert (type(net.stem), type(net.body[0])) == (cs.CoConv2d, torch.nn.Conv2d)


def test_a_repeated_row_is_refused_before_anything_changes(net):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    data["rows"].append(data["rows"][0] | {"splits": [3, 3, 2]})
    with pytest.raises(PlanError, match="1 repeated in the plan: stem"):
        cs.apply_plan(net, Plan.from_json(json.dumps(data)))
    assert type(net.stem) is type(net.body[0]) is torch.nn.Conv2d


@pytest.mark.parametrize(
    "change",
    [
        {"splits": [4.0, 4.0]},
        {"splits": None},
        {"dilations": 3},
        {"dilations": [True, 2]},
        {"name": 0},
        {"reason": 5},
        {"signature": []},
        {"output_sizes": [3]},
        {"aliases": 5},
        {"dilations": []},
        {"splits": [8]},
        {"output_sizes": [[3, -1]]},
        {"name": "\ud800"},
        {"dilations": [[[[1]]]]},
    ],
)
def test_a_row_of_the_wrong_types_is_refused(net, change):
    with pytest.raises(PlanError, match="not a complete plan"):
        Plan.from_json(edited(net, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": -3},
        {"out_channels": 8.0},
        {"kernel_size": [3]},
        {"stride": "11"},
        {"stride": [0, 1]},
        {"padding": "full"},
        {"dilation": None},
        {"groups": 0},
        {"padding_mode": 5},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_signature_of_no_convolution_is_refused(net, change):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    data["rows"][0]["signature"] |= change
    with pytest.raises(PlanError, match="not a complete plan"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("field", ["parameters", "policy", "input", "traced"])
def test_a_field_of_the_wrong_type_is_refused(net, field):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json()) | {field: []}
    with pytest.raises(PlanError, match=f"not a complete plan: {field}"):
        Plan.from_json(json.dumps(data))


def test_a_single_level_at_the_convs_own_dilation_is_not_converted(net):
    plan = Plan.from_json(edited(net, dilations=[1], splits=[8], reason=None))
    assert [row.name for row in plan.converted] == ["stem"]
    assert plan.reasons() == {"kernel 1×1": 1, "one level: the conv itself": 1}


def test_text_that_cannot_be_written_is_refused_where_a_plan_is_made(net):
    with pytest.raises(ValueError, match=r"policy=.* holds what is no character"):
        dataclasses.replace(cs.plan_conversion(net, input_size=32), policy="\udfff")


def test_a_plan_of_a_conv_with_numpys_integers_is_written():
    conv = torch.nn.Conv2d(np.int64(3), np.int64(8), np.int64(3), padding=np.int64(1))
    plan = cs.plan_conversion(torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1)), input_size=32)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_reason_is_in_the_row_and_in_the_file_as_a_key_and_as_a_text(net):
    plan = cs.plan_conversion(net, input_size=32, exclude="stem")
    reasons = {row.name: (row.reason_key, row.reason) for row in plan.rows if not row.converted}
    assert reasons == {"stem": (cs.Reason.EXCLUDED, "excluded"), "body.2": (cs.Reason.KERNEL, "kernel 1×1")}
    rows = {row["name"]: row for row in json.loads(plan.to_json())["rows"]}
    assert (rows["body.2"]["reason_key"], rows["body.2"]["reason"]) == ("kernel", "kernel 1×1")
    assert (rows["body.0"]["reason_key"], rows["body.0"]["reason"]) == (None, None)


def test_a_reason_that_is_taken_out_by_hand_takes_its_key_along(net):
    data = json.loads(cs.plan_conversion(net, input_size=32, exclude="stem").to_json())
    data["rows"][0] |= {"reason": None, "dilations": [1, 2], "splits": [4, 4]}
    plan = Plan.from_json(json.dumps(data))
    assert plan.rows[0].reason_key is None
    cs.apply_plan(net, plan)
    assert net.stem.dilations == (1, 2)


def test_a_plan_of_a_release_without_keys_is_read(net):
    data = json.loads(cs.plan_conversion(net, input_size=32).to_json())
    for row in data["rows"]:
        del row["reason_key"]
    plan = Plan.from_json(json.dumps(data))
    assert [row.reason for row in plan.rows if not row.converted] == ["kernel 1×1"]


@pytest.mark.parametrize("key", ["no such", 5, ["kernel"]], ids=str)
def test_a_key_that_does_not_exist_is_refused(net, key):
    with pytest.raises(PlanError, match="has a reason_key that does not exist"):
        Plan.from_json(edited(net, reason="x", reason_key=key))


@pytest.mark.parametrize("reason", cs.Reason, ids=lambda reason: reason.name.lower())
def test_every_reason_has_a_text_of_its_own(reason):
    assert [other for other in cs.Reason if other.value == reason.value] == [reason]
