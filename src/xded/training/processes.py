"""The processes that train one run together, one a device: which one this is, its device, where they meet.

On one machine `launching.launch` has spawned them, on several torchrun or srun has started them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from xded.config import TrainConfig
from xded.errors import ConfigError
from xded.models.recogniser import pick_device

LONGEST_WAIT = timedelta(hours=2)  # for another process, while the first one validates
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is.

    Attributes:
        rank: its number, from 0; count: how many there are; local: its number on this machine.
        meeting: file over which spawned ones find each other; none when it is alone or was started by others.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    meeting: Path | None = None

    @property
    def first(self) -> bool:
        """Whether it is the one that writes, validates and talks."""
        return self.rank == 0


ALONE = Place()


class Spawned(LightningEnvironment):
    """Tells Lightning which of the spawned processes this one is."""

    creates_processes_externally = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def local_rank(self) -> int:
        """Number of this process."""
        return self.place.local

    def node_rank(self) -> int:
        """There is one machine."""
        return 0


def place_of(train: TrainConfig) -> Place | None:
    """Which process this one is; none: the processes of the run have yet to be launched.

    Raises:
        ConfigError: torchrun or srun has started another number of processes than the config says.
    """
    wanted = train.devices * train.nodes
    outer = started_by(wanted)
    if outer is None:
        if train.nodes > 1:
            raise ConfigError(
                f"train.nodes is {train.nodes}, but nothing has started this command on other machines.",
                "Give it on each of them: torchrun --nnodes N --nproc-per-node DEVICES --rdzv-backend c10d "
                "--rdzv-endpoint FIRST_MACHINE:29400 --no-python xded train ..., or with srun.",
            )
        return ALONE if wanted == 1 else None
    if outer.world_size() != wanted:
        raise ConfigError(
            f"{outer.world_size()} processes were started, but train.devices {train.devices} times train.nodes "
            f"{train.nodes} is {wanted}.",
            "Start one process for each device of each machine (--devices, --set train.nodes=N).",
        )
    return Place(outer.global_rank(), wanted, outer.local_rank())


def started_by(wanted: int) -> ClusterEnvironment | None:
    """What has started this process as one of several: torchrun, or srun when several are wanted."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if wanted > 1 and int(os.environ.get("SLURM_NTASKS", "1")) > 1 and SLURMEnvironment.detect():
        return SLURMEnvironment()
    return None


def device_of(train: TrainConfig, place: Place) -> torch.device:
    """Device of this process.

    Raises:
        ConfigError: this machine has no such device, or too few of them.
    """
    if place.count == 1:
        return pick_device(train.device)
    there = torch.cuda.device_count()
    if train.device in ("auto", "cuda") and there:
        if there < train.devices:
            raise ConfigError(f"This machine has {there} GPUs, not {train.devices}.", f"Use --devices {there}.")
        torch.cuda.set_device(place.local)
        return torch.device("cuda", place.local)
    device = pick_device(train.device)
    if device.type != "cpu":
        raise ConfigError(
            f"device '{train.device}' is one device, and train.devices is {train.devices}.",
            "Use --device cuda or --device cpu, or --devices 1.",
        )
    return device


def strategy_of(
    place: Place, device: torch.device, some_unused: bool
) -> tuple[DDPStrategy | str, list[ClusterEnvironment]]:
    """Lightning's strategy for this process, and plugins that go with it; spawned processes meet here.

    Args:
        place, device: of this process.
        some_unused: whether some parameters receive no gradient (frozen, or not used by the objective).
    """
    if place.count == 1:
        return "auto", []
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.meeting is not None:
        # a file and the loopback device: nothing that another machine could connect to is opened
        os.environ.setdefault(f"{backend.upper()}_SOCKET_IFNAME", LOOPBACK)
        dist.init_process_group(
            backend,
            init_method=place.meeting.as_uri(),
            rank=place.rank,
            world_size=place.count,
            timeout=LONGEST_WAIT,
            device_id=device if device.type == "cuda" else None,
        )
    strategy = DDPStrategy(
        process_group_backend=backend,
        timeout=LONGEST_WAIT,
        broadcast_buffers=False,  # batch norm has the same statistics everywhere
        find_unused_parameters=some_unused,
    )
    environment = Spawned(place) if place.meeting is not None else started_by(place.count)
    return strategy, [] if environment is None else [environment]
