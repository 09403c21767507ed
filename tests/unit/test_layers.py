"""Laws 3 and 4: imports go downwards, only ``dfed.comm`` talks to torch.distributed, and nothing is pickled or executed."""

import ast
import configparser
import itertools
import logging
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "dfed").rglob("*.py"))

# Modules that run code from data, and functions that do, or that move a global generator.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "pandas.read_pickle",
    "torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_rng_state",
    "numpy.random.seed", "numpy.random.set_state", "numpy.random.default_rng", "random.seed", "random.setstate",
}
PICKLING_COLLECTIVES = {
    "broadcast_object_list", "gather_object", "all_gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}
# The only loaders of YAML that build nothing but plain values.
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "SafeDumper", "CSafeDumper"}


def aliases(tree):
    """What each imported name stands for: ``np`` → ``numpy``, ``load`` → ``torch.load``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                names[item.asname or item.name.partition(".")[0]] = item.name if item.asname else item.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for item in node.names:
                names[item.asname or item.name] = f"{node.module}.{item.name}"
    return names


def imported(tree):
    """Full names of all modules and objects that are imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{item.name}" for item in node.names)


def mentioned(tree):
    """Full dotted names of all names and attributes that are used."""
    names = aliases(tree)
    for node in ast.walk(tree):
        parts, here = [], node
        while isinstance(here, ast.Attribute):
            parts.append(here.attr)
            here = here.value
        if isinstance(here, ast.Name) and isinstance(node, (ast.Name, ast.Attribute)):
            yield ".".join([names.get(here.id, here.id), *reversed(parts)])


def offences(source):
    """What a file does that no file may."""
    tree = ast.parse(source)
    found = {name for name in imported(tree) if name.partition(".")[0] in FORBIDDEN_MODULES}
    for name in [*mentioned(tree), *imported(tree)]:
        if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in PICKLING_COLLECTIVES:
            found.add(name)
        if name.startswith("yaml.") and name.endswith(("Loader", "Dumper")) and name[5:] not in SAFE_LOADERS:
            found.add(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only") and \
                not (isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")):
            found.add(node.arg)
    return found


def talks_to_torch_distributed(source):
    tree = ast.parse(source)
    return any(f"{name}.".startswith("torch.distributed.") for name in [*imported(tree), *mentioned(tree)])


def test_there_are_files_to_look_at():
    assert ROOT / "dfed" / "comm" / "transport.py" in FILES
    assert len(FILES) > 50


def test_imports_go_downwards_only(capsys, monkeypatch):
    """The contract stands in setup.cfg."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["lint-imports"])
    for logger in logging.root.manager.loggerDict.values():  # which the linter silences for good
        if isinstance(logger, logging.Logger):
            monkeypatch.setattr(logger, "disabled", logger.disabled)
    status = lint_imports(config_filename=str(ROOT / "setup.cfg"), no_cache=True)
    output = capsys.readouterr().out
    assert status == 0, output
    assert "1 kept, 0 broken" in output


def test_the_design_names_every_module_of_the_contract_in_its_order():
    contract = configparser.ConfigParser()
    contract.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = contract["importlinter:contract:layers"]["layers"].split("\n")
    height = {name: number for number, line in enumerate(filter(None, lines)) for name in line.replace("|", " ").split()}
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("| layer | what |")[2].partition("\n\n")[0]
    rows = [row.split("`")[1].split() for row in table.splitlines() if "`" in row]
    assert sorted(name for row in rows for name in row) == sorted(set(height) - {"__main__"})
    for above, below in itertools.pairwise(rows):
        assert max(height[name] for name in above) <= min(height[name] for name in below)


def test_only_comm_imports_torch_distributed():
    users = {path.relative_to(ROOT / "dfed").parts[0] for path in FILES if talks_to_torch_distributed(path.read_text())}
    assert users == {"comm"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_pickled_executed_or_drawn_globally(path):
    assert offences(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load", "eval('1')",
    "import torch as t\nt.save(1, 'x')", "import yaml\nyaml.load(1, Loader=yaml.Loader)", "import yaml\nyaml.FullLoader",
    "from yaml import unsafe_load as read", "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import torch.distributed as dist\ndist.gather_object(1)", "import numpy as np\nnp.random.seed(1)",
    "def f():\n    from random import seed\n    seed(1)", "import torch\ntorch.manual_seed(1)",
])
def test_an_offence_is_seen(source):
    assert offences(source)


@pytest.mark.parametrize("source", [
    "import torch.distributed", "import torch.distributed as dist", "from torch import distributed",
    "from torch.distributed import rendezvous", "import torch\ntorch.distributed.barrier()",
    "from torch.distributed.elastic import agent",
])
def test_a_use_of_torch_distributed_is_seen(source):
    assert talks_to_torch_distributed(source)


@pytest.mark.parametrize("source", [
    "import torch\ngenerator = torch.Generator()\ngenerator.manual_seed(1)", "import re\nre.compile('x')",
    "import yaml\nclass Loader(yaml.SafeLoader): ...", "model.eval()", "import numpy as np\nnp.load('x', allow_pickle=False)",
    "import torch\ntorch.distributions.Normal(0, 1)",
])
def test_what_is_allowed_is_let_pass(source):
    assert not offences(source)
    assert not talks_to_torch_distributed(source)
