"""Generation end to end on drawn shapes: ProGAN and CoProGAN, trained, measured and pictured."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from mmengine.config import Config

from coconv_surgery.demo.shapes import write_shapes
from coconv_surgery.demo.training import run_logged
from coconv_surgery.generation.images import FolderImages
from coconv_surgery.generation.sampling import Grown, grid, load_grown
from coconv_surgery.generation.scores import real_images, score
from coconv_surgery.mmengine.paths import config_path
from coconv_surgery.viz.samples import plot_samples
from coconv_surgery.zoo.progan import Generator, coprogan, progan

_NETWORKS: dict[str, Callable[..., Generator]] = {"ProGAN": progan, "CoProGAN": coprogan}
_STEP = re.compile(r"Iter\(train\)\s+\[\s*(\d+)/(\d+)\]")
_TRAIN, _VAL, _PICTURED = 2048, 512, 36

Progress = Callable[[float, str], None]


def train_and_generate(output: Path, progress: Progress) -> str:
    """Draw images, train both networks on them side by side, score them, and picture what they make.

    Each training is a process of its own, of the same seed and data. It resumes where an earlier call was interrupted,
    and does nothing if an earlier call has finished it.

    Args:
        output: Folder for the images, the work dirs, the logs and ``generation.png``.
        progress: Called with the share of the training that is done, and what is happening.

    Returns:
        A report for a reader: sliced Wasserstein distances against images that training has not seen, before and after.

    Raises:
        RuntimeError: If a training fails.
    """
    output = output.absolute()
    progress(0.0, "drawing the images")
    write_shapes(output / "data" / "shapes64", train=_TRAIN, val=_VAL, size=64)
    config = Config.fromfile(config_path("progan/progan_shapes-32x32.py"), import_custom_modules=False)
    _train(output, progress)
    data = config.train_dataloader.dataset
    held_out = FolderImages(output / "data" / "shapes64" / "val", data.resolution, crop=data.crop)
    pictures = {"drawn": grid(torch.cat(list(real_images(held_out, data.resolution, _PICTURED))))}
    lines = ["ProGAN and CoProGAN, trained from scratch on drawn shapes of 32×32 pixels, with the same seed"]
    for name, build in _NETWORKS.items():
        progress(1.0, f"scoring {name}")
        grown = load_grown((_work_dir(output, name) / "last_checkpoint").read_text().strip())
        torch.manual_seed(0)
        untrained = build(data.resolution, fmap_base=config.model.fmap_base, fmap_max=config.model.fmap_max)
        before, after = (
            score(each, held_out, ["swd"], mirror=config.model.mirror)["SWD×10³ average"]
            for each in (Grown(untrained.eval(), data.resolution, 1.0, 0), grown)
        )
        pictures[f"{name}, SWD {after:.0f}"] = grid(torch.cat(list(grown.images(_PICTURED))))
        lines.append(f"{name}: SWD×10³ {before:.1f} untrained, {after:.1f} after {grown.images_seen:,} images")
    plot_samples(output / "generation.png", pictures)
    lines.append(
        f"against {len(held_out)} held-out images, on average over 32×32 and 16×16 pixels; one seed says nothing"
    )
    lines.append(
        f"of which is better. Pictures: {output / 'generation.png'}; of every phase: vis_image/ in the work dirs"
    )
    return "\n".join(lines)


def _train(output: Path, progress: Progress) -> None:
    shares = dict.fromkeys(_NETWORKS, 0.0)
    threads = max(1, torch.get_num_threads() // len(shares))

    def train(name: str) -> None:
        def report(line: str) -> None:
            if step := _STEP.search(line):
                shares[name] = int(step[1]) / int(step[2])
                progress(sum(shares.values()) / len(shares), "training")

        config = config_path(f"progan/{name.lower()}_shapes-32x32.py")
        arguments = (str(config), "--work-dir", str(_work_dir(output, name)), "--resume")
        command = [sys.executable, "-m", "coconv_surgery.generation", *arguments]
        run_logged(command, output / f"train-{name.lower()}.log", report, threads)

    with ThreadPoolExecutor() as pool:
        list(pool.map(train, shares))


def _work_dir(output: Path, name: str) -> Path:
    return output / f"{name.lower()}_shapes-32x32"
