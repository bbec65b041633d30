"""The Python clients: the example of the documents, and that nothing of the asynchronous one is missing."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tests.api.daemons import two_daemons
from tests.api.test_operations import complete
from tests.docs.documents import ROOT

from transhume import AsyncClient, Client
from transhume.api.operations_client import FeedClient, OperationsClient
from transhume.api.pool_client import PoolClient
from transhume.api.user_client import UserClient
from transhume.model.errors import HostLost, NotFound
from transhume.sdk import Events, Operations, Pool, Users

# A console is typed into while it prints: that has no blocking form.
_WITHOUT_BLOCKING = {"console"}


def example() -> str:
    text = (ROOT / "docs" / "howto" / "python.md").read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    return match[1]


async def test_the_example_of_the_documents_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_daemons() as d, d.near(d.alpha_config) as client:
        await d.running_vm()
        # The one place that a reader's machine has and this one has not.
        code = example().replace("Client()", f"Client({str(d.alpha_config.state_dir)!r})")
        printed = io.StringIO()

        def run() -> None:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "python.md", "exec"), {})

        running = asyncio.create_task(asyncio.to_thread(run))
        async with asyncio.timeout(30):
            while not (found := await client.migrations()):
                await asyncio.sleep(0.02)
            await complete(d, found[0].id)
            await running
        lines = printed.getvalue().splitlines()
        assert lines[0] == "web running at alpha"
        assert lines[1] == "done - VM web from alpha to beta: done"
        assert "vm-moved - VM web belongs to beta and no longer to alpha (epoch 2)" in lines


async def test_a_blocking_stream_ends_when_it_is_left_and_errors_keep_their_class() -> None:
    async with two_daemons() as d:
        await d.running_vm()
        state_dir = d.alpha_config.state_dir

        def work() -> list[str]:
            with Client(state_dir) as farm:
                kinds = []
                for event in farm.feed.follow(after=0):
                    kinds.append(event.kind.value)
                    if event.vm:
                        break
                with pytest.raises(NotFound, match="no VM db"):
                    farm.vm("db")
                assert farm.pool.view().vms == 1
                return kinds

        async with asyncio.timeout(30):
            assert (await asyncio.to_thread(work))[-1] == "vm-created"
        async with AsyncClient(state_dir) as farm:
            assert [vm.spec.name for vm in await farm.vms()] == ["web"]


def test_without_a_daemon_it_is_said_who_does_not_answer(tmp_path: Path) -> None:
    with Client(tmp_path) as farm, pytest.raises(HostLost, match="does not answer"):
        farm.vms()


@pytest.mark.parametrize(
    ("asynchronous", "blocking"),
    [
        (AsyncClient, Client),
        (PoolClient, Pool),
        (UserClient, Users),
        (OperationsClient, Operations),
        (FeedClient, Events),
    ],
)
def test_the_blocking_client_has_every_verb(asynchronous: type[Any], blocking: type[Any]) -> None:
    verbs = {
        name for name, _ in inspect.getmembers(asynchronous, inspect.isfunction) if not name.startswith("_")
    }
    assert verbs - _WITHOUT_BLOCKING == {
        name for name, _ in inspect.getmembers(blocking, inspect.isfunction) if not name.startswith("_")
    }


def test_whoever_imports_the_package_alone_loads_no_client() -> None:
    code = """
        import sys
        import transhume
        assert transhume.__version__
        assert "httpx" not in sys.modules and "transhume.sdk" not in sys.modules
        assert transhume.Client.__name__ == "Client"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "src" / "transhume" / "py.typed").exists()
