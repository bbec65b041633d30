"""The daemon of one host: start-up code that names the concrete parts and puts them together.

Started as `python -m transhume.daemon --state-dir DIR`, by `up`, `join` or a service manager. On a
SIGTERM it ends; the VMs and the movers go on, and the next daemon finds them again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from transhume.api.app import create_app
from transhume.api.carrier import Carrier
from transhume.api.controller_client import ControllerClient
from transhume.api.gate import App
from transhume.api.host_client import HostLinks
from transhume.api.server import serve
from transhume.farm.controller import Controller
from transhume.host.certificate import LOOK_INTERVAL_S, CertificateKeeper
from transhume.host.config import HostConfig
from transhume.host.controller_link import ControllerLink
from transhume.host.inventory import Inventory
from transhume.host.service import HostService
from transhume.host.steady import again
from transhume.model.errors import TranshumeError
from transhume.store.sqlite import SqliteStore
from transhume.trust.credentials import Credentials

HEARTBEAT_S = 3.0
LEASE_LOOK_S = 1.0
STATE_DIR_MODE = 0o711
"""QEMU, without privileges, must be able to pass through to its own VM's folder, and read nothing."""

log = logging.getLogger("transhume.daemon")


class Daemon:
    """One host's daemon, from its configuration to its end."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._keeper = CertificateKeeper(config.files, config.name, config.carries_controller)
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises `TranshumeError` when the daemon cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._make_folders()
        inventory = await Inventory.measure(self._config.vm_user)
        async with contextlib.AsyncExitStack() as stack:
            credentials = Credentials(self._config.files)
            if self._config.on_cluster:
                await self._run_on_cluster(stack, inventory, credentials)
            elif self._config.carries_controller:
                await self._run_with_controller(stack, inventory, credentials)
            else:
                client = ControllerClient(self._config)
                stack.push_async_callback(client.close)
                service = HostService(self._config, inventory, client)
                stack.push_async_callback(service.close)
                app = create_app(self._config, service, None, credentials)
                await self._serve(service, client, app, credentials)

    async def _run_on_cluster(
        self, stack: contextlib.AsyncExitStack, inventory: Inventory, credentials: Credentials
    ) -> None:
        """Like every other host of the farm: it leads, or passes on what is asked of it."""
        client = ControllerClient(self._config)
        stack.push_async_callback(client.close)
        service = HostService(self._config, inventory, client)
        stack.push_async_callback(service.close)
        links = HostLinks(self._config.name, service, credentials)
        stack.push_async_callback(links.close)
        carrier = Carrier(self._config, links, self._keeper, credentials, client)
        turns = asyncio.create_task(carrier.run(), name="carry the controller")
        stack.push_async_callback(_ended, turns)
        if not self._config.files.identity.exists():
            # The first host of a new farm signs for itself, as soon as it leads.
            await self._either(turns, carrier.certified.wait())
        await self._serve(service, client, carrier.app(service), credentials, turns)

    async def _either(self, turns: asyncio.Task[None], event: Coroutine[Any, Any, Any]) -> None:
        """Wait for `event`, or raise what ended the turns, or end with the daemon."""
        waiting = [asyncio.create_task(event), asyncio.create_task(self._stop.wait())]
        await asyncio.wait({turns, *waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if turns.done():
            turns.result()

    async def _run_with_controller(
        self, stack: contextlib.AsyncExitStack, inventory: Inventory, credentials: Credentials
    ) -> None:
        store = await SqliteStore.open(self._config.store_file)
        stack.push_async_callback(store.close)
        links: list[HostLinks] = []
        # The controller and this host's service need each other: the links come when both exist.
        controller = Controller(store, lambda host: links[0](host), self._config)
        service = HostService(self._config, inventory, controller)
        stack.push_async_callback(service.close)
        links.append(HostLinks(self._config.name, service, credentials))
        stack.push_async_callback(links[0].close)
        await controller.start()
        stack.push_async_callback(controller.close)
        await self._keeper.demand(controller, time.time(), controller.members.authority.certificate_pem)
        app = create_app(self._config, service, controller, credentials)
        await self._serve(service, controller, app, credentials, closing=controller.close)

    async def _serve(
        self,
        service: HostService,
        link: ControllerLink,
        app: App,
        credentials: Credentials,
        turns: asyncio.Task[None] | None = None,
        closing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Answer until the daemon is to end, or `turns` fail; `closing` ends the streams of the answers."""
        service.unsettle()
        serving = asyncio.create_task(
            serve(app, self._config, credentials.server(), self._ready, self._stop), name="serve"
        )
        ready = asyncio.create_task(self._ready.wait(), name="ready")
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        working: list[asyncio.Task[None]] = []
        if not serving.done():
            service.recover()
            working = [
                asyncio.create_task(again(what, pause_s, step), name=what)
                for what, pause_s, step in (
                    ("look after the strict VMs", LEASE_LOOK_S, partial(self._watch_lease, service)),
                    ("have the heartbeat taken", HEARTBEAT_S, partial(self._beat, service, link)),
                    ("renew the certificate", LOOK_INTERVAL_S, partial(self._renew, link, credentials)),
                )
            ]
            log.info("host %s answers at %s:%s", self._config.name, self._config.address, self._config.port)
        try:
            await self._stop_or_failure(serving, turns)
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            if closing is not None:
                await closing()
            if turns is not None:
                await _ended(turns)
            self._stop.set()
            await serving
        if turns is not None and not turns.cancelled():
            turns.result()

    async def _stop_or_failure(self, serving: asyncio.Task[None], turns: asyncio.Task[None] | None) -> None:
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        working = {serving, stopping} if turns is None else {serving, stopping, turns}
        await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    async def _beat(self, service: HostService, link: ControllerLink) -> None:
        """Tell the controller that this host lives, what it has and what its VMs do."""
        asked_at_s = time.monotonic()
        reply = await link.heartbeat(
            self._config.name,
            await service.inventory(),
            await service.vm_states(),
            service.vm_epochs(),
        )
        service.note_epochs(reply.epochs)
        for name in await service.end_disowned(reply.disowned):
            log.warning("VM %s belongs to another host by now: it was ended here", name)
        service.settle()
        await service.strict.answered(asked_at_s, reply.strict)

    async def _watch_lease(self, service: HostService) -> None:
        """Stop strict VMs when the register was silent for too long; after that nothing starts unasked."""
        if service.strict.lease_is_over:
            service.unsettle()
        await service.strict.look()

    async def _renew(self, link: ControllerLink, credentials: Credentials) -> None:
        """Ask for the next certificate in time, and show it from then on."""
        if await self._keeper.look(link, time.time()):
            credentials.server()

    def _make_folders(self) -> None:
        for path in (self._config.state_dir, self._config.vms_dir):
            path.mkdir(mode=STATE_DIR_MODE, parents=True, exist_ok=True)
            path.chmod(STATE_DIR_MODE)
        self._config.migrations_dir.mkdir(mode=0o700, exist_ok=True)


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel a task that goes on, and wait for it. Its error is for whoever asks for the result."""
    task.cancel()
    await asyncio.wait({task})


def main() -> int:
    """Read the configuration, run, and say in one line why not when it cannot."""
    parser = argparse.ArgumentParser(prog="transhume.daemon", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = HostConfig.model_validate_json((arguments.state_dir / "host.json").read_text())
    except (OSError, ValueError) as error:
        log.error("the configuration in %s cannot be read: %s", arguments.state_dir, error)
        return 2
    pid_file = config.state_dir / "daemon.pid"
    pid_file.write_text(f"{os.getpid()}\n")
    try:
        asyncio.run(Daemon(config).run())
    except TranshumeError as error:
        log.error("%s", error.message)
        return error.exit_code
    finally:
        pid_file.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
