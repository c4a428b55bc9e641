"""Files that nobody meant well, and config dicts like them: what reading one may cost, and how it may fail.

``PYTHONPATH=tests python -m fuzz.files --files 100000`` is the long run. A failure names the seed of its file, which
``--seed`` makes again with ``--files 1``.
"""

import argparse
import copy
import json
import os
import pickle
import random
import signal
import struct
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save

import coconv_surgery as cs
from coconv_surgery.checkpoint.reading import read_checkpoint, read_weights
from coconv_surgery.mmengine.options import SurgeryOptions

LARGEST = 1_000_000
SECONDS = 1.0
MEGABYTES = 100.0
GIVEN_UP_AFTER = 60.0
# Where a read fails, it says so with one of these; a dict of a config may also be of the wrong kind.
ERRORS = (ValueError, OSError)
VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**9, 10**30, 1.5, float("nan"), "", "x", "\ud800", "1", [], {}, [[]]]
VALUES += [[1, 2], [[1, 2]], {"a": 1}, range(10**9), "a." * 2000, [[[[[[]]]]]], b"x", b"\xff"]


class Net(nn.Module):
    """The smallest network with a convolution of the authors' name."""

    norm_after_add = True

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = cs.CoConv2d(4, 8, 3, padding=1, levels=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv2(x))


