"""The ``palette`` command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from server import (
    cli_bench,
    cli_calibrations,
    cli_evaluate,
    cli_profiles,
    cli_rewards,
    cli_solver,
)
from server.backends.base import ModelLoadError
from server.backends.vllm_options import parse_options, split_lora_modules
from server.cli_support import (
    BAD_USAGE,
    FAILED,
    CalibrationFile,
    Device,
    MaxTokens,
    Model,
    Rewards,
    Seed,
    Temperature,
    TopK,
    TopP,
    fail,
    json_option,
    palette_option,
    run,
    settings_of,
)

app = typer.Typer(
    name="palette",
    help="Inference-time alignment server: what was asked is what is served.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


for command in (
    cli_solver.solve,
    cli_solver.frontier,
    cli_solver.spread,
    cli_solver.negotiate,
    cli_solver.interference,
    cli_evaluate.evaluate,
    cli_bench.bench,
):
    app.command()(command)
app.add_typer(cli_rewards.app, name="rewards")
app.add_typer(cli_profiles.app)
app.add_typer(cli_calibrations.app, name="calibrations")


def main() -> None:
    """Run the command line."""
    app()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Model = None,
    rewards: Rewards = None,
    calibration: CalibrationFile = None,
    model_name: Annotated[str | None, typer.Option(help="Name clients use.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    host: Annotated[str | None, typer.Option(help="Address; loopback by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 8000 by default.")] = None,
    device: Device = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, hf_local, vllm_engine, openai_remote.")
    ] = None,
    upstream_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server that generates, up to /v1.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer.")] = None,
    candidates: Annotated[int | None, typer.Option(help="N of a palette that says none.")] = None,
    max_candidates: Annotated[int | None, typer.Option(help="Largest N of a request.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    palette: Annotated[str | None, typer.Option(help="Default palette, JSON.")] = None,
    calibrate: Annotated[
        bool | None, typer.Option(help="Calibrate a new model at its first start.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send; repeatable. Other users of the machine see it in "
            "the list of processes: prefer --api-key-file."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of such keys, one a line.", dir_okay=False)
    ] = None,
    operator_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that alone may write and delete profiles; repeatable. Prefer "
            "--operator-key-file."
        ),
    ] = None,
    operator_key_file: Annotated[
        Path | None, typer.Option(help="File of such keys, one a line.", dir_okay=False)
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Listen beyond this machine without any key."),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds a request may take as a whole.")
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds running requests get at the stop.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="critical ... debug.")] = None,
) -> None:
    """Start the server. Every option is also a `PALETTE_...` environment variable.

    Options that are not listed are vLLM's own, where vLLM generates; among them `--lora-modules
    name=folder ...`, each a model of its own to clients.

    Example: `palette serve --model Qwen/Qwen3-8B --port 9000 --tensor-parallel-size 2`
    """
    default_palette = None if palette is None else json_option("--palette", palette)
    engine_args, lora = _engine_options(context.args)
    settings = settings_of(
        model=model,
        rewards=rewards,
        calibration=calibration,
        model_name=model_name,
        revision=revision,
        host=host,
        port=port,
        device=device,
        backend=backend,
        upstream_url=upstream_url,
        engine_args=engine_args,
        lora=lora,
        dtype=dtype,
        max_context=max_context,
        candidates=candidates,
        max_candidates=max_candidates,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        default_palette=default_palette,
        calibrate_at_start=calibrate,
        trust_remote_code=trust_remote_code,
        api_keys=api_key or None,
        api_key_file=api_key_file,
        operator_keys=operator_key or None,
        operator_key_file=operator_key_file,
        insecure=insecure,
        request_timeout_s=request_timeout,
        drain_timeout_s=drain_timeout,
        log_level=log_level,
    )
    from server.serving import run_server  # torch is slow to import: not for `palette --help`

    raise typer.Exit(run_server(settings))


@app.command()
def calibrate(
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL of strings or messages; by default the shipped general prompts."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hugging Face data set instead: owner/name[:split].")
    ] = None,
    column: Annotated[str, typer.Option(help="Of the data set: texts or messages.")] = "prompt",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first prompts; 400 of a data set.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="A sample drawn with --seed instead of the first.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System prompt that all prompts get, instead of their own.")
    ] = None,
    system_file: Annotated[
        Path | None, typer.Option(help="File with that system prompt.", dir_okay=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="By which requests can ask for this calibration.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=2, max=1024, help="K, per prompt.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default in the state.")
    ] = None,
    model: Model = None,
    rewards: Rewards = None,
    device: Device = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 4,
    seed: Seed = 0,
) -> None:
    """Sample and score the base model's answers to many prompts; palettes are solved on them.

    Stopped in whatever way, the same command continues where it was.

    Example: `palette calibrate --prompts my-prompts.jsonl --candidates 32`
    """
    settings = settings_of(
        model=model,
        rewards=rewards,
        device=device,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
    )
    if prompts is not None and dataset is not None:
        fail("--prompts and --dataset are two sources: leave one of them out", BAD_USAGE)
    if system is not None and system_file is not None:
        fail("--system and --system-file are the same thing: leave one of them out", BAD_USAGE)
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
        fail("--name is 1 to 64 letters, digits, dots, dashes and underscores", BAD_USAGE)
    if system_file is not None:
        try:
            system = system_file.read_text(encoding="utf-8-sig").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--system-file {system_file} cannot be read: {error}", BAD_USAGE)
    from server import jobs
    from server.prompt_sources import PromptSource

    source = PromptSource(prompts, dataset, column, limit, sample, system)
    made, written = run(
        jobs.calibrate_to_file(
            settings, source, out, n_candidates=candidates, name=name, concurrency=concurrency,
            seed=seed,
        )
    )  # fmt: skip
    typer.echo(f"calibration {made} written to {written}", err=True)


@app.command()
def generate(
    prompts: Annotated[Path, typer.Argument(help="JSONL of strings or messages.")],
    out: Annotated[Path, typer.Option(help="JSONL to write; continued when it exists.")],
    palette: Annotated[
        str, typer.Option(help='JSON, as `{"targets": {...}}`; `null` for none.')
    ] = "null",
    model: Model = None,
    rewards: Rewards = None,
    calibration: CalibrationFile = None,
    device: Device = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 4,
    seed: Seed = 0,
) -> None:
    """Answer a file of prompts under a palette; run it again to continue where it stopped.

    Example: `palette generate prompts.jsonl --out answers.jsonl --palette
    '{"targets": {"helpful": {"quantile": 0.7}}}'`
    """
    options = palette_option(palette)
    settings = settings_of(
        model=model,
        rewards=rewards,
        calibration=calibration,
        device=device,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
    )
    from server import jobs

    refused = run(
        jobs.generate_to_file(settings, prompts, out, options, concurrency=concurrency, seed=seed)
    )
    if refused:
        fail(f"{refused} prompts could not be answered; their lines in {out} say why", FAILED)


@app.command()
def score(
    file: Annotated[
        Path,
        typer.Argument(help='JSONL of `{"messages": [...], "answer": "..."}`; `-` for stdin.'),
    ],
    out: Annotated[Path | None, typer.Option(help="JSONL to write; stdout by default.")] = None,
    model: Model = None,
    rewards: Rewards = None,
    device: Device = None,
) -> None:
    """Score answers that were written elsewhere; the model is used for judged values only.

    Example: `palette score answers.jsonl --out scores.jsonl`
    """
    settings = settings_of(model=model, rewards=rewards, rewards_device=device)
    from server import jobs

    run(jobs.score_to_file(settings, file, out))


def _engine_options(arguments: list[str]) -> tuple[dict[str, Any] | None, dict[str, str] | None]:
    """Return vLLM's options and its LoRA adapters, which are a setting here."""
    try:
        rest, adapters = split_lora_modules(arguments)
        return parse_options(rest) or None, adapters or None
    except ModelLoadError as error:
        fail(str(error), BAD_USAGE)
