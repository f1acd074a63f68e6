"""Embeds prompts by the model's own token embeddings, which a thread reads when a front end starts.

Until they are read, and for a checkpoint whose table cannot be, prompts have no embedding: they are routed by load
alone, and nothing fails. Knows files and a thread; what an embedding is, cluster/semantics decides.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.logs import log_event
from cluster.model.safetensors_index import TensorRef, read_index
from cluster.semantics.embedding import TokenEmbeddings
from cluster.semantics.embedding_table import StoredTable, reduce_table

_LOG = logging.getLogger(__name__)
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight")


class PromptEmbedder:
    """`embed` for one model. Reads in the background; `wait` is for those who cannot do without."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """Args: vocab_size: rows that the table must have at least; 0: not known."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._embeddings: TokenEmbeddings | None = None
        self._thread = threading.Thread(target=self._load, name="token embeddings", daemon=True)
        self._thread.start()

    def embed(self, prompt_ids: Sequence[int]) -> bytes:
        """What the prompt means (cluster/semantics/embedding.py); empty until, or where, tokens have no embeddings."""
        embeddings = self._embeddings
        return b"" if embeddings is None else embeddings.embed(prompt_ids)

    def wait(self, timeout_s: float) -> bool:
        """Until the table is read or cannot be; whether prompts have embeddings now."""
        self._thread.join(timeout_s)
        return self._embeddings is not None

    def _load(self) -> None:
        try:
            self._embeddings = reduce_table(_find_table(self._directory, self._vocab_size))
        except Exception as error:  # noqa: BLE001 - prompts go without; whatever is wrong with the file is said once
            reason = error.message if isinstance(error, CheckpointError) else repr(error)
            log_event(_LOG, logging.WARNING, "prompts have no embeddings: routing goes by load alone", reason=reason)


def _find_table(directory: Path, vocab_size: int) -> StoredTable:
    """The input embeddings. Tied ones are stored by this name too; it is the output head that has none then."""
    tables = [
        ref for name, ref in read_index(directory).items() if name.endswith(_NAMES) and _is_table(ref, vocab_size)
    ]
    if not tables:
        raise CheckpointError(f"{directory}: no token embeddings among its tensors ({', '.join(_NAMES)})")
    table = min(tables, key=lambda ref: len(ref.name))  # the model's own, not that of a part of it
    rows, columns = table.shape
    return StoredTable(table.file, table.offset, rows, columns, table.dtype)


def _is_table(ref: TensorRef, vocab_size: int) -> bool:
    return len(ref.shape) == 2 and ref.shape[0] >= max(vocab_size, 1) and ref.shape[1] > 0
