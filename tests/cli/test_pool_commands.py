"""The pool and its rules on the command line, in words and in JSON."""

from __future__ import annotations

from tests.api.daemons import two_daemons
from tests.cli.command import transhume


async def test_the_pool_in_words_and_in_json() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        await d.running_vm("web", "alpha")
        told = await transhume(alpha, "farm")
        assert told.code == 0
        assert "can lose 1 host: yes" in told.out
        assert "4 CPUs with 1 vCPUs promised; 448 of 16,384 MiB promised, 14,912 MiB left" in told.out
        assert (await transhume(alpha, "host", "set", "beta", "--reserve-memory", "8G")).code == 0
        labelled = await transhume(alpha, "host", "set", "alpha", "--cpu-overcommit", "2", "--label", "ssd")
        assert labelled.out == "host alpha is set; `transhume farm` shows it\n"
        found = (await transhume(alpha, "farm", "--cpu-overcommit", "6", "--json")).json
        assert (found["can_lose_one"], found["worst_host"], found["short_bytes"]) == (
            False,
            "alpha",
            448 << 20,
        )
        assert [host["cpu_overcommit"] for host in found["hosts"]] == [2.0, 6.0]
        assert found["hosts"][0]["labels"] == ["ssd"]
        told = await transhume(d.beta_config.state_dir, "farm")
        assert "can lose 1 host: no, short of 0.4 GiB for the VMs of alpha" in told.out


async def test_a_vm_is_placed_or_refused_with_the_numbers() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        assert (await transhume(alpha, "host", "set", "alpha", "--reserve-memory", "7G")).code == 0
        words = ("vm", "create", "web", "--memory", "4G", "--reserve", "--label", "db", "--json")
        made = await transhume(alpha, *words)
        assert (made.json["ownership"]["owner"], made.json["labels"]) == ("beta", ["db"])
        refused = await transhume(alpha, "vm", "create", "db", "--memory", "4G")
        assert refused.code == 2
        assert refused.err.splitlines() == [
            "transhume: VM db cannot be made: no host will do",
            "  - alpha: db needs 4,288 MiB; alpha has 1,024 MiB left of 8,192 (7,168 are its own, 0 "
            "promised)",
            "  - beta: db needs 4,288 MiB; beta has 3,392 MiB left of 8,192 (512 are its own, 4,288 "
            "promised)",
        ]
        changed = await transhume(alpha, "vm", "set", "web", "--no-reserve", "--unlabel", "db")
        assert changed.out == "VM web has 4096 MiB and the labels -; it has a share while it runs\n"
        assert (await transhume(alpha, "vm", "set", "web")).code == 2
        assert (await transhume(alpha, "host", "set", "alpha")).code == 2


async def test_rules_are_made_listed_kept_and_removed() -> None:
    async with two_daemons() as d:
        alpha = d.alpha_config.state_dir
        for name in ("web", "db"):
            await d.running_vm(name, "alpha")
        made = await transhume(alpha, "rule", "add", "anti-affinity", "apart", "--vm", "web", "--vm", "db")
        assert (made.code, made.out) == (0, "rule apart holds from now on\n")
        assert made.err == "! it is broken now: VM db: rule apart keeps db apart from web, on alpha\n"
        never = await transhume(alpha, "rule", "add", "affinity", "both", "--vm", "web", "--vm", "db")
        assert never.code == 2
        assert "must be on one host by affinity, and rule apart keeps them apart" in never.err
        pinned = await transhume(
            alpha, "rule", "add", "pin", "here", "--vm", "web", "--host", "alpha", "--prefer", "--json"
        )
        assert pinned.json["rule"]["preferred"]
        assert (await transhume(alpha, "rule", "add", "pin", "x", "--vm", "web")).code == 2
        listed = await transhume(alpha, "rule", "list")
        assert [line.split()[0] for line in listed.out.splitlines()] == ["RULE", "apart", "here"]
        assert len((await transhume(alpha, "rule", "list", "--json")).json) == 2
        assert "rule apart keeps" in (await transhume(alpha, "farm")).out
        await d.controller.vms.kill("db")
        started = await transhume(alpha, "vm", "start", "db")
        assert started.out == "VM db runs on beta\n"
        refused = await transhume(alpha, "migrate", "db", "--to", "alpha")
        assert refused.code == 2
        assert "rule apart keeps db apart from web, on alpha" in refused.err
        dry = await transhume(alpha, "migrate", "db", "--to", "alpha", "--ignore-rules", "--dry-run")
        assert dry.code == 0
        assert (await transhume(alpha, "rule", "remove", "apart", "--json")).json == {"name": "apart"}
        assert (await transhume(alpha, "rule", "remove", "apart")).code == 2
