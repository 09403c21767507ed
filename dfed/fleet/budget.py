"""Memory budgets as configs write them: bytes, shares of what the full model needs, and spreads from one to another."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag, ValidationInfo, create_model, field_validator

from dfed.settings import Settings, format_bytes, parse_quantity

__all__ = [
    "MOST_LEVELS",
    "Memory",
    "MemorySpread",
    "TierMemory",
    "TooSmall",
    "parse_memory",
    "resolve_memory",
    "spread_budgets",
    "written",
]

MOST_LEVELS = 256
"""A spread has no more different budgets than this, however many clients it is for."""

_MIB = 2**20
_MIN_FRACTION, _MAX_FRACTION = 0.001, 10.0
_MAX_CHARACTERS = 80
_BUDGET = "bytes (64000000, '64MB') or a share (0.5, '50%')"


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


@functools.lru_cache(maxsize=4096)  # a fleet's file says the same of many clients
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
    return f"must be {_BUDGET}, or be left out for no limit, but is {written(value)}."


def written(value: object) -> str:
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


def _parse_end(value: object) -> int | float:
    memory = parse_memory(value)
    if memory is None:
        raise ValueError(f"must be {_BUDGET}, but is null.")
    return memory


_End = Annotated[int | float, BeforeValidator(_parse_end)]
_ENDS: dict[str, Any] = {"from": (_End, ...), "to": (_End, ...)}  # a class body cannot have a field of the name `from`


class MemorySpread(create_model("_Ends", __base__=Settings, **_ENDS)):  # type: ignore[misc]
    """Budgets spread evenly ``from`` one ``to`` another, which is no smaller: two numbers of bytes, or two shares."""

    @field_validator("to")
    @classmethod
    def _in_order(cls, to: int | float, info: ValidationInfo) -> int | float:
        start = info.data.get("from", to)
        if isinstance(start, float) != isinstance(to, float):
            kind = "a share" if isinstance(start, float) else "bytes"
            raise ValueError(f"must be {kind}, as `from` is ({start}), but is {to}.")
        if to < start:
            raise ValueError(f"must be at least `from` ({start}), but is {to}.")
        return to


def _form(value: object) -> str:
    return "spread" if isinstance(value, (Mapping, MemorySpread)) else "budget"


TierMemory = Annotated[Annotated[Memory, Tag("budget")] | Annotated[MemorySpread, Tag("spread")], Discriminator(_form)]
"""The budgets of a tier: one :data:`Memory` for all of its clients, or a :class:`MemorySpread` over them."""


def spread_budgets(
    memory: int | float | MemorySpread | None, clients: int, full_peak_bytes: Callable[[], int]
) -> list[tuple[int | None, int]]:
    """The different budgets in bytes (None: no limit) that so many clients have, ascending, and how many have each.

    Of a spread over n clients there are ``levels = min(n, MOST_LEVELS)``: level k is the budget
    ``from + (to − from) · (k + ½) / levels``, to the nearest byte, and the i-th client has level ``⌊i · levels / n⌋``.

    Args:
        memory: As in the settings.
        full_peak_bytes: See :func:`resolve_memory`.

    Raises:
        TooSmall: As :func:`resolve_memory`.
    """
    if not isinstance(memory, MemorySpread):
        return [(resolve_memory(memory, full_peak_bytes), clients)]
    (_, start), (_, end) = memory
    levels, counts = min(clients, MOST_LEVELS), Counter[int | None]()
    for k in range(levels):
        if isinstance(start, float):
            level = start + (end - start) * (2 * k + 1) / (2 * levels)
        else:  # whole numbers are too large for floats to tell all of them apart
            level = start + ((end - start) * (2 * k + 1) + levels) // (2 * levels)
        first, last = (-(-bound * clients // levels) for bound in (k, k + 1))
        counts[resolve_memory(level, full_peak_bytes)] += last - first
    return list(counts.items())
