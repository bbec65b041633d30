"""Users and the audit log on the command line, in words and in JSON."""

from __future__ import annotations

from tests.api.daemons import two_daemons
from tests.cli.command import transhume


async def test_a_user_from_the_first_token_to_the_end() -> None:
    async with two_daemons() as d:
        beta = d.beta_config.state_dir
        added = await transhume(beta, "user", "add", "ann", "--role", "operator", "--on", "shop", "--json")
        assert added.json["user"] == "ann"
        assert added.json["token"].startswith("ann.")
        assert (await transhume(beta, "user", "add", "ann", "--role", "viewer")).code == 2
        assert (await transhume(beta, "user", "grant", "ann", "--role", "viewer")).out == (
            "user ann is viewer on the farm\n"
        )
        told = (await transhume(beta, "user", "token", "ann", "--expires", "12h", "--keep")).out
        assert "shown this once:\n  ann." in told
        shown = (await transhume(beta, "user", "show", "ann", "--json")).json
        assert shown["grants"] == [{"role": "operator", "on": "shop"}, {"role": "viewer", "on": ""}]
        assert len(shown["tokens_expire_at_s"]) == 2
        assert (
            "ann: operator on shop, viewer on the farm; tokens good until: 20"
            in (await transhume(beta, "user", "show", "ann")).out
        )
        revoked = await transhume(beta, "user", "revoke", "ann", "--role", "viewer")
        assert revoked.out == "user ann is no longer viewer on the farm\n"
        assert (await transhume(beta, "user", "list")).out == "ann: operator on shop; tokens: 2\n"
        assert (await transhume(beta, "user", "remove", "ann")).code == 0
        assert (await transhume(beta, "user", "show", "ann")).code == 2
        assert (await transhume(beta, "user", "list", "--json")).json == []


async def test_who_did_what_and_why_is_shown_and_no_token() -> None:
    async with two_daemons() as d:
        beta = d.beta_config.state_dir
        added = await transhume(
            beta, "--reason", "new here", "user", "add", "ann", "--role", "viewer", "--json"
        )
        told = (await transhume(beta, "audit", "--user", "root@beta", "--since", "1d")).out
        assert "'POST /v1/users' because 'new here'  done" in told
        assert added.json["token"].partition(".")[2] not in told
        assert (await transhume(beta, "audit", "--user", "nobody", "--json")).json == []
        assert (await transhume(beta, "audit", "--since", "soon")).code == 2
