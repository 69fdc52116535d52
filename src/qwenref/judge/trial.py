"""Which stage of an engine is wrong: the status of each, from its own dumps.

A stage that contradicts what it was computed from is wrong, or just its file is: then what was
computed from it is right if that file is passed over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwenref.judge.explanation import Status
from qwenref.judge.held import Held
from qwenref.judge.laying_out import lay_out, lay_out_by_consumers
from qwenref.judge.precision_of import Account, account_of
from qwenref.judge.replay import NOTHING, Replay, Skip
from qwenref.judge.weight_noise import weight_noise
from qwenref.stages import ATTENTION, RESIDUAL

CHAIN = (RESIDUAL, *(stage.name for stage in ATTENTION))
"""What enters the layer, and the nine."""


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
    """

    name: str
    status: Status = "unmeasured"
    reason: str | None = None
    account: Account | None = None
    skip: Skip = NOTHING
    bits: dict[str, float] = field(default_factory=dict)


class Trial:
    """Judges every stage that a replay holds.

    Attributes:
        replay: The dumps, laid out.
        standings: By stage, in chain order.
    """

    def __init__(self, replay: Replay, ways: Mapping[str, Sequence[Held]], *, exact_weights: bool):
        """Judge.

        Args:
            replay: It holds nothing yet.
            ways: How each dumped stage may be read.
            exact_weights: Whether rounded weights are a fault.
        """
        self.replay = replay
        self.standings = {name: Standing(name) for name in CHAIN}
        self._exact_weights = exact_weights
        self._known: dict[tuple[str, Skip], tuple[Account, dict[str, float] | None]] = {}
        for name in CHAIN:
            if name in ways:
                lay_out(replay, name, ways[name])
        for name in CHAIN:
            if name in ways and replay.can(name) and not self._right(name, NOTHING):
                held = replay.held[name]
                lay_out_by_consumers(replay, name, ways[name])
                if replay.held[name] is not held:
                    self._known.clear()
        distrusted = NOTHING
        for name in CHAIN:
            if name in replay.held:
                self.standings[name] = standing = self._stand(name, distrusted)
                if standing.status == "dumped_wrong":
                    distrusted |= {name}

    def consumers(self, name: str, skip: Skip = NOTHING) -> list[str]:
        """Return the dumped stages that are computed from a dump, directly or over a bridge."""
        return [
            after
            for after in CHAIN
            if after in self.replay.held
            and self.replay.can(after, skip)
            and name in self.replay.reads(after, skip)
        ]

    def _stand(self, name: str, skip: Skip) -> Standing:
        if not self.replay.can(name, skip):
            return Standing(name, reason="what it is computed from is not known")
        account, bits = self._account(name, skip)
        standing = Standing(name, "agree", None, account, skip, bits or {})
        if bits is not None and not (bits and self._exact_weights):
            if account.weighed.blind:
                standing.status = "blind"
                standing.reason = "so much error is normal here that it hides all"
            return standing
        wrong = self._dumped_wrong(name, skip)
        standing.status = "dumped_wrong" if wrong else "added"
        return standing

    def _dumped_wrong(self, name: str, skip: Skip) -> bool:
        """Return whether a wrong file was not what the engine went on with."""
        passed_over = skip | {name}
        cleared = False
        for after in self.consumers(name, skip):
            from_dump = self._right(after, skip)
            if not self.replay.can(after, passed_over):
                continue
            without = self._right(after, passed_over)
            if from_dump and not without:
                return False
            cleared |= without and not from_dump
        return cleared

    def _right(self, name: str, skip: Skip) -> bool:
        return self._account(name, skip)[1] is not None

    def _account(self, name: str, skip: Skip) -> tuple[Account, dict[str, float] | None]:
        """Return how a stage was computed, and the bits of rounded weights; None if it is wrong."""
        if (name, skip) not in self._known:
            account = account_of(self.replay, name, skip)
            bits: dict[str, float] | None = {} if account.agrees else None
            if bits is None and not account.weighed.residual.contradictions:
                noise = weight_noise(self.replay, name, skip)
                bits = None if noise is None else noise.bits
            self._known[name, skip] = account, bits
        return self._known[name, skip]
