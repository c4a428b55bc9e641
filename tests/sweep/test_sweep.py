"""Sweeps: a row for every network, whatever happens to it."""

from collections import Counter

import pytest
import timm
from mishaps import MISHAPS, NAMES
from sampling import few

from coconv_surgery.sweep.check import CONVERTED, CRASHED, FAILED, NOT_BUILT, Row, check
from coconv_surgery.sweep.collections import COLLECTIONS
from coconv_surgery.sweep.report import render
from coconv_surgery.sweep.walk import read_rows, walk


def test_a_row_says_what_a_conversion_did():
    row = check(COLLECTIONS["timm"], "resnet18")
    assert row.sound
    assert (row.name, row.family, row.status) == ("resnet18", "resnet", CONVERTED)
    assert (row.convs, row.convs_3x3, row.converted, row.one_level, row.left_alone) == (20, 16, 12, 4, "{}")
    assert row.parameters_before == row.parameters_after == 11_689_512
    assert row.keys_before == row.keys_after == len(timm.create_model("resnet18").state_dict())
    assert row.outputs_before == row.outputs_after == "[[1, 1000]]"
    assert row.traced == "torch.fx, whole; sizes from shapes alone"
    assert 0 < row.seconds < row.seconds_in_all


def test_a_collection_that_cannot_build_says_so_in_its_own_words_without_the_machines_folders():
    row = check(MISHAPS, "not built")
    assert (row.status, row.error) == (NOT_BUILT, "ImportError: …/machine.py wants a package")


def test_an_exception_is_part_of_the_row():
    row = check(MISHAPS, "raises")
    assert row.status == FAILED
    assert row.error == "ZeroDivisionError: as it was to be (in forward)"
    assert not row.sound


def test_a_changed_shape_is_not_sound():
    row = check(MISHAPS, "wrong shape")
    assert row.status == CONVERTED
    assert (row.outputs_before, row.outputs_after) == ("[[1, 4, 16, 16]]", "[[1, 4, 16, 15]]")
    assert not row.sound


def test_a_process_that_is_killed_costs_its_row_only(tmp_path):
    rows = walk(MISHAPS, NAMES, tmp_path / "rows.csv", jobs=2)
    assert [row.name for row in rows] == NAMES
    assert {row.name: row.status for row in rows} == {
        "exits": CRASHED,
        "first": CONVERTED,
        "killed": CRASHED,
        "last": CONVERTED,
        "not built": NOT_BUILT,
        "raises": FAILED,
        "wrong shape": CONVERTED,
    }
    assert {row.name: row.error for row in rows}["killed"] == "its process died with exit code -9"
    assert read_rows(tmp_path / "rows.csv") == rows


def test_a_network_that_takes_too_long_is_given_up(tmp_path):
    (row,) = walk(MISHAPS, ["slow"], tmp_path / "rows.csv", timeout=5)
    assert (row.status, row.error) == (CRASHED, "it took too long")


def test_a_walk_goes_on_where_it_was_and_tries_again_what_failed(tmp_path):
    path, done = tmp_path / "rows.csv", []
    walk(MISHAPS, ["first", "raises"], path)
    lines = path.read_text().replace("first,FIRST,converted,", "first,FIRST,converted,kept")
    path.write_text(lines.replace("raises,RAISES,failed,", "raises,RAISES,failed,kept") + "last,LAST,conv")
    rows = walk(MISHAPS, ["first", "last", "raises"], path, progress=done.append)
    assert [row.name for row in rows if row.error.startswith("kept")] == ["first"]
    assert sorted(row.name for row in done) == [row.name for row in rows] == ["first", "last", "raises"]


def test_a_walk_over_some_networks_keeps_the_rows_of_the_others(tmp_path):
    path = tmp_path / "rows.csv"
    walk(MISHAPS, ["last"], path)
    assert [row.name for row in walk(MISHAPS, ["first"], path)] == ["first", "last"]
    assert [row.name for row in read_rows(path)] == ["first", "last"]


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"rows.csv is not of this release's sweeps"):
        walk(MISHAPS, ["first"], path)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_page_has_totals_families_and_every_network():
    rows = [check(MISHAPS, name) for name in ("first", "not built", "raises", "wrong shape")]
    rows.append(Row(name="killed", family="KILLED", status=CRASHED, error="its process died"))
    page = render(MISHAPS, rows, "coconv sweep mishaps")
    assert "# What conversion does to Mishaps" in page
    assert "- 5 networks\n- 2 planned, converted and reverted without an exception\n- 1 not built\n" in page
    assert "- 1 failed, 1 crashed" in page
    assert "- 1 of 2 whose forward runs here with outputs of the same shape" in page
    assert "| 2 | prediction layer" in page
    lines = Counter(line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| `"))
    assert lines == {f"`{row.name}`": 2 if row.status == NOT_BUILT else 1 for row in rows}
    assert "**differ**" in page
    assert "**failed** ZeroDivisionError" in page


@pytest.mark.parametrize("name", few(["resnet", "convnext", "convnextv2", "regnet", "mobilenet_v2"], 2))
def test_transformers_networks_convert(name):
    row = check(COLLECTIONS["transformers"], name)
    assert row.sound, row
    assert row.convs


@pytest.mark.parametrize(
    "name",
    few(
        [
            "classification/resnet18",
            "classification/regnet_y_400mf",
            "segmentation/deeplabv3_resnet50",
            "detection/fcos_resnet50_fpn",
            "detection/maskrcnn_resnet50_fpn",
        ],
        2,
    ),
)
def test_torchvision_networks_convert(name):
    row = check(COLLECTIONS["torchvision"], name)
    assert row.sound, row
    assert row.converted
