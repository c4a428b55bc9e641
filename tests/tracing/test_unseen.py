"""Nobody else sees planning."""

import copy
import gc
import logging
import random
import threading
from logging.handlers import MemoryHandler

import numpy as np
import pytest
import timm
import torch
import torch.fx as fx
import torch.nn as nn
from forwards import IMAGE, WAYS, Model
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import coconv_surgery as cs
from coconv_surgery.tracing import axes, following, grid_rules, observer
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.fx_map import _Tracer


@pytest.fixture(params=WAYS)
def plan(request, net):
    return lambda network=net: cs.plan_conversion(network, **WAYS[request.param])


# -- What lies around ---------------------------------------------------------------------------------------------


def test_hooks_on_all_modules_see_nothing(plan):
    seen = []
    handles = [
        register_module_forward_hook(lambda module, args, output: seen.append(type(output))),
        register_module_forward_pre_hook(lambda module, args: seen.append(args)),
        register_module_full_backward_hook(lambda module, before, after: seen.append(after)),
    ]
    try:
        plan()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == []


@pytest.mark.xfail(not hasattr(torch.compiler, "set_stance"), reason="since torch 2.6", strict=True)
@pytest.mark.parametrize("see", [cs.plan_conversion, cs.convert, cs.deploy], ids=lambda see: see.__name__)
def test_functions_that_a_network_compiles_are_compiled_when_it_runs(see):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    activate = torch.compile(lambda x: x.relu() + 1, backend=backend)
    net = Model(
        lambda net, x: net.out(activate(net.conv(x))), conv=nn.Conv2d(3, 8, 3, padding=1), out=nn.Conv2d(8, 2, 1)
    )
    see(net.eval(), input_size=32)
    assert not compiled
    net(IMAGE)
    assert len(compiled) == 1


@pytest.mark.xfail(not hasattr(torch.compiler, "set_stance"), reason="since torch 2.6", strict=True)
def test_branches_that_torch_compiles_run_after_planning():
    def forward(net, x):
        return net.out(torch.cond(x.sum() > 0, net.one, net.other, (x,)))

    parts = {name: nn.Conv2d(3, 8, 3, padding=1) for name in ("one", "other")}
    net = Model(forward, **parts, out=nn.Conv2d(8, 2, 1)).eval()
    with torch.no_grad():
        before = net(IMAGE)
        cs.plan_conversion(net, input_size=32)
        assert torch.equal(net(IMAGE), before)


def test_hooks_on_all_modules_see_nothing_of_graphs():
    seen = []
    graph = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), (IMAGE,)).module()
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        assert cs.plan_conversion(graph).converted
    finally:
        handle.remove()
    assert seen == []


def test_modes_see_nothing_and_stay(plan):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Dispatch() as dispatch, Function() as function:
        plan()
        assert seen == []
        assert _get_current_dispatch_mode_stack() == [dispatch]
        assert _get_current_function_mode_stack() == [function]
        torch.ones(1)
    assert len(seen) == 2


def test_a_counter_of_operations_counts_nothing(plan):
    with FlopCounterMode(display=False) as counter:
        plan()
    assert counter.get_total_flops() == 0


def test_hooks_on_saved_tensors_are_not_called(plan):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda tensor: tensor):
        plan()
    assert seen == []


def test_a_network_may_save_tensors_by_hooks_of_its_own(plan):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                return self.mix(self.conv(x).relu())

    assert plan(Saving()).converted


