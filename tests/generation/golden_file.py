"""The golden file: 50 generations of a seeded tiny model, with their scores, as they were and have to stay.

    python -m tests.generation.golden_file

makes it again. Do so only where generation is meant to give other texts (another definition of the sampling noise,
say), and say so in the commit.

It must hold on every CPU. So the weights are drawn by NumPy, and kept are only rows whose texts are the same in float64
and with all weights moved by up to 1e-4 of their size, which is far more than the rounding of float32.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deltakd.evaluation import EvaluationSet, evaluate_set
from deltakd.generation import Decoding

from .tiny_models import EOS, PAD, make_model

FILE = Path(__file__).parent / "golden" / "generations.json"

#: Decoding and number of rows.
CASES = {
    "minillm": (Decoding(max_new_tokens=16), 26),
    "minillm_ngram": (Decoding(max_new_tokens=16, no_repeat_ngram_size=2), 12),
    "narrowed": (Decoding(temperature=0.7, top_k=12, top_p=0.9, max_new_tokens=16), 6),
    "greedy": (Decoding(do_sample=False, max_new_tokens=16), 6),
}
SEED = 10
MOVED = 1e-4

WORDS = """the The a an run runs running ran walk walks walked cat cats dog dogs pony ponies fly flies flying
sky skies is was are be been to of in on at with and or not no yes it its he she they we you I one
two 3 42 3.14 red blue happy happily happiness quick quickly state-of-the-art e-mail don't can't
what who when why How how much many long short city cities river rivers move moved moving say says
said see saw seen sing sings sang song songs , . ? ! ; : naïve""".split()  # noqa: SIM905

Record = dict[str, Any]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *WORDS])}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def model() -> PreTrainedModel:
    """Uniform weights, large enough for a distribution with a shape."""
    made = make_model("gpt2", vocab=len(WORDS) + 2)
    draw = np.random.Generator(np.random.PCG64(3))
    with torch.no_grad():
        for _, parameter in sorted(made.named_parameters()):
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(draw.random(tuple(parameter.shape)) - 0.5))
    return made


def moved(made: PreTrainedModel, seed: int) -> PreTrainedModel:
    """In float64, every weight moved a little."""
    other = deepcopy(made).double()
    draw = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.from_numpy(1 + MOVED * (2 * draw.random(tuple(parameter.shape)) - 1)))
    return other


def asked(row_ids: list[int]) -> EvaluationSet:
    """Prompts and references of chosen words; those of a row depend on its id alone."""
    prompts, references = [], []
    for row in row_ids:
        draw = random.Random(row)
        prompts.append(" ".join(draw.choices(WORDS, k=draw.randint(2, 12))))
        references.append(
            tuple(" ".join(draw.choices(WORDS, k=draw.randint(4, 20))) for _ in range(draw.randint(1, 3)))
        )
    speaker = tokenizer()
    return EvaluationSet("golden", row_ids, prompts, [speaker(p)["input_ids"] for p in prompts], references)


def generate_case(case: str, row_ids: list[int], speaking: PreTrainedModel) -> list[Record]:
    """Answers and scores of these rows."""
    options = {"decoding": CASES[case][0], "batch_size": 8, "vocab_size": len(WORDS) + 2, "pad_id": PAD}
    records = evaluate_set(speaking, tokenizer(), asked(row_ids), seeds=[SEED], **options)[SEED]
    kept = ("row_id", "prompt", "reference", "output", "output_tokens", "finished", "rouge1", "rouge2", "rougeL")
    return [{"case": case} | {key: record[key] for key in kept} for record in records]


def make() -> list[Record]:
    """The content of the file: of each case the first rows whose texts can't be flipped by rounding."""
    assert tokenizer().eos_token_id == EOS
    made = model()
    chosen = []
    for case, (_, count) in CASES.items():
        candidates = list(range(2 * count))
        records = generate_case(case, candidates, made)
        others = [generate_case(case, candidates, moved(made, seed)) for seed in range(3)]
        firm = [
            record
            for at, record in enumerate(records)
            if all(other[at]["output"] == record["output"] for other in others)
        ]
        assert len(firm) >= count, f"{case}: only {len(firm)} of {len(candidates)} rows are firm"
        chosen += firm[:count]
    return chosen


def read() -> list[Record]:
    """The records of the file."""
    records: list[Record] = json.loads(FILE.read_text(encoding="utf-8"))
    return records


if __name__ == "__main__":
    FILE.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in make()) + "\n]\n", encoding="utf-8")
