"""How the source gets a connection to a destination that has several addresses."""

from __future__ import annotations

import threading

from transhume.migration.driver.handshake import Identity, connect
from transhume.migration.path_choice import PathChoice
from transhume.migration.transfer.channel import FrameChannel
from transhume.migration.wire import Role
from transhume.model.errors import HostLost, PeerProtocolError, TranshumeError, Unauthorized
from transhume.trust.credentials import Credentials


def reach(
    choice: PathChoice,
    port: int,
    identity: Identity,
    credentials: Credentials,
    stop: threading.Event,
    again: bool = False,
) -> tuple[FrameChannel, str]:
    """Make the main connection to the first address where the destination proves who it is; that address.

    One round over all addresses, in the order and with the limits of `PathChoice.attempts`. Blocks; `stop`
    ends the round after the attempt under way. Raises as `connect`; nothing stays open then.
    """
    failures: list[TranshumeError] = []
    for attempt in choice.attempts(again):
        choice.tried(attempt.address)
        try:
            channel = connect(
                attempt.address, port, identity, Role.MAIN, credentials, attempt.connect_s, attempt.answer_s
            )
        except (HostLost, PeerProtocolError, Unauthorized) as error:
            # Another machine may answer where networks have the same addresses: it is no reason to give up.
            failures.append(error)
            if stop.is_set():
                break
        else:
            return channel, attempt.address
    raise _most_telling(failures)


def _most_telling(failures: list[TranshumeError]) -> TranshumeError:
    """What each path said, as an error of the kind that says more than that nobody was there."""
    telling = next((failure for failure in failures if not isinstance(failure, HostLost)), failures[0])
    return type(telling)("; ".join(failure.message for failure in failures))
