"""VR-Bench as published: its protocol beside the strict one, its doubled id, and servers as they
are."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nexus_rt import InputError
from nexus_rt.bench.vrbench import judging, report
from nexus_rt.bench.vrbench.command import EXAMPLE
from nexus_rt.bench.vrbench.judges import HttpJudge, JudgeError
from nexus_rt.bench.vrbench.judging import judge_clips
from nexus_rt.bench.vrbench.protocol import Protocol
from nexus_rt.bench.vrbench.replies import cause_of, parse
from nexus_rt.bench.vrbench.schema import read_bench
from nexus_rt.cli import main
from nexus_rt.core.chat import ChatUnavailable, Reply, of_choice
from nexus_rt.pipeline.prompts import read_prompts
from tests.refusals import refuses
from tests.test_vrbench_judging import clips, serve  # noqa: F401 (fixtures)
from tests.vrbench import TAXONOMY, asked_id, bench_file, reply_to, text_of

PUBLISHED = Protocol("published")


def judge_line(folder, server, *more, prompts="example"):
    return [
        "vrbench",
        "judge",
        str(prompts),
        str(folder),
        "--judge-url",
        server.url,
        "--judge-model",
        "tiny",
        *map(str, more),
    ]


def numbered(*ids, texts=None):
    """A VR-Bench file's category of prompts with these ids."""
    rows = [{"id": i, "prompt_en": (texts or {}).get(k, f"prompt {k}")} for k, i in enumerate(ids)]
    return {"Energy Transfer Visualization (ETV)": {"category_description": "x", "prompts": rows}}


MENDED = {
    "published": (("ETV_019", "ETV_020", "ETV_022", "ETV_022", "ETV_023"), 2, "ETV_021"),
    "the second": (("A_1", "A_2", "A_2", "A_4"), 2, "A_3"),
    "at the end": (("A_07", "A_08", "A_09", "A_09"), 3, "A_10"),
    "two of them": (("A_1", "A_3", "A_3", "A_4", "A_6", "A_6", "A_7"), 1, "A_2"),
}


@pytest.mark.parametrize("ids, place, name", MENDED.values(), ids=MENDED)
@pytest.mark.parametrize(
    "reader", [lambda p: read_bench(p, TAXONOMY), read_prompts], ids=["bench", "generate"]
)
def test_a_doubled_id_is_mended_by_its_place(ids, place, name, reader, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(numbered(*ids)))
    with pytest.warns(UserWarning, match=rf"read as '{name}', by its place"):
        items = reader(tmp_path)
    found = [i.id for i in items]
    assert found[place] == name and len(set(found)) == len(ids)
    assert [getattr(i, "text", None) or i.prompt for i in items] == [
        f"prompt {k}" for k in range(len(ids))
    ]


@pytest.mark.parametrize(
    "ids, texts",
    [
        (("A_1", "A_5", "A_5", "A_9"), None),
        (("A_2", "A_2", "A_2", "A_4"), None),
        (("A_1", "A_1"), None),
        (("x", "x", "y"), None),
        (("A_1", "A_2", "A_2", "A_4"), {1: "same", 2: "same"}),
        (("A_1", "B_2", "B_2", "A_4"), None),
    ],
)
def test_a_doubled_id_that_could_be_several_is_refused(ids, texts, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(numbered(*ids, texts=texts)))
    with refuses("duplicate", kind=InputError):
        read_prompts(tmp_path / "a.json")


def test_the_published_request(tmp_path):
    """The category's own words where the file has them, the description, the lenience; 16 frames at
    truncated places."""

    def own(said):
        next(iter(said.values())).update(
            judge_role="You are a physicist.", judge_instructions="Look at the energy."
        )

    prompt = read_bench(bench_file(tmp_path, own), TAXONOMY)[0]
    text = PUBLISHED.render(prompt, 16)
    assert (
        text.startswith("You are a physicist.")
        and "Look at the energy." in text
        and prompt.description in text
    )
    assert (
        "benefit of the doubt" in text
        and "clearly absent" in text
        and all(q.text in text for q in prompt.questions)
    )
    strict = Protocol().render(prompt, 16)
    assert (
        prompt.description not in strict
        and "physicist" not in strict
        and "benefit of the doubt" not in strict
    )
    frames = np.arange(81)[:, None, None, None]
    assert (
        PUBLISHED.pick(frames)[:, 0, 0, 0].tolist() == np.linspace(0, 80, 16).astype(int).tolist()
    )
    assert (
        PUBLISHED.pick(frames)[:, 0, 0, 0].tolist() != Protocol().pick(frames)[:, 0, 0, 0].tolist()
    )
    assert len(PUBLISHED.pick(frames[:5])) == 5


