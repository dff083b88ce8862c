"""A clip from a running `nexus-rt serve`, by OpenAI's Python client.

    pip install openai
    python examples/serve/client.py "a red circle moves left on a black background" clip.mp4

OPENAI_BASE_URL and OPENAI_API_KEY say where and who (default: this machine, no key).
"""

from __future__ import annotations

import os
import sys

import openai


def make_clip(client: openai.OpenAI, prompt: str, path: str, **extra: object) -> openai.types.Video:
    """Create a video, wait, and download it; extra: NexusRT's own fields, such as `seed` and
    `plan`."""
    video = client.videos.create(prompt=prompt, extra_body=extra)
    video = client.videos.poll(video.id)  # as often as the server says
    if video.status == "failed":
        raise SystemExit(f"{video.id}: {video.error.code}: {video.error.message}")
    client.videos.download_content(video.id).write_to_file(path)
    return video


if __name__ == "__main__":
    os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    made = make_clip(openai.OpenAI(), sys.argv[1], sys.argv[2], seed=7)
    print(f"{sys.argv[2]}: {made.id}, {made.size}, {made.seconds} s")
