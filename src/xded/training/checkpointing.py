"""How Lightning saves and loads a run: through `models.checkpoints`, with this project's key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from xded.models.checkpoints import load, save, sidecar

PREFIX = "student."  # of the recogniser inside Lightning's state dict
AUXILIARY = "auxiliary"  # key of what parts of the loss learn beside it
TO_GO_ON = {AUXILIARY, "optimizer_states"}  # two thirds of a checkpoint, in latest.pt alone


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's saving and loading through `save` and `load`, with this project's key names."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes what `trainer.save_checkpoint` collected; the run's own keys were added by the module."""
        weights = checkpoint["state_dict"].items()
        state = {key.removeprefix(PREFIX): value for key, value in weights if key.startswith(PREFIX)}
        # position and learning rate are pure functions of `batch`; Lightning's own counts start anew at a resume
        left_out = {"state_dict", "loops", "callbacks", "lr_schedulers", "global_step"}
        latest = Path(path).name == "latest.pt"
        left_out |= set() if latest else TO_GO_ON
        kept = {key: value for key, value in checkpoint.items() if key not in left_out}
        save({**kept, "model_state_dict": state}, Path(path), keep_previous=latest)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint."""
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Deletes a checkpoint and its hash."""
        Path(path).unlink(missing_ok=True)
        sidecar(Path(path)).unlink(missing_ok=True)
