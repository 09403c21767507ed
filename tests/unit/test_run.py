"""What a rank makes from a config: what cannot be had is said of the config's own fields, before any process group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dfed import run
from dfed.config import load_config
from dfed.errors import ConfigError, DataError

SMALL = {
    "rounds": 1,
    "cohort": 2,
    "model": {"name": "mlp", "hidden": [4]},
    "data": {"dataset": "synthetic", "shape": [1, 8, 8], "classes": 4, "samples": 40, "test_samples": 8},
    "fleet": {"clients": 4, "tiers": [{"name": "all", "share": 1.0}]},
}


def _refused(*overrides, kind=ConfigError):
    config = load_config(None, overrides, base=SMALL)
    with pytest.raises(kind) as caught:
        run.prepare(config, torch.device("cpu"))
    if kind is DataError:
        return str(caught.value)
    (fault,) = caught.value.faults
    return str(fault)


def wrong_size(*, input_shape, num_classes):
    """A linear layer of the wrong size."""
    return nn.Sequential(nn.Flatten(), nn.Linear(65, num_classes))


def no_chain(*, input_shape, num_classes):
    """Not a chain."""
    return nn.Linear(64, num_classes)


def tied(*, input_shape, num_classes):
    """Two layers with one weight."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, second, nn.Linear(64, num_classes))


def raises(*, input_shape, num_classes):
    """Raises."""
    return {}["missing"]


class _Divides(nn.Module):
    def forward(self, x):
        return 1 // 0


def raises_later(*, input_shape, num_classes):
    """Raises when it is used."""
    return nn.Sequential(_Divides(), nn.Flatten(), nn.Linear(64, num_classes))


@pytest.mark.parametrize(("override", "said"), [
    ("model=vgg11_bn", "`model` must suit the images of data set 'synthetic', but 'vgg11_bn' does not: their shape must be at "
                       "least 32 pixels high and wide (five poolings halve it), but is (1, 8, 8)."),
    ("model={name: vit_tiny, patch: 3}", "`model.patch` must divide the height and the width of the image (8 × 8), but is 3."),
    ("model={name: vit_tiny, width: 7}", "`model.width` must be a multiple of `heads` (3), but is 7."),
    (f"model={__name__}:wrong_size", "unit '1' cannot take an input of shape (64,)"),
    (f"model={__name__}:no_chain", "`model` must return a Chain or an nn.Sequential"),
    (f"model={__name__}:tied", f"`model` must name a model that can be used, but '{__name__}:tied' cannot: `2.weight` must be"),
    (f"model={__name__}:raises", f"`model` must name a function that works here, but '{__name__}:raises' raised KeyError: "),
    (f"model={__name__}:raises_later", "raised ZeroDivisionError: "),
    ("model={name: mlp, hidden: [1000000000000, 1000000000000]}", "'mlp' raised RuntimeError: Storage size"),
])
def test_a_model_that_cannot_be_had_is_a_fault_of_the_config(override, said):
    found = _refused(override)
    assert found.startswith("`model")
    assert said in found


def test_what_this_machine_can_never_hold_is_refused_in_numbers(monkeypatch):
    pages = {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 1024}
    monkeypatch.setattr(run.os, "sysconf", pages.__getitem__)
    # 64 · 4 + 4 + 4 · 4 + 4 parameters of 4 bytes, three times.
    assert _refused() == (
        "`model` must be small enough for the server, which holds its parameters 3 times, in less than this machine's "
        "3.00 KiB, but takes 3.28 KiB."
    )
    pages["SC_PHYS_PAGES"] = 20
    assert _refused("data.test_samples=1000", "metrics.batch_size=100") == (
        "`metrics.batch_size` must be small enough for a mini-batch to take less than this machine's 20.00 KiB, but is 100, "
        "which takes 25.00 KiB."
    )
    run.prepare(load_config(None, ["metrics.batch_size=100"], base=SMALL), torch.device("cpu"))  # of 8 samples at most


def bad_labels(*, root, download, cache, seed):
    """Labels that cannot be read."""
    from dfed.data import ArrayDataset, Bundle

    class Unlabelled(ArrayDataset):
        def labels(self, indices):
            raise OSError("the labels are gone")

    images, labels = np.zeros((40, 1, 8, 8), np.uint8), np.arange(40) % 4
    data = Unlabelled(images, labels, num_classes=4)
    return Bundle(data, data)


def test_faults_of_the_data_name_the_configs_fields():
    cases = {
        "fleet.clients=41": "`fleet.clients` must be at least 1 and at most 40",
        "data.partition={name: fixed, samples_per_client: 11}": "`data.partition.samples_per_client` must be at most 10 for 4",
        "data.validation_fraction=0.999": "`data.validation_fraction` must leave at least 1 of 40",
        "data.samples=100000000000": "`data.partition` must give every client at most 67108864 samples",
    }
    for override, said in cases.items():
        assert _refused(override, kind=DataError).startswith(said)
    own = f"data={{dataset: '{__name__}:bad_labels', partition: dirichlet}}"
    found = _refused(own)
    assert found.startswith(f"`data.dataset` must name a function that works here, but '{__name__}:bad_labels' raised OSError")


def test_a_strategy_that_goes_by_evaluations_needs_validation_data():
    rolls_back = "strategy={name: neulite, order: elastic, rollback: 2, split: []}"
    assert _refused("model={name: mlp, hidden: [4, 4]}", rolls_back).startswith(
        "`metrics.split` must be 'validation' (and `data.validation_fraction` above 0) with these options of strategy 'neulite'"
    )
    ok = ["model={name: mlp, hidden: [4, 4]}", rolls_back, "metrics.split=validation", "data.validation_fraction=0.2"]
    assert run.prepare(load_config(None, ok, base=SMALL), torch.device("cpu")).planning.strategy.heeds_evaluation == 2
    assert _refused(*ok, "metrics.every=3") == (
        "`metrics.every` must be at most 2 with these options of strategy 'neulite', which counts rounds between evaluations, "
        "but is 3.")
    rotates = _refused(ok[0], "strategy={name: neulite, rollback: 2, split: []}")  # no stage lasts: nothing can be rolled back
    assert rotates == "`strategy.rollback` must be null with `order: rotate`, in which no stage lasts, but is 2."
