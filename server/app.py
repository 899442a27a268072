"""Builds and wires the server: the only place that does."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from rewards import RewardSuite, load_rewards
from server import access, embedded, errors
from server.admission import Admission
from server.aligning import in_units
from server.alignment import Aligner, Observer
from server.auth import Auth, Keys, read_keys
from server.backends.base import Backend, ModelLoadError
from server.backends.choice import make_backend
from server.body_limit import BodyLimit
from server.calibrating import make_calibration
from server.calibrator import Progress
from server.draining import Lifetime
from server.layers import Layers
from server.live.follower import Follower
from server.live.gauges import LiveGauges
from server.metrics import Metrics
from server.profiles import Profiles, open_profiles
from server.promise import Promiser
from server.prompts import read_prompts
from server.recording import PromptRecorder
from server.replay import Replays
from server.routes import (
    calibrations,
    chat,
    completions,
    health,
    live,
    metrics,
    models,
    palette,
    profiles,
    replay,
    tradeoffs,
)
from server.routes.context import CalibrationProgress, Context
from server.schemas import PaletteOptions
from server.settings import Settings
from server.shelf import Shelf, load_shelf
from server.shelf_watch import ShelfWatch
from server.version import VERSION

logger = logging.getLogger(__name__)


def make_rewards(settings: Settings) -> RewardSuite:
    """Return the reward suite of the settings, not started.

    Raises
    ------
    RewardConfigError
    """
    return load_rewards(
        settings.rewards,
        device=settings.rewards_device,
        max_batch_tokens=settings.max_batch_tokens,
        queue_tokens=settings.reward_queue_tokens,
        timeout_s=settings.reward_timeout_s,
    )


@asynccontextmanager
async def running_aligner(
    settings: Settings,
    *,
    backend: Backend | None = None,
    rewards: RewardSuite | None = None,
    observers: Iterable[Observer] = (),
) -> AsyncIterator[Aligner]:
    """Return an aligner with its models loaded and its calibration found; closes all after.

    `observers` are told of every answer.

    Raises
    ------
    RewardConfigError, RewardModelError, ModelLoadError, CalibrationError, PaletteError,
    ProfileError
        Whatever stops a server from starting.
    """
    rewards = rewards or make_rewards(settings)
    backend = backend or make_backend(settings)
    profiles = open_profiles(settings.state_dir)  # before the models: they take their time to load
    try:
        await backend.start()
        rewards.use_judge(backend)
        await rewards.start()
        yield make_aligner(settings, backend, rewards, profiles, observers)
    finally:
        profiles.close()
        await backend.close()
        await rewards.close()


def make_aligner(
    settings: Settings,
    backend: Backend,
    rewards: RewardSuite,
    profiles: Profiles,
    observers: Iterable[Observer] = (),
) -> Aligner:
    """Return the aligner of a started backend and started rewards.

    Raises
    ------
    ModelLoadError
        When values read log-probabilities that the backend does not report.
    CalibrationError
        For a calibration file that is there and cannot be used.
    PaletteError, ProfileError
        For operator's floors or a default palette that make no sense, or one that names an unknown
        calibration.
    """
    blind = sorted(set(rewards.columns) - set(rewards.text_only_columns))
    if blind and "logprobs" not in backend.features:
        msg = (
            f"{blind[0]} is computed from log-probabilities, which {backend.model_id} does not "
            f"report: leave {', '.join(blind)} out of {settings.rewards}, or use another backend"
        )
        raise ModelLoadError(msg)
    promiser = Promiser(
        rewards.names,
        default_candidates=settings.candidates,
        max_candidates=settings.max_candidates,
    )
    layers = Layers(profiles, promiser, settings.floors)
    shelf = _shelf(settings, settings.calibration, backend, rewards)
    if settings.default_palette is not None:
        try:
            laid = layers.lay(PaletteOptions.model_validate(settings.default_palette))
            assert laid.options is not None
            promiser.check(laid.options, n_choices=1)
            shelf.choose(settings.sampling, (), laid.options.calibration)
        except Exception as error:
            error.add_note("the default palette asks for it (PALETTE_DEFAULT_PALETTE, --palette)")
            raise
    admission = Admission(settings.max_running, settings.max_queue)
    return Aligner(backend, rewards, promiser, admission, layers, shelf, observers)


async def adapter_aligners(
    settings: Settings, aligner: Aligner, observers: Iterable[Observer] = ()
) -> dict[str, Aligner]:
    """Return an aligner for each adapter of a model, by name.

    Each has calibrations of its own; rewards, queue, palettes and solutions are those of the model.

    Raises
    ------
    CalibrationError
        As `make_aligner`.
    """
    found = {}
    for backend in aligner.backend.adapters:
        await backend.start()
        found[backend.model_id] = Aligner(
            backend,
            aligner.rewards,
            aligner.promiser,
            aligner.admission,
            aligner.layers,
            # The file that the settings name is the model's.
            _shelf(settings, None, backend, aligner.rewards),
            observers,
        )
    return found


def _shelf(settings: Settings, named: Path | None, backend: Backend, rewards: RewardSuite) -> Shelf:
    return load_shelf(
        named,
        settings.state_dir,
        embedded.CALIBRATION,
        values=rewards.names,
        model_fingerprint=backend.fingerprint,
        rewards_fingerprint=rewards.fingerprint,
        sampling=settings.sampling,
        align=functools.partial(in_units, suite=rewards),
    )


async def calibrate_in_background(
    settings: Settings, aligner: Aligner, state: CalibrationProgress, progress: Progress
) -> None:
    """Calibrate on the shipped general prompts, keep the result and serve with it.

    What an earlier start did of it is continued. A failure is told in the log and in `state`; the
    server goes on without a calibration.
    """

    def report(done: int, total: int) -> None:
        state.done, state.total = done, total
        progress(done, total)

    state.state = "running"
    try:
        calibration, path = await make_calibration(
            aligner.backend,
            aligner.rewards,
            read_prompts(embedded.PROMPTS),
            state_dir=settings.state_dir,
            n_candidates=settings.calibration_candidates,
            sampling=settings.sampling,
            prompts_source="the general prompts shipped with Palette",
            progress=report,
        )
    except Exception as error:  # noqa: BLE001  # whatever it was, the server must live on
        state.state, state.error = "failed", str(error)
        logger.error("calibration failed: %s", state.error)
        return
    aligner.shelf.add(in_units(calibration, aligner.rewards), path)
    state.state = "done"
    logger.info("calibrated: %s is kept in %s", calibration.id, path)


async def _calibrate_all(
    settings: Settings, context: Context, names: Sequence[str], progress: Progress
) -> None:
    """Calibrate models one after another: together they would only wait for each other."""
    for name in names:
        await calibrate_in_background(
            settings, context.aligners[name], context.progress[name], progress
        )


def create_app(context: Context, keys: Keys) -> FastAPI:
    """Return the ASGI app of started objects; with keys, it lets in who has one of them."""
    app = FastAPI(title="Palette", summary="What was asked is what is served.", version=VERSION)
    app.state.context = context
    for module in (
        chat, completions, models, palette, profiles, replay, calibrations, tradeoffs, health,
        live, metrics,
    ):  # fmt: skip
        app.include_router(module.router)
    errors.install(app)
    # The one added last is the outermost.
    app.add_middleware(BodyLimit, max_bytes=context.settings.max_body_bytes)
    app.add_middleware(Lifetime, drain=context.drain, timeout_s=context.settings.request_timeout_s)
    app.add_middleware(Auth, keys=keys)
    app.add_middleware(access.Access, metrics=context.metrics)
    return app


@asynccontextmanager
async def running_app(
    settings: Settings,
    *,
    backend: Backend | None = None,
    rewards: RewardSuite | None = None,
    progress: Progress = lambda done, total: None,
) -> AsyncIterator[FastAPI]:
    """Return the app with its models loaded, calibrating in the background when it has to.

    Parameters
    ----------
    settings : Settings
    backend, rewards : optional
        Instead of those of the settings.
    progress : callable
        Gets (prompts done, prompts in all) of a calibration made at the start.

    Raises
    ------
    SettingsError, RewardConfigError, RewardModelError, ModelLoadError, CalibrationError,
    PaletteError
        Whatever stops a server from starting.
    """
    keys = read_keys(settings)  # before the models: they take their time to load
    logger.info(keys.who_may_write)
    counted = Metrics()
    observers: list[Observer] = [functools.partial(access.note, metrics=counted)]
    async with contextlib.AsyncExitStack() as stack:
        if settings.record_prompts is not None:
            recorder = PromptRecorder(settings.record_prompts)
            stack.callback(recorder.close)
            observers.append(recorder.note)
        aligner = await stack.enter_async_context(
            running_aligner(settings, backend=backend, rewards=rewards, observers=observers)
        )
        aligners = {
            aligner.backend.model_id: aligner,
            **await adapter_aligners(settings, aligner, observers),
        }
        replays = Replays(settings.replay_entries, keeps_texts=settings.replay_texts)
        for one in aligners.values():
            replays.watch(one)
        context = Context(settings, aligners, int(time.time()), counted, replays)
        counted.watch(aligner, context.drain)
        if settings.refresh != "off":
            folder = settings.state_dir / "live"
            follower = Follower(
                aligners.values(), settings.refresh, settings.refresh_half_life, folder
            )
            await stack.enter_async_context(follower.running())
            counted.registry.register(LiveGauges(follower))
            context.follower = follower
        await stack.enter_async_context(ShelfWatch(aligners.values(), context.follower).running())
        background = None
        bare = [name for name, one in aligners.items() if one.calibration is None]
        if bare:
            logger.warning(
                "%s has no calibration yet: %s; until there is one, palettes need "
                '"scope": "answer" or multipliers',
                ", ".join(bare),
                f"making one now from {embedded.PROMPTS.name}"
                if settings.calibrate_at_start
                else "run `palette calibrate`",
            )
            if settings.calibrate_at_start:
                background = asyncio.create_task(
                    _calibrate_all(settings, context, bare, progress), name="calibrate"
                )
        try:
            yield create_app(context, keys)
        finally:
            if background is not None:
                background.cancel()
                await asyncio.gather(background, return_exceptions=True)
