"""Recent answers' candidates in numbers: what another palette would have chosen among them."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from server.alignment import Aligner
from server.alignment_stages import Served
from server.choosing import Group, choose, promise_for
from server.promise import Promise, Promiser
from server.schemas import PaletteOptions
from server.scoring import answer_text
from solver import PaletteError

# An answer keeps the calibration it was made with, megabytes each; those of older ones are let go
# together with their answers.
CALIBRATIONS = 8


class AnswerNotFoundError(Exception):
    """An answer that was never scored here, or is forgotten."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one answer.

    Attributes
    ----------
    model : str
        Name of the one that gave it.
    group : Group
    palette : bytes
        Digest of the palette served. Itself, it may be as long as a body.
    promise : Promise
        The one kept.
    found : tuple of str
        What is known against it.
    n_solved : int
        N that a promise is solved for before the candidates are there.
    indices : tuple of int, length n_candidates
        The candidates' own numbers.
    picks : ndarray of int
        Positions of those served.
    uncovered : tuple of str
        Why the calibration does not cover the request.
    texts : tuple of str, length n_candidates, or None
    """

    model: str
    group: Group
    palette: bytes
    promise: Promise
    found: tuple[str, ...]
    n_solved: int
    indices: tuple[int, ...]
    picks: np.ndarray
    uncovered: tuple[str, ...]
    texts: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a palette chooses among the candidates of an entry.

    Attributes
    ----------
    promise : Promise
    found : tuple of str
        What is known against it.
    log_weights : ndarray, shape (n_candidates,)
    picks : ndarray of int
        Positions of those chosen, in order; empty when no candidate clears the floors.
    """

    promise: Promise
    found: tuple[str, ...]
    log_weights: np.ndarray
    picks: np.ndarray


class Replays:
    """The last answers by id and prompt, in memory, the oldest forgotten first.

    For the event loop alone. Answers without a palette are not kept: nothing was scored.

    Parameters
    ----------
    max_entries : int
        0 keeps none.
    keeps_texts : bool
        Whether the candidates' texts are kept too.

    Notes
    -----
    An entry takes about 5 kB with N = 16 and 7 values, of which 0.9 kB are rewards: 1000 of them
    5 MB, and at most `CALIBRATIONS` calibrations that nobody else may hold any more. Texts, where
    they are kept, take what all candidates have.
    """

    def __init__(self, max_entries: int, *, keeps_texts: bool = False) -> None:
        self.max_entries = max_entries
        self._keeps_texts = keeps_texts
        self._entries: OrderedDict[tuple[str, int], Entry] = OrderedDict()
        self._calibrations: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def watch(self, aligner: Aligner) -> None:
        """Keep what this aligner answers from now on."""
        aligner.observers.append(lambda served: self._note(served, aligner))

    def _note(self, served: Served, aligner: Aligner) -> None:
        plan, group, options = served.plan, served.group, served.plan.request.palette
        if self.max_entries == 0 or group is None or served.promise is None or options is None:
            return
        texts = tuple(map(answer_text, served.candidates)) if self._keeps_texts else None
        entry = Entry(
            model=served.model,
            group=group,
            palette=_digest(options),
            promise=served.promise,
            found=served.found,
            n_solved=plan.n_candidates if plan.promise is None else plan.promise.n_candidates,
            indices=tuple(candidate.index for candidate in served.candidates),
            picks=served.picks,
            uncovered=tuple(aligner.uncovered(plan)),
            texts=texts,
        )
        self._entries[plan.request.answer_id, plan.request.prompt_index] = entry
        if group.calibration is not None:
            self._calibrations[id(group.calibration)] += 1
        while len(self._entries) > self.max_entries or len(self._calibrations) > CALIBRATIONS:
            self._forget_oldest()

    def find(self, answer_id: str, prompt_index: int) -> Entry:
        """Return what is kept of an answer.

        Raises
        ------
        AnswerNotFoundError
        """
        if self.max_entries == 0:
            msg = "this server keeps no answers to replay: its operator has set replay_entries to 0"
            raise AnswerNotFoundError(msg)
        entry = self._entries.get((answer_id, prompt_index))
        if entry is None:
            where = f", prompt {prompt_index}," if prompt_index else ""
            msg = (
                f"there is no answer {answer_id!r}{where} to replay: the last {self.max_entries} "
                "answers with a palette are kept until the server stops; send the request again"
            )
            raise AnswerNotFoundError(msg)
        return entry

    def _forget_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        if entry.group.calibration is not None:
            key = id(entry.group.calibration)
            self._calibrations[key] -= 1
            if not self._calibrations[key]:
                del self._calibrations[key]


async def replay(entry: Entry, options: PaletteOptions, promiser: Promiser) -> Replayed:
    """Return what a palette chooses among the candidates of an earlier answer.

    With the palette of that answer, that is the choice served. With another one it is what the
    request would have got, by the same seed, on the calibration it had.

    Parameters
    ----------
    entry : Entry
    options : PaletteOptions
        With nothing left to look up. `report` and `deadline_ms` have no say.
    promiser : Promiser

    Raises
    ------
    PaletteError
        When it asks for another N than the answer had; and as `Promiser.on_traffic`.
    InfeasiblePaletteError, CalibrationMissingError
    """
    group = entry.group
    if _digest(options) == entry.palette:
        # Solved again, multipliers may differ in their last digits.
        promise, found = entry.promise, entry.found
    else:
        if options.candidates not in (None, entry.n_solved):
            msg = (
                f"the answer was chosen among {entry.n_solved} candidates, and there are no others "
                f"to choose among, not {options.candidates}: leave candidates out, or send a new "
                "request"
            )
            raise PaletteError(msg, param="candidates")
        had = group.calibration
        if options.calibration is not None and (
            had is None or options.calibration not in (had.id, had.info.name)
        ):
            msg = (
                f"the answer was not made with the calibration {options.calibration}: leave it "
                "out, or send a new request"
            )
            raise PaletteError(msg, param="calibration")
        for name in group.lost(promiser.values):
            if name in options.targets or name in options.floors:
                msg = f"{name} could not be scored for this answer; replay it without"
                raise PaletteError(msg, param=f"targets.{name}")
        options = options.model_copy(update={"candidates": entry.n_solved})
        planned = None
        if options.scope == "answer":
            promiser.check(options, group.n_choices)
        else:
            planned = await promiser.on_traffic(options, group.calibration, group.n_choices)
        promise, warnings = await promise_for(group, options, planned, promiser)
        found = tuple(warnings)
    log_weights, picks = choose(group, promise, promiser.values)
    return Replayed(promise, found, log_weights, picks)


def _digest(options: PaletteOptions) -> bytes:
    """Return what palettes share that choose the same, in whatever detail and time."""
    wire = repr(options.model_dump(exclude={"report", "deadline_ms"}))
    return hashlib.sha256(wire.encode(errors="replace")).digest()
