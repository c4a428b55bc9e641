"""Scripts run unedited on converted networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from launching import python, torchrun

import coconv_surgery as cs

TRAIN = """
import argparse, sys, torch
from timm import create_model

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--output", default=".")
parser.add_argument("--initial-checkpoint", default="")
args = parser.parse_args()
assert __name__ == "__main__"
model = create_model(args.model, num_classes=3, checkpoint_path=args.initial_checkpoint)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(2):
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
torch.save(model.state_dict(), f"{args.output}/last.pth")
print("trained")
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A script in a folder of its own, called from another."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # which a script becomes
    return Path("scripts") / "train.py"


AT_64 = ("run", "--policy", "resolution", "--input-size", 64)


OWN = """
import timm
from torch import nn

class Net(nn.Module):
    pass

def make(classes):
    return timm.models.ResNet(timm.models.resnet.BasicBlock, [1] * 4, channels=[8] * 4, num_classes=classes)
"""


@pytest.mark.parametrize("load", ["import own_parts.networks as n", "from own_parts import networks as n"])
def test_what_a_function_of_ones_own_makes_is_converted(coconv, train, monkeypatch, load):
    Path("own_parts").mkdir()
    Path("own_parts/networks.py").write_text(OWN)
    train.write_text(f"{load}\nimport coconv_surgery as cs\nprint(len(cs.get_plan(n.make(3)).converted))\n")
    for name in ("own_parts", "own_parts.networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    done = coconv(*AT_64, "--network", "own_parts.networks:make", "--", train)
    assert done.code == 0, done.err
    assert int(done.out) > 0
    assert cs.Plan.from_json("coconv-plan-own_parts.networks-make.json").converted
    for name, why in (("Net", "is not a function, but the class Net"), ("missing", "has no attribute 'missing'")):
        done = coconv(*AT_64, "--network", f"own_parts.networks:{name}", "--", train)
        assert (done.code, done.out) == (1, "")
        assert why in done.err


def test_a_script_trains_the_converted_network_and_its_checkpoint_says_so(coconv, train):
    make = timm.create_model
    Path("runs").mkdir()
    done = coconv(*AT_64, "--include", "layer1.*", "--", train, "--model", "test_resnet", "--output", "runs")
    assert done.code == 0, done.err
    assert done.out == "trained\n"
    assert "coconv: test_resnet, converted by resolution for 1×3×64×64" in done.err
    plan = cs.Plan.from_json("runs/coconv-plan-test_resnet.json")
    assert [row.name for row in plan.converted] == [row.name for row in cs.plan_of("runs/last.pth").converted]
    assert all(row.name.startswith("layer1.") for row in plan.converted)
    assert timm.create_model is timm.models.create_model is make


BUILDERS = """
import timm, torchvision, coconv_surgery
from timm.models import model_entrypoint
from torchvision.models import get_model_builder
from coconv_surgery import get_plan
for net in (model_entrypoint("test_resnet")(), get_model_builder("resnet18")(weights=None)):
    print(bool(get_plan(net).converted))
"""


@pytest.mark.parametrize(
    ("networks", "numbers"),
    [((), "True True"), (("--network", "resnet18"), "False True"), (("--network", "test_resnet*"), "True False")],
    ids=["all", "one", "another"],
)
def test_functions_that_a_library_gives_for_a_name_make_converted_networks(coconv, train, networks, numbers):
    train.write_text(BUILDERS)
    done = coconv(*AT_64, *networks, "--", train)
    assert done.code == 0, done.err
    assert done.out.split() == numbers.split()


def test_a_network_that_is_passed_over_by_its_whole_name_is_not_converted_by_a_part_of_it(coconv, train):
    train.write_text("import timm; timm.create_model('resnet18.a1_in1k')")
    done = coconv(*AT_64, "--network", "resnet18", "--", train)
    assert done.code == 1
    assert "the script made resnet18.a1_in1k, which no --network matches" in done.err


def test_a_network_without_a_convolution_to_convert_is_said_in_one_line(coconv, train):
    done = coconv(*AT_64, "--", train, "--model", "test_vit")
    assert "test_vit has no convolution to convert" in done.err
    assert "Warning" not in done.err


def test_a_rank_that_is_no_number_is_not_the_first(coconv, train, monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    done = coconv(*AT_64, "--", train, "--model", "test_resnet")
    assert (done.code, done.out) == (0, "trained\n"), done.err
    assert not list(Path().glob("coconv-plan-*"))


def test_options_of_the_script_are_its_own_without_a_dash_too(coconv, train):
    done = coconv(*AT_64, train, "--model", "test_resnet", "--output=.")
    assert done.code == 0, done.err
    assert Path("coconv-plan-test_resnet.json").exists()


def test_without_a_policy_our_models_are_registered_and_nothing_is_converted(coconv, train):
    for name, converted in (("coresnet18", True), ("test_resnet", False)):
        assert coconv("run", "--", train, "--model", name).code == 0
        assert (cs.plan_of("last.pth") is not None) is converted
    assert not list(Path().glob("coconv-plan*"))


def test_what_torchvision_makes_is_converted(coconv, train):
    train.write_text(
        "import torchvision\n"
        "model = torchvision.models.get_model('resnet18', weights=None)\n"
        "torchvision.models.get_model('squeezenet1_1')\n"
        "print(type(model.layer1[0].conv1).__name__)"
    )
    done = coconv("run", "--policy", "stage", "--input-size", 64, "-o", "plans", "--", train)
    assert (done.code, done.out) == (0, "CoConv2d\n"), done.err
    assert sorted(path.name for path in Path("plans").iterdir()) == [
        "coconv-plan-resnet18.json",
        "coconv-plan-squeezenet1_1-2.json",
    ]
    assert not isinstance(torchvision.models.get_model("resnet18").layer1[0].conv1, cs.CoConv2d)


def test_a_plan_of_an_earlier_run_holds_for_another_number_of_classes(coconv, train):
    cs.plan_conversion(timm.create_model("test_resnet"), "stage(2,2,2,1)").to_json("plan.json")
    assert coconv("run", "--plan", "plan.json", "--", train, "--model", "test_resnet").code == 0
    assert cs.plan_of("last.pth").policy == "stage(2,2,2,1)"
    # A checkpoint tells its plan, too; and is loaded into the network once that is converted.
    done = coconv(
        *("run", "--plan", "last.pth", "-o", "again", "--"),
        *(train, "--model", "test_resnet", "--initial-checkpoint", "last.pth"),
    )
    assert done.code == 0, done.err
    assert cs.Plan.from_json("again/coconv-plan-test_resnet.json").policy == "stage(2,2,2,1)"


def test_a_plan_of_a_module_of_lightnings_that_holds_the_network_holds_for_it(coconv, train):
    held = torch.nn.ModuleDict({"model": cs.convert(timm.create_model("test_resnet", num_classes=3), input_size=64)})
    torch.save({"state_dict": held.state_dict()}, "last.ckpt")
    done = coconv("run", "--plan", "last.ckpt", "--", train, "--model", "test_resnet")
    assert done.code == 0, done.err
    assert not cs.plan_of("last.pth").diff(cs.get_plan(held["model"]))
    done = coconv("convert", "test_resnet", "--arg", "num_classes=3", "--plan", "last.ckpt", "-o", "net.safetensors")
    assert done.code == 0, done.err


def test_a_checkpoint_of_other_levels_is_refused_as_it_is_loaded(coconv, train):
    assert coconv("run", "--policy", "stage(2,2,2,1)", "--", train, "--model", "test_resnet").code == 0
    done = coconv(*AT_64, "--", train, "--model", "test_resnet", "--initial-checkpoint", "last.pth")
    assert done.code == 1
    assert "RuntimeError" in done.err
    assert "levels" in done.err


@pytest.mark.parametrize(
    "code",
    [
        "import torchvision; torchvision.models.resnet18()",
        "import sys, torchvision; torchvision.models.resnet18(); sys.exit()",
        "import timm; timm.create_model('vit_tiny_patch16_224')",
    ],
)
def test_a_script_that_leaves_nothing_converted_is_told_at_the_end(coconv, train, code):
    train.write_text(code)
    done = coconv("run", "--policy", "stage", "--", train)
    assert done.code == 1
    assert "nothing was converted: the script made no network with 3×3 convolutions by timm.create_model" in done.err
    assert "as by torchvision.models.resnet50(), is converted by --network resnet50" in done.err
    assert not list(Path().glob("coconv-plan*"))


def test_a_script_keeps_its_exit_code_and_its_interrupt(coconv, train):
    train.write_text("import sys, timm; timm.create_model('test_resnet'); sys.exit(3)")
    assert coconv(*AT_64, "--", train).code == 3
    train.write_text("raise KeyboardInterrupt")
    done = coconv(*AT_64, "--", train)
    assert done.code == 130
    assert "Traceback" in done.err
    train.write_text("raise EOFError('truncated')")
    assert coconv(*AT_64, "--", train).err.endswith("EOFError: truncated\n")


def test_a_network_that_is_contextual_already_stays_as_it_is(coconv, train):
    model = cs.convert(timm.create_model("test_resnet", num_classes=3), "stage(2,2,2,1)")
    timm.models.save_for_hf(model, "folder", **cs.hub_arguments(model))
    done = coconv(*AT_64, "--", train, "--model", "local-dir:folder")
    assert done.code == 0, done.err
    assert "local-dir:folder is contextual already, and stays as it is" in done.err
    assert "converted by" not in done.err
    assert cs.plan_of("last.pth").policy == "stage(2,2,2,1)"


@pytest.mark.parametrize(("name", "levels", "told"), [("resnet", 1, True), ("resnet", 2, False), ("vit", 1, False)])
def test_weights_of_plain_convolutions_are_told_where_a_conversion_changed_a_network(coconv, train, name, levels, told):
    model, arguments = timm.create_model(f"test_{name}", num_classes=3), {}
    if levels > 1:
        arguments = cs.hub_arguments(cs.convert(model, f"uniform({levels})"))
    timm.models.save_for_hf(model, "folder", **arguments)
    train.write_text(
        "import timm\ntimm.create_model('local-dir:folder', pretrained=True)\ntimm.create_model('test_resnet')"
    )
    done = coconv("run", "--policy", "resolution", "--input-size", 160, "--", train)
    assert done.code == 0, done.err
    assert ("folder: its weights were trained in plain convolutions" in done.err) is told
    assert ("folder, converted by" in done.err) is told


def test_a_teacher_can_be_left_out(coconv, train):
    train.write_text(
        "import timm\nfor name in ('test_resnet', 'test_byobnet'):\n"
        "    print(any(hasattr(module, 'dilations') for module in timm.create_model(name).modules()))"
    )
    done = coconv(*AT_64, "--network", "test_resnet", "--", train)
    assert done.out.split() == ["True", "False"]


@pytest.mark.parametrize(
    "call",
    [
        "models.resnet18(pretrained=False)",
        "models.resnet18(False)",
        "models.__dict__['resnet18'](weights=None)",
        "models.get_model('resnet18')",
        "timm.models.resnet18()",
    ],
)
def test_networks_that_are_named_may_be_made_by_functions_of_that_name(coconv, train, call):
    train.write_text(
        "import timm, torchvision.models as models\n"
        f"for model in ({call}, models.alexnet(), models.vgg11()):\n"
        "    print(any(hasattr(module, 'dilations') for module in model.modules()))"
    )
    make = torchvision.models.resnet18
    done = coconv(*AT_64, "--network", "resnet18", "--", train)
    assert (done.code, done.out.split()) == (0, ["True", "False", "False"]), done.err
    assert torchvision.models.resnet18 is make
    assert Path("coconv-plan-resnet18.json").exists()


def test_a_script_that_makes_other_networks_than_are_named_is_told_which(coconv, train):
    train.write_text("import torchvision; torchvision.models.alexnet()")
    done = coconv(*AT_64, "--network", "resnet18", "--", train)
    assert "nothing was converted: the script made alexnet, which no --network matches" in done.err


def test_threads_make_converted_networks_at_once(coconv, train):
    train.write_text(
        "import timm\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    models = list(pool.map(timm.create_model, ['test_resnet'] * 4))\n"
        "print([any(hasattr(module, 'dilations') for module in model.modules()) for model in models])"
    )
    assert coconv(*AT_64, "--", train).out == "[True, True, True, True]\n"


OUTPUTS = """
import os, sys, timm
timm.create_model("test_resnet")
{what}
"""


@pytest.mark.parametrize(
    ("what", "arguments", "where"),
    [
        ("os.makedirs('new')", ["--output", "new"], "new"),
        ("open('new.csv', 'w').close()", ["--output", "new.csv"], "."),
        ("", ["--output-dir", "s3://bucket/run"], "."),
        ("os.makedirs('two')", ["--output", "one", "--output", "two"], "two"),
        ("os.makedirs('new'); sys.exit(4)", ["--output=new"], "new"),
    ],
)
def test_a_plan_waits_for_the_folder_that_the_script_makes(coconv, train, what, arguments, where):
    train.write_text(OUTPUTS.format(what=what))
    done = coconv(*AT_64, "--", train, *arguments)
    assert done.code in (0, 4), done.err
    assert (Path(where) / "coconv-plan-test_resnet.json").exists()
    assert len(list(Path().rglob("coconv-plan*"))) == 1


def alone(*arguments):
    """Run the command in a process of its own."""
    asked = [str(argument) for argument in arguments]
    return python(
        f"import runpy, sys; sys.argv = ['', *{asked}]; runpy.run_module('coconv_surgery', None, '__main__', True)"
    )


FORKED = """
import multiprocessing, os, sys, timm

def child():
    timm.create_model("test_resnet")
    os.makedirs("new", exist_ok=True)

if sys.argv[1] == "both":
    timm.create_model("test_byobnet")
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.parametrize(("who", "made"), [("child", ["test_resnet"]), ("both", ["test_byobnet", "test_resnet-2"])])
def test_a_plan_of_a_forked_process_is_written_too(train, tmp_path, who, made):
    train.write_text(FORKED)
    done = alone(*AT_64, "--", train, who, "--output", "new")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == [f"coconv-plan-{name}.json" for name in made]
    assert done.stderr.count("coconv: plan: ") == len(made)


def test_a_script_sees_what_python_would_show_it(coconv, train):
    train.write_text(
        "import os, pickle, sys\n"
        "class Mine: pass\n"
        "pickle.dumps(Mine())\n"
        "print(__name__, os.path.isabs(__file__), sys.argv, sys.path[0] == os.path.dirname(os.path.realpath(__file__)))"
    )
    assert coconv("run", "--", train, "a").out == f"__main__ True {[str(train), 'a']} True\n"


def test_a_module_is_run_by_its_name(coconv, train):
    assert coconv("run", "--", "-m", "scripts.train", "--model", "coresnet18").code == 0
    assert cs.plan_of("last.pth") is not None


AT_EXIT = """
import atexit, os, pickle, sys, timm
class Mine: pass
atexit.register(lambda: print(len(pickle.dumps(Mine())) > 0))
print(__name__, __spec__ is not None, __package__, sys.argv[1:])
"""


def test_a_module_that_is_run_is_still_there_at_exit(train, tmp_path):
    train.write_text(AT_EXIT)
    command = [sys.executable, "-m", "coconv_surgery", "run", "--", "-m", "scripts.train", "a"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["__main__ True scripts ['a']", "True"], done.stderr
    (tmp_path / "scripts" / "__main__.py").write_text("import timm\nprint(__package__)")
    assert alone("run", "--", "-m", "scripts").stdout == "scripts\n"


def test_another_plan_in_the_same_folder_is_written_beside_the_first(coconv, train):
    for policy in ("resolution", "resolution", "uniform(2)"):
        assert coconv("run", "--policy", policy, "--", train, "--model", "test_resnet").code == 0
    assert cs.Plan.from_json("coconv-plan-test_resnet.json").policy == "resolution"
    assert cs.Plan.from_json("coconv-plan-test_resnet-2.json").policy == "uniform(2)"
    assert len(list(Path().glob("coconv-plan*"))) == 2


def test_a_plan_that_was_given_is_not_written_again(coconv, train):
    assert coconv(*AT_64, "--", train, "--model", "test_resnet").code == 0
    for given in ("last.pth", "coconv-plan-test_resnet.json"):
        assert coconv("run", "--plan", given, "--", train, "--model", "test_resnet").code == 0
    assert len(list(Path().glob("coconv-plan*"))) == 1


def test_a_script_may_go_to_another_folder(coconv, train, monkeypatch):
    train.write_text(
        "import os, timm\nos.makedirs('elsewhere')\nos.chdir('elsewhere')\ntimm.create_model('test_resnet')"
    )
    home = Path().absolute()
    assert coconv(*AT_64, "-o", "plans", "--", train).code == 0
    assert (home / "plans" / "coconv-plan-test_resnet.json").exists()


def test_networks_that_no_pattern_matches_are_named_at_the_end(coconv, train):
    done = coconv(*AT_64, "--network", "resnet5*", "--", train, "--model", "test_resnet")
    assert done.code == 1
    assert "nothing was converted: the script made test_resnet, which no --network matches" in done.err


def test_an_error_of_the_script_has_its_traceback(train):
    train.write_text("def fail():\n    raise ValueError('of the script')\nfail()")
    done = alone("run", "--", train)
    assert done.returncode == 1
    assert 'scripts/train.py", line 2, in fail' in done.stderr
    assert done.stderr.endswith("ValueError: of the script\n")


TWO = """
import os, torch, torch.distributed as dist, timm
dist.init_process_group("gloo")
torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=2)
parallel = torch.nn.parallel.DistributedDataParallel(model)
parallel(torch.randn(2, 3, 64, 64) + dist.get_rank()).sum().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
torch.save(model.state_dict(), f"rank{dist.get_rank()}.pth")
dist.destroy_process_group()
"""


def test_two_processes_convert_alike_and_one_of_them_says_so(train, tmp_path):
    train.write_text(TWO)
    output = tmp_path / "output.txt"
    torchrun("coconv_surgery", *AT_64, "--", train, output=output)
    assert output.read_text().count("coconv: test_resnet, converted by resolution") == 1
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert cs.plan_of(first) == cs.plan_of(second) == cs.Plan.from_json(tmp_path / "coconv-plan-test_resnet.json")
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--policy", "stage", "--", "none.py"], 1, "there is no script 'none.py': give its path, or -m and a module"),
        (["--", "-m"], 1, "-m: give a module, as in -m package.train"),
        (["--", "-m", "nosuch.module"], 1, "there is no module 'nosuch.module'"),
        (["--", "scripts"], 1, "there is no script 'scripts'"),
        (["--network", "x", "--", "scripts/train.py"], 2, "--network is for networks that are converted: give"),
        (["-o", "plans", "--", "scripts/train.py"], 2, "--output is for networks that are converted: give --policy"),
        (
            ["--include", "layer1.*", "--", "scripts/train.py"],
            2,
            "--include is for networks that are converted: give",
        ),
        (["--plan", "plan.json", "--policy", "top", "--", "scripts/train.py"], 2, "leave out --policy"),
        (["--plan", "plan.json", "--", "scripts/train.py"], 1, "plan.json is not a plan"),
        (["--policy", "stag", "--", "scripts/train.py"], 1, "did you mean 'stage'"),
        (["--policy", "uniform", "--max-levels", "2", "--", "scripts/train.py"], 1, "has no key 'max_levels'"),
        (["--policy", "uniform", "--", "-m", "json.nosuch"], 1, "there is no module 'json.nosuch' to run"),
        (["--policy", "stage"], 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_message_before_the_script_starts(coconv, train, arguments, code, message):
    train.write_text("print('started')")
    Path("plan.json").write_text(json.dumps({}))
    done = coconv("run", *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
