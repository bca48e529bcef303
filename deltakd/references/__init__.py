"""References: the frozen companions of the student, as sources of heads."""

from deltakd.references.base import References
from deltakd.references.live import LiveReferences

__all__ = ["LiveReferences", "References"]
