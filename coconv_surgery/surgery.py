"""Plan a conversion, apply it in place, and undo it."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch.nn as nn

from coconv_surgery.calibration.calibrating import calibrate_within
from coconv_surgery.layers.arguments import flag, instance
from coconv_surgery.layers.levels import Levels, check_levels
from coconv_surgery.merging import keep_levels_in_merges
from coconv_surgery.planning.copies import plain_copies
from coconv_surgery.planning.decision import Choices, current_plan
from coconv_surgery.planning.eligibility import site_obstacle, subclass
from coconv_surgery.planning.maps import check_maps, largest_input
from coconv_surgery.planning.notes import inputs_for, is_guarded, note_plan, noted_plan, set_guard
from coconv_surgery.planning.patterns import Patterns
from coconv_surgery.planning.plan import Plan, PlanError, PlanRow, count_parameters
from coconv_surgery.planning.policies import Answer, Policy
from coconv_surgery.tracing.convertible import check_convertible
from coconv_surgery.tracing.copying import separate_copy
from coconv_surgery.tracing.finding import find_intact_sites, find_sites
from coconv_surgery.tracing.inputs import InputSize
from coconv_surgery.tracing.sites import Site, calibrated_images
from coconv_surgery.tracing.switching import revert_sites, switch_sites
from coconv_surgery.tracing.trace import trace_network
from coconv_surgery.tracing.unseen import unseen


class NoChangeWarning(UserWarning):
    """A conversion that changed nothing."""


class PlainCopyWarning(UserWarning):
    """A part that stayed plain, as it did not run, and has nearly the weights of one that was converted."""


class CalibratedWeightsWarning(UserWarning):
    """Weights that were calibrated for levels that the network does not have any more."""


def plan_conversion(
    model: nn.Module,
    policy: str | Policy = "resolution",
    *,
    input_size: InputSize | None = None,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Mapping[str, Answer | None] | None = None,
    **settings: Any,
) -> Plan:
    """Decide what would become of every convolution of a network, and change nothing.

    Args:
        model: The network.
        policy: A policy, or the name of one: ``"resolution"``, ``"stage"``, ``"top"`` or ``"uniform"``.
        input_size: Side, (height, width) or (channels, height, width) of the input. Default: what timm says of the
            network, or else what an earlier conversion was planned for.
        example_inputs: What to call the network with instead: a tensor, a tuple of arguments, a dict of them by name,
            or :class:`~coconv_surgery.Inputs`.
        include: Glob patterns of convolutions to consider, by qualified name; that of a module stands for all within.
            Default: all. The others stay what they are, plain or contextual.
        exclude: Patterns of convolutions that stay what they are.
        overrides: Levels by pattern; an exact name wins, else the first match, and both win over ``include`` and
            ``exclude``. A number, a sequence of dilations,
            :class:`~coconv_surgery.Levels`, or None to leave alone. The exact name of a convolution also reaches one
            that is otherwise left alone by choice, such as a 5×5 or a prediction layer.
        **settings: Arguments of a policy that is named, such as ``split="even"`` or ``max_levels=5``.

    Returns:
        The plan, a row for every convolution.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place, or another argument is of a wrong kind.
        ValueError: If the policy is unknown, the input size cannot be known or does not suit the network, a pattern
            matches nothing, or a contextual convolution was pruned.

    >>> import timm
    >>> plan = plan_conversion(timm.create_model("resnet18"), input_size=64)
    >>> plan.converted[0].name, plan.converted[0].dilations, plan.converted[0].splits
    ('layer1.0.conv1', (1, 2, 3), (32, 16, 16))
    """
    check_convertible(model)
    choices = Choices(policy, include, exclude, overrides, settings)
    with unseen(model):
        return _plan(model, find_intact_sites(model), choices, input_size, example_inputs)


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Make a network what a plan says, in place.

    Every row is checked first; if one does not fit, nothing is changed. Whatever else goes wrong, interrupts included,
    everything is put back. Modules, parameters, optimizer state, hooks and
    flags stay what they are: only the class of a convolution changes (or the node, where it is a function call in a
    graph module).

    Args:
        model: The network, plain or converted.
        plan: A plan made for it, or for another instance of the same architecture.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place, or ``plan`` is not a plan.
        PlanError: If convolutions are missing, unexpected or changed; all of them are named.
        ValueError: If a contextual convolution was pruned.
    """
    check_convertible(model)
    instance(plan, "plan", Plan, "a Plan", "Plan.from_json() reads one from a file")
    _apply(model, find_intact_sites(model), plan)
    return model


