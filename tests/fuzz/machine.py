"""One random network, random operations on it, and what has to hold after each."""

import copy
import io
import pickle
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
import torch.fx.experimental.optimization
import torch.nn as nn
from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch.nn.utils.fusion import fuse_conv_bn_eval

import coconv_surgery as cs
from fuzz import parts
from fuzz.networks import (
    CUT_GRADIENT,
    KINDS,
    MAY_REFUSE,
    NO_COPY,
    NO_GRAPH,
    NO_PICKLE,
    NO_TRAINING,
    networks,
)
from fuzz.parts import tensors
from fuzz.watching import (
    AROUND,
    SURVIVORS,
    Counting,
    check,
    copy_numbers,
    equip,
    named_tensors,
    no_survivors,
    only_classes_change,
    same,
    seed_all,
    unchanged,
    unseen,
)

OPERATIONS: Counter = Counter()
REFUSALS: Counter = Counter()
CHECKS = ("watched", *SURVIVORS)
POLICIES = ("resolution", "uniform(2)", "uniform(3)", "stage", "top")
LEVELS = (2, None, 3, (1, 3), (1, 2))
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}

choices = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "how": st.sampled_from(("all", "all", "include", "exclude", "override", "override all")),
        "which": st.integers(0, 20),
        "levels": st.sampled_from(LEVELS),
        "by": st.sampled_from(("image", "size", "numbers")),
    }
)


def operation(method: Callable[..., None]) -> Callable[..., None]:
    """Count an operation, and check afterwards what always holds."""

    @wraps(method)
    def counted(self: "Surgery", *args: Any, **kwargs: Any) -> None:
        if self.ended:
            return
        with self.guard(method.__name__, kwargs), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                method(self, *args, **kwargs)
            except DoesNotApplyError:
                return
            except RefusedError:
                pass
            OPERATIONS[method.__name__] += 1
            self.check_identity()
            self.check_outputs()

    return counted


def without(*flags: str) -> Callable[..., Any]:
    """Leave an operation out where a network has one of some flags."""
    return precondition(lambda self: self.recipe and not self.recipe.flags & set(flags))


class RefusedError(Exception):
    """The library said no, as it may."""


class DoesNotApplyError(Exception):
    """An operation is not one for this network."""


