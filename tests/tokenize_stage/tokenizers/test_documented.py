"""The example in docs/add-a-tokenizer.md runs as it is printed, and its tokenizer encodes a store."""

import re
from pathlib import Path

import torch
from mapet.shared.images.views import ViewPolicy
from mapet.shared.sources.keys import KeyLedger
from mapet.shared.sources.sources import open_source
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encoding.shards import Encoder
from mapet.tokenize_stage.encoding.writing import begin_store, finish_store, write_shards
from mapet.tokenize_stage.inspect import inspect
from mapet.tokenize_stage.verify import verify

PAGE = Path(__file__).parents[3] / "docs" / "add-a-tokenizer.md"


def test_the_documented_tokenizer_encodes_a_store(chain, tmp_path: Path):
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], names)  # noqa: S102  # our own page
    tokenizer = names["Brightness"]()
    ramp = torch.arange(0.5, 16).repeat_interleave(2).repeat(1, 3, 32, 1) / 16
    columns = [
        1,
        5,
        9,
        13,
    ]  # each column of patches covers four of the sixteen steps; their mean lies in the upper half
    tokens = tokenizer.encode(ramp)
    assert (tokens.shape, tokens.dtype) == ((1, 4, 4), torch.int64)
    assert ((tokens - torch.tensor(columns)).abs() <= 1).all()
    shards, out, ledger = open_source(chain.images), tmp_path / "tokens", KeyLedger()
    encoder = Encoder(tokenizer, ViewPolicy(), False, batch_size=16, workers=0)
    begin_store(out, encoder)
    write_shards(out, encoder, shards, ledger, "zarr")
    finish_store(out, shards, ledger, changed=True)
    assert verify(out, images=str(chain.images)) == len(TokenStore(out)) == 96
    assert inspect(out)["tokens"] == 96 * 16
