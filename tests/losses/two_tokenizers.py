"""A world of two toy tokenizers, and the formulas of two tokenizers in NumPy float64. Nothing here calls a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltakd.types import AlignedLogits, AlignedTokens, Alignment, Head, SideTokens, TokenMap
from tests.losses import oracles
from tests.losses.oracles import Array

#: The student lacks "ca", "abc" and "d"; the teachers lack "ab", "bcb" and "e".
STUDENT_VOCABULARY = ["a", "b", "c", "ab", "bc", "bcb", "<end>", "e", "cc"]
TEACHER_VOCABULARY = ["<eos>", "b", "a", "abc", "c", "ca", "bc", "d", "cab", "cc"]
_ENDS = {"<end>", "<eos>"}


def token_map(student: list[str] | None = None, teacher: list[str] | None = None) -> TokenMap:
    student, teacher = student or STUDENT_VOCABULARY, teacher or TEACHER_VOCABULARY

    def beginning(text: str, vocabulary: list[str]) -> int:
        if text in _ENDS:
            return next(i for i, other in enumerate(vocabulary) if other in _ENDS)
        found = [other for other in vocabulary if text.startswith(other)]
        return vocabulary.index(max(found, key=len)) if found else -1

    def same(a: str, b: str) -> bool:
        return a == b or {a, b} <= _ENDS

    pairs = [(i, j) for i, a in enumerate(student) for j, b in enumerate(teacher) if same(a, b)]
    return TokenMap(
        torch.tensor([i for i, _ in pairs]),
        torch.tensor([j for _, j in pairs]),
        torch.tensor([beginning(text, student) for text in teacher]),
        torch.tensor([beginning(text, teacher) for text in student]),
    )


def _cut(text: str, vocabulary: list[str], rng: np.random.Generator) -> list[str]:
    """Cut a text into tokens of a vocabulary, at random where there is a choice."""
    tokens = []
    while text:
        fitting = [token for token in vocabulary if text.startswith(token)]
        tokens.append(fitting[int(rng.integers(len(fitting)))])
        text = text[len(tokens[-1]) :]
    return tokens


def _spans(one: list[str], two: list[str]) -> tuple[list[int], list[int]]:
    ends = [set(np.cumsum([len(token) for token in side]).tolist()) for side in (one, two)]
    shared = sorted(ends[0] & ends[1])
    return tuple(  # type: ignore[return-value]
        [int(np.searchsorted(shared, end)) for end in np.cumsum([len(token) for token in side])] for side in (one, two)
    )


@dataclass
class World:
    """Logits and tokens of a few rows in both tokenizers.

    Args:
        logits: of all roles, float64; the student's want gradients.
        tokens: of both sides.
        spans: (student's tokens, teachers' tokens) of each span, as lists of positions.
    """

    logits: dict[str, Tensor]
    tokens: AlignedTokens
    spans: list[tuple[list[int], list[int]]]

    @property
    def aligned(self) -> AlignedLogits:
        return AlignedLogits(self.logits, {}, self.tokens)

    @property
    def labels(self) -> Tensor:
        return self.tokens.student.labels


def world(seed: int = 0, rows: int = 4, length: int = 20, scale: float = 2.0) -> World:
    """Rows of random text; the last token of each is the end, and one row begins with text that only one side has."""
    rng = np.random.default_rng(seed)
    sides: list[list[tuple[int, int]]] = [[], []]
    spans: list[list[int]] = [[], []]
    for row in range(rows):
        text = "".join(rng.choice(list("abc"), size=length))
        cuts = [_cut(text, vocabulary, rng) for vocabulary in (STUDENT_VOCABULARY[:6], TEACHER_VOCABULARY[1:])]
        numbers = _spans(cuts[0], cuts[1])
        first = 1 + max(spans[0], default=-1)
        vocabularies = (STUDENT_VOCABULARY, TEACHER_VOCABULARY)
        for side, (cut, vocabulary, end) in enumerate(zip(cuts, vocabularies, ("<end>", "<eos>"), strict=True)):
            if row == 1:
                sides[side] += [(row, vocabulary.index("b"))] * (side + 1)
                spans[side] += [-1] * (side + 1)
            sides[side] += [(row, vocabulary.index(token)) for token in [*cut, end]]
            spans[side] += [first + number for number in numbers[side]] + [first + max(numbers[0]) + 1]
    generator = torch.Generator().manual_seed(seed)

    def tokens(side: int) -> SideTokens:
        labels = torch.tensor([token for _, token in sides[side]], dtype=torch.int64)
        return SideTokens(labels, labels.roll(1), torch.tensor([row for row, _ in sides[side]], dtype=torch.int64))

    def draw(side: int) -> Tensor:
        size = (len(sides[side]), len((STUDENT_VOCABULARY, TEACHER_VOCABULARY)[side]))
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    logits = {"student": draw(0).requires_grad_(), "student_raw": draw(0), "teacher": draw(1), "teacher_raw": draw(1)}
    alignment = Alignment.of(*(torch.tensor(side, dtype=torch.int64) for side in spans))
    places = [
        tuple([i for i, span in enumerate(spans[side]) if span == number] for side in (0, 1))
        for number in range(alignment.count)
    ]
    return World(logits, AlignedTokens(tokens(0), tokens(1), alignment, token_map()), places)  # type: ignore[arg-type]


def heads(given: World, seed: int = 0) -> dict[str, Head]:
    """Random heads over the world's tokens; the student's is trained and soft-capped, the teacher's is wider."""
    generator = torch.Generator().manual_seed(seed)

    def head(role: str) -> Head:
        (n, v), width = given.logits[role].shape, 7 if role == "teacher" else 6
        hidden, weight = (torch.randn(size, width, generator=generator, dtype=torch.float64) for size in (n, v))
        trained = role == "student"
        return Head(hidden.requires_grad_(trained), weight.requires_grad_(trained), softcap=5.0 if trained else None)

    return {role: head(role) for role in given.logits}


