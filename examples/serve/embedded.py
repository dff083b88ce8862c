"""NexusRT's routes inside a FastAPI application of your own.

    pip install "nexus-rt[serve]" fastapi
    uvicorn embedded:app --app-dir examples/serve --timeout-graceful-shutdown 30

The pipeline runs in a thread of the application; its own routes are at /, NexusRT's under /video:
`openai.OpenAI(base_url="http://127.0.0.1:8000/video/v1")`, and the page at /video/. Who may call
what is the application's to decide: mount it behind your own authentication.
"""

from __future__ import annotations

from fastapi import FastAPI

from nexus_rt import NexusPipeline
from nexus_rt.serve import NexusServer

pipe = NexusPipeline.from_pretrained()
server = NexusServer(pipe, "jobs", max_queue=100, keep=3600)
app = FastAPI(lifespan=server.lifespan)
app.mount("/video", server.app)


@app.get("/")
def home() -> dict[str, object]:
    """What an application knows of its server."""
    return {"ready": server.dispatcher.ready, "jobs": server.dispatcher.store.counts()}
