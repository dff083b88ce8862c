"""Tokenizers of folders: the plain ones read without transformers, and the same ids as
transformers'."""

import json
import shutil
import subprocess
import sys

import pytest

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.pair_folder import MINI
from nexus_rt.loading.tokenizer import load_tokenizer, of_transformers
from nexus_rt.models.tokenizer import PlainTokenizer
from tests.refusals import refuses

TEXTS = [
    "a red circle",
    "",
    "  spaces   between ",
    "naïve 漢字 🎉 unheard-of",
    "a " * 700,
    "</s> <unk> a",
]


@pytest.mark.parametrize("part", ["tokenizer", "understanding"])
@pytest.mark.parametrize("limit", [None, 1, 2, 7, 512])
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(part, limit, special):
    ours, theirs = (
        load_tokenizer(MINI / part, "tokenizer"),
        of_transformers(MINI / part, "tokenizer"),
    )
    assert isinstance(ours, PlainTokenizer)
    for text in TEXTS:
        ids = ours.encode(text, special, limit)
        assert ids == theirs.encode(text, special, limit)
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (theirs.pad_id, theirs.eos_id, theirs.unk_id)
    for token in ("<pad>", "[GEN_VID]", "<unk>", "unheard-of"):
        assert ours.token_id(token) == theirs.token_id(token)


def test_a_files_own_truncation_and_padding_are_not_applied(tmp_path):
    """They are what its maker's last call left in it."""
    wanted = load_tokenizer(MINI / "tokenizer", "tokenizer").encode(TEXTS[4])
    stored = json.loads((MINI / "tokenizer" / "tokenizer.json").read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    stored["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    config = json.loads((MINI / "tokenizer" / "tokenizer_config.json").read_text())
    config["pad_token"] = {"content": "<pad>", "__type": "AddedToken"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, "tokenizer")
    assert (
        tokenizer.encode(TEXTS[4]) == wanted
        and len(tokenizer.encode("a")) == 2
        and tokenizer.pad_id == 0
    )


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 3}', "\x00" * 10, '{"model": {"type": "BPE", "vocab": 3}}', ""]
)
def test_damaged_ones_are_one_sentence(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / "tokenizer.json").write_text(text)
    with refuses("invalid_model", kind=ModelError):
        load_tokenizer(tmp_path, "tokenizer")


@pytest.mark.packaging
def test_the_mini_pair_generates_without_transformers_diffusers_or_the_compiler(tmp_path):
    """Their imports take longer than its clip does: from the shell to an mp4 is mostly imports."""
    code = (
        "import sys; from nexus_rt.cli import main; main(sys.argv[1:])\nprint([m for m in"
        " ('transformers', 'diffusers', 'sympy', 'torch._dynamo', 'torch._inductor') if m in"
        " sys.modules])"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        "a red circle",
        "--steps",
        "2",
        "--quiet",
        "-o",
        str(tmp_path / "a.mp4"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "a.mp4").stat().st_size and done.stdout.splitlines()[-1] == "[]"


def test_special_tokens_of_earlier_folders(tiny_pair, tmp_path):
    """In `special_tokens_map.json` alone; the config goes before."""
    folder = shutil.copytree(tiny_pair / "tokenizer", tmp_path / "tokenizer")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    wanted = load_tokenizer(folder, "tokenizer")
    special = {n: config.pop(n) for n in ("pad_token", "eos_token", "unk_token")}
    path.write_text(json.dumps(config))
    assert load_tokenizer(folder, "tokenizer").eos_id is None
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**special, "eos_token": {"content": special["eos_token"]}})
    )
    read = load_tokenizer(folder, "tokenizer")
    ids = lambda t: (t.pad_id, t.eos_id, t.unk_id)
    assert ids(read) == ids(wanted) and None not in ids(read)
    path.write_text(json.dumps({**config, "eos_token": special["unk_token"]}))
    assert load_tokenizer(folder, "tokenizer").eos_id == wanted.unk_id
