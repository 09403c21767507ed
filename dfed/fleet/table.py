"""A fleet from a file: one line of comma-separated values a client, kept as columns."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Callable

import numpy as np
from pydantic import ValidationError

from dfed.errors import ConfigError, Fault
from dfed.fleet.budget import TooSmall
from dfed.fleet.profile import DeviceProfile
from dfed.fleet.settings import DeviceSettings, check_name

__all__ = ["Rows", "read_rows"]

_NUMBERS = ("flops", "up", "down", "watts", "radio_watts", "availability", "dropout", "straggle", "slowdown",
            "int8_speedup")
_SHARES = ("time_share", "upload_least", "upload_most")
_COLUMNS = ("client", "tier", "memory", *_NUMBERS, *_SHARES)
_FIELD = "fleet.csv"
_NO_LIMIT = -1  # of bytes, and of shares
_MAX_FAULTS = 20


class Rows:
    """The columns of a fleet file.

    Args:
        tier_names: Names of the tiers.
        tiers: Index into ``tier_names``, int64 of shape (clients,).
        budgets: Bytes, int64 of shape (clients,); −1 for no limit.
        numbers: float64 of shape (clients, 13): flops, up, down, watts, radio_watts, availability, dropout, straggle, slowdown,
            int8_speedup, and time_share, upload_least and upload_most, of which −1 stands for no limit.
    """

    def __init__(self, tier_names: tuple[str, ...], tiers: np.ndarray, budgets: np.ndarray, numbers: np.ndarray):
        self.tier_names = tier_names
        self.num_clients = len(tiers)
        self.sizes = tuple(int(size) for size in np.bincount(tiers, minlength=len(tier_names)))
        self._tiers, self._budgets, self._numbers = tiers, budgets, numbers
        self.has_budgets = bool((budgets != _NO_LIMIT).any())

    def tier_of(self, clients: np.ndarray) -> np.ndarray:
        """Index into ``tier_names`` of each of ``clients``."""
        return np.asarray(self._tiers[clients])

    def kinds(self) -> np.ndarray:
        """A number for each client, int64 (clients,): clients with the same number have equal devices."""
        rows = np.column_stack([self._tiers, self._budgets, self._numbers])  # whole numbers are exact up to 2^53
        return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)

    def profile(self, client: int) -> DeviceProfile:
        """The device of ``client``."""
        budget = int(self._budgets[client])
        numbers = dict(zip((*_NUMBERS, *_SHARES), self._numbers[client].tolist(), strict=True))
        numbers |= {name: None if numbers[name] == _NO_LIMIT else numbers[name] for name in _SHARES}
        return DeviceProfile(
            tier=self.tier_names[self._tiers[client]], budget_bytes=None if budget == _NO_LIMIT else budget, **numbers
        )

    def budgets(self) -> Counter[int | None]:
        """How many clients have each budget."""
        values, counts = np.unique(self._budgets, return_counts=True)
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        return Counter({None if value == _NO_LIMIT else value: count for value, count in pairs})


def read_rows(path: str, clients: int | None, budget: Callable[[DeviceSettings], int | None]) -> Rows:
    """Read a fleet file; :class:`dfed.fleet.settings.FleetSettings` says what it holds.

    Clients without a tier are of tier ``all``.

    Args:
        path: The file.
        clients: The number of lines it must have; None for any number but 0.
        budget: Resolves a device's memory to bytes.

    Raises:
        ConfigError: If the file cannot be read or has faults (the first 20 are reported, by line).
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = [cell.strip() for cell in next(rows, [])]
            _check_header(header, path)
            lines = [(rows.line_num, cells) for cells in rows]
    except OSError as error:
        raise _fault(f"must name a file that can be read, but {path!r} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error) as error:  # also text that is not UTF-8, and a path with a NUL
        raise _fault(f"must name a file of comma-separated values, but {path!r} cannot be read: {error}.") from error
    while lines and _is_blank(lines[-1][1]):
        lines.pop()
    if not lines or (clients is not None and len(lines) != clients):
        allowed = "at least one line" if clients is None else f"as many lines as `clients` ({clients})"
        raise _fault(f"must have {allowed} below the header, but {path!r} has {len(lines)}.")
    return _columns(header, lines, budget)


def _columns(header: list[str], lines: list[tuple[int, list[str]]], budget: Callable[..., int | None]) -> Rows:
    tier_names: dict[str, int] = {}
    tiers = np.empty(len(lines), dtype=np.int64)
    budgets = np.empty(len(lines), dtype=np.int64)
    numbers = np.empty((len(lines), len(_NUMBERS) + len(_SHARES)), dtype=np.float64)
    faults: list[Fault] = []
    for client, (line, cells) in enumerate(lines):
        if len(faults) >= _MAX_FAULTS:
            break
        try:
            tier, device = _device(header, cells, client)
        except ValueError as error:
            faults.extend(Fault(_FIELD, f"line {line}: {message}") for message in _messages(error))
            continue
        try:
            resolved = budget(device)
        except TooSmall as error:
            faults.append(Fault(_FIELD, f"line {line}: `memory` {error}"))
            continue
        tiers[client] = tier_names.setdefault(tier, len(tier_names))
        budgets[client] = _NO_LIMIT if resolved is None else resolved
        shares = [getattr(device, name) for name in _SHARES]
        numbers[client] = [*(getattr(device, name) for name in _NUMBERS),
                           *(_NO_LIMIT if share is None else share for share in shares)]
    if faults:
        raise ConfigError(faults[:_MAX_FAULTS])
    return Rows(tuple(tier_names), tiers, budgets, numbers)


def _device(header: list[str], cells: list[str], client: int) -> tuple[str, DeviceSettings]:
    if _is_blank(cells):  # most likely a slip: it would move the number of every client below it
        raise ValueError("must describe a client, but is blank; only the end of the file may be.")
    if len(cells) != len(header):
        plural = "" if len(header) == 1 else "s"
        raise ValueError(f"must have {len(header)} cell{plural}, as the header has, but has {len(cells)}.")
    given = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
    tier, number = given.pop("tier", "all"), given.pop("client", str(client))
    if number != str(client):
        raise ValueError(f"`client` must count up from 0 and be {client} here, but is {number!r}.")
    try:
        check_name(tier)
    except ValueError as error:
        raise ValueError(f"`tier` {error}") from error
    return tier, DeviceSettings(**{name: _scalar(cell) for name, cell in given.items()})


def _is_blank(cells: list[str]) -> bool:
    """Whether a line holds nothing; one with the single cell ``""`` is a client with the defaults."""
    return not cells or (len(cells) == 1 and cells[0].isspace())


@functools.lru_cache(maxsize=4096)  # a fleet's file says the same of many clients
def _scalar(cell: str) -> int | float | str:
    for number in (int, float):
        try:
            return number(cell)
        except ValueError:
            continue
    return cell


def _messages(error: ValueError) -> list[str]:
    if not isinstance(error, ValidationError):
        return [str(error)]
    messages = []
    for fault in error.errors():
        if fault["type"] == "value_error":  # dfed's own words, which say what the value is
            message = fault["msg"].removeprefix("Value error, ")
        else:
            message = f"{fault['msg'].replace('Input should', 'must')}, but is {fault['input']!r}."
        messages.append(f"`{fault['loc'][0]}` {message}")
    return messages


def _check_header(header: list[str], path: str) -> None:
    unknown = [name for name in header if name not in _COLUMNS]
    if unknown:
        raise _fault(f"must have columns out of {', '.join(_COLUMNS)}, but {path!r} has {unknown[0]!r}.")
    if len(set(header)) != len(header):
        raise _fault(f"must name each column once, but the header of {path!r} repeats one.")


def _fault(message: str) -> ConfigError:
    return ConfigError([Fault(_FIELD, message)])
