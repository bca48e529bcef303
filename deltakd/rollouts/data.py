"""The data module of a run whose student answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from transformers import PreTrainedTokenizerBase

from deltakd.data.batches.data_module import DistillationData
from deltakd.data.batches.sampler import Sampler, StepSampler
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.two_tokenizers import TwoTokenizers
from deltakd.models import LanguageModel
from deltakd.models.tokenizers import pad_id
from deltakd.rollouts.engine import Engine, OwnEngine
from deltakd.rollouts.rollout_loader import RolloutLoader
from deltakd.rollouts.settings import RolloutSettings
from deltakd.rollouts.vllm_engine import VllmEngine
from deltakd.types import TEACHER


@runtime_checkable
class Answering(Protocol):
    """The part of the Lightning module that rollouts use."""

    def whole_student(self) -> AbstractContextManager[LanguageModel]:
        """Yield the student in eval mode, whole on this rank. Collective: call on every rank."""
        ...


class Lending(Protocol):
    """References that lend a model, such as ``LiveReferences``."""

    def whole(self, role: str) -> AbstractContextManager[LanguageModel]:
        """Yield a model that this rank can run alone. Collective: call on every rank."""
        ...


@final
class RolloutData(DistillationData):
    """Hands out this rank's rollouts; validation uses the responses in the data.

    Args:
        train, val, accumulate, seed, max_epochs, max_steps, world_size: as for ``DistillationData``; an epoch is a pass
            over the prompts.
        tokenizer: the student's.
        vocabulary: V.
        settings: of the rollouts.
        batch_size: rows per process and micro-batch.
        longest: most tokens of prompt and response together.
        log_probs: record each sampled token's log-prob where the student at that step did not sample it alone.
        pairs: the loss compares the data's responses with the student's.
        weights_dir: for the files by which a server gets the student's weights.
        references: lend the teacher, if tokens are drawn from a mixture with it.
        tokenizers: as for ``RolloutLoader``.
    """

    def __init__(
        self,
        train: EncodedSet,
        val: EncodedSet | None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        settings: RolloutSettings,
        batch_size: int,
        accumulate: int,
        seed: int,
        max_epochs: float | None,
        max_steps: int | None,
        longest: int,
        log_probs: bool,
        weights_dir: Path,
        pairs: bool = False,
        world_size: int | None = None,
        references: Lending | None = None,
        tokenizers: TwoTokenizers | None = None,
    ) -> None:
        super().__init__(
            train,
            val,
            pad_id(tokenizer, vocabulary),
            batch_size,
            accumulate,
            seed,
            max_epochs,
            max_steps,
            world_size=world_size,
        )
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.settings = settings
        self.longest = longest
        self.log_probs = log_probs
        self.pairs = pairs
        self.weights_dir = weights_dir
        self.references = references
        self.tokenizers = tokenizers
        self.loader: RolloutLoader | None = None

    def _make_sampler(self, rank: int, world_size: int) -> Sampler:
        assert self.batch_size is not None
        rows = self.batch_size * self.accumulate * world_size
        prompts = self.settings.prompts_per_step(rows, self.pairs)
        # The loader deals out a step's prompts once the lengths of their responses are known.
        return StepSampler(
            self.train.lengths,
            self.train.valid_tokens,
            batch_size=prompts,
            accumulate=1,
            world_size=1,
            rank=0,
            seed=self.seed,
            epochs=self.max_epochs,
            max_steps=self.max_steps,
            group_by_length=False,
        )

    def train_dataloader(self) -> Any:
        """Return the micro-batches of the whole run."""
        assert self.trainer is not None, "rollouts need the trainer's module"
        assert self.batch_size is not None
        rank, world_size = self._place()
        sampler = self.sampler()
        assert isinstance(sampler, StepSampler)
        self.loader = RolloutLoader(
            self.train,
            sampler,
            self._make_engine(),
            self.settings,
            pad_id=self.pad_id,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            pairs=self.pairs,
            tokenizers=self.tokenizers,
            prepare=self._prepare,
            ahead=self.batches_ahead,
        )
        return self.loader

    def _make_engine(self) -> Engine:
        keeps_log_probs = self.log_probs and self.settings.needs_ratios
        shared = (self._whole_student, self.tokenizer, self.settings, self.vocabulary, self.longest, keeps_log_probs)
        if self.settings.engine == "vllm":
            return VllmEngine(*shared, self.weights_dir)
        return OwnEngine(*shared, self._whole_teacher if self.settings.mixes_teacher else None)

    def _whole_teacher(self) -> AbstractContextManager[LanguageModel]:
        assert self.references is not None, "a mixture needs references that lend the teacher"
        return self.references.whole(TEACHER)

    @contextmanager
    def _whole_student(self) -> Iterator[LanguageModel]:
        """Yield the student being trained, at its training precision.

        Raises:
            TypeError: the trainer's module can't lend its student.
        """
        assert self.trainer is not None, "rollouts need the trainer's module"
        module = self.trainer.lightning_module
        if not isinstance(module, Answering):
            raise TypeError(f"rollouts need a module with whole_student(), and {type(module).__name__} has none")
        with module.whole_student() as student, self.trainer.precision_plugin.forward_context():
            yield student
