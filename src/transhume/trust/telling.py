"""A server's side of TLS that says why it refuses.

asyncio throws away what is still to be sent when a handshake fails, and with it the alert that tells the
caller why; nor does it say anything in the log. The hook for both is the public `SSLContext.sslobject_class`.

The connection ends when the caller ends it, or with asyncio's own limit of a minute for a handshake.
"""

from __future__ import annotations

import logging
import ssl

log = logging.getLogger(__name__)


class TellingSSLObject(ssl.SSLObject):
    """The connection of an asyncio server."""

    _failure: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        """As the class above, but that an error comes one call late: when the alert has left."""
        if self._failure is not None:
            raise self._failure
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            log.info("a caller was refused in the TLS handshake: %s", _reason(error))
            if not _understands(error):
                raise
            self._failure = error
            raise ssl.SSLWantReadError from error


def _understands(error: ssl.SSLError) -> bool:
    """Whether the caller speaks TLS well enough to hear why; anybody else is cut off at once."""
    return isinstance(error, ssl.SSLCertVerificationError) or error.reason == "UNSUPPORTED_PROTOCOL"


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not hold here ({error.verify_message})"
    return error.reason or str(error)
