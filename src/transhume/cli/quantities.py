"""Sizes, times and rates as a person types them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal

from transhume.model.errors import Refused

_NUMBER = re.compile(r"^\s*(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z/]*)\s*$")

_SIZE_UNITS_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_RATE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_TIME_UNITS_S = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86_400),
}


def parse_size_bytes(text: str) -> int:
    """`512M`, `1G`, `1.5GiB`: powers of 1024, as memory is counted. A bare number is bytes.

    Raises `Refused` for what is no size, or for a part of a byte.
    """
    number, unit = _split(text, "size", "512M or 1G")
    factor = _SIZE_UNITS_BYTES.get(unit.lower().removesuffix("ib").removesuffix("b"))
    if factor is None:
        raise Refused(f"{text!r} is not a size: the unit {unit!r} is none of K, M, G, T; try 512M or 1G")
    return _whole(number * factor, text, "size in bytes")


def parse_rate_bytes_s(text: str) -> int:
    """`500M` is 500,000,000 bytes a second; `4Gbit` is 4,000,000,000 bits: powers of 1000, as links are."""
    number, unit = _split(text, "rate", "500M (bytes a second) or 4Gbit")
    plain = unit.lower().removesuffix("/s")
    bits = plain.endswith("bit")
    factor = _RATE_UNITS.get(plain.removesuffix("bit") if bits else plain.removesuffix("b"))
    if factor is None:
        raise Refused(
            f"{text!r} is not a rate: the unit {unit!r} is none of K, M, G (bytes a second) and Kbit, Mbit, "
            "Gbit; try 500M or 4Gbit"
        )
    return int(number * factor / (8 if bits else 1))


def parse_time_s(text: str) -> float:
    """`30s`, `5m`, `500ms`, `2h`, `90d`; a bare number is seconds."""
    return float(_seconds(text, "s"))


def parse_time_ms(text: str) -> float:
    """As `parse_time_s`, in milliseconds, which is also what a bare number means."""
    return float(_seconds(text, "ms") * 1000)


def _seconds(text: str, bare_unit: str) -> Decimal:
    number, unit = _split(text, "time", "30s, 5m or 500ms")
    factor = _TIME_UNITS_S.get(unit.lower() or bare_unit)
    if factor is None:
        raise Refused(
            f"{text!r} is not a time: the unit {unit!r} is none of ms, s, m, h, d; try 30s or 500ms"
        )
    return number * factor


def _split(text: str, kind: str, example: str) -> tuple[Decimal, str]:
    found = _NUMBER.match(text)
    if found is None:
        raise Refused(f"{text!r} is not a {kind}; try {example}")
    return Decimal(found["number"]), found["unit"]


def _whole(value: Decimal, text: str, kind: str) -> int:
    if value != int(value):
        raise Refused(f"{text!r} is not a whole {kind}; drop the digits behind the point")
    return int(value)
