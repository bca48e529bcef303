"""Generation with a key-value cache; samples depend on neither batching nor order."""

from deltakd.generation.decoding import Decoding
from deltakd.generation.generator import generate

__all__ = ["Decoding", "generate"]
