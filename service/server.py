"""The server: front end, metrics endpoint, engine process, and their common start and end.

Listens first and loads behind that: the model's files, and the engine, which tells all else of the
model. A signal drains it; a model that cannot be served ends it. With several front ends, the public
port is left to worker processes, and this one keeps all that there is once. Imports no torch: that is
the engine process's.
"""

import asyncio
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvloop
from prometheus_client import CollectorRegistry

from fusewire.service.auth import CredentialError
from fusewire.service.certificates import not_after
from fusewire.service.config import ServeConfig
from fusewire.service.connection_limits import ConnectionLimits, TooFewFilesError, limit_connections
from fusewire.service.exposition import MetricsServer
from fusewire.service.front_ends import FrontEnds, SharedServing
from fusewire.service.logs import SERVER_TEXT, LogLevel, set_up
from fusewire.service.messages import EngineReady, Routing
from fusewire.service.metrics import Metrics
from fusewire.service.model_source import ModelError, find_folder, public_name
from fusewire.service.rpc.front_end import (
    FLUSH_SECONDS,
    SERVICE_NAMES,
    FrontEnd,
    ListenError,
    cannot_listen,
)
from fusewire.service.rpc.serving import Serving
from fusewire.service.run_folder import FolderError, RunFolder, remove_abandoned
from fusewire.service.shared_metrics import Scrape
from fusewire.service.supervisor import EngineSupervisor
from fusewire.service.tracing import Tracer, TracingError, open_tracer

if TYPE_CHECKING:
    from fusewire.service.dashboard import Dashboard

log = logging.getLogger(__name__)

MAX_STARTS = 3
"""An engine that ends so many times without having been ready is given up."""


class StartError(RuntimeError):
    """The server cannot start; the message is for the operator."""


def run(config: ServeConfig) -> int:
    """Serve until a signal comes or serving is of no use; returns the exit status, 0 or 1."""
    set_up("server", config.log_level, config.log_format, SERVER_TEXT)
    return uvloop.run(_serve(config))


async def _serve(config: ServeConfig) -> int:
    server = Server(config)
    try:
        await server.start()
    except StartError as error:
        log.error("%s", error)
        return 1
    return await server.serve_until_stopped()