def test_a_network_may_take_gradients_in_its_forward(plan):
    class Descending(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            with torch.enable_grad():
                start = x.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(start.square().sum(), start)
            return self.mix(self.conv(x - gradient))

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert plan(Descending()).converted
    assert plan(Descending()).converted


class Noisy(nn.Module):
    """A network that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        noise = torch.rand(1).item() if isinstance(x, torch.Tensor) else 0
        return self.mix(self.conv(x * random.random() + np.random.rand() + noise))


def test_random_numbers_go_on_as_if_nothing_had_been_drawn(plan):
    network = Noisy()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    plan(network)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("needs_numbers", [False, True])
def test_inputs_are_not_changed(needs_numbers):
    class Sample:
        def __init__(self, image):
            self.image, self.seen = image, []

    class Changing(Noisy):
        def forward(self, batch):
            sample = batch["samples"][0]
            sample.seen.append(1)
            sample.image.mul_(2)
            batch["features"] = super().forward(sample.image)
            return batch["features"]

    batch = {"samples": [Sample(torch.ones(1, 3, 16, 16))]}
    before = copy.deepcopy(batch)
    plan = cs.plan_conversion(Changing(), example_inputs=cs.Inputs((batch,), needs_numbers=needs_numbers))
    assert plan.converted[0].output_sizes == ((16, 16),)
    assert batch.keys() == before.keys()
    assert batch["samples"][0].seen == []
    assert torch.equal(batch["samples"][0].image, before["samples"][0].image)


@pytest.mark.parametrize("collects", [True, False])
def test_whether_garbage_is_collected_by_itself_is_as_it_was(net, collects):
    if not collects:
        gc.disable()
    try:
        cs.plan_conversion(net, input_size=32)
        with pytest.raises(ValueError, match="does not run"):
            cs.plan_conversion(net, example_inputs=IMAGE[:, :1])
        assert gc.isenabled() is collects
    finally:
        gc.enable()


def test_torch_fx_is_not_patched_while_tracing(monkeypatch, net):
    seen = []
    call_module = _Tracer.call_module
    plain = nn.Module.__call__, nn.Module.__getattr__, fx._symbolic_trace.is_fx_tracing()

    def look(self, *args):
        seen.append((nn.Module.__call__, nn.Module.__getattr__, fx._symbolic_trace.is_fx_tracing()))
        return call_module(self, *args)

    monkeypatch.setattr(_Tracer, "call_module", look)
    cs.plan_conversion(net, input_size=32)
    assert set(seen) == {plain}


# -- Other threads ------------------------------------------------------------------------------------------------


def test_a_network_runs_in_another_thread_while_two_others_plan():
    net, image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        expected = net(image)
    planned = [timm.create_model("resnet18"), timm.create_model("efficientnet_b0")]
    plans = [cs.plan_conversion(model) for model in planned]
    failures, runs, done = [], 0, threading.Event()

    def run():
        nonlocal runs
        with torch.no_grad():
            while not done.is_set():
                assert torch.equal(net(image), expected)
                runs += 1

    def plan(number):
        for _ in range(4):
            assert cs.plan_conversion(planned[number]) == plans[number]

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            failures.append(error)

    runner = threading.Thread(target=guarded, args=(run,))
    planners = [threading.Thread(target=guarded, args=(plan, number)) for number in (0, 1)]
    for thread in (runner, *planners):
        thread.start()
    for thread in planners:
        thread.join()
    done.set()
    runner.join()
    assert failures == []
    assert runs > 100


# -- Errors -------------------------------------------------------------------------------------------------------


class StrangeError(Exception):
    """An error of a network's own."""


def test_whatever_a_network_raises_while_tracing_is_a_reason_in_the_plan():
    class Rejecting(Noisy):
        def forward(self, x):
            if isinstance(x, fx.Proxy):
                raise StrangeError("no proxies here")
            return self.mix(self.conv(x / (x.dim() - 3)))

    plan = cs.plan_conversion(nn.Sequential(Rejecting()), input_size=32)
    assert plan.rows[0].converted
    assert plan.rows[0].untraced == "torch.fx cannot trace 0: StrangeError: no proxies here"


def test_a_network_may_want_to_exit_while_it_is_traced():
    class Exiting(Noisy):
        def forward(self, x):
            if isinstance(x, fx.Proxy):
                raise SystemExit(1)
            return self.mix(self.conv(x))

    assert cs.plan_conversion(nn.Sequential(Exiting()), input_size=32).converted


def test_an_error_that_cannot_be_put_in_words_is_named():
    class MuteError(Exception):
        def __str__(self):
            raise KeyError("no words")

    class Failing(Noisy):
        def forward(self, x):
            raise MuteError

    with pytest.raises(ValueError, match=r"does not run on a 32 × 32 input \(MuteError\)"):
        cs.plan_conversion(Failing(), input_size=32)


@pytest.mark.parametrize("error", [StrangeError, ZeroDivisionError, StopIteration, OSError, RecursionError])
def test_whatever_a_network_raises_when_it_runs_is_in_the_message(error):
    class Failing(Noisy):
        def forward(self, x):
            raise error("not today")

    with pytest.raises(ValueError, match=rf"does not run on a 32 × 32 input \({error.__name__}: not today\)") as raised:
        cs.plan_conversion(Failing(), input_size=32)
    assert isinstance(raised.value.__cause__, error)


def test_what_a_network_logs_is_logged_by_its_own_runs_alone(plan):
    log, kept = logging.getLogger("features"), MemoryHandler(100)

    def forward(model, x):
        y = model.conv(x)
        log.error("shape %s, mean %s", y.shape, y.mean())
        return model.mix(y)

    network = Model(forward, conv=nn.Conv2d(3, 8, 3, padding=1), mix=nn.Conv2d(8, 4, 1))
    log.addHandler(kept)
    try:
        log.warning("before")
        assert plan(network).converted
        assert [record.args for record in kept.buffer] == [()]
        network(IMAGE)
        assert len(kept.buffer) == 2
    finally:
        log.removeHandler(kept)


def test_an_error_comes_without_torchs_log_of_it(capfd):
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="mat1 and mat2 shapes cannot be multiplied"):
        cs.plan_conversion(network, input_size=32)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "place",
    [
        (observer, "padded_by"),
        (observer, "OneSided"),
        (following, "fresh"),
        (grid_rules, "resized_dim"),
        (axes, "Axis"),
    ],
)
def test_a_fault_of_the_observer_is_not_the_networks(monkeypatch, place):
    def fail(*args, **kwargs):
        raise AttributeError("our own fault")

    monkeypatch.setattr(*place, fail)
    network = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    with pytest.raises(AttributeError, match="our own fault"):
        cs.plan_conversion(network, input_size=32)


def test_a_fault_of_the_observer_that_the_network_catches_comes_out(monkeypatch):
    class Catching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            try:
                return self.conv(x)
            except AttributeError:
                return x

    def fail(*args):
        raise AttributeError("our own fault")

    monkeypatch.setattr(observer._Observer, "_note", fail)
    with pytest.raises(AttributeError, match="our own fault"):
        cs.plan_conversion(Catching(), input_size=32)


def test_an_interrupt_leaves_everything_as_it_was(net):
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    network = nn.Sequential(net, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        cs.plan_conversion(network, input_size=32)
    assert _get_current_dispatch_mode_stack() == _get_current_function_mode_stack() == []
    assert [site.levels for site in find_sites(network)] == [None] * 3
    assert cs.plan_conversion(net, input_size=32).converted
