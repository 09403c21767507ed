"""The mini-batches that each block is trained on: images, or what the blocks before it make of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dfed import rng
from dfed.blocks.local_blocks import Block
from dfed.blocks.local_net import LocalNet
from dfed.central.activation_cache import ActivationCache
from dfed.central.frozen import Frozen
from dfed.central.method import Problem
from dfed.central.state import Tally, TrainState
from dfed.checkpoint import params_sha256
from dfed.data import AUGMENTATIONS, client_batches
from dfed.plan import Phase

__all__ = ["Feed"]

logger = logging.getLogger(__name__)


class Feed:
    """Gives blocks their mini-batches, in an order keyed by seed and epoch.

    Args:
        cache: ``fp32``, ``fp16``: the output of the block before, on all samples, is kept in a file. ``none``: the blocks
            before are passed again for each mini-batch. Without augmentation ``fp32`` gives the same bits.
    """

    def __init__(self, problem: Problem, net: LocalNet, blocks: Sequence[Block], cache: Literal["fp32", "fp16", "none"]):
        self._problem, self._net, self._blocks = problem, net, blocks
        self._cache_type = cache
        self._piece = min(problem.data.num_samples, *(block.batch for block in blocks))
        self._cache = None if cache == "none" else ActivationCache(cache)
        self._frozen: Frozen | None = None

    def num_steps(self, block: Block) -> int:
        """Steps of an epoch of a block."""
        phase = Phase(batch_size=block.batch, epochs=1, drop_last=self._problem.settings.drop_last)
        return phase.num_steps(self._problem.data.num_samples)

    def cache_bytes(self, block: Block) -> int:
        """What the cache that a block reads takes on disk; 0 for the first, which has none."""
        if block.index == 0 or self._cache is None:
            return 0
        return self._problem.data.num_samples * self._cache.sample_bytes(self._shape(block))

    def work_in(self, folder: Path, block: Block | None) -> None:
        """Keep caches in ``folder`` from now on; first remove what is of no use for going on with ``block`` (None: all).

        Raises:
            TrainingFailed: If the disk has too little room for what is still to come.
        """
        if self._cache is None:
            return
        self._cache.work_in(folder)
        if block is None:
            self._cache.clear()
            return
        self._cache.keep_only({block.index, block.index - 1} - {0, -1})
        coming = range(max(1, block.index), len(self._blocks))
        most = max((self.cache_bytes(self._blocks[number]) + self.cache_bytes(self._blocks[number - 1]) for number in coming),
                   default=0)
        if most:
            self._cache.check_free(most)
        if self._problem.settings.augment != "none" and len(self._blocks) > 1:
            logger.warning("augmentation ('%s') is applied to the first block only: the others are trained on cached "
                           "activations (`method.cache` 'none' applies it to all)", self._problem.settings.augment)

    def prepare(self, block: Block, tensors: Mapping[str, Tensor], stopped: Callable[[], bool], tally: Tally,
                flops_of: Callable[[int, int], float]) -> bool:
        """Make sure that the block's cache is there, or load what is passed again. Made under the cap.

        Args:
            flops_of: Operations of a forward pass through layers, per sample; what is done is added to ``tally``.

        Returns:
            False if it was stopped on the way.

        Raises:
            TrainingFailed: If the disk fails, or is full.
        """
        if block.index == 0:
            return True
        if self._cache is None:
            starts = [self._net.layers[other.first].start for other in self._blocks[:block.index + 1]]
            self._frozen = self._make_frozen(starts)
            self._frozen.load(tensors)
            return True
        cache, key, before = self._cache, self._key(block, tensors), self._blocks[block.index - 1]
        if cache.holds(block.index, key):
            cache.keep_only([block.index])
            return True
        if not self.prepare(before, tensors, stopped, tally, flops_of):
            return False
        cache.check_free(self.cache_bytes(block) + self.cache_bytes(before))
        if not self._fill(block, before, key, tensors, stopped):
            return False
        tally.other_flops += self._problem.data.num_samples * flops_of(before.first, before.stop)
        cache.keep_only([block.index])
        return True

    def _fill(self, block: Block, before: Block, key: str, tensors: Mapping[str, Tensor], stopped: Callable[[], bool]) -> bool:
        layers, data, device = self._net.layers, self._problem.data, self._problem.device
        frozen = self._make_frozen([layers[before.first].start, layers[block.first].start])
        frozen.load(tensors)
        assert self._cache is not None
        if before.index == 0:
            places = (np.arange(start, min(start + self._piece, data.num_samples))
                      for start in range(0, data.num_samples, self._piece))
            source = (data.batch(chosen)[0] for chosen in places)
        else:
            source = self._cache.in_order(before.index, data.num_samples, self._piece, self._shape(before))
        pieces = (frozen(x.to(device)) for x in itertools.takewhile(lambda x: not stopped(), source))
        done = self._cache.write(block.index, key, data.num_samples, pieces)
        frozen.unload()
        return done

    def batches(self, block: Block, state: TrainState) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of the state's epoch that are still to come, on the device; after :meth:`prepare`."""
        problem, device = self._problem, self._problem.device
        data, settings = problem.data, problem.settings
        generator = rng.torch_generator(problem.seed, "batches", state.epoch)
        if block.index == 0 or self._cache is None:
            images = client_batches(data, np.arange(data.num_samples), batch_size=block.batch, epochs=1, generator=generator,
                                    drop_last=settings.drop_last, augment=AUGMENTATIONS[settings.augment])
            for x, y in itertools.islice(images, state.step, None):
                x = x.to(device)
                yield (x if self._frozen is None else self._frozen(x)), y.to(device)
            return
        # The order is that of `client_batches`.
        order = torch.randperm(data.num_samples, generator=generator).numpy()
        chosen = [order[step * block.batch:(step + 1) * block.batch] for step in range(state.step, self.num_steps(block))]
        values = self._cache.batches(block.index, chosen, self._shape(block))
        for places in chosen:
            yield next(values).to(device), torch.from_numpy(data.labels(places)).to(device)

    def rehearse(self, block: Block, size: int) -> None:
        """Pass ``size`` zeros through the units before a block, as they will be passed."""
        if block.index == 0:
            return
        if self._cache is None:
            first, bounds = 0, [self._net.layers[other.first].start for other in self._blocks[:block.index + 1]]
        else:
            first = self._net.layers[self._blocks[block.index - 1].first].start
            bounds = [first, self._net.layers[block.first].start]
        frozen = self._make_frozen(bounds)
        state = self._net.frozen(bounds[0], bounds[-1]).state_dict()
        frozen.load({name: torch.zeros(value.shape) for name, value in state.items()})
        frozen(torch.zeros(size, *self._net.shape_before(first), device=self._problem.device))
        frozen.unload()

    def start(self) -> None:
        """Start the thread that reads ahead, if there is something to read."""
        if self._cache is not None and len(self._blocks) > 1:
            self._cache.start()

    def release(self) -> None:
        """Let go of units that are passed again."""
        if self._frozen is not None:
            self._frozen.unload()
            self._frozen = None

    def close(self, finished: bool) -> None:
        """End the thread that reads ahead; with ``finished`` also remove all caches."""
        if self._cache is not None:
            self._cache.close()
            if finished:
                self._cache.clear()

    def _make_frozen(self, bounds: Sequence[int]) -> Frozen:
        problem = self._problem
        return Frozen(self._net, bounds, problem.device, problem.settings.precision, self._piece)

    def _shape(self, block: Block) -> tuple[int, ...]:
        """Of a sample that a block takes."""
        return self._net.shape_before(self._net.layers[block.first].start)

    def _key(self, block: Block, tensors: Mapping[str, Tensor]) -> str:
        """Hash of what the values of a block's cache depend on."""
        data, problem = self._problem.data, self._problem
        stop = self._net.layers[block.first].start
        starts = [self._net.layers[other.first].start for other in self._blocks[:block.index]]
        frozen = self._net.frozen(0, stop).state_dict()
        ends = np.unique(np.linspace(0, data.num_samples - 1, min(16, data.num_samples)).astype(np.int64))
        samples = []
        for place in ends.tolist():  # one by one: this counts against the budget
            images, labels = data.batch(np.array([place]))
            samples.append(params_sha256({"images": images, "labels": labels}))
        depends = [params_sha256({name: tensors[name] for name in frozen}), starts, stop, self._piece, self._cache_type,
                   problem.settings.precision, problem.device.type, math.prod(data.shape), data.num_samples,
                   samples]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
