"""The calibration that ships: what it says of itself, and that it can be made again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from server import embedded
from server.app import make_backend, make_rewards
from server.calibration import load_calibration
from server.calibrator import calibrate
from server.embedded.corpus import prompts
from server.journal import Answers
from server.prompts import hash_of
from server.settings import Settings

# The first prompt, and the last: those between count as done.
AGAIN = (0, -1)


@pytest.fixture(scope="module")
def shipped():
    return load_calibration(embedded.CALIBRATION)


def test_it_is_made_of_every_calibration_prompt(shipped):
    split = prompts("calibration")
    assert shipped.info.n_given == shipped.pilot.n_prompts == len(split)
    assert shipped.info.prompts_hash == hash_of([tuple(one) for one in split])
    assert shipped.info.truncated_share == 0


async def test_sampling_again_gives_the_same_rewards(shipped, tmp_path):
    settings = Settings(state_dir=tmp_path)
    backend, rewards = make_backend(settings), make_rewards(settings)
    pilot, info = shipped.pilot, shipped.info
    again = [index % pilot.n_prompts for index in AGAIN]
    done = {
        index: Answers(one.astype(np.float32), longest=info.longest_answer_tokens, n_cut=0)
        for index, one in enumerate(pilot.rewards)
        if index not in again
    }
    await backend.start()
    await rewards.start()
    try:
        made = await calibrate(
            backend,
            rewards,
            [tuple(one) for one in prompts("calibration")[: pilot.n_prompts]],
            n_candidates=pilot.n_candidates,
            sampling=settings.sampling,
            seed=info.seed,
            prompts_source=info.prompts_source,
            journal=SimpleNamespace(done=done, append=lambda index, answers: None),
        )
    finally:
        await backend.close()
        await rewards.close()
    facts = {"created", "palette_version"}
    assert made.info.model_dump(exclude=facts) == info.model_dump(exclude=facts)
    error = np.abs(made.pilot.rewards[again] - pilot.rewards[again]) / pilot.scale
    # Another processor sums in another order, and may draw another token now and then.
    assert np.mean(error.max(axis=2) < 1e-3) > 0.8
