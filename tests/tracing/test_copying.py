"""Planning runs a copy that shares nothing with the network, whatever the network's parts do when they are copied."""

import contextvars
import copy
import fractions
import functools
import logging
import random
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from forwards import IMAGE, WAYS, fails_on_torch_2_4

import coconv_surgery as cs


class Net(nn.Module):
    """A convolution, a norm and a prediction; anything else by name."""

    def __init__(self, **parts):
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.mix(self.norm(self.conv(x)))


class Running(Net):
    """Runs what it holds."""

    def forward(self, x):
        run = self.run
        while isinstance(run, dict | list | tuple):
            run = next(iter(run.values() if isinstance(run, dict) else run))
        return run(x)


def state_of(network):
    """All that planning must not touch, teachers outside included."""
    return {
        name: (id(value), value.requires_grad, value.detach().clone())
        for name, value in (*network.named_parameters(), *network.named_buffers())
    } | {f"{name}.training": module.training for name, module in network.named_modules()}


def check_untouched(network, before):
    for name, value in state_of(network).items():
        if isinstance(value, bool):
            assert value == before[name], name
        else:
            assert value[:2] == before[name][:2], name
            assert torch.equal(value[2], before[name][2]), name


def sizes(network, way):
    return cs.plan_conversion(network, **WAYS[way]).rows[0].output_sizes