def equal_tokenizers(logits: dict[str, Tensor], labels: Tensor) -> AlignedLogits:
    """The logits of one tokenizer, as if they were of two."""
    side, spans = SideTokens(labels, labels, torch.zeros_like(labels)), torch.arange(len(labels))
    vocabulary = TokenMap.identity(logits["student"].shape[1])
    return AlignedLogits(logits, {}, AlignedTokens(side, side, Alignment.of(spans, spans), vocabulary))


# --- Formulas


def sorted_distance(p: Array, q: Array) -> float:
    size = max(len(p), len(q))
    one, two = (np.sort(np.concatenate([side, np.zeros(size - len(side))]))[::-1] for side in (p, q))
    return float(np.abs(one - two).sum())


def uld(given: World, pairs: list[tuple[int, int]], tau: float) -> float:
    """Sum over pairs of positions."""
    z = oracles.arrays(given.logits)
    p, q = np.exp(oracles.log_softmax(z["teacher"] / tau)), np.exp(oracles.log_softmax(z["student"] / tau))
    return sum(sorted_distance(p[j], q[i]) for i, j in pairs)


def span_kd(given: World, tau: float, merge: str, divergence: Callable[[Array, Array], Array]) -> tuple[float, float]:
    """(divergence of the shared tokens' log-probs, distance of the rest), summed over the spans."""
    z = oracles.arrays(given.logits)
    log_p, log_q = (oracles.log_softmax(z[role] / tau) for role in ("teacher", "student"))
    ids = given.tokens.token_map
    own_shared, other_shared = ids.student_shared.numpy(), ids.other_shared.numpy()
    totals = [0.0, 0.0]
    for own, theirs in given.spans:
        sides = []
        for places, log, tokens in ((own, log_q, given.tokens.student), (theirs, log_p, given.tokens.other)):
            kept = places[0] if merge == "first" else places[-1]
            scale = math.prod(math.exp(log[i, int(tokens.labels[i])]) for i in places if i != kept)
            sides.append(scale * np.exp(log[kept]))
        q, p = sides
        totals[0] += float(divergence(np.log(p[other_shared])[None], np.log(q[own_shared])[None])[0])
        totals[1] += sorted_distance(np.delete(p, other_shared), np.delete(q, own_shared))
    return totals[0], totals[1]


