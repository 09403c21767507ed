"""The settings of a fleet: how many clients, and what devices they own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from dfed.settings import ByteRate, Rate, Settings, format_bytes, parse_quantity

__all__ = [
    "DeviceSettings",
    "FleetSettings",
    "Memory",
    "TierSettings",
    "TooSmall",
    "check_name",
    "parse_memory",
    "resolve_memory",
]

_MIB = 2**20
_MIN_FRACTION, _MAX_FRACTION = 0.001, 10.0
_SHARE_TOLERANCE = 1e-6
_MAX_CHARACTERS = 80


def parse_memory(value: object) -> int | float | None:
    """Read a memory budget: an int is bytes, a float a fraction of the full model's peak, None no limit.

    Text is a percentage (``"50%"``, a fraction), bytes with a unit (``"64MB"``, ``"1.5 GiB"``), or a bare number, which
    means what the same number means outside quotes.

    A budget is 1 MiB at least: the kernel's counters, by which a cap is kept, lag by about as much. A fraction is 0.001 at
    least: a smaller one is a slip, since the whole would have to be 1 GiB or more; whether the bytes that it comes to are
    1 MiB is known only with the model, see :func:`resolve_memory`.

    Raises:
        ValueError: If the value is none of these, is less than 1 MiB (as a bare integer most likely meant as a share), or
            is a fraction outside [0.001, 10].
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _memory_from_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < _MIB:
            raise ValueError(
                f"must be at least 1 MiB ({_MIB}), but is {value}: that is bytes; for a share of the full model's peak "
                "write 0.5 or '50%'."
            )
        return _checked_bytes(value)
    if isinstance(value, float):
        if not _MIN_FRACTION <= value <= _MAX_FRACTION:
            raise ValueError(
                f"must, as a fraction of the full model's peak, be at least {_MIN_FRACTION:g} and at most "
                f"{_MAX_FRACTION:g}, but is {value}; write bytes as an integer or as text such as '64MB'."
            )
        return value
    raise ValueError(_not_memory(value))


def _memory_from_text(text: str) -> int | float | None:
    for number in (int, float):
        try:
            bare = number(text)
        except ValueError:
            continue
        return parse_memory(bare)
    if text.rstrip().endswith("%"):
        try:
            share = float(text.rstrip()[:-1]) / 100
        except ValueError:
            share = math.nan
        if math.isnan(share):
            raise ValueError(f"must be a percentage such as '50%', but is '{text}'.")
        return parse_memory(share)
    try:
        value = round(parse_quantity(text, "B"))
    except ValueError:
        raise ValueError(_not_memory(text)) from None
    return _checked_bytes(value)


def _not_memory(value: object) -> str:
    return f"must be bytes (64000000, '64MB') or a share (0.5, '50%'), or be left out for no limit, but is {_written(value)}."


def _written(value: object) -> str:
    """A value of a config as YAML writes it, cut to a length that fits a message."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, skipkeys=True, default=repr)
    except ValueError:  # whole numbers of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS - 1]}…"


def _checked_bytes(value: int) -> int:
    if not _MIB <= value < 2**63:
        raise ValueError(f"must be at least 1 MiB ({_MIB} bytes) and less than 2**63 bytes, but is {value}.")
    return value


class TooSmall(ValueError):
    """A fraction of the full model's peak that comes to less than 1 MiB."""


def resolve_memory(memory: int | float | None, full_peak_bytes: Callable[[], int]) -> int | None:
    """A budget in bytes; None for no limit.

    Args:
        memory: What :func:`parse_memory` returned.
        full_peak_bytes: Gives the peak that a fraction is of; called for a fraction only.

    Raises:
        TooSmall: If a fraction comes to less than 1 MiB; says which fraction would do.
    """
    if not isinstance(memory, float):
        return memory
    peak = full_peak_bytes()
    budget = round(memory * peak)
    if budget >= _MIB:
        return budget
    smallest = math.ceil(_MIB / peak * 1000) / 1000
    enough = f"at least {smallest:g}" if smallest <= _MAX_FRACTION else "given in bytes, of at least 1 MiB"
    raise TooSmall(
        f"must be {enough}, as the full model takes {format_bytes(peak)} and a budget 1 MiB or more, but is {memory:g}, "
        f"which is {format_bytes(budget)}."
    )


Memory = Annotated[int | float | None, BeforeValidator(parse_memory)]
"""A memory budget; see :func:`parse_memory` for its grammar."""

_Positive = Field(gt=0, allow_inf_nan=False)
_NotNegative = Field(ge=0, allow_inf_nan=False)
_Probability = Field(ge=0, le=1)