class Surgery(RuleBasedStateMachine):
    """A network, and beside it one built the same that the library never sees."""

    kinds: tuple[str, ...] = tuple(KINDS)
    checks: tuple[str, ...] = CHECKS
    recipe: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.ended = False
        self.steps: list[str] = []

    def guard(self, name: str, given: Any) -> Any:
        """Where a driver of many networks collects failures."""
        return nullcontext()

    @initialize(data=st.data())
    def build(self, data: Any) -> None:
        self.recipe = data.draw(networks(self.kinds))
        parts.forget()
        with self.guard("build", {}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.control = self.recipe.build(parts.UNGRAPHED)
            try:
                self.control(self.recipe.image())
                net = self.recipe.build()
            except Exception:
                reject()  # not a network, or none that torch can export
            OPERATIONS["networks"] += 1
            self.control = self.recipe.build(parts.UNGRAPHED)
            self.adopt(net)
            self.unchanged_from = {}
            self.looked_for_survivors = False
            self.hooks = self.count_calls()
            self.check_outputs()

    def adopt(self, net: nn.Module) -> None:
        """Make a network the one that is operated on."""
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        self.keys = {name: value.shape for name, value in net.state_dict().items()}
        self.identity = {name: id(tensor) for name, tensor in named_tensors(net).items()}

    def count_calls(self) -> list[tuple[Counting, Counting]]:
        """Hook some modules of network and control with what counts."""
        own, other = dict(self.net.named_modules()), dict(self.control.named_modules())
        convs = [name for name, module in own.items() if isinstance(module, nn.Conv2d) and name in other][:3]
        counts = []
        for name in convs:
            pair = Counting(), Counting()
            own[name].register_forward_hook(pair[0])
            other[name].register_forward_hook(pair[1])
            counts.append(pair)
        self.net(self.image())
        self.control(self.image())
        return [pair for pair in counts if pair[0].count == pair[1].count]

    # What always holds.

    def image(self, seed: int = 0) -> torch.Tensor:
        return self.recipe.image(seed).to(next(self.net.parameters()).dtype)

    def levels(self, net: nn.Module | None = None) -> dict[str, Any]:
        return decisions(cs.get_plan(self.net if net is None else net))

    def check_identity(self) -> None:
        check({k: v.shape for k, v in self.net.state_dict().items()} == self.keys, "the state dict changed")
        held = {name: id(tensor) for name, tensor in named_tensors(self.net).items() if name in self.identity}
        check(held == self.identity, "parameters or buffers are others")
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        check({id(p) for p in self.net.parameters()} == owned, "the optimizer has other parameters")

    def check_outputs(self) -> list[torch.Tensor]:
        """Compare network and control, which are run together at all times."""
        levels = self.levels()
        equip(self.control, levels)
        for own, other in zip(self.net.modules(), self.control.modules(), strict=False):
            own.training, other.training = own.training, own.training
        copy_numbers(self.net, self.control)
        image = self.image()
        with torch.no_grad():
            actual, expected = self.run(self.net, image), self.run(self.control, image)
        exact = not any(levels.values()) and not any(isinstance(m, cs.CoConv2d) for m in self.control.modules())
        graph = any(isinstance(module, fx.GraphModule) for module in self.net.modules())
        self.compare(actual, expected, exact and not graph)
        for own, other in self.hooks:
            check(own.count == other.count, f"a hook was called {own.count - other.count:+} times")
        self.forget_calls()
        return actual

    def forget_calls(self) -> None:
        for own, other in self.hooks:
            own.count = other.count = 0

    def run(self, net: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
        seed_all()
        outputs = tensors(net(image.clone()))
        for output in outputs:
            check(type(output) is torch.Tensor, f"an output is a {type(output).__name__}")
        return [output.detach().clone() for output in outputs]

    def compare(self, actual: list[torch.Tensor], expected: list[torch.Tensor], exact: bool, what="outputs") -> None:
        check(len(actual) == len(expected), f"the number of {what} changed")
        for one, other in zip(actual, expected, strict=True):
            check(one.shape == other.shape, f"the shape of {what} changed")
            if exact:
                check(same(one, other), f"{what} are not the same to the bit")
            elif other.isfinite().all():
                error = (one - other).abs().max() / max(1.0, other.abs().max().item())
                check(error <= TOLERANCE[one.dtype], f"{what} are off")

    # What may be refused.

    def arguments(self, given: dict[str, Any], net: nn.Module | None = None) -> dict[str, Any]:
        names = [row.name for row in cs.get_plan(self.net if net is None else net).rows]
        name = names[given["which"] % len(names)]
        chosen: dict[str, Any] = {"policy": given["policy"]}
        if given["how"] in ("include", "exclude"):
            chosen[given["how"]] = [name, name.rpartition(".")[0] or name][given["which"] % 2]
        elif given["how"] != "all":
            chosen["overrides"] = {name if given["how"] == "override" else "*": given["levels"]}
        if given["by"] == "size" and self.recipe.shape[0] == 1:
            chosen["input_size"] = self.recipe.shape[1:]
        else:
            chosen["example_inputs"] = cs.Inputs((self.image(),), needs_numbers=given["by"] == "numbers")
        return chosen

    def attempt(self, action: Callable[[], Any], given: dict[str, Any] | None = None) -> Any:
        """Do what the library may refuse, for a network or for a choice that says so."""
        try:
            return action()
        except (ValueError, TypeError) as error:
            chosen = given and given["how"].startswith("override") and "overrides[" in str(error)
            # The control has shown that it does run.
            if not chosen and (MAY_REFUSE not in self.recipe.flags or "does not run" in str(error)):
                raise
            reason = re.sub(r"'[^']*'|model[.\w]*|\d+", "…", str(error).splitlines()[0])[:100]
        REFUSALS[f"{'choice' if chosen else 'network'}: {reason}"] += 1
        raise RefusedError

    def plan_of(self, net: nn.Module, given: dict[str, Any], around: str = "nothing") -> Any:
        """Plan, and see to it that nothing changes, and that nobody sees it."""
        arguments = self.arguments(given, net)

        def plan() -> Any:
            with unseen(around):
                return cs.plan_conversion(net, **arguments)

        with unchanged("planning", net):
            return self.attempt(plan, given)

    def plan_alone(self, net: nn.Module, given: dict[str, Any]) -> Any:
        """Plan all of a network that nothing has been done to."""
        image = cs.Inputs((self.recipe.image(),), needs_numbers=given["by"] == "numbers")
        plan = partial(cs.plan_conversion, net, given["policy"], example_inputs=image)
        return self.attempt(plan, {**given, "how": "all"})

    # The operations.

    @rule(given=choices, around=st.sampled_from(AROUND))
    @operation
    def plan(self, given: dict[str, Any], around: str) -> None:
        looked, self.looked_for_survivors = self.looked_for_survivors, True
        kinds = [kind for check, kind in SURVIVORS.items() if check in self.checks and not looked]
        with no_survivors("planning", tuple(kinds)) if kinds else nullcontext():
            plan = self.plan_of(self.net, given, around if "watched" in self.checks else "nothing")
        check(plan == self.plan_of(self.net, given), "a second plan is another")
        if given["how"] != "override":
            wrong = [row.name for row in plan.converted if row.name.endswith(("prediction", "offset"))]
            wrong = [name for name in wrong if not self.levels()[name]]
            check(not wrong, "a prediction is split")

    @rule(given=choices)
    @operation
    def plan_twin(self, given: dict[str, Any]) -> None:
        """A fresh network of the same recipe, in the same state, gets the same plan."""
        twin = self.fresh()
        other, own = self.plan_of(twin, given), self.plan_of(self.net, given)
        check(decisions(other) == decisions(own), "a twin's plan is another")

    @rule(given=choices)
    @operation
    def plan_with_numbers(self, given: dict[str, Any]) -> None:
        """Whether a forward pass has numbers or shapes alone decides nothing."""
        shapes = self.plan_of(self.net, {**given, "by": "image"})
        numbers = self.plan_of(self.net, {**given, "by": "numbers"})
        check(decisions(shapes) == decisions(numbers), "numbers and shapes decide differently")

    @rule(given=choices)
    @precondition(lambda self: self.recipe and self.recipe.kinds & {"graph", "export"})
    @operation
    def plan_ungraphed(self, given: dict[str, Any]) -> None:
        """A graph gets the decisions of what it was traced from."""
        plain, graphed = self.recipe.build(parts.UNGRAPHED), self.recipe.build()
        first, second = (self.plan_alone(net, given) for net in (graphed, plain))
        own, other = decisions(first), decisions(second)
        # A graph tells more than a module with a forward of its own, and less than one that is registered.
        known = (nn.Conv2d, parts.InheritedConv2d, cs.CoConv2d)
        lost = {row.name for row in first.rows if row.reason_key is cs.Reason.FIXED_LEVELS}  # by the export, and said
        names = own.keys() & other.keys() - lost
        names = [name for name in names if type(plain.get_submodule(name)) in known]
        check(all(own[name] == other[name] for name in names), "a graph is decided differently")

    @rule(given=choices)
    @precondition(lambda self: self.recipe and self.recipe.kinds & {"switched", "checkpointed"})
    @operation
    def plan_with_gradients(self, given: dict[str, Any]) -> None:
        """Where a network switches gradients off, no more is converted than where it does not."""
        free, own = self.recipe.build(parts.OPEN), self.recipe.build()
        first, second = (self.plan_alone(net, given) for net in (own, free))
        more = {row.name for row in first.converted} - {row.name for row in second.converted}
        check(not more, "more is converted where gradients are off")

    @rule(given=choices)
    @operation
    def convert(self, given: dict[str, Any]) -> None:
        before = self.levels()
        plan = self.plan_of(self.net, given)
        with only_classes_change("a conversion", self.net):
            cs.convert(self.net, **self.arguments(given))
        self.check_conversion(before, plan)

    @rule(given=choices)
    @without(NO_COPY)
    @operation
    def convert_copy(self, given: dict[str, Any]) -> None:
        """Converts a copy, and leaves the network alone."""
        with unchanged("a copy's conversion", self.net):
            arguments = self.arguments(given)
            copied = self.attempt(lambda: cs.convert(self.net, **arguments, inplace=False), given)
        check(copied is not self.net, "a copy is the network itself")

    @rule(given=choices, through_json=st.booleans())
    @operation
    def replay(self, given: dict[str, Any], through_json: bool) -> None:
        """A plan of a fresh twin, applied."""
        before = self.levels()
        plan = self.plan_of(self.fresh(plain=True), given)
        read = cs.Plan.from_json(plan.to_json())
        check(read == plan, "a plan read back is another")
        with only_classes_change("a replay", self.net):
            cs.apply_plan(self.net, read if through_json else plan)
        self.check_conversion(before, plan)

    def check_conversion(self, before: dict[str, Any], plan: Any) -> None:
        after = self.levels()
        if before != after and not self.unchanged_from:
            self.unchanged_from = before
        check(decisions(plan) == after, "a network is not what its plan says")
        found = cs.get_plan(self.net)
        check(not found.diff(plan), "the plan of a converted network is another")

    @rule()
    @operation
    def revert(self) -> None:
        before = self.unchanged_from or dict.fromkeys(self.levels())
        with only_classes_change("reverting", self.net):
            self.attempt(lambda: cs.revert(self.net))
        self.unchanged_from = {}
        check(self.levels() == before, "reverting gives another network")
        plain = [module for module in self.net.modules() if not isinstance(module, cs.CoConv2d)]
        left = [name for module in plain for name in vars(module) if name.startswith("_coconv")]
        check(not left, "reverting leaves something behind")

    @rule()
    @without(NO_TRAINING)
    @operation
    def train(self) -> None:
        """A step of training, beside the control's."""
        self.check_outputs()
        copy_numbers(self.net, self.control)
        modes = {module: module.training for net in (self.net, self.control) for module in net.modules()}
        gradients = []
        for net in (self.control, self.net):
            net.train()
            net.zero_grad()
            seed_all()
            try:
                loss = sum(output.square().mean() for output in tensors(net(self.image(1))))
                loss.backward()
            except RuntimeError:
                if net is self.net:
                    raise
                restore_modes(modes)
                self.forget_calls()
                raise DoesNotApplyError from None  # it cannot be trained
            gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
        expected, actual = gradients
        check(expected.keys() == actual.keys(), "other parameters have gradients")
        self.compare([actual[name] for name in expected], list(expected.values()), False, "gradients")
        with torch.no_grad():
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        restore_modes(modes)

    @rule()
    @without(NO_TRAINING)
    @operation
    def switch_mode(self) -> None:
        training = not self.net.training
        self.net.train(training)
        self.control.train(training)

    @rule(freeze=st.booleans())
    @operation
    def freeze(self, freeze: bool) -> None:
        """Parameters that take no part in training."""
        for net in (self.net, self.control):
            for name, parameter in net.named_parameters():
                if name.endswith("bias"):
                    parameter.requires_grad_(not freeze)
                    parameter.grad = None

    @rule(adopt=st.booleans(), by=st.sampled_from(("deepcopy", "pickle", "torch.save")))
    @operation
    def copy(self, adopt: bool, by: str) -> None:
        """A copy is what the network is, and independent of it."""
        if self.recipe.flags & ({NO_COPY} if by == "deepcopy" else {NO_COPY, NO_PICKLE}):
            raise DoesNotApplyError
        levels = self.levels()
        self.optimizer.zero_grad()
        self.check_outputs()
        copied = _copies[by](self.net)
        check(self.levels(copied) == levels, "a copy is converted differently")
        if by != "deepcopy" and self.recipe.kinds & {"graph", "export"}:
            return  # torch keeps the code of a pickled graph alone
        check(cs.get_plan(copied) == cs.get_plan(self.net), "a copy has another plan")
        outputs = self.run_quietly(copied)
        self.compare(outputs, self.check_outputs(), False, "a copy's outputs")
        with unchanged("reverting a copy", self.net):
            before = self.unchanged_from or dict.fromkeys(levels)
            reverted = cs.revert(copied if not adopt else _copies[by](copied))
        check(self.levels(reverted) == before, "reverting a copy gives another network")
        if adopt:
            self.hooks = []
            self.adopt(copied)
            self.check_outputs()

    def run_quietly(self, net: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return self.run(net, self.image())

    @rule()
    @operation
    def save(self) -> None:
        """Weights and plan, saved and loaded into a fresh network."""
        file = io.BytesIO()
        torch.save(self.net.state_dict(), file)
        file.seek(0)
        fresh = self.fresh(plain=True)
        self.attempt(lambda: cs.apply_plan(fresh, cs.Plan.from_json(cs.get_plan(self.net).to_json())))
        fresh.load_state_dict(torch.load(file))
        self.compare_loaded(fresh)

    @rule()
    @operation
    def save_converted(self) -> None:
        """The same by the library's own file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "net.safetensors")
            with unchanged("saving", self.net):
                cs.save_converted(self.net, path)
            fresh = self.attempt(lambda: cs.load_converted(self.fresh(plain=True), path))
        check(cs.get_plan(fresh) == cs.get_plan(self.net), "a loaded network has another plan")
        self.compare_loaded(fresh)

    def compare_loaded(self, fresh: nn.Module) -> None:
        check(self.levels(fresh) == self.levels(), "a loaded network is converted differently")
        for own, other in zip(self.net.modules(), fresh.modules(), strict=True):
            other.training = own.training
        self.check_outputs()
        copy_numbers(self.net, fresh)
        outputs = self.run_quietly(fresh)
        if not (self.net.training and "dropout" in self.recipe.kinds):  # which depends on the layout
            self.compare(outputs, self.check_outputs(), False, "a loaded network's outputs")

    def fresh(self, plain: bool = False) -> nn.Module:
        """Another network of the same recipe, in the same state unless it is to be plain."""
        fresh = self.recipe.build().to(next(self.net.parameters()).dtype)
        copy_numbers(self.net, fresh)
        for own, other in zip(self.net.modules(), fresh.modules(), strict=True):
            other.training = own.training
        if not plain and self.levels(fresh) != self.levels():
            self.attempt(lambda: cs.apply_plan(fresh, cs.get_plan(self.net)))
        return fresh

    @rule(form=st.sampled_from((torch.float64, torch.float32, torch.channels_last)))
    @operation
    def to(self, form: Any) -> None:
        """Another type or layout."""
        if "export" in self.recipe.kinds or "old_parametrization" in self.recipe.kinds:
            raise DoesNotApplyError
        if form is torch.channels_last and CUT_GRADIENT in self.recipe.flags:
            raise DoesNotApplyError  # torch's GroupNorm crashes where its input needs no gradient
        given = {"memory_format": form} if isinstance(form, torch.memory_format) else {"dtype": form}
        for net in (self.net, self.control):
            net.zero_grad()
            net.to(**given)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 1e-3, momentum=0.9)
        self.identity = {name: id(tensor) for name, tensor in named_tensors(self.net).items()}

    @rule()
    @operation
    def fuse(self) -> None:
        """Norms fused into the convolutions before them, in a copy."""
        if NO_COPY in self.recipe.flags or self.net.training or "parametrization" in self.recipe.kinds:
            raise DoesNotApplyError
        copied, counted = copy.deepcopy(self.net), 0
        for module in copied.modules():
            if type(module) is nn.Sequential and len(module) == 3:
                conv, norm, _ = module
                if type(conv) in (nn.Conv2d, cs.CoConv2d) and type(norm) is nn.BatchNorm2d and not conv._forward_hooks:
                    module[0], module[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
                    counted += 1
        if not counted:
            raise DoesNotApplyError
        self.compare(self.run_quietly(copied), self.check_outputs(), False, "a fused network's outputs")

    @rule(given=choices, fused=st.booleans())
    @operation
    def trace(self, given: dict[str, Any], fused: bool) -> None:
        """A graph traced from the network, in a copy: computes the same, is converted and reverted."""
        if self.recipe.flags & {NO_GRAPH, NO_COPY} or self.net.training:
            raise DoesNotApplyError
        copied = copy.deepcopy(self.net)
        graph = torch.fx.experimental.optimization.fuse(copied) if fused else fx.symbolic_trace(copied)
        outputs = self.run_quietly(graph)
        self.compare(outputs, self.check_outputs(), False, "a traced network's outputs")
        code = graph.code
        own = self.levels()
        traced = self.levels(graph)
        known = own.keys() & traced.keys()
        check({name: traced[name] for name in known} == {name: own[name] for name in known}, "a trace lost levels")
        self.attempt(lambda: cs.convert(graph, **self.arguments({**given, "how": "all"}, graph)))
        self.attempt(lambda: cs.revert(graph))
        if not any(traced.values()):
            check(graph.code == code, "reverting a graph gives other code")
            self.compare(self.run_quietly(graph), outputs, False, "a reverted graph's outputs")


def restore_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def decisions(plan: Any) -> dict[str, Any]:
    """Levels by the name of the convolution, None where they are those of a plain one."""
    return {row.name: None if _is_plain(row) else (row.dilations, row.splits) for row in plan.rows}


def _is_plain(row: Any) -> bool:
    height, width = row.signature.dilation
    return not row.converted or row.dilations in (((height, width),), (height,))


def _pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def _saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


_copies = {"deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}
