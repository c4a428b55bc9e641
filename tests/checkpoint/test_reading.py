"""Files of weights, as someone else may have made them."""

import collections
import pickle
import time
import zipfile

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file

import coconv_surgery as cs
from coconv_surgery.checkpoint.reading import read_checkpoint, read_weights

NET = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(path, content, **records):
    """A torch file with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
        for name, data in records.items():
            file.writestr(f"net/{name}", data)
    return path


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_weights_are_what_timm_reads(wrap, new, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in NET.state_dict().items()}
    torch.save(wrap(state), tmp_path / "net.pth", _use_new_zipfile_serialization=new)
    weights = read_weights(tmp_path / "net.pth")
    theirs = timm.models.load_state_dict(str(tmp_path / "net.pth"), use_ema=False)
    assert list(weights) == list(theirs) == list(NET.state_dict())
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


def test_a_checkpoint_keeps_all_that_was_saved(tmp_path):
    optimizer = torch.optim.Adam(NET.parameters())
    NET(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    saved = {
        "model": NET.state_dict(),
        "optimizer": optimizer.state_dict(),
        "meta": {"steps": collections.Counter("a")},
    }
    torch.save(saved, tmp_path / "net.pth")
    found = read_checkpoint(tmp_path / "net.pth")
    assert found["model"]._metadata == saved["model"]._metadata
    assert found["meta"] == saved["meta"]
    assert found["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])


def test_a_safetensors_file_is_known_by_its_content(tmp_path):
    save_file(NET.state_dict(), tmp_path / "net.bin")
    assert torch.equal(read_weights(tmp_path / "net.bin")["0.weight"], NET[0].weight)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3).half(),
        torch.ones(3, 2).t(),
        torch.ones(9)[2:5],
        torch.ones(0, 3),
        torch.tensor(1),
        torch.ones(2, dtype=torch.uint16),
        torch.ones(2).to(torch.float8_e4m3fn),
        nn.Parameter(torch.ones(2)),
        torch.ones(2, device="meta"),
    ],
    ids=["half", "transposed", "slice", "empty", "scalar", "uint16", "float8", "parameter", "meta"],
)
def test_every_ordinary_tensor_comes_back(tensor, new, tmp_path):
    new = new or tensor.dtype in (torch.uint16, torch.float8_e4m3fn)  # which came later than the old format
    torch.save({"x": tensor}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    found = read_weights(tmp_path / "x.pth")["x"]
    assert (found.shape, found.dtype, found.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert tensor.is_meta or torch.equal(found.float(), tensor.float())


# -- More than a file holds ---------------------------------------------------------------------------------------


def expanded(path, new=True):
    tensor = torch.zeros(1).expand(10**9)
    torch.save({"layer.x": tensor}, path, _use_new_zipfile_serialization=new)


def deflated(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("net/data.pkl", b"\0" * 10**7)


def of_a_storage(path):
    torch.save({"x": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x04", b"J\0\0\0\x7f"))


def nested_key(path):
    zipped(path, b"\x80\x02})" + b"\x85" * 1000 + b"Ns.")


def copies(function):
    """A long list, and a function that is called with it again and again."""
    return b"\x80\x02](" + b"K\x01" * 50_000 + b"eq\0" + function + b"q\1(" + b"h\1h\0\x85R" * 50_000 + b"t."


def two_directories(path):
    zipped(path, {"x": 1})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("net/data.pkl", pickle.dumps({"x": 2}, protocol=2))


def exported(path):
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def exported_by_an_older_torch(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("serialized_exported_program.json", "{}")
        file.writestr("serialized_state_dict.pt", b"")


def planned(path):
    cs.plan_conversion(NET, input_size=32).to_json(path)


HOSTILE = {
    "expanded": (expanded, r"tensor 'layer\.x' that claims 1,000,000,000 numbers of the 1 in its storage"),
    "expanded, legacy": (lambda path: expanded(path, False), "claims 1,000,000,000 numbers"),
    "deflated": (deflated, "is compressed"),
    "storage": (of_a_storage, "bytes of storage .* are not there"),
    "bytearray": (
        lambda path: zipped(path, {"x": Call(bytearray, 10**10)}),
        r"more than tensors \(__builtin__\.bytear",
    ),
    "tensor": (lambda path: zipped(path, {"x": Call(torch.Tensor, 10**10)}), "calls torch.Tensor"),
    "instructions": (lambda path: zipped(path, b"\x80\x02" + b"}" * 10**6), "made of instructions"),
    "key": (nested_key, "has a tuple for a key"),
    "copies": (lambda path: zipped(path, copies(b"cbuiltins\nset\n")), "made of instructions"),
    "sets": (lambda path: zipped(path, b"\x80\x02\x8f."), "EMPTY_SET"),
    "two directories": (two_directories, "did not write"),
    "list": (lambda path: torch.save([1], path), "holds a list, not tensors by name"),
    "TorchScript": (lambda path: torch.jit.script(nn.ReLU()).save(str(path)), "is a TorchScript archive"),
    "export": (exported, r"is a program of torch\.export"),
    "export of an older torch": (exported_by_an_older_torch, r"is a program of torch\.export"),
    "plan": (planned, r"is JSON, not weights: a plan is applied by apply_plan\(model, Plan\.from_json\(path\)\)"),
    "text": (lambda path: path.write_text("hello"), "is not a complete checkpoint: copy or download it again"),
    "length": (lambda path: path.write_bytes(b"\x80\x02\x8d" + b"\xff" * 7 + b"\x3f"), "is not a complete checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "is not a complete checkpoint"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_not_a_file_of_weights_is_refused_by_name(kind, tmp_path):
    make, message = HOSTILE[kind]
    make(tmp_path / "net.pth")
    with pytest.raises(cs.CheckpointError, match=rf"net\.pth .*{message}"):
        read_weights(tmp_path / "net.pth")


@pytest.mark.parametrize("key", ["a." * 500_000, "conv2.conv2_" * 80_000, "1." * 500_000])
def test_a_name_of_a_megabyte_takes_no_time(key, tmp_path):
    torch.save({key: torch.zeros(1), "conv2.conv2_1.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "net.pth")
    start = time.process_time()
    with pytest.raises(ValueError, match="unexpected in the file") as error:
        cs.load_authors_checkpoint(NET, tmp_path / "net.pth")
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 1000