class DeviceSettings(Settings):
    """One device. The defaults are round figures for a phone on a mobile network; none of them is a measurement.

    Attributes:
        memory: Budget, 1 MiB at least: bytes (``64000000``, ``"64MB"``), a fraction of the full model's peak at the
            configured batch (``0.5``, ``"50%"``), or null for no limit.
        flops: Sustained speed of training in FLOP/s, far below a chip's peak; text such as ``"20 GFLOPS"``.
        up, down: Speed of the link to and from the server in bytes/s; text such as ``"1.25 MB/s"`` or ``"10 Mbps"``.
        watts: Power in W while computing.
        radio_watts: Power in W while sending or receiving.
        availability: Probability that the client can be reached in a round.
        dropout: Probability that a chosen client vanishes during the round.
    """

    memory: Memory = None
    flops: Annotated[Rate, _Positive] = 10e9
    up: Annotated[ByteRate, _Positive] = 1.25e6  # 10 Mbit/s
    down: Annotated[ByteRate, _Positive] = 6.25e6  # 50 Mbit/s
    watts: Annotated[float, _NotNegative] = 3.0
    radio_watts: Annotated[float, _NotNegative] = 1.0
    availability: Annotated[float, _Probability] = 1.0
    dropout: Annotated[float, _Probability] = 0.0


def check_name(name: str) -> str:
    """``name``, which a tier may have: it goes into files, tables and the terminal as it is.

    Raises:
        ValueError: If it is empty or holds characters that cannot be printed.
    """
    if not name or not name.isprintable():
        raise ValueError(f"must be text of at least 1 character, all of which can be printed, but is {_written(name)}.")
    return name


class TierSettings(DeviceSettings):
    """A class of equal devices and its size: exactly one of ``share`` (of all clients, in (0, 1]) and ``count``."""

    name: Annotated[str, AfterValidator(check_name)]
    share: float | None = Field(default=None, gt=0, le=1)
    count: int | None = Field(default=None, ge=1)

    @field_validator("count")
    @classmethod
    def _one_size(cls, count: int | None, info: ValidationInfo) -> int | None:
        if "share" in info.data and (count is None) == (info.data["share"] is None):
            given = "neither is" if count is None else "both are"
            raise ValueError(f"must be given or else `share`, exactly one of the two, but {given}.")
        return count


class FleetSettings(Settings):
    """Which clients there are: ``clients`` dealt out over ``tiers``, or a file ``csv`` with one line a client.

    Attributes:
        clients: Number of clients, at least 1. With ``csv`` it may be left out; given, it must be the number of lines.
        tiers: Classes of devices. All give a ``share`` (they sum to 1 within 1e-6) or all give a ``count`` (they sum
            to ``clients``); names are unique, and every tier gets at least one client.
        csv: Path of a UTF-8 file, relative to the working directory. Its header names columns of
            :class:`DeviceSettings` and, optionally, ``tier`` and ``client`` (0, 1, 2, … in order). A column or cell
            left out takes the default. Lines are blank at the end of the file only.
    """

    clients: int | None = Field(default=None, ge=1)
    tiers: list[TierSettings] | None = None
    csv: str | None = None

    @field_validator("tiers")
    @classmethod
    def _tiers_fit(cls, tiers: list[TierSettings] | None, info: ValidationInfo) -> list[TierSettings] | None:
        if tiers is None:
            return None
        if not tiers:
            raise ValueError("must have at least one tier, but is empty.")
        names = [tier.name for tier in tiers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"must have names that differ, but {', '.join(map(repr, twice))} occurs more than once.")
        if len({tier.count is None for tier in tiers}) > 1:
            raise ValueError("must all give a `share` or all give a `count`, but some give one and some the other.")
        if "clients" in info.data:
            _check_sizes(tiers, info.data["clients"])
        return tiers

    @field_validator("csv")
    @classmethod
    def _one_source(cls, csv: str | None, info: ValidationInfo) -> str | None:
        if "tiers" in info.data and (csv is None) == (info.data["tiers"] is None):
            given = "neither is" if csv is None else "both are"
            raise ValueError(f"must be given or else `tiers`, exactly one of the two, but {given}.")
        return csv

    def counts(self) -> tuple[int, ...]:
        """Clients of each tier, in the order of ``tiers``; shares are rounded by largest remainder, first tier first.

        Only for settings that have ``tiers``.
        """
        assert self.tiers is not None, "a fleet from a file has no tiers to count"
        assert self.clients is not None
        return _counts(self.tiers, self.clients)


def _check_sizes(tiers: list[TierSettings], clients: int | None) -> None:
    if clients is None:
        raise ValueError("must come with `clients`, the number of clients to deal out, but that is not given.")
    counts = [tier.count for tier in tiers if tier.count is not None]
    if counts:
        if sum(counts) != clients:
            raise ValueError(f"must have counts that sum to `clients` ({clients}), but they sum to {sum(counts)}.")
        return
    total = math.fsum(tier.share or 0.0 for tier in tiers)
    if abs(total - 1) > _SHARE_TOLERANCE:
        raise ValueError(f"must have shares that sum to 1, but they sum to {total:g}.")
    for tier, count in zip(tiers, _counts(tiers, clients), strict=True):
        if count == 0:
            raise ValueError(
                f"must each get at least one client, but '{tier.name}' gets none: its share is {tier.share:g} of "
                f"{clients} clients."
            )


def _counts(tiers: list[TierSettings], clients: int) -> tuple[int, ...]:
    if tiers[0].count is not None:
        return tuple(tier.count or 0 for tier in tiers)
    # Decimal fractions as written: 0.7 and 0.3 of 5 clients tie, which binary rounding would decide at random.
    shares = [Fraction(str(tier.share)) for tier in tiers]
    exact = [share * clients / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(tiers)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: clients - sum(counts)]:
        counts[i] += 1
    return tuple(counts)
