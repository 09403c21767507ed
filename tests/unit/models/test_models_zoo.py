"""Every model of the registry: shapes, sizes, one training step, and no use of torch's global generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfed.errors import ConfigError
from dfed.models import Chain, build_chain, materialise
from dfed.registry import MODELS
from dfed.rng import torch_generator

torch.set_num_threads(1)

NORMED = [name for name in MODELS if name not in ("mlp", "vit_tiny")]
CASES = [(name, "batch", shape) for name in MODELS for shape in ((1, 28, 28), (3, 32, 32))]
CASES += [(name, "group", (3, 32, 32)) for name in NORMED]


def build(name: str, options: dict, shape: tuple[int, ...] = (3, 32, 32)) -> Chain:
    return build_chain(name, options, input_shape=shape, num_classes=10)


def num_parameters(name: str, options: dict, shape: tuple[int, ...] = (3, 32, 32)) -> int:
    return sum(parameter.numel() for parameter in build(name, options, shape).parameters())


@pytest.mark.parametrize(("name", "norm", "shape"), CASES, ids=lambda value: str(value))
def test_every_model(name, norm, shape):
    if name.startswith("vgg") and shape[1] < 32:
        with pytest.raises(ConfigError, match=r"`input_shape` must be at least 32 pixels .* but is \(1, 28, 28\)"):
            build(name, {}, shape)
        return
    options = {"norm": norm} if name in NORMED else {}
    if name == "cnn":
        options["dropout"] = [0.25, 0.5]
    state = torch.get_rng_state()
    chain = build(name, options, shape)
    assert chain.name == name
    assert chain.unit_names[-1] == "head"
    assert all(tensor.is_meta for tensor in chain.state_dict().values())
    assert chain.output_shapes()["head"] == (10,)

    materialise(chain, torch_generator(1, "init"))
    assert all(tensor.isfinite().all() for tensor in chain.state_dict().values())
    assert any(isinstance(m, nn.BatchNorm2d) for m in chain.modules()) == (name in NORMED and norm == "batch")

    x = torch.randn(2, *shape, generator=torch_generator(1, "x"))
    chain.eval()
    with torch.no_grad():
        activations = [x]
        for unit in chain.unit_names:
            activations.append(chain.unit(unit)(activations[-1]))
            assert tuple(activations[-1].shape[1:]) == chain.output_shapes()[unit], unit
        middle = len(chain) // 2
        assert torch.equal(chain.run(activations[middle].clone(), start=middle), activations[-1])
        assert torch.equal(chain(x), activations[-1])

    chain.train()
    chain.set_generator(torch_generator(1, "dropout"))
    loss = F.cross_entropy(chain(x), torch.tensor([3, 4]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in chain.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in chain.parameters())
    assert any(parameter.grad.any() for parameter in chain.unit("head").parameters())
    if name != "vit_tiny":  # whose head starts at 0 and stops the first gradient
        assert any(parameter.grad.any() for parameter in chain.unit(chain.unit_names[0]).parameters())
    before = [parameter.detach().clone() for parameter in chain.unit("head").parameters()]
    torch.optim.SGD(chain.parameters(), lr=0.1).step()
    after = [*chain.unit("head").parameters()]
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cnn", "densenet40", "mlp", "mobilenet_v2", "resnet8", "vit_tiny"])
def test_first_values_and_dropout_are_keyed(name):
    options = {"cnn": {"dropout": [0.25, 0.5]}, "vit_tiny": {"dropout": 0.1, "depth": 1}}.get(name, {})
    same, again, other = (materialise(build(name, options), torch_generator(seed, "init")) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), again.state_dict().values(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(same.state_dict().values(), other.state_dict().values(), strict=True)
    )
    if name in ("cnn", "mobilenet_v2", "vit_tiny"):
        x = torch.randn(4, 3, 32, 32, generator=torch_generator(1, "x"))
        outputs = []
        for chain, seed in ((same, 1), (again, 1), (same, 2)):
            chain.set_generator(torch_generator(seed, "dropout"))
            outputs.append(chain.run(x, stop="head") if name == "vit_tiny" else chain(x))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])


def test_published_parameter_counts():
    # McMahan et al. (2017): 199,210 for the 2NN and 1,663,370 for the CNN, on MNIST.
    assert num_parameters("mlp", {}, (1, 28, 28)) == 199_210
    assert num_parameters("cnn", {}, (1, 28, 28)) == 1_663_370
    pfl = {"kernel": 3, "hidden": 128, "padding": "valid", "pool": "last", "dropout": [0.25, 0.5]}
    assert num_parameters("cnn", pfl) == 1_626_442  # the CIFAR-10 CNN of pfl-research
    # torchvision: 11,689,512 for ResNet-18 with 1,000 classes; ours has 10.
    assert num_parameters("resnet18", {}, (3, 224, 224)) == 11_689_512 - 990 * 513


def test_cifar_resnets_have_the_parameters_of_the_formula():
    """He et al. (2016): 0.27 M for ResNet-20, 0.85 M for ResNet-56."""
    for name, n in (("resnet8", 1), ("resnet20", 3), ("resnet56", 9)):
        for width in (16, 5):
            total = 3 * 9 * width + 2 * width  # stem and its norm
            previous = width
            for planes in (width, 2 * width, 4 * width):
                for _ in range(n):
                    total += 9 * previous * planes + 9 * planes * planes + 4 * planes
                    previous = planes
            total += 10 * (previous + 1)
            assert num_parameters(name, {"width": width}) == total
    assert num_parameters("resnet20", {}) == 269_722
    assert num_parameters("resnet56", {}) == 853_018


def test_densenet_has_the_parameters_of_the_formula():
    """Huang et al. (2017): 1.0 M for depth 40 and growth 12."""
    total, channels = 3 * 9 * 16, 16
    for block in range(3):
        for _ in range(12):
            total += 2 * channels + 9 * channels * 12
            channels += 12
        total += 2 * channels + (channels * channels if block < 2 else 10 * (channels + 1))
    assert num_parameters("densenet40", {}) == total == 1_019_722


def batch_norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    scale, shift = (state[f"{name}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def random_state(chain: Chain) -> dict[str, torch.Tensor]:
    """Fill norms with random values too, in float64, and return all by name."""
    chain.double()
    generator = torch_generator(2, "state")
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.ndim == 1:
                parameter.normal_(generator=generator)
    return chain.state_dict()


def test_cifar_resnet_computes_what_the_paper_says():
    chain = materialise(build("resnet20", {"width": 4}), torch_generator(2, "init"))
    s = random_state(chain)
    x = torch.randn(3, 3, 32, 32, generator=torch_generator(2, "x"), dtype=torch.float64)
    h = batch_norm(s, "stem.norm", F.conv2d(x, s["stem.conv.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for index in range(3):
            unit = f"layer{stage}_{index}"
            reduces = stage > 1 and index == 0
            out = F.conv2d(h, s[f"{unit}.conv1.weight"], padding=1, stride=2 if reduces else 1)
            out = batch_norm(s, f"{unit}.bn1", out).clamp(min=0)
            out = batch_norm(s, f"{unit}.bn2", F.conv2d(out, s[f"{unit}.conv2.weight"], padding=1))
            if reduces:
                h = torch.cat([h[:, :, ::2, ::2], torch.zeros_like(h[:, :, ::2, ::2])], 1)
            h = (h + out).clamp(min=0)
    expected = h.mean((2, 3)) @ s["head.fc.weight"].T + s["head.fc.bias"]
    # float64, some 1e-16 a step over 20 layers whose values stay near 1; a wrong layer is off by far more than 1e-9.
    torch.testing.assert_close(chain.train()(x), expected, rtol=1e-9, atol=1e-9)


def test_densenet_computes_what_the_paper_says():
    chain = materialise(build("densenet40", {}, (3, 16, 16)), torch_generator(2, "init"))
    s = random_state(chain)
    x = torch.randn(2, 3, 16, 16, generator=torch_generator(2, "x"), dtype=torch.float64)
    features = F.conv2d(x, s["stem.conv.weight"], padding=1)
    for block in (1, 2, 3):
        parts = [features]
        for index in range(12):
            unit = f"block{block}_{index}"
            h = batch_norm(s, f"{unit}.norm", torch.cat(parts, 1)).clamp(min=0)
            parts.append(F.conv2d(h, s[f"{unit}.conv.weight"], padding=1))
        features = torch.cat(parts, 1)
        if block < 3:
            h = batch_norm(s, f"transition{block}.norm", features).clamp(min=0)
            h = F.conv2d(h, s[f"transition{block}.conv.weight"])
            n, c, height, width = h.shape
            features = h.view(n, c, height // 2, 2, width // 2, 2).mean((3, 5))
    h = batch_norm(s, "head.norm", features).clamp(min=0)
    expected = h.mean((2, 3)) @ s["head.fc.weight"].T + s["head.fc.bias"]
    # float64 over 40 layers, see above.
    torch.testing.assert_close(chain.train()(x), expected, rtol=1e-9, atol=1e-9)


def test_cnn_options():
    chain = build("cnn", {"channels": [4, 6, 8], "kernel": 3, "norm": "group", "hidden": 5})
    assert chain.unit_names == ("conv0", "conv1", "conv2", "hidden", "head")
    shapes = chain.output_shapes()
    assert shapes == {"conv0": (4, 16, 16), "conv1": (6, 8, 8), "conv2": (8, 4, 4), "hidden": (5,), "head": (10,)}
    assert "conv0.conv.bias" not in chain.state_dict()
    assert build("cnn", {"padding": "valid"}).output_shapes()["conv1"] == (64, 5, 5)
    assert build("cnn", {"kernel": 4, "padding": "valid", "pool": "last"}).output_shapes()["conv1"] == (64, 13, 13)
    with pytest.raises(ConfigError, match="`kernel` must be odd where `padding` is 'same', but is 4"):
        build("cnn", {"kernel": 4})
    with pytest.raises(ConfigError, match=r"`input_shape` must be large enough for 2 .* conv1 leaves nothing"):
        build("cnn", {"padding": "valid"}, (1, 8, 8))
    assert build("mlp", {"hidden": []}, (7,)).unit_names == ("head",)


def test_vit_options():
    with pytest.raises(ConfigError, match=r"`patch` must divide the height .* \(28 × 28\), but is 5"):
        build("vit_tiny", {"patch": 5}, (1, 28, 28))
    with pytest.raises(ConfigError, match="`width` must be a multiple of `heads`"):
        build("vit_tiny", {"width": 64})
    chain = build("vit_tiny", {"depth": 2, "width": 12, "patch": 8}, (1, 16, 32))
    assert chain.output_shapes() == {"embed": (9, 12), "block0": (9, 12), "block1": (9, 12), "head": (10,)}
