"""Sizes, times and rates as people type them."""

from __future__ import annotations

import pytest

from transhume.cli.quantities import parse_rate_bytes_s, parse_size_bytes, parse_time_ms, parse_time_s
from transhume.model.errors import Refused


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1G", 1 << 30),
        ("512M", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("64k", 64 << 10),
        ("2TB", 2 << 40),
        ("4096", 4096),
        (" 8 m ", 8 << 20),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "rate_bytes_s"),
    [
        ("500M", 500_000_000),
        ("500MB/s", 500_000_000),
        ("4Gbit", 500_000_000),
        ("1gbit/s", 125_000_000),
        ("65536", 65536),
        ("1.5k", 1500),
    ],
)
def test_rates_are_bytes_unless_they_say_bit(text: str, rate_bytes_s: int) -> None:
    assert parse_rate_bytes_s(text) == rate_bytes_s


@pytest.mark.parametrize(
    ("text", "time_s"),
    [("30s", 30.0), ("5m", 300.0), ("2min", 120.0), ("500ms", 0.5), ("1h", 3600.0), ("7", 7.0)],
)
def test_times(text: str, time_s: float) -> None:
    assert parse_time_s(text) == time_s


def test_a_bare_downtime_is_milliseconds() -> None:
    assert parse_time_ms("50") == 50.0
    assert parse_time_ms("0.2s") == 200.0


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1 2", "1e9", "1GG", "zehn", "0x10"])
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    for parse in (parse_size_bytes, parse_rate_bytes_s, parse_time_s, parse_time_ms):
        with pytest.raises(Refused, match="try"):
            parse(text)


def test_a_part_of_a_byte_is_refused() -> None:
    with pytest.raises(Refused, match="not a whole size"):
        parse_size_bytes("1.0001")
