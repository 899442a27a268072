"""A process with an engine, to be killed: says the engine's process id and waits."""

from __future__ import annotations

import asyncio
import sys

from server import embedded
from server.backends.vllm_engine import VllmEngineBackend


async def main() -> None:
    backend = VllmEngineBackend(
        str(embedded.CHAT_MODEL), n_threads=1, engine_args={"kv_cache_memory_bytes": 2**26}
    )
    await backend.start()
    sys.stdout.write(f"{backend.health()['pids']}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
