"""Aggregation per entry, for a cohort of mixed widths, against plain FedAvg's.

Ten clients' updates of ResNet18 (3 × 32 × 32, 10 classes) are folded into the partial sums and made into the next global
model. FedAvg's hold all of the model. Of the others two hold each of the widths 1, 1/2, 1/4, 1/8 and 1/16: their first
channels (HeteroFL: boxes), a window that wraps around (FedRolex: several boxes), channels at random (Federated Dropout:
indices, other ones for each client). All turn by turn in one process, on one thread.

    python benchmarks/aggregation.py [--turns 7] [--model resnet18]

Last line: one JSON object. Times are medians; ratios to FedAvg are medians over the turns: `ratio` of the whole cohort, and
`per_entry` by the number of entries received.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfed import rng
from dfed.blocks.width import narrow, prefix, random_channels, window
from dfed.comm.partial_sums import MIN_RANGE, PartialSums, weight_scale
from dfed.memory import malloc
from dfed.models import Chain, build_chain, materialise
from dfed.region import WHOLE, Region
from dfed.server import Contribution, aggregate
from dfed.server.optimizers import sgd
from dfed.state import ServerState

RATES = (1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625)
WEIGHT = 100


def cohorts(chain: Chain) -> dict[str, list[dict[str, Region]]]:
    """The regions of each client, by method."""
    names = [name for name, tensor in chain.state_dict().items() if tensor.is_floating_point()]
    return {
        "fedavg": [dict.fromkeys(names, WHOLE) for _ in RATES],
        "heterofl": [narrow(chain, rate, prefix).regions for rate in RATES],
        "fedrolex": [narrow(chain, rate, window(50)).regions for rate in RATES],
        "feddropout": [
            narrow(chain, rate, random_channels(lambda group, c=client: rng.numpy_generator(0, "benchmark", c, group))).regions
            for client, rate in enumerate(RATES)
        ],
    }


def one(state: ServerState, clients: Sequence[Mapping[str, Region]], updates: Sequence[Mapping[str, Tensor]],
        sums: PartialSums, buffers: frozenset[str]) -> float:
    """Seconds to fold all updates and make the next model."""
    ranges = dict.fromkeys(state.params, MIN_RANGE)
    scale = weight_scale(WEIGHT * len(clients))
    begun = time.perf_counter()
    sums.clear()
    for regions, update in zip(clients, updates, strict=True):
        sums.add(update, regions, WEIGHT * scale, ranges)
    aggregate(state, sums, [Contribution(WEIGHT, regions) for regions in clients], scale, sgd(), buffers)
    return time.perf_counter() - begun


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--model", default="resnet18")
    options = parser.parse_args()
    torch.set_num_threads(1)
    malloc.roomy()  # as a rank that caps nobody
    chain = materialise(build_chain(options.model, {}, input_shape=(3, 32, 32), num_classes=10), rng.torch_generator(0, "init"))
    params = {name: tensor.detach() for name, tensor in chain.state_dict().items() if tensor.is_floating_point()}
    buffers = frozenset(params) - {name for name, _ in chain.named_parameters()}
    state, sums = ServerState(round_index=0, params=params), PartialSums({name: tuple(t.shape) for name, t in params.items()})
    found = cohorts(chain)
    updates = {
        name: [{tensor: region.view(params[tensor]).clone() for tensor, region in regions.items()} for regions in clients]
        for name, clients in found.items()
    }
    entries = {name: sum(value.numel() for update in clients for value in update.values()) for name, clients in updates.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(options.turns + 1):
        for name, clients in found.items():
            elapsed = one(state, clients, updates[name], sums, buffers)
            if turn:  # the first touches memory for the first time
                times[name].append(elapsed)
    print(f"{'method':12}{'entries':>14}{'median ms':>12}{'ns/entry':>10}{'ratio':>8}{'per entry':>11}")
    result = {}
    for name, seconds in times.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(seconds, times["fedavg"], strict=True))
        each = ratio * entries["fedavg"] / entries[name]
        median = statistics.median(seconds)
        print(f"{name:12}{entries[name]:14,}{1e3 * median:12.1f}{1e9 * median / entries[name]:10.2f}{ratio:8.2f}{each:11.2f}")
        result[name] = {"ratio": round(ratio, 3), "per_entry": round(each, 3)}
    del result["fedavg"]
    print(json.dumps({"model": options.model, "turns": options.turns, "aggregation": result}))


if __name__ == "__main__":
    main()
