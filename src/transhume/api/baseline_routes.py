"""What the farm's hosts have in common, and what a server that would join would change: routes under /v1."""

from __future__ import annotations

import time

from fastapi import APIRouter

from transhume.api.schemas import ClockAnswer, JoinPreview, JoinPreviewRequest
from transhume.farm.baseline import FarmBaseline, farm_baseline
from transhume.farm.controller import Controller
from transhume.farm.join_preview import preview


def add_baseline_routes(router: APIRouter, controller: Controller) -> None:
    """The preview is open to whoever holds a token that would let it join, and does not use it up; the
    clock is open to everybody.
    """
    members = controller.members

    @router.get("/clock")
    async def clock() -> ClockAnswer:
        return ClockAnswer(now_s=time.time())

    @router.get("/baseline")
    async def baseline() -> FarmBaseline:
        return farm_baseline(members.inventories())

    @router.post("/join/preview")
    async def preview_join(body: JoinPreviewRequest) -> JoinPreview:
        await members.valid_token(body.secret, body.name)
        return JoinPreview(findings=preview(await members.hosts(), body.name, body.inventory))
