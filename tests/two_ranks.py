"""What two real processes of a gloo group check of a converted network; both run the same."""

import copy
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn as nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import coconv_surgery as cs
from conftest import TinyNet


def build():
    torch.manual_seed(0)
    return TinyNet()


def converted():
    return cs.convert(build(), input_size=32)


def sharded(model):
    for part in (model.stem, model.body):
        fully_shard(part)
    return fully_shard(model)


def train(model, parameters=None, steps=2):
    """A few steps, each process on images of its own."""
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        optimizer.zero_grad()
        model(images[2 * step + dist.get_rank()]).square().mean().backward()
        optimizer.step()


def trained_alone(model):
    """The weights that an ordinary network comes to on the images of both processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        optimizer.zero_grad()
        losses = [model(images[2 * step + rank]).square().mean() for rank in range(2)]
        (sum(losses) / 2).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def agree(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def refuses(call, error, *words):
    message = None
    try:
        call()
    except error as raised:
        message = str(raised)
    assert message is not None, f"no {error.__name__}"
    assert all(word in message for word in words), message


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def a_converted_network_trains_under_ddp_as_alone():
    model = converted().eval()  # batch norm would see other batches
    expected = trained_alone(copy.deepcopy(model))
    train(nn.parallel.DistributedDataParallel(model))
    agree(dict(model.named_parameters()), expected)


def the_network_within_ddp_converts_and_trains_on():
    model = build().eval()
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, steps=1)
    cs.convert(parallel.module, input_size=32)
    expected = trained_alone(copy.deepcopy(model))
    train(parallel)
    agree(dict(model.named_parameters()), expected)


def a_converted_network_trains_sharded_as_alone():
    model = converted().eval()
    expected = trained_alone(copy.deepcopy(model))
    train(sharded(model))
    agree(whole(model), expected)
    assert [row.name for row in cs.get_plan(model).converted] == ["stem", "body.0"]


def a_sharded_network_is_not_converted():
    model = sharded(build())
    refuses(lambda: cs.convert(model, input_size=32), TypeError, "fully_shard()", "before")
    refuses(lambda: cs.convert(model.norm), TypeError, "DTensor", "before")


def a_sharded_network_is_not_reverted_in_part():
    model = sharded(converted())
    classes = [type(module) for module in model.modules()]
    refuses(lambda: cs.apply_plan(model, cs.get_plan(model)), TypeError, "fully_shard()", "before")
    for part in (model, model.body):
        refuses(lambda part=part: cs.revert(part), TypeError, "fully_shard()", "before")
    refuses(lambda: cs.revert(model.body[0]), TypeError, "DTensor", "before")
    assert [type(module) for module in model.modules()] == classes


def gathered_weights_are_saved_from_a_whole_network(path):
    model = sharded(converted())
    refuses(lambda: cs.save_converted(model, path), TypeError, "DTensor", "gathered")
    weights, plan = whole(model), cs.get_plan(model)
    if dist.get_rank() == 0:
        alone = build()
        alone.load_state_dict(weights)
        cs.save_converted(cs.apply_plan(alone, plan), path)
        agree(cs.load_converted(TinyNet(), path).state_dict(), converted().state_dict())


def a_replicated_network_is_neither_converted_nor_reverted():
    refuses(lambda: cs.convert(replicate(build()), input_size=32), TypeError, "replicate()", "before")
    refuses(lambda: cs.revert(replicate(converted())), TypeError, "replicate()", "before")


class Noisy(torch.utils.data.Dataset):
    """Images that each process sees in a way of its own, as augmentation has it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(10 * index + dist.get_rank())
        return torch.randn(3, 64, 64, generator=generator), index % 2


def calibration_gives_all_processes_the_same_weights():
    from mmengine.runner import Runner

    import coconv_surgery.classification  # noqa: F401

    with tempfile.TemporaryDirectory() as work:
        runner = Runner(
            model={
                "type": "TIMMClassifier",
                "model_name": "test_resnet",
                "num_classes": 2,
                "surgery": {"input_size": 64, "calibrate": {"images": 8}},
            },
            work_dir=work,
            train_dataloader=torch.utils.data.DataLoader(Noisy(), batch_size=4),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.0}},
            default_hooks={"checkpoint": None},
        )
        runner.train()
    assert cs.get_plan(runner.model.timm_model).calibrated == 8
    for name, tensor in runner.model.named_parameters():
        other = tensor.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(tensor, other), name


CHECKS = [
    a_converted_network_trains_under_ddp_as_alone,
    the_network_within_ddp_converts_and_trains_on,
    a_converted_network_trains_sharded_as_alone,
    a_sharded_network_is_not_converted,
    a_sharded_network_is_not_reverted_in_part,
    gathered_weights_are_saved_from_a_whole_network,
    a_replicated_network_is_neither_converted_nor_reverted,
    calibration_gives_all_processes_the_same_weights,
]


def _work(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for check in CHECKS:
        try:
            check(*([folder / "converted.safetensors"] if check.__code__.co_argcount else []))
        except Exception:  # told by the test of this name
            (folder / f"{check.__name__}.{rank}").write_text(traceback.format_exc())
        dist.barrier()
    dist.destroy_process_group()


def run(folder):
    """Run all checks in two processes; what went wrong in each, by its name."""
    multiprocessing.start_processes(_work, args=(folder,), nprocs=2, start_method="fork")
    return {check.__name__: "\n".join(p.read_text() for p in folder.glob(f"{check.__name__}.*")) for check in CHECKS}
