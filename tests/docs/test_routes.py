"""The protocol's document has every route that a daemon answers, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.routing import APIRoute, APIWebSocketRoute
from tests.docs.documents import ROOT

from transhume.api.controller_routes import controller_router
from transhume.api.farm_routes import farm_router
from transhume.api.host_routes import host_router
from transhume.farm.controller import Controller
from transhume.host.config import HostConfig
from transhume.sim.scripted_host import ScriptedHost
from transhume.store.memory import MemoryStore

WITHOUT_FRAMEWORK = {"GET /ping", "GET /ownership/{vm}", "POST /ownership/{vm}/swap"}
"""Answered by `api.register_app`, which has no table of routes."""

_SECTIONS = ("/host/v1", "/controller/v1", "/v1")
_ROW = re.compile(r"^\| (?P<requests>(?:GET|POST|DELETE|WebSocket) .*?) \|", re.MULTILINE)
_REQUEST = re.compile(r"(?:(GET|POST|DELETE|WebSocket) )?`([^`?]+)[^`]*`")


def _told(section: str) -> set[str]:
    text = (ROOT / "docs" / "PROTOCOL.md").read_text()
    part = text.split(f": `{section}`", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    told = set()
    for row in _ROW.finditer(part):
        verb, stem = "", ""
        for found_verb, path in _REQUEST.findall(row["requests"]):
            verb = found_verb or verb
            # A short form such as `/stop` goes on from the path before it.
            whole = path if found_verb or not stem else stem.rsplit("/", 1)[0] + path
            if not found_verb and path.count("/") > 1:
                whole = path
            stem = whole
            told.add(f"{verb} {whole}")
    return told


def _answered(section: str) -> set[str]:
    config = HostConfig(name="alpha", state_dir=Path("/none"), address="192.0.2.1")
    host = ScriptedHost("alpha")
    controller = Controller(MemoryStore(), lambda _host: host, config)
    routers = (host_router(config, host), controller_router(controller), farm_router(controller))
    found = set(WITHOUT_FRAMEWORK) if section == "/controller/v1" else set()
    for route in (route for router in routers for route in router.routes):
        if isinstance(route, APIRoute) and route.path.startswith(f"{section}/"):
            found |= {f"{verb} {route.path.removeprefix(section)}" for verb in route.methods or ()}
        if isinstance(route, APIWebSocketRoute) and route.path.startswith(f"{section}/"):
            found.add(f"WebSocket {route.path.removeprefix(section)}")
    return found


def test_every_route_is_told_and_no_other() -> None:
    for section in _SECTIONS:
        assert _told(section) == _answered(section), section
