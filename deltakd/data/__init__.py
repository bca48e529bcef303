"""Data: sources, templates, tokens, and the order in which a run sees them.

Lightning's data module is in ``deltakd.data.datamodule``; it is not imported here, so that reading
data needs no Lightning.
"""

from deltakd.data.build import LoadedSets, SplitRows, load_instruction_sets, load_text_sets, split_rows
from deltakd.data.config import DataConfig, InstructionData, TextData
from deltakd.data.encoded_set import Encoded, EncodedSet
from deltakd.data.encoding import encode_prompt, encode_prompts, encode_row, encode_rows
from deltakd.data.loader import EvalLoader, StepLoader, collate
from deltakd.data.overlap import Overlap, find_overlaps
from deltakd.data.readers import read_rows, read_texts
from deltakd.data.rows import Row, parse_row, row_record, with_answer
from deltakd.data.sampler import MicroBatch, Sampler, StepSampler
from deltakd.data.templates import AlpacaTemplate, ChatTemplate, PlainTemplate, Segment, Template, make_template
from deltakd.data.text import pack_texts
from deltakd.data.token_budget import TokenBudgetSampler
from deltakd.data.token_cache import tokenizer_fingerprint

__all__ = [
    "AlpacaTemplate",
    "ChatTemplate",
    "DataConfig",
    "Encoded",
    "EncodedSet",
    "EvalLoader",
    "InstructionData",
    "LoadedSets",
    "MicroBatch",
    "Overlap",
    "PlainTemplate",
    "Row",
    "Sampler",
    "Segment",
    "SplitRows",
    "StepLoader",
    "StepSampler",
    "Template",
    "TextData",
    "TokenBudgetSampler",
    "collate",
    "encode_prompt",
    "encode_prompts",
    "encode_row",
    "encode_rows",
    "find_overlaps",
    "load_instruction_sets",
    "load_text_sets",
    "make_template",
    "pack_texts",
    "parse_row",
    "read_rows",
    "read_texts",
    "row_record",
    "split_rows",
    "tokenizer_fingerprint",
    "with_answer",
]
