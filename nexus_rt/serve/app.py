"""The routes: OpenAI's for videos, and those of the page, the metrics and the plans."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nexus_rt.core.errors import shorten, shown
from nexus_rt.serve import answers
from nexus_rt.serve.access import check_origin, owner_of
from nexus_rt.serve.bodies import from_form, read_body
from nexus_rt.serve.clips import FILES
from nexus_rt.serve.dispatcher import Dispatcher
from nexus_rt.serve.events import sse
from nexus_rt.serve.job import JOB_ID, Job
from nexus_rt.serve.problems import INTERNAL_ERROR, Problem, no_video, unexpected, unknown_parameter
from nexus_rt.serve.requests import ClipRequest, RequestLimits, read_create, read_remix
from nexus_rt.serve.settings import Settings

log = logging.getLogger("nexus_rt.serve")
PAGE = Path(__file__).with_name("page")
POLL_MS = (100, 5000)  # what clients that poll are told to wait, at least and at most
TYPES = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
    " media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Handler = Callable[["Api", Request], Awaitable[Response]]


class Served(Protocol):
    """What the routes read of a server (`nexus_rt.serve.server.NexusServer`)."""

    settings: Settings
    created: float

    @property
    def dispatcher(self) -> Dispatcher:
        """The running server's queue."""
        ...

    def lifespan(self, app: Any = None) -> AbstractAsyncContextManager[None]:
        """From its start to its end."""
        ...


