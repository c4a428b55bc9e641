"""Nothing that planning makes outlives it, wherever a network's code puts things."""

import contextvars
import functools
import gc
import os
import random
import threading
import time
import typing
import warnings
import weakref
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
import torch.fx as fx
import torch.nn as nn
from forwards import IMAGE, WAYS
from launching import python
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import coconv_surgery as cs
from coconv_surgery.tracing.surroundings import Surroundings


class Gridded(nn.Module):
    """A network that multiplies its features with a grid, which it keeps somewhere by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.mix(self.conv(x) * self.grid(tuple(x.shape[-2:])))

    def grid(self, size):
        return torch.ones(size)


DICT, LIST, SEEN, QUEUE, ORDERED, NESTED = {}, [], set(), deque(), OrderedDict(), {"grids": {"here": []}}
VALUE, COUNT = None, 0
LOCAL = threading.local()
VARIABLE = contextvars.ContextVar("grid", default=None)
KEPT = weakref.WeakValueDictionary()
BY_NETWORK = weakref.WeakKeyDictionary()
FOUND_BY_NAME_ALONE = {}
TAKES_ALL = []


class Record:
    grid = None


class SlottedRecord:
    __slots__ = ("grid",)


RECORD, SLOTTED = Record(), SlottedRecord()


class InADictionary(Gridded):
    def grid(self, size):
        if size not in DICT:
            DICT[size] = torch.ones(size)
        return DICT[size]


class InAFunctionOfItsOwn(Gridded):
    def grid(self, size):
        if size not in DICT:
            grid = torch.ones(size)
            DICT[size] = lambda: grid
        return DICT[size]()


class InAFunctionOfItself(Gridded):
    def grid(self, size):
        if size not in DICT:
            DICT[size] = lambda: self.mix.weight.new_ones(size)
        return DICT[size]()


class InAClassOfItsOwn(Gridded):
    def grid(self, size):
        if size not in DICT:
            DICT[size] = type("Kept", (), {"grid": torch.ones(size)})
        return DICT[size].grid


class InAList(Gridded):
    def grid(self, size):
        if not LIST:
            LIST.append(torch.ones(size))
        return LIST[0]


class InAQueue(Gridded):
    def grid(self, size):
        if not QUEUE:
            QUEUE.append(torch.ones(size))
        return QUEUE[0]


class InAnOrderedDictionary(Gridded):
    def grid(self, size):
        if size not in ORDERED:
            ORDERED[size] = torch.ones(size)
        ORDERED.move_to_end(size)
        return ORDERED[size]


class InNestedContainers(Gridded):
    def grid(self, size):
        grids = NESTED["grids"]["here"]
        if not grids:
            grids.append(torch.ones(size))
        return grids[0]


class BesideASetOfSizes(Gridded):
    grids = {}  # noqa: RUF012

    def grid(self, size):
        if size not in SEEN:
            SEEN.add(size)
            self.grids[size] = torch.ones(size)
        return self.grids[size]


class InAGlobalName(Gridded):
    def grid(self, size):
        global VALUE, COUNT
        COUNT += 1
        if VALUE is None:
            VALUE = torch.ones(size)
        return VALUE * COUNT


class InAClass(Gridded):
    kept = None
    calls = 0

    def grid(self, size):
        InAClass.calls += 1
        if InAClass.kept is None:
            type(self).kept = torch.ones(size)
        return InAClass.kept * InAClass.calls


class InAnObject(Gridded):
    def grid(self, size):
        if RECORD.grid is None:
            RECORD.grid = torch.ones(size)
        return RECORD.grid


class InASlot(Gridded):
    def grid(self, size):
        if not hasattr(SLOTTED, "grid"):
            SLOTTED.grid = torch.ones(size)
        return SLOTTED.grid


class InADefaultArgument(Gridded):
    def grid(self, size, grids={}):  # noqa: B006
        if size not in grids:
            grids[size] = torch.ones(size)
        return grids[size]


class InAStaticMethod(Gridded):
    @staticmethod
    def grid(size, grids=[]):  # noqa: B006
        if not grids:
            grids.append(torch.ones(size))
        return grids[0]


def in_a_closure():
    grid, grids = None, {}

    class InAClosure(Gridded):
        def grid(self, size):
            nonlocal grid
            if grid is None:
                grid = grids[size] = torch.ones(size)
            return grid + grids[size]

    return InAClosure()


def keep(size):
    if not hasattr(keep, "grid"):
        keep.grid = torch.ones(size)
    return keep.grid


class InAFunction(Gridded):
    def grid(self, size):
        return keep(size)


@functools.lru_cache
def bounded(size):
    return torch.ones(size)


@functools.cache
def unbounded(size):
    return torch.ones(size)


class InABoundedCache(Gridded):
    def grid(self, size):
        return bounded(size)


class InAnUnboundedCache(Gridded):
    def grid(self, size):
        return unbounded(size)


class InACacheOfAMethod(Gridded):
    @functools.lru_cache  # noqa: B019
    def grid(self, size):
        return torch.ones(size)


class InAThread(Gridded):
    def grid(self, size):
        if not hasattr(LOCAL, "grid"):
            LOCAL.grid = torch.ones(size)
        return LOCAL.grid


class InAContext(Gridded):
    def grid(self, size):
        if VARIABLE.get() is None:
            VARIABLE.set(torch.ones(size))
        return VARIABLE.get()


class InAWeakDictionary(Gridded):
    def grid(self, size):
        grid = KEPT.get(size)
        if grid is None:
            self.kept = KEPT[size] = grid = torch.ones(size)
        return grid


class InADictionaryByNetwork(Gridded):
    def grid(self, size):
        if self not in BY_NETWORK:
            BY_NETWORK[self] = torch.ones(size)
        return BY_NETWORK[self]


class ByAString(Gridded):
    def grid(self, size):
        grids = globals()["FOUND_BY_NAME_ALONE"]
        if size not in grids:
            grids[size] = torch.ones(size)
        return grids[size]


class WhereNoCodeTells(Gridded):
    where = "_ENOLA_EMAN_YB_DNUOF"

    def grid(self, size):
        grids = globals()[self.where[:0:-1]]
        if size not in grids:
            grids[size] = torch.ones(size)
        return grids[size]


class KeepsItself(Gridded):
    instances = []  # noqa: RUF012

    def grid(self, size):
        self.instances.append(self)
        globals()["LLA_SEKAT"[::-1]].append((self, size))
        return torch.ones(size)


class KeepsProxies(Gridded):
    def forward(self, x):
        DICT["last"] = x
        return super().forward(x)


NETWORKS = [*Gridded.__subclasses__(), in_a_closure]
# What these keep is looked for among all objects, of which a process of tests has a million.
SEARCHED = WhereNoCodeTells, KeepsItself


MADE_BY_PLANNING = FakeTensor, FakeTensorMode, fx.Proxy, fx.Tracer


def survivors(before):
    """What only planning makes, and is alive: all garbage is collected where collecting the young leaves any."""
    known = {id(value) for value in before}
    for generation in (1, 2):
        alive = []  # which would keep it
        gc.collect(generation)
        alive = [value for value in instances(*MADE_BY_PLANNING) if id(value) not in known]
        if not alive:
            break
    return alive


def instances(*classes):
    kinds = set()
    while classes:
        kinds.update(classes)
        classes = [kind for each in classes for kind in type.__subclasses__(each)]
    return [value for value in gc.get_referrers(*kinds) if type(value) in kinds]


@pytest.fixture(autouse=True)
def _nothing_is_left_of_a_test():
    yield
    globals().update(VALUE=None, COUNT=0)
    InAClass.kept, InAClass.calls = None, 0
    for container in (DICT, LIST, SEEN, QUEUE, ORDERED, NESTED["grids"]["here"], FOUND_BY_NAME_ALONE, TAKES_ALL):
        container.clear()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_a_network_that_keeps_something_gives_what_it_would_have_given(build, way):
    if build in SEARCHED:
        done = python(f"from tracing.test_leaves_nothing import *; plan_and_look({build.__name__}, {way!r})")
        assert done.returncode == 0, done.stderr
    else:
        plan_and_look(build, way)


def plan_and_look(build, way):
    network = build()
    plain = Gridded()
    plain.load_state_dict(network.state_dict())
    before = instances(*MADE_BY_PLANNING)
    others = weakref.WeakSet(instances(type(network)))
    for _ in range(2):
        plan = cs.plan_conversion(network, **WAYS[way])
    assert [row.converted for row in plan.rows] == [True, False]
    assert survivors(before) == []
    assert set(instances(type(network))) == set(others)
    output = network(IMAGE)
    assert type(output) is torch.Tensor
    assert torch.equal(output, plain(IMAGE) if build is not in_a_closure else network(IMAGE))


def test_a_cache_keeps_what_it_had_before():
    before = DICT[(8, 8)] = torch.zeros(8, 8)
    cs.convert(InADictionary(), input_size=32)
    assert list(DICT) == [(8, 8)]
    assert DICT[(8, 8)] is before


def test_a_cached_function_keeps_what_it_had_before():
    unbounded.cache_clear()
    before = unbounded((8, 8))
    cs.plan_conversion(InAnUnboundedCache(), input_size=32)
    assert unbounded((8, 8)) is before
    assert unbounded.cache_info().currsize == 1
    unbounded.cache_clear()


WRITTEN = None


def write_later(written):
    global WRITTEN
    time.sleep(0.05)
    WRITTEN = written


def test_what_another_thread_writes_meanwhile_stays():
    class Slow(Gridded):
        def grid(self, size):
            time.sleep(0.2)
            return torch.ones(size)

    thread = threading.Thread(target=write_later, args=("by another",))
    thread.start()
    cs.plan_conversion(Slow(), input_size=32)
    thread.join()
    assert WRITTEN == "by another"


@pytest.mark.parametrize("way", WAYS)
def test_generators_and_arrays_around_a_network_are_what_they_were(way):
    python, numpy, legacy = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)
    generator, numbers, octets = torch.Generator().manual_seed(0), np.zeros(3), bytearray(3)
    fixed = np.ones(3)
    fixed.flags.writeable = False

    class Drawing(Gridded):
        def grid(self, size):
            numbers[:] += fixed
            octets[0] = 7
            factor = python.random() + numpy.random() + legacy.rand() + float(torch.rand(1, generator=generator).sum())
            return torch.ones(size) * factor

    if way == "shapes":
        Drawing.grid = lambda self, size: torch.ones(size) * (python.random() + numpy.random() + legacy.rand())
    expected = [random.Random(0).random(), np.random.default_rng(0).random(), np.random.RandomState(0).rand()]
    assert cs.plan_conversion(Drawing(), **WAYS[way]).converted
    assert [python.random(), numpy.random(), legacy.rand()] == expected
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert numbers.tolist() == [0, 0, 0]
    assert octets == bytearray(3)


def test_planning_works_under_autocast_and_leaves_no_casts():
    network = Gridded()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for way in WAYS.values():
            assert cs.plan_conversion(network, **way).converted
        assert type(network(IMAGE)) is torch.Tensor


def test_an_order_of_use_is_the_one_before():
    network = InAnOrderedDictionary()
    ORDERED.update({(32, 32): torch.ones(32, 32), (8, 8): torch.ones(8, 8)})
    cs.plan_conversion(network, input_size=32)
    assert list(ORDERED) == [(32, 32), (8, 8)]


@pytest.mark.parametrize("around", [torch.zeros(3), torch.zeros(1).expand(3)], ids=["whole", "expanded"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_around_a_network_are_what_they_were(way, around):
    class Counting(Gridded):
        def grid(self, size):
            around[:1].add_(1)
            return torch.ones(size)

    cs.plan_conversion(Counting(), **WAYS[way])
    assert around.tolist() == [0, 0, 0]


CHANGES = {
    "gradient": lambda tensor: (tensor * 2).sum().backward(),
    "whether it requires one": lambda tensor: tensor.requires_grad_(False),
    "attribute": lambda tensor: setattr(tensor, "calls", tensor.calls + 1),
    "data": lambda tensor: setattr(tensor, "data", torch.ones(5)),
    "size": lambda tensor: tensor.detach().resize_(7),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_around_a_network_is_what_it_was(way, change):
    around = nn.Parameter(torch.arange(3.0))
    around.calls = 0

    class Changing(Gridded):
        def grid(self, size):
            change(around)
            return torch.ones(size)

    cs.plan_conversion(Changing(), **WAYS[way])
    assert (around.tolist(), around.requires_grad, around.grad, around.calls) == ([0, 1, 2], True, None, 0)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_in_memory_that_cannot_be_written_are_left_alone(tmp_path, way):
    np.save(tmp_path / "grid.npy", np.full(32, np.nan, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says once that the memory is not to be written
        grid = torch.from_numpy(np.load(tmp_path / "grid.npy", mmap_mode="r"))

    class Reading(Gridded):
        def grid(self, size):
            return grid

    network = Reading()
    network.register_buffer("table", grid)
    assert cs.plan_conversion(network, **WAYS[way]).converted


@functools.lru_cache(maxsize=1)
def random_grid(side):
    return torch.randn(side)


CACHES = {"by name": random_grid}


class OfClass(Gridded):
    @functools.lru_cache(maxsize=1)  # noqa: B019
    def grid(self, size):
        return torch.randn(size[0])


class OfClassAlone(Gridded):
    @staticmethod
    @functools.lru_cache(maxsize=1)
    def grid(size):
        return torch.randn(size[0])


class OfInstance(Gridded):
    def __init__(self):
        super().__init__()
        self.grid = functools.lru_cache(maxsize=1)(self.make)

    def make(self, size):
        return torch.randn(size[0]) * self.mix.weight.mean()


class Global(Gridded):
    def grid(self, size):
        return random_grid(size[0])


class InATable(Gridded):
    def grid(self, size):
        return CACHES["by name"](size[0])


@pytest.mark.parametrize("build", [OfClass, OfClassAlone, OfInstance, Global, InATable])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_bounded_cache_keeps_what_it_had_when_a_network_is_planned_for_another_size(build, numbers):
    network = build().eval()
    before = network(IMAGE)
    inputs = cs.Inputs((torch.ones(1, 3, 48, 48),), needs_numbers=numbers)
    assert cs.plan_conversion(network, example_inputs=inputs).converted
    assert torch.equal(network(IMAGE), before)


BANK = None


def test_a_file_in_memory_that_a_network_reads_is_not_written(tmp_path):
    global BANK

    class Reading(Gridded):
        def grid(self, size):
            return float(BANK[0])

    np.array([1, np.nan], dtype=np.float32).tofile(tmp_path / "bank")
    os.utime(tmp_path / "bank", (0, 0))
    BANK = np.memmap(tmp_path / "bank", dtype=np.float32, mode="r+")
    cs.convert(Reading(), input_size=32)
    BANK.flush()
    assert os.stat(tmp_path / "bank").st_mtime == 0
    BANK = None


def test_a_teacher_outside_of_the_network_is_what_it_was():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).train()

    class Student(Gridded):
        def forward(self, x):
            return super().forward(x) + teacher(x)

    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for way in WAYS.values():
        cs.plan_conversion(Student(), **way)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())


def test_what_a_network_defines_on_first_use_stays_defined():
    registry = {}

    class Registering(Gridded):
        def grid(self, size):
            registry.setdefault("part", type("Part", (), {}))
            return torch.ones(size)

    cs.plan_conversion(Registering(), input_size=32)
    assert list(registry) == ["part"]


def test_what_cannot_be_taken_out_is_an_error_with_its_holder():
    class Sealed:
        """Keeps things where Python cannot reach in."""

        def __init__(self):
            self._keep = []

        def put(self, value):
            self._keep.append(iter((value,)))

    sealed = Sealed()

    class Sealing(Gridded):
        def grid(self, size):
            grid = torch.ones(size)
            globals()["DELAES_"[::-1]].put(grid)
            return grid

    globals()["_SEALED"] = sealed
    try:
        with pytest.raises(ValueError, match="Sealing keeps what planning computed in a tuple"):
            cs.plan_conversion(Sealing(), input_size=32)
        assert cs.plan_conversion(Sealing(), **WAYS["numbers"]).converted
    finally:
        del globals()["_SEALED"]


class Kept:
    """Keeps one grid, by its size."""

    size = grid = None

    @classmethod
    def of(cls, size):
        return cls.made(cls, size)

    @staticmethod
    def made(keeper, size):
        if keeper.size != size:
            keeper.size, keeper.grid = size, torch.ones(size)
        return keeper.grid


class KeptByTheMetaclass(type):
    size = grid = None

    def of(cls, size):
        return Kept.made(KeptByTheMetaclass, size)


class Singleton(type):
    made: typing.ClassVar = {}

    def __call__(cls):
        if cls not in cls.made:
            cls.made[cls] = super().__call__()
        return cls.made[cls]


class OfAMetaclass(metaclass=KeptByTheMetaclass):
    pass


class OnlyOne(metaclass=Singleton):
    size = grid = None


KEPT_BY_ALL = Kept()
INHERITED = contextvars.ContextVar("kept", default=KEPT_BY_ALL)
LOADER = torch.utils.data.DataLoader([1], collate_fn=Kept.of)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "grid",
    [
        lambda size: OfAMetaclass.of(size),
        lambda size: Kept.made(OnlyOne(), size),
        lambda size: Kept.made(INHERITED.get(), size),
        lambda size: LOADER.collate_fn(size),
    ],
    ids=["metaclass", "singleton", "context", "loader"],
)
def test_what_a_network_reaches_in_a_roundabout_way_is_what_it_was(grid, way):
    class Net(Gridded):
        def grid(self, size):
            return grid(size)

    assert cs.plan_conversion(Net(), **WAYS[way]).converted
    assert type(Net()(IMAGE)) is torch.Tensor


def test_an_attribute_that_cannot_be_put_back_is_deleted_and_told():
    class Elsewhere(Gridded):
        def grid(self, size):
            keeper = globals()["DETTIMO"[::-1]]
            if not hasattr(keeper, "grid"):
                keeper.grid = torch.ones(size)
            return keeper.grid

    globals()["OMITTED"] = type("Keeper", (), {})
    try:
        with pytest.raises(ValueError, match=r"Elsewhere keeps what planning computed in .* deleted now"):
            cs.plan_conversion(Elsewhere(), input_size=32)
        assert type(Elsewhere()(IMAGE)) is torch.Tensor
    finally:
        del globals()["OMITTED"]


def test_a_network_that_does_not_run_leaves_nothing_either():
    class Failing(InADictionary):
        def grid(self, size):
            super().grid(size)
            raise ArithmeticError("no grid today")

    before = instances(*MADE_BY_PLANNING)
    with pytest.raises(ValueError, match="ArithmeticError: no grid today"):
        cs.plan_conversion(Failing(), input_size=32)
    assert DICT == {}
    assert survivors(before) == []


def test_the_memory_of_many_conversions_is_that_of_one(net):
    cs.revert(cs.convert(net, input_size=32))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        cs.revert(cs.convert(net, input_size=32))
    gc.collect()
    assert len(gc.get_objects()) - before < 200


def test_the_code_of_libraries_is_not_followed(net):
    surroundings = Surroundings(net)
    assert nn.Module not in surroundings
    assert type(net) in surroundings


def test_a_network_that_is_tested_does_not_lead_into_the_framework_that_tests_it(request):
    class Asserting(nn.Conv2d):
        def forward(self, x):
            assert x.dim() == 4
            return super().forward(x)

    surroundings = Surroundings(Asserting(3, 8, 3))
    assert Asserting in surroundings
    assert vars(request.config) not in surroundings