def test_two_protocols_stand_side_by_side_and_are_never_mixed(clips, serve, tmp_path, capsys):  # noqa: F811
    """An answer that cannot be read: strict leaves it out, published keeps it in the
    denominator."""
    half = json.dumps({"answers": {f"q{i}": "Yes" for i in range(1, 5)}})
    server = serve(lambda n, body: half)
    assert (
        main(judge_line(clips, server)) == 0
        and main(judge_line(clips, server, "--protocol", "published")) == 0
    )
    capsys.readouterr()
    assert main(["vrbench", "report", str(clips), "--json", str(tmp_path / "r.json")]) == 0
    text, said = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    strict, published = said["runs"]
    weights = {i: [a["weight"] for a in c["answers"].values()] for i, c in strict["clips"].items()}
    for name, clip in published["clips"].items():
        assert strict["clips"][name]["score"] == 1.0 and clip["score"] == round(
            sum(weights[name][:4]) / sum(weights[name]), 4
        )
        assert clip["unknown"] == 4
    assert (
        strict["protocol"] == "strict"
        and published["protocol"] == "published"
        and "against_first" not in published
    )
    assert (
        "| protocol | strict | published |" in text
        and "are not compared" in text
        and "count as not Yes, as published" in text
    )
    assert (
        len(server.seen) == 12
        and (clips / "judgment.json").is_file()
        and (clips / "judgment.published.json").is_file()
    )
    found = report.make_report([clips / "judgment.published.json"], TAXONOMY)
    assert [r["protocol"] for r in found["runs"]] == ["published"]


@pytest.mark.parametrize("name", ["ETV", "Energy Transfer Visualization (ETV)"])
def test_clips_lie_in_their_category_s_folder_too(name, clips, serve, capsys):  # noqa: F811
    (clips / name).mkdir()
    (clips / "etv_example_1.mp4").rename(clips / name / "etv_example_1.mp4")
    server = serve(lambda n, body: reply_to(asked_id(body)))
    assert main(judge_line(clips, server)) == 0
    said = json.loads((clips / judging.FILE).read_text())
    assert (
        said["clips"]["etv_example_1"]["file"] == f"{name}/etv_example_1.mp4"
        and not said["missing"]
    )


YES1, NO2 = {"q1": {"answer": "Yes", "reason": "a"}}, {"q2": {"answer": "No", "reason": "b"}}
BOTH = {**YES1, **NO2}


@pytest.mark.parametrize(
    "reply, found",
    [
        (
            '<think>{"answers": {"q1": "No", "q2": "Yes"}}</think>' + json.dumps({"answers": BOTH}),
            BOTH,
        ),
        ("<think>a</think> hm </think>" + json.dumps(BOTH), BOTH),
        ('still thinking {"q1": "No", "q2": "No"}</think>', {}),
        (json.dumps(YES1) + json.dumps(BOTH), BOTH),
        (json.dumps(BOTH) + json.dumps(YES1), BOTH),
        ('{"q1": "No"} then {"q1": "Yes"}', {"q1": {"answer": "Yes", "reason": ""}}),
        (json.dumps({"result": {"answers": BOTH}}), BOTH),
        (json.dumps({"video_id": "v", "output": BOTH}), BOTH),
        (
            json.dumps(
                {"answers": [{"id": "q1", **YES1["q1"]}, {"question_id": "q2", **NO2["q2"]}]}
            ),
            BOTH,
        ),
        ("{not json " + json.dumps(BOTH) + "}", BOTH),
    ],
)
def test_of_several_objects_the_most_complete_then_the_last_counts(reply, found):
    assert parse(reply, ["q1", "q2"]) == found


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10**6,
        '{"a":' * 10**5,
        '{"' * 10**5,
        '[{"q1":' * 10**5,
        '{"q1": "Yes",' * 10**5,
        "<think>" * 10**5,
    ],
)
def test_no_reply_takes_long(text):
    began = time.perf_counter()
    assert parse(text, ["q1"]) in ({}, {"q1": {"answer": "Yes", "reason": ""}})
    assert time.perf_counter() - began < 2


