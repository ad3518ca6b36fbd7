"""A corpus written for another toolkit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from xded.corpus import hugging_face_dataset, kaldi, lhotse, speechbrain_csv
from xded.corpus.manifest import MANIFEST_NAME, Corpus, write_manifest


def _nemo(corpus: Corpus, folder: Path) -> list[Path]:
    """Our own manifest is a NeMo manifest with more keys."""
    write_manifest(folder / MANIFEST_NAME, corpus.recordings)
    return [folder / MANIFEST_NAME]


WRITERS: Final[dict[str, Callable[[Corpus, Path], list[Path]]]] = {
    "nemo": _nemo,
    "kaldi": kaldi.write,
    "speechbrain": speechbrain_csv.write,
    "lhotse": lhotse.write,
    "datasets": hugging_face_dataset.write,
}


def write(corpus: Corpus, to: str, folder: Path) -> list[Path]:
    """Writes a corpus in the files of another toolkit (a key of `WRITERS`).

    Returns:
        The lists that were written; of `datasets` the metadata.

    Raises:
        CorpusError: the format cannot hold some recording; nothing is written then.
    """
    return WRITERS[to](corpus, folder)
