"""/health: whether requests are taken, and if not why. No key is needed for it."""

from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 where requests are taken, which they are while the ranks restart too; else 503.

    `phase` is starting, loading, ready, restarting, failed or draining; `fraction` says how much of the weights is
    loaded, `reason` why the ranks fell, until they are ready again, `restarts` how often they were started again.
    Where keys are set, only those who bring one are told `reason`: it names hosts and files.
    """
    services = request.app.state.services
    ranks = services.ranks
    told = {**asdict(ranks.state), "running": ranks.running, "waiting": ranks.waiting}
    if services.keys.name_of(request.scope["headers"]) is None:
        del told["reason"]
    return JSONResponse(told, 200 if ranks.takes_requests else 503)
