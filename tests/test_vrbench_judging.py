"""Judging and reports of VR-Bench: a real HTTP server plays the judge, and a tiny model is one."""

import base64
import io
import json
import shutil
import sys
import threading
import time

import numpy as np
import pytest

from nexus_rt import InputError, ModelError, save_video
from nexus_rt.bench.vrbench import judges, judging, protocol, report, scoring
from nexus_rt.bench.vrbench.command import EXAMPLE
from nexus_rt.bench.vrbench.judges import HttpJudge, JudgeError
from nexus_rt.bench.vrbench.judging import judge_clips
from nexus_rt.bench.vrbench.page import page
from nexus_rt.bench.vrbench.schema import read_bench
from nexus_rt.cli import main
from nexus_rt.core.chat import ChatUnavailable
from tests.pages import Tags, dump
from tests.refusals import refuses
from tests.vrbench import (
    TAXONOMY,
    asked_id,
    bench_file,
    first,
    questions,
    reply_to,
    servers,
)

SCRIPT = "<script>document.title='owned'</script>"


@pytest.fixture
def clips(tmp_path):
    """A folder with a clip of noise for each of the example's prompts, of 20 frames, 20 and 5."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    folder.mkdir()
    for prompt, count in zip(read_bench(EXAMPLE, TAXONOMY), (20, 20, 5), strict=True):
        save_video(
            rng.integers(0, 255, (count, 32, 48, 3), dtype=np.uint8), folder / f"{prompt.id}.mp4"
        )
    return folder


@pytest.fixture
def serve():
    with servers() as start:
        yield start


def judged(clips, server, **options):
    waits = options.pop("waits", [])
    judge = HttpJudge(server.url, "tiny", wait=waits.append, **options)
    return judge_clips(read_bench(EXAMPLE, TAXONOMY), clips, judge, TAXONOMY, 3)


def test_a_folder_is_judged_and_never_asked_again(clips, serve, monkeypatch):
    from PIL import Image

    monkeypatch.setenv(judges.KEY, "secret")
    server = serve(
        lambda n, body: reply_to(asked_id(body), "No" if "ccr" in asked_id(body) else "Yes")
    )
    found = judged(clips, server)
    assert {i: c["score"] for i, c in found["clips"].items()} == {
        "etv_example_1": 1.0,
        "ccr_example_1": 0.0,
        "cac_example_1": 1.0,
    }
    assert len(server.seen) == 3 and not found["missing"] and not found["failed"]
    for body in server.seen:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 1024)
        images = [
            p["image_url"]["url"]
            for p in body["messages"][0]["content"]
            if p["type"] == "image_url"
        ]
        assert len(images) == (5 if "cac" in asked_id(body) else 16)
        picture = Image.open(
            io.BytesIO(base64.b64decode(images[0].removeprefix("data:image/jpeg;base64,")))
        )
        assert picture.size == (48, 32)
    assert {h["Authorization"] for h in server.headers} == {"Bearer secret"}
    again = judged(clips, server)
    assert len(server.seen) == 3 and again["clips"] == found["clips"]  # kept
    # another clip
    (clips / "ccr_example_1.mp4").write_bytes((clips / "etv_example_1.mp4").read_bytes())
    judged(clips, server)
    assert [asked_id(b) for b in server.seen[3:]] == ["ccr_example_1"]
    monkeypatch.setattr(protocol, "TEMPLATE", protocol.TEMPLATE + " ")  # another template
    judged(clips, server)
    assert len(server.seen) == 7
    other = HttpJudge(server.url, "another")
    judge_clips(read_bench(EXAMPLE, TAXONOMY), clips, other, TAXONOMY)  # another judge
    assert len(server.seen) == 10 and {p.suffix for p in (clips / "judged").iterdir()} == {".json"}
    monkeypatch.undo()
    assert (
        judged(clips, server)["clips"]["etv_example_1"] == found["clips"]["etv_example_1"]
        and len(server.seen) == 10
    )


def test_an_unreadable_answer_is_asked_once_more_then_unknown(clips, serve):
    def script(n, body):
        name, second = asked_id(body), len(body["messages"]) == 3
        if "etv" in name:
            return reply_to(name) if second else "I think so."
        if "ccr" in name:
            return "No idea, sorry"
        return reply_to(name, count=8 if second else 7, answer="No" if second else "Yes")

    server = serve(script)
    found = judged(clips, server)["clips"]
    assert len(server.seen) == 6  # each once more, and no more
    repeated = next(b for b in server.seen if "etv" in asked_id(b) and len(b["messages"]) == 3)
    assert (
        repeated["messages"][1]["content"] == "I think so."
        and repeated["messages"][2]["content"] == protocol.AGAIN
    )
    assert found["etv_example_1"]["score"] == 1.0 and found["etv_example_1"]["unknown"] == 0
    lost = found["ccr_example_1"]
    assert (
        lost["score"] is None
        and lost["unknown"] == 8
        and {a["answer"] for a in lost["answers"].values()} == {"Unknown"}
    )
    assert "No idea, sorry" in lost["answers"]["q1"]["reason"]
    # what the first reply had stays; the second adds what was missing
    partly = found["cac_example_1"]["answers"]
    assert [a["answer"] for a in partly.values()] == ["Yes"] * 7 + ["No"]
    summary = scoring.summary(found, TAXONOMY)["overall"]
    assert summary["count"] == 2 and summary["unknown"] == 8
    judged(clips, server)
    assert len(server.seen) == 6  # Unknown is an answer too


def test_a_busy_or_failing_server_is_given_time(clips, serve):
    troubles = [
        (429, {"Retry-After": "7"}, "slow down"),
        (503, {}, "later"),
        (200, {}, b"<html>not json</html>"),
    ]
    server = serve(lambda n, body: troubles[n - 1] if n <= 3 else reply_to(asked_id(body)))
    waits = []
    prompts = read_bench(EXAMPLE, TAXONOMY)[:1]
    found = judge_clips(
        prompts, clips, HttpJudge(server.url, "tiny", wait=waits.append), TAXONOMY, 1
    )
    assert found["clips"]["etv_example_1"]["score"] == 1.0 and len(server.seen) == 4
    assert waits[0] == 7 and 1 <= waits[1] <= 2 and 2 <= waits[2] <= 4


@pytest.mark.parametrize(
    "refused",
    [
        ("max_tokens",),
        ("temperature",),
        ("temperature", "max_tokens"),
        ("max_tokens", "temperature"),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_requests_on_their_way_are_sent_again_without_what_is_refused(
    clips, serve, refused, status
):
    """All three are refused at once: each learns what the first one learnt."""
    together = threading.Barrier(3)

    def script(number, body):
        if odd := [name for name in refused if name in body]:
            if number <= 3:
                together.wait(10)
            words = f"Unsupported parameter: '{odd[0]}' is not supported with this model."
            return status, {}, json.dumps({"error": {"message": words}})
        return reply_to(asked_id(body))

    server, waits = serve(script), []
    found = judged(clips, server, waits=waits, tries=1)
    assert not found["failed"] and len(found["clips"]) == 3 and not waits
    assert 6 <= len(server.seen) <= 3 + 3 * len(refused)
    kept = {"model", "messages", "temperature", "max_tokens"} - set(refused)
    kept |= {"max_completion_tokens"} if "max_tokens" in refused else set()
    assert sum(set(body) == kept for body in server.seen) == 3


def test_a_parameter_that_stays_refused_ends_the_request(serve):
    for words in ("max_completion_tokens and max_tokens are unknown", "temperature max_tokens"):
        server = serve(lambda n, body, words=words: (400, {}, words))
        with refuses("unreachable", kind=JudgeError) as caught:
            HttpJudge(server.url, "m").reply([{"role": "user", "content": []}], [])
        assert "400" in str(caught.value)
        assert len(server.seen) <= 3


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    "proxy, code",
    [
        ("socks5://127.0.0.1:1", "missing_package"),
        ("socks5h://user:secret@127.0.0.1:1", "missing_package"),
        ("gopher://user:secret@127.0.0.1:1", "invalid_value"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_sentence(clips, name, proxy, code, monkeypatch, capsys):
    for other in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, proxy)
    monkeypatch.setitem(sys.modules, "socks", None)
    with refuses(code, "proxy") as refused:
        HttpJudge("http://judge.example/v1", "m").reply([{"role": "user", "content": []}], [])
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)
    options = ["--judge-url", "http://judge.example/v1", "--judge-model", "m"]
    assert main(["vrbench", "judge", str(EXAMPLE), str(clips), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error and "secret" not in error
    assert error.strip().count("proxy") >= 1


@pytest.mark.parametrize(
    "url",
    ["http://[", "http://[::1/v1", "http://a:99999/v1", "http://a:x", "http://", "\ud800", ""],
)
def test_an_address_that_cannot_be_parsed(url):
    with refuses("invalid_value", "judge_url", InputError):
        HttpJudge(url, "m")


@pytest.mark.parametrize("wait", ["nan", "-1", "inf", "1e999", "x", "", "9" * 400])
def test_a_wait_that_is_none(serve, wait):
    server = serve(lambda n, body: (429, {"Retry-After": wait}, "") if n == 1 else reply_to("a"))
    waits = []
    HttpJudge(server.url, "m", wait=waits.append).reply([{"role": "user", "content": []}], [])
    assert len(waits) == 1 and 0 <= waits[0] <= 60


def test_half_a_surrogate_pair_in_a_reply_is_written_as_its_escape(clips, serve):
    server = serve(lambda n, body: reply_to(asked_id(body), reason="odd \ud800 \0 text"))
    found = judged(clips, server)
    assert len(found["clips"]) == 3
    reason = found["clips"]["etv_example_1"]["answers"]["q1"]["reason"]
    assert reason == "odd \\ud800 \0 text"
    assert judged(clips, server)["clips"] == found["clips"] and len(server.seen) == 3


def test_a_clip_that_gets_no_reply_is_left_for_the_next_run(clips, serve):
    broken = {"on": True}

    def script(n, body):
        if "ccr" in asked_id(body) and broken["on"]:
            return 500, {}, "out of memory"
        return reply_to(asked_id(body))

    server = serve(script)
    found = judged(clips, server, tries=3)
    assert (
        list(found["clips"]) == ["etv_example_1", "cac_example_1"]
        and "3 tries failed" in found["failed"]["ccr_example_1"]
    )
    broken["on"], before = False, len(server.seen)
    found = judged(clips, server)
    assert len(found["clips"]) == 3 and not found["failed"] and len(server.seen) == before + 1


def test_a_slow_server_is_asked_about_several_clips_at_once(clips, serve):
    def script(n, body):
        time.sleep(0.3)
        return reply_to(asked_id(body))

    server = serve(script)
    judged(clips, server)
    assert server.most == 3
    slow = serve(lambda n, body: time.sleep(1.0) or reply_to(asked_id(body)))
    with refuses("timeout", kind=JudgeError):
        HttpJudge(slow.url, "m", timeout=0.1, tries=2, wait=lambda s: None).reply(
            [{"role": "user", "content": []}], []
        )


@pytest.mark.parametrize("status", [401, 404])
def test_a_judge_that_refuses_us_ends_the_run(status, clips, serve):
    server = serve(lambda n, body: (status, {}, "no such model"))
    with refuses("unreachable", kind=ChatUnavailable) as caught:
        judged(clips, server)
    assert str(status) in str(caught.value)
    assert len(server.seen) <= 3


def test_a_judge_that_is_not_there_is_said_once(clips, tmp_path, capsys):
    waits = []
    with refuses("unreachable", kind=ChatUnavailable):
        HttpJudge("http://127.0.0.1:9/v1", "m", wait=waits.append).reply(
            [{"role": "user", "content": []}], []
        )
    assert len(waits) == judges.TRIES - 1
    with refuses("invalid_value", "judge_url", InputError):
        HttpJudge("localhost:80", "m")
    assert main(["vrbench", "judge", str(EXAMPLE), str(clips)]) == 2
    assert "no judge: pass --judge-model" in capsys.readouterr().err
    assert main(["vrbench", "judge", str(EXAMPLE), str(clips), "--judge-model", str(tmp_path)]) == 1
    assert "holds no config.json" in capsys.readouterr().err


def test_what_was_answered_before_a_stop_is_kept(clips, serve):
    def script(n, body):
        return reply_to(asked_id(body)) if n == 1 else (401, {}, "the key has expired")

    server = serve(script)
    judge = HttpJudge(server.url, "tiny")
    prompts = read_bench(EXAMPLE, TAXONOMY)
    with refuses("unreachable", kind=ChatUnavailable):
        judge_clips(prompts, clips, judge, TAXONOMY, 1)
    good = serve(lambda n, body: reply_to(asked_id(body)))
    fresh = HttpJudge(good.url, "tiny")
    fresh.name = judge.name
    assert (
        len(judge_clips(prompts, clips, fresh, TAXONOMY, 1)["clips"]) == 3 and len(good.seen) == 2
    )


def test_missing_and_unreadable_clips_are_listed_and_the_rest_judged(clips, serve, capsys):
    (clips / "etv_example_1.mp4").unlink()
    (clips / "ccr_example_1.mp4").write_bytes(b"not a video")
    server = serve(lambda n, body: reply_to(asked_id(body)))
    line = [
        "vrbench",
        "judge",
        "example",
        str(clips),
        "--judge-url",
        server.url,
        "--judge-model",
        "tiny",
    ]
    assert main(line) == 1
    said = capsys.readouterr()
    assert (
        "missing: etv_example_1: no etv_example_1.mp4" in said.err
        and "ccr_example_1.mp4 cannot be read as a video" in said.err
    )
    assert "1.0000 over 1 clips, 0 of 8 answers Unknown, 2 clips missing" in said.out
    assert list(json.loads((clips / judging.FILE).read_text())["clips"]) == ["cac_example_1"]
    assert (
        main(
            [
                "vrbench",
                "judge",
                "example",
                str(clips / "none"),
                "--judge-url",
                server.url,
                "--judge-model",
                "m",
            ]
        )
        == 2
    )


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory):
    """A LLaVA of random weights: CLIP of 16 pixels, one Llama layer, a character a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("judge")
    names = ["<pad>", "<s>", "</s>", "<image>", "<unk>", *map(chr, range(32, 127)), "\n"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special
    )
    template = (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image'"
        " %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}{% if"
        " add_generation_prompt %}assistant: {% endif %}"
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=words,
        chat_template=template,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
    vision = CLIPVisionConfig(
        **small, num_hidden_layers=2, image_size=16, patch_size=8, projection_dim=16
    )
    text = LlamaConfig(
        **small, vocab_size=len(vocab), num_hidden_layers=1, max_position_embeddings=16384
    )
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocab["<image>"])
    ).save_pretrained(folder)
    return folder


