"""Layer-wise inertia: how far each unit of the global model moves from round to round, and how far its clients agree.

With W_t a unit's parameters after t completed rounds (norm statistics are none), n of them, and t₀ the reference:

    cosine        ⟨W_t, W_t₀⟩ / (‖W_t‖ ‖W_t₀‖)
    l1, l2        ‖W_t − W_t₀‖₁ and ‖W_t − W_t₀‖
    displacement  l2 / √n
    relative      l2 / ‖W_t₀‖
    step          ‖W_t − W_{t−1}‖ / ‖W_{t−1}‖
    diversity     Σ_i n_i ‖Δ_i‖² / Σ_e N_e Δ̄_e²

Cosine and norms against a reference round are those of Xiao et al. 2025 (LIPS, arXiv 2506.00932); displacement, relative and
step do not grow with the layer. Diversity is the gradient diversity of Yin et al. 2018 (arXiv 1706.05699), Σ‖Δ_i‖² / ‖ΣΔ_i‖²,
weighted by samples, as the fused exchange yields no other sum: Δ_i is what client i changed, n_i its samples, N_e the samples
of those that sent entry e, Δ̄_e the weighted mean of their changes. Where all send the whole unit this is, with
p_i = n_i / Σ n_j, Σ p_i ‖Δ_i‖² / ‖Σ p_i Δ_i‖². It is 1 where all that share an entry agree, and larger otherwise; the plain
form is 1 / m where m clients agree.

Δ_i is taken between what arrives at the server, through the codecs, and what the server sent, likewise; what a client does to
that before it trains is part of its change.

All is worked out in float32 in stretches that stay in a core's cache, and added up over these in float64: sums of squares are
good to some 10⁻⁷ of themselves. Stretches are copied to where they are always aligned alike, so that the same values give the
same bits. The cosine, which would be lost in such an error where a unit has hardly moved, is worked out from the distance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["MeanChange", "change_squares", "movement"]

_CHUNK = 65_536  # stretches of 256 KiB stay in a core's second-level cache


def change_squares(update: Mapping[str, Tensor], base: Mapping[str, Tensor], units: Mapping[str, str]) -> dict[str, float]:
    """Of each unit, the sum of the squares of what a client changed; units of which it sends no parameter are left out.

    Args:
        update, base: What arrives of the client, and what it received: float32 on the CPU, by name, of equal shapes. What it
            did not receive is passed over.
        units: The unit of each parameter, by name.
    """
    squares: dict[str, float] = {}
    for name, value in update.items():
        unit = units.get(name)
        if unit is not None and name in base:
            squares[unit] = squares.get(unit, 0.0) + sum(map(_square, _changes(value, base[name])))
    return squares


class MeanChange:
    """What aggregation finds of the weighted mean changes: called with each tensor that somebody sent.

    Args:
        units: The unit of each parameter, by name; other tensors are passed over.
        received: What those who sent a tensor had received of it, whole, float32; a tensor that is missing was received in
            several codecs or not at all, and its unit's diversity is not known.
    """

    def __init__(self, units: Mapping[str, str], received: Mapping[str, Tensor]):
        self._units, self._received = units, received
        self._squares: dict[str, float] = {}
        self._unknown: set[str] = set()

    def __call__(self, name: str, mean: Tensor, weights: Tensor | float) -> None:
        """Take the mean of one tensor (float32), and the weight behind it: one number, or float64 for each entry."""
        unit = self._units.get(name)
        if unit is None:
            return
        self._squares.setdefault(unit, 0.0)
        if name not in self._received:
            self._unknown.add(unit)
        elif isinstance(weights, Tensor):
            stretches = zip(_changes(mean, self._received[name]), weights.reshape(-1).split(_CHUNK), strict=True)
            self._squares[unit] += sum(float(torch.dot(change.double().square_(), weight)) for change, weight in stretches)
        else:
            self._squares[unit] += weights * sum(map(_square, _changes(mean, self._received[name])))

    def diversity(self, changes: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float | None]:
        """Of each unit that somebody sent; None where it is not known, or nothing moved on the mean.

        Args:
            changes: Of each client whose update counts: its weight, in the unit of the weights above, and its
                :func:`change_squares`.
        """
        sums = dict.fromkeys(self._squares, 0.0)
        for weight, squares in changes:
            for unit, square in squares.items():
                sums[unit] += weight * square
        return {unit: _ratio(sums[unit], square) if unit not in self._unknown else None
                for unit, square in self._squares.items()}


def movement(new: Mapping[str, Tensor], old: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None,
             units: Mapping[str, str], wanted: Collection[str]) -> dict[str, dict[str, float]]:
    """Of each unit in ``wanted``, how far it moved in a round, and from the reference; see the module's text.

    Args:
        new, old: The global model after and before the round: float32 on the CPU, by name.
        reference: W_t₀, likewise; None: there is none, and only the ``step`` is said.
        units: The unit of each parameter, by name.

    Returns:
        Numbers by unit and name; a ratio to a norm of 0 is left out.
    """
    found: dict[str, _Moments] = {}
    for name, unit in units.items():
        if unit in wanted:
            found.setdefault(unit, _Moments()).add(new[name], old[name], None if reference is None else reference[name])
    return {unit: moments.values(reference is not None) for unit, moments in found.items()}


class _Moments:
    """Sums over the parameters of one unit."""

    def __init__(self) -> None:
        self.count = 0
        self.old = self.step = self.new = self.reference = self.square = self.absolute = 0.0

    def add(self, new: Tensor, old: Tensor, reference: Tensor | None) -> None:
        """Take one tensor into account."""
        self.count += new.numel()
        memory = torch.empty(min(_CHUNK, new.numel()))
        afters, befores = (tensor.reshape(-1).split(_CHUNK) for tensor in (new, old))
        origins = [None] * len(afters) if reference is None else reference.reshape(-1).split(_CHUNK)
        for after, before, origin in zip(afters, befores, origins, strict=True):
            scratch = memory[:len(after)]
            self.old += _square(scratch.copy_(before))
            self.step += _square(torch.sub(after, before, out=scratch))
            if origin is not None:
                self.new += _square(scratch.copy_(after))
                self.reference += _square(scratch.copy_(origin))
                self.square += _square(torch.sub(after, origin, out=scratch))
                self.absolute += float(scratch.abs_().sum())

    def values(self, has_reference: bool) -> dict[str, float]:
        """The figures of the unit."""
        found: dict[str, float | None] = {}
        if has_reference:
            here, there, l2 = math.sqrt(self.new), math.sqrt(self.reference), math.sqrt(self.square)
            apart = _ratio(self.square - (here - there) ** 2, 2 * here * there)  # by the law of cosines
            found = {
                "cosine": None if apart is None else min(1.0, max(-1.0, 1 - apart)),  # rounding may pass 1
                "l1": self.absolute, "l2": l2, "displacement": _ratio(l2, math.sqrt(self.count)), "relative": _ratio(l2, there),
            }
        found["step"] = _ratio(math.sqrt(self.step), math.sqrt(self.old))
        return {name: value for name, value in found.items() if value is not None}


def _changes(new: Tensor, old: Tensor) -> Iterator[Tensor]:
    """Stretches of ``new - old``, in memory that the next one overwrites and the caller may change."""
    memory = torch.empty(min(_CHUNK, new.numel()))
    for after, before in zip(new.reshape(-1).split(_CHUNK), old.reshape(-1).split(_CHUNK), strict=True):
        yield torch.sub(after, before, out=memory[:len(after)])


def _square(value: Tensor) -> float:
    return float(torch.dot(value, value))


def _ratio(part: float, whole: float) -> float | None:
    found = part / whole if whole > 0 else math.nan
    return found if math.isfinite(found) else None
