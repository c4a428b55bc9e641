"""Networks in the programs that run them: plain, plain deployed, contextual, contextual deployed."""

import copy
import statistics
import tempfile
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


def measure(name: str, rounds: int) -> list[Deployed]:
    """Time one network in every program, on the CPU, with as many threads as torch has.

    Args:
        name: One of :data:`NETWORKS`.
        rounds: How often to time each contender.
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
        with tempfile.TemporaryDirectory() as folder, quiet(), quietly(), torch.no_grad():
            calls = {
                which: _PREPARE[runtime](network, Path(folder, f"{number}.onnx"), images)
                for number, (which, network) in enumerate(networks.items())
            }
            times = interleave(calls, rounds=rounds, device=torch.device("cpu"), warmup=5)
        first, second, third = (Ratio.of(times[which], times["plain"]) for which in CONTENDERS[1:])
        last = Ratio.of(times["contextual, deployed"], times["plain, deployed"])
        milliseconds = 1000 * statistics.median(times["plain"]) / _CALLS
        found.append(Deployed(name, runtime, milliseconds, first, second, third, last))
    return found


def _onnx_runtime(network: nn.Module, path: Path, images: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime

    write_onnx(network, images, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle sessions would take a core each
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: [session.run(None, feed) for _ in range(_CALLS)]


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