def test_a_model_of_this_process_judges(clips, tiny_judge, monkeypatch, capsys):
    """Random weights say nothing that can be read: all Unknown, asked twice, from the frames; then
    a model that answers."""
    from transformers import GenerationMixin, ProcessorMixin

    monkeypatch.setattr(judges, "TOKENS", 12)
    line = ["vrbench", "judge", "example", str(clips), "--judge-model", str(tiny_judge)]
    assert main(line) == 0
    assert "24 of 24 answers Unknown" in capsys.readouterr().out
    judge = judges.LocalJudge(tiny_judge)
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "Is it red?"},
            ],
        }
    ]
    dark, light = np.zeros((32, 48, 3), np.uint8), np.full((32, 48, 3), 255, np.uint8)
    assert judge.reply(talk, [dark, light]) == judge.reply(talk, [dark, light])  # greedy
    seen = []
    right = GenerationMixin.generate

    def generate(model, **inputs):
        seen.append(inputs)
        return right(model, **inputs)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    judge.reply(talk, [dark, light])
    assert (
        seen[0]["pixel_values"].shape[0] == 2
        and not seen[0]["do_sample"]
        and seen[0]["max_new_tokens"] == 12
    )
    assert not np.allclose(*seen[0]["pixel_values"].float().cpu().numpy())
    monkeypatch.setattr(ProcessorMixin, "batch_decode", lambda *a, **k: [reply_to("x")])
    prompt = read_bench(EXAMPLE, TAXONOMY)[0]
    assert {a["answer"] for a in judging.ask(judge, prompt, np.stack([dark, light])).values()} == {
        "Yes"
    }


