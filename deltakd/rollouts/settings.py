"""Settings of the config group ``rollout`` (``conf/rollout/*.yaml``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from deltakd.generation import Decoding
from deltakd.io.keys import Resume
from deltakd.rollouts.replay import ReplaySettings
from deltakd.rollouts.vllm_settings import VllmSettings
from deltakd.types import TEACHER, Loss

Positive = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How many responses the student writes itself, and how.

    Args:
        fraction: share of an optimiser step's rows whose responses are the student's (λ of GKD, arXiv 2306.13649);
            0: none.
        per_prompt: responses per prompt.
        every: optimiser steps per round of responses.
        source: whose distribution tokens are drawn from: ``student``, or ``mixture``: at each token (1 − α) · student +
            α · teacher (MiniLLM, arXiv 2306.08543).
        teacher_weight: α of the mixture.
        replay: responses of earlier steps that are trained on again, and an adaptive share.
        batch_size: responses generated together, per process.
        static_cache: decode with a key-value cache of a fixed size, whose steps a GPU replays as one CUDA graph.
        decoding: how tokens are chosen.
        engine: ``own``: the student in memory writes the responses; ``vllm``: a vLLM server with its weights does.
        vllm: that server.
    """

    fraction: Annotated[float, Ge(0), Le(1)] = 0.0
    per_prompt: Positive = 1
    every: Positive = 1
    source: Literal["student", "mixture"] = "student"
    teacher_weight: Annotated[float, Gt(0), Lt(1)] = 0.2
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    batch_size: Positive = 32
    static_cache: Annotated[bool, Resume.FREE] = False
    decoding: Decoding = field(default_factory=Decoding)
    engine: Literal["own", "vllm"] = "own"
    vllm: Annotated[VllmSettings, Resume.FREE] = field(default_factory=VllmSettings)

    @property
    def on_policy(self) -> bool:
        """True if the student writes responses."""
        return self.fraction > 0

    @property
    def own_rows_alone(self) -> bool:
        """True if every response is the student's, so that rows need none of their own."""
        return self.fraction == 1 and not self.replay.adaptive

    @property
    def mixes_teacher(self) -> bool:
        """True if tokens are drawn from a mixture of student and teacher."""
        return self.on_policy and self.source == "mixture"

    @property
    def samples_itself(self) -> bool:
        """True if all of a step's tokens are samples of the student as it was at the start of the round."""
        return (
            self.own_rows_alone and not self.mixes_teacher and not self.replay.size and self.decoding.keeps_distribution
        )

    @property
    def needs_ratios(self) -> bool:
        """True if tokens are trained on that the student at that step did not sample by itself."""
        return self.every > 1 or self.mixes_teacher or self.replay.size > 0

    def problems(self, loss: Loss | None) -> list[str]:
        """Return the problems, one sentence each."""
        found = self.decoding.problems("rollout.decoding") if self.on_policy else self._unused_problems()
        if loss is not None and loss.needs_sampled_tokens:
            found += self._sampling_problems()
            found += self._ratio_problems(loss)
        if loss is not None and loss.needs_pairs:
            found += self._pair_problems()
        if self.mixes_teacher and loss is not None and TEACHER not in loss.requires:
            found.append(
                "rollout.source=mixture draws tokens from the teacher, too, and the loss reads no model.teacher; give "
                "a loss that reads it, or rollout.source=student"
            )
        if self.replay.adaptive and self.replay.start > self.fraction:
            found.append(
                f"rollout.replay.start is {self.replay.start:g}, above rollout.fraction={self.fraction:g}, up to which "
                "the student's share rises; lower it, or raise rollout.fraction"
            )
        if self.per_prompt > 1 and self.on_policy and not self.own_rows_alone:
            share = "adapts" if self.replay.adaptive else f"is {self.fraction:g}"
            found.append(
                f"rollout.per_prompt is {self.per_prompt} and the student's share of rows {share}: rows of the data "
                "have one response; give rollout.per_prompt=1, or rollout.fraction=1 without rollout.replay.adaptive"
            )
        if self.static_cache and self.on_policy and self.engine == "vllm":
            found.append(
                "rollout.static_cache=true is for rollout.engine=own; a vLLM server has its own cache: leave it out"
            )
        if self.per_prompt > 1 and not self.decoding.do_sample:
            found.append(
                f"rollout.per_prompt is {self.per_prompt}, but without sampling all responses to a prompt are the "
                "same; give rollout.decoding.do_sample=true or rollout.per_prompt=1"
            )
        return found

    def prompts_per_step(self, rows: int, pairs: bool) -> int:
        """Return the number of prompts that fill an optimiser step of ``rows`` rows over all ranks.

        Args:
            rows: data.batch_size times accumulated micro-batches times ranks.
            pairs: each response of the student comes with the data's.

        Raises:
            ValueError: none does, or too few are the student's.
        """
        prompts, over = divmod(rows, self.per_prompt * (2 if pairs else 1))
        if over:
            raise ValueError(
                f"an optimiser step has {rows} rows{' in pairs' if pairs else ''}, which is not a multiple of "
                f"rollout.per_prompt = {self.per_prompt}; change it, data.batch_size or trainer.accumulate_grad_batches"
            )
        if not round(self.fraction * prompts):
            raise ValueError(
                f"rollout.fraction is {self.fraction:g} of {prompts} rows a step, less than half a row; raise it, or "
                "give rollout=none"
            )
        return prompts

    def _unused_problems(self) -> list[str]:
        """Return a sentence if settings of rollouts are given and nothing is rolled out."""
        given = {
            "source=mixture": self.source == "mixture",
            "engine=vllm": self.engine == "vllm",
            "static_cache=true": self.static_cache,
            f"replay.size={self.replay.size}": self.replay.size > 0,
            "replay.adaptive=true": self.replay.adaptive,
        }
        named = [f"rollout.{key}" for key, is_given in given.items() if is_given]
        if not named:
            return []
        return [
            f"{', '.join(named)} would have no effect: rollout.fraction is 0, so the student writes nothing; give "
            "rollout=student, or leave it out"
        ]

    def _pair_problems(self) -> list[str]:
        compares = "the loss compares the data's response to each prompt with the student's own, and"
        if not self.own_rows_alone:
            given = (
                "rollout.replay.adaptive is true" if self.replay.adaptive else f"rollout.fraction is {self.fraction:g}"
            )
            return [f"{compares} {given}; give rollout=student with rollout.fraction=1, or another loss"]
        found = []
        if self.mixes_teacher:
            found.append(f"{compares} rollout.source is mixture; give rollout.source=student")
        if self.replay.size:
            found.append(
                f"{compares} rollout.replay.size={self.replay.size} brings back responses to other prompts; give "
                "rollout.replay.size=0"
            )
        return found

    def _ratio_problems(self, loss: Loss) -> list[str]:
        if not self.replay.size or not loss.has_unbounded_ratios:
            return []
        return [
            f"rollout.replay.size={self.replay.size} brings back tokens of a student many steps older, and with "
            "loss.ratio_clip=null the weight of such a token has no bound; give loss.ratio_clip=0.2, or "
            "rollout.replay.size=0"
        ]

    def _sampling_problems(self) -> list[str]:
        if self.fraction < 1:
            return [
                f"the loss learns from tokens that the student sampled, and rollout.fraction is {self.fraction:g}; "
                "give rollout=student with rollout.fraction=1, or a loss of given responses"
            ]
        if self.replay.adaptive:
            return [
                "the loss learns from tokens that the student sampled, and rollout.replay.adaptive=true leaves some "
                "rows the data's responses; give rollout.replay.adaptive=false, or a loss of given responses"
            ]
        if self.decoding.keeps_distribution:
            return []
        return [
            "the loss learns from samples of the student's own distribution, and rollout.decoding changes it; give "
            "do_sample: true, temperature: 1, top_k: 0, top_p: 1, no_repeat_ngram_size: 0, or a loss of whole "
            "distributions, such as kd_reverse"
        ]
