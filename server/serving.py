"""Runs the server in a terminal: start-up messages, uvicorn, exit code."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
from types import FrameType

import uvicorn

from rewards import RewardError
from server import terminal
from server.app import running_app
from server.backends.base import BackendError
from server.calibration import CalibrationError
from server.profile_file import ProfileError
from server.request_id import RequestIdFilter
from server.routes.context import Context
from server.settings import Settings, SettingsError
from server.threads import share_cores
from solver import PaletteError

logger = logging.getLogger("palette")

# What stops a start for a reason the operator can mend.
START_ERRORS = (
    SettingsError, RewardError, BackendError, CalibrationError, PaletteError, ProfileError, OSError,
)  # fmt: skip

# Loggers that say nothing of texts. Those of libraries are kept at warnings: at debug, an HTTP
# client logs the whole conversation it sends upstream.
_OURS = ("palette", "rewards", "server", "solver", "uvicorn")
# For connections to close, once every answer is written.
_CLOSING_S = 5


class _Server(uvicorn.Server):
    """Says where it listens and how to try it; drains before it stops."""

    def __init__(self, config: uvicorn.Config, settings: Settings, context: Context) -> None:
        super().__init__(config)
        self._settings = settings
        self._drain = context.drain
        self._values = context.aligner.rewards.names

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop when the requests that run are answered; at the second signal, at once.

        uvicorn would raise the signal again once it has stopped: the process would end by it,
        before models are closed and with an exit code of a failure.
        """
        self.force_exit = self.should_exit
        self.should_exit = True
        self._drain.begin(self._settings.drain_timeout_s)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, with the door still open: who knocks is told to come back, then shut down."""
        self._drain.begin(self._settings.drain_timeout_s)
        if self._drain.n_running:
            logger.info(
                "stopping: %d requests have %g s to finish; a second signal ends them now",
                self._drain.n_running, self._settings.drain_timeout_s,
            )  # fmt: skip
        # A signal handler has no safe way to wake the loop.
        while not (self._drain.is_done or self.force_exit):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if self._drain.n_running:
            logger.warning("stopping: %d requests are cut off", self._drain.n_running)
            self._drain.cut()
        await super().shutdown(sockets)

    async def startup(self, sockets: object = None) -> None:
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url, model = f"http://{host}:{port}", self._settings.served_model_name
        has_keys = self._settings.api_keys or self._settings.api_key_file
        is_locked = has_keys or self._settings.operator_keys or self._settings.operator_key_file
        key = ' -H "authorization: Bearer $API_KEY"' if is_locked else ""
        wanted = zip(self._values, ({"quantile": 0.7}, {"gain": 0.5}), strict=False)
        palette = json.dumps({"targets": dict(wanted)})
        terminal.errors.print(
            f"\nPalette serves [bold]{model}[/bold] at [bold]{url}[/bold]   "
            f"(API: {url}/docs)\n\nTry:\n\n"
            f"curl -s {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '"
            f'{{"model": "{model}",\n'
            '  "messages": [{"role": "user", "content": "How do I keep my houseplants alive?"}],\n'
            f'  "palette": {palette}}}\'\n',
            soft_wrap=True,
        )


def run_server(settings: Settings) -> int:
    """Serve until told to stop; return the exit code."""
    _configure_logging(settings.log_level.upper())
    share_cores(settings)
    terminal.errors.print(
        f"Palette: loading {settings.served_model_name} ...", markup=False, soft_wrap=True
    )
    loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_serve(settings))
    except START_ERRORS as error:
        told = "; ".join([str(error), *getattr(error, "__notes__", [])])
        terminal.errors.print(f"palette: {told}", style="red", markup=False, soft_wrap=True)
        return 2 if isinstance(error, SettingsError) else 1  # exit codes, as of every command
    except KeyboardInterrupt:
        return 0


def _configure_logging(level: str) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(
        handlers=[handler],
        level=max(logging.WARNING, logging.getLevelNamesMapping()[level]),
        format="%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s",
    )
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


async def _serve(settings: Settings) -> int:
    with terminal.progress_bar("calibrating") as progress:
        async with running_app(settings, progress=progress) as app:
            # Models and libraries stay for good: searched for garbage, their many objects would
            # stop the event loop for a fifth of a second every few hundred requests.
            gc.collect()
            gc.freeze()
            config = uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_level=settings.log_level,
                access_log=False,  # server.access writes ours
                log_config=None,  # uvicorn's lines go where ours go
                timeout_graceful_shutdown=_CLOSING_S,
                lifespan="off",
                ws="none",
            )
            context: Context = app.state.context
            server = _Server(config, settings, context)
            try:
                await server.serve()
            except SystemExit:  # the port cannot be had; uvicorn has said so
                return 1
            return 0 if server.started else 1
