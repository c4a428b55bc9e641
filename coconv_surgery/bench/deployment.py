"""Networks in the programs that run them: plain, plain deployed, contextual, contextual deployed."""

import copy
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from coconv_surgery.bench.speed import ssd
from coconv_surgery.bench.timing import Ratio, interleave, quiet
from coconv_surgery.deployment import deploy
from coconv_surgery.deployment.exporting import quietly, read_by_openvino, write_onnx
from coconv_surgery.surgery import convert

_CALLS = 5  # in a row, because a program finds its caches as another left them
_LOADINGS = 3  # each lays a network out in memory anew, which is worth a hundredth or two
RUNTIMES = ("ONNX Runtime", "OpenVINO", "torch.compile, frozen")
CONTENDERS = ("plain", "plain, deployed", "contextual", "contextual, deployed")


def _timm(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    return plain, convert(copy.deepcopy(plain), input_size=224)


def _ssd() -> tuple[nn.Module, nn.Module]:
    from coconv_surgery.mmdet.exporting import DetectorMaps

    return DetectorMaps(ssd("r50").eval()), DetectorMaps(ssd("coresnet50").eval())


NETWORKS: Mapping[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[int, ...]]] = {
    "resnet18, 1×224×224": (lambda: _timm("resnet18"), (1, 3, 224, 224)),
    "resnet50, 1×224×224": (lambda: _timm("resnet50"), (1, 3, 224, 224)),
    "efficientnet_b0, 1×224×224": (lambda: _timm("efficientnet_b0"), (1, 3, 224, 224)),
    "SSD300-ResNet50, 1×300×300": (_ssd, (1, 3, 300, 300)),
}


@dataclass(frozen=True)
class Deployed:
    """What a network takes in a program.

    Attributes:
        network: Its name.
        runtime: The program.
        plain_ms: Median milliseconds of the plain network, as it is.
        plain_deployed: The deployed plain one over that.
        contextual: The contextual one over that.
        contextual_deployed: The deployed contextual one over that.
        over_deployed: The deployed contextual one over the deployed plain one.
    """

    network: str
    runtime: str
    plain_ms: float
    plain_deployed: Ratio
    contextual: Ratio
    contextual_deployed: Ratio
    over_deployed: Ratio


@dataclass(frozen=True)
class Operations:
    """What ONNX Runtime takes for the operations of one kind that give maps of one size.

    Attributes:
        network: Name of the network.
        kind: What they do.
        output: The size of what they give.
        plain: How many there are in the plain network, deployed.
        plain_ms: Milliseconds that they take together there, by medians.
        contextual: The same of the contextual one, deployed.
        contextual_ms: Milliseconds there.
    """

    network: str
    kind: str
    output: tuple[int, ...]
    plain: int
    plain_ms: float
    contextual: int
    contextual_ms: float


def measure(name: str, rounds: int) -> list[Deployed]:
    """Time one network in every program, on the CPU, with as many threads as torch has.

    Args:
        name: One of :data:`NETWORKS`.
        rounds: How often to time each contender, over all the times that it is loaded.
    """
    build, shape = NETWORKS[name]
    images = torch.rand(shape)
    plain, contextual = build()
    networks = {
        "plain": plain,
        "plain, deployed": deploy(plain, example_inputs=images),
        "contextual": contextual,
        "contextual, deployed": deploy(contextual, example_inputs=images),
    }
    found = []
    for runtime in RUNTIMES:
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(_LOADINGS):
            with tempfile.TemporaryDirectory() as folder, quiet(), quietly(), torch.no_grad():
                calls = {
                    which: _PREPARE[runtime](network, Path(folder, f"{number}.onnx"), images)
                    for number, (which, network) in enumerate(networks.items())
                }
                part = interleave(calls, rounds=-(-rounds // _LOADINGS), device=torch.device("cpu"), warmup=3)
            for which, seconds in part.items():
                times[which] += seconds
        first, second, third = (Ratio.of(times[which], times["plain"]) for which in CONTENDERS[1:])
        last = Ratio.of(times["contextual, deployed"], times["plain, deployed"])
        milliseconds = 1000 * statistics.median(times["plain"]) / _CALLS
        found.append(Deployed(name, runtime, milliseconds, first, second, third, last))
    return found


def profile(name: str, rounds: int) -> list[Operations]:
    """Where a deployed network's time goes in ONNX Runtime, by its own profiler, and that of the plain one.

    Args:
        name: One of :data:`NETWORKS`.
        rounds: How often to run each.

    Returns:
        The operations of which the two do not have equally many.
    """
    build, shape = NETWORKS[name]
    images = torch.rand(shape)
    sessions = []
    with tempfile.TemporaryDirectory() as folder, quiet(), quietly(), torch.no_grad():
        for number, network in enumerate(build()):
            path = Path(folder, f"{number}.onnx")
            write_onnx(deploy(network, example_inputs=images), images, path)
            sessions.append(_session(path, profile=path.with_suffix("")))
        for _ in range(rounds):
            for session in sessions:
                session.run(None, {"images": images.numpy()})
        plain, contextual = map(_operations, sessions)
    return [
        Operations(name, *key, *plain[key], *contextual[key])
        for key in sorted({**plain, **contextual})
        if plain[key][0] != contextual[key][0]
    ]


def _operations(session: Any) -> dict[tuple[str, tuple[int, ...]], tuple[int, float]]:
    """How many operations of each kind and size a session has run, and milliseconds that they take together."""
    times: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time"):
            (output,) = event["args"]["output_type_shape"][0].values()
            times[event["args"]["op_name"], tuple(output)][event["name"]].append(event["dur"] / 1000)
    sums = {key: (len(nodes), sum(map(statistics.median, nodes.values()))) for key, nodes in times.items()}
    return defaultdict(lambda: (0, 0.0), sums)


def _onnx_runtime(network: nn.Module, path: Path, images: torch.Tensor) -> Callable[[], Any]:
    write_onnx(network, images, path)
    session = _session(path)
    feed = {"images": images.numpy()}
    return lambda: [session.run(None, feed) for _ in range(_CALLS)]


def _session(path: Path, profile: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle sessions would take a core each
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _openvino(network: nn.Module, path: Path, images: torch.Tensor) -> Callable[[], Any]:
    import openvino

    read = read_by_openvino(network, images)
    # In single precision, as the others: by itself it computes in bfloat16 where the processor can.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.compile_model(read, "CPU", hints | {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    feed = images.numpy()
    return lambda: [request(feed) for _ in range(_CALLS)]


def _frozen(network: nn.Module, path: Path, images: torch.Tensor) -> Callable[[], Any]:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(network), options={"freezing": True})
    return lambda: [compiled(images) for _ in range(_CALLS)]


_PREPARE = {"ONNX Runtime": _onnx_runtime, "OpenVINO": _openvino, "torch.compile, frozen": _frozen}
