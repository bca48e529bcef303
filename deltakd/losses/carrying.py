"""Carries next-token probabilities from the teachers' vocabulary to the student's (docs/design.md#two-tokenizers)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltakd.types import TokenMap


@dataclass(frozen=True)
class Carrier:
    """The map of two vocabularies, grouped by the student's tokens.

    The text that a teacher's token stands for begins, in the student's tokenizer, with one of the student's tokens. So
    its probability belongs to that token. A student's token to which nothing belongs is longer than every token of the
    teachers that begins its text.

    Args:
        vocabulary: V of the student.
        single, single_members: the student's tokens to which one teacher's token belongs, and these.
        many: the student's tokens to which several belong.
        members, lengths, group: these tokens, group after group; the groups' lengths; each member's group.
        empty: the student's tokens to which nothing belongs but whose text a teacher's token begins.
        beginnings: these tokens of the teachers.
    """

    vocabulary: int
    single: Tensor
    single_members: Tensor
    many: Tensor
    members: Tensor
    lengths: Tensor
    group: Tensor
    empty: Tensor
    beginnings: Tensor

    @classmethod
    def of(cls, token_map: TokenMap) -> Carrier:
        """Group a map's tokens, on its device. On a GPU this waits, so do it once."""
        to, vocabulary = token_map.student_of_other, len(token_map.other_of_student)
        placed = torch.where(to >= 0)[0]
        counts = torch.bincount(to[placed], minlength=vocabulary)
        order = placed[torch.argsort(to[placed], stable=True)]
        count_of_ordered = counts[to[order]]
        many = torch.where(counts > 1)[0]
        group = torch.repeat_interleave(torch.arange(len(many), device=to.device), counts[many])
        alone = order[count_of_ordered == 1]
        empty = torch.where((counts == 0) & (token_map.other_of_student >= 0))[0]
        return cls(
            vocabulary,
            to[alone],
            alone,
            many,
            order[count_of_ordered > 1],
            counts[many],
            group,
            empty,
            token_map.other_of_student[empty],
        )

    def carried(self, log_p_KV: Tensor) -> Tensor:
        """Sum the probabilities of the tokens that belong to each of the student's: [K, V of the student], in logs.

        A probability that belongs to one token alone arrives as it is, to the last bit.
        """
        carried_KV = log_p_KV.new_full((len(log_p_KV), self.vocabulary), -torch.inf)
        carried_KV[:, self.single] = log_p_KV[:, self.single_members]
        if len(self.many):
            # Sums by segments, not by atomic additions: on a GPU these would differ from run to run.
            members_VK = log_p_KV[:, self.members].T.contiguous()
            # Unsafe: unchecked lengths, which a GPU would have to wait for.
            largest_VK = torch.segment_reduce(members_VK, "max", lengths=self.lengths, axis=0, unsafe=True)
            largest_VK = largest_VK.masked_fill(torch.isneginf(largest_VK), 0.0)
            scaled_VK = members_VK.sub_(largest_VK[self.group]).exp_()
            total_VK = torch.segment_reduce(scaled_VK, "sum", lengths=self.lengths, axis=0, unsafe=True)
            carried_KV[:, self.many] = (total_VK.log() + largest_VK).T
        return carried_KV
