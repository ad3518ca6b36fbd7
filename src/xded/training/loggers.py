"""TensorBoard, MLflow and Weights & Biases through Lightning's loggers: they get the rows of metrics.jsonl.

Nothing leaves the machine unasked: MLflow writes files unless MLFLOW_TRACKING_URI names a server, W&B stays offline
unless WANDB_MODE is `online`, and neither reports usage or errors to its makers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from xded.config import Config, LoggerName
from xded.errors import ConfigError
from xded.training.status import write_atomically

# any of the modules will do; the first is the one to install
PACKAGES: Final[dict[LoggerName, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",),
}  # fmt: skip
PROJECT = "xded"
IDENTITY = "{}.id"  # file that holds a run's id in MLflow or W&B, so that a run that goes on stays one run there
PLACE = ("update", "updates", "epochs")
FLUSH_S = 10
MLFLOW_SERVER = "MLFLOW_TRACKING_URI"
# only where the user has not said otherwise; MLflow refuses its own file store without the second
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true",
    "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off",
}  # fmt: skip


def need_packages(names: Iterable[LoggerName]) -> None:
    """Says before any work that a logger's package is missing.

    Raises:
        ConfigError: it is not installed.
    """
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(
                f"train.loggers asks for {name}, which is not installed.",
                f"Install it with 'pip install {PACKAGES[name][0]}', or take it out of train.loggers.",
            )


def mirror_of(config: Config, name: str, out: Path, first_update: int) -> LoggerMirror | None:
    """The loggers of a run, open; none where the config asks for none.

    Args:
        name: of the run; out: its folder; first_update: updates done before, of a run that goes on.

    Raises:
        ConfigError: a package is missing, or a logger cannot be started.
    """
    names = config.train.loggers
    if not names:
        return None
    need_packages(names)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loggers: dict[str, Logger] = {}
    for kind in names:
        try:
            loggers[kind] = _open(kind, name, out, first_update)
            loggers[kind].log_hyperparams(config.model_dump(mode="json"))
        except Exception as error:  # whatever a library or its server raises
            raise ConfigError(
                f"Logger {kind} cannot be started: {type(error).__name__}: {error}.",
                "Mend its settings, or take it out of train.loggers.",
            ) from error
    return LoggerMirror(loggers)


def _open(kind: LoggerName, name: str, out: Path, first_update: int) -> Logger:
    if kind == "tensorboard":
        # purge_step hides what was logged after the checkpoint that the run goes on from
        return TensorBoardLogger(
            out / "tensorboard", name="", version="", default_hp_metric=False,
            purge_step=first_update + 1, flush_secs=FLUSH_S, filename_suffix=f".{first_update}",
        )  # fmt: skip
    path = out / IDENTITY.format(kind)
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    logger: MLFlowLogger | WandbLogger
    if kind == "mlflow":
        asked = os.environ.get(MLFLOW_SERVER)
        where = asked or f"file:{(out / 'mlruns').resolve()}"
        logger = MLFlowLogger(PROJECT, run_name=name, tracking_uri=where, run_id=known)
        identity = logger.run_id
        if not asked:  # MLflow puts its own choice there, and the process's next run would land in this one's folder
            os.environ.pop(MLFLOW_SERVER, None)
    else:
        offline = os.environ.get("WANDB_MODE") != "online"
        logger = WandbLogger(name=name, save_dir=out, offline=offline, project=PROJECT, id=known)
        identity = str(logger.experiment.id)
    if identity != known:
        write_atomically(path, f"{identity}\n")
    return logger


class LoggerMirror:
    """Hands rows to Lightning's loggers; one that fails is said once and left out, the run goes on.

    Args:
        loggers: by name.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self.loggers = dict(loggers)

    def row(self, event: str, row: Mapping[str, Any]) -> list[str]:
        """Takes a row of metrics.jsonl: its numbers as EVENT/NAME at its update."""
        values = numbers(row, f"{event}/")
        problems = []
        for name, logger in list(self.loggers.items()):
            try:
                logger.log_metrics(values, step=row["update"])
            except Exception as error:  # a server that is gone must not end the training
                del self.loggers[name]
                problems.append(f"logger {name} has failed and gets no more rows: {type(error).__name__}: {error}")
        return problems

    def close(self, state: str) -> list[str]:
        """Says to the loggers how the run ended."""
        problems = []
        for name, logger in self.loggers.items():
            try:
                logger.finalize("success" if state == "finished" else "failed")
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish(0 if state == "finished" else 1)  # else the next run would go on in it
            except Exception as error:
                problems.append(f"logger {name} could not be closed: {type(error).__name__}: {error}")
        return problems


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a row by name, those of tables in it as TABLE/NAME; how far and how long the run is, is left out."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in PLACE:
            found[prefix + name] = float(value)
    return found
