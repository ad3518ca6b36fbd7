"""Whether a run's curriculum can order its recordings at all. Imports neither torch nor numpy."""

from __future__ import annotations

from xded.config import Config


def unordered_by_targets(config: Config, spelled_only: bool) -> tuple[str, str] | None:
    """Why a run's targets cannot tell how hard its recordings are, and what to do; none where they can or need not.

    Args:
        config: of the run; spelled_only: whether its targets leave out recordings (`target.spelled_only`).
    """
    asked = config.train.curriculum
    if asked.schedule == "none" or asked.difficulty != "targets":
        return None
    other = "set train.curriculum.difficulty to parent, duration or random."
    if not (config.objective.ctc_kd or config.objective.decoder_kd):
        return (
            "orders recordings by targets of ctc_kd or decoder_kd (train.curriculum.difficulty), and has none.",
            f"Give it objective.ctc_kd or objective.decoder_kd, or {other}",
        )
    if spelled_only:
        return (
            "orders recordings by their targets (train.curriculum.difficulty), and spelled_only leaves some without "
            "one.",
            f"Make the targets without spelled_only, or {other}",
        )
    return None