def span_shift(given: World) -> Array:
    """δ in the student's vocabulary, by events: [N, V]."""
    z = oracles.arrays(given.logits)
    models = [np.exp(oracles.log_softmax(z[role])) for role in ("teacher", "teacher_raw")]
    goes_to = given.tokens.token_map.student_of_other.tolist()
    begins = given.tokens.token_map.other_of_student.tolist()
    shift = np.zeros((len(given.labels), len(STUDENT_VOCABULARY)))
    for own, theirs in given.spans:
        label, x1 = int(given.labels[own[0]]), int(given.tokens.other.labels[theirs[0]])
        events, rests = [], []
        for p in models:
            first = p[theirs[0]]
            span = math.prod(p[j, int(given.tokens.other.labels[j])] for j in theirs)
            mass = np.zeros(len(STUDENT_VOCABULARY))
            for token, goal in enumerate(goes_to):
                if goal >= 0:
                    mass[goal] += first[token] - (span if token == x1 and goal != label else 0.0)
            if goes_to[x1] != label:
                mass[label] += span
            rests.append(span / mass[label])
            # What no token of the teachers goes to shifts with the token that begins its text.
            reached = {goal for goal in goes_to if goal >= 0} | {label}
            events.append(
                [mass[w] if w in reached else first[begins[w]] if begins[w] >= 0 else 1.0 for w in range(len(mass))]
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log(np.array(events[0]) / np.array(events[1]))
        shift[own[0]] = np.where(np.minimum(events[0], events[1]) > 1e-15, ratio, 0.0)
        for i in own[1:]:
            c, c0 = (rest ** (1 / (len(own) - 1)) for rest in rests)
            shift[i] = math.log((1 - c) / (1 - c0)) if min(1 - c, 1 - c0) > 1e-12 else 0.0
            shift[i, int(given.labels[i])] = math.log(c / c0)
    return shift


def dual_space(
    given: World, given_heads: dict[str, Head], projectors: dict[str, Array], tau: float
) -> dict[str, float]:
    """DSKD with cross-model attention, row by row: the three terms, and where the projected teacher is right."""

    def embedded(weight: Array, side: SideTokens, own: Array) -> tuple[Array, Array]:
        return weight[side.previous.numpy()[own]], weight[side.labels.numpy()[own]]

    student, teacher = (given_heads[role] for role in ("student", "teacher"))
    own_w, their_w = (head.weight.detach().numpy() for head in (student, teacher))

    def linear(name: str, x: Array) -> Array:
        return x @ projectors[f"{name}.weight"].T + projectors[f"{name}.bias"]

    def logits(head: Head, hidden: Array) -> Array:
        z = hidden @ head.weight.detach().numpy().T
        return z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)

    totals = dict.fromkeys(("projected_ce", "student_space", "teacher_space", "projected_agreement"), 0.0)
    for row in set(given.tokens.student.rows.tolist()):
        own = given.tokens.student.rows.numpy() == row
        theirs = given.tokens.other.rows.numpy() == row
        before, label = embedded(their_w, given.tokens.other, theirs)
        key = np.concatenate([before, label], 1)
        h_s, h_t = student.hidden.detach().numpy()[own], teacher.hidden.detach().numpy()[theirs]
        query = linear("query", np.concatenate(embedded(own_w, given.tokens.student, own), 1))
        scores = query @ (key / key.std(ddof=1)).T / math.sqrt(2 * h_t.shape[1])
        value = linear("t2s", h_t / h_t.std(ddof=1) + label / label.std(ddof=1))
        to_student = logits(student, np.exp(oracles.log_softmax(scores)) @ value)
        to_teacher = logits(teacher, np.exp(oracles.log_softmax(scores.T)) @ linear("s2t", h_s))
        labels = given.labels.numpy()[own]
        right = to_student.argmax(1) == labels
        totals["projected_ce"] += oracles.cross_entropy(to_student, labels).sum()
        totals["projected_agreement"] += right.sum()
        p, q = (oracles.log_softmax(z / tau) for z in (to_student, logits(student, h_s)))
        totals["student_space"] += (oracles.forward_kl(p, q) * right).sum()
        p, q = (oracles.log_softmax(z / tau) for z in (logits(teacher, h_t), to_teacher))
        totals["teacher_space"] += oracles.forward_kl(p, q).sum()
    return totals
