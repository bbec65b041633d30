"""Two daemons' applications on real sockets, around scripted hosts: alpha carries the controller."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from transhume.api.app import create_app
from transhume.api.client import FarmClient
from transhume.api.controller_client import ControllerClient
from transhume.api.host_client import HostLinks
from transhume.api.server import serve
from transhume.farm.controller import Controller
from transhume.farm.limits import Limits
from transhume.host.config import HostConfig
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import VmSpec
from transhume.sim.scripted_host import ScriptedHost
from transhume.store.memory import MemoryStore

ADDRESS = "127.0.0.1"
MIB = 1 << 20


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def serving(
    config: HostConfig, host: ScriptedHost, controller: Controller | None
) -> AsyncIterator[None]:
    """One daemon's application, from ready to closed."""
    ready, stop = asyncio.Event(), asyncio.Event()
    app = create_app(config, host, controller)
    task = asyncio.create_task(serve(app, config, ready, stop))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if task.done():
            await task
        yield
    finally:
        stop.set()
        if controller is not None:
            await controller.close()
        await task


class Daemons:
    """What a test of the API needs at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.later_s = 0.0
        self.alpha, self.beta = ScriptedHost("alpha"), ScriptedHost("beta")
        self.alpha_config = self.config("alpha", "a" * 64)
        self.beta_config = self.config("beta", "")
        self.links = HostLinks("alpha", self.alpha)
        self.store = MemoryStore()
        self.controller = Controller(
            self.store,
            lambda host, secret: self.links(host, secret),
            self.alpha_config,
            clock_s=lambda: time.time() + self.later_s,
            limits=Limits(silent_after_s=3600.0),
        )

    def config(self, name: str, secret: str) -> HostConfig:
        (self.folder / name).mkdir()
        return HostConfig(
            name=name, state_dir=self.folder / name, address=ADDRESS, port=free_port(), secret=secret
        )

    def near(self, config: HostConfig) -> FarmClient:
        """A client on a daemon's local socket."""
        return FarmClient(config.api_socket)

    def far(self, config: HostConfig, bearer: str | None) -> FarmClient:
        return FarmClient((config.address, config.port), bearer)

    @property
    def alpha_bearer(self) -> str:
        return f"alpha:{self.alpha_config.secret}"

    @property
    def beta_bearer(self) -> str:
        return f"beta:{self.beta_config.secret}"

    async def join_beta(self) -> None:
        token = (await self.controller.members.invite()).token
        async with self.far(self.alpha_config, None) as client:
            joined = await client.join(token, "beta", ADDRESS, self.beta_config.port)
        self.beta_config = self.beta_config.model_copy(
            update={
                "secret": joined.secret,
                "controller_address": ADDRESS,
                "controller_port": self.alpha_config.port,
            }
        )

    async def beat(self) -> None:
        await self.controller.heartbeat("alpha", self.alpha.inventory_now, self.alpha.states)
        client = ControllerClient(self.beta_config)
        await client.heartbeat("beta", self.beta.inventory_now, self.beta.states)
        await client.close()

    async def running_vm(self, name: str = "web", host: str = "alpha") -> None:
        async with self.near(self.alpha_config) as client:
            await client.create_vm(VmSpec(name=name, memory_bytes=256 * MIB, cpus=1), host)
            await client.start_vm(name)

    async def report_from_beta(self, update: MigrationUpdate) -> None:
        client = ControllerClient(self.beta_config)
        await client.report(update)
        await client.close()


@asynccontextmanager
async def two_daemons() -> AsyncIterator[Daemons]:
    """Alpha with the controller and beta as a member, both heard from."""
    folder = Path(tempfile.mkdtemp(prefix="th-", dir="/tmp"))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        daemons = Daemons(folder)
        stack.push_async_callback(daemons.links.close)
        await daemons.controller.start()
        await stack.enter_async_context(serving(daemons.alpha_config, daemons.alpha, daemons.controller))
        await daemons.join_beta()
        await stack.enter_async_context(serving(daemons.beta_config, daemons.beta, None))
        await daemons.beat()
        yield daemons
