"""Rewriting: the answer, who may give it, what the large generator then reads, and every way that it
fails."""

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from nexus_rt import NexusPipeline
from nexus_rt.bench.shapes import world
from nexus_rt.bench.shapes.riddles import make_prompts
from nexus_rt.cli import main
from nexus_rt.core.errors import InputError, ModelError, RewriteError
from nexus_rt.loading.pair_folder import MINI
from nexus_rt.media.reading import read_metadata
from nexus_rt.models.llama import LlamaBackbone, LlamaConfig, greedy
from nexus_rt.pipeline.rewriting import Cache, ChatRewriter, EndpointRewriter, rewrite_prompts
from nexus_rt.pipeline.settings import CallSettings
from tests.refusals import refuses

QUICK = dict(width=48, height=32, num_frames=5, num_inference_steps=2, output_type="latent")


@pytest.fixture(scope="module")
def mini():
    pipe = NexusPipeline.from_pretrained(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise():
    return torch.Generator().manual_seed(0)


def test_the_understanding_model_answers_riddles_with_captions(mini):
    prompts = make_prompts("riddles", 41, 40)
    made = mini.rewrite([p.text for p in prompts], "auto")
    right = [t == world.caption(p.scene) for t, p in zip(made.texts, prompts, strict=True)]
    assert sum(right) >= 35 and not made.failures


def test_the_answer_is_that_of_transformers(mini):
    from transformers import AutoModelForCausalLM

    understanding = mini.context.understanding
    theirs = AutoModelForCausalLM.from_pretrained(MINI / "understanding", dtype=torch.float32)
    for prompt in make_prompts("riddles", 43, 6):
        ours = understanding.answer(prompt.text)
        text = understanding.template.chat.replace("{prompt}", prompt.text)
        ids = torch.tensor([understanding.tokenizer.encode(text, special=False)])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        assert ours == understanding.tokenizer.decode(out[0, ids.shape[1] :].tolist())


def test_a_cached_step_is_the_whole_text_read_again():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaBackbone(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.ones_(p)
    head = torch.randn(50, 32)
    with torch.no_grad():
        new = greedy(model, head, [3, 1, 4], {-1}, 12)
        ids = [3, 1, 4]
        for token in new:
            row = torch.tensor([ids])
            assert int((head @ model(row, torch.ones_like(row))[0, -1]).argmax()) == token
            ids.append(token)
        stop = new[4]
        assert greedy(model, head, [3, 1, 4], {stop}, 12) == new[: new.index(stop)]


def test_the_large_generator_reads_the_answer_and_the_small_one_its_context(tiny_pipe):
    asked = []

    def rewriter(prompt):
        asked.append(prompt)
        return f"a red circle  on\n{prompt}"

    run = lambda **o: tiny_pipe(
        "a blue square", plan="small:1 large:1", generator=noise(), **QUICK, **o
    )
    plain, made = run(), run(rewrite=rewriter)
    assert plain.rewriting is None and made.rewriting.texts == ["a red circle on a blue square"]
    assert asked == ["a blue square"]
    text = run(rewrite="a red circle on a blue square")
    assert torch.equal(text.frames, made.frames) and not torch.equal(plain.frames, made.frames)
    embeds, none = tiny_pipe.encode_prompt("a blue square")
    second, _ = tiny_pipe.encode_prompt("a red circle on a blue square")
    by_hand = tiny_pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=none,
        prompt_embeds_2=second,
        plan="small:1 large:1",
        generator=noise(),
        **QUICK,
    )
    assert torch.allclose(by_hand.frames, made.frames, atol=1e-5)
    assert torch.equal(run(rewrite="off").frames, plain.frames)
    run(rewrite=rewriter)
    assert asked == ["a blue square"]  # once a prompt


def test_each_prompt_of_a_call_has_its_own(tiny_pipe):
    both = tiny_pipe(
        ["a", "b"],
        plan="large",
        rewrite=["a red circle", "a blue square"],
        num_videos_per_prompt=2,
        generator=[torch.Generator().manual_seed(s) for s in range(4)],
        **QUICK,
    )
    alone = tiny_pipe(
        "b",
        plan="large",
        rewrite="a blue square",
        generator=torch.Generator().manual_seed(3),
        **QUICK,
    )
    assert torch.allclose(both.frames[3:], alone.frames, atol=1e-4)


@pytest.mark.parametrize(
    "rewriter, reason",
    [
        (lambda p: 1 / 0, "division by zero"),
        (lambda p: "", "expected a text"),
        (lambda p: 7, "the answer is 7; expected a text"),
        (lambda p: time.sleep(5) or "late", "no answer within"),
    ],
)
def test_a_failure_is_said_and_the_prompt_kept(tiny_pipe, rewriter, reason, caplog):
    start = time.monotonic()
    run = lambda **o: tiny_pipe("a blue square", plan="large", generator=noise(), **QUICK, **o)
    made = run(rewrite=rewriter, rewrite_timeout=0.3)
    assert time.monotonic() - start < 4
    assert reason in made.rewriting.failures[0] and made.rewriting.texts == ["a blue square"]
    assert "rewriting failed" in caplog.text
    assert torch.equal(made.frames, run().frames)


def test_prompts_after_the_time_limit_are_kept(mini):
    made = rewrite_prompts(
        ["one", "two"], "auto", mini.context.understanding, Cache(), timeout=1e-6
    )
    assert made.texts == ["one", "two"] and len(made.failures) == 2


@pytest.mark.parametrize(
    "options, code, param",
    [
        ({"rewrite": 7}, "invalid_type", "rewrite"),
        ({"rewrite": " "}, "missing", "rewrite"),
        ({"rewrite": ["a", "b"]}, "mismatch", "rewrite"),
        ({"rewrite": ["a", 3]}, "invalid_type", "rewrite"),
        ({"rewrite": "a", "plan": "small"}, "conflict", "rewrite"),
        ({"rewrite_timeout": 0}, "out_of_range", "rewrite_timeout"),
        ({"rewrite": "auto"}, "missing", "understanding"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tiny_pipe, options, code, param):
    with refuses(code, param, InputError):
        tiny_pipe("a", generator=noise(), **{"plan": "large", **QUICK, **options})


def test_rewriting_goes_with_a_prompt(tiny_pipe):
    embeds, none = tiny_pipe.encode_prompt("a")
    given = dict(prompt_embeds=embeds, negative_prompt_embeds=none)
    with refuses("conflict", "rewrite", InputError):
        tiny_pipe(**given, rewrite="auto", **QUICK)
    with refuses("mismatch", "prompt_embeds_2", InputError):
        tiny_pipe(**given, prompt_embeds_2=embeds[:, :9], **QUICK)


class Endpoint(BaseHTTPRequestHandler):
    reply: object = {"choices": [{"message": {"content": "a red circle"}}]}
    status, asked = 200, []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, self.headers.get("Authorization"), body))
        data = self.reply if isinstance(self.reply, bytes) else json.dumps(self.reply).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    kind = type("Own", (Endpoint,), {"asked": []})
    server = HTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", kind
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_as_openais_client_asks(endpoint, monkeypatch):
    url, kind = endpoint
    monkeypatch.setenv("NEXUS_RT_REWRITER_KEY", "secret")
    rewriter = EndpointRewriter(url, "chat")
    assert rewriter("a riddle") == "a red circle" and "secret" not in repr(rewriter)
    ((path, key, body),) = kind.asked
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "chat"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "a riddle"


@pytest.mark.parametrize(
    "status, reply",
    [
        (500, {"error": "x"}),
        (200, b"not json"),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": None}}]}),
        (200, {"choices": [{"message": {"content": None, "refusal": "I cannot help"}}]}),
        (302, {}),
        (200, []),
    ],
)
def test_an_endpoints_failures_are_one_error(endpoint, status, reply):
    url, kind = endpoint
    kind.status, kind.reply = status, reply
    with pytest.raises(RewriteError, match=r"127\.0\.0\.1"):
        EndpointRewriter(url, "chat")("a riddle")


def test_a_server_that_speaks_no_http_is_one_error():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def speak():
            for words in (b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"):
                one, _ = listener.accept()
                with one:
                    one.recv(65_536)
                    one.sendall(words)

        threading.Thread(target=speak, daemon=True).start()
        url = f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}/v1"
        for _ in range(2):
            with pytest.raises(RewriteError, match=r"127\.0\.0\.1") as refused:
                EndpointRewriter(url.replace("user:secret@", ""), "chat")("a riddle")
            assert "secret" not in str(refused.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "gopher://x", "http://["])
