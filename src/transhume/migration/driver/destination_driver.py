"""Carries out the destination machine's commands: makes the VM, receives it, and lets it run or removes it.

Threads: the event loop runs the machine and talks to QEMU; a thread for each connection receives what the
source sends, pages straight into guest RAM.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Mapping

from transhume.memory.digest import digest
from transhume.memory.ram import GuestRam
from transhume.migration import events as ev
from transhume.migration import wire
from transhume.migration.destination import DestinationMachine, DestinationState
from transhume.migration.driver.control import ControlServer
from transhume.migration.driver.handshake import Identity, accept
from transhume.migration.driver.job import MoverJob
from transhume.migration.driver.journal import Journal
from transhume.migration.driver.loop import Driver, Handler, end
from transhume.migration.machine import Command, Event
from transhume.migration.register import Register
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.transfer.receiver import PageReceiver
from transhume.model.errors import (
    HostLost,
    KernelError,
    NotFound,
    PeerProtocolError,
    TranshumeError,
    Unauthorized,
    VmmError,
)
from transhume.model.migration import Engine, Outcome
from transhume.model.orders import MigrationUpdate, Prepared
from transhume.vmm.device_state import IncomingState, prepare_load
from transhume.vmm.launch import launch
from transhume.vmm.log import last_words
from transhume.vmm.monitor import Monitor
from transhume.vmm.native import NativeIncoming
from transhume.vmm.paths import VmPaths
from transhume.vmm.process import QemuProcess, find_running

KEY_BYTES = 32
BACKLOG_CONNECTIONS = 8

COMMITTED_STATES = frozenset({DestinationState.RESUMING.value, DestinationState.RUNNING.value})


class DestinationDriver(Driver[DestinationState]):
    """The destination's mover."""

    lasting = frozenset(
        {
            ev.SwapToSource,
            ev.SwapToDestination,
            ev.ResumeVm,
            ev.TellPeerCommitted,
            ev.TellPeerRunning,
            ev.DestroyVm,
            ev.TellPeerFailed,
        }
    )

    def __init__(
        self,
        job: MoverJob,
        paths: VmPaths,
        journal: Journal,
        register: Register,
        control: ControlServer,
        address: str,
        vm_user: str,
    ) -> None:
        self._predecessor_state = journal.last_state()
        machine = DestinationMachine(job.migration, time.monotonic())
        super().__init__(job, machine, journal, register, control)
        self._destination = machine
        self._paths = paths
        self._address = address
        self._vm_user = vm_user
        self._options = job.migration.options
        self._key = secrets.token_bytes(KEY_BYTES)
        self._process: QemuProcess | None = None
        self._monitor: Monitor | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self._ram: GuestRam | None = None
        self._channel: FrameChannel | None = None
        self._native_channel: FrameChannel | None = None
        self._threads: list[threading.Thread] = []
        self._incoming: IncomingState | None = None
        self._native: NativeIncoming | None = None
        self._state_chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._state_length_bytes = 0
        self._state_fingerprint = hashlib.sha256()
        self._state_ended_s = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._heard_bytes = 0
        self._beat_s = 0.0
        self._closing = False

    # --- the frame's questions -------------------------------------------------------------------

    def handlers(self) -> Mapping[type[Command], Handler]:
        return {
            ev.AskController: self._ask_controller,
            ev.SwapToDestination: self.swap_to_destination,
            ev.SwapToSource: self.swap_to_source,
            ev.ResumeVm: self._resume_vm,
            ev.TellPeerCommitted: self._tell_peer_committed,
            ev.TellPeerRunning: self._tell_peer_running,
            ev.DestroyVm: self._destroy_vm,
            ev.TellPeerFailed: self._tell_peer_failed,
        }

    @property
    def past_point_of_no_return(self) -> bool:
        return self._destination.state in (
            DestinationState.RESUMING,
            DestinationState.RUNNING,
            DestinationState.DONE,
        )

    async def begin(self) -> Event | None:
        """Make the VM and open the port (steps 2 to 4); a successor only looks what is there."""
        if self._predecessor_state is not None:
            await self._attach_vm()
            return ev.Recovered(state_may_be_sent=True)
        launched = await launch(self.job.spec, self._paths, vm_user=self._vm_user, incoming=True)
        await launched.monitor.close()  # that socket is the daemon's
        self._watch_process(launched.process)
        self._monitor = await Monitor.connect(self._paths.mover_qmp_socket)
        self._ram = GuestRam.of_process(launched.process.pid)
        await asyncio.to_thread(self._ram.punch_all)  # whatever QEMU wrote at its start is not the guest's
        if self._options.engine is Engine.TRANSHUME:
            await prepare_load(self._monitor)
            self._incoming = await IncomingState.begin(self._monitor)
            self._loading = asyncio.create_task(self._load_state(), name="load")
        self.warm_up_register()
        self._listen()
        return ev.Listening()

    def update(self) -> MigrationUpdate:
        """An outcome is reported from here only when the source cannot report it."""
        machine = self._destination
        outcome = Outcome.RUNNING
        if machine.finished and (machine.state is DestinationState.DONE or machine.source_never_came):
            outcome = machine.outcome
        return MigrationUpdate(
            migration=self.migration.id,
            host=self.migration.destination,
            phase=machine.phase,
            outcome=outcome,
            runs_at=machine.runs_at,
            error_code=machine.error_code,
            error=machine.error,
        )

    def stop_work(self) -> None:
        self._closing = True
        if self._listener is not None:
            self._listener.close()

    async def tick(self, now_s: float) -> None:
        """Hear the source in its bytes, and let it hear us."""
        channel = self._channel
        if channel is None:
            return
        if channel.received_bytes != self._heard_bytes:
            self._heard_bytes = channel.received_bytes
            self.post(ev.PeerHeard())
        if now_s - self._beat_s >= min(1.0, self._options.peer_silence_limit_s / 4):
            self._beat_s = now_s
            await asyncio.to_thread(self._send_if_open, wire.Pong(token=0))

    async def close(self) -> None:
        self._closing = True
        if self._listener is not None:
            self._listener.close()
        for task in (self._acceptor, self._loading, self._watcher):
            await end(task)
        for channel in (self._channel, self._native_channel):
            if channel is not None:
                channel.shutdown()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        for channel in (self._channel, self._native_channel):
            if channel is not None:
                channel.close()
        if self._incoming is not None:
            self._incoming.close()
        if self._native is not None:
            self._native.close()
        if self._ram is not None:
            self._ram.close()
        if self._monitor is not None:
            await self._monitor.close()
        if self._process is not None:
            self._process.close()

    # --- making the VM ---------------------------------------------------------------------------

    async def _attach_vm(self) -> None:
        process = find_running(self._paths)
        if process is None:
            return  # DestroyVm and ResumeVm find that out by themselves
        self._watch_process(process)

    def _watch_process(self, process: QemuProcess) -> None:
        self._process = process
        self._watcher = asyncio.create_task(self._watch(process), name="watch QEMU")

    async def _watch(self, process: QemuProcess) -> None:
        await process.wait()
        words = last_words(self._paths)
        self.post(ev.QemuDied(f"its process ended; its last words: {words}"))

    async def _qemu(self) -> Monitor:
        if self._monitor is None:
            if self._process is None:
                raise VmmError(f"QEMU of VM {self.migration.vm} does not run")
            self._monitor = await Monitor.connect(self._paths.mover_qmp_socket)
        return self._monitor

    def _listen(self) -> None:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((self._address, 0))
            listener.listen(BACKLOG_CONNECTIONS)
        except OSError as error:
            listener.close()
            raise HostLost(f"no port can be opened on {self._address}: {error.strerror}") from None
        listener.setblocking(False)
        self._listener = listener
        self._acceptor = asyncio.create_task(self._accept_forever(listener), name="accept")
        port: int = listener.getsockname()[1]
        self.control.prepared(Prepared(address=self._address, port=port, key=self._key.hex()))

    async def _accept_forever(self, listener: socket.socket) -> None:
        while not self._closing:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,), name="receiver", daemon=True)
            self._threads.append(thread)
            thread.start()

    # --- receiving -------------------------------------------------------------------------------

    def _identity(self) -> Identity:
        assert self._ram is not None
        return Identity(
            migration=self.migration.id,
            source=self.migration.source,
            destination=self.migration.destination,
            key=self._key,
            ram_blocks=self._ram.ram_blocks,
            silence_limit_s=self._options.peer_silence_limit_s,
        )

    def _serve(self, sock: socket.socket) -> None:
        """One connection's thread. A stranger loses the connection and disturbs nothing."""
        try:
            channel, role = accept(sock, self._identity())
        except (HostLost, PeerProtocolError, Unauthorized) as error:
            self._log(f"a connection was refused: {error.message}")
            return
        if role is wire.Role.NATIVE:
            self._native_channel = channel
            asyncio.run_coroutine_threadsafe(self._begin_native(channel), self._loop)
            return
        if self._channel is not None:
            self._log("a second main connection was refused")
            channel.close()
            return
        self._channel = channel
        self.post_from_thread(ev.SourceConnected())
        try:
            self._receive(channel)
        except (HostLost, PeerProtocolError, KernelError) as error:
            self.post_from_thread(ev.LinkLost(error.code, error.message))

    def _receive(self, channel: FrameChannel) -> None:
        assert self._ram is not None
        receiver = PageReceiver(channel, self._ram)
        try:
            while True:
                item = receiver.receive()
                if isinstance(item, bytes):
                    self._take_state(item)
                else:
                    self._take_message(channel, receiver, item)
        finally:
            receiver.close()

    def _take_state(self, chunk: bytes) -> None:
        self._state_length_bytes += len(chunk)
        if self._state_length_bytes > wire.MAX_STATE_BYTES:
            raise PeerProtocolError("the device state is over the limit")
        self._state_fingerprint.update(chunk)
        self._loop.call_soon_threadsafe(self._state_chunks.put_nowait, chunk)

    def _take_message(self, channel: FrameChannel, receiver: PageReceiver, message: wire.Message) -> None:
        if isinstance(message, wire.PassEnd):
            _check_counts(receiver, message.pages, message.zero_pages)
            channel.send(wire.PassAck(iteration=message.iteration))
            self.post_from_thread(ev.PassReceived(message.iteration))
        elif isinstance(message, wire.LastPagesEnd):
            _check_counts(receiver, message.pages, message.zero_pages)
            self._verify(channel, message)
            self.post_from_thread(ev.LastPagesReceived())
        elif isinstance(message, wire.StateEnd):
            self._end_state(message)
        elif isinstance(message, wire.Ping):
            channel.send(wire.Pong(token=message.token))
        elif isinstance(message, wire.Abort):
            self.post_from_thread(ev.PeerAborted(message.reason))
        elif isinstance(message, wire.Finished):
            self.post_from_thread(ev.PeerFinished())
        else:
            raise PeerProtocolError(f"{channel.peer} sent {message.frame_type.name} out of turn.")

    def _verify(self, channel: FrameChannel, message: wire.LastPagesEnd) -> None:
        """Compare our RAM with the source's digests, if it sent any."""
        assert self._ram is not None
        began_s = time.monotonic()
        if message.digests:
            ours = tuple(digest(block) for block in self._ram.blocks)
            if ours != message.digests:
                raise PeerProtocolError(
                    "the RAM at the destination differs from the source's: nothing was switched over"
                )
            channel.send(wire.PagesVerified(verify_ms=(time.monotonic() - began_s) * 1000))

    def _end_state(self, message: wire.StateEnd) -> None:
        if (
            message.length_bytes != self._state_length_bytes
            or message.sha256 != self._state_fingerprint.hexdigest()
        ):
            raise PeerProtocolError("the device state did not arrive whole: length or hash differ")
        self._state_ended_s = time.monotonic()
        self.post_from_thread(ev.StateReceived())
        self._loop.call_soon_threadsafe(self._state_chunks.put_nowait, None)

    async def _load_state(self) -> None:
        """Feed QEMU while the state arrives, and tell when it has taken all."""
        incoming = self._incoming
        assert incoming is not None
        try:
            while (chunk := await self._state_chunks.get()) is not None:
                await incoming.feed(chunk)
            await incoming.finish()
        except TranshumeError as error:
            self.post(ev.CommandFailed("LoadState", error.code, error.message))
            return
        await self._say_loaded()

    async def _begin_native(self, channel: FrameChannel) -> None:
        try:
            self._native = await NativeIncoming.begin(await self._qemu(), channel.fileno())
            await self._native.finish()
        except TranshumeError as error:
            self.post(ev.CommandFailed("LoadState", error.code, error.message))
            return
        await self._say_loaded()

    async def _say_loaded(self) -> None:
        self.post(ev.StateLoaded())
        since_s = self._state_ended_s or time.monotonic()
        load_ms = max(0.0, time.monotonic() - since_s) * 1000
        await asyncio.to_thread(self._send_if_open, wire.StateLoaded(load_ms=load_ms))

    # --- the machine's commands ------------------------------------------------------------------

    async def _ask_controller(self, _: ev.AskController) -> Event | None:
        """Step 3A. No answer is no answer: the wait has its own limit."""
        try:
            record = await self._register.migration(self.migration.id)
        except NotFound:
            return ev.MigrationKnown(going_on=False)
        except TranshumeError:
            return None
        return ev.MigrationKnown(going_on=record.outcome is Outcome.RUNNING)

    async def _resume_vm(self, _: ev.ResumeVm) -> Event:
        monitor = await self._qemu()
        # A successor may find that its predecessor resumed it; otherwise every round trip is downtime.
        if self._predecessor_state is None or await monitor.status() != "running":
            await monitor.cont()
        return ev.VmResumed()

    async def _tell_peer_committed(self, _: ev.TellPeerCommitted) -> None:
        commit_ms = self._destination.commit_s * 1000
        message = wire.Committed(epoch=self.migration.epoch + 1, commit_ms=commit_ms)
        await asyncio.to_thread(self._send_if_open, message)

    async def _tell_peer_running(self, command: ev.TellPeerRunning) -> None:
        await asyncio.to_thread(self._send_if_open, wire.Running(resume_ms=command.resume_s * 1000))

    async def _tell_peer_failed(self, command: ev.TellPeerFailed) -> None:
        message = wire.Failed(code=command.code, message=command.message, definitive=True)
        await asyncio.to_thread(self._send_if_open, message)

    async def _destroy_vm(self, _: ev.DestroyVm) -> Event:
        await end(self._watcher)
        process = self._process or find_running(self._paths)
        if process is not None:
            await process.kill()
        shutil.rmtree(self._paths.directory, ignore_errors=True)
        return ev.VmDestroyed()

    def _send_if_open(self, message: wire.Message) -> None:
        """For words whose loss changes nothing: the register tells the rest."""
        if self._channel is None:
            return
        try:
            self._channel.send(message)
        except HostLost:
            return


def _check_counts(receiver: PageReceiver, pages: int, zero_pages: int) -> None:
    """A count that differs means pages that were lost or made up on the way."""
    counted = receiver.take_counts()
    if counted != (pages, zero_pages):
        raise PeerProtocolError(
            f"{counted[0]} pages and {counted[1]} zero pages arrived where the source counted "
            f"{pages} and {zero_pages}"
        )