class Canary:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return random.choice([os.system, eval, exec]), (f"__import__('os').mkdir({str(self.path)!r})",)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Workshop:
    """Makes files and reads them.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        torch.manual_seed(0)
        self.net = Net().eval()
        self.plan = json.loads(cs.plan_conversion(self.net, input_size=(4, 16, 16)).to_json())
        self.theirs = {"conv2.conv2_1.weight": torch.ones(4, 4, 3, 3), "conv2.conv2_2.weight": torch.ones(4, 4, 3, 3)}
        self.theirs |= {name: tensor for name, tensor in self.net.state_dict().items() if name != "conv2.weight"}
        self.counts: Counter[str] = Counter()
        self.slowest, self.largest = (0.0, 0), (0.0, 0)

    def try_one(self, seed: int) -> None:
        """Make a file or dict and read it, in all ways that there are.

        Raises:
            AssertionError: If that costs too much, fails with another error, or runs code.
        """
        rng = random.Random(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        what = rng.choices(["plan", "safetensors", "torch", "config"], [3, 2, 4, 2])[0]
        name = {"plan": "p.json", "safetensors": "w.safetensors", "torch": "w.pth", "config": "none"}[what]
        path = self.folder / name
        made = getattr(self, f"_{what}")(rng)
        if what == "config":
            self._watch(seed, what, lambda: SurgeryOptions.read(made).convert(Net()), (*ERRORS, TypeError), "")
            return
        path.write_bytes(made[:LARGEST])
        readers: list[Callable[[], Any]] = [lambda: str(cs.Plan.from_json(path))]
        if what != "plan":
            readers = [
                lambda: read_weights(path),
                lambda: read_checkpoint(path),
                lambda: cs.load_authors_checkpoint(Net(), path),
                lambda: cs.read_plan(path),
                lambda: cs.load_converted(Net(), path),
            ]
        for reader in readers:
            self._watch(seed, what, reader, ERRORS, path.name)

    def _watch(self, seed: int, what: str, read: Callable[[], Any], errors: tuple[type, ...], name: str) -> None:
        before, start = peak(forget=True), time.process_time()
        outcome, said = "taken", name
        signal.setitimer(signal.ITIMER_REAL, GIVEN_UP_AFTER)
        try:
            read()
        except Exception as error:
            outcome, said = type(error).__name__, str(error)
            expected = isinstance(error, errors) and not isinstance(error, UnicodeError)
        else:
            expected = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, megabytes = time.process_time() - start, peak() - before
        self.counts[f"{what}: {outcome}"] += 1
        self.slowest, self.largest = max(self.slowest, (seconds, seed)), max(self.largest, (megabytes, seed))
        assert expected, f"{seed}: {what}: {outcome}: {said[:300]}"
        assert name in said, f"{seed}: {what}: the file is not named by {outcome}: {said[:300]}"
        assert seconds <= SECONDS, f"{seed}: {what}: {outcome} after {seconds:.1f} s"
        assert megabytes <= MEGABYTES, f"{seed}: {what}: {outcome} after {megabytes:.0f} MB"
        assert not self.canary.exists(), f"{seed}: {what}: code was executed"

    # -- What is made -------------------------------------------------------------------------------------------------

    def _plan(self, rng: random.Random) -> bytes:
        plan = copy.deepcopy(self.plan)
        kind = rng.randrange(6)
        if kind == 0:
            deep = rng.choice([100, 900, 1100, 100_000])
            field = rng.choice(["rows", "format", "version", "policy"])
            return json.dumps(plan).encode().replace(f'"{field}": '.encode(), f'"{field}": {"[" * deep}'.encode(), 1)
        if kind == 1:
            row = rng.choice(plan["rows"])
            count = 10 ** rng.randrange(1, 6)
            field = rng.choice(["dilations", "splits", "output_sizes", "aliases", "name", "reason"])
            row[field] = rng.choice(["a." * count, list(range(1, count)), [[1, 2]] * count, ["x"] * count])
            return json.dumps(plan, separators=(",", ":")).encode()
        if kind == 2:
            plan["rows"] *= 10 ** rng.randrange(4)
        for _ in range(rng.randrange(4)):
            _spoil(plan, rng)
        text = json.dumps(plan, default=str)
        if kind == 3:
            text = text.replace("1", "9" * rng.choice([20, 4000, 5000]), rng.randrange(1, 3))
        return _damaged(text.encode(), rng) if kind > 3 else text.encode()

    def _safetensors(self, rng: random.Random) -> bytes:
        weights = {_key(rng) if rng.random() < 0.2 else name: tensor for name, tensor in self.theirs.items()}
        text = self._plan(rng).decode(errors="replace") if rng.random() < 0.5 else json.dumps(self.plan)
        content = save({name.encode(errors="replace").decode(): t.contiguous() for name, t in weights.items()})
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size]) | {"__metadata__": {"coconv_plan": text}}
        for _ in range(rng.randrange(3)):
            _spoil(header, rng)
        head = json.dumps(header, default=str).encode()
        if rng.random() < 0.1:
            head = b'{"a":' * rng.choice([100, 10_000, 150_000])
        length = rng.choice([len(head)] * 9 + [0, 2**31, 2**62, 2**64 - 1, len(head) * 2])
        content = struct.pack("<Q", length) + head + content[8 + size :]
        return _damaged(content, rng) if rng.random() < 0.3 else content

    def _torch(self, rng: random.Random) -> bytes:
        content: dict[Any, Any] = dict(self.theirs)
        for _ in range(rng.randrange(3)):
            content[_key(rng)] = self._value(rng)
        if rng.random() < 0.2:
            content = {
                f"l{i}.conv2.conv2_{i % 9}.weight": torch.ones(i % 3, 1, 1, 1) for i in range(rng.randrange(400))
            }
        if rng.random() < 0.3:
            content = {rng.choice(["state_dict", "model", "x"]): content, "epoch": rng.choice(VALUES[:11])}
        path = self.folder / "made.pth"
        kind = rng.randrange(4)
        if kind == 0:
            with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
                file.writestr("w/data.pkl", _programme(rng))
                file.writestr("w/version", "3\n")
                file.writestr("w/data/0", b"\0" * rng.choice([4, 4000]))
                if rng.random() < 0.2:
                    file.writestr("w/data/1", b"\0" * 10 ** rng.randrange(6))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.6)
        found = path.read_bytes()
        return _damaged(found, rng) if kind == 1 else found

    def _value(self, rng: random.Random) -> Any:
        tensor = torch.ones(64)
        values: list[Callable[[], Any]] = [
            lambda: Canary(self.canary),
            lambda: Call(bytearray, 10 ** rng.randrange(12)),
            lambda: Call(torch.Tensor, 10 ** rng.randrange(12)),
            lambda: Call(torch.UntypedStorage, 10 ** rng.randrange(12)),
            lambda: tensor[:1].expand(10 ** rng.randrange(1, 12)),
            lambda: tensor.as_strided((60, 5), (1, 1)),
            lambda: tensor.to("meta").expand(10**6, 64),
            lambda: tensor.to_sparse(),
            lambda: tensor.to(torch.complex64),
            lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            lambda: nn.Parameter(tensor),
            lambda: {(1, (2, 3)): 4},
            lambda: _nested(rng.choice([10, 500])),
            lambda: "x" * 10 ** rng.randrange(6),
            lambda: [tensor] * 1000,
            lambda: {1, 2, "x"},
            lambda: rng.choice(VALUES[:16]),
        ]
        return rng.choice(values)()

    def _config(self, rng: random.Random) -> Any:
        options: dict[Any, Any] = {"policy": "uniform(2)", "input_size": 16, "overrides": {"conv2": 2}}
        keys = [*SurgeryOptions.__dataclass_fields__, "x"]
        for _ in range(rng.randrange(3)):
            value = rng.choice(VALUES)
            names = ["conv2", "head", "*", "x", 1]
            numbers = {"dilations": value, "splits": rng.choice(VALUES)}
            shapes = [
                value,
                {rng.choice(names): value},
                {rng.choice(names): numbers},
                {"type": "stage", "stages": value},
                [{"type": "Resize", "scale": value}],
            ]
            options[rng.choice(keys)] = rng.choice(shapes)
        if rng.random() < 0.5:
            options.pop("policy", None)
        if rng.random() < 0.3:
            options = {rng.choice(keys): rng.choice(VALUES)}
        return options if rng.random() < 0.97 else rng.choice(VALUES)


def _spoil(tree: Any, rng: random.Random) -> None:
    """Put a value where another belongs."""
    while True:
        entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
        if not entries:
            return
        key, value = rng.choice(entries)
        if isinstance(value, dict | list) and value and rng.random() < 0.8:
            tree = value
            continue
        if isinstance(tree, dict) and rng.random() < 0.2:
            del tree[key]
        else:
            chosen = rng.choice(VALUES)
            tree[key] = [*chosen[:1000]] if isinstance(chosen, range) else copy.deepcopy(chosen)
        return


def _damaged(content: bytes, rng: random.Random) -> bytes:
    spoiled = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(spoiled[: rng.randrange(len(spoiled) + 1)])
    if kind == 1:
        start = rng.randrange(len(spoiled) + 1)
        spoiled[start:start] = rng.randbytes(rng.randrange(1, 100))
    elif kind == 2 and spoiled:
        start = rng.randrange(len(spoiled))
        del spoiled[start : start + rng.randrange(1, 100)]
    for _ in range(rng.choice([1, 3, 30]) if spoiled else 0):
        spoiled[rng.randrange(len(spoiled))] = rng.choice([0, 0x7F, 0xFF, rng.randrange(256)])
    return bytes(spoiled)


def _key(rng: random.Random) -> Any:
    piece = rng.choice(["a.", "1.", ".conv2_", "conv2.conv2_1", "module.", ".coconv_levels.", "9"])
    long = piece * 10 ** rng.randrange(5)
    return rng.choice(
        [long, f"{long}.conv2.conv2_1.weight", f"conv2.conv2_{'9' * rng.randrange(9)}.weight", "\udc80", ""]
    )


def _nested(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value,)
    return value


def _programme(rng: random.Random) -> bytes:
    """A pickle that was never written by Python."""
    operations = [b"}", b"]", b"(", b")", b"\x85", b"\x86", b"N", b"q\0", b"h\0", b"K\1", b"s", b"u", b"a", b"e", b"t"]
    operations += [
        b"ccollections\nOrderedDict\n",
        b"R",
        b"\x81",
        b"b",
        b"X\1\0\0\0x",
        b"U\1x",
        b"\x8a\x02\0\1",
        b"Q",
        b"0",
    ]
    operations += [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"cbuiltins\nset\n",
        b"c_codecs\nencode\n",
        b"ctorch\nTensor\n",
    ]
    operations += [
        b"\x8f",
        b"cos\nsystem\n",
        b"\x8a\xff" + b"\x7f" * 255,
        b"X\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
    ]
    if rng.random() < 0.3:
        body = rng.choice(operations) * rng.choice([1000, 100_000, 300_000])
        return b"\x80\x02}" + body[: LARGEST - 5000] + b"."
    if rng.random() < 0.1:
        large, call = (
            rng.choice([(b"](", b"K\1", b"e"), (b"}(", b"K\1N", b"u"), (b"(", b"K\1", b"t")]),
            rng.choice(operations),
        )
        head = b"\x80\x02" + large[0] + large[1] * rng.choice([10, 50_000]) + large[2] + b"q\0" + call + b"q\1("
        return head + b"h\1h\0\x85R" * rng.choice([10, 50_000]) + b"t."
    if rng.random() < 0.3:
        key, count, side = rng.choice(["0", "1", "x"]), rng.choice([1, 1000, 10**9]), rng.choice([1, 1000, 10**6])
        storage = Call(tuple, ("storage", key, "cpu", count))
        return pickle.dumps({"x": Call(torch._utils._rebuild_tensor_v2, storage, 0, (side, 4), (0, 1), False, {})}, 2)
    return b"\x80\x02}" + b"".join(rng.choices(operations, k=rng.choice([5, 50, 500]))) + b"."


# -- A run --------------------------------------------------------------------------------------------------------


def peak(*, forget: bool = False) -> float:
    """The most memory that the process has had resident, in MB, since it was last to forget that."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