def test_content_is_read_as_text_or_parts_and_silence_is_told_apart():
    text = json.dumps(BOTH)
    assert (
        of_choice(
            {
                "message": {
                    "content": [
                        {"type": "text", "text": text[:9]},
                        {"type": "text", "text": text[9:]},
                    ]
                }
            }
        ).text
        == text
    )
    cases = {
        "length": {"message": {"content": "half an"}, "finish_reason": "length"},
        "content_filter": {"message": {"content": None}, "finish_reason": "content_filter"},
        "reasoning": {
            "message": {"content": None, "reasoning_content": "hm"},
            "finish_reason": "stop",
        },
        "empty": {"message": {"content": None}, "finish_reason": "stop"},
        "unreadable": {"message": {"content": "Sure!"}},
    }
    assert {c: cause_of(of_choice(choice)) for c, choice in cases.items()} == {c: c for c in cases}


def completion(content=None, finish="stop", **message):
    choice = {
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish,
    }
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def test_causes_are_in_the_record_and_unknown_is_asked_again(clips, serve, capsys):  # noqa: F811
    silent = {
        "etv": completion("x", "length"),
        "ccr": completion(None, "content_filter"),
        "cac": completion(None, reasoning_content="h"),
    }
    mute = {"on": True}

    def script(n, body):
        kind = asked_id(body)[:3]
        return silent[kind] if mute["on"] else reply_to(asked_id(body))

    server = serve(script)
    assert main(judge_line(clips, server)) == 0
    rows = json.loads((clips / judging.FILE).read_text())["clips"]
    assert {i[:3]: r["answers"]["q1"]["cause"] for i, r in rows.items()} == {
        "etv": "length",
        "ccr": "content_filter",
        "cac": "reasoning",
    }
    assert len(server.seen) == 5  # a filtered one is not asked a second time
    mute["on"] = False
    assert main(judge_line(clips, server, "--no-retry-unknown")) == 0 and len(server.seen) == 5
    assert main(judge_line(clips, server)) == 0 and len(server.seen) == 8
    assert "3 clips to judge (3 again, for answers that were Unknown)" in capsys.readouterr().err
    assert all(
        c["score"] == 1.0 for c in json.loads((clips / judging.FILE).read_text())["clips"].values()
    )
    assert main(judge_line(clips, server)) == 0 and len(server.seen) == 8


def test_what_was_answered_stays_when_a_clip_is_asked_about_again(clips, serve):  # noqa: F811
    """The second run answers everything with No; only what was Unknown becomes it."""
    second = {"on": False}
    half = json.dumps({"answers": {f"q{i}": "Yes" for i in range(1, 5)}})

    def script(n, body):
        return reply_to(asked_id(body), "No") if second["on"] else half

    server = serve(script)
    prompts = read_bench(EXAMPLE, TAXONOMY)
    judge = HttpJudge(server.url, "t")
    judge_clips(prompts, clips, judge, TAXONOMY)
    second["on"] = True
    for _ in range(2):  # and a third run asks nothing
        found = judge_clips(prompts, clips, judge, TAXONOMY, retry_unknown=True)["clips"]
        for row in found.values():
            assert [a["answer"] for a in row["answers"].values()] == ["Yes"] * 4 + ["No"] * 4
    assert len(server.seen) == 9


