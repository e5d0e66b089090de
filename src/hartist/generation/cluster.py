"""A Ray to spread work with: one started here for this command alone, or a cluster's

Ray is optional, and reads its environment when it is first imported: import it, and modules that use it, inside
`ray_running` only.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
from collections.abc import Iterator
from typing import Any

from hartist.errors import UserError, quoted

PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
"""A machine that is busy with pictures is slow to answer, not dead."""
OBJECT_STORE_BYTES = 128 << 20
"""Pictures pass through it on their way to a file or a client; none stays."""


@contextlib.contextmanager
def ray_running(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to the cluster at `address` (HOST:PORT or auto), or start a Ray with `cpus` slots; disconnect or end it.

    What is started here listens on the loopback interface only, asks for a secret of its own, shows no dashboard and
    sends no usage statistics. Raises UserError if Ray is not installed, can't be started or can't be reached.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options: dict[str, Any] = {"address": address}
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: 127.0.0.1, not the network's address
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # it runs what it is sent
        os.environ |= PATIENCE
        options = {
            "address": "local",
            "num_cpus": cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        import ray
    except ImportError as error:
        raise UserError(f"Ray is not installed (no {error.name}); pip install 'hartist[ray]'") from error
    try:
        ray.init(logging_level=logging.WARNING, **options)
    except Exception as error:  # a plain Exception when it takes too long
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = f"no Ray cluster answers at {quoted(address)}" if address else "Ray could not be started"
        raise UserError(f"{where} ({reason})") from error
    try:
        yield
    finally:
        ray.shutdown()


def threads_each(threads: int | None, processes: int, address: str | None) -> int:
    """CPU threads of each of so many processes: those asked for, else a share of this machine, one on a cluster."""
    return threads or (max(1, (os.cpu_count() or 1) // processes) if address is None else 1)


def gpu_share(device: str | None, processes: int) -> float:
    """Of a GPU for each of so many processes: a whole one where there are enough, else what makes all fit."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if not gpus or not (device is None or device.startswith(("cuda", "auto"))):
        return 0.0
    return 1 / math.ceil(processes / gpus)
