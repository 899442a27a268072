"""Which backend the settings ask for."""

from __future__ import annotations

import importlib.util

from server.backends.base import Backend
from server.backends.hf_local import HfLocalBackend
from server.backends.openai_remote import OpenAIRemoteBackend
from server.backends.vllm_engine import VllmEngineBackend
from server.settings import Settings, SettingsError
from server.threads import n_torch_threads


def make_backend(settings: Settings) -> Backend:
    """Return the backend of the settings, not started.

    Raises
    ------
    SettingsError
        For settings that the backend does not have.
    """
    kind = settings.backend
    if kind == "auto":
        kind = "hf_local"
        if settings.upstream_url is not None:
            kind = "openai_remote"
        elif settings.device in ("auto", "cuda") and _is_vllm_usable():
            kind = "vllm_engine"
    if settings.engine_args and kind != "vllm_engine":
        msg = (
            f"engine options ({', '.join(settings.engine_args)}) are vLLM's, and the backend is "
            f"{kind}: leave them out, or set backend=vllm_engine"
        )
        raise SettingsError(msg)
    if settings.lora and kind != "vllm_engine":
        msg = (
            f"LoRA adapters ({', '.join(settings.lora)}) need vLLM, and the backend is {kind}: "
            "leave them out, or set backend=vllm_engine"
        )
        raise SettingsError(msg)
    if settings.served_model_name in settings.lora:
        msg = (
            f"{settings.served_model_name} is the name of the model and of a LoRA adapter: "
            "rename the adapter, or set model_name"
        )
        raise SettingsError(msg)
    if kind == "openai_remote":
        return _remote(settings)
    return _engine(settings) if kind == "vllm_engine" else _local(settings)


def _is_vllm_usable() -> bool:
    """Whether vLLM is installed and there is a GPU for it; loads torch, not vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def _local(settings: Settings) -> Backend:
    return HfLocalBackend(
        settings.model,
        model_id=settings.served_model_name,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        max_context=settings.max_context,
        trust_remote_code=settings.trust_remote_code,
        max_rows=settings.max_rows,
    )


def _engine(settings: Settings) -> Backend:
    if settings.device not in ("auto", "cuda", "cpu"):
        msg = (
            f"device={settings.device}: vLLM takes the GPUs that it sees; choose them with "
            "CUDA_VISIBLE_DEVICES"
        )
        raise SettingsError(msg)
    shares_gpu = settings.rewards_device != "cpu"
    return VllmEngineBackend(
        settings.model,
        model_id=settings.served_model_name,
        revision=settings.revision,
        dtype=settings.dtype,
        max_context=settings.max_context,
        trust_remote_code=settings.trust_remote_code,
        max_rows=settings.max_rows,
        # On a CPU; threads that spin for a core another process has make it a hundred times slower.
        n_threads=n_torch_threads(settings),
        engine_args=settings.engine_args,
        tool_call_parser=settings.tool_call_parser,
        lora=settings.lora,
        timeout_s=settings.engine_timeout_s,
        rewards_bytes=round(settings.rewards_memory_gib * 2**30) if shares_gpu else 0,
        max_restarts=settings.engine_max_restarts,
    )


def _remote(settings: Settings) -> Backend:
    if settings.upstream_url is None:
        msg = "backend openai_remote needs upstream_url, the address of the server behind it"
        raise SettingsError(msg)
    return OpenAIRemoteBackend(
        settings.upstream_url,
        model=settings.upstream_model,
        model_id=settings.model_name,
        api_key=settings.upstream_api_key,
        n_per_request=settings.upstream_n,
        features=settings.upstream_features,
        max_context=settings.max_context,
        min_share=settings.upstream_min_share,
        max_connections=settings.upstream_max_connections,
        timeout_s=settings.upstream_timeout_s,
        connect_timeout_s=settings.upstream_connect_timeout_s,
        max_retries=settings.upstream_max_retries,
        extra_headers={
            name: text.get_secret_value() for name, text in settings.upstream_headers.items()
        },
        extra_body=settings.upstream_body,
    )