def test_the_request_s_numbers_are_the_user_s(clips, serve, capsys):  # noqa: F811
    server = serve(lambda n, body: reply_to(asked_id(body)))
    options = ["--max-tokens", 77, "--temperature", 0.5, "--frames", 3, "--picture-size", 24]
    assert main(judge_line(clips, server, *options)) == 0
    body = next(b for b in server.seen if "etv" in asked_id(b))
    images = [
        p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"
    ]
    assert (body["max_tokens"], body["temperature"], len(images)) == (77, 0.5, 3) and max(
        size(images[0])
    ) == 24
    # other settings, other answers
    assert main(judge_line(clips, server)) == 0 and len(server.seen) == 6
    for option in (
        ("--frames", 0),
        ("--picture-size", -1),
        ("--max-tokens", 0),
        ("--temperature", 9),
        ("--protocol", "loose"),
    ):
        assert main(judge_line(clips, server, *option)) == 2


def size(url):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).size


def test_a_request_stays_below_4_mb(serve):  # noqa: F811
    server = serve(lambda n, body: "ok")
    noise = np.random.default_rng(0).integers(0, 255, (16, 720, 1280, 3), dtype=np.uint8)
    HttpJudge(server.url, "m").reply([{"role": "user", "content": [{"type": "image"}] * 16}], noise)
    assert (
        1e6 < len(json.dumps(server.seen[0])) < 4e6
        and max(size(server.seen[0]["messages"][0]["content"][0]["image_url"]["url"])) < 1280
    )


TALK = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]


def test_servers_that_name_a_parameter_otherwise_are_asked_once_more(serve):  # noqa: F811
    def script(n, body):
        if "max_tokens" in body:
            return (
                400,
                {},
                json.dumps(
                    {
                        "error": {
                            "message": (
                                "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'."
                            )
                        }
                    }
                ),
            )
        if "temperature" in body:
            return (
                400,
                {},
                json.dumps(
                    {"error": {"message": "Unsupported value: 'temperature' does not support 0."}}
                ),
            )
        return "fine"

    server = serve(script)
    judge = HttpJudge(server.url, "m", wait=lambda s: None)
    assert (
        judge.reply(TALK, []) == Reply("fine")
        and len(server.seen) == 3
        and server.seen[2]["max_completion_tokens"] == 1024
    )
    assert judge.reply(TALK, []) == Reply("fine") and len(server.seen) == 4  # it is remembered
    stubborn = serve(
        lambda n, body: (400, {}, "max_tokens max_completion_tokens temperature response_format")
    )
    with refuses("unreachable", kind=JudgeError) as caught:
        HttpJudge(stubborn.url, "m", wait=lambda s: None).reply(TALK, [])
    assert "400" in str(caught.value)
    assert len(stubborn.seen) <= 4


SECRET = "sk-Very-Secret-1234"


