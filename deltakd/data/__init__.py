"""Data: sources, templates, tokens, and the order in which a run sees them.

Lightning's data module lives in ``deltakd.data.batches.data_module``. It is not imported here, so reading data does
not need Lightning.
"""

from deltakd.data.batches.budget import TokenBudgetSampler
from deltakd.data.batches.loader import EvalLoader, StepLoader, collate
from deltakd.data.batches.sampler import MicroBatch, Sampler, StepSampler
from deltakd.data.common_settings import DataConfig
from deltakd.data.encoding.chat_template import ChatTemplate
from deltakd.data.encoding.encode import encode_prompt, encode_prompts, encode_row
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet
from deltakd.data.encoding.packing import pack_texts
from deltakd.data.encoding.segments import Segment, Template
from deltakd.data.encoding.templates import AlpacaTemplate, PlainTemplate, make_template
from deltakd.data.encoding.token_cache import tokenizer_fingerprint
from deltakd.data.encoding.token_table import encode_rows
from deltakd.data.load import LoadedSets, SplitRows, load_instruction_sets, load_text_sets, split_rows
from deltakd.data.settings import InstructionData, TextData
from deltakd.data.sources.overlap import Overlap, OverlapSearch, find_overlaps
from deltakd.data.sources.parsing import parse_row
from deltakd.data.sources.readers import read_rows, read_texts
from deltakd.data.sources.rows import Row, row_record, with_answer

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
    "OverlapSearch",
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