class Server:
    """One server, made once and stopped once.

    After `start`, `port`, `admin_port`, `metrics_port` and `dashboard_port` are the real ones.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.port = config.port
        self.admin_port = config.admin_port
        self.metrics_port = config.metrics_port
        self.dashboard_port = config.dashboard_port
        self._config = config
        self._stopping = asyncio.Event()
        self._failure: str | None = None
        self._starts_failed = 0
        self._supervisor: EngineSupervisor | None = None
        self._front_ends: FrontEnds | None = None
        self._dashboard: Dashboard | None = None
        self._tracer: Tracer | None = None

    async def start(self) -> None:
        """Listen on all ports and begin to load; health says NOT_SERVING until that is done.

        Raises:
            StartError: if a port is taken, a credential's file cannot be used, traces cannot be made,
                too few files may be open, or TMPDIR has no room for what the server keeps there.
        """
        config = self._config
        try:
            limits = limit_connections(config.frontends)
        except TooFewFilesError as error:
            raise StartError(str(error)) from error
        if config.otlp_endpoint:
            try:
                self._tracer = open_tracer(config.otlp_endpoint)
            except TracingError as error:
                raise StartError(str(error)) from error
        try:
            self._make_folder()
        except StartError:
            await self._stop_tracer()
            raise
        if config.frontends > 1:
            self._share_the_port(limits)
        else:
            self._serve_alone(limits)
        try:
            await self._front_end.start()
            if self._front_ends is not None:
                await self._front_ends.start()
            if config.dashboard:
                from fusewire.service.dashboard import Dashboard  # brings an HTTP library along

                self._dashboard = Dashboard(self.serving, self._registry)
                await self._dashboard.start()
                self.dashboard_port = self._dashboard.port
            self._scrapes = self._listen_for_scrapes()
            self._scrapes.start()
        except (ListenError, CredentialError) as error:
            await self._abandon()
            raise StartError(str(error)) from error
        except OSError as error:
            await self._abandon()
            raise StartError(f"cannot start: {error}") from error
        if config.tls_cert:
            self._show_certificate(config.tls_cert)
        self.port = (self._front_ends or self._front_end).port
        self.admin_port = self._front_end.admin_port
        self.metrics_port = self._scrapes.port
        log.info(
            "listening: public=%s:%d admin=%s:%d metrics=%s:%d",
            config.host,
            self.port,
            config.admin_host,
            self.admin_port,
            config.metrics_host,
            self.metrics_port,
        )
        if self._dashboard is not None:
            log.info("dashboard: http://127.0.0.1:%d/", self.dashboard_port)
        await self.serving.engine.start()
        self._loading = asyncio.create_task(self._load(), name="load")

    def _make_folder(self) -> None:
        """Make a private folder for the engine's socket and, with workers, the files they count in."""
        config = self._config
        remove_abandoned()
        try:
            self._folder = RunFolder(config.frontends if config.frontends > 1 else 0, public_name(config))
        except FolderError as error:
            raise StartError(f"TMPDIR: {error}") from error
        self._socket_path = self._folder.socket_path

    def _listen_for_scrapes(self) -> MetricsServer:
        config = self._config
        try:
            return MetricsServer(config.metrics_port, config.metrics_host, self._registry)
        except OSError as error:
            options = "--metrics-host, --metrics-port"
            raise cannot_listen(config.metrics_host, config.metrics_port, options, error) from error

    def _serve_alone(self, limits: ConnectionLimits) -> None:
        """Answer every call in this process."""
        self._metrics = Metrics(
            public_name(self._config),
            lambda: self.serving.oldest_waiting(),
            lambda: self.serving.stalled_streams(),
        )
        self._registry = self._metrics.registry
        self.serving = Serving(
            self._config,
            public_name(self._config),
            self._socket_path,
            SERVICE_NAMES,
            on_engine=self._follow_engine,
            on_routing=self._remember_routing,
            on_failure=self._fail,
            metrics=self._metrics,
            on_log_level=self._spread_log_level,
            tracer=self._tracer,
        )
        self._front_end = FrontEnd(self._config, self.serving, limits)

    def _share_the_port(self, limits: ConnectionLimits) -> None:
        """Leave the public port to workers; answer the operator here and show all metrics as one."""
        self._front_ends = FrontEnds(
            self._config,
            self._socket_path,
            self._folder.path,
            on_ready=lambda: serving.note_workers_ready(),
            on_failure=self._fail,
        )
        self._metrics = Metrics(
            public_name(self._config), self._front_ends.oldest_waiting, lambda: serving.stalled_streams()
        )
        self._registry = CollectorRegistry()
        self._registry.register(Scrape(self._metrics.registry, self._folder.count_files))
        self.serving = serving = SharedServing(
            self._config,
            public_name(self._config),
            self._socket_path,
            SERVICE_NAMES,
            on_engine=self._follow_engine,
            on_routing=self._remember_routing,
            on_failure=self._fail,
            metrics=self._metrics,
            front_ends=self._front_ends,
            on_log_level=self._spread_log_level,
            tracer=self._tracer,
        )
        self._front_end = FrontEnd(self._config, self.serving, limits, with_public=False)

    def _show_certificate(self, file: str) -> None:
        try:
            self._metrics.observe_certificate(not_after(Path(file).read_bytes()))
        except (OSError, ValueError) as error:
            log.warning("cannot tell when %s expires: %s", file, error)

    async def _abandon(self) -> None:
        """Undo what a failed start has done."""
        if self._dashboard is not None:
            await self._dashboard.stop()
        await self._front_end.stop(0)
        if self._front_ends is not None:
            await self._front_ends.stop()
        await self._stop_tracer()
        self._folder.remove()

    # ---- loading ----

    async def _load(self) -> None:
        """Find the model's files, then start the engine on them."""
        try:
            folder = await find_folder(self._config.model)
            engine = msgspec.structs.replace(
                self._config.engine(str(folder)), log_level=self.serving.log_level
            )
            self._supervisor = EngineSupervisor(engine, self._socket_path, self._count_exit, self._fail)
            await self._supervisor.start()
        except ModelError as error:
            self._fail(str(error))
        except Exception:
            log.exception("loading failed")
            self._fail("the model cannot be loaded; the reason is above")

    def _follow_engine(self, ready: EngineReady | None) -> None:
        if self._front_ends is not None:
            self._front_ends.note_engine(ready is not None)
        if ready is None and self._stopping.is_set():
            return
        if ready is None:
            log.warning("the engine is gone; requests are refused until it is back")
            return
        self._starts_failed = 0
        log.info(
            "ready: model=%s device=%r kernel_mode=%s split=%s",
            self.serving.model_name,
            ready.device,
            ready.routing.mode,
            ready.routing.split or "none",
        )

    def _remember_routing(self, routing: Routing) -> None:
        if self._supervisor is not None:
            self._supervisor.remember(routing)

    def _spread_log_level(self, level: LogLevel) -> None:
        if self._supervisor is not None:
            self._supervisor.set_log_level(level)
        if self._front_ends is not None:
            self._front_ends.set_log_level(level)

    def _count_exit(self, code: int) -> None:
        self._metrics.observe_restart()
        self._starts_failed += 1
        if self._starts_failed >= MAX_STARTS and self.serving.engine.ready is None:
            self._fail(f"the engine has ended {self._starts_failed} times before it was ready")

    def _fail(self, reason: str) -> None:
        """End the server: no waiting can mend this."""
        self._failure = self._failure or reason
        self._stopping.set()

    # ---- the end ----

    async def serve_until_stopped(self) -> int:
        """Serve until SIGTERM, SIGINT or a failure, stop, and return the exit status.

        A second signal ends the requests that the drain still waits for.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_signal, number)
        await self._stopping.wait()
        if self._failure is not None:
            log.error("%s", self._failure)
        await self.stop(self._config.drain_seconds)
        return 0 if self._failure is None else 1

    def _handle_signal(self, number: int) -> None:
        if self._stopping.is_set():
            self.serving.end_all()
            return
        log.info("draining: %s, for at most %g s", signal.Signals(number).name, self._config.drain_seconds)
        self._stopping.set()

    async def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let the running ones finish within the time, and stop everything."""
        await self.serving.drain(drain_seconds)
        self._loading.cancel()
        await asyncio.gather(self._loading, return_exceptions=True)
        if self._dashboard is not None:
            await self._dashboard.stop()
        await self._front_end.stop(FLUSH_SECONDS)
        if self._front_ends is not None:
            await self._front_ends.stop()
        await self.serving.engine.stop()
        if self._supervisor is not None:
            await self._supervisor.stop()
        await self._stop_tracer()
        await asyncio.to_thread(self._scrapes.stop)
        self._folder.remove()
        log.info("stopped")

    async def _stop_tracer(self) -> None:
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.stop)
