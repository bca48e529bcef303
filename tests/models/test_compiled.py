"""``trainer.compile``: one graph of a body for micro-batches of any size, but for a single sequence; no breaks."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.data.batches.loader import collate
from deltakd.data.batches.packed_rows import pack_rows
from deltakd.data.encoding.encoded_set import EncodedSet, flatten
from deltakd.models import LanguageModel
from deltakd.types import Batch

V = 64
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def make_batch(rows: int, length: int) -> Batch:
    ids = torch.randint(1, V, (rows, length)).tolist()
    flat, offsets = flatten(ids)
    encoded = EncodedSet(flat, flat, offsets, torch.arange(rows).numpy())
    return collate([encoded[row] for row in range(rows)], 0, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("family", "sizes"), [("gpt2", GPT2), ("llama", LLAMA), ("qwen2", LLAMA)])
def test_lengths_and_row_counts_compile_next_to_nothing_again(
    monkeypatch: pytest.MonkeyPatch, family: str, sizes: dict[str, int], checkpointed: bool, packed: bool
) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    config = AutoConfig.for_model(family, vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes)
    config.pad_token_id = None
    model = LanguageModel(AutoModelForCausalLM.from_config(config), V).train()
    if family == "gpt2":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if checkpointed:
        model.causal_lm.gradient_checkpointing_enable()
    counter = CompileCounter()
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiled, backend=counter))
    model.compile_body()
    for rows, length in ((4, 16), (4, 24), (3, 32), (4, 9)):
        batch = make_batch(rows, length)
        if packed:
            batch = pack_rows(batch, length=2 * length)
        hidden = model.head(batch).hidden
        hidden.square().sum().backward()
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(hidden, model.head(batch).hidden)
    assert counter.frame_count <= (3 if checkpointed else 1)