def switch_to_plan(model: nn.Module, sites: Sequence[Site], plan: Plan, undo: ExitStack) -> bool:
    """Make a network what a plan says, as a part of a larger change.

    Args:
        model: As in :func:`apply_plan`.
        sites: Where it convolves.
        plan: As in :func:`apply_plan`.
        undo: Takes what puts everything back, see :mod:`coconv_surgery.layers.rollback`.

    Returns:
        Whether a convolution has changed.

    Raises:
        PlanError: As :func:`apply_plan`.
    """
    targets = _check_plan(sites, plan)
    changes = [(site, targets[site.name]) for site in sites if site.state != (targets[site.name] or site.plain)]
    switch_sites(sites, changes, undo)
    keep_levels_in_merges(model, undo)
    note_plan(model, replace(plan, calibrated=0, stale=False), undo)  # which the convolutions know of their own kernels
    _renew_guards(model, undo)
    return bool(changes)


def convert(
    model: nn.Module,
    policy: str | Policy = "resolution",
    *,
    input_size: InputSize | None = None,
    example_inputs: Any = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Mapping[str, Answer | None] | None = None,
    inplace: bool = True,
    calibrate: Any = None,
    **settings: Any,
) -> nn.Module:
    """Replace the eligible 3×3 convolutions of a network with contextual ones: plan and apply.

    Weights, their number and their names, and the state of an optimizer that holds them stay the same. The outputs do
    not: train the network anew, or, where its weights are trained, give images to calibrate it on, and fine-tune. A
    network that is compiled, scripted or wrapped for data parallelism must be converted before it is.

    Args:
        model: The network.
        policy: As in :func:`plan_conversion`, like all that follow.
        input_size: As in :func:`plan_conversion`.
        example_inputs: As in :func:`plan_conversion`.
        include: As in :func:`plan_conversion`.
        exclude: As in :func:`plan_conversion`.
        overrides: As in :func:`plan_conversion`.
        inplace: Whether to convert the network itself rather than a copy.
        calibrate: Images to calibrate the converted network on, as of :func:`~coconv_surgery.calibrate`, which gives a
            report of it and more choices.
        **settings: As in :func:`plan_conversion`.

    Returns:
        The same model object, or the converted copy.

    Raises:
        TypeError: As in :func:`plan_conversion`.
        ValueError: As in :func:`plan_conversion`.

    Warns:
        NoChangeWarning: If nothing was converted.
        PlainCopyWarning: If a part that did not run has nearly the weights of one that was converted.
        CalibratedWeightsWarning: If its weights were calibrated for levels that change now.

    >>> import timm
    >>> model = convert(timm.create_model("resnet50"))
    >>> get_plan(model).summary().split(";")[0]
    '53 convs: 13 converted, 40 left alone (36 kernel 1×1'
    """
    check_convertible(model)
    choices = Choices(policy, include, exclude, overrides, settings)
    model = model if flag(inplace, "inplace") else separate_copy(model)
    with unseen(model):
        sites = find_intact_sites(model)
        plan = _plan(model, sites, choices, input_size, example_inputs)
    _apply(model, sites, plan, calibrate)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every convolution of a network what it was before its first conversion.

    Where no conversion of the network is known of, as in one that was contextual from the start, or in a graph that was
    traced or exported from a converted network, every contextual convolution becomes the plain one that it replaces.
    Weights stay what they are: those that were calibrated or trained for levels want them.

    Args:
        model: A converted network.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module that can be converted in place.
        ValueError: If a graph does not tell what a convolution was; the network is left as it was.
    """
    check_convertible(model)
    sites = [site for site in find_sites(model) if site.is_marked or site.levels is not None or site.no_plain_form]
    untold = [f"{site.name} ({site.no_plain_form})" for site in sites if site.no_plain_form and not site.is_marked]
    if untold:
        raise ValueError(
            f"{_shorten(untold)}: what it was before the conversion cannot be told; revert before the export"
        )
    calibrated = calibrated_images(sites)
    of_a_larger_one = all(noted_plan(module) is None for module in model.modules())
    with ExitStack() as undo:
        revert_sites(sites, undo)
        if of_a_larger_one:  # which will be reverted itself, and is to find here what it was
            for site in sites:
                if site.levels is not None:
                    site.mark()
        keep_levels_in_merges(model, undo)
        for module in model.modules():
            note_plan(module, None, undo)
        _renew_guards(model, undo)
        undo.pop_all()
    if calibrated:
        _warn_of_calibrated(calibrated)
    return model


def get_plan(model: nn.Module) -> Plan:
    """Read back what a network is.

    Args:
        model: A network, converted or not.

    Returns:
        The plan it was converted by, as long as that still describes it; else one read off its modules, without map
        sizes.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If a contextual convolution was pruned: its levels do not suit it.
    """
    return current_plan(instance(model, "model", nn.Module, "a torch.nn.Module"))


def complete_plan(model: nn.Module, plan: Plan) -> Plan:
    """A plan of a part of a network, or of one whose plain convolutions differ, made one of this network.

    Args:
        model: The network.
        plan: What it says of a convolution holds, if that is to be contextual, or is the same one here, whatever its
            number of input channels. A convolution that it leaves alone need not be here.

    Returns:
        The plan, whose other rows are those of the network as it is.
    """
    planned = {name: row for row in plan.rows for name in (*row.aliases, row.name)}
    rows, done, own = [], set(), set()
    for row in get_plan(model).rows:
        names = (row.name, *row.aliases)
        told = [planned[name] for name in names if name in planned] or [row]
        done |= {other.name for other in told if (other.dilations, other.splits) == (told[0].dilations, told[0].splits)}
        own |= {*names}
        meant = replace(told[0], signature=replace(told[0].signature, in_channels=row.signature.in_channels))
        holds = meant.converted or meant.signature == row.signature
        rows.append(replace(meant, name=row.name, aliases=row.aliases) if holds else row)
    rows += [row for row in plan.rows if row.name not in done and (row.converted or row.name in own)]
    return replace(plan, rows=tuple(rows), parameters=count_parameters(model))


def _plan(
    model: nn.Module, sites: Sequence[Site], choices: Choices, input_size: InputSize | None, example_inputs: Any
) -> Plan:
    choices.check(sites)
    inputs = inputs_for(model, input_size, example_inputs)
    trace = trace_network(model, sites, inputs)
    rows = tuple(map(choices.row, trace.convs))
    return Plan(rows, policy=choices.label, input=str(inputs), parameters=count_parameters(model), traced=trace.how)


def _apply(model: nn.Module, sites: Sequence[Site], plan: Plan, images: Any = None) -> None:
    calibrated = calibrated_images(sites)
    with ExitStack() as undo:
        changed = switch_to_plan(model, sites, plan, undo)
        if images is not None:
            calibrate_within(undo, model, images)
        if changed and calibrated:
            _warn_of_calibrated(calibrated)
        if not changed and images is None:
            what = "was already as planned, nothing changed" if plan.converted else "has no convolution to convert"
            warnings.warn(f"{type(model).__name__} {what}: {plan.summary()}", NoChangeWarning, stacklevel=3)
        for copy, of in plain_copies(model, plan).items() if changed else ():
            copied = f'apply_plan(model.get_submodule("{copy}"), get_plan(model.get_submodule("{of}")))'
            warnings.warn(
                f"{copy} has nearly the weights of {of}, which was converted, and stayed plain, as it does not run in "
                f"evaluation mode: if it is a slow copy, {copied} converts it likewise",
                PlainCopyWarning,
                stacklevel=3,
            )
        undo.pop_all()


def _warn_of_calibrated(images: int) -> None:
    warnings.warn(
        f"the weights were calibrated on {images:,} images for the levels that the network had, and it computes "
        "something else now: load the weights that it had before",
        CalibratedWeightsWarning,
        stacklevel=4,
    )


def _check_plan(sites: Sequence[Site], plan: Plan) -> dict[str, Levels | None]:
    """Check that every row of a plan can be applied.

    Returns:
        The levels of each site by name, None where it is to be plain.

    Raises:
        PlanError: If one cannot; all are named.
    """
    # An export keeps one of the names of a convolution, and not always the first.
    names = {name: site.name for site in reversed(sites) for name in (*site.aliases, site.name)}
    by_name = {site.name: site for site in sites}
    named = [(_known_name(row, names), row) for row in plan.rows]
    rows = dict(named)
    targets, different = {}, []
    for name in rows.keys() & by_name.keys():
        try:
            targets[name] = _target(by_name[name], rows[name])
        except ValueError as error:
            different.append(f"{name} ({error})")
    counts = Counter(name for name, _ in named)
    problems = {
        "repeated in the plan": [name for name, count in counts.items() if count > 1],
        "missing in the network": [name for name in rows if name not in by_name],
        "unexpected in the network": [name for name in by_name if name not in rows],
        "different in the network": different,
    }
    lines = [f"{len(names)} {problem}: {_shorten(sorted(names))}" for problem, names in problems.items() if names]
    if lines:
        raise PlanError("the plan does not fit this network, which is left as it was:\n" + "\n".join(lines))
    return targets


def _known_name(row: PlanRow, names: Mapping[str, str]) -> str:
    """The name of the site that a row means, by any name that both know; the row's own if there is none."""
    return next((names[name] for name in (row.name, *row.aliases) if name in names), row.name)


def _target(site: Site, row: PlanRow) -> Levels | None:
    """What a row makes of a site; a reason to leave it alone counts more than levels that stand beside it."""
    if differences := site.signature.differences(row.signature):
        raise ValueError(differences)
    if not row.converted:
        if site.state != site.plain and (site.no_plain_form or subclass(site)):
            raise ValueError(site.no_plain_form or f"{type(site.conv).__name__} stands for no plain convolution")
        return None
    if site.state == (row.dilations, row.splits):
        return site.levels
    if why := site_obstacle(site):
        raise ValueError(why.text)
    levels = check_levels(site.conv, row.dilations, row.splits)
    check_maps(row.signature, levels, [largest_input(row.signature, size) for size in row.output_sizes])
    return levels


def _renew_guards(model: nn.Module, undo: ExitStack) -> None:
    for module in filter(is_guarded, list(model.modules())):
        set_guard(module, get_plan(module), undo)


def _shorten(names: Sequence[str], limit: int = 5) -> str:
    return "; ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
