"""Detection end to end on drawn shapes, through mmdet's own tools."""

import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import mmdet
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from pycocotools.coco import COCO

from coconv_surgery.demo.shapes import CLASSES, write_shapes
from coconv_surgery.demo.training import run_logged
from coconv_surgery.mmengine.paths import config_path
from coconv_surgery.viz.detections import Boxes, plot_detections

_CONFIG = "shapes/ssd_coresnet18_shapes.py"
_PICTURED = 4
_STEP = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*\bloss: ([\d.]+)")

Progress = Callable[[float, str], None]


def train_and_detect(output: Path, progress: Progress) -> str:
    """Draw the data set, train an SSD on a CoResNet on it, evaluate it, and picture its detections.

    Training is mmdet's ``tools/train.py`` in a process of its own. It resumes where an earlier call was interrupted,
    and does nothing if an earlier call has finished it.

    Args:
        output: Folder for the data set, the work dir, the training log and ``detections.png``.
        progress: Called with the share of the training that is done, and what is happening.

    Returns:
        A report for a reader, with COCO's figures.

    Raises:
        RuntimeError: If training fails.
    """
    output = output.absolute()
    progress(0.0, "drawing the data set")
    write_shapes(output / "data" / "shapes")
    config, work_dir = config_path(_CONFIG), output / "ssd_coresnet18_shapes"
    _train(config, work_dir, output, progress)
    figures = _last_evaluation(work_dir)
    picture = output / "detections.png"
    with open(output / "train.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        _picture(config, _last_checkpoint(work_dir), output / "data" / "shapes", picture)
    return "\n".join(
        [
            f"SSD on CoResNet-18, trained from scratch on drawn shapes (log: {output / 'train.log'})",
            f"bbox mAP@0.5 {figures['coco/bbox_mAP_50']:.3f}, mAP@0.5:0.95 {figures['coco/bbox_mAP']:.3f} "
            "on the validation split, by COCO evaluation",
            f"detections: {picture}",
        ]
    )


def _train(config: Path, work_dir: Path, output: Path, progress: Progress) -> None:
    tool = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    epochs = Config.fromfile(config, import_custom_modules=False).train_cfg.max_epochs
    command = [sys.executable, str(tool), str(config), "--work-dir", str(work_dir), "--resume"]

    def report(line: str) -> None:
        if step := _STEP.search(line):
            epoch, iteration, length = map(int, step.groups()[:3])
            progress((epoch - 1 + iteration / length) / epochs, f"training, loss {float(step[4]):.2f}")

    run_logged(command, output / "train.log", report)


def _last_evaluation(work_dir: Path) -> dict[str, float]:
    logs = sorted(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    found: dict[str, float] = [record for record in records if "coco/bbox_mAP_50" in record][-1]
    return found


def _last_checkpoint(work_dir: Path) -> Path:
    return Path((work_dir / "last_checkpoint").read_text().strip())


def _picture(config: Path, checkpoint: Path, data: Path, picture: Path) -> None:
    detector = init_detector(str(config), str(checkpoint), device="cpu")
    annotations = COCO(data / "annotations" / "val.json")
    category_index = {category: index for index, category in enumerate(annotations.getCatIds(CLASSES))}
    images, truth, found = [], [], []
    for image in annotations.loadImgs(sorted(annotations.getImgIds())[:_PICTURED]):
        path = data / "val" / image["file_name"]
        objects = annotations.loadAnns(annotations.getAnnIds(image["id"]))
        corners = np.array([object["bbox"] for object in objects], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        predicted = inference_detector(detector, str(path)).pred_instances.numpy()
        images.append(path)
        truth.append(Boxes(corners, [category_index[object["category_id"]] for object in objects]))
        found.append(Boxes(predicted.bboxes, predicted.labels, predicted.scores))
    plot_detections(picture, images, truth, found, CLASSES)