def test_a_local_judge_that_cannot_be_loaded(tmp_path, tiny_judge, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with refuses("missing", kind=ModelError):
        judges.LocalJudge(tmp_path)

    def needs(*args, **options):
        raise ImportError("\nQwen3VLVideoProcessor requires the Torchvision library\nand more")

    monkeypatch.setattr(judges, "pretrained", needs)
    with refuses("missing_package", kind=ModelError) as caught:
        judges.LocalJudge(tiny_judge).reply([], [])
    assert "requires the Torchvision library" in str(caught.value)


def test_a_report_of_two_runs(clips, tmp_path, serve, capsys):
    """Tables with intervals, paired differences, frames; everything a judge or a prompt said is
    text."""
    path = bench_file(tmp_path, lambda s: first(s).update(prompt_en=f"a circle {SCRIPT}"))
    other = tmp_path / f"other{SCRIPT[:8]}"
    other.mkdir()
    for clip_path in clips.glob("*.mp4"):
        (other / clip_path.name).write_bytes(clip_path.read_bytes())
    (other / "cac_example_1.mp4").unlink()
    server = serve(lambda n, body: reply_to(asked_id(body), reason=f'{SCRIPT} " onerror="alert(1)'))
    half = serve(
        lambda n, body: json.dumps(
            {"answers": {f"q{i}": "Yes" if i < 2 else "No" for i in range(1, 9)}}
        )
    )
    for folder, judge in ((clips, server), (other, half)):
        main(
            [
                "vrbench",
                "judge",
                str(path),
                str(folder),
                "--judge-url",
                judge.url,
                "--judge-model",
                "tiny",
            ]
        )
    capsys.readouterr()
    line = ["vrbench", "report", str(clips), str(other)]
    assert (
        main(
            [
                *line,
                "--html",
                str(tmp_path / "r.html"),
                "--json",
                str(tmp_path / "r.json"),
                "--markdown",
                str(tmp_path / "r.md"),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert text == (tmp_path / "r.md").read_text() and SCRIPT not in text
    said = json.loads((tmp_path / "r.json").read_text())
    a, b = said["runs"]
    assert a["scores"]["overall"]["mean"] == 1.0 and b["scores"]["overall"]["mean"] == 0.2
    assert (
        b["against_first"]["mean"] == -0.8
        and b["against_first"]["worse"] == 2
        and b["against_first"]["count"] == 2
    )
    assert (
        "| ETV Energy Transfer Visualization | 1.0000 | 0.2000 |" in text
        and "| better, same, worse | - | 0, 0, 2 |" in text
    )
    assert (
        "| Commonsense |" in text
        and "| hard | 1.0000 | - |" in text
        and "1 prompts have no answers" in text
    )
    html = (tmp_path / "r.html").read_text()
    tags = Tags()
    tags.feed(html)
    assert "script" not in tags.found and SCRIPT not in html and tags.found.count("img") == 5
    assert (
        all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
        and len(tags.links) == 5
    )
    if browser := shutil.which("chromium"):
        shown = dump(browser, tmp_path / "r.html", tmp_path / "profile")
        assert (
            "<title>VR-Bench</title>" in shown
            and "<title>owned" not in shown
            and "<h2>Categories</h2>" in shown
        )
    assert (
        "a circle &lt;script&gt;" in html
        and html.count("as seen") == 0
        and "no cac_example_1.mp4" in html
    )


def test_a_report_without_its_clips_and_of_other_files(clips, serve, tmp_path, capsys):
    server = serve(lambda n, body: reply_to(asked_id(body)))
    judged(clips, server)
    found = report.make_report([clips / judging.FILE], TAXONOMY)
    for path in clips.glob("*.mp4"):
        path.unlink()
    assert "<img" not in page(found, TAXONOMY)
    assert main(["vrbench", "report", str(tmp_path)]) == 2
    assert "expected a file that `nexus-rt vrbench judge PROMPTS" in capsys.readouterr().err
    bad = tmp_path / "x.json"
    for content, code, param in (
        ("{", "unreadable", None),
        ("{}", "invalid_model", "kind"),
        (json.dumps({"kind": judging.KIND, "schema": 99}), "unsupported", "schema"),
    ):
        bad.write_text(content)
        with refuses(code, param, ModelError):
            judging.read_judgment(bad)


def test_generate_makes_the_clips_of_the_prompts(tiny_pair, tmp_path, capsys):
    line = [
        "vrbench",
        "generate",
        "example",
        "-o",
        str(tmp_path / "out"),
        "--pair",
        str(tiny_pair),
        "--steps",
        "2",
    ]
    assert main(line) == 0 and "3 made, 0 kept, 0 failed" in capsys.readouterr().out
    assert {p.stem for p in (tmp_path / "out").glob("*.mp4")} == {
        p.id for p in read_bench(EXAMPLE, TAXONOMY)
    }
    assert main(line) == 0 and "0 made, 3 kept" in capsys.readouterr().out
    words = report.made_with(tmp_path / "out")
    assert words.startswith("handoff=0.3") and words.endswith(
        f", 2 steps, 48x32x5 pair={tiny_pair}"
    )
    assert report.made_with(tmp_path) == ""
    bad = bench_file(tmp_path, lambda s: questions(s)[0].update(weight=None))
    assert (
        main(["vrbench", "generate", str(bad), "-o", str(tmp_path / "x")]) == 2
        and not (tmp_path / "x").exists()
    )


def test_the_generation_only_variant_is_read_and_not_judged(tmp_path, clips):
    path = bench_file(
        tmp_path, lambda s: [p.pop("evaluation") for c in s.values() for p in c["prompts"]]
    )
    prompts = read_bench(path, TAXONOMY)
    assert len(prompts) == 3 and not any(p.questions for p in prompts)
    with refuses("missing", "evaluation_questions", InputError) as caught:
        judge_clips(prompts, clips, HttpJudge("http://localhost:1", "m"), TAXONOMY)
    assert "etv_example_1" in str(caught.value)
