"""Runs the server in a terminal: start-up messages, uvicorn, exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from types import FrameType

import uvicorn

from rewards import RewardError
from server import terminal
from server.app import running_app
from server.backends.base import BackendError
from server.calibration import CalibrationError
from server.settings import Settings
from server.threads import share_cores
from solver import PaletteError

logger = logging.getLogger("palette")

# What stops a start for a reason the operator can mend.
START_ERRORS = (RewardError, BackendError, CalibrationError, PaletteError, OSError)


class _Server(uvicorn.Server):
    """Says where it listens and how to try it, once it does."""

    def __init__(self, config: uvicorn.Config, model: str) -> None:
        super().__init__(config)
        self._model = model

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at the second Ctrl-C without waiting for requests.

        uvicorn would raise the signal again once it has stopped: the process would end by it,
        before models are closed and with an exit code of a failure.
        """
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: object = None) -> None:
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{host}:{port}"
        terminal.errors.print(
            f"\nPalette serves [bold]{self._model}[/bold] at [bold]{url}[/bold]   "
            f"(API: {url}/docs)\n\nTry:\n\n"
            f"curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '"
            f'{{"model": "{self._model}",\n'
            '  "messages": [{"role": "user", "content": "How do I keep my houseplants alive?"}],\n'
            '  "palette": {"targets": {"helpful": {"quantile": 0.7}, "humorous": {"gain": 0.5}}}}\''
            "\n",
            soft_wrap=True,
        )


def run_server(settings: Settings) -> int:
    """Serve until told to stop; return the exit code."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Chatter of HTTP clients inside model loading is no news to an operator.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    share_cores(settings)
    terminal.errors.print(
        f"Palette: loading {settings.served_model_name} ...", markup=False, soft_wrap=True
    )
    loop_factory = uvicorn.Config("").get_loop_factory()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_serve(settings))
    except START_ERRORS as error:
        terminal.errors.print(f"palette: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 0


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
                access_log=settings.log_level == "debug",
                timeout_graceful_shutdown=10,
                lifespan="off",
            )
            server = _Server(config, settings.served_model_name)
            try:
                await server.serve()
            except SystemExit:  # the port cannot be had; uvicorn has said so
                return 1
            return 0 if server.started else 1
