"""The base of losses that mix cross-entropy with a term over two tokenizers."""

from __future__ import annotations

from deltakd.losses.mixing import LabelMixture


class SpanMixture(LabelMixture):
    """λ · CE(labels) + (1 − λ) · term over spans. At λ = 1 it is SFT and needs no alignment."""

    @property
    def needs_alignment(self) -> bool:  # type: ignore[override]
        """True unless λ = 1."""
        return self.ce_weight < 1.0

    @property
    def term_whole_vocabulary_reasons(self) -> tuple[str, ...]:
        return ("a loss of two tokenizers compares whole vocabularies",)
