"""mmdet's own entry points, in this process and in two, on the drawn shapes."""

import json
import re
from pathlib import Path

import mmengine
import pytest
import torch
from launching import torchrun
from mmdet.apis import DetInferencer
from PIL import Image

from coconv_surgery import Plan, get_plan
from coconv_surgery.mmengine.hooks import FILE_NAME, META_KEY


def losses(work: Path) -> list[float]:
    """The loss of every logged iteration, in order of time."""
    lines = [line for path in sorted(work.glob("*/vis_data/scalars.json")) for line in path.read_text().splitlines()]
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_train_test_and_infer(tool, tiny_ssd, shapes, tmp_path):
    tiny_ssd.train_cfg.update(max_epochs=6, val_interval=6)
    config, work = tmp_path / "tiny.py", Path(tiny_ssd.work_dir)
    tiny_ssd.dump(config)

    assert "coco/bbox_mAP" in tool("train.py", config)
    found = losses(work)
    assert all(torch.tensor(found).isfinite())
    assert sum(found[-4:]) < 0.9 * sum(found[:4])

    checkpoint = work / "epoch_6.pth"
    plan = Plan.from_json(work / FILE_NAME)
    assert Plan.from_json(torch.load(checkpoint)["meta"][META_KEY]) == plan

    assert "coco/bbox_mAP" in tool("test.py", config, checkpoint, "--work-dir", tmp_path / "tested")

    inferencer = DetInferencer(str(config), str(checkpoint), device="cpu", show_progress=False)
    assert get_plan(inferencer.model).diff(plan) == []
    image = next((shapes / "val").glob("*.jpg"))
    inferencer(str(image), out_dir=str(tmp_path / "out"), no_save_pred=False)
    with Image.open(tmp_path / "out" / "vis" / image.name) as drawn:
        assert drawn.size == (96, 96)
    predictions = json.loads((tmp_path / "out" / "preds" / f"{image.stem}.json").read_text())
    assert set(predictions) == {"labels", "scores", "bboxes"}


def test_a_detector_that_surgery_converted_trains_tests_with_augmentation_and_has_its_flops_counted(
    tool, tiny_ssd, tmp_path
):
    tiny_ssd.merge_from_dict({"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1})
    model, backbone = tiny_ssd.model, tiny_ssd.model.backbone
    model.update(type="CoConvSurgery", detector_type=model.type, surgery={"pipeline": tiny_ssd.test_pipeline})
    backbone.type = "ResNet"
    del backbone["levels"]
    config, work = tmp_path / "surgery.py", Path(tiny_ssd.work_dir)
    tiny_ssd.dump(config)

    tool("train.py", config)
    plan = Plan.from_json(work / FILE_NAME)
    assert {"backbone.layer1.0.conv1", "neck.extra_layers.0.1.conv"} < {row.name for row in plan.converted}
    log = tool("test.py", config, work / "epoch_1.pth", "--tta", "--work-dir", tmp_path / "tested")
    assert plan.summary() in log
    assert "coco/bbox_mAP" in log
    assert re.search(r"Flops: [\d.]+[MG]", tool("analysis_tools/get_flops.py", config, "--num-images", 1))


MIRROR = '''
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveEveryRank(Hook):
    """Saves the parameters of each process."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, runner, when):
        model = getattr(runner.model, "module", runner.model)
        torch.save(model.state_dict(), f"{self.folder}/{when}_rank{runner.rank}of{runner.world_size}.pth")

    def before_train(self, runner):
        self.save(runner, "before")

    def after_train(self, runner):
        self.save(runner, "after")
'''


@pytest.fixture
def mirrored(tiny_ssd, tmp_path):
    """A config whose two processes see an image and its mirror image, which have as many boxes to learn from.

    mmdet's SSD divides its loss by that number, so that two processes agree with one only where theirs are equal.
    Norms look at one image at a time, so that they do not depend on the batch.
    """
    data = tmp_path / "mirrored"
    source = Path(tiny_ssd.train_dataloader.dataset.data_root)
    annotations = mmengine.load(source / "annotations" / "train.json")
    (data / "train").mkdir(parents=True)
    images, boxes = [], []
    for image in annotations["images"][:2]:
        for side in range(2):
            name = f"{image['id']}_{side}.png"
            with Image.open(source / "train" / image["file_name"]) as pixels:
                flipped = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if side else pixels
                flipped.save(data / "train" / name)
            images.append({**image, "id": len(images) + 1, "file_name": name})
            for box in (box for box in annotations["annotations"] if box["image_id"] == image["id"]):
                x, y, width, height = box["bbox"]
                left = image["width"] - x - width if side else x
                boxes.append({**box, "id": len(boxes) + 1, "image_id": len(images), "bbox": [left, y, width, height]})
    (data / "annotations").mkdir()
    mmengine.dump({**annotations, "images": images, "annotations": boxes}, data / "annotations" / "train.json")
    (tmp_path / "save_every_rank.py").write_text(MIRROR)

    norm = {"type": "GN", "num_groups": 4}
    plain_pipeline = [step for step in tiny_ssd.train_pipeline if step["type"] != "RandomFlip"]
    tiny_ssd.merge_from_dict(
        {
            "custom_imports.imports": ["coconv_surgery.mmdet", "save_every_rank"],
            "model.backbone.norm_cfg": norm,
            "model.neck.norm_cfg": norm,
            "model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None},
            "env_cfg.dist_cfg.backend": "gloo",
            "train_dataloader.sampler.shuffle": False,
            "train_dataloader.dataset.data_root": f"{data}/",
            "train_dataloader.dataset.pipeline": plain_pipeline,
            "train_cfg.max_epochs": 2,
            "param_scheduler": None,
            "custom_hooks": [{"type": "SaveEveryRank", "folder": str(tmp_path)}],
        }
    )
    for key in ("val_cfg", "val_dataloader", "val_evaluator"):
        tiny_ssd[key] = None
    return tiny_ssd


def test_two_processes_agree_with_one_of_the_doubled_batch(tools, tool, mirrored, tmp_path, monkeypatch):
    configs = {batch: tmp_path / f"batches_of_{batch}.py" for batch in (1, 2)}
    for mirrored.train_dataloader.batch_size, path in configs.items():
        mirrored.dump(path)
    monkeypatch.syspath_prepend(tmp_path)
    torchrun(tools / "train.py", configs[1], "--launcher", "pytorch", output=tmp_path / "output.txt")
    tool("train.py", configs[2])
    before, first, second, alone = (
        torch.load(tmp_path / f"{name}.pth")
        for name in ("before_rank0of2", "after_rank0of2", "after_rank1of2", "after_rank0of1")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert max(float((value - before[name]).abs().max()) for name, value in first.items()) > 1e-2
    for name, value in first.items():
        torch.testing.assert_close(value, alone[name], atol=1e-5, rtol=1e-4)
