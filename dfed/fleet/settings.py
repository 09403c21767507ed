"""The settings of a fleet: how many clients, and what devices they own."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from dfed.fleet.budget import Memory, TierMemory, written
from dfed.settings import ByteRate, Rate, Settings

__all__ = ["ComputeSettings", "DeviceSettings", "FleetSettings", "TierSettings", "check_name"]

_SHARE_TOLERANCE = 1e-6
_Positive = Field(gt=0, allow_inf_nan=False)
_NotNegative = Field(ge=0, allow_inf_nan=False)
_AtLeastOne = Field(ge=1, allow_inf_nan=False)
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
        straggle: Probability that a client that takes part in a round is slowed down in it, which the server does not know
            beforehand.
        slowdown: How many times as long its computing, receiving and sending then take.
        int8_speedup: How many times as fast it computes in int8 as in floating point.
        time_share: What a round may take it, as a share of the simulated time in which it would train the full model plainly;
            null for no limit.
        upload_least, upload_most: What it can send in a round, as a share of the full model's bytes: drawn anew each round,
            uniformly between the two. One of the two alone stands for both; neither for no limit.
    """

    memory: Memory = None
    flops: Annotated[Rate, _Positive] = 10e9
    up: Annotated[ByteRate, _Positive] = 1.25e6  # 10 Mbit/s
    down: Annotated[ByteRate, _Positive] = 6.25e6  # 50 Mbit/s
    watts: Annotated[float, _NotNegative] = 3.0
    radio_watts: Annotated[float, _NotNegative] = 1.0
    availability: Annotated[float, _Probability] = 1.0
    dropout: Annotated[float, _Probability] = 0.0
    straggle: Annotated[float, _Probability] = 0.0
    slowdown: Annotated[float, _AtLeastOne] = 4.0
    int8_speedup: Annotated[float, _Positive] = 2.0
    time_share: Annotated[float, _Positive] | None = None
    upload_least: Annotated[float, _Positive] | None = None
    upload_most: Annotated[float, _Positive] | None = None

    @field_validator("upload_most")
    @classmethod
    def _in_order(cls, most: float | None, info: ValidationInfo) -> float | None:
        least = info.data.get("upload_least")
        if most is not None and least is not None and most < least:
            raise ValueError(f"must be at least `upload_least` ({least:g}), but is {most:g}.")
        return most


class ComputeSettings(Settings):
    """How one device computes: the settings of a :class:`DeviceSettings` that count where nothing is sent."""

    flops: Annotated[Rate, _Positive] = DeviceSettings.model_fields["flops"].default
    watts: Annotated[float, _NotNegative] = DeviceSettings.model_fields["watts"].default
    int8_speedup: Annotated[float, _Positive] = DeviceSettings.model_fields["int8_speedup"].default


def check_name(name: str) -> str:
    """``name``, which a tier may have: it goes into files, tables and the terminal as it is.

    Raises:
        ValueError: If it is empty or holds characters that cannot be printed.
    """
    if not name or not name.isprintable():
        raise ValueError(f"must be text of at least 1 character, all of which can be printed, but is {written(name)}.")
    return name


class TierSettings(DeviceSettings):
    """A class of devices that are equal, but that ``memory`` may be a spread, and its size: exactly one of ``share`` (of all
    clients, in (0, 1]) and ``count``."""

    memory: TierMemory = None  # type: ignore[assignment]
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
