"""Tokenizers: loading, training on text, and checking that two models share one."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltakd.io.hub import hub_reachable
from deltakd.models.vocabulary import is_unwritten

log = logging.getLogger(__name__)

#: Spaces, digits, punctuation, case and non-ASCII letters: the ids of this text differ if only the merges or the
#: normaliser do.
PROBE = "Below is an instruction.\n\n### Response:\n  Été 2024: 1,234.5 café's “naïve” tokens — don’t split THIS!"

#: Losses for teachers with a tokenizer of their own, as conf/loss names them.
ALIGNING_LOSSES = ("uld", "dskd", "span_kd", "delta_span")


def load_tokenizer(path: str, key: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a hub id or a directory.

    Raises:
        ValueError: it is not available; the message names the config key to set.
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
    """Train a byte-level BPE tokenizer (like GPT-2's, without an unknown token) with ``<|endoftext|>`` as EOS and BOS.

    Args:
        texts: documents.
        vocabulary: number of tokens, including the 256 bytes and EOS; fewer if the text has too few pairs to merge.
        add_prefix_space: begin every text with a space, so that its first word gets the same token as inside a text.

    Raises:
        ValueError: ``vocabulary`` is below 257.
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


class OtherTokenizerError(ValueError):
    """A reference has another tokenizer than the student; only losses that align tokens can compare them."""


def common_vocabulary(student: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str) -> int:
    """Check that a reference uses the student's tokenizer; return the number of tokens they share.

    Compares token strings by id, the special tokens that appear in rows (BOS, EOS, UNK), and the ids of a probe text.
    Padding rows of the models' embeddings are ignored. Added tokens at the end that only one side has are cut: rows
    that hold those of the student's are found later (``deltakd.models.vocabulary``).

    Raises:
        OtherTokenizerError: the message shows the first tokens that differ.
    """
    ours, theirs = _tokens_by_id(student), _tokens_by_id(other)
    shared = min(len(ours), len(theirs))
    differing = [i for i in range(shared) if ours[i] != theirs[i]]
    longer, tokens = (student, ours) if len(ours) > shared else (other, theirs)
    extra = tokens[shared:]
    problems = []
    if differing:
        shown = ", ".join(f"id {i}: student {ours[i]!r}, {role} {theirs[i]!r}" for i in differing[:5])
        problems.append(f"{len(differing)} of {shared} tokens differ ({shown})")
    added = longer.added_tokens_decoder
    if not all(i in added or is_unwritten(longer, i) for i in range(shared, len(tokens)) if tokens[i] is not None):
        problems.append(f"the student's has {len(ours)} tokens, the {role}'s {len(theirs)} (first extra: {extra[:5]})")
    for name in ("bos_token", "eos_token", "unk_token"):
        if getattr(student, name) != getattr(other, name):
            problems.append(
                f"{name} is {getattr(student, name)!r} in the student, {getattr(other, name)!r} in the {role}"
            )
    if not problems and _probe_ids(student) != _probe_ids(other):
        problems.append("they cut the same text into different tokens (other merges or another normaliser)")
    if problems:
        raise OtherTokenizerError(
            f"the {role} has another tokenizer than the student: {'; '.join(problems)}. This loss compares "
            f"distributions over the same tokens: give models of one family, model.{role}.tokenizer=... if the wrong "
            f"tokenizer lies beside the weights, or a loss that aligns tokens ({', '.join(ALIGNING_LOSSES)})"
        )
    if extra:
        log.info(
            "The added tokens %s are cut from the vocabulary: only one of student and %s has them%s.",
            extra,
            role,
            "" if longer is student else ", and reads text that holds them in other tokens than it knows",
        )
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
    """Return the tokenizer's pad id if all models have it, else 0: under the attention mask any id works."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary else 0
