"""Which stage of an engine is wrong: the status of each, from its own dumps.

A stage that contradicts what it was computed from is wrong, or just its file is: then what was
computed from it is right if that file is passed over.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qwenref.trial.explanation import Status
from qwenref.trial.held import Held
from qwenref.trial.laying_out import (
    SIBLINGS,
    lay_out,
    lay_out_by_consumers,
    lay_out_siblings,
)
from qwenref.trial.matched_filter import Below, judged, look_below
from qwenref.trial.naming import Naming, name_cause
from qwenref.trial.precision import Account, account_of
from qwenref.trial.replay import NOTHING, Replay, Skip
from qwenref.trial.tensors import Tensors
from qwenref.trial.weight_noise import weight_noise

MOST_PASSED = 3
"""Stages that are wrong in any case and passed over, one after the other, in search of evidence for
or against a dump; without a limit a dump in which all stages are wrong takes 2**16 replays.
"""


@dataclass
class Standing:
    """What is known of one stage.

    Attributes:
        name: The stage.
        status: The judgement.
        reason: In words, where that does not speak for itself.
        account: How it was held to what it was computed from; None if it could not be.
        skip: Whose dumps were passed over for that.
        bits: Of weights that are rounded, if that explains it.
        naming: The mistakes that explain it, if it is wrong.
        below: What is below its noise; None if that was not looked for.
    """

    name: str
    status: Status = "unmeasured"
    reason: str | None = None
    account: Account | None = None
    skip: Skip = NOTHING
    bits: dict[str, float] = field(default_factory=dict)
    naming: Naming | None = None
    below: Below | None = None


class How(NamedTuple):
    """What is asked for.

    Attributes:
        exact_weights: Whether rounded weights are a fault.
        quick: Whether mistakes are not sought below the noise.
        progress: Called with the name of each step before it begins.
    """

    exact_weights: bool
    quick: bool
    progress: Callable[[str], object]


class Trial:
    """Judges every stage that a replay holds.

    Attributes:
        replay: The dumps, laid out.
        tensors: What else the engine may have taken.
        stages: Those that are judged, in chain order.
        standings: By stage, in chain order.
    """

    def __init__(
        self,
        replay: Replay,
        stages: Sequence[str],
        ways: Mapping[str, Sequence[Held]],
        tensors: Tensors,
        how: How,
    ):
        """Judge.

        Args:
            replay: It holds nothing yet.
            stages: Which are judged, in chain order.
            ways: How each dumped stage may be read.
            tensors: What else the engine may have taken.
            how: What is asked for.
        """
        self._ways, self.tensors = ways, tensors
        self.replay = replay
        self.stages = stages
        self.standings = {name: Standing(name) for name in self.stages}
        self._exact_weights, self._progress = how.exact_weights, how.progress
        self._known: dict[tuple[str, Skip], tuple[Account, dict[str, float] | None]] = {}
        how.progress("laying out what was dumped")
        for name in self.stages:
            if name in ways:
                lay_out(replay, name, ways[name])
        for name in reversed(self.stages):  # what follows decides what a stage is
            if name in ways and replay.can(name) and self._may_be_misread(name):
                held = replay.held[name]
                lay_out_by_consumers(replay, name, ways[name], self.consumers(name))
                if replay.held[name] is not held:
                    self._known.clear()
        self._lay_out_siblings()
        distrusted = NOTHING
        for name in self.stages:
            if name in replay.held:
                how.progress(f"holding {name} to what it was computed from")
                self.standings[name] = standing = self._stand(name, distrusted)
                if standing.status == "dumped_wrong":
                    distrusted |= {name}
                    self._lay_out_after(name, distrusted)
        if not how.quick:
            self._look_below()

    def _look_below(self) -> None:
        looks = {}
        for name, of in self.standings.items():
            if of.status == "agree" and of.account is not None and not of.bits:
                self._progress(f"seeking mistakes below the noise of {name}")
                look = look_below(self.replay, self.tensors, name, of.skip, of.account)
                if look is not None:
                    looks[name] = look
        for name, below in judged(looks).items():
            self.standings[name].below = below

    def _lay_out_siblings(self) -> None:
        """Lay out q and k together, if both are wrong and do not make the scores."""
        shared = [*set(self.consumers("q_post_rope")) & set(self.consumers("k_post_rope"))]
        wrong = [name for name in SIBLINGS if name in self._ways and self._wrong(name, NOTHING)]
        if len(wrong) == 2 and shared and not any(self._right(of, NOTHING) for of in shared):
            lay_out_siblings(self.replay, self._ways, shared)
            self._known.clear()

    def _lay_out_after(self, name: str, distrusted: Skip) -> None:
        """Lay out again what a wrong file may have misled about."""
        for after in self.stages[self.stages.index(name) + 1 :]:
            if len(self._ways.get(after, ())) > 1:
                before = self.replay.held[after]
                lay_out(self.replay, after, self._ways[after], distrusted)
                if self.replay.held[after] is not before:
                    self._known.clear()

    def consumers(self, name: str, skip: Skip = NOTHING) -> list[str]:
        """Return the dumped stages that are computed from a dump, directly or over a bridge."""
        return [
            after
            for after in self.stages
            if after in self.replay.held
            and after not in skip
            and self.replay.can(after, skip)
            and name in self.replay.reads(after, skip)
        ]

    def _may_be_misread(self, name: str) -> bool:
        """Return whether a stage fits in no way, or in an odd one that nothing else confirms."""
        held, usual = self.replay.held[name], self._ways[name][0]
        if held.factor != 1 or held.way is not usual.way:
            return not any(self._right(after, NOTHING) for after in self.consumers(name))
        return not self._right(name, NOTHING)

    def _stand(self, name: str, skip: Skip) -> Standing:
        if not self.replay.can(name, skip):
            return Standing(name, reason="what it is computed from is not known")
        account, bits = self._account(name, skip)
        standing = Standing(name, "agree", None, account, skip, bits or {})
        if self.replay.held[name].factor != 1 and not self.consumers(name, skip):
            standing.status = "blind"
            standing.reason = (
                f"{self.replay.held[name].layout}: without what is computed from it, it cannot be "
                "told whether that is a convention"
            )
            return standing
        if bits and not self._exact_weights:
            naming = self._named(name, skip)
            if naming.causes:  # that is more than a likeness
                standing.status, standing.naming, standing.bits = "added", naming, {}
                return standing
        if bits is not None and not (bits and self._exact_weights):
            if account.weighed.blind:
                standing.status = "blind"
                standing.reason = "so much error is normal here that it hides all"
            return standing
        if account.hidden:
            standing.status = "blind"
            between = ", ".join(
                of for of in self.replay.chain if of in self.replay.bridges(name, skip)
            )
            standing.reason = (
                f"nothing explains it, but roundings in {between}, which cannot be read, might"
            )
            return standing
        standing.naming = self._named(name, skip)
        wrong = self._dumped_wrong(name, skip)
        standing.status = "dumped_wrong" if wrong else "added"
        return standing

    def _named(self, name: str, skip: Skip) -> Naming:
        self._progress(f"trying which mistake makes {name} what it is")
        return name_cause(self.replay, self.tensors, name, skip)

    def _dumped_wrong(self, name: str, skip: Skip) -> bool:
        """Return whether a wrong file was not what the engine went on with."""
        return self._evidence(name, skip) > 0

    def _evidence(self, name: str, skip: Skip, passed: Sequence[str] = ()) -> int:
        """Return whether what was computed from a dump speaks against it: 1, for it: -1, or 0.

        If a consumer is wrong in any case, it may be for another dump that is wrong; else those are
        asked that were computed from that one, past `MOST_PASSED` at most.
        """
        against = 0
        for after in self.consumers(name, skip):
            behind = not passed or self.stages.index(after) > self.stages.index(passed[-1])
            if not (behind and self.replay.can(after, skip | {name})):
                continue
            found, either = self._compared(name, after, skip)
            if not either:
                read = self.replay.reads(after, skip) - {name}
                others = skip | {of for of in read if self._wrong(of, skip)}
                if self.replay.can(after, others | {name}):
                    found, either = self._compared(name, after, others)
            if not either and len(passed) < MOST_PASSED:
                found = self._evidence(name, skip | {after}, (*passed, after))
            if found < 0:
                return found
            against = max(against, found)
        return against

    def _compared(self, name: str, after: str, skip: Skip) -> tuple[int, bool]:
        """Return whether a stage speaks against a dump, and whether it follows from anything."""
        from_dump = self._support(after, skip, name)
        without = self._support(after, skip | {name})
        if without == 1 and not from_dump and not self._rounds_weights(name):
            without = 0  # noise of other kinds looks like that too, over several products
        return (without > from_dump) - (without < from_dump), bool(without or from_dump)

    def _support(self, name: str, skip: Skip, of: str = "") -> int:
        """Return how well a stage follows, from 0 to 3.

        3: in some precision; 2: if dumps were rounded when they were written; 1: but for rounded
        weights. It does not speak for a dump that is passed over to explain it.
        """
        account, bits = self._account(name, skip, again=True)
        if account.choices and all(of in choice.dialect.skips for choice in account.choices):
            return 0
        if account.agrees:
            return 2 if any(choice.dialect.estimated for choice in account.choices) else 3
        return int(bits is not None)

    def _rounds_weights(self, but: str) -> bool:
        """Return whether rounded weights show where a dump was not read."""
        return any(
            self._account(name, NOTHING)[1]
            for name in self.replay.held
            if name != but and self.replay.can(name) and but not in self.replay.reads(name)
        )

    def _right(self, name: str, skip: Skip) -> bool:
        return self._account(name, skip)[1] is not None

    def _wrong(self, name: str, skip: Skip) -> bool:
        return self.replay.can(name, skip) and not self._right(name, skip)

    def _account(
        self, name: str, skip: Skip, *, again: bool = False
    ) -> tuple[Account, dict[str, float] | None]:
        """Return how a stage was computed, and the bits of rounded weights; None if it is wrong.

        Args:
            name: The stage.
            skip: Whose dumps are passed over.
            again: Whether it is laid out again, since a dump that is passed over may have misled.
        """
        if (name, skip) not in self._known:
            before = self.replay.held[name]
            if again and skip and len(self._ways[name]) > 1:
                lay_out(self.replay, name, self._ways[name], skip)
            account = account_of(self.replay, name, skip)
            if self.replay.held[name] is not before:
                self.replay.hold(name, before)
            bits: dict[str, float] | None = {} if account.agrees else None
            if bits is None and not account.weighed.residual.contradictions:
                noise = weight_noise(self.replay, name, skip, account.added.floors)
                bits = None if noise is None else noise.bits
            self._known[name, skip] = account, bits
        return self._known[name, skip]