def test_the_key_is_kept_to_itself(serve, monkeypatch, tmp_path, capsys, clips):  # noqa: F811
    """White space off, never from .netrc, in no message, no file and no name; Azure's header and
    query."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", f"  {SECRET}\n")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login bob password hidden\n")
    server = serve(lambda n, body: (401, {}, f"Incorrect API key provided: {SECRET}"))
    assert main(judge_line(clips, server)) == 1
    said = capsys.readouterr()
    assert (
        SECRET not in said.err + said.out
        and "***" in said.err
        and {h["Authorization"] for h in server.headers} == {f"Bearer {SECRET}"}
    )
    assert not any(SECRET in p.read_text(errors="replace") for p in clips.rglob("*") if p.is_file())
    azure = serve(lambda n, body: "fine")
    url = (
        azure.url.replace("http://", "http://user:word@").removesuffix("/v1")
        + "/openai/deployments/d?api-version=2024-10-21&code=s3cret"
    )
    judge = HttpJudge(url, "m")
    assert judge.reply(TALK, []).text == "fine" and azure.paths == [
        "/openai/deployments/d/chat/completions?api-version=2024-10-21&code=s3cret"
    ]
    assert (
        azure.headers[0]["api-key"] == SECRET
        and "s3cret" not in judge.name
        and "word" not in judge.name
    )
    monkeypatch.delenv("OPENAI_API_KEY")
    HttpJudge(server.url, "m")
    with refuses("unreachable", kind=ChatUnavailable):
        HttpJudge(server.url, "m").reply(TALK, [])
    assert "Authorization" not in server.headers[-1]  # .netrc has no part in it
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nX-Evil: 1")
    with refuses("invalid_value", "OPENAI_API_KEY", InputError) as caught:
        HttpJudge(server.url, "m")
    assert SECRET not in str(caught.value)


def dripping(pieces, pause):
    """A server that answers a byte at a time and never ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_one():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return

            def drip(connection=connection):
                try:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:"
                        b" 100000\r\n\r\n"
                    )
                    for _ in range(pieces):
                        connection.sendall(b" ")
                        time.sleep(pause)
                except OSError:
                    pass

            threading.Thread(target=drip, daemon=True).start()

    threading.Thread(target=serve_one, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_the_time_limit_is_of_the_whole_request():
    listener, url = dripping(1000, 0.05)
    began = time.perf_counter()
    with refuses("timeout", kind=JudgeError):
        HttpJudge(url, "m", timeout=0.5, tries=1).reply(TALK, [])
    assert time.perf_counter() - began < 2
    listener.close()


@pytest.mark.process
def test_one_interrupt_ends_a_hanging_run(clips):  # noqa: F811
    listener, url = dripping(10_000, 0.05)
    line = [
        sys.executable,
        "-m",
        "nexus_rt.cli",
        "vrbench",
        "judge",
        str(EXAMPLE),
        str(clips),
        "--judge-url",
        url,
        "--judge-model",
        "m",
    ]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "3 clips to judge" in process.stderr.readline()
    time.sleep(0.5)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and time.perf_counter() - began < 2.5
    assert "interrupted" in process.stderr.read()
    listener.close()


def test_a_judgment_that_breaks_its_form_is_one_sentence(clips, serve):  # noqa: F811
    from nexus_rt import ModelError

    server = serve(lambda n, body: reply_to(asked_id(body)))
    judge_clips(read_bench(EXAMPLE, TAXONOMY), clips, HttpJudge(server.url, "t"), TAXONOMY)
    path = clips / judging.FILE
    good = json.loads(path.read_text())

    def broken(change):
        said = json.loads(json.dumps(good))
        change(said)
        path.write_text(json.dumps(said))
        with pytest.raises(ModelError) as caught:
            report.make_report([clips], TAXONOMY)
        assert len(str(caught.value)) < 600

    broken(lambda s: s.pop("clips"))
    broken(lambda s: s.update(clips=[]))
    broken(lambda s: s["clips"]["etv_example_1"].update(answers=3))
    broken(lambda s: s["clips"]["etv_example_1"]["answers"]["q1"].update(answer="Perhaps"))
    broken(lambda s: s["clips"]["etv_example_1"]["answers"]["q1"].update(weight="1"))
    broken(lambda s: s.update(protocol="loose"))
    kept = next((clips / "judged").iterdir())
    kept.write_text('{"answers": {"q1": 3}}')  # damaged: asked again
    judge_clips(read_bench(EXAMPLE, TAXONOMY), clips, HttpJudge(server.url, "t"), TAXONOMY)
    assert len(server.seen) == 4


def test_the_whole_published_folder_generates_and_judges(tiny_pair, tmp_path, serve, capsys):  # noqa: F811
    """Two files of categories, one with an id twice, as published."""
    source = tmp_path / "bench"
    source.mkdir()
    for name in ("one", "two"):

        def rename(said, name=name):
            for category in said.values():
                row = category["prompts"][0]
                category["prompts"] = [
                    {**row, "id": f"{name}_{row['id']}_{n:03}", "prompt_en": f"a red circle {k}"}
                    for k, n in enumerate((20, 22, 22, 23))
                ]

        bench_file(source, rename, f"{name}.json")
    line = [
        "vrbench",
        "generate",
        str(source),
        "-o",
        str(tmp_path / "run"),
        "--pair",
        str(tiny_pair),
    ]
    with pytest.warns(UserWarning, match="by its place"):
        assert main([*line, "--steps", "1", "--plan", "small", "--frames", "1"]) == 0
    server = serve(lambda n, body: reply_to(asked_id(body)))
    with pytest.warns(UserWarning, match="by its place"):
        assert (
            main(judge_line(tmp_path / "run", server, "--protocol", "published", prompts=source))
            == 0
        )
    assert (
        "over 24 clips" in capsys.readouterr().out
        and len(server.seen) == 24
        and "benefit" in text_of(server.seen[0])
    )
