"""Fuzzing of the server's bodies and queries, by the routes themselves without a socket: whatever
is sent, the answer is a job that the models can make, or a 4xx in OpenAI's shape."""

import asyncio
import json
import math
from types import SimpleNamespace
from unittest.mock import MagicMock
from urllib.parse import urlencode

from nexus_rt.core.errors import InputError
from nexus_rt.core.size import ClipSize
from nexus_rt.serve.job import Job
from nexus_rt.serve.prices import Prices
from nexus_rt.serve.requests import ClipRequest, field_names
from nexus_rt.serve.server import NexusServer
from tests.serving import FakeRunner, mini_profile

BODY = {
    "prompt": "a red circle moves left",
    "model": "nexus-rt",
    "negative_prompt": "blurry",
    "seconds": "1",
    "size": "64x64",
    "fps": "30000/1001",
    "seed": 7,
    "plan": "small:4/10 bridge:2/8 large:4@2",
    "guidance_scale": 3.5,
    "guidance_scale_2": 2,
    "shift": 3.0,
    "solver": "unipc",
    "rewrite": "auto",
    "blend": {"split": "dct", "rho_max": 0.5},
    "energy": "progressive",
    "as_published": False,
    "lora": ["ink@0.5", "small:ink"],
    "priority": 1,
    "deadline": 30,
}
FORM = {
    "prompt": "a stär", "seconds": "2", "size": "64x64", "fps": "16", "seed": "7", "shift": "3.0",
    "plan": "handoff=0.5", "lora[]": "ink@2", "guidance_scale": "2", "priority": "-1",
    "negative_prompt": "é", "solver": "euler", "rewrite": "off", "deadline": "30",
    "small_steps": "8", "large_steps": "6", "blend": '{"split": "fft"}', "as_published": "false",
}  # fmt: skip
QUERY = {
    "size": "64x64", "num_frames": "17", "plan": "small:4/10 large:4@3/guidance-every=2",
    "shift": "5", "fps": "16", "guidance_scale": "1.5", "lora": "ink", "num_inference_steps": "8",
    "energy": "none",
}  # fmt: skip
VALUES = [
    "", "\0", "\ud800", "x", "-1", "0", "1", "1e999", "1e-40", "1e-320", "nan", "inf", "9" * 400,
    "9" * 39, "0" * 39 + "5", "1_0", "\u0661", " 2 ", "1/0", "1/3", "64x64x64", "٦٤x64", "0x0",
    "a" * 40_000, "ink@9999999", "ink@0.000001", "../ink", "large:ink", "small:1e9 large:*",
    "small:100000 large:*", "large shift=1e-40", "large steps=99999999", "handoff=sigma:1e-40",
    "auto=1e-300", "small:8@1e308 large:*", "large timesteps=1e9,5", "@/dev/zero", "\n", "true",
    "1000,750,500", "1000," * 99, "1,2,", "{}", '{"order": 1e9}', '{"split": []}', "[" * 999,
    "1" + "0" * 30, "-0.0", "1e9", "3600", "0.0625", "18446744073709551615", "null",
]  # fmt: skip
NAMES = ["", "\0", "\ud800", "x" * 5000, "lora", "lora[]", "lora[9]", "seed[0]", "n", "image"]


def odd_fields(fields, rng):
    """Some fields with other values or names, twice or left out."""
    fields = list(fields)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(fields)) if fields else 0
        name, value = fields[at] if fields else ("prompt", "x")
        kind = rng.randrange(8)
        if kind <= 3:
            fields[at : at + 1] = [(name, rng.choice(VALUES))]
        elif kind == 4:
            fields.append((rng.choice([*field_names(), *NAMES]), rng.choice(VALUES)))
        elif kind == 5:
            fields[at : at + 1] = [(rng.choice(NAMES), value)]
        elif kind == 6:
            fields[at:at] = [(name, value)] * rng.choice((1, 100))
        else:
            del fields[at : at + 1]
    return fields


