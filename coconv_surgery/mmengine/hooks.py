"""The plan of a converted network in its log, its work dir and its checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch.nn as nn
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper

from coconv_surgery.layers.arguments import flag
from coconv_surgery.layers.metadata import forget_levels
from coconv_surgery.planning import notes
from coconv_surgery.planning.plan import Plan, PlanError, PlanRow
from coconv_surgery.surgery import get_plan

META_KEY = notes.KEY
FILE_NAME = "coconv_plan.json"


class CoConvPlanHook(Hook):  # type: ignore[misc]
    """Logs the plan, saves it, and refuses checkpoints of a network that was converted differently.

    A contextual convolution has the weights of a plain one, so a checkpoint of a plain network, or of one with other
    levels, loads without an error and predicts wrongly. This hook writes the plan to ``coconv_plan.json`` in the work
    dir and into the ``meta`` of every checkpoint, and compares plans on loading and resuming. A checkpoint without a
    plan comes from a plain network: it loads with a warning, since fine-tuning starts from one.

    In a config, next to the other hooks::

        default_hooks = dict(coconv_plan=dict(type='CoConvPlanHook'))

    Args:
        strict: Whether a different plan is an error rather than a warning.
    """

    def __init__(self, strict: bool = True) -> None:
        self.strict = flag(strict, "strict")

    def before_run(self, runner: Any) -> None:
        """Log the plan."""
        runner.logger.info(f"CoConv plan\n{get_plan(converted_network(runner))}")

    def before_train(self, runner: Any) -> None:
        """Write the plan into the work dir."""
        if is_main_process():
            get_plan(converted_network(runner)).to_json(Path(runner.work_dir) / FILE_NAME)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the plan of a converted network into a checkpoint."""
        plan = get_plan(converted_network(runner))
        if plan.converted:
            checkpoint["meta"][META_KEY] = plan.to_json()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compare a checkpoint's plan with the network.

        Raises:
            PlanError: If they differ and the hook is strict.
        """
        plan = get_plan(converted_network(runner))
        saved = checkpoint.get("meta", {}).get(META_KEY)
        if saved is None:
            if plan.converted:
                runner.logger.warning(
                    "the checkpoint has no CoConv plan: weights of a plain network need fine-tuning, without which "
                    "the converted network predicts wrongly"
                )
            return
        differences = _differences(Plan.from_json(saved), plan)
        if not differences:
            return
        message = (
            "the network is not converted as the checkpoint's was: it would load these weights and predict wrongly:\n"
            + "\n".join(differences)
        )
        if self.strict:
            raise PlanError(f"{message}\nTo load it anyway, use dict(type='CoConvPlanHook', strict=False)")
        runner.logger.warning(message)
        for state in checkpoint.values():  # EMAHook has tensors of one loaded under the names of another
            forget_levels(state)


def converted_network(runner: Any) -> nn.Module:
    """The network of a runner, without what wraps it."""
    model: Any = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return cast(nn.Module, model)


def _differences(saved: Plan, plan: Plan) -> list[str]:
    """Where the plans differ about weights that would load: those of the same name and shape."""
    shared = {_weight(row) for row in saved.rows} & {_weight(row) for row in plan.rows}
    alike = [replace(each, rows=tuple(row for row in each.rows if _weight(row) in shared)) for each in (saved, plan)]
    return alike[0].diff(alike[1])


def _weight(row: PlanRow) -> tuple[Any, ...]:
    conv = row.signature
    return row.name, conv.out_channels, conv.in_channels // conv.groups, conv.kernel_size
