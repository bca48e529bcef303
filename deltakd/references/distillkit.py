"""Log-probs as DistillKit compresses them (github.com/arcee-ai/DistillKit, ``distillkit/compression``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltakd.io.yaml_files import read_yaml

#: Their sampler writes it next to its files.
CONFIG = "compression_config.yaml"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_SPECIAL = {"sqrt": torch.sqrt, "exp": torch.exp}


@dataclass(frozen=True)
class Bin:
    """Quantised residuals of consecutive tokens, with one scale.

    Args:
        scale_dtype: of the scale.
        element_bits: of each residual.
        num_elements: their number.
    """

    scale_dtype: torch.dtype
    element_bits: int
    num_elements: int

    @property
    def bytes(self) -> int:
        """Bytes of the residuals, without the scale."""
        return (self.num_elements * self.element_bits + 7) // 8


@dataclass(frozen=True)
class Compression:
    """How a data set was compressed: the names are DistillKit's own (``DistributionQuantizationConfig``).

    Args:
        d: size of the vocabulary.
        k: tokens at each position, in descending order.
        exact_k: of these, the first ones are kept as they are.
        exact_dtype: their type.
        polynomial_terms: of the curve through the others, over their rank from 0: powers, or ``sqrt`` and ``exp``.
        term_dtype: type of its coefficients.
        residual_bins: what the curve leaves over.
        delta_encoding: each value is the difference from the one before.
        normalize_t: ranks go from 0 to 1.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    polynomial_terms: tuple[int | str, ...]
    term_dtype: torch.dtype
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def read(cls, folder: Path) -> Compression:
        """Read the file that DistillKit's sampler puts next to its data.

        Raises:
            ValueError: it is not there, or is none.
        """
        file = folder / CONFIG
        if not file.is_file():
            raise ValueError(
                f"{folder} has no {CONFIG}, without which DistillKit's compressed log-probs can't be read; copy it "
                "there from where they were made"
            )
        try:
            return cls.of(read_yaml(file))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} is not a configuration of DistillKit's compression: {error}") from None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Compression:
        """Return the compression of a mapping as in their YAML; absent keys have their defaults."""
        bins = [
            Bin(_DTYPES[one["scale_dtype"]], int(one["element_bits"]), int(one["num_elements"]))
            for one in given["residual_bins"] or ()
        ]
        terms = tuple(given.get("polynomial_terms") or ())
        unknown = [term for term in terms if not isinstance(term, int) and term not in _SPECIAL]
        if unknown:
            raise ValueError(f"the polynomial term {unknown[0]!r} is unknown")
        return cls(
            d=int(given["d"]),
            k=int(given["k"]),
            exact_k=int(given["exact_k"]),
            exact_dtype=_DTYPES[given.get("exact_dtype", "float32")],
            polynomial_terms=terms,
            term_dtype=_DTYPES[given.get("term_dtype", "float32")],
            residual_bins=tuple(bins),
            delta_encoding=bool(given.get("delta_encoding", True)),
            normalize_t=bool(given.get("normalize_t", False)),
        )

    @property
    def index_bits(self) -> int:
        """Bits of a token id."""
        return math.ceil(math.log2(self.d))

    @property
    def log_prob_bytes(self) -> int:
        """Bytes of the log-probs of a position."""
        found = self.exact_k * self.exact_dtype.itemsize + len(self.polynomial_terms) * self.term_dtype.itemsize
        return found + sum(one.scale_dtype.itemsize + one.bytes for one in self.residual_bins)

    def ids(self, packed: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the token ids [T, k] of ``bytepacked_indices`` [T, bytes]."""
        return _unpacked(packed, self.index_bits, self.k)

    def log_probs(self, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the log-probs [T, k] of ``compressed_logprobs`` [T, bytes]."""
        reader = _Reader(torch.from_numpy(np.array(packed)))
        exact = reader.take(self.exact_k, self.exact_dtype).float()
        approximate = torch.zeros(len(packed), self.k - self.exact_k)
        if self.polynomial_terms:
            coefficients = reader.take(len(self.polynomial_terms), self.term_dtype)
            approximate = (self._curves() * coefficients.unsqueeze(-2)).sum(-1).float()
        start = 0
        for one in self.residual_bins:
            scale = reader.take(1, one.scale_dtype).float()
            steps = _unpacked(reader.take(one.bytes, torch.uint8).numpy(), one.element_bits, one.num_elements)
            centred = 2 * steps - 1 if one.element_bits == 1 else steps - 2 ** (one.element_bits - 1)
            approximate[:, start : start + one.num_elements] += torch.from_numpy(centred).float() * scale
            start += one.num_elements
        values = torch.cat([exact, approximate], dim=-1)
        return (values.cumsum(-1) if self.delta_encoding else values).numpy()

    def _curves(self) -> Tensor:
        """Return the terms at each rank, [k − exact_k, terms], in the type in which the coefficients were fitted."""
        count = self.k - self.exact_k
        ranks = torch.linspace(0, 1, count) if self.normalize_t else torch.arange(count, dtype=torch.float32)
        ranks = ranks.to(self.term_dtype) if self.term_dtype != torch.float64 else ranks.double()
        terms = [ranks**term if isinstance(term, int) else _SPECIAL[term](ranks) for term in self.polynomial_terms]
        return torch.stack(terms, dim=-1)


class _Reader:
    """Reads numbers off the front of each position's bytes [T, bytes]."""

    def __init__(self, content: Tensor) -> None:
        self._content = content
        self._at = 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return the next ``count`` numbers, [T, count]."""
        end = self._at + count * dtype.itemsize
        part, self._at = self._content[:, self._at : end].contiguous(), end
        return part.view(dtype) if count else torch.empty(len(part), 0, dtype=dtype)


def _unpacked(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` numbers of some bits each, [T, count], the highest bit first, from [T, bytes]."""
    found = np.unpackbits(packed, axis=-1)[:, : count * bits].reshape(len(packed), count, bits)
    return found.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
