"""The config group ``evaluation``: the prompts for the trained student, and the scoring of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len

from deltakd.data import DataConfig, Row, read_rows
from deltakd.data.encoding.template_problems import template_problems
from deltakd.data.sources.records import missing_sources
from deltakd.evaluation.scoring import MAIN_METRICS, METRICS, THINK_BLOCKS, RougeTokenizer
from deltakd.generation import Decoding
from deltakd.io.keys import Protocol, Resume, Seed
from deltakd.io.patterns import pattern_problems

#: Objectives that need generated answers, main metrics first; higher is better for all of them.
SCORES = tuple(f"val/{metric}" for metric in sorted(METRICS, key=lambda metric: metric not in MAIN_METRICS))

ScorerName = Literal["rouge", "final_number"]


@dataclass(frozen=True, kw_only=True)
class SetSource:
    """One entry of ``evaluation.sets``; the config may also give just the source.

    Args:
        source: a file or hub data set.
        scorer: its scorer; None: ``evaluation.scorer``.
        limit: first N rows; None: ``evaluation.limit``.
    """

    source: str
    scorer: Annotated[ScorerName | None, Protocol.FIXED] = None
    limit: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class RetainedSettings:
    """What a student knew before its training, measured before and after (``evaluation.measures.retained``).

    Args:
        text: raw text, as for pre-training: perplexity, and KL to the raw student.
        facts: records with a ``prompt`` and a ``completion``, read as one text without a template: the share of
            completions that the student would write.
    """

    text: str | Sequence[str] | None = None
    facts: str | Sequence[str] | None = None

    def problems(self) -> list[str]:
        """Return a sentence for each missing file."""
        key = "evaluation.measures.retained"
        return missing_sources({f"{key}.text": self.text, f"{key}.facts": self.facts})


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How a student is measured beyond the scores of its answers (``evaluation.measures``).

    Args:
        rows: first N rows of the validation data, of each evaluation set, and of ``retained``; None: all; 0: nothing
            is measured.
        references: ``auto``: models in the reference cache, and models with a path in the config, whether the loss
            reads them or not; ``none``: only the student.
        retained: what it knew before.
    """

    rows: Annotated[int, Ge(0)] | None = 256
    references: Literal["auto", "none"] = "auto"
    retained: RetainedSettings = field(default_factory=RetainedSettings)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The contents of ``conf/evaluation/*.yaml``.

    Args:
        generate: generate answers during and after training.
        sets: name -> source and scorer of the set.
        limit: first N rows of each set.
        seeds: sampling seeds; greedy decoding runs once and writes the same answers to every seed's file.
        batch_size: maximum number of answers decoded together, over all seeds.
        static_cache: decode with key-value caches of a fixed size, whose steps a GPU replays as CUDA graphs.
        val_limit: validation rows answered during training.
        decoding: how tokens are chosen.
        scorer: scorer of validation answers and of sets that name none; None: ``rouge``.
        rouge_tokenizer: the words that ROUGE compares: ``default`` (a-z and 0-9, as in published numbers) or
            ``unicode`` (letters and digits of all scripts).
        strip: a regular expression; what it matches is removed from answers and references before they are scored, and
            stays in the records. The default removes blocks of reasoning; None: nothing is removed.
        template: template of the prompts; None: the data's.
        max_prompt_length: maximum tokens of a prompt; None: the data's.
        protocol: the published protocol that the group claims to follow, a file of ``conf/evaluation``; None: none.
        allow_overlap: only warn if rows of a set were trained on.
        measures: measures beyond scores of answers; independent of ``generate`` on validation data.
    """

    generate: bool = True
    sets: Annotated[Mapping[str, SetSource], Resume.UNFINISHED] = field(default_factory=dict)
    limit: Annotated[Annotated[int, Ge(1)] | None, Resume.UNFINISHED, Protocol.FIXED] = None
    seeds: Annotated[Sequence[Seed], Len(1), Protocol.FIXED] = (10,)
    batch_size: Annotated[int, Ge(1), Resume.UNFINISHED] = 16
    static_cache: Annotated[bool, Resume.FREE] = False
    val_limit: Annotated[int, Ge(1)] = 64
    decoding: Annotated[Decoding, Protocol.FIXED] = field(default_factory=Decoding)
    scorer: Annotated[ScorerName | None, Protocol.FIXED] = None
    rouge_tokenizer: Annotated[RougeTokenizer, Protocol.FIXED] = "default"
    strip: Annotated[str | None, Protocol.FIXED] = THINK_BLOCKS
    template: Annotated[str | Mapping[str, str] | None, Protocol.FIXED] = None
    max_prompt_length: Annotated[Annotated[int, Ge(1)] | None, Protocol.FIXED] = None
    protocol: str | None = None
    allow_overlap: Annotated[bool, Resume.FREE] = False
    measures: Annotated[MeasureSettings, Resume.FREE] = field(default_factory=MeasureSettings)

    @property
    def val_scorer(self) -> str:
        """The scorer of answers to validation rows and of sets that name none."""
        return self.scorer or "rouge"

    @property
    def comparison(self) -> dict[str, Any]:
        """The parts of answers and references that scorers compare, as arguments of ``make_set``."""
        return {"rouge_tokenizer": self.rouge_tokenizer, "strip": self.strip}

    def scorer_of(self, name: str) -> str:
        """Return the scorer of the set ``name``."""
        return self.sets[name].scorer or self.val_scorer

    def limit_of(self, name: str) -> int | None:
        """Return the number of rows of the set ``name`` to ask; None: all."""
        own = self.sets[name].limit
        return self.limit if own is None else own if self.limit is None else min(own, self.limit)

    def rows_of(self, name: str, data: DataConfig) -> list[Row]:
        """Read the rows of the set ``name``.

        Raises:
            ValueError: as ``read_rows``.
        """
        return read_rows(
            self.sets[name].source,
            strip_answers=data.strip_answers,
            columns=data.columns,
            need_columns=False,
            limit=self.limit_of(name),
        )

    def prompts_of(self, data: DataConfig) -> DataConfig:
        """Return the data settings with the evaluation's own template and prompt length, if it has them."""
        own: dict[str, Any] = {"template": self.template, "max_prompt_length": self.max_prompt_length}
        return replace(data, **{key: value for key, value in own.items() if value is not None})

    def problems(self, data: DataConfig | None) -> list[str]:
        """Return problems that would show only after training: name clashes, missing files, a different template."""
        found = self.decoding.problems() + pattern_problems("evaluation.strip", self.strip)
        if self.template is not None:
            found += template_problems("evaluation.template", self.template)
        if data is not None and data.prepare is None and self.measures.rows != 0:
            found += self.measures.retained.problems()
        if not self.generate:
            return found
        found += [
            f"evaluation.sets has {name!r}; a set can't be called val, train, retained or meta, nor have a slash in "
            "its name"
            for name in self.sets
            if name in ("val", "train", "retained", "meta") or "/" in name
        ]
        if data is None:
            return found
        if data.prepare is None:
            found += missing_sources({f"evaluation.sets.{name}": entry.source for name, entry in self.sets.items()})
        if self.template is not None and self.template != data.template:
            deviation = f" (recorded as a deviation from {self.protocol})" if self.protocol else ""
            found.append(
                f"evaluation.template is {self.template!r}, but data.template is {data.template!r}: the student "
                "would be asked in a form that it was not trained on; give evaluation.template=null to ask in that of "
                f"the data{deviation}, or data.template={self.template}"
            )
        return found
