"""A host that carries a controller of a farm on etcd: it leads the farm, or passes on what is asked of it.

One controller acts at a time. Whoever is elected makes a `Controller` on a store that takes its changes only
as long as it leads; the others send every request to it, so that any host answers every command, and hosts
and movers ask their own daemon or, when that is dead, another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from functools import partial

from fastapi import FastAPI

from transhume.api.app import controller_app, new_app
from transhume.api.controller_client import ANSWER_TIMEOUT_S
from transhume.api.forward import forward_router
from transhume.api.gate import App, Gate, Receive, Scope, Send, on_behalf
from transhume.api.host_routes import host_router
from transhume.api.http_connection import HttpConnection, authority
from transhume.api.problem import CONTENT_TYPE, encode_problem
from transhume.farm.controller import Controller
from transhume.farm.host_link import HostLink
from transhume.farm.members import Links
from transhume.farm.records import FarmRecords
from transhume.farm.roll import Roll, Target, demand_own_or_empty
from transhume.host.certificate import CertificateKeeper, Renewer
from transhume.host.config import HostConfig
from transhume.model.errors import HostLost, Refused, StoreError, StoreUnavailable, TranshumeError
from transhume.store.address import open_election, open_store
from transhume.store.election import Leadership
from transhume.store.guarded import GuardedStore
from transhume.store.interface import Store
from transhume.trust.credentials import Credentials
from transhume.trust.names import CONTROLLER_NAME, Peer

ELECTION = "controller"
LEASE_S = 5.0
LOOK_INTERVAL_S = 1.0
"""How often a host that does not lead looks who does, and who is a member."""

log = logging.getLogger(__name__)


class Carrier:
    """One host's turns at leading. `run` it as long as the daemon lives; `app` answers meanwhile."""

    def __init__(
        self,
        config: HostConfig,
        links: Links,
        keeper: CertificateKeeper,
        credentials: Credentials,
        renewer: Renewer,
    ) -> None:
        self._config = config
        self._links = links
        self._keeper = keeper
        self._credentials = credentials
        self._renewer = renewer
        self._store: Store | None = None
        self._roll: Roll | None = None
        self._leading: tuple[Controller, App] | None = None
        self._leader: Target | None = None
        self._trouble = "this daemon has just started"
        self._since_s = time.time()
        self._idle: list[tuple[Target, HttpConnection]] = []
        self.certified = asyncio.Event()
        """Set when this host has a certificate with which it can serve as a controller."""

    # --- work --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Open the store, again and again until it answers, and take turns at leading. Ends by
        cancellation, and with `Refused` for a store whose address or content is wrong.
        """
        watching: asyncio.Task[None] | None = None
        try:
            self._store = await self._open()
            self._roll = Roll(FarmRecords(self._store), self._config)
            watching = asyncio.create_task(self._watch(), name="watch who leads")
            while True:
                await self._take_turn(self._store, watching)
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            for _, connection in self._idle:
                await connection.close()
            if self._store is not None:
                await self._store.close()

    async def _open(self) -> Store:
        while True:
            try:
                return await open_store(self._config.store)
            except StoreError as error:
                self._say_trouble(error)
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _take_turn(self, store: Store, watching: asyncio.Task[None]) -> None:
        """Wait to be elected, lead, and step down. Raises what `_watch` raises."""
        try:
            await demand_own_or_empty(FarmRecords(store), self._config)
        except StoreError as error:
            self._say_trouble(error)
            await asyncio.sleep(LOOK_INTERVAL_S)
            return
        election = open_election(store, self._config.name)
        campaign = asyncio.create_task(election.campaign(ELECTION, LEASE_S), name="campaign")
        try:
            await asyncio.wait({campaign, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            leadership = await campaign
        finally:
            await _ended(campaign)
        try:
            await self._lead(store, leadership)
        except StoreError as error:
            self._say_trouble(error)
        finally:
            self._leading = None
            await leadership.resign()

    async def _lead(self, store: Store, leadership: Leadership) -> None:
        controller = Controller(GuardedStore(store, leadership), self._links, self._config)
        try:
            await controller.start()
            await self._keeper.demand(controller, time.time(), controller.members.authority.certificate_pem)
            self._leading = controller, controller_app(controller, new_app(), self._config.name)
            self._trouble = ""
            self.certified.set()
            log.info("host %s leads the farm", self._config.name)
            log.warning("host %s leads the farm no longer: %s", self._config.name, await leadership.lost())
        finally:
            self._leading = None
            await controller.close()

    async def _watch(self) -> None:
        """Know who leads, who is a member and where the other controllers are."""
        assert self._store is not None
        assert self._roll is not None
        election = open_election(self._store, self._config.name)
        told: tuple[Target, ...] | None = None
        while True:
            try:
                await self._roll.refresh()
                leader = await election.leader(ELECTION)
                self._leader = None if leader is None else self._roll.address(leader)
                self._trouble = "" if leader else "no controller leads at this moment"
                self._since_s = time.time()
                if self._leading is None and leader not in (None, self._config.name):
                    await self._follow()
                if self._roll.other_controllers() != told:
                    told = self._roll.other_controllers()
                    self._config.controllers_file.write_text(json.dumps(told))
            except OSError as error:
                log.warning("%s cannot be written: %s", self._config.controllers_file, error.strerror)
            except TranshumeError as error:
                self._say_trouble(error)
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _follow(self) -> None:
        """Have a certificate that lets a controller be here, from whoever leads."""
        assert self._roll is not None
        if self.certified.is_set():
            return
        await self._roll.enrol()
        authority_pem = await asyncio.to_thread(self._config.files.authority.read_text)
        await self._keeper.demand(self._renewer, time.time(), authority_pem)
        self._credentials.server()
        self.certified.set()

    def _say_trouble(self, error: TranshumeError) -> None:
        if self._trouble != error.message:
            log.warning("the farm's store does not serve: %s", error.message)
        self._trouble = error.message
        self._leader = None

    # --- answers -----------------------------------------------------------------------------------

    def app(self, host: HostLink) -> Gate:
        """The application of this host's daemon."""
        own = new_app()
        own.include_router(host_router(self._config, host))
        passing = new_app()
        passing.include_router(forward_router(self._demand_leader, self._credentials))
        return Gate(_Switch(own, passing, self), self._config.name, self.admits)

    def admits(self, peer: Peer) -> bool:
        """Whether a certificate opens anything here: as the leader, or as the roll has it."""
        if self._leading is not None:
            return self._leading[0].members.admits(peer.host, peer.serial)
        # Before the store was read, as on a host without a controller.
        return peer.controller or (self._roll is not None and self._roll.admits(peer.host, peer.serial))

    @property
    def leading(self) -> App | None:
        """What answers for the farm here, while this host leads."""
        return None if self._leading is None else self._leading[1]

    def _demand_leader(self) -> Target:
        if self._leader is None or self._leader == (self._config.address, self._config.port):
            seen = time.strftime("%H:%M:%S UTC", time.gmtime(self._since_s))
            raise StoreUnavailable(
                f"the farm cannot be asked ({self._trouble or 'the controller is changing'}); its store was "
                f"last read at {seen}. Nothing was changed, and VMs run on"
            )
        return self._leader

    async def relay(self, scope: Scope, body: bytes) -> tuple[int, bytes]:
        """Pass on what a host or a mover asks, on a connection that is kept. Raises `HostLost`."""
        target = self._demand_leader()
        self._idle = [one for one in self._idle if one[0] == target]
        tls = partial(self._credentials.client, CONTROLLER_NAME)
        peer = f"the controller at {authority(*target)}"
        connection = self._idle.pop()[1] if self._idle else HttpConnection(peer, target, tls)
        try:
            return await connection.request(
                scope["method"], scope["path"], body or None, ANSWER_TIMEOUT_S, on_behalf(scope)
            )
        finally:
            self._idle.append((target, connection))


class _Switch:
    """To the host's own routes, the leading controller's, or the leader's host."""

    def __init__(self, own: FastAPI, passing: FastAPI, carrier: Carrier) -> None:
        self._own = own
        self._passing = passing
        self._carrier = carrier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leading = self._carrier.leading
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith("/host/"):
            await self._own(scope, receive, send)
        elif leading is not None:
            await leading(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith("/controller/"):
            await self._relay(scope, receive, send)
        else:
            await self._passing(scope, receive, send)

    async def _relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = "application/json"
        try:
            status, body = await self._carrier.relay(scope, await _body(receive))
        except TranshumeError as error:
            status, body = error.status, encode_problem(error)
        if status >= Refused.status:
            kind = CONTENT_TYPE
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": status, "headers": headers if body else []}
        await send(start)
        await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    """The whole body; the gate has limited it."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HostLost("the caller left before its request was whole")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _ended(task: asyncio.Task[Leadership]) -> None:
    """Cancel a campaign that goes on, and wait for it."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
