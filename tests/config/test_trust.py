"""Nothing is called that is not known beforehand to make what is asked for."""

import functools
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsam.base.errors import UsageError
from fedsam.config.plugins import imported, own
from fedsam.config.schema import resolve
from fedsam.simulate.build.data import load_dataset, split
from fedsam.simulate.build.method import new_method
from fedsam.simulate.build.model import new_model
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.tracking import new_trackers

PATHS = """
os:system os:popen os.path:join posix:system nt:system shutil:rmtree shutil:move subprocess:run
subprocess:Popen builtins:eval builtins:exec builtins:open builtins:print
importlib:import_module pickle:load pickle:Unpickler marshal:load code:interact runpy:run_path
runpy:run_module ctypes:CDLL webbrowser:open socket:create_connection urllib.request:urlretrieve
pathlib:Path tempfile:mkdtemp zipfile:ZipFile sqlite3:connect multiprocessing:Process pdb:run
timeit:timeit cProfile:run compileall:compile_dir venv:create asyncio:run antigravity:x
logging.config:fileConfig io:open torch:load torch:save torch.hub:load
torch.hub:download_url_to_file torch.jit:load torch.jit:save torch.serialization:load
torch.utils.cpp_extension:load torch.utils.cpp_extension:load_inline
torch.distributed:init_process_group torch:compile torch:set_num_threads torch:tensor
torch.ops:op torch.multiprocessing:spawn torch.utils.data:DataLoader
torch.package:PackageImporter torch:from_file torch.nn:functional torch.nn.init:os
torch.hub:shutil torch.hub:os torchvision.datasets:ImageFolder
torchvision.datasets.utils:download_url torchvision.datasets.utils:extract_archive
torchvision.io:write_file torchvision.ops:nms numpy:load numpy:save numpy:fromfile numpy:memmap
numpy.f2py:compile numpy:ndarray numpy.lib.npyio:load yaml:load yaml:unsafe_load yaml:full_load
pip:main pip._internal:main pip.__main__:x setuptools:setup pytest:main pytest.__main__:x
hypothesis:given safetensors.torch:save_file flwr_datasets:FederatedDataset flwr.cli.run:run
fedsam:run fedsam:load fedsam.base.system:write_whole fedsam.cli:main fedsam.runs.folder:RunDir
fedsam.runs.checkpoint:save fedsam.simulate.run:run fedsam.sweep.__main__:main
fedsam.sweep.queue:ProcessPool matplotlib.pyplot:savefig PIL.Image:open rich.console:Console :x
x: : :: ..x:y .x:y a:b.c a.:b a..b:c os:__name__ m:__class__ torch.nn:Module.forward a:b:c
"""
HARMFUL = PATHS.split()


@functools.cache
def digits():
    return load_dataset(resolve({}))


BUILT = {
    "dataset": load_dataset,
    "partition": lambda config: split(config, digits()),
    "model": lambda config: new_model(config, digits()),
    "minimizer": new_method,
    "client": new_method,
    "loss": new_method,
    "strategy": new_strategy,
    "average": new_strategy,
    "track": lambda config: new_trackers(config.track),
}


@pytest.mark.parametrize("key", BUILT)
def test_what_makes_no_such_thing_is_refused_before_it_is_called(key, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in HARMFUL:
        with pytest.raises(UsageError) as refused:
            BUILT[key](resolve({key: path, "clients_per_round": 5}))
        said = str(refused.value)
        assert said.startswith(f"--{key} {path}: "), said
        assert re.search("must|needs the methods|there is no module|has no|former API", said), said
    assert list(tmp_path.iterdir()) == []


def test_the_task_is_checked_too(tmp_path):
    for path in ("os:getcwd", "torch.nn:Linear", "torch:load"):
        with pytest.raises(UsageError, match=f"^--task {path}: .*needs the methods loss, stat"):
            new_trainer(resolve({"task": path}))


def test_a_folder_outlives_being_named_as_data(tmp_path):
    (tmp_path / "kept").write_text("")
    for path in ("shutil:rmtree", "torch.hub:_remove_if_exists", "mine_trust:rmtree"):
        with pytest.raises(UsageError, match=f"^--dataset {path}: "):
            load_dataset(resolve({"dataset": path, "data_root": tmp_path}))
    assert (tmp_path / "kept").exists()


MINE = """
import functools, os, pickle
from os import system
from pickle import loads
from shutil import rmtree
from torch import load, nn
from torchvision.models import squeezenet1_0
from fedsam.base.system import write_whole

def net(classes): return nn.Linear(64, classes)
def said(classes) -> nn.Module: return nn.Linear(64, classes)
@functools.cache
def kept(classes): return nn.Linear(64, classes)
short = lambda classes: nn.Linear(64, classes)
class Net(nn.Linear):
    def __init__(self, classes): super().__init__(64, classes)
class NoNet:
    def __init__(self): os.system("touch called")
class Callable:
    def __call__(self): os.system("touch called")
instance = Callable()
part = functools.partial(os.system, "touch called")
method = instance.__call__
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_trust.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine_trust", None)


def model(path, **options):
    config = resolve({"model": path, "model_options": options})
    return new_model(config, digits())


@pytest.mark.parametrize("name", ["net", "said", "kept", "short", "Net"])
@pytest.mark.usefixtures("mine")
def test_classes_and_functions_of_ones_own_are_called(name):
    assert model(f"mine_trust:{name}").weight.shape == (10, 64)


@pytest.mark.parametrize(
    "name",
    [*("system", "loads", "rmtree", "load", "write_whole", "NoNet", "instance", "part"), "method"],
)
def test_what_ones_own_module_took_from_elsewhere_is_not(mine, name):
    with pytest.raises(UsageError, match=f"^--model mine_trust:{name}: must derive from torch.nn"):
        model(f"mine_trust:{name}")
    assert not (mine / "called").exists()


def test_packages_functions_that_say_what_they_return_are_called():
    for path in ("torchvision.models:squeezenet1_0", "torchvision.models:get_model"):
        assert not own(imported("model", path, nn.Module))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("called"),)


def test_a_packages_model_unpickles_no_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save({"evil": Evil()}, "evil.pth")
    options = {"model_name": "test_resnet", "in_chans": 1, "checkpoint_path": "evil.pth"}
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        model("timm:create_model", **options)
    assert not Path("called").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
