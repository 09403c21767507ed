"""Units frozen in 8 bits: what they hold, how they are loaded and emptied, and training with them."""

from __future__ import annotations

import copy
import ctypes
import platform

import pytest
import torch
from quantised_problem import CPU, SHAPE, normal, relative, scrambled, values_of
from torch import nn

from dfed.blocks import Splitting, freeze_int8
from dfed.blocks.int8 import dequantise, quantise
from dfed.blocks.quantised import FrozenConv2d, FrozenLinear
from dfed.client import ClientSettings, Forms, Skeleton, run_plan
from dfed.memory import predict_levels
from dfed.models import build_chain, materialise
from dfed.plan import Phase, Plan
from dfed.planner import Costs
from dfed.rng import torch_generator
from dfed.strategies import Problem, Strategy


def expected_bytes(unit: nn.Module, passes_gradient: bool) -> int:
    """Codes, scale and bias of each layer, and what a pack holds besides; all of the layers here have kernels for both ways."""
    total = 0
    for module in unit.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            channels, inputs = module.weight.shape[:2]
            total += module.weight.numel() + 12 * channels  # scale, bias, zero points
            total += passes_gradient * (module.weight.numel() + 8 * inputs)  # turned codes; their scales are 1, zero points
    return total


@pytest.mark.parametrize("passes_gradient", [False, True])
def test_memory_held(passes_gradient):
    chain = materialise(build_chain("resnet18", {}, input_shape=SHAPE, num_classes=10), torch_generator(1, "init"))
    unit = scrambled(chain.unit("layer4_1"))
    expected = expected_bytes(unit, passes_gradient)
    shapes = {name: tuple(value.shape) for name, value in values_of(unit).items()}
    hollow = nn.Sequential(copy.deepcopy(unit).to("meta"))
    freeze_int8(hollow[0], (512, 4, 4), passes_gradient=passes_gradient)
    skeleton = Skeleton(hollow)

    def load(values):
        skeleton.load(values, CPU)
        yield
        skeleton.unload()
        yield

    levels = predict_levels(lambda: {f"0.{name}": torch.empty(shape) for name, shape in shapes.items()}, load)
    assert levels == [expected, 0]
    if platform.libc_ver()[0] != "glibc":
        return
    values = {f"0.{name}": value for name, value in values_of(unit).items()}
    held = []
    for _ in range(3):  # libraries keep something the first time
        before = malloc_bytes()
        skeleton.load(values, CPU)
        held.append(malloc_bytes() - before)
        assert skeleton.unload()
    # A pack holds sums of codes beside them, and blocks of memory have borders: under 1 % here.
    assert held[-1] == pytest.approx(expected, rel=0.02)


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]


