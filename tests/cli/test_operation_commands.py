"""`events`, `operations`, `operation`, wide lists and the names that the shell completes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

from tests.api.daemons import two_daemons
from tests.api.test_operations import complete
from tests.cli.command import finish, start, transhume

from transhume.model.migration import MigrationOptions


async def test_events_are_listed_and_followed() -> None:
    async with two_daemons() as d:
        begin = d.controller.feed.last_id
        await d.running_vm()
        folder = d.beta_config.state_dir
        shown = await transhume(folder, "events", "--after", str(begin))
        assert shown.code == 0
        assert [line.split()[3] for line in shown.out.splitlines()] == ["vm-created", "vm-state"]
        page = (await transhume(folder, "events", "--after", "1", "--json")).json
        assert page["gap"] is True
        following = await start(folder, "events", "--follow", "--after", str(begin), "--json")
        assert following.stdout is not None
        try:
            async with asyncio.timeout(30):
                lines = [json.loads(await following.stdout.readline()) for _ in range(2)]
                async with d.near(d.alpha_config) as client:
                    await client.kill_vm("web")
                lines.append(json.loads(await following.stdout.readline()))
            following.send_signal(signal.SIGINT)
        finally:
            done = await finish(following)
        assert [line["event"]["kind"] for line in lines] == ["vm-created", "vm-state", "vm-state"]
        assert lines[2]["event"]["data"] == {"before": "running", "state": "stopped"}
        assert done.code == 130
        assert "Traceback" not in done.err


async def test_an_operation_is_shown_and_waited_for() -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        await d.running_vm()
        folder = d.beta_config.state_dir
        identity = (await client.migrate("web", "beta", MigrationOptions())).id
        late = await transhume(folder, "operation", identity, "wait", "--timeout", "1")
        assert (late.code, "it goes on" in late.err) == (1, True)
        waiting = await start(folder, "operation", identity, "wait")
        await complete(d, identity)
        done = await finish(waiting)
        assert done.code == 0
        assert "VM web from alpha to beta: done" in done.out
        [listed] = (await transhume(folder, "operations", "--json")).json
        assert (listed["id"], listed["state"], listed["progress"]) == (identity, "done", 1.0)
        refused = await transhume(folder, "operation", identity, "cancel")
        assert (refused.code, "is over: done" in refused.err) == (2, True)
        assert (await transhume(folder, "operation", "m0")).code == 2


async def test_wide_lists() -> None:
    async with two_daemons() as d:
        await d.running_vm()
        folder = d.alpha_config.state_dir
        for words, heading in (
            (("hosts",), "CERTIFICATE UNTIL"),
            (("vm", "list"), "MACHINE"),
            (("migrations",), "SWITCHED BECAUSE"),
            (("operations",), "KIND"),
        ):
            plain, wide = await asyncio.gather(
                transhume(folder, *words), transhume(folder, *words, "-o", "wide")
            )
            assert (heading in plain.out, heading in wide.out) == (False, True)
        as_json = await transhume(folder, "vm", "list", "-o", "json")
        assert as_json.json[0]["spec"]["name"] == "web"


async def test_names_are_completed_from_the_farm() -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        await d.running_vm()
        identity = (await client.migrate("web", "beta", MigrationOptions())).id
        expected = {
            "vm show ": ["web"],
            "migrate web --to ": ["alpha", "beta"],
            "drain b": ["beta"],
            "migration m": [identity],
            "cancel w": ["web"],
            "operation m": [identity],
            "vm show x": [],
        }
        offered = await asyncio.gather(*(completed(d.beta_config.state_dir, typed) for typed in expected))
        assert dict(zip(expected, offered, strict=True)) == expected


async def test_where_nobody_answers_nothing_is_offered(tmp_path: Path) -> None:
    assert await completed(tmp_path, "vm show ") == []


async def completed(state_dir: Path, typed: str) -> list[str]:
    """What bash is told, asked as its script does."""
    words = f"transhume --state-dir {state_dir} {typed}"
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "transhume"),
        stdout=PIPE,
        stderr=PIPE,
        env={
            **os.environ,
            "_TRANSHUME_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
    )
    done = await finish(process)
    assert done.err == ""
    return done.out.split()