def test_a_proxy_that_cannot_be_used_is_one_error(proxy, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(RewriteError, match="judge.example"):
        EndpointRewriter("http://user:secret@judge.example/v1", "chat")("a riddle")


def test_a_key_is_in_no_message(endpoint, monkeypatch):
    url, kind = endpoint
    kind.status, kind.reply = 401, {"error": "bad key secret"}
    with refuses("rewrite_failed", kind=RewriteError) as caught:
        EndpointRewriter(url, "chat", " secret\n")("a riddle")
    assert "bad key ***" in str(caught.value) and kind.asked[0][1] == "Bearer secret"
    with refuses("invalid_value", "NEXUS_RT_REWRITER_KEY", InputError) as caught:
        EndpointRewriter(url, "chat", "sec\nret")
    assert "sec" not in str(caught.value)


def test_a_server_that_takes_no_temperature(endpoint):
    url, kind = endpoint
    answer = kind.do_POST

    def picky(self):
        body = kind.asked and kind.asked[-1][2]
        kind.status = 400 if not body else 200
        kind.reply = Endpoint.reply if body else {"error": "temperature is not supported"}
        answer(self)

    kind.do_POST = picky
    assert EndpointRewriter(url, "chat")("a riddle") == "a red circle"
    assert ["temperature" in body for *_, body in kind.asked] == [True, False]


@pytest.mark.parametrize(
    "url", ["http://[", "http://[::1/v1", "http://a:99999", "http://", "\ud800", "", "http://a\nb"]
)
def test_an_endpoint_that_cannot_be_parsed(url):
    with refuses("invalid_value", "url", InputError):
        EndpointRewriter(url, "chat")


def test_an_endpoint_that_is_none():
    with refuses("invalid_value", "url", InputError):
        EndpointRewriter("ftp://x", "chat")
    with refuses("rewrite_failed", kind=RewriteError):
        EndpointRewriter("http://127.0.0.1:9", "chat", timeout=2)("x")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A tiny chat model of another architecture, as `save_pretrained` writes it, with a chat
    template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    words = ["<unk>", "<end>", "<user>", "<system>", "<assistant>", "a", "red", "circle", "riddle"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        max_position_embeddings=128,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def test_any_chat_models_folder(chat_folder):
    rewriter = ChatRewriter(chat_folder, device="cpu", max_new_tokens=5)
    answer = rewriter("a riddle")
    assert answer and answer == rewriter("a riddle")
    messages = [
        {"role": "system", "content": rewriter.system},
        {"role": "user", "content": "a riddle"},
    ]
    inputs = rewriter.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = inputs["input_ids"][0].tolist()
    for _ in range(5):  # greedy, by the logits
        token = int(rewriter.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == rewriter.tokenizer.eos_token_id:
            break
        ids.append(token)
    new = ids[inputs["input_ids"].shape[1] :]
    assert answer == rewriter.tokenizer.decode(new, skip_special_tokens=True)
    rewriter.drop()
    assert rewriter.model is None and rewriter("a riddle") == answer


def test_a_folder_that_is_no_chat_model(tiny_pair, tmp_path):
    with refuses("missing", "folder", ModelError):
        ChatRewriter(tmp_path)
    with refuses("missing", "chat_template", ModelError):
        ChatRewriter(MINI / "understanding", device="cpu")("x")


def test_the_command_shows_it_and_writes_it_down(tmp_path, capsys):
    out = tmp_path / "out.mp4"
    line = ["generate", "the shape that rolls, in the colour of blood, moves to the left"]
    line += ["--plan", "large", "--steps", "2", "--rewrite", "auto", "-o", str(out), "--quiet"]
    assert main(line) == 0
    said = capsys.readouterr().err
    assert re.search(r"rewritten for the large generator \(\d+ ms\): a ", said)
    written = read_metadata(out)
    assert written["rewritten"] and written["rewritten"] in said
    assert written["options"]["rewrite"] == "auto"


@pytest.mark.parametrize(
    "options, name",
    [
        (["--rewriter", "http://x/v1"], "--rewriter-model"),
        (["--rewriter-model", "m"], "--rewriter URL"),
        (["--rewriter", ".", "--rewriter-model", "m"], "--rewriter-model"),
        (["--rewriter", "http://x/v1", "--rewriter-model", "m", "--rewrite", "auto"], "--rewrite "),
        (["--rewriter", "nowhere"], "config.json"),
        (["--rewrite-timeout", "0", "--rewrite", "auto"], "timeout"),
        (["--rewrite", ""], "rewrite"),
    ],
)
def test_options_that_do_not_go_together(options, name, tmp_path, capsys):
    code = main(["generate", "x", "-o", str(tmp_path / "x.mp4"), *options])
    assert code == (1 if "nowhere" in options else 2)
    assert name in capsys.readouterr().err and not list(Path(tmp_path).iterdir())


def test_a_list_of_prompts_has_its_own_texts(tiny_pipe, tmp_path):
    from nexus_rt.pipeline.batch import run
    from nexus_rt.pipeline.batch_job import Job
    from nexus_rt.pipeline.prompts import read_prompts

    path = tmp_path / "list.json"
    rows = [
        {"id": "own", "prompt": "a", "rewrite": "a red circle"},
        {"id": "run", "prompt": "a blue square"},
    ]
    path.write_text(json.dumps(rows))
    options = {k: v for k, v in QUICK.items() if k != "output_type"} | {
        "plan": "large",
        "rewrite": lambda prompt: f"on {prompt}",
    }
    job = Job(tmp_path / "out", suffix=".png", settings=CallSettings(**options))
    assert run(tiny_pipe, read_prompts(path), job)["made"] == 2
    lines = [json.loads(x) for x in (job.folder / "results.jsonl").read_text().splitlines()]
    kept = {r["id"]: r["settings"]["rewritten"] for r in lines if r["status"] == "done"}
    assert kept == {"own": "a red circle", "run": "on a blue square"}
    assert run(tiny_pipe, read_prompts(path), job)["kept"] == 2  # nothing is made again