def malloc_bytes() -> int:
    """Bytes that glibc's allocator has given out."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def test_a_skeleton_is_loaded_and_emptied_twice():
    real = materialise(build_chain("resnet8", {"width": 16}, input_shape=SHAPE, num_classes=10), torch_generator(1, "init"))
    scrambled(real)
    hollow = real.skeleton()
    inputs = dict(zip(real.unit_names, [SHAPE, *real.output_shapes().values()], strict=False))
    for unit in ("stem", "layer1_0", "layer2_0"):
        freeze_int8(hollow.unit(unit), inputs[unit], dense=unit == "layer2_0")
    skeleton, values, x = Skeleton(hollow.eval()), values_of(real), normal(4, *SHAPE)
    before = {name: value.clone() for name, value in values.items()}
    outs = []
    for _ in range(2):
        skeleton.load(values, CPU)
        outs.append(hollow(x))
        assert relative(hollow.run(x, stop="layer3_0"), real.run(x, stop="layer3_0")) < 0.03  # as for units
        assert not [name for name in hollow.state_dict() if name.startswith(("stem", "layer1_0", "layer2_0"))]
        assert skeleton.unload()
        assert hollow.stem.conv._held is None
        assert {tensor.device.type for tensor in hollow.state_dict().values()} == {"meta"}
    assert torch.equal(*outs)
    assert all(torch.equal(value, before[name]) for name, value in values.items())
    with pytest.raises(AssertionError, match="taken its values"):
        hollow.stem(x)
    del values["layer1_0.bn1.running_var"]
    with pytest.raises(KeyError, match=r"layer1_0\.bn1\.running_var"):
        skeleton.load(values, CPU)


def test_on_other_devices_a_layer_holds_codes_and_computes_in_float32():
    layer, linear = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False), nn.Linear(200, 120).requires_grad_(False)
    held = (FrozenConv2d(layer, "0", None, True, (8, 8)), FrozenLinear(linear, "1", True))
    for module, real, x in zip(held, (layer, linear), (normal(2, 16, 8, 8), normal(2, 200)), strict=True):
        codes, scale = quantise(real.weight)
        module._choice = type(module._choice)(forward=False, gradient=False)  # as on CUDA
        module.take({"0.weight": real.weight, "0.bias": real.bias}, "0", CPU)
        real.weight.copy_(dequantise(codes, scale))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [module(leaves[0]), real(leaves[1])]
        assert torch.equal(*outs)
        for out in outs:
            out.backward(torch.ones_like(out))
        assert torch.equal(leaves[0].grad, leaves[1].grad)


class Last(Strategy):
    """Trains the last two units; those before are frozen in 8 bits, or where `plain` in float32."""

    def __init__(self, problem, *, plain: bool = False):
        super().__init__(problem)
        self.plain = plain

    def plan(self, state, candidate):
        return None

    def build(self, plan):
        chain, shape = super().build(plan), self.problem.chain.input_shape
        for unit, after in self.problem.chain.output_shapes().items():
            if unit not in plan.train and not self.plain:
                freeze_int8(chain.unit(unit), shape)
            shape = after
        return chain


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_behind_a_frozen_prefix(precision):
    results = {}
    chain = build_chain("resnet8", {"width": 32}, input_shape=(3, 16, 16), num_classes=4)
    splitting, train = Splitting.by_unit(chain.unit_names), chain.unit_names[-2:]
    values = values_of(materialise(chain.skeleton(), torch_generator(1, "init")))
    plan = Plan(client=0, hold=splitting.names, train=train, phases=(Phase(batch_size=10, epochs=1, train=train),))
    settings = ClientSettings(learning_rate=0.05, precision=precision)
    x, y = normal(30, 3, 16, 16), torch.arange(30) % 4
    for plain in (True, False):
        strategy = Last(Problem(chain=chain, splitting=splitting, phases=plan.phases, num_clients=1, seed=0), plain=plain)
        forms = Forms(strategy, splitting, {name: tuple(value.shape) for name, value in values.items()})
        skeleton, updates = Skeleton(strategy.build(plan)), []
        for _ in range(2):
            result = run_plan(strategy, plan, skeleton, values, forms.of(plan).regions,
                              lambda phase: zip(x.split(10), y.split(10), strict=True), settings, rate_factor=1.0, device=CPU,
                              generator=torch_generator(3, "layers"))
            updates.append({name: value.clone() for name, value in result.update.items()})
            assert skeleton.unload()
        assert all(torch.equal(value, updates[1][name]) for name, value in updates[0].items())
        trained = {name: value for name, value in updates[0].items() if name.startswith(train)}
        costs = Costs(strategy, settings, forms, CPU)
        flops = costs.flops(plan, 20), costs.int8_flops(plan, 20)
        results[plain] = trained, float(result.loss_sum), costs.peak_bytes(plan), *flops
    assert results[True][0].keys() == results[False][0].keys()
    assert any(not torch.equal(value, values[name]) for name, value in results[False][0].items())
    # Features differ by some 3 %, so do the losses of training, at the most.
    assert results[False][1] == pytest.approx(results[True][1], rel=0.05)
    assert results[False][2] < results[True][2]  # the weights of the prefix
    # The arithmetic is the same, on other numbers.
    assert results[True][4] == 0 < results[False][4]
    assert results[False][3] + results[False][4] == results[True][3]
