"""Errors by meaning: one tree for the whole product.

    TranshumeError
    ├── Refused             the request was wrong or impossible; nothing was changed
    │   ├── NotFound        the named thing does not exist
    │   ├── Conflict        the thing exists, but is in a state that forbids the request
    │   ├── Unauthorized    the caller did not prove who it is
    │   └── PreflightFailed every reason why a VM cannot move or be placed, at once
    ├── PeerProtocolError   the other end sent something that the protocol does not allow
    ├── VmmError            QEMU refused, failed or died
    │   ├── PagesLost       pages that a VM elsewhere still lacks are held by nobody any more
    │   └── MemoryDiffers   a VM runs with memory that is not what its source had
    ├── KernelError         the Linux kernel lacks or refused something that the engine needs
    ├── HostLost            a host does not answer
    ├── TimedOut            the limit of a wait was reached
    ├── StoreError          the farm's store could not answer; a write may or may not have happened
    │   ├── StoreFull       the store refused the write for lack of space; nothing was written
    │   └── StoreUnavailable the store cannot be asked now; the failed call has written nothing
    └── MigrationError      a migration ended without moving the VM; says where the VM runs

Every message names the thing, the reason and the mend, in words that a person can act on.
"""

from __future__ import annotations


class TranshumeError(Exception):
    """Base of all errors that users may see.

    `code` is stable and meant for programs; `message` is for people; `status` is the HTTP status by
    which the API reports the error; `exit_code` is what a command of the CLI ends with.
    """

    code = "internal"
    status = 500
    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Refused(TranshumeError):
    """The request was wrong or impossible; nothing was changed."""

    code = "refused"
    status = 400
    exit_code = 2


class NotFound(Refused):
    """The named thing does not exist."""

    code = "not-found"
    status = 404


class Conflict(Refused):
    """The thing exists, but its state forbids the request."""

    code = "conflict"
    status = 409


class Unauthorized(Refused):
    """The caller did not prove who it is."""

    code = "unauthorized"
    status = 401


class Forbidden(Refused):
    """The caller is known, and has no right to this."""

    code = "forbidden"
    status = 403


class TooManyAttempts(Refused):
    """Too many logins have failed; the message says when to try again."""

    code = "too-many-attempts"
    status = 429


class PreflightFailed(Refused):
    """A VM cannot move, or be placed: `reasons` holds all the causes, each one sentence with its mend."""

    code = "preflight-failed"
    status = 409

    def __init__(self, message: str, reasons: tuple[str, ...]) -> None:
        super().__init__(message)
        self.reasons = reasons


class PeerProtocolError(TranshumeError):
    """The other end of a connection sent something that the protocol does not allow."""

    code = "peer-protocol"
    status = 502


class VmmError(TranshumeError):
    """QEMU refused a command, failed or died."""

    code = "vmm"
    status = 502


class PagesLost(VmmError):
    """Pages that a VM elsewhere still lacks are held by nobody any more."""

    code = "pages-lost"


class MemoryDiffers(VmmError):
    """A VM runs at its destination, and pages that it has not written there are not what its source had."""

    code = "memory-differs"

    @staticmethod
    def words(vm: str, host: str, difference: str) -> str:
        """What both ends say of it. `difference` names the RAM block and the pages."""
        return (
            f"VM {vm} runs at host {host} with memory that differs from what it had at the switchover: "
            f"{difference}. End it with `transhume vm kill`, and start it from its disks"
        )


class KernelError(TranshumeError):
    """The Linux kernel lacks or refused something that the engine needs."""

    code = "kernel"
    status = 500


class HostLost(TranshumeError):
    """A host does not answer; what it does meanwhile is unknown."""

    code = "host-lost"
    status = 503


class TimedOut(TranshumeError):
    """The limit of a wait was reached."""

    code = "timed-out"
    status = 504


class StoreError(TranshumeError):
    """The farm's store could not answer; whether a write happened is unknown until it is read again."""

    code = "store"
    status = 503


class StoreFull(StoreError):
    """The store refused the write for lack of space; nothing was written."""

    code = "store-full"
    status = 507


class StoreUnavailable(StoreError):
    """The store cannot be asked now (no quorum, no member in reach); the failed call has written nothing."""

    code = "store-unavailable"


class MigrationError(TranshumeError):
    """A migration ended without moving the VM; the message says where the VM runs."""

    code = "migration-failed"
    status = 500
    exit_code = 3


ERRORS_BY_CODE: dict[str, type[TranshumeError]] = {
    kind.code: kind
    for kind in (
        TranshumeError,
        Refused,
        NotFound,
        Conflict,
        Unauthorized,
        Forbidden,
        TooManyAttempts,
        PeerProtocolError,
        VmmError,
        PagesLost,
        MemoryDiffers,
        KernelError,
        HostLost,
        TimedOut,
        StoreError,
        StoreFull,
        StoreUnavailable,
        MigrationError,
    )
}
"""How a program that reads an error off the wire finds its class. `PreflightFailed` is built by hand."""
