"""Delta Knowledge Distillation of language models (arXiv 2509.14526).

``distill`` trains a student from Python; ``prepare`` loads models and data for a ``lightning.Trainer`` of one's own.
Both are imported on first use, along with torch and transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltakd.api import Prepared, Run, distill, prepare

__all__ = ["Prepared", "Run", "distill", "prepare"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from deltakd import api

        return getattr(api, name)
    raise AttributeError(f"module 'deltakd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
