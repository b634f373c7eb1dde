"""Where the processes of `Context.map` run: on this machine (loky, joblib's own), or on a cluster of Dask or of Ray.

The workers of a cluster need the same packages, the clone at the same place, and EXPERIMENTS_CACHE in a folder that all
share. Workers of Dask must have one thread for tasks each (`dask worker --nworkers 8 --nthreads 1 ADDRESS`), as
torch's threads and the cache's records belong to a process. How many threads torch may take is the worker's to say
(OMP_NUM_THREADS).
"""

import importlib.util
from typing import Literal, get_args

import joblib

Backend = Literal["loky", "dask", "ray"]
PATIENCE = 30  # seconds that a cluster has to answer
NEEDED = {"dask": "distributed", "ray": "ray"}  # module


def connect(backend: Backend) -> int:
    """Return how many processes a backend offers, once this process is connected with it.

    The address is what the cluster's own software takes from the environment: DASK_SCHEDULER_ADDRESS, which must be
    set, or RAY_ADDRESS, without which Ray starts processes on this machine.

    Raises:
        ValueError: its package is missing, no address is given, or nothing answers there; one line.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"--backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if (module := NEEDED.get(backend)) and importlib.util.find_spec(module) is None:
        raise ValueError(f"--backend {backend} needs the package {module}: pip install {module}")
    if backend == "dask":
        _connect_dask()
    elif backend == "ray":
        _connect_ray()
    with joblib.parallel_config(backend):
        return joblib.effective_n_jobs(-1)


def _connect_dask() -> None:
    import dask
    from distributed import Client

    address = dask.config.get("scheduler-address", None)
    if not address:
        raise ValueError("--backend dask: set DASK_SCHEDULER_ADDRESS to the address of a scheduler, tcp://HOST:8786")
    try:
        client = Client(address, timeout=PATIENCE)  # stays the one that joblib finds
        client.wait_for_workers(1, timeout=PATIENCE)
    except OSError:
        raise ValueError(f"--backend dask: no scheduler with workers answers at {address}") from None
    several = sorted(name for name, threads in client.nthreads().items() if threads > 1)
    if several:
        raise ValueError(f"--backend dask: {several[0]} has several threads; start workers with --nthreads 1")


def _connect_ray() -> None:
    import ray
    from ray.util.joblib import register_ray

    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise ValueError(f"--backend ray: {' '.join(str(error).split())}") from None
    register_ray()
