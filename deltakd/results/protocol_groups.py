"""Evaluation protocols of runs: only scores under the same protocol share a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltakd.evaluation import SCORERS
from deltakd.evaluation.protocol import ROUGE_WORDS, STRIP
from deltakd.evaluation.scoring import THINK_BLOCKS
from deltakd.results.reading import Record, Run

#: Set -> aspect -> text to compare for equality and to show.
Protocol = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class ProtocolGroup:
    """Runs that agree on the protocol of every set that they share.

    Args:
        runs: at least one.
        protocol: the protocol of all their sets.
    """

    runs: list[Run]
    protocol: Protocol

    def describe(self) -> list[str]:
        return [
            f"{name}: {aspects['prompts']}, {aspects['decoding']}, scored by {aspects['scorer']}."
            for name, aspects in self.protocol.items()
        ]

    def differs_from(self, other: ProtocolGroup) -> list[str]:
        """Return the differences in the sets that both have, one sentence each."""
        return [
            f"{name}: {_OTHER.get(aspect) or f'{aspects[aspect]} instead of {other.protocol[name][aspect]}'}"
            for name, aspects in self.protocol.items()
            for aspect in aspects
            if name in other.protocol and aspects[aspect] != other.protocol[name][aspect]
        ]


#: Texts for aspects that are compared by digest.
_OTHER = {
    "rows": "other rows of the set",
    "texts": "other prompt texts (template, length limit or tokenizer)",
    "references": "other reference answers",
}


def protocol_of(run: Run) -> Protocol:
    """Return the protocol of a run's answers, as the answers themselves record it."""
    return {name: _of_set(by_seed) for name, by_seed in run.answers.items()}


def _of_set(by_seed: Mapping[int, Sequence[Record]]) -> dict[str, str]:
    records = next(iter(by_seed.values()))
    by_row = sorted(records, key=lambda record: record["row_id"])
    decoding = {key: value for key, value in records[0]["decoding"].items() if key not in ("seed", "eos_ids")}
    return {
        "prompts": f"{len(by_row)} prompts",
        "decoding": _decoding(decoding, sorted(by_seed)),
        "scorer": _scorer(records[0]),
        "rows": _digest([record["row_id"] for record in by_row]),
        "texts": _digest([record["prompt"] for record in by_row]),
        "references": _digest([record["reference"] for record in by_row]),
    }


def _scorer(record: Record) -> str:
    """Return the scorer of a record, identified by its scores, with the part of the texts that it compared."""
    name = next(name for name, scorer in SCORERS.items() if scorer.main in record)
    protocol = record.get("protocol", {})
    words, strip = protocol.get(ROUGE_WORDS), protocol.get(STRIP)
    details = [f"{words} words"] if words else []
    if strip is not None:
        details.append("without <think> blocks" if strip == THINK_BLOCKS else f"without {strip}")
    return f"{name} ({', '.join(details)})" if details else name


def _decoding(options: Mapping[str, Any], seeds: Sequence[int]) -> str:
    neutral = {"do_sample": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "no_repeat_ngram_size": 0}
    limits = {key: value for key, value in options.items() if key not in neutral or value != neutral[key]}
    limits.pop("do_sample", None)
    if options.get("do_sample"):
        limits["temperature"] = options.get("temperature")
        what = f"sampled under seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    else:
        # Greedy answers depend neither on seeds nor on sampling options.
        limits = {key: value for key, value in limits.items() if key not in ("temperature", "top_k", "top_p")}
        what = "greedy"
    return f"{what} ({', '.join(f'{key} {value}' for key, value in sorted(limits.items()))})"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def group_by_protocol(runs: Sequence[Run]) -> list[ProtocolGroup]:
    """Split runs with answers into groups of compatible protocols, in the order of their first runs."""
    groups: list[tuple[list[Run], dict[str, Mapping[str, str]]]] = []
    for run in runs:
        protocol = protocol_of(run)
        if not protocol:
            continue
        for members, common in groups:
            if all(common.get(name, aspects) == aspects for name, aspects in protocol.items()):
                members.append(run)
                common.update(protocol)
                break
        else:
            groups.append(([run], dict(protocol)))
    return [ProtocolGroup(members, common) for members, common in groups]
