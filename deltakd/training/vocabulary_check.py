"""What a run can't do with the tokenizers of its models; needs neither weights nor Lightning."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig
from deltakd.data.encoding.token_texts import TokenTexts, UnalignableError
from deltakd.models.roles import OWN_ROLES, Vocabularies
from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import Loss


def vocabulary_problems(
    vocabularies: Vocabularies,
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    data: DataConfig,
    rollout: RolloutSettings,
) -> list[str]:
    """Return what a run can't do with the tokenizers of its models, one sentence each.

    Args:
        vocabularies: of the models.
        tokenizer: the student's.
        loss: decides which teachers are read.
        data: the group ``data``.
        rollout: the group ``rollout``.
    """
    if vocabularies.other is None:
        # The baseline of a study, such as sft, has its settings and reads no teacher.
        return data.one_tokenizer_problems() if loss.requires - set(OWN_ROLES) else []
    problems = data.two_tokenizers_problems()
    for one in (tokenizer, vocabularies.other):
        try:
            TokenTexts(one, "")
        except UnalignableError as error:
            problems.append(str(error))
    if rollout.mixes_teacher:
        problems.append(
            "rollout.source=mixture draws each token from the student and the teacher, but the teachers have another "
            "tokenizer and can't vote on the student's tokens; give rollout.source=student, or models that share one "
            "tokenizer"
        )
    return problems
