"""Compares results row by row: their ratios, those of a yardstick beside them, and what can be concluded."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .report import FLOOR

#: What of a row may be timed, and what its name then ends with.
MEASURES = {"median_ms": "", "forward_ms": ", forward", "backward_ms": ", backward", "graph_ms": ", graph"}


class Key(NamedTuple):
    """What of one result is paired with the same of another."""

    input: str
    name: str


class Timed(NamedTuple):
    ms: float
    mib: float | None
    is_peer: bool  # which no change of ours makes faster


@dataclass(frozen=True)
class Comparison:
    """A row in pairs of an old and a new result."""

    input: str
    name: str
    old_ms: float  # median over the results
    new_ms: float
    old_mib: float | None
    new_mib: float | None
    ratios: list[float]  # new / old, of each pair
    adjusted: list[float] | None  # the same over the yardstick's

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def adjusted_ratio(self) -> float | None:
        return self.adjusted and statistics.median(self.adjusted)

    @property
    def verdict(self) -> str | None:
        """None of a single pair, which has no range."""
        if len(self.ratios) < 2:
            return None
        if max(self.ratios) < 1:
            return "faster"
        return "slower" if min(self.ratios) > 1 else "same"

    def as_json(self) -> dict[str, Any]:
        found = {"ratio": self.ratio, "adjusted_ratio": self.adjusted_ratio, "verdict": self.verdict}
        return asdict(self) | found


@dataclass(frozen=True)
class Comparisons:
    """What came out of pairs of results."""

    rows: list[Comparison]
    yardsticks: dict[str, str | None]  # by input, what it is
    only_old: list[Key]
    only_new: list[Key]

    def as_json(self) -> dict[str, Any]:
        lists = {name: [key._asdict() for key in getattr(self, name)] for name in ("only_old", "only_new")}
        return {"rows": [row.as_json() for row in self.rows], "yardsticks": self.yardsticks} | lists


def times_of(result: Mapping[str, Any]) -> dict[Key, Timed]:
    """What is timed in a result."""
    times: dict[Key, Timed] = {}
    for case in result["cases"]:
        rows = [(row, True) for row in case["providers"]] + [(row, False) for row in case.get("parts", [])]
        for row, is_provider in rows:
            is_peer = is_provider and not row["name"].startswith("ial_cuda")
            for measure, suffix in MEASURES.items():
                if row.get(measure) is None:
                    continue
                key = Key(case["input"], row["name"] + suffix)
                if key in times:
                    raise ValueError(f"{key.name!r} of {key.input!r} stands there twice, expected once")
                mib = None if suffix else row.get("extra_mib")
                times[key] = Timed(row[measure], mib, is_peer and not suffix)
    return times


def compare(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Comparisons:
    """Pairs the rows of the old and the new result of each pair."""
    olds, news = ([times_of(result) for result in results] for results in zip(*pairs, strict=True))
    everywhere = [key for key in olds[0] if all(key in times for times in (*olds, *news))]
    yardsticks = {
        given: _yardstick([key for key in everywhere if key.input == given], olds[0])
        for given in dict.fromkeys(key.input for key in everywhere)
    }
    rows = []
    for key in everywhere:
        old, new = [times[key] for times in olds], [times[key] for times in news]
        ratios = _ratios(key, olds, news)
        by = [_ratios(peer, olds, news) for peer in yardsticks[key.input]]
        scales = [statistics.geometric_mean(of_pair) for of_pair in zip(*by, strict=True)]
        rows.append(
            Comparison(
                *key,
                statistics.median(timed.ms for timed in old),
                statistics.median(timed.ms for timed in new),
                old[0].mib,
                new[0].mib,
                ratios,
                [ratio / scale for ratio, scale in zip(ratios, scales, strict=True)] if scales else None,
            )
        )
    only_old, only_new = (
        list(dict.fromkeys(key for times in results for key in times if key not in everywhere))
        for results in (olds, news)
    )
    names = {
        given: peers[0].name if len(peers) == 1 else f"geometric mean of {len(peers)}" if peers else None
        for given, peers in yardsticks.items()
    }
    return Comparisons(rows, names, only_old, only_new)


def _ratios(key: Key, olds: Sequence[dict[Key, Timed]], news: Sequence[dict[Key, Timed]]) -> list[float]:
    return [new[key].ms / old[key].ms for old, new in zip(olds, news, strict=True)]


def _yardstick(keys: Sequence[Key], times: Mapping[Key, Timed]) -> list[Key]:
    """What tells how fast the machine is: the floor where there is one, else all that is not ours."""
    floor = [key for key in keys if key.name == FLOOR]
    return floor or [key for key in keys if times[key].is_peer]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two results' circumstances differ."""
    told = [{"rounds": result.get("rounds")} | result["machine"] for result in (old, new)]
    names = dict.fromkeys(name for facts in told for name in facts)
    values = [(name, *(facts.get(name) for facts in told)) for name in names]
    return [f"{name}: {before} → {after}" for name, before, after in values if before != after]
