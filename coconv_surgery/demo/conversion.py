"""A conversion on real input, in one command."""

from pathlib import Path

import timm
import torch
from matplotlib import cbook
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from coconv_surgery.surgery import convert, get_plan, revert
from coconv_surgery.viz.plan import plot_plan


def convert_and_compare(name: str, output: Path) -> str:
    """Convert a timm network and run it on a photograph before and after.

    Args:
        name: A timm model; its weights are random, so only shapes and equality mean something.
        output: Folder for ``plan.txt``, ``plan.json`` and ``plan.png``.

    Returns:
        A report for a reader.

    Raises:
        RuntimeError: If parameters or shapes differ, or reverting does not restore the outputs.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False).eval()
    parameters = dict(model.named_parameters())
    photograph = Image.open(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    image = create_transform(**resolve_model_data_config(model))(photograph).unsqueeze(0)
    with torch.inference_mode():
        before = model(image)
        after = convert(model)(image)
        plan = get_plan(model)
        same_parameters = all(value is parameters[key] for key, value in model.named_parameters())
        if before.shape != after.shape or not same_parameters:
            raise RuntimeError(f"converting {name} changed its shapes or parameters")
        if not torch.equal(revert(model)(image), before):
            raise RuntimeError(f"reverting {name} did not restore its outputs")
    (output / "plan.txt").write_text(f"{plan}\n", encoding="utf-8")
    plan.to_json(output / "plan.json")
    plot_plan(plan, output / "plan.png", title=name)
    change = (after - before).norm() / before.norm()
    return "\n".join(
        [
            str(plan),
            f"photograph {photograph.width}×{photograph.height} → output {tuple(after.shape)}, as before; "
            f"the logits moved by {change:.0%} of their norm",
            f"{len(parameters)} parameter tensors are the same objects; reverted, the output is bit-identical",
            f"plan: {output / 'plan.txt'}, {output / 'plan.json'}, {output / 'plan.png'}",
        ]
    )
