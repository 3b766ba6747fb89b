"""Where shards are packed: in this process, in processes of this machine, or on every core of a Ray cluster.

An executor takes jobs and yields the `Result` of each shard when it ends, in any order.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.metadata import version
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, first_line
from tools.shards import PLAN_FILE, Job, Result, is_done, pack_shard

# What workers need. One process imports it, and the workers are its copies.
PRELOADED = ["tools.interrupt", "tools.clips", "tools.videos", "tools.tars"]
RETRIES = 5  # for a shard whose Ray worker or node died
CONNECT = 10.0  # seconds for a cluster to answer
UNTIL_SEEN = 120.0  # seconds until a file of another node is seen here; NFS caches absence for 60


def local(jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Pack in this process, or in `workers` new ones."""
    context = prepare(jobs, workers)
    if context is None:
        yield from map(pack_shard, jobs)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _follow_parent)
    try:
        for future in as_completed([pool.submit(pack_shard, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(jobs: Sequence[Job], workers: int) -> BaseContext | None:
    """Start the process that the workers of `local` are copies of; its imports take a second.

    None if one process is enough.
    """
    if workers == 1 or len(jobs) < 2:
        return None
    context = multiprocessing.get_context("forkserver")
    # It loads torch's library; clips seldom need it, pictures nearly always.
    context.set_forkserver_preload([*PRELOADED, "tools.resize"] if jobs[0].kind == "image" else PRELOADED)
    resource_tracker.ensure_running()  # otherwise the fork server starts it, which unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the fork server imports tools.interrupt
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return context


def _follow_parent() -> None:
    """Start of a worker: it ends on Ctrl-C without a traceback, and with its parent, even a killed one.

    As there is a worker per core, each scales in one thread.
    """
    if "tools.resize" in sys.modules:
        from tools.resize import use_one_thread

        use_one_thread()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- Ray -------------------------------------------------------------------------------------------------


def on_ray(jobs: Sequence[Job], address: str, at_once: int | None) -> Iterator[Result]:
    """Pack on a Ray cluster; if a worker or node dies, its shard is packed again elsewhere.

    `at_once` shards are packed at the same time, by default two per core. Raises `UserError`.
    """
    ray = connect(address)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(pack_on_node)
    sources = (job.root / sample.source for job in jobs for sample in job.samples)
    example = next(filter(Path.exists, sources), None)
    waiting, running, written = iter(jobs), {}, []
    try:
        while True:
            limit = at_once or max(1, 2 * int(ray.cluster_resources().get("CPU", 0)))
            room = max(0, limit - len(running))
            running |= {task.remote(job, example): job for job in islice(waiting, room)}
            if not running:
                break
            for ended in ray.wait(list(running))[0]:
                job = running.pop(ended)
                result = _result(ray, ended, job)
                written += [] if result.unreadable else [job]
                yield result
    finally:
        ray.shutdown()  # ends the tasks that are still running
    wait_until_seen(written, UNTIL_SEEN)


def connect(address: str) -> Any:
    """The module `ray`, connected to the cluster at `address`. Raises `UserError`."""
    ray: Any = import_module("ray")
    try:
        if address != "auto":  # Ray itself waits for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT).close()
        ray.init(address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster can be joined at --ray {address} ({first_line(error)}); start one on "
            "this machine with ray start --head, on the others with ray start --address HOST:PORT."
        ) from error
    return ray


def _result(ray: Any, ended: Any, job: Job) -> Result:
    """A task's result. Raises the error of its function, or `UserError` if its worker died."""
    try:
        return ray.get(ended)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if cause is not None and not isinstance(cause, ray.exceptions.RayError):
            raise cause from error
        raise UserError(
            f"Ray could not pack shard {job.folder}/{job.shard:06d} in {RETRIES + 1} attempts "
            f"({first_line(cause or error)}), perhaps because a file crashes its decoder, memory is short "
            "or a node lacks the code; run the same command with fewer --workers, finished shards are kept."
        ) from error


def pack_on_node(job: Job, example: Path | None) -> Result:
    """`pack_shard` on a node of the cluster. Raises `UserError` with what the node lacks.

    `example` is a source file that the first machine sees.
    """
    node = socket.gethostname()
    for path in (job.folder.parent / PLAN_FILE, example or job.root):
        if not path.exists():
            raise UserError(f"{node} does not see {path}; mount source and --out on all nodes at one path.")
    for name in ("pillow", "torch", "av"):
        wanted = getattr(job.packing, name, None)
        if wanted and version(name) != wanted:
            raise UserError(
                f"{node} has {name} {version(name)}, not {wanted}, which may write other bytes; "
                "install requirements.lock on all nodes."
            )
    return pack_shard(job)


def wait_until_seen(jobs: Sequence[Job], seconds: float) -> None:
    """Wait until this machine sees the rows of all shards. Raises `UserError` after `seconds`."""
    end = time.monotonic() + seconds
    while missing := next((job for job in jobs if not is_done(job)), None):
        if time.monotonic() > end:
            raise UserError(
                f"shard {missing.folder}/{missing.shard:06d} was packed on another node, not seen here; "
                "mount --out on all nodes, then run the same command again."
            )
        time.sleep(1)
