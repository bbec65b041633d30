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
from transhume.api.joining import join_farm
from transhume.api.server import serve
from transhume.farm.controller import Controller
from transhume.farm.limits import Limits
from transhume.farm.members import Joined
from transhume.host.certificate import CertificateKeeper
from transhume.host.config import HostConfig
from transhume.model.orders import MigrationUpdate
from transhume.model.vm import VmSpec
from transhume.sim.scripted_host import ScriptedHost
from transhume.store.memory import MemoryStore
from transhume.trust.credentials import Credentials, joining
from transhume.trust.names import CONTROLLER_NAME, server_name
from transhume.trust.token import Token

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
    config: HostConfig, host: ScriptedHost, controller: Controller | None, credentials: Credentials
) -> AsyncIterator[None]:
    """One daemon's application, from ready to closed."""
    ready, stop = asyncio.Event(), asyncio.Event()
    app = create_app(config, host, controller, credentials)
    task = asyncio.create_task(serve(app, config, credentials.server(), ready, stop))
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
        self.alpha_config = self.config("alpha")
        self.beta_config = self.config("beta")
        self.alpha_credentials = Credentials(self.alpha_config.files)
        self.beta_credentials = Credentials(self.beta_config.files)
        self.links = HostLinks("alpha", self.alpha, self.alpha_credentials)
        self.store = MemoryStore()
        self.controller = Controller(
            self.store,
            lambda host: self.links(host),
            self.alpha_config,
            clock_s=lambda: time.time() + self.later_s,
            limits=Limits(silent_after_s=3600.0),
        )

    def config(self, name: str) -> HostConfig:
        (self.folder / name).mkdir()
        return HostConfig(name=name, state_dir=self.folder / name, address=ADDRESS, port=free_port())

    def near(self, config: HostConfig) -> FarmClient:
        """A client on a daemon's local socket."""
        return FarmClient(config.api_socket)

    def far(self, config: HostConfig, credentials: Credentials) -> FarmClient:
        """A client over TCP, with the certificate of a host."""
        demanded = CONTROLLER_NAME if config.carries_controller else server_name(config.name)
        return FarmClient((config.address, config.port), lambda: credentials.client(demanded))

    def stranger(self, config: HostConfig) -> FarmClient:
        """A client over TCP that knows the farm's authority and has no certificate."""
        demanded = CONTROLLER_NAME if config.carries_controller else server_name(config.name)
        return FarmClient((config.address, config.port), lambda: joining(self.authority_pem, demanded))

    @property
    def authority_pem(self) -> str:
        return self.controller.members.authority.certificate_pem

    async def start_controller(self) -> None:
        await self.controller.start()
        keeper = CertificateKeeper(self.alpha_config.files, "alpha", controller=True)
        await keeper.demand(self.controller, time.time(), self.authority_pem)

    async def join(self, config: HostConfig, token: str = "") -> Joined:
        """Join as a new server does; without a token with a fresh one."""
        given = Token.parse(token or (await self.controller.members.invite()).token)
        return await join_farm((ADDRESS, self.alpha_config.port), given, config)

    async def join_beta(self) -> None:
        await self.join(self.beta_config)
        self.beta_config = self.beta_config.model_copy(
            update={"controller_address": ADDRESS, "controller_port": self.alpha_config.port}
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
        await daemons.start_controller()
        await stack.enter_async_context(
            serving(daemons.alpha_config, daemons.alpha, daemons.controller, daemons.alpha_credentials)
        )
        await daemons.join_beta()
        await stack.enter_async_context(
            serving(daemons.beta_config, daemons.beta, None, daemons.beta_credentials)
        )
        await daemons.beat()
        yield daemons
