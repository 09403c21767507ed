"""The compiler that is loaded late, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

BEGIN = """
import sys, torch
from dfed.planner.compiler import load_compiler_late
load_compiler_late()
"""
USED = """
from torch import nn
model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.ones(4, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
told = type(optimizer).zero_grad.__wrapped__
assert "torch._dynamo.eval_frame" not in sys.modules and vars(told)["__dynamo_disable"] is told
import torch._dynamo.config
assert "torch._dynamo.eval_frame" not in sys.modules
assert torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.zeros(3)).tolist() == [1, 1, 1]
assert "torch._dynamo.eval_frame" in sys.modules and "__dynamo_disable" not in vars(told)
assert type(sys.modules["torch._dynamo"]) is type(sys) and torch._dynamo.config is sys.modules["torch._dynamo.config"]
optimizer.zero_grad()
assert vars(told)["__dynamo_disable"] is not told
load_compiler_late()
assert torch._dynamo.disable(lambda: 3)() == 3
print("right")
"""
DECORATED = """
import gc, weakref
from torch.utils.checkpoint import checkpoint
x = torch.ones(3, requires_grad=True)
checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False).sum().backward()

@torch._dynamo.disable
def add(x, y):
    "Adds."
    return x + y

def told(x):
    return x
assert torch._dynamo.disable(told, True, wrapping=False) is told
seen = weakref.ref(told)
del told
assert seen() is None  # nothing is kept
assert add(1, y=2) == 3 and add.__doc__ == "Adds." and "torch._dynamo.eval_frame" not in sys.modules
import torch._dynamo.utils  # a module in the package: the package comes first
assert "torch._dynamo.eval_frame" in sys.modules and torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
broken = torch.compile(lambda x: add(x.sin(), 1), backend="eager", fullgraph=True)
try:
    broken(torch.zeros(2))
except torch._dynamo.exc.Unsupported:
    print("right")
"""


@pytest.mark.parametrize("use", [USED, DECORATED], ids=["used", "decorated"])
def test_the_compiler_is_loaded_when_it_is_used_and_then_told(use):
    done = subprocess.run([sys.executable, "-c", BEGIN + use], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("words", [["--strategies", "fedavg,neulite"], ["client.activation_checkpointing=true"]], ids=str)
def test_a_plan_does_without_the_compiler(words, tmp_path):
    script = f"""
import sys
from dfed.cli import main
sys.argv = ["dfed", "plan", "--model", "cnn", "--json", *{words!r}]
assert main() == 0
assert "torch._dynamo" in sys.modules and "torch._dynamo.eval_frame" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False,
                          env={**os.environ, "DFED_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "cnn"
