"""`transhume hosts` tells of a certificate that should have been renewed by now."""

from __future__ import annotations

import pytest
from rich.console import Console

from transhume.cli.tables import hosts_table
from transhume.farm.members import HostStatus
from transhume.sim.scripted_host import INVENTORY

DAY_S = 86400.0


@pytest.mark.parametrize(
    ("left_days", "words"),
    [(29.0, "up "), (9.5, "up "), (8.0, "certificate ends in 8.0 days"), (-1.0, "has ended")],
)
def test_a_certificate_that_is_short_is_told(left_days: float, words: str) -> None:
    host = HostStatus(
        name="beta",
        address="192.0.2.1",
        port=7461,
        joined_at_s=0.0,
        last_seen_s=0.0,
        controller=False,
        inventory=INVENTORY,
        silent=False,
        seen_ago_s=0.0,
        certificate_expires_at_s=100 * DAY_S,
    )
    console = Console(width=250)
    with console.capture() as printed:
        console.print(hosts_table([host], (100 - left_days) * DAY_S))
    assert words in printed.get()
    assert ("certificate" in printed.get()) == (left_days < 9)
