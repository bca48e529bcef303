"""Types shared by all parts of deltakd, and the legend of tensor names.

Tensor names end in their shape:

    B  rows of a batch                 N  valid target tokens (label != IGNORE_INDEX, after the shift)
    T  positions of a row              D  hidden size (differs between models)
    V  vocabulary of the tokenizer

With two tokenizers, M counts the valid tokens of the teachers' side, and K the spans of text that both sides share.
So ``hidden_ND`` holds one hidden state for each valid token, ``labels_BT`` one label for each position.
"""

from deltakd.types.alignment import UNALIGNED, Alignment, TokenMap
from deltakd.types.batch import IGNORE_INDEX, AlignedStream, Batch, StepPairs, TokenStream
from deltakd.types.heads import NO_FACTS, Head, HeadLogits, PairFacts, TokenFacts, in_float64
from deltakd.types.losses import (
    Gate,
    LinearKL,
    Loss,
    LossOutput,
    MixtureKL,
    Progress,
    Schedule,
    SequenceLoss,
    require_kind,
)
from deltakd.types.packed import PackedRows
from deltakd.types.placement import device_of, dtype_of
from deltakd.types.products import Products, at_least_float32
from deltakd.types.role_names import (
    ROLES,
    STUDENT,
    STUDENT_RAW,
    TEACHER,
    TEACHER_RAW,
    is_reference_role,
    is_teacher,
    teacher_pair,
)
from deltakd.types.two_sides import AlignedLogits, AlignedTokens, SideTokens

__all__ = [
    "IGNORE_INDEX",
    "NO_FACTS",
    "ROLES",
    "STUDENT",
    "STUDENT_RAW",
    "TEACHER",
    "TEACHER_RAW",
    "UNALIGNED",
    "AlignedLogits",
    "AlignedStream",
    "AlignedTokens",
    "Alignment",
    "Batch",
    "Gate",
    "Head",
    "HeadLogits",
    "LinearKL",
    "Loss",
    "LossOutput",
    "MixtureKL",
    "PackedRows",
    "PairFacts",
    "Products",
    "Progress",
    "Schedule",
    "SequenceLoss",
    "SideTokens",
    "StepPairs",
    "TokenFacts",
    "TokenMap",
    "TokenStream",
    "at_least_float32",
    "device_of",
    "dtype_of",
    "in_float64",
    "is_reference_role",
    "is_teacher",
    "require_kind",
    "teacher_pair",
]