class Api:
    """The endpoints of a server, which its `routes` name.

    alone: the server is the whole application, and looks at Host and Origin itself.
    """

    def __init__(self, server: Served, alone: bool) -> None:
        self.server, self.settings, self.alone = server, server.settings, alone

    @property
    def of(self) -> Dispatcher:
        return self.server.dispatcher

    def routes(self) -> list[Route]:
        """Every route; `Route`s of Starlette's, which FastAPI takes as well."""
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/videos", Api.create),
            ("GET", "/v1/videos", Api.page_of_videos),
            ("GET", "/v1/videos/{id}", Api.retrieve),
            ("DELETE", "/v1/videos/{id}", Api.delete),
            ("GET", "/v1/videos/{id}/content", Api.content),
            ("GET", "/v1/videos/{id}/events", Api.events),
            ("POST", "/v1/videos/{id}/remix", Api.remix),
            ("POST", "/v1/videos/{id}/cancel", Api.cancel),
            ("GET", "/v1/perf/{id}", Api.perf),
            ("GET", "/v1/plan", Api.plan),
            ("GET", "/v1/models", Api.models),
            ("GET", "/v1/models/{model:path}", Api.model),
            ("GET", "/metrics", Api.metrics),
        ]
        routes = [
            Route(f"/v1/videos/{kind}", self._open(Api.no_input, "POST", kind), methods=["POST"])
            for kind in ("edits", "extensions", "characters")
        ]
        routes.append(
            Route("/v1/videos/characters/{id}", self._open(Api.no_input, "GET", "characters"))
        )
        for method, path, handler in table:
            routes.append(Route(path, self._open(handler, method, path), methods=[method]))
        free: list[tuple[str, Handler]] = [
            ("/health", Api.health),
            ("/ready", Api.ready),
            ("/", Api.page),
        ]
        free += [(f"/{path.name}", Api.page) for path in sorted(PAGE.iterdir())]
        for path, handler in free:
            routes.append(Route(path, self._open(handler, "GET", path, free=True)))
        return routes

    def _open(
        self, handler: Handler, method: str, path: str, free: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler behind the checks of who asks, with errors in OpenAI's shape."""

        async def endpoint(request: Request) -> Response:
            began, request_id = time.perf_counter(), f"req_{uuid.uuid4().hex}"
            try:
                if self.alone and not self.settings.api_keys:
                    check_origin(request)
                request.state.owner = None if free else owner_of(request, self.settings)
                response = await handler(self, request)
            except Problem as problem:
                response = problem.response()
            except Exception as error:
                log.exception("a request failed", extra={"route": path, "request": request_id})
                response = _broken(error).response()
            response.headers["x-request-id"] = request_id
            for name, value in SECURITY.items():
                response.headers.setdefault(name, value)
            seconds = time.perf_counter() - began
            if not isinstance(response, StreamingResponse):
                self.of.metrics.http.labels(path, str(response.status_code)).observe(seconds)
            log.info(
                "request",
                extra={
                    "method": method,
                    "route": path,
                    "status": response.status_code,
                    "ms": round(1000 * seconds, 2),
                    "request": request_id,
                },
            )
            return response

        return endpoint

    async def _known(self) -> RequestLimits:
        profile, settings = await self.of.loaded(), self.settings
        return RequestLimits(
            models=settings.models,
            pair=profile,
            loras=await self.of.call(settings.loras) if settings.lora_folder else [],
            fps=settings.fps,
            deadline=settings.deadline,
            max_size=settings.max_size,
            max_steps=settings.max_steps,
        )

    async def _job(self, request: Request) -> Job:
        """The job that a path names.

        Raises:
            Problem: 404.
        """
        video_id = request.path_params["id"]
        job = None
        if re.fullmatch(JOB_ID, video_id):
            job = await self.of.call(self.of.store.get, video_id, request.state.owner)
        if job is None:
            raise no_video(video_id)
        return job

    def _video(self, job: Job) -> JSONResponse:
        """A job, and when a client that polls does well to ask again."""
        headers = {}
        if not job.ended:
            headers["openai-poll-after-ms"] = str(self._poll_after(job))
        return JSONResponse(answers.video(job, self.of.progress(job)), headers=headers)

    def _poll_after(self, job: Job) -> int:
        """A tenth of what is left, by the cost model."""
        live = self.of.live.get(job.id)
        left = live.ms_left if live is not None else None
        low, high = POLL_MS
        return 1000 if left is None else int(min(high, max(low, left / 10)))

    async def create(self, request: Request) -> Response:
        body = await read_body(request, self.settings.max_body)
        made = read_create(body, await self._known())
        return self._video(await self.of.submit(made, request.state.owner))

    async def remix(self, request: Request) -> Response:
        body = await read_body(request, self.settings.max_body)
        job = await self._job(request)
        if job.status != "completed":
            raise Problem(
                400, "not_completed", f"video {job.id} is {job.status}; remix a completed one."
            )
        made = read_remix(body, ClipRequest.stored(job.request))
        return self._video(await self.of.submit(made, request.state.owner, job.id))

    async def retrieve(self, request: Request) -> Response:
        return self._video(await self._job(request))

    async def page_of_videos(self, request: Request) -> Response:
        query = request.query_params
        for name in query:
            if name not in ("after", "limit", "order"):
                raise unknown_parameter(name, "after, limit or order")
        text, order = query.get("limit", "20"), query.get("order", "desc")
        if not re.fullmatch(r"[0-9]{1,3}", text) or int(text) > 100:
            raise unexpected("limit", text, "a number from 0 to 100")
        if order not in ("asc", "desc"):
            raise unexpected("order", order, "asc or desc")
        after, owner, limit = None, request.state.owner, int(text)
        if (last := query.get("after")) is not None:
            after = await self.of.call(self.of.store.get, last[:80], owner)
            if after is None:
                raise Problem(404, "video_not_found", f"no video {last[:80]!r}.", "after")
        jobs = await self.of.call(self.of.store.page, owner, after, limit + 1, order == "desc")
        rows = [answers.video(job, self.of.progress(job)) for job in jobs[:limit]]
        return JSONResponse(answers.video_list(rows, len(jobs) > limit))

    async def delete(self, request: Request) -> Response:
        job = await self._job(request)
        await self.of.delete(job)
        return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """A job that ended before is answered as it ended."""
        job = await self._job(request)
        await self.of.cancel(job)
        return self._video(await self._job(request))

    async def content(self, request: Request) -> Response:
        job = await self._job(request)
        variant = request.query_params.get("variant", "video")
        if variant not in FILES:
            raise unexpected("variant", variant, ", ".join(FILES))
        path = self.of.file(job, variant)
        if job.status != "completed" or not await self.of.call(path.is_file):
            why = f": {job.error_message}" if job.status == "failed" else "; poll until it is."
            raise Problem(
                404, "content_not_ready", f"video {job.id} is {job.status}, not completed{why}"
            )
        name = f"{job.id}{path.suffix}"
        headers = {"Cache-Control": "private, immutable, max-age=31536000"}
        return FileResponse(path, headers=headers, media_type=TYPES[variant], filename=name)

    async def events(self, request: Request) -> Response:
        job = await self._job(request)
        state = answers.video(job, self.of.progress(job))
        first = (job.status if job.ended else "state", state)
        if not job.ended:
            ahead = await self.of.call(self.of.store.ahead, job) if job.status == "queued" else 0
            first = ("state", {**state, "jobs_ahead": ahead})
        stream = self.of.hub.watch(job.id, first)

        async def messages() -> AsyncIterator[bytes]:
            async for message in stream:
                yield sse(message)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(messages(), 200, headers, "text/event-stream")

    async def perf(self, request: Request) -> Response:
        job = await self._job(request)
        measured = await self.of.call(self.of.store.perf, job.id)
        if measured is None:
            raise Problem(404, "perf_not_found", f"video {job.id} is {job.status}, not completed.")
        return JSONResponse(measured)

    async def plan(self, request: Request) -> Response:
        """What a request would run, and its price."""
        known = await self._known()
        fields = from_form(list(request.query_params.multi_items()))
        made = read_create({"prompt": "-", **fields}, known)
        planned = self.of.known().check(made, known.max_steps)
        d = known.pair.defaults
        return JSONResponse(
            {
                **answers.plan(planned, self.of.prices),
                "defaults": {
                    "size": f"{d.width}x{d.height}",
                    "num_frames": d.num_frames,
                    "fps": known.fps,
                    "plan": d.plan,
                },
                "loras": known.loras,
            }
        )

    async def models(self, request: Request) -> Response:
        rows = [answers.model(name, self.server.created) for name in self.settings.models]
        return JSONResponse({"object": "list", "data": rows})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.settings.models:
            raise Problem(404, "model_not_found", f"no model {shown(name)}.", "model")
        return JSONResponse(answers.model(name, self.server.created))

    async def no_input(self, request: Request) -> Response:
        raise Problem(
            400,
            "unsupported_input",
            "this server turns text into video alone: no image or video inputs, edits, extensions"
            " or characters. POST /v1/videos with a prompt, or remix a video.",
        )

    async def metrics(self, request: Request) -> Response:
        self.of.metrics.streams.set(self.of.hub.count)
        text = await self.of.call(self.of.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Jobs are taken and run, or the reason why not."""
        if (why := self.of.unready) is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": why[0], "reason": why[1]}, 503, {"Retry-After": "5"})

    async def page(self, request: Request) -> Response:
        name = request.scope["path"].rpartition("/")[2] or "index.html"
        path = PAGE / name
        if path.suffix not in PAGE_TYPES:  # a route also matches its path with a line break behind
            raise Problem(404, "not_found", f"no page {shown(name)}.")
        headers = {"Content-Security-Policy": CSP, "Cache-Control": "no-cache"}
        return FileResponse(path, headers=headers, media_type=PAGE_TYPES[path.suffix])


def _broken(error: Exception) -> Problem:
    """What a client is told of an error of ours: not its words."""
    import sqlite3

    if isinstance(error, (sqlite3.OperationalError, OSError)):
        return Problem(
            503, "storage_failed", "the server cannot write its job store.", retry_after=10
        )
    return Problem(500, *INTERNAL_ERROR)


def make_app(server: Served, alone: bool) -> Starlette:
    """The whole application of a server; alone: it is not mounted in another."""

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        # not request.url, which is parsed from the Host header
        words = f"{request.method} {shorten(request.scope['path'], 120)}: {error.detail}"
        headers = dict(error.headers or {})
        return Problem(error.status_code, code, words, headers=headers).response()

    return Starlette(
        routes=[*Api(server, alone).routes()],
        exception_handlers={HTTPException: http_error},
        lifespan=server.lifespan if alone else None,
    )
