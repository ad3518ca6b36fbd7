"""Pieces of a study on a Ray cluster (extra `ray`): several machines that see the same folders.

Nothing is opened to other machines unless an address of a cluster is given: without one, Ray runs on this machine only.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from ipaddress import ip_address
from typing import Any

from xded.errors import EXIT_FAILURE
from xded.study.engine import do
from xded.study.plan import StudyError
from xded.study.steps import Kind, Step
from xded.training.loop import InterruptedRunError

LOOPBACK = "127.0.0.1"
KNOCK_S = 10.0
GPU_KINDS: tuple[Kind, ...] = ("parent", "teacher", "attempt", "posteriors", "test")  # the others only read and write


class ClusterError(StudyError):
    """Ray is not installed, or the cluster is not there."""

    exit_code = EXIT_FAILURE


class RayWorkers:
    """Workers of a Ray cluster.

    Args:
        address: of the cluster that this machine belongs to ("auto", "host:6379"); none: this machine alone.
        slots: pieces at once; none: as many as the cluster has CPUs.
        gpus, memory_gb: that a piece with a model is given.

    Raises:
        ClusterError: no Ray, no cluster at the address, or no machine of it that is large enough for a piece.
    """

    lost: tuple[type[Exception], ...]

    def __init__(
        self, address: str | None = None, slots: int | None = None, *, gpus: float = 0.0, memory_gb: float = 2.0
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        if address is None:
            # read when Ray is imported: it then keeps to loopback, as on Windows; else it listens on all interfaces
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        else:
            os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # of a minute; Ray would try 20 times
        try:
            import ray
        except ImportError as error:
            raise ClusterError("Ray is not installed.", "Install it: pip install 'xded[ray]'.") from error
        self._ray: Any = ray
        self.address, self.wanted = address, slots
        self.gpus, self.memory_bytes = gpus, int(memory_gb * 2**30)
        errors = ray.exceptions
        self.lost = (
            errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, InterruptedRunError,
        )  # fmt: skip
        self._connect()
        try:
            self._require_loopback()
            self._require_room()
        except ClusterError:
            self.close()
            raise
        self.slots = slots or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._do: Any = ray.remote(max_retries=0)(do)

    def _connect(self) -> None:
        runtime = {"env_vars": {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}}
        try:
            if self.address is not None:
                asyncio.run(_knock(self.address))
            if self.address is None:
                self._ray.init(
                    num_cpus=self.wanted, include_dashboard=False, log_to_driver=False, logging_level="error",
                    _node_ip_address=LOOPBACK, runtime_env=runtime,
                )  # fmt: skip
            else:
                self._ray.init(
                    address=self.address, log_to_driver=False, logging_level="error", runtime_env=runtime
                )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise ClusterError(
                f"No Ray cluster answers at {self.address or 'this machine'}: {why}.",
                "Start one ('ray start --head'), or leave out --engine ray: what is finished is kept.",
            ) from error

    def _require_loopback(self) -> None:
        """Without a cluster's address, nothing may be open to other machines."""
        where = self._ray.util.get_node_ip_address()
        if self.address is None and not ip_address(where).is_loopback:
            raise ClusterError(
                f"Ray listens at {where}, where other machines may reach it.",
                "It was imported before xded asked for it: use a new process.",
            )

    def _require_room(self) -> None:
        """A piece that fits on no machine would wait for ever."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for name, asked, unit in (("GPU", self.gpus, 1), ("memory", self.memory_bytes, 2**30)):
            most = max((machine.get(name, 0.0) for machine in machines), default=0.0)
            if most < asked:
                what = "GPUs" if name == "GPU" else "GB of memory"
                flag = "--gpus" if name == "GPU" else "--memory-gb"
                raise ClusterError(
                    f"No machine of the cluster has {asked / unit:g} {what} for a piece; the largest has "
                    f"{most / unit:.1f}.",
                    f"Give less with {flag}, or add machines.",
                )

    def submit(self, step: Step) -> Future[float]:
        """Starts a piece where there is room.

        Raises:
            ClusterError: the cluster is gone.
        """
        gpus = self.gpus if step.kind in GPU_KINDS else 0
        task = self._do.options(name=step.title, num_cpus=1, num_gpus=gpus, memory=self.memory_bytes)
        try:
            inner: Future[float] = task.remote(step).future()
        except (ConnectionError, self._ray.exceptions.RaySystemError) as error:
            raise ClusterError(
                f"The Ray cluster is gone: {str(error).splitlines()[0]}.",
                "Give the same command again when it is back: what is finished is kept.",
            ) from error
        outer: Future[float] = Future()
        inner.add_done_callback(lambda done: _pass_on(done, outer))
        return outer

    def close(self) -> None:
        """Leaves the cluster, which ends what is under way there."""
        self._ray.shutdown()


async def _knock(address: str) -> None:
    """Raises OSError when nothing listens at host:port; Ray would try for ten minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        async with asyncio.timeout(KNOCK_S):
            _, writer = await asyncio.open_connection(host.rpartition("/")[2].strip("[]"), int(port))
        writer.close()


def _pass_on(done: Future[float], outer: Future[float]) -> None:
    """The piece's own error in place of Ray's, which carries the remote traceback as its text."""
    error = done.exception()
    if error is None:
        outer.set_result(done.result())
    else:
        cause = getattr(error, "cause", None)
        outer.set_exception(cause if isinstance(cause, BaseException) else error)