class EndlessError(Exception):
    """Reading a file does not come to an end."""


def _give_up(*_: Any) -> None:
    raise EndlessError


def try_files(seeds: range) -> tuple[Counter[str], tuple[float, int], tuple[float, int], list[str]]:
    """Try files one after the other.

    Returns:
        How often each kind ended how; the most seconds and megabytes, each with its seed; and what failed.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _give_up)
    failures = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workshop = Workshop(Path(folder))
        for seed in seeds:
            try:
                workshop.try_one(seed)
            except AssertionError as error:
                failures.append(str(error))
    return workshop.counts, workshop.slowest, workshop.largest, failures


def main() -> None:
    """Try many, in two processes, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    size = 500
    end = given.seed + given.files
    blocks = [range(start, min(start + size, end)) for start in range(given.seed, end, size)]
    counts: Counter[str] = Counter()
    slowest, largest, failures = (0.0, 0), (0.0, 0), []
    start = time.perf_counter()
    with ProcessPoolExecutor(min(given.jobs, len(blocks)), get_context("spawn")) as pool:
        for found, seconds, megabytes, failed in pool.map(try_files, blocks):
            counts += found
            slowest, largest = max(slowest, seconds), max(largest, megabytes)
            failures += failed
            for failure in failed:
                print(failure, flush=True)
    for outcome, count in sorted(counts.items()):
        print(f"{count:8,}  {outcome}")
    print(
        f"{given.files:,} files from seed {given.seed} in {time.perf_counter() - start:.0f} s: {len(failures)} failures"
    )
    print(f"at most {slowest[0]:.2f} s (seed {slowest[1]}) and {largest[0]:.0f} MB (seed {largest[1]}) to read one")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
