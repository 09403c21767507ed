import pytest
import torch
import torch.nn.functional as F
from depth_problem import Small, data

from dfed.plan import Plan
from dfed.state import ServerState

RATE, STEPS = 0.05, 3


def small(**client):
    return Small("scaffold", client={"learning_rate": RATE, "steps": STEPS, "epochs": None, **client},
                 options={"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "none"})


def by_the_book(model, batches, c, c_i, momentum=0.0):
    """Algorithm 1 of the paper for one client, float64: y_i, and c_i⁺ by option II (without momentum) and as a mean."""
    x = {name: value.detach().clone() for name, value in model.named_parameters()}
    means, moved = {name: torch.zeros_like(value) for name, value in x.items()}, {name: 0.0 for name in x}
    for images, labels in batches:
        names, values = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), values)
        with torch.no_grad():
            for name, value, gradient in zip(names, values, gradients, strict=True):
                means[name] += gradient / len(batches)
                moved[name] = momentum * moved[name] + gradient - c_i[name] + c[name]
                value -= RATE * moved[name]
    y = {name: value.detach() for name, value in model.named_parameters()}
    return y, {name: c_i[name] - c[name] + (x[name] - y[name]) / (len(batches) * RATE) for name in x}, means


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_turns_of_a_client_are_those_of_the_paper(momentum):
    problem = small(momentum=momentum)
    strategy, (x, y) = problem.strategy, data()
    plan = strategy.plan(ServerState(round_index=0, params={}), problem.candidate())
    assert plan.hold == plan.train == (*problem.chain.unit_names, "control")
    assert Plan.from_json(plan.to_json()) == plan
    controls = {name: value for name, value in problem.values.items() if name.startswith("control.")}
    assert sorted(controls) == sorted(f"control.{name}" for name, _ in problem.chain.named_parameters())
    assert all((value == 0).all() for value in controls.values())
    # The second turn begins with the same model, other c, and what the first left.
    c = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in problem.chain.named_parameters()}
    state, c_i = {}, dict(c)
    for _ in range(2):
        values = {**problem.values, **{f"control.{name}": value.float() for name, value in c.items()}}
        result, _ = problem.train(plan, x, y, values=values, client_state=dict(state))
        full = problem.model(strategy.full_plan())
        trained, by_option, by_mean = by_the_book(full, [(x.double(), y)] * STEPS, c, c_i, momentum)
        for name, value in trained.items():
            # float32 against float64: gradients of size 1e-2 … 1, three steps of 0.05.
            torch.testing.assert_close(result.update[name].double(), value, rtol=1e-4, atol=1e-6)
            kept = result.client_state[f"control.{name}"].double()
            torch.testing.assert_close(kept, by_mean[name], rtol=1e-3, atol=2e-5)
            if not momentum:
                torch.testing.assert_close(kept, by_option[name], rtol=1e-3, atol=2e-5)
            sent = result.update[f"control.{name}"].double()
            torch.testing.assert_close(sent, c[name] + kept - c_i[name], rtol=1e-3, atol=2e-5)
        assert result.client_state.keys() == controls.keys()
        state = result.client_state
        c_i = {name: state[f"control.{name}"].double() for name in c}
        c = {name: 0.5 * value + 0.1 for name, value in c_i.items()}
    assert any(value.abs().max() > 0.01 for value in c_i.values())  # else little was corrected


def test_the_servers_variate_moves_by_the_share_of_the_fleet_that_took_part():
    problem = small()
    weight, control = "hidden.fc.weight", "control.hidden.fc.weight"
    old = ServerState(round_index=0, params={weight: torch.ones(2), control: torch.tensor([1.0, 2.0])})
    new = ServerState(round_index=1, params={weight: torch.zeros(2), control: torch.tensor([6.0, -3.0])})
    after = problem.strategy.advance(old, new, {"senders": {"control": 2, "hidden": 2}})
    # 2 of the fleet's 5 clients: c + 2/5 · (mean − c).
    torch.testing.assert_close(after.params[control], torch.tensor([3.0, 0.0]), rtol=0, atol=1e-6)
    assert (after.params[weight] == 0).all()
    assert (problem.strategy.advance(old, old, {"senders": {}}).params[control] == old.params[control]).all()


def test_memory_counts_both_variates():
    problem, plain = small(), Small("fedavg", options={"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "none"},
                                    client={"learning_rate": RATE, "steps": STEPS, "epochs": None})
    state = ServerState(round_index=0, params={})
    model_bytes = sum(4 * value.numel() for value in plain.values.values())
    more = (problem.costs.peak_bytes(problem.strategy.plan(state, problem.candidate()))
            - plain.costs.peak_bytes(plain.strategy.plan(state, plain.candidate())))
    # c − c_i and the mean of the gradients, up to what a scalar takes.
    assert 2 * model_bytes <= more <= 2.05 * model_bytes
