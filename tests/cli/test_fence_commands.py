"""Dead hosts on the command line, in words, in JSON and by exit code."""

from __future__ import annotations

from tests.api.daemons import two_daemons
from tests.cli.command import transhume


async def test_a_host_is_fenced_only_with_a_yes_and_its_vm_starts_elsewhere() -> None:
    async with two_daemons() as d:
        alpha, beta = d.alpha_config.state_dir, d.beta_config.state_dir
        await d.running_vm("web", "beta")
        marked = await transhume(alpha, "vm", "set", "web", "--restart-elsewhere", "--strict")
        assert "it starts elsewhere when its host was fenced; it stands still" in marked.out
        assert (await transhume(alpha, "host", "show", "beta")).out == "host beta is up\n"
        unasked = await transhume(alpha, "host", "fence", "beta", "--i-have-powered-it-off")
        assert (unasked.code, "nothing was changed" in unasked.err) == (2, True)
        lives = await transhume(alpha, "host", "fence", "beta", "--i-have-powered-it-off", "--yes")
        assert (lives.code, "not known to be lost" in lives.err) == (2, True)
        elsewhere = await transhume(beta, "host", "set", "beta", "--fence-command", "/bin/true")
        assert (elsewhere.code, "on the controller's host" in elsewhere.err) == (2, True)
        assert (await transhume(alpha, "host", "set", "beta", "--fence-command", "/bin/true")).code == 0
        fenced = await transhume(alpha, "host", "fence", "beta", "--force", "--yes")
        assert fenced.code == 0, fenced.err
        assert "host beta is fenced since" in fenced.out
        assert "runs on alpha" in fenced.out
        found = (await transhume(alpha, "vm", "show", "web", "--json")).json
        assert (found["ownership"]["owner"], found["restart_elsewhere"], found["strict"]) == (
            "alpha",
            True,
            True,
        )
