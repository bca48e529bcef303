"""Tokenizers: loading, training on given text, and the proof that two models speak the same one."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltakd.io.hub import hub_reachable

log = logging.getLogger(__name__)

#: A text with spaces, digits, punctuation, case and non-ASCII letters: equal vocabularies with other merges or
#: another normaliser show up here.
PROBE = "Below is an instruction.\n\n### Response:\n  Été 2024: 1,234.5 café's “naïve” tokens — don’t split THIS!"


def load_tokenizer(path: str, key: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a hub id or a directory.

    Raises:
        ValueError: there is none, in one line that names the config key to set.
    """
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=not hub_reachable()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{key}={path}: no tokenizer can be loaded from there ({lines[0][:120]}); give {key}=..."
        ) from None


def train_tokenizer(texts: Iterable[str], vocabulary: int, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (as GPT-2's: no unknown token) with ``<|endoftext|>`` as its EOS.

    Args:
        texts: documents.
        vocabulary: number of tokens, the 256 bytes and EOS among them; fewer where the text has not so many pairs.
        add_prefix_space: begin every text with a space, so that a word at its start is the token that it is inside.

    Raises:
        ValueError: fewer than 257 tokens asked for.
    """
    if vocabulary < 257:
        raise ValueError(f"model.tokenizer.vocabulary is {vocabulary}; a byte-level BPE needs at least 257 tokens")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def common_vocabulary(student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str) -> int:
    """Prove that a reference speaks the student's tokenizer; return the number of tokens they share.

    Compared are token strings by id, the special tokens that appear in a row (BOS, EOS, UNK) and the ids of a probe
    text. Padded rows of the models play no part. A pad token that one side appended is cut: no label is ever one.

    Raises:
        ValueError: showing the first tokens that differ.
    """
    ours, theirs = _tokens_by_id(student), _tokens_by_id(other)
    shared = min(len(ours), len(theirs))
    differing = [i for i in range(shared) if ours[i] != theirs[i]]
    extra = (ours if len(ours) > shared else theirs)[shared:]
    pads = {student.pad_token, other.pad_token}
    problems = []
    if differing:
        shown = ", ".join(f"id {i}: student {ours[i]!r}, {role} {theirs[i]!r}" for i in differing[:5])
        problems.append(f"{len(differing)} of {shared} tokens differ ({shown})")
    if any(token not in pads for token in extra):
        problems.append(f"the student's has {len(ours)} tokens, the {role}'s {len(theirs)} (first extra: {extra[:5]})")
    for name in ("bos_token", "eos_token", "unk_token"):
        if getattr(student, name) != getattr(other, name):
            problems.append(
                f"{name} is {getattr(student, name)!r} in the student, {getattr(other, name)!r} in the {role}"
            )
    if not problems and _probe_ids(student) != _probe_ids(other):
        problems.append("they cut the same text into different tokens (other merges or another normaliser)")
    if problems:
        raise ValueError(
            f"the {role} has another tokenizer than the student: {'; '.join(problems)}. Distillation compares "
            f"distributions over the same tokens: give models of one family, or model.{role}.tokenizer=... if the "
            "wrong tokenizer lies beside the weights"
        )
    if extra:
        log.info("The pad token %s is cut from the vocabulary: only one of student and %s has it.", extra, role)
    return shared


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])


def pad_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """Any id that all models know will do under an attention mask: the tokenizer's own, if they do, else 0."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary else 0
