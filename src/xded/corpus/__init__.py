"""Recordings: the manifest, importers, checks, the synthetic corpus, the dysarthria simulator, folds."""
