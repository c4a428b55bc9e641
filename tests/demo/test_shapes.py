"""The drawn data set: what it promises whoever trains on it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coconv_surgery.demo.shapes import CLASSES, write_shapes

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "ssd_coresnet18_shapes.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        assert write_shapes(tmp_path / name, train=3, val=2, size=96, seed=7)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_another_seed_and_the_other_split_give_other_images(tmp_path):
    for seed in (0, 1):
        write_shapes(tmp_path / str(seed), train=3, val=3, size=96, seed=seed)
    images = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 12


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    write_shapes(tmp_path / "few", train=2, val=1, size=96)
    write_shapes(tmp_path / "many", train=4, val=2, size=96)
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert all(many[name] == data for name, data in few.items() if name.endswith(".jpg"))


@settings(max_examples=10, deadline=None)
@given(size=st.integers(64, 200), seed=st.integers(0, 2**40))
def test_boxes_lie_inside_their_images_and_do_not_overlap(tmp_path_factory, size, seed):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=4, val=1, size=size, seed=seed)
    content = json.loads((root / "annotations" / "train.json").read_text())
    for image in content["images"]:
        with Image.open(root / "train" / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) == (size, size)
        covered = np.zeros((size, size), int)
        boxes = [one["bbox"] for one in content["annotations"] if one["image_id"] == image["id"]]
        assert 1 <= len(boxes) <= 6
        for x, y, width, height in boxes:
            assert 0 <= x < x + width <= size
            assert 0 <= y < y + height <= size
            assert min(width, height) > 0.05 * size
            covered[int(y) : int(y + height), int(x) : int(x + width)] += 1
        assert covered.max() == 1


def test_pycocotools_finds_every_class_in_both_splits(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    write_shapes(tmp_path / "shapes", train=40, val=20, size=64)
    for split, count in (("train", 40), ("val", 20)):
        data = coco.COCO(str(tmp_path / "shapes" / "annotations" / f"{split}.json"))
        assert len(data.getImgIds()) == count
        assert [category["name"] for category in data.loadCats(data.getCatIds())] == list(CLASSES)
        assert {one["category_id"] for one in data.loadAnns(data.getAnnIds())} == set(range(1, len(CLASSES) + 1))


def test_a_ring_lies_around_the_box_of_a_ringed_disc_and_not_of_a_bare_one(tmp_path):
    write_shapes(tmp_path / "shapes", train=60, val=1, size=200)
    content = json.loads((tmp_path / "shapes" / "annotations" / "train.json").read_text())
    contrast: dict[bool, list[float]] = {True: [], False: []}
    for one in content["annotations"]:
        name = CLASSES[one["category_id"] - 1]
        if not name.endswith("disc"):
            continue
        with Image.open(tmp_path / "shapes" / "train" / f"{one['image_id']:06d}.jpg") as opened:
            pixels = np.asarray(opened).astype(float)
        x, y, width, height = one["bbox"]
        rows, columns = np.indices(pixels.shape[:2])
        radii = np.hypot(columns + 0.5 - x - width / 2, rows + 0.5 - y - height / 2) / (width / 2)
        ring, gap = pixels[(radii > 1.55) & (radii < 1.65)], pixels[(radii > 1.15) & (radii < 1.4)]
        contrast[name.startswith("ringed")].append(float(np.abs(ring.mean(axis=0) - gap.mean(axis=0)).max()))
    assert min(contrast[True]) > 40 > np.median(contrast[False])


def test_a_second_call_writes_nothing(tmp_path):
    write_shapes(tmp_path / "shapes", train=2, val=1, size=64)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not write_shapes(tmp_path / "shapes", train=2, val=1, size=64)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_killed_run_leaves_no_data_set_and_the_next_one_is_whole(tmp_path):
    call = "from coconv_surgery.demo.shapes import write_shapes; write_shapes({!r}, train=2000, val=1, size=64)"
    process = subprocess.Popen([sys.executable, "-c", call.format(str(tmp_path / "shapes"))])
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.jpg")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "shapes").exists()
    assert write_shapes(tmp_path / "shapes", train=2, val=1, size=64)
    write_shapes(tmp_path / "other", train=2, val=1, size=64)
    assert contents(tmp_path / "shapes") == contents(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", "other"}


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", -1), ("size", 63), ("size", 96.0), ("seed", -1)])
def test_a_bad_argument_is_named_and_nothing_is_written(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        write_shapes(tmp_path / "shapes", **{name: value})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a shapes data set"):
        write_shapes(tmp_path, train=2, val=1, size=64)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_a_folder_with_other_arguments_is_left_alone_and_they_are_named(tmp_path):
    write_shapes(tmp_path / "shapes", train=2, val=1, size=64)
    with pytest.raises(ValueError, match=r"train=2 instead of 3, seed=0 instead of 1"):
        write_shapes(tmp_path / "shapes", train=3, val=1, size=64, seed=1)
    assert len(list((tmp_path / "shapes" / "train").iterdir())) == 2


def test_the_config_names_the_classes_in_their_order():
    config = pytest.importorskip("mmengine.config").Config.fromfile(CONFIG, import_custom_modules=False)
    assert tuple(config.val_dataloader.dataset.metainfo.classes) == CLASSES
    assert config.model.bbox_head.num_classes == len(CLASSES)