def encoded(fields):
    """A query or a form's body; half a surrogate pair as its three bytes."""
    return urlencode(
        [tuple(part.encode("utf-8", "surrogatepass") for part in field) for field in fields]
    ).encode()


def parted(fields):
    """A multipart form."""
    return b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % tuple(part.encode("utf-8", "surrogatepass") for part in field)
        for field in fields
    ) + b"--edge--\r\n"  # fmt: skip


class Queue:
    """What the routes need of a dispatcher; a job is checked and goes nowhere."""

    def __init__(self):
        self.profile, self.prices = mini_profile(), Prices()
        self.metrics = MagicMock()
        self.live, self.store = {}, SimpleNamespace(get=lambda *a: None)

    async def loaded(self):
        return self.profile

    def known(self):
        return self.profile

    async def call(self, function, *arguments, **named):
        return function(*arguments, **named)

    def progress(self, job):
        return 0

    async def submit(self, request, owner, remixed_from=None):
        planned = self.profile.check(request, 100)
        row = request.as_row()
        text = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        assert ClipRequest.stored(json.loads(text)) == request
        assert planned.size == request.size and 1 <= len(planned.plan.steps) <= 100
        assert all(math.isfinite(s.timestep) for s in planned.plan.steps)
        assert math.prod(request.size) <= 256 * 256 * 81 and 0 <= request.seed < 2**64
        assert request.batch_key and len(text) < 200_000 and "\0" not in text.decode()
        times = (1.0, 2.0, None, None, None)
        return Job(
            1, "video_" + "0" * 32, owner, "queued", 0, *times, 0, 0, None, row, None, None, 0
        )  # fmt: skip


class PlanningServer(NexusServer):
    """A server that plans what is queued and runs nothing."""

    dispatcher = Queue()


def make_targets(work, target):
    """Targets of `tests.fuzz`: JSON, forms of both kinds, and the query of `/v1/plan`."""
    (work / "loras").mkdir()
    (work / "loras" / "ink.safetensors").write_bytes(b"")
    server = PlanningServer(
        FakeRunner(), work / "store", lora_folder=work / "loras", max_size=ClipSize(256, 256, 81),
        max_steps=100,
    )  # fmt: skip
    app = server.app

    def ask(method, path, kind=None, body=b"", query=b""):
        """One answer, read as clients read it."""
        sent, pieces = [], [{"type": "http.request", "body": body, "more_body": False}]
        headers = [] if kind is None else [(b"content-type", kind)]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
            "query_string": query, "headers": headers, "client": None, "server": None,
        }  # fmt: skip

        async def receive():
            return pieces.pop() if pieces else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        status = sent[0]["status"]
        answer = json.loads(b"".join(m.get("body", b"") for m in sent[1:]), parse_constant=int)
        assert status < 500, answer
        if status != 200:
            error = answer["error"]
            assert error["code"] and len(error["param"] or "") <= 400, error
            raise InputError(error["message"])
        return answer

    class Fields(target):
        """A target whose file holds fields."""

        def __init__(self, name, path, read, fields, encode):
            super().__init__(name, path, read, text=False)
            self.fields, self.encode = list(fields.items()), encode

        def mutant(self, rng):
            if rng.random() < 0.2:
                return super().mutant(rng)
            return self.encode(odd_fields(self.fields, rng))

    def put(name, data):
        (work / name).write_bytes(data)
        return work / name

    def post(path, kind):
        return lambda: ask("POST", "/v1/videos", kind, path.read_bytes())

    body, form = put("body.json", json.dumps(BODY).encode()), put("form", encoded(FORM.items()))
    parts, query = put("parts", parted(FORM.items())), put("query", encoded(QUERY.items()))
    plain, several = b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=edge"
    return [
        target("server body", body, post(body, b"application/json")),
        Fields("server form", form, post(form, plain), FORM, encoded),
        Fields("server form of parts", parts, post(parts, several), FORM, parted),
        Fields(
            "server plan query",
            query,
            lambda: ask("GET", "/v1/plan", query=query.read_bytes().decode("latin-1").encode()),
            QUERY,
            encoded,
        ),
    ]
