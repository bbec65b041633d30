"""How a server becomes a host: find out who answers, tell it the token's secret, take a certificate home.

The controller is a stranger at first. It is asked for the certificate of its authority, which the token's
fingerprint proves or disproves; only on a second connection, to whoever that authority calls a controller,
the secret is said. The key is made here and goes nowhere.
"""

from __future__ import annotations

from transhume.api.http_calls import HttpCalls
from transhume.api.http_connection import authority
from transhume.api.schemas import AuthorityText, JoinRequest
from transhume.farm.members import Joined
from transhume.host.config import HostConfig
from transhume.model.errors import PeerProtocolError, Refused, Unauthorized
from transhume.trust.certificates import make_request
from transhume.trust.credentials import joining, unproven
from transhume.trust.names import CONTROLLER_NAME
from transhume.trust.token import Token, is_certificate_of


async def join_farm(target: tuple[str, int], token: Token, config: HostConfig) -> Joined:
    """Join, and keep what proves it in the state folder of `config`, which must exist.

    Raises `Unauthorized` when the controller is not the token's, or does not take it, and what
    `farm.members.Members.join` raises; the state folder is as before then.
    """
    peer = f"the controller at {authority(*target)}"
    authority_pem = await authority_of(target, token)
    calls = HttpCalls(peer, target, "/v1", lambda: joining(authority_pem, CONTROLLER_NAME))
    try:
        return await enter(calls, token, config, authority_pem)
    finally:
        await calls.close()


async def enter(calls: HttpCalls, token: Token, config: HostConfig, authority_pem: str) -> Joined:
    """Tell the secret by way of `calls`, which lead to a controller of that authority."""
    key_pem, request_pem = make_request()
    request = JoinRequest(
        secret=token.secret,
        name=config.name,
        address=config.address,
        port=config.port,
        request=request_pem,
    )
    joined = await calls.ask("POST", "/join", Joined, request)
    if joined.authority != authority_pem:
        raise PeerProtocolError(f"{calls.peer} has changed its authority while this host joined; try again")
    try:
        config.files.write(key_pem, joined.certificate, joined.authority)
    except OSError as error:
        raise Refused(f"{config.files.identity} cannot be written: {error.strerror}") from error
    return joined


async def authority_of(target: tuple[str, int], token: Token) -> str:
    """The certificate of the farm's authority. `Unauthorized` when it is not the token's."""
    peer = f"the controller at {authority(*target)}"
    calls = HttpCalls(peer, target, "/v1", unproven)
    try:
        told = await calls.ask("GET", "/authority", AuthorityText)
    finally:
        await calls.close()
    if not is_certificate_of(told.certificate, token.fingerprint):
        raise Unauthorized(
            f"{peer} is not of the farm that the token is from: its authority has another fingerprint. "
            "Check the address; the token was not sent"
        )
    return told.certificate
