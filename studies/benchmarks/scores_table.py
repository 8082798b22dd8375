"""Writes the scores of a finished search as a table that `replay.py` reads.

`replay.py` needs every layout of the space, and the baselines `swap_one` and `greedy`, whose probes
are then there; a table of a part of the space only records what came out:

    mohawk-nas search studies/quickstart.yaml
    python studies/benchmarks/scores_table.py runs/quickstart
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import yaml

from mohawk_nas.errors import MohawkError, RunError
from mohawk_nas.files import write_json
from mohawk_nas.pipeline import load_best
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import load_space
from mohawk_nas.search.study import load_result

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    try:
        write(parser.parse_args().run)
    except MohawkError as error:
        print(f"scores_table: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(run: Path) -> None:
    best = load_best(run)
    # Recall is left out where the teacher solves no probe, whatever the study says.
    written = yaml.safe_load((run / "best.yaml").read_text(encoding="utf-8"))
    measured, search = written["scores"]["objectives"], best.study.search
    weights = {name: weight for name, weight in search.objective.items() if name in measured}
    pareto = [name for name in search.pareto if name in measured]
    allowed = dataclasses.replace(search, objective=weights, pareto=pareto)
    config = dataclasses.replace(best.study, search=allowed)
    kept = config.budget.attention_layers
    limits = config.budget.cache.mib, config.budget.decode.milliseconds
    if not isinstance(kept, int) or limits != (None, None):
        raise RunError(f"{run}: must have a budget of an exact number of attention layers alone")
    space = load_space(config.space, num_layers=len(best.layout))
    budget = Budget(attention_layers=kept)
    result = load_result(config, space, budget, run_dir=run)
    if len(space.replacements) != 1:
        raise RunError(f"{run}: must hold layouts of a space with one replacement")
    if len(config.search.objective) != 1:
        raise RunError(f"{run}: must be a study of one objective, since the table has one value")
    (objective,) = config.search.objective
    table = {
        "name": config.name,
        "num_layers": space.num_layers,
        "attention_layers": budget.attention_layers,
        "objective": objective,
        "possible": result.num_possible,
        "baselines": {name: list(x.attention_layers) for name, x in result.baselines.items()},
        "search_tokens": config.search.tokens,
        "bank_tokens": {"matrix": config.bank.matrix.tokens, "hidden": config.bank.hidden.tokens},
        "made_by": shlex.join([Path(sys.argv[0]).name, run.name]),
        "searched_with": {
            key: value
            for key, value in written["provenance"].items()
            # The command holds paths of the machine it ran on.
            if key != "command"
        },
        "layouts": [
            {"layout": list(trial.layout.attention_layers), "value": trial.value}
            for trial in result.ranking
        ],
        "probes": {
            ",".join(map(str, probe.layout.attention_layers)): probe.score.value(result.weights)
            for probe in result.probes
        },
    }
    path = RESULTS / f"scores_{config.name}.json"
    write_json(path, table)
    print(f"wrote {path.name}: {len(result.trials)} layouts, {len(result.probes)} probes")


if __name__ == "__main__":
    sys.exit(main())