# -- Copies that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_is_its_own_copy_is_left_alone(way):
    class Teacher(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    class Student(Net):
        def forward(self, x):
            return super().forward(x) + self.teacher(x)

    teacher = Teacher(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    student = Student(teacher=teacher).train()
    before = state_of(student)
    plan = cs.plan_conversion(student, **WAYS[way])
    assert [row.name for row in plan.converted] == ["conv", "teacher.0"]
    check_untouched(student, before)


class Rebuilt(Net):
    """Its copies are good ones, of which the memo hears nothing."""

    def __deepcopy__(self, memo):
        other = type(self)()
        other.load_state_dict(self.state_dict())
        return other


class Lossy(Net):
    def __deepcopy__(self, memo):
        other = Net()
        other.conv = copy.deepcopy(self.conv, memo)
        return other


class Uncopied(Net):
    def __deepcopy__(self, memo):
        return None


@pytest.mark.parametrize("build", [Rebuilt, Uncopied, lambda: Lossy(extra=nn.Conv2d(3, 3, 3))])
@pytest.mark.parametrize("way", WAYS)
def test_a_network_is_copied_whatever_its_own_deepcopy_tells(build, way):
    network = build()
    before = state_of(network)
    assert [row.name for row in cs.plan_conversion(network, **WAYS[way]).converted] == ["conv"]
    inside = nn.Sequential(network)
    assert [row.name for row in cs.plan_conversion(inside, **WAYS[way]).converted] == ["0.conv"]
    check_untouched(network, before)


TABLE = {}


class Handle:
    """Keeps something elsewhere as long as it lives."""

    def __init__(self):
        self.key = id(self)
        TABLE[self.key] = torch.ones(1)

    def __del__(self):
        TABLE.pop(self.key, None)


class Journal:
    def __init__(self, path):
        self.file = path.open("w")

    def __del__(self):
        self.file.close()


@pytest.mark.parametrize("way", WAYS)
def test_copies_do_not_clean_up_what_is_the_networks(tmp_path, way, capsys):
    class Keyed(Net):
        def forward(self, x):
            return super().forward(x) * TABLE[self.handle.key]

    network = Keyed(handle=Handle(), journal=Journal(tmp_path / "journal"))
    assert cs.plan_conversion(network, **WAYS[way]).converted
    network(IMAGE)
    assert not network.journal.file.closed
    assert not capsys.readouterr().err


class Frozen(Net):
    def __init__(self):
        super().__init__()
        vars(self)["frozen"] = True

    def __setattr__(self, name, value):
        if "frozen" in vars(self):
            raise RuntimeError("frozen")
        super().__setattr__(name, value)

    def train(self, mode=True):
        return self


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_lets_nothing_be_set_is_planned(way):
    assert cs.plan_conversion(Frozen(), **WAYS[way]).converted


class Opaque(torch.Tensor):
    """A tensor that nobody may copy."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.detach, torch.Tensor.clone):
            raise TypeError("not allowed")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_whose_class_refuses_to_be_copied_does_not_stop_planning():
    network = Net(table=torch.ones(16, 1, 1).as_subclass(Opaque))
    assert cs.plan_conversion(network, input_size=32).converted


@pytest.mark.parametrize("numbers", [False, True])
def test_a_generator_of_random_numbers_may_be_among_the_inputs(numbers):
    class Noisy(Net):
        def forward(self, x, generator):
            return super().forward(x + torch.rand(1, generator=generator))

    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    inputs = cs.Inputs((IMAGE,), {"generator": generator}, needs_numbers=numbers)
    assert cs.plan_conversion(Noisy(), example_inputs=inputs).converted
    assert torch.equal(generator.get_state(), before)


def test_a_copy_to_convert_must_be_one():
    class Teacher(nn.Sequential):
        def __deepcopy__(self, memo):
            return self

    network = Net(teacher=Teacher(nn.Conv2d(3, 8, 3, padding=1)))
    with pytest.raises(TypeError, match=r"would share model\.teacher, a Teacher, with the network itself"):
        cs.convert(network, input_size=32, inplace=False)
    seeing = Running()
    seeing.run = lambda x: seeing.mix(seeing.conv(x))
    with pytest.raises(TypeError, match=r"model\.run is a function that sees the network itself.*: make it a method$"):
        cs.convert(seeing, input_size=32, inplace=False)
    assert not cs.get_plan(network).converted
    assert not cs.get_plan(seeing).converted


class Attributes(Net):
    """Copies whatever it has."""

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@pytest.mark.parametrize("make", [Net, Attributes, lambda: fx.symbolic_trace(Net())])
@pytest.mark.parametrize("part", ["", "conv"])
def test_a_copy_of_a_network_that_was_compiled_in_place_is_not_compiled(make, part):
    network = make().eval()
    network.get_submodule(part).compile(backend="eager")
    for copied in (cs.deploy(network, input_size=32), cs.convert(network, inplace=False, input_size=32)):
        assert not any(module._compiled_call_impl for module in copied.modules())
        assert {id(p) for p in copied.parameters()}.isdisjoint(map(id, network.parameters()))
    assert network.get_submodule(part)._compiled_call_impl


def run_on(network, x):
    return network.mix(network.norm(network.conv(x)))


def around(function):
    return lambda x: function(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make",
    [
        lambda net: lambda x: run_on(net, x),
        lambda net: functools.partial(run_on, net),
        lambda net: functools.partial(around(lambda x: run_on(net, x))),
        lambda net: {"functions": [(lambda x: run_on(net, x),)]},
        lambda net: around(around(functools.partial(run_on, net))),
        lambda net: lambda x, net=net: run_on(net, x),
        lambda net: type("Caller", (), {"__call__": lambda self, x: run_on(self.net, x), "net": None})(),
        lambda net: (lambda helper: lambda x: run_on(helper.net, x))(SimpleNamespace(net=net)),
    ],
    ids=["closure", "partial", "partial of a closure", "containers", "closures", "default", "object", "through one"],
)
def test_a_function_that_sees_the_network_sees_the_copy(make, way):
    network = Running().train()
    network.run = make(network)
    if hasattr(network.run, "net"):
        network.run.net = network
    network.norm.requires_grad_(False)
    before = state_of(network)
    plan = cs.plan_conversion(network, **WAYS[way])
    assert [row.name for row in plan.converted] == ["conv"]
    check_untouched(network, before)


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_forward_of_a_norm_moves_no_statistics(way):
    network = Net().train()
    norm = network.norm
    norm.forward = lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)
    before = state_of(network)
    assert cs.plan_conversion(network, **WAYS[way]).converted
    check_untouched(network, before)


class Child(nn.Module):
    """Runs a part of its parent."""

    def __init__(self, parent, reference):
        super().__init__()
        self.parent = reference(parent)

    def forward(self, x):
        return self.parent().mix(x)


class Parent(Net):
    def forward(self, x):
        return self.child(self.norm(self.conv(x)))

    def itself(self):
        return self


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "reference", [weakref.ref, lambda parent: weakref.WeakMethod(parent.itself)], ids=["ref", "method"]
)
def test_a_weak_reference_to_the_network_is_one_to_the_copy(reference, way):
    network = Parent()
    network.child = Child(network, reference)
    if reference is not weakref.ref:
        network.child.forward = types.MethodType(lambda self, x: self.parent()().mix(x), network.child)
    plan = cs.plan_conversion(network, **WAYS[way])
    assert [(row.name, row.calls) for row in plan.rows] == [("conv", 1), ("mix", 1)]


REGISTRY = {}


class Registered(Net):
    def forward(self, x):
        return REGISTRY["mix"](self.norm(self.conv(x)))


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_reaches_itself_from_outside_is_refused_by_name(way):
    network = Registered()
    REGISTRY["mix"] = network.mix
    with pytest.raises(TypeError, match=r"runs a part of the network itself, with model\.mix\.weight"):
        cs.plan_conversion(network, **WAYS[way])
    REGISTRY.clear()


# -- Hooks --------------------------------------------------------------------------------------------------------


class Fed(Net):
    """Goes on with what a hook has caught."""

    features = None

    def forward(self, x):
        self.norm(self.conv(x))
        return self.mix(self.features)


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_feeds_itself_through_a_hook_runs(way):
    network = Fed()
    network.norm.register_forward_hook(lambda module, args, output: setattr(network, "features", output[..., ::2, ::2]))
    assert cs.plan_conversion(network, **WAYS[way]).rows[1].output_sizes == ((16, 16),)
    assert network.features is None


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_may_share_a_container_with_the_network(way):
    class FedByContainer(Net):
        def forward(self, x):
            self.norm(self.conv(x))
            return self.mix(self.caught["features"])

    network = FedByContainer(caught={})
    caught = network.caught

    def catch(module, args, output):
        caught["features"] = output

    network.norm.register_forward_hook(catch)
    assert cs.plan_conversion(network, **WAYS[way]).converted
    assert caught == {}


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_may_share_a_closure_with_the_network(way):
    caught = {}

    class FedByClosure(Net):
        def forward(self, x):
            self.norm(self.conv(x))
            return self.mix(caught["features"])

    network = FedByClosure()
    network.norm.register_forward_hook(lambda module, args, output: caught.update(features=output))
    network(IMAGE)
    before = caught["features"]
    assert cs.plan_conversion(network, **WAYS[way]).converted
    assert caught["features"] is before


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_module_keeps_the_hooks_that_feed_the_network(way):
    network = Fed()
    network.norm = fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()))

    def catch(module, args, kwargs, output):
        network.features = output

    network.norm.register_forward_hook(catch, with_kwargs=True)
    assert cs.plan_conversion(network, **WAYS[way]).converted


@pytest.mark.parametrize("way", WAYS)
def test_old_style_weight_norm_computes_the_weight_of_the_copy(way):
    network = Net()
    torch.nn.utils.weight_norm(network.conv)
    network.double()  # which leaves the weight computed last as it is
    inputs = cs.Inputs((IMAGE.double(),), needs_numbers=way == "numbers")
    before = network.conv.weight
    assert cs.plan_conversion(network, example_inputs=inputs).converted
    assert network.conv.weight is before


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_that_changes_a_map_changes_sizes(way):
    network = Net()
    network.conv.register_forward_pre_hook(lambda module, args: (F.max_pool2d(args[0], 2),))
    assert sizes(network, way) == ((16, 16),)


class Scaling:
    """Hooks that hold something besides the network."""

    def __init__(self):
        self.factor = torch.tensor(2.0)

    def __call__(self, module, args, output):
        return F.max_pool2d(output * self.factor, 4)

    def hook(self, module, args, output):
        return self(module, args, output)


FOUR = fractions.Fraction(4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "hook",
    [
        Scaling(),
        Scaling().hook,
        functools.partial(lambda factor, module, args, output: F.max_pool2d(output * factor, 4), torch.tensor(2.0)),
        lambda module, args, output, sizes=[4]: F.max_pool2d(output, sizes[0]),
        lambda module, args, output: F.max_pool2d(output, int(FOUR)),
        lambda module, args, output: F.max_pool2d(output, random.choice([4])),
    ],
)
def test_a_hook_that_changes_a_map_is_the_networks_whatever_it_holds(hook, way):
    network = Net()
    network.norm.register_forward_hook(hook)
    assert cs.plan_conversion(network, **WAYS[way]).rows[1].output_sizes == ((8, 8),)


def test_a_hook_that_changes_a_map_and_cannot_be_copied_is_told():
    network = Net()

    class Alone(Scaling, Refusing):
        pass

    network.conv.register_forward_hook(Alone())
    with pytest.raises(TypeError, match="a forward hook of class Alone cannot be copied"):
        cs.plan_conversion(network, input_size=32)


class Logger(logging.Logger):
    """As libraries make all loggers of a process be."""


LOGGER = Logger("sizes")


def that_logs_by_what_it_closes_over(logger):
    return lambda module, args, output: logger.warning(output.shape)


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: logging.getLogger("sizes").warning(output.shape),
        lambda module, args, output: LOGGER.warning(output.shape),
        lambda module, args, output, logger=LOGGER: logger.warning(output.shape),
        that_logs_by_what_it_closes_over(LOGGER),
    ],
    ids=["module", "global", "default", "closure"],
)
def test_a_hook_that_logs_is_somebody_elses(hook, monkeypatch):
    network, records = Net(), []
    monkeypatch.setattr(logging.Logger, "handle", lambda logger, record: records.append(record))
    network.conv.register_forward_hook(hook)
    assert cs.plan_conversion(network, input_size=32).converted
    assert not records
    network(IMAGE)
    assert len(records) == 1


class Of:
    """What is collected, in one context."""

    def __init__(self, variable):
        self.variable = variable

    def get(self):
        return self.variable.get()

    def set(self, found):
        self.variable.set(found)


CONTEXT, THREAD = contextvars.ContextVar("found", default=None), threading.local()
OF_CONTEXT = Of(contextvars.ContextVar("found", default=None))


def collect_in_context(module, args, output):
    if (found := CONTEXT.get()) is not None:
        found.append(output)


def collect_in_thread(module, args, output):
    if (found := getattr(THREAD, "found", None)) is not None:
        found.append(output)


def collect_in_an_object(module, args, output):
    if (found := OF_CONTEXT.get()) is not None:
        found.append(output)


class Collecting(Net):
    """Returns what a hook has collected as well."""

    def forward(self, x):
        found = []
        CONTEXT.set(found)
        THREAD.found = found
        OF_CONTEXT.set(found)
        try:
            return super().forward(x), *found
        finally:
            CONTEXT.set(None)
            THREAD.found = None
            OF_CONTEXT.set(None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hook", [collect_in_context, collect_in_thread, collect_in_an_object])
def test_a_hook_that_collects_for_the_network_is_the_networks(hook, way):
    network = Collecting()
    network.conv.register_forward_hook(hook)
    assert len(network(IMAGE)) == 2
    first, _ = cs.plan_conversion(network, **WAYS[way]).rows
    assert first.reason.endswith("the network gives out what it computes, besides reading it")
    assert CONTEXT.get() is OF_CONTEXT.get() is THREAD.found is None


@pytest.mark.parametrize("way", WAYS)
def test_other_peoples_hooks_see_nothing(way):
    seen = []
    network = Net()

    def watch(module, args, output):
        seen.append(network.training)

    class Watcher:
        def __init__(self, watched):
            self.watched, self.outputs = watched, []

        def __call__(self, module, args, output):
            self.outputs.append(output)

        def catch(self, module, args, output):
            self.outputs.append(output)

    watcher = Watcher(network)
    for hook in (watch, watcher, watcher.catch, functools.partial(watch), lambda *args: watcher.catch(*args)):
        network.conv.register_forward_hook(hook)
    cs.plan_conversion(network, **WAYS[way])
    assert seen == watcher.outputs == []


# -- What refuses to be copied ------------------------------------------------------------------------------------


class Refusing:
    def __init__(self, held=None):
        self.held = held

    def __deepcopy__(self, memo):
        raise ZeroDivisionError("not to be copied")


class Locked:
    """Holds a tensor next to what cannot be copied."""

    def __init__(self):
        self.lock, self.number = threading.Lock(), torch.ones(1)


def cyclic():
    items = [torch.ones(1)]
    items.append({"again": items})
    return items


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "build",
    [
        threading.Lock,
        threading.Condition,
        functools.partial(open, __file__),
        functools.partial(ThreadPoolExecutor, 1),
        lambda: (number for number in range(3)),
        lambda: threading,
        Refusing,
        Locked,
        cyclic,
        lambda: torch.ones(1, requires_grad=True) * 2,
        lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
        pytest.param(
            lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged),
            marks=fails_on_torch_2_4("copies into no jagged tensor"),
        ),
        lambda: torch.eye(3).to_sparse(),
    ],
    ids=[
        *("lock", "condition", "file", "executor", "generator", "module", "refusing", "lock and tensor", "cyclic"),
        *("result", "quantised", "nested", "jagged", "sparse"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_odd_attribute_does_not_stop_planning(build, way):
    attribute = build()
    network = Net(odd=attribute, odds=[attribute])
    assert [row.name for row in cs.plan_conversion(network, **WAYS[way]).converted] == ["conv"]
    assert network.odd is attribute
    close = getattr(attribute, "shutdown", getattr(attribute, "close", lambda: None))
    close()


def test_what_holds_tensors_and_refuses_to_be_copied_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"model\.odd holds a Refusing with tensors .* \(ZeroDivisionError: not to be"):
        cs.plan_conversion(Net(odd=Refusing(torch.ones(1))), input_size=32)


def test_inputs_that_cannot_be_copied_are_refused():
    numbers = (number for number in range(3))
    with pytest.raises(TypeError, match="the inputs hold something that cannot be copied"):
        cs.plan_conversion(Net(), example_inputs=(IMAGE, numbers))
    assert next(numbers) == 0


def test_planning_takes_nothing_from_an_iterator_among_the_inputs():
    class Taking(Net):
        def forward(self, images):
            return super().forward(next(images))

    images = iter([IMAGE, IMAGE])
    assert cs.plan_conversion(Taking(), example_inputs=(images,)).converted
    assert len(list(images)) == 2


class Stream:
    """Refuses to be copied, and holds what its owner holds as well."""

    __module__ = "logging"  # into which nobody looks for what a network's code changes

    def __init__(self, items):
        self.items, self.more = items, [items]

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot be copied")


class Writer:
    def __init__(self):
        self.items = [1]
        self.stream = Stream(self.items)


def test_what_cannot_be_copied_keeps_what_it_holds():
    network = Net(writer=Writer())
    items, stream = network.writer.items, network.writer.stream
    copies = [cs.convert(network, input_size=32, inplace=False), cs.deploy(network.eval(), input_size=32)]
    assert all(copied.writer.items is not items and copied.writer.stream is stream for copied in copies)
    cs.convert(network, input_size=32)
    assert network.writer.items is stream.items is stream.more[0] is items


def test_a_writer_of_logs_goes_on_behind_planning(tmp_path):
    read = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    network = Net(writer=SummaryWriter(tmp_path, max_queue=1, flush_secs=0))
    cs.convert(network, input_size=32)
    for step in range(20):
        network.writer.add_scalar("loss", 0.5, step)
    network.writer.close()
    events = read.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(20)]


def test_planning_takes_nothing_from_a_generator():
    class Drawing(Net):
        def forward(self, x):
            return super().forward(x) * next(self.numbers)

    network = Drawing(numbers=(number for number in range(3)))
    with pytest.raises(ValueError, match=r"model\.numbers is a generator"):
        cs.plan_conversion(network, input_size=32)
    assert next(network.numbers) == 0


@pytest.mark.parametrize("way", WAYS)
def test_parameters_made_in_inference_mode_are_planned(way):
    with torch.inference_mode():
        network = Net()
    before = state_of(network)
    assert cs.plan_conversion(network, **WAYS[way]).converted
    check_untouched(network, before)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_on_meta_beside_buffers_on_a_device_are_planned(way):
    with torch.device("meta"):
        network = Net()
    network.norm.running_mean, network.norm.running_var = torch.zeros(16), torch.ones(16)
    assert cs.plan_conversion(network, **WAYS[way]).converted
    assert network.norm.running_mean.device.type == "cpu"


@pytest.mark.parametrize("way", WAYS)
def test_weights_written_while_planning_are_those_of_the_copy(way):
    class Averaging(Net):
        def forward(self, x):
            with torch.no_grad():
                self.mix.weight.mul_(0.99).add_(self.mix.bias.sum(), alpha=0.01)
                self.conv.weight.clamp_(min=0)
                self.norm.weight.data.add_(1)
            return super().forward(x)

    network = Averaging()
    before = state_of(network)
    assert cs.plan_conversion(network, **WAYS[way]).converted
    check_untouched(network, before)


def test_a_copy_has_hooks_modes_and_flags_of_its_own():
    network = copy.deepcopy(Net().train())
    converted = cs.convert(network, input_size=32, inplace=False)
    assert converted.training
    assert cs.get_plan(converted).converted
    assert not cs.get_plan(network).converted
