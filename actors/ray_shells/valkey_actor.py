"""An application's embedded Valkey: a detached Ray actor with the server program. Imports no Serve: it starts sooner.

It runs on the head node, which a cluster cannot lose anyway, and comes back under the same URL: neither its program's
end nor its process's is more than a short absence for those who know that URL. What it held is gone then.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.ray_shells.named_actors import ActorKind, DetachedActors
from cluster.application import ApplicationId
from cluster.logs import configure_logging, log_event
from cluster.stats.embedded_valkey import EmbeddedValkey, start_embedded_valkey

_LOG = logging.getLogger(__name__)
_HEAD_NODE = {"node:__internal_head__": 0.001}
_RETRY_S = 1.0
_DIGEST = "1"  # it depends on no configuration: a redeployment keeps it, and what it holds


class ValkeyHolder:
    """Keeps the embedded Valkey: its child process ends with this actor, and is started again when it ends alone."""

    def __init__(self) -> None:
        configure_logging()
        # The same after a restart of this actor: there are password and port.
        self._data = Path(tempfile.gettempdir()) / f"moesaic-valkey-{ray.get_runtime_context().get_actor_id()}"
        self._server: EmbeddedValkey | None = None
        self._error: Exception | None = None
        self._settled = threading.Event()  # it answers, or why it does not is known
        self._stopped = threading.Event()
        # The program ends with the thread that started it.
        self._keeper = threading.Thread(target=self._keep, name="valkey", daemon=True)
        self._keeper.start()

    def url(self) -> str:
        """Where it listens; waits until it does.

        Raises:
            ConnectionError, FileNotFoundError: it does not start.
        """
        self._settled.wait()
        if self._server is None:
            raise self._error or ConnectionError("the embedded Valkey was stopped")
        return self._server.url

    def stop(self) -> None:
        """End the server."""
        self._stopped.set()
        if self._server is not None:
            self._server.stop()
        shutil.rmtree(self._data, ignore_errors=True)

    def _keep(self) -> None:
        port_file = self._data / "port"
        while not self._stopped.is_set():
            port = int(port_file.read_text()) if port_file.exists() else 0
            try:
                # Workers of other nodes must reach it, too.
                server = start_embedded_valkey(self._data, port, host=ray.util.get_node_ip_address())
            except (OSError, ConnectionError) as error:
                self._error = error
                self._settled.set()
                if self._server is None and not port:
                    return  # it never ran: whoever asks hears why
                log_event(_LOG, logging.ERROR, "the embedded Valkey did not start again", reason=repr(error))
                self._stopped.wait(_RETRY_S)
                continue
            self._server, self._error = server, None
            port_file.write_text(str(server.port))
            self._settled.set()
            code = server.wait()
            if not self._stopped.is_set():
                log_event(_LOG, logging.ERROR, "the embedded Valkey ended; it is started again", code=code)


def start_valkey_actor(application: ApplicationId) -> ray.ObjectRef:
    """URL-to-be of the application's embedded Valkey, started if there is none yet; returns at once."""
    actor: Any = DetachedActors(application, ActorKind.VALKEY).start(
        ValkeyHolder,
        "",
        _DIGEST,
        resources=_HEAD_NODE,
        max_task_retries=-1,
        max_concurrency=2,  # `stop` while `url` waits
    )
    return actor.url.remote()


def valkey_url(application: ApplicationId) -> str:
    """URL of the application's embedded Valkey, started if there is none yet.

    Raises:
        ConnectionError: there is no server program, or it does not start.
    """
    try:
        return ray.get(start_valkey_actor(application), timeout=60)
    except (RayActorError, RayTaskError, GetTimeoutError) as error:
        raise ConnectionError(f"the embedded Valkey did not start: {error}") from error
