"""Every reader against mutated inputs: some in every run, a hundred thousand in the slow one
(tests/fuzz.py)."""

import pytest
import torch

from nexus_rt.loading.connector import save_connector
from nexus_rt.models.connector import SPECIAL_TOKENS, Connector, ConnectorConfig
from tests import fuzz
from tests.more import more


@pytest.fixture
def targets(tiny_pair, tmp_path):
    torch.manual_seed(3)
    connector = Connector(
        ConnectorConfig(
            llm_hidden_size=8,
            vision_dim=8,
            text_dim=32,
            adapter_queries=2,
            num_layers=1,
            num_heads=2,
        )
    )
    connector.special_tokens = {t: torch.randn(1, 32) for t in SPECIAL_TOKENS}
    save_connector(connector, tmp_path / "c")
    return fuzz.make_targets(tiny_pair, tmp_path / "c", tmp_path / "work")


def test_what_is_whole_is_read(targets):
    for target in targets:
        target.read()


@pytest.mark.parametrize("count", [200, *more(2400)])
def test_no_input_is_unhandled_hangs_or_takes_much_memory(targets, count):
    counts = fuzz.run(targets, count, seed=0)
    taken = {name for name, _ in counts}
    refused = {name for name, kind in counts if kind == "refused"}
    # a line that is none of ours is passed over
    assert taken == {t.name for t in targets} and "results.jsonl" not in refused
    if count >= 2400:
        assert refused == taken - {"results.jsonl"}


@pytest.mark.slow
def test_a_hundred_thousand_inputs(targets):
    for seed in range(100, 110):
        fuzz.run(targets, 10_000, seed)
