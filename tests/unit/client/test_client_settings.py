import math
import sys

import pytest
import torch
from torch import nn

from dfed.client import ClientSettings, ScheduleSettings, make_optimizer
from dfed.plan import Phase


def test_schedules_follow_their_formulas():
    rounds = range(21)
    constant = ScheduleSettings()
    assert [constant.at(r, 20) for r in rounds] == [1.0] * 21
    step = ScheduleSettings(name="step", milestones=[5, 5, 12], factor=0.5)
    assert [step.at(r, 20) for r in rounds] == [1.0] * 5 + [0.25] * 7 + [0.125] * 9
    exponential = ScheduleSettings(name="exponential", factor=0.9)
    assert [exponential.at(r, 20) for r in rounds] == [0.9**r for r in rounds]
    growing = ScheduleSettings(name="exponential", factor=1e200)
    assert [growing.at(r, 3) for r in range(3)] == [1.0, 1e200, sys.float_info.max]
    cosine = ScheduleSettings(name="cosine", final=0.1)
    for r in rounds:
        assert cosine.at(r, 20) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * r / 20)), rel=1e-15)
    assert (cosine.at(0, 20), cosine.at(20, 20)) == (1.0, 0.1)
    assert cosine.at(10, 20) == pytest.approx(0.55)
    # torch's own cosine, as an independent reference; it works by recursion, so it rounds a few times more.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    for r in rounds:
        assert cosine.at(r, 20) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_phases():
    assert ClientSettings().phases == (Phase(batch_size=32, epochs=1),)
    assert ClientSettings(epochs=3, batch_size=5).phases == (Phase(batch_size=5, epochs=3),)
    assert ClientSettings(steps=7).phases == (Phase(batch_size=32, steps=7),)


@pytest.mark.parametrize(("given", "text"), [
    ({"epochs": 1, "steps": 1}, "either `epochs` or `steps`"),
    ({"nesterov": True}, "`momentum` above 0"),
    ({"optimizer": "adam", "momentum": 0.9}, "`momentum` with the optimiser 'adam'"),
    ({"optimizer": "adamw", "nesterov": False}, "`nesterov` with the optimiser 'adamw'"),
    ({"betas": [0.9, 0.99]}, "`betas` with the optimiser 'sgd'"),
    ({"epsilon": 1e-8}, "`epsilon` with the optimiser 'sgd'"),
    ({"optimizer": "adam", "betas": [0.9]}, "betas"),
    ({"optimizer": "adam", "betas": [0.9, 1.0]}, "betas"),
    ({"optimizer": "lion"}, "optimizer"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rate": math.inf}, "learning_rate"),
    ({"learning_rate": math.nan}, "learning_rate"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"weight_decay": math.inf}, "weight_decay"),
    ({"momentum": 1.0}, "momentum"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 2**31}, "batch_size"),
    ({"epochs": 0}, "epochs"),
    ({"batch_size": "32"}, "batch_size"),
    ({"schedule": {"name": "linear"}}, "schedule"),
    ({"schedule": {"factor": 0.0}}, "schedule.factor"),
    ({"schedule": {"factor": math.inf}}, "schedule.factor"),
    ({"schedule": {"milestones": [-1]}}, "schedule.milestones"),
    ({"schedule": {"factor": 0.1}}, "must leave out `factor` with the name 'constant', but sets it."),
    ({"schedule": {"name": "cosine", "milestones": [3], "factor": 0.5}},
     "leave out `factor` with the name 'cosine', but sets it. must leave out `milestones` with the name 'cosine', but"),
    ({"schedule": {"name": "exponential", "final": 0.0}}, "must leave out `final` with the name 'exponential'"),
    ({"schedule": {"name": "step", "final": 0.0}},
     "leave out `final` with the name 'step', but sets it. must have at least one of `milestones`"),
    ({"rate": 1}, "rate"),
])
def test_settings_that_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        ClientSettings.model_validate(given)


@pytest.mark.parametrize("given", [
    {}, {"optimizer": "adam"}, {"optimizer": "adamw", "betas": [0.8, 0.9]}, {"momentum": 0.5, "nesterov": True}, {"steps": 3},
    {"schedule": {"name": "step", "milestones": [2]}}, {"schedule": {"name": "exponential", "factor": 0.5}},
    {"schedule": {"name": "cosine"}, "optimizer": "adam"}, {"schedule": {"name": "constant"}},
])
def test_what_is_written_can_be_read(given):
    settings = ClientSettings.model_validate(given)
    written = settings.to_dict()
    again = ClientSettings.model_validate(written)
    assert again == settings
    assert again.to_dict() == written
    every = set(ClientSettings.model_fields)
    left_out = {"betas", "epsilon"} if settings.optimizer == "sgd" else {"momentum", "nesterov"}
    assert set(written) == every - left_out  # a later default changes nothing
    assert set(written["schedule"]) == {
        "constant": {"name"}, "step": {"name", "milestones", "factor"}, "exponential": {"name", "factor"},
        "cosine": {"name", "final"},
    }[settings.schedule.name]


def test_make_optimizer():
    parameters = [nn.Parameter(torch.zeros(2))]
    sgd = make_optimizer(ClientSettings(learning_rate=0.4, momentum=0.9, nesterov=True, weight_decay=1e-4), parameters, 0.25)
    assert type(sgd) is torch.optim.SGD
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, True, 1e-4)
    assert group["fused"]
    for name, family in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        settings = ClientSettings(optimizer=name, learning_rate=0.5, betas=[0.8, 0.95], epsilon=1e-6, weight_decay=0.3)
        made = make_optimizer(settings, iter(parameters), 0.5)
        assert type(made) is family
        group = made.param_groups[0]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.25, (0.8, 0.95), 1e-6, 0.3)
