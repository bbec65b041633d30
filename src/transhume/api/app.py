"""The daemon's application: what each host answers, and what only the controller's host does.

/host/v1/…         what the controller asks of this host (`HostLink`)
/controller/v1/…   what hosts and movers ask of the controller (`ControllerLink`)
/v1/…              what a person or a program asks of the farm; a member passes it on to the controller
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from transhume import __version__
from transhume.api.controller_routes import controller_router
from transhume.api.farm_routes import farm_router
from transhume.api.forward import forward_router
from transhume.api.gate import Gate
from transhume.api.guard import Guard
from transhume.api.host_routes import host_router
from transhume.api.problem import CONTENT_TYPE, encode_problem
from transhume.api.register_app import RegisterApp
from transhume.farm.controller import Controller
from transhume.farm.host_link import HostLink
from transhume.host.config import HostConfig
from transhume.model.errors import NotFound, Refused, TranshumeError
from transhume.trust.credentials import Credentials

log = logging.getLogger(__name__)


def create_app(
    config: HostConfig, host: HostLink, controller: Controller | None, credentials: Credentials
) -> Gate:
    """The application of one daemon, to be given to `transhume.api.server.serve`.

    `host` is this machine's own service. `controller` is given on the host that carries it (and started by
    the caller); without one, requests to the farm are passed on to the address in `config`. `credentials`
    are this host's.
    """
    app = new_app()
    app.include_router(host_router(config, host))
    if controller is None:
        target = (config.controller_address, config.controller_port)
        app.include_router(forward_router(lambda: target, credentials))
        return Gate(app, config.name, lambda peer: peer.controller)
    return Gate(
        controller_app(controller, app, config.name),
        config.name,
        lambda peer: controller.members.admits(peer.host, peer.serial),
        takes_tokens=True,
    )


def controller_app(controller: Controller, app: FastAPI, own_name: str) -> Guard:
    """`app` with all that only a controller answers, for those who have the right to it."""
    app.include_router(controller_router(controller))
    app.include_router(farm_router(controller))
    return Guard(RegisterApp(controller, app), controller, own_name)


def new_app() -> FastAPI:
    """An application without routes, whose errors are told as all of ours."""
    app = FastAPI(title="Transhume", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(TranshumeError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


def _answer(error: TranshumeError, status: int | None = None) -> Response:
    return Response(
        encode_problem(error, status),
        status_code=error.status if status is None else status,
        media_type=CONTENT_TYPE,
    )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TranshumeError)
    return _answer(error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [
        f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'the body'}: {fault['msg']}"
        for fault in error.errors()
    ]
    return _answer(Refused(f"the request is not valid: {'; '.join(faults)}"))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == Refused.status:
        return _answer(Refused("the request's body cannot be read as JSON"))
    kind = NotFound if error.status_code == NotFound.status else Refused
    return _answer(
        kind(f"this daemon does not know {request.method} {request.url.path}; is it of another release?"),
        error.status_code,
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    # The server writes the traceback to the log; it is of no use to whoever asked.
    return _answer(
        TranshumeError(
            f"an unexpected {type(error).__name__} stopped this request; the daemon's daemon.log tells where"
        )
    )
