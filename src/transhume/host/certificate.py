"""Keeps this host's certificate valid: asks for the next one when two thirds of its life are over.

The clock is an argument; who waits between two looks is the daemon.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from transhume.model.errors import Refused
from transhume.model.orders import Renewed
from transhume.trust.certificates import Held, is_signed_by, make_request, read_held
from transhume.trust.files import IdentityFiles
from transhume.trust.names import CONTROLLER_NAME, server_name

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 600.0
"""How long a daemon waits between two looks, and so until it tries again: ten days are left for it."""


class Renewer(Protocol):
    """Whoever can ask the authority: the controller itself, or a member's link to it."""

    async def renew(self, host: str, request_pem: str) -> Renewed: ...


class CertificateKeeper:
    """One host's certificate. `controller` demands that it also lets the controller be here."""

    def __init__(self, files: IdentityFiles, host: str, controller: bool) -> None:
        self._files = files
        self._host = host
        self._controller = controller

    async def demand(self, renewer: Renewer, now_s: float, authority_pem: str) -> None:
        """For the controller's own host, which signs for itself: have a certificate, from this authority."""
        text = await asyncio.to_thread(_read, self._files)
        held = read_held(text)
        if held is None or not self._sound(held, now_s) or not is_signed_by(text, authority_pem):
            await self._renew(renewer)

    async def look(self, renewer: Renewer, now_s: float) -> bool:
        """Renew when it is time. True when there is a new certificate.

        Raises what `renewer` raises, and `Refused` when the files cannot be written; the old one holds then.
        """
        held = read_held(await asyncio.to_thread(_read, self._files))
        if held is not None and now_s < held.due_at_s():
            return False
        await self._renew(renewer)
        return True

    def _sound(self, held: Held, now_s: float) -> bool:
        names = {server_name(self._host), *([CONTROLLER_NAME] if self._controller else [])}
        return names <= set(held.names) and now_s < held.due_at_s()

    async def _renew(self, renewer: Renewer) -> None:
        key_pem, request_pem = await asyncio.to_thread(make_request)
        answer = await renewer.renew(self._host, request_pem)
        try:
            await asyncio.to_thread(self._files.write, key_pem, answer.certificate, answer.authority)
        except OSError as error:
            raise Refused(
                f"the new certificate of host {self._host} cannot be written to {self._files.identity}: "
                f"{error.strerror}; the old one holds on"
            ) from error
        held = read_held(answer.certificate)
        left_days = (held.expires_at_s - held.issued_at_s) / 86400 if held else 0
        log.info("host %s has a new certificate, for %.0f days", self._host, left_days)


def _read(files: IdentityFiles) -> str:
    try:
        return files.identity.read_text()
    except OSError:
        return ""
