"""What VR-Bench's tests share: the shipped example, changed, and an HTTP server that plays the
judge."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nexus_rt.bench.vrbench.command import EXAMPLE
from nexus_rt.bench.vrbench.schema import read_taxonomy

TAXONOMY = read_taxonomy()


def bench_file(tmp_path, change=lambda said: None, name="bench.json"):
    """The shipped example, changed."""
    said = json.loads(EXAMPLE.read_text())
    change(said)
    (tmp_path / name).write_text(json.dumps(said))
    return tmp_path / name


def first(said):
    return next(iter(said.values()))["prompts"][0]


def questions(said):
    return first(said)["evaluation"]["evaluation_questions"]


def reply_to(prompt_id, answer="Yes", reason="as seen", count=8):
    rows = {f"q{i + 1}": {"answer": answer, "reason": reason} for i in range(count)}
    return json.dumps({"video_id": prompt_id, "answers": rows})


class Server:
    """An OpenAI-compatible judge: `script(number, body)` gives a reply's text, or (status, headers,
    text), or bytes."""

    def __init__(self, script):
        self.seen, self.headers, self.paths, self.busy, self.most = [], [], [], 0, 0
        outer = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append(body)
                    outer.headers.append(self.headers)
                    outer.paths.append(self.path)
                    number = len(outer.seen)
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                said = script(number, body)
                with lock:
                    outer.busy -= 1
                status, headers, text = said if isinstance(said, tuple) else (200, {}, said)
                if status == 200 and isinstance(text, str):
                    text = json.dumps(
                        {"choices": [{"message": {"role": "assistant", "content": text}}]}
                    )
                data = text if isinstance(text, bytes) else text.encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def text_of(body, message=0):
    content = body["messages"][message]["content"]
    return (
        content
        if isinstance(content, str)
        else next(p["text"] for p in content if p["type"] == "text")
    )


def asked_id(body):
    return text_of(body).split('"video_id": "')[1].split('"')[0]


@contextlib.contextmanager
def servers():
    """Starts a `Server` a script; all of them end with the test."""
    started = []

    def start(script):
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
