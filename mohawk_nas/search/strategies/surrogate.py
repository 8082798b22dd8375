"""A linear model of the trials so far, and the layout that it likes best."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.budget import Budget, Limit
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import (
    STRATEGIES,
    Proposal,
    SearchContext,
    Strategy,
    at_least,
    random_unseen,
)

Array = npt.NDArray[np.float64]

ENUMERATED = 4096
"""Layouts on the budget up to which all of them are looked at; larger spaces go to HiGHS."""
RIDGES = tuple(10.0**power for power in np.arange(-5, 2.5, 0.5))
"""Ridge penalties to choose from, as shares of the features' mean square."""
PAIR_SCALES = (0.03, 0.1, 0.3, 1.0)
"""Prior variances of a pair's effect to choose from, where a single layer's is 1."""


@STRATEGIES.register("surrogate")
@dataclass(frozen=True, kw_only=True)
class Surrogate(Strategy):
    """Fits a linear model to the trials and proposes the unseen layout with the lowest prediction.

    The model has an effect of each candidate in each layer and, if ``pairwise``, of each two of
    them in two layers: the cluster expansion that Super Apriel (arXiv 2604.19877) fits to a
    supernet's placements. Its ridge penalty is the one with the smallest leave-one-out error. The
    lowest prediction is found exactly: by looking at all layouts where they are few, else by the
    HiGHS of scipy, with one cut for each layout that is seen.
    """

    model: Literal["additive", "pairwise"] = "pairwise"
    explore: Literal["none", "thompson"] = "thompson"
    """``thompson`` takes coefficients drawn from their posterior instead of its mean, so proposals
    made at the same time differ as well."""
    design: int = 8
    """Layouts drawn at random before there is a model; baselines count."""
    time_limit: float = 20.0
    """Seconds that HiGHS may take. Past them its best layout so far counts, or if it has none, one
    at random; a proposal that is cut short may differ when a study is resumed."""

    def __post_init__(self) -> None:
        at_least(2, design=self.design)
        at_least(0, time_limit=self.time_limit)

    def propose(self, context: SearchContext) -> Proposal | None:
        space, budget, seen = context.space, context.budget, context.seen
        if len(seen) >= budget.count(space):
            return None
        finite = [value for _, value in context.finished if np.isfinite(value)]
        way = "design"
        if len(context.finished) >= self.design and len(finite) > 1:
            values = np.array([min(value, max(finite)) for _, value in context.finished])
            codes = Codes.of(space)
            known = codes.matrix([layout for layout, _ in context.finished])
            rng = np.random.default_rng(context.seed) if self.explore == "thompson" else None
            model = fit(known, values, pairwise=self.model == "pairwise", rng=rng)
            found = minimise(
                model,
                space,
                budget,
                seen=seen,
                time_limit=self.time_limit,
                enumerated=ENUMERATED,
            )
            if found is not None:
                return Proposal(layout=found, proposed_by=self.label)
            way = "fallback"
        drawn = random_unseen(space, budget, seen, random.Random(context.seed))
        return None if drawn is None else Proposal(layout=drawn, proposed_by=f"{self.label}:{way}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """Layouts as 0 and 1: whether a free layer has a candidate, for all but the first replacement.

    The first replacement is what a layer has if it has none of the others.
    """

    choices: tuple[tuple[int, str], ...]
    """(layer, candidate) of each column."""

    @classmethod
    def of(cls, space: SearchSpace) -> Codes:
        """The columns of a space."""
        names = (ATTENTION, *space.replacements[1:])
        return cls(choices=tuple((layer, name) for layer in space.free_layers for name in names))

    def matrix(self, layouts: Sequence[Layout]) -> Array:
        """``(layouts, columns)``"""
        rows = [[layout[layer] == name for layer, name in self.choices] for layout in layouts]
        return np.array(rows, dtype=float).reshape(len(layouts), len(self.choices))


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearModel:
    """``codes @ effects + sum over j < k of pairs[j, k] codes[j] codes[k]``, up to a constant."""

    effects: Array
    """``(columns,)``"""
    pairs: Array | None
    """``(columns, columns)``, upper triangle; None for an additive model."""

    def predict(self, codes: Array) -> Array:
        """``(layouts, columns)`` to ``(layouts,)``, up to a constant."""
        predicted: Array = codes @ self.effects
        if self.pairs is not None:
            predicted = predicted + np.einsum("nj,nj->n", codes @ self.pairs, codes)
        return predicted


def fit(
    codes: Array, values: Array, *, pairwise: bool, rng: np.random.Generator | None = None
) -> LinearModel:
    """Ridge regression with an unpenalised constant.

    Args:
        codes: ``(trials, columns)``
        values: ``(trials,)``
        pairwise: Whether two columns may interact.
        rng: Draws the coefficients from their posterior (Gaussian prior and noise, whose common
            scale is the one under which the values are likeliest); None takes its mean.

    The penalty, and the scale of pairs, have the smallest leave-one-out error, which has a closed
    form: residual / (1 - leverage).
    """
    num_trials = len(values)
    inner = codes @ codes.T
    # Of 0 and 1, products of two columns are (t^2 - t) / 2 if t columns agree.
    pair_kernel = (inner**2 - inner) / 2
    centre = np.eye(num_trials) - 1 / num_trials
    target = values - values.mean()
    best: tuple[float, float, float, Array, Array] | None = None
    for scale in PAIR_SCALES if pairwise else (0.0,):
        spectrum, basis = np.linalg.eigh(centre @ (inner + scale * pair_kernel) @ centre)
        spectrum = spectrum.clip(min=0.0)
        size = spectrum.mean() or 1.0
        rotated = basis.T @ target
        for share in RIDGES:
            shrunk = 1 / (spectrum + share * size)
            leverage = (basis**2) @ (spectrum * shrunk) + 1 / num_trials
            residual = share * size * (basis @ (shrunk * rotated))
            error = float(np.mean((residual / (1 - leverage).clip(min=1e-9)) ** 2))
            if best is None or error < best[0]:
                best = error, scale, share * size, basis, shrunk
    assert best is not None
    _, scale, ridge, basis, shrunk = best
    columns = codes.shape[1]
    effects, pairs = np.zeros(columns), np.zeros((columns, columns))
    if rng is not None:
        # A draw from the prior, moved by what the trials say against it (Matheron's rule).
        rotated = basis.T @ target
        variance = ridge * float(np.mean(rotated**2 * shrunk))
        spread = np.sqrt(variance / ridge)
        effects = rng.normal(size=columns) * spread
        pairs = np.triu(rng.normal(size=(columns, columns)), 1) * spread * np.sqrt(scale)
        drawn = LinearModel(effects=effects, pairs=pairs).predict(codes)
        target = centre @ (values - drawn - rng.normal(size=num_trials) * np.sqrt(variance))
    weights = basis @ (shrunk * (basis.T @ target))
    effects = effects + codes.T @ weights
    pairs = pairs + scale * np.triu(codes.T @ (weights[:, None] * codes), 1)
    return LinearModel(effects=effects, pairs=pairs if pairwise else None)


def minimise(
    model: LinearModel,
    space: SearchSpace,
    budget: Budget,
    *,
    seen: Collection[Layout],
    limits: Sequence[Limit] = (),
    time_limit: float = 20.0,
    enumerated: int = ENUMERATED,
) -> Layout | None:
    """The layout with the lowest prediction that is on the budget, within all limits and not seen.

    Args:
        model: Over the columns of ``Codes.of(space)``.
        space: What may be chosen.
        budget: What every layout must meet.
        seen: Layouts on the budget that must not come out.
        limits: Further limits.
        time_limit: Seconds that HiGHS may take; past them the best layout it has found.
        enumerated: Spaces with no more layouts than this are looked at whole.

    Returns:
        None if there is no such layout, or none was found in time.
    """
    if budget.count(space) > enumerated:
        return _solve(model, space, budget, seen=seen, limits=limits, time_limit=time_limit)
    layouts = [
        layout
        for layout in budget.enumerate(space)
        if layout not in seen and all(limit.meets(layout) for limit in limits)
    ]
    if not layouts:
        return None
    return layouts[int(np.argmin(model.predict(Codes.of(space).matrix(layouts))))]


def _solve(
    model: LinearModel,
    space: SearchSpace,
    budget: Budget,
    *,
    seen: Collection[Layout],
    limits: Sequence[Limit],
    time_limit: float,
) -> Layout | None:
    # One 0-1 variable a (free layer, candidate), then one from 0 to 1 for each product of two of
    # the model's columns. Products are linear in the usual way: at most either factor, at least
    # their sum less 1, each where the objective would go past it.
    free, names = space.free_layers, (ATTENTION, *space.replacements)
    place = {choice: i for i, choice in enumerate((i, name) for i in free for name in names)}
    choices, kept = Codes.of(space).choices, budget.num_free(space)
    fixed = budget.attention_layers is not None
    program = _Program()
    for layer in free:
        program.row({place[layer, name]: 1.0 for name in names}, 1.0, 1.0)
    for limit in [*budget.linear(space), *limits]:
        costs = {at: limit.costs.get(choice, 0.0) for choice, at in place.items()}
        spent = limit.rest + sum(limit.costs.get(pin, 0.0) for pin in space.pinned.items())
        # HiGHS has absolute tolerances, and costs may be bytes.
        size = max(map(abs, costs.values()), default=0.0) or 1.0
        program.row(
            {at: cost / size for at, cost in costs.items() if cost},
            (limit.least - spent) / size,
            (limit.most - spent) / size,
        )
    for layout in seen:
        if len(space.replacements) == 1 and kept and fixed:
            # Where nothing else is to choose, the attention layers are the layout.
            same = [place[i, ATTENTION] for i in free if layout[i] == ATTENTION]
        else:
            same = [place[i, layout[i]] for i in free]
        program.row(dict.fromkeys(same, 1.0), -np.inf, len(same) - 1.0)
    costs = dict(zip((place[choice] for choice in choices), model.effects, strict=True))
    num_products = 0
    if model.pairs is not None:
        product: dict[tuple[int, int], int] = {}
        for j, k in itertools.combinations(range(len(choices)), 2):
            if choices[j][0] == choices[k][0]:
                continue
            at = len(place) + num_products
            num_products += 1
            product[j, k] = product[k, j] = at
            one, other = place[choices[j]], place[choices[k]]
            costs[at] = model.pairs[j, k]
            if costs[at] > 0:
                program.row({one: 1.0, other: 1.0, at: -1.0}, -np.inf, 1.0)
            else:
                program.row({at: 1.0, one: -1.0}, -np.inf, 0.0)
                program.row({at: 1.0, other: -1.0}, -np.inf, 0.0)
        # The number of attention layers times each column holds for products as well, or its bound.
        # It is implied for whole numbers, but without it the relaxation is so loose that 30 layers
        # take seconds.
        for j, (layer, name) in enumerate(choices):
            row = {
                product[j, k]: 1.0
                for k, (other, what) in enumerate(choices)
                if what == ATTENTION and other != layer
            }
            row[place[layer, name]] = -float(kept - (name == ATTENTION))
            program.row(row, 0.0 if fixed else -np.inf, 0.0)
    found = program.minimum(costs, len(place), num_products, time_limit=time_limit)
    if found is None:
        return None
    layout = space.fill({i: name for (i, name), at in place.items() if found[at] > 0.5})
    # Within the tolerances it may be over a limit whose costs are many digits long.
    return layout if budget.meets(layout) and layout not in seen else None


class _Program:
    """Rows of a mixed-integer program."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, float]] = []
        self._bounds: list[tuple[float, float]] = []

    def row(self, coefficients: Mapping[int, float], least: float, most: float) -> None:
        """Adds ``least <= coefficients . x <= most``."""
        number = len(self._bounds)
        self._entries += [(number, at, value) for at, value in coefficients.items()]
        self._bounds.append((least, most))

    def minimum(
        self, costs: Mapping[int, float], num_binary: int, num_real: int, *, time_limit: float
    ) -> Array | None:
        """The x with the lowest cost; binary variables come first, the others lie in 0 to 1."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        size = num_binary + num_real
        objective = np.zeros(size)
        objective[list(costs)] = list(costs.values())
        # HiGHS has absolute tolerances.
        objective /= np.abs(objective).max(initial=0.0) or 1.0
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self._bounds), size))
        least, most = zip(*self._bounds, strict=True)
        solution: Any = milp(
            objective,
            integrality=np.repeat([1, 0], [num_binary, num_real]),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, least, most),
            options={"time_limit": time_limit, "mip_rel_gap": 0.0},
        )
        x: Array | None = solution.x
        return x
