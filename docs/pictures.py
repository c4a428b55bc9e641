"""Draw the pictures of the README, the documentation and the benchmarks: ``python docs/pictures.py``.

Nothing is measured again: those of benchmarks show what lies beside them.
"""

from pathlib import Path

from coconv_surgery.bench.report import draw as draw_timings
from coconv_surgery.cli import targets
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.surgery import plan_conversion
from coconv_surgery.viz.diagrams import plot_coconv, plot_way_through
from coconv_surgery.viz.plan import plot_plan
from coconv_surgery.viz.theme import THEMES

FOLDER = Path(__file__).parent / "pictures"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RETINANET = Path(__file__).parents[1] / "configs" / "convert" / "retinanet_r50_fpn_1x_coco.py"
NETWORKS = {"resnet50": "resnet50", "hrnet_w48": "hrnet_w48", "retinanet": str(RETINANET)}


def draw() -> None:
    """Draw all of them, for light pages and for dark ones."""
    FOLDER.mkdir(exist_ok=True)
    for name, target in NETWORKS.items():
        network = targets.build(target)
        plan = plan_conversion(network, example_inputs=targets.inputs_of(network, target, None))
        for mode in THEMES:
            plot_plan(plan, FOLDER / f"plan-{name}-{mode}.svg", Path(target).stem, mode=mode)
    coconv = CoConv2d(64, 64, 3, padding=1, levels=4)
    for mode in THEMES:
        plot_coconv(coconv, FOLDER / f"coconv-{mode}.svg", mode=mode)
        plot_way_through(FOLDER / f"way-through-{mode}.svg", mode=mode)
    for data in BENCHMARKS.glob("*/**/*.json"):
        draw_timings(data)


if __name__ == "__main__":
    draw()
