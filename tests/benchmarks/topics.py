"""The drill on topics that were never calibrated on: real answers and their real rewards.

The root is the shipped calibration, cut to its prompts of half of the topics. Live groups are fresh
candidates of held-out prompts (a pool of `tests.benchmarks.fidelity`) of the other half, none
served twice; every prompt once before any comes again with other candidates. Errors are measured on
a third set, neither calibrated on nor served: the shipped calibration's prompts of that other half.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np

from server.embedded.corpus import split_prompts, topics
from server.evaluation.measures import cut
from server.schemas import PaletteOptions
from solver import PilotSet
from tests.benchmarks.fidelity import served
from tests.benchmarks.following import N_CANDIDATES, PALETTES, Following

# Halves of the topics: by chance, or those with lower and higher base levels of a value.
SPLITS = ("by chance", "helpful", "words", "lexical_diversity")
TOPIC_PALETTES = [
    *PALETTES,
    PaletteOptions(targets={"lexical_diversity": {"gain": 0.3}, "words": "keep"}),
]
CHECK_EVERY = 50
# Of the variance between prompts, against what topics dealt out anew explain.
LEAST_TIMES_CHANCE = 2.0


def topics_of(split, first, pilot):
    """Return the topic's number of each prompt of a pilot set.

    Raises
    ------
    ValueError
        When these cannot be its prompts: topics explain no more of its levels than chance does.
    """
    every = topics()
    prompts = split_prompts(split)[first : first + pilot.n_prompts]
    if len(prompts) < pilot.n_prompts:
        msg = f"the split {split!r} has no {pilot.n_prompts} prompts from {first} on"
        raise ValueError(msg)
    found = np.array([every.index(prompt.topic) for prompt in prompts])
    at = pilot.values.index("lexical_diversity")
    means = pilot.prompt_means[:, at]
    dealt = np.random.default_rng(0).permutation(found)
    share, chance = explained(means, found), explained(means, dealt)
    if share < LEAST_TIMES_CHANCE * chance:
        msg = (
            f"the prompts of the pool are not those of {split!r} from {first} on: topics explain "
            f"{share:.0%} of its levels, {chance:.0%} when dealt out anew; see --pool-prompts"
        )
        raise ValueError(msg)
    return found


def explained(means, topic):
    """Return the share of the variance of `means` that is between topics."""
    n = np.bincount(topic)
    level = np.bincount(topic, means) / np.maximum(n, 1)
    return 1 - (means - level[topic]).var() / means.var()


def halves(split, sets):
    """Return the topics that are calibrated on, and those that come later.

    `sets` are pairs of a pilot set and its prompts' topics. Levels are compared over all prompts of
    both, so that what chance adds to the choice it adds to both alike.
    """
    topic = np.concatenate([own for _, own in sets])
    present = np.unique(topic)
    if split == "by chance":
        order = np.random.default_rng(0).permutation(present)
    else:
        means = [pilot.prompt_means[:, pilot.values.index(split)] for pilot, _ in sets]
        level = np.bincount(topic, np.concatenate(means))[present] / np.bincount(topic)[present]
        order = present[np.argsort(level)]
    return order[: len(order) // 2], order[len(order) // 2 :]


def live_groups(rewards, rng):
    """Yield groups of candidates, none twice; each prompt's first before any prompt's second."""
    groups = cut(np.stack([rng.permutation(one) for one in rewards]), N_CANDIDATES)
    for turn in range(groups.shape[1]):
        for prompt in rng.permutation(len(groups)):
            yield groups[prompt, turn]


def error(promise, rewards):
    """Return what each value has beyond its promise on these prompts, and half its 95 % interval.

    `rewards` is (n_prompts, n_candidates, n_values); the promise's own error is in the interval.
    """
    levels = served(rewards, promise.multipliers, N_CANDIDATES)
    solution = promise.solution
    variance = levels.var(axis=0, ddof=1) / len(levels) + solution.stderr**2
    return levels.mean(axis=0) - solution.expected, 1.96 * np.sqrt(variance)


def errors(one, rewards):
    """Return the same for every palette, shape (2, n_palettes, n_values)."""
    return np.moveaxis([error(one.promise(options), rewards) for options in one.palettes], 1, 0)


class Run:
    """One seed's live requests: when it was alarmed, and the errors at every check.

    Attributes
    ----------
    alarm : int or None
        Requests until the first alarm.
    is_alarmed : bool
        Whether a drift stands in the end.
    checks : list of int
        Requests before each check; the first is before any.
    errors : ndarray, shape (n_checks, 2, n_palettes, n_values)
    """

    def __init__(self, root, live, yardstick, mode, half_life, n_requests, seed):
        self.alarm, self.checks, found = None, [], []
        with tempfile.TemporaryDirectory() as folder:
            one = Following(root, half_life, mode, folder, TOPIC_PALETTES)
            groups = live_groups(live, np.random.default_rng([seed, 2]))
            for n in range(n_requests + 1):
                if n % CHECK_EVERY == 0:
                    self.checks.append(n)
                    is_same = found and mode == "frozen"
                    found.append(found[-1] if is_same else errors(one, yardstick))
                if n == n_requests or (rewards := next(groups, None)) is None:
                    break
                one.serve(rewards)
                if self.alarm is None and one.track.monitor.alarmed:
                    self.alarm = n + 1
            self.is_alarmed = one.track.monitor.alarmed
        self.n_requests = n
        self.errors = np.array(found)

    def back(self, palette, at):
        """Return after how many requests an error is within its interval at two checks in a row."""
        error, half = self.errors[:, :, palette, at].T
        inside = np.abs(error) <= half
        both = np.flatnonzero(inside[:-1] & inside[1:])
        return self.checks[both[0]] if len(both) else None


def topic_drill(shipped, pool, pool_topics, options):
    """Print what happens at each split, and return it as rows."""
    pilot, rows = shipped.pilot, []
    topic = topics_of("calibration", 0, pilot)
    for split in SPLITS:
        known, new = halves(split, [(pilot, topic), (pool, pool_topics)])
        own = PilotSet(pilot.rewards[np.isin(topic, known)], pilot.values)
        root = replace(shipped, pilot=own)
        yardstick = pilot.rewards[np.isin(topic, new)]
        live = pool.rewards[np.isin(pool_topics, new)]
        runs = {
            mode: [
                Run(root, live, yardstick, mode, options.half_life, options.requests, seed)
                for seed in range(options.runs)
            ]
            for mode in ("frozen", "on")
        }
        rows += split_rows(split, own, runs)
        say_split(split, root, yardstick, live, runs)
        for row in rows:
            if row["split"] == split:
                say_row(row)
    return rows


def split_rows(split, pilot, runs):
    """Return a row for each palette and value; errors in standard deviations within a prompt."""
    scale, found = pilot.scale, []
    for p, options in enumerate(TOPIC_PALETTES):
        for at, value in enumerate(pilot.values):
            start, half = runs["frozen"][0].errors[0, :, p, at] / scale[at]
            last = np.array([run.errors[-1, :, p, at] for run in runs["on"]]) / scale[at]
            found.append(
                {
                    "split": split,
                    "palette": ", ".join(options.targets),
                    "value": value,
                    "is_asked": value in options.targets or value == split,
                    "start": float(start),
                    "start_half": float(half),
                    "back": [run.back(p, at) for run in runs["on"]],
                    "last": last[:, 0].tolist(),
                    "last_half": last[:, 1].tolist(),
                    "alarm": {mode: [run.alarm for run in some] for mode, some in runs.items()},
                }
            )
    return found


def say_split(split, root, yardstick, live, runs):
    print(
        f"\nhalf of the topics, {split}: {root.pilot.n_prompts} prompts calibrated on, "
        f"{len(live)} served from, {len(yardstick)} measured on"
    )
    for mode, some in runs.items():
        alarms = [run.alarm for run in some if run.alarm is not None]
        first = f"after {np.median(alarms):.0f} requests (median)" if alarms else "never"
        standing = sum(run.is_alarmed for run in some)
        print(
            f"{mode}: alarm in {len(alarms)} of {len(some)} runs, {first}; "
            f"still drifting after {some[0].n_requests} requests: {standing}"
        )
    print("palette | value | error at the start, and for good when frozen | refresh: back within "
          "its interval after | refresh: error in the end")  # fmt: skip


def say_row(row):
    if not row["is_asked"]:
        return
    back = [n for n in row["back"] if n is not None]
    when = f"{np.median(back):.0f} ({len(back)} of {len(row['back'])} runs)" if back else "never"
    print(
        f"{row['palette']} | {row['value']} | {row['start']:+.3f} ± {row['start_half']:.3f} | "
        f"{when} | {np.mean(row['last']):+.3f} ± {np.mean(row['last_half']):.3f}",
        flush=True,
    )
