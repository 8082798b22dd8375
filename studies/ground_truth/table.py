"""Makes, or continues, a table of what layouts are worth: undistilled and distilled.

    python studies/ground_truth/table.py STUDY.yaml --distil 60 --tokens 0,1M,4M

The study names teacher, text, space, budget, bank and, as `distill.logits`, the recipe of stage 3.
The bank is trained if it is not there. Then every layout on the budget (or `--zero-shot` of them,
drawn at random) is scored by every objective on the search split. So are, where all of them are,
those that keep fewer layers: selectors that add one after the other look at some of them, by
whatever they are led. Some are distilled with each
of `--tokens` and each of `--seeds` and measured: what the selectors pick by KL,
the best by each objective, the best one's neighbours by one swap, and layouts from each tenth of
the KL's range. Another bank is another seed of the study: `seed=1` on the command line.

The table is a file of JSON lines, written as it is made; the same command goes on where it was
stopped. The first line says what it was made with; `"kind": "zero_shot"` lines hold a layout's
objectives, `"kind": "probe"` lines those of one off the budget,
the `"kind": "picks"` line what the selectors chose, the `"kind": "stage2"` line each layer's
stage-2 loss, `"kind": "distilled"` lines a layout's figures after so many tokens of stage 3, on the
test split and, as a study's rungs see them, on the validation split.

`--workers 4` shares the work out to four processes; what they print stands in files beside the
table. They take the GPUs in turn: where Python keeps a GPU waiting, several score layouts on one.
One process distils on each.

`--layouts` names a file of further layouts to distil, one a line as `4,10,16,22`: what strategies
pick when they are replayed on the table (`regret.py --missing`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mohawk_nas.audit import choose_layouts, measure_on
from mohawk_nas.config import (
    OBJECTIVES,
    LogitsConfig,
    StudyConfig,
    load_study,
    plain,
    recipe_of,
    token_count,
)
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.errors import InputError, MohawkError, RunError
from mohawk_nas.files import RowFile
from mohawk_nas.layout import Layout
from mohawk_nas.plan import find_problems
from mohawk_nas.ranks import GPU_SHARERS
from mohawk_nas.recall import notation_of
from mohawk_nas.reporting import screen
from mohawk_nas.runs import provenance
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.objectives import BankScorer
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.strategy import SearchContext, named_baselines
from mohawk_nas.search.study import trial_seed
from mohawk_nas.search.workers import environments
from mohawk_nas.workbench import Workbench

DIGITS = 6
"""Of the figures in the table."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        config = load_study(args.study, args.overrides)
        if problems := find_problems(config):
            raise InputError("\n".join(problems))
        if args.workers > 1:
            share_out(config, args)
        else:
            make(config, args)
    except MohawkError as error:
        print(f"table: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", type=Path)
    add("overrides", nargs="*", help="changes to the study, e.g. seed=1")
    add("--out", type=Path, help="table; studies/ground_truth/NAME.jsonl")
    add("--zero-shot", type=int, help="score so many layouts, drawn at random; all")
    add("--picks", action="store_true", help="find what selectors pick, and nothing else")
    add(
        "--distil",
        type=int,
        default=0,
        help="distil so many layouts, or more if so many are picked",
    )
    add("--score", type=Path, help="file of layouts to score as well, one a line")
    add("--layouts", type=Path, help="file of layouts to distil as well, one a line")
    add("--tokens", type=numbers, default=[0], help="budgets of stage 3, e.g. 0,1M,4M")
    add("--seeds", type=numbers, default=[0], help="of stage 3, e.g. 0,1,2")
    add("--seeds-of", type=int, help="layouts that get the seeds after the first; all")
    add("--at-once", type=int, help="students trained side by side; as memory allows")
    add("--part", type=part, default=(0, 1), help="1/2 and 2/2 share the work of two GPUs or hosts")
    add("--workers", type=int, default=1, help="processes, each on the next GPU in turn")
    add("--minutes", type=float, default=float("inf"), help="begin nothing after so long")
    return parser.parse_intermixed_args(argv)


def numbers(text: str) -> list[int]:
    return [token_count(word) for word in text.split(",")]


def part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise ValueError(text)
    return int(number) - 1, int(count)


def share_out(config: StudyConfig, args: argparse.Namespace) -> None:
    """The same by several processes: the bank, then scores and picks, then distillations."""
    until = time.perf_counter() + 60 * args.minutes
    out, distils = table_path(config, args), bool(args.distil or args.layouts)
    scores = [] if args.zero_shot is None else ["--zero-shot", str(args.zero_shot)]
    scores += [] if args.score is None else ["--score", str(args.score)]
    last = [*scores, "--distil", str(args.distil)]
    for name in ("tokens", "seeds"):
        last += [f"--{name}", ",".join(map(str, getattr(args, name)))]
    for name in ("layouts", "seeds_of", "at_once"):
        if (value := getattr(args, name)) is not None:
            last += ["--" + name.replace("_", "-"), str(value)]
    # What selectors pick is found by one, while the others score.
    scorers = args.workers - bool(args.distil)
    rounds = [
        {"bank": ["--zero-shot", "0"]},
        {f"scores-{n}": [*scores, "--part", f"{n}/{scorers}"] for n in range(1, scorers + 1)}
        | ({"picks": ["--picks"]} if args.distil else {}),
    ]
    places = environments(args.workers, config.teacher.device)
    if distils:
        # Students side by side fill a GPU; processes on one GPU would take turns.
        gpus = {place.get("CUDA_VISIBLE_DEVICES") for place in places if GPU_SHARERS in place}
        count = len(gpus) or args.workers
        parts = [f"{n}/{count}" for n in range(1, count + 1)]
        rounds.append({f"distil-{n}": [*last, "--part", x] for n, x in enumerate(parts, 1)})
    for commands in rounds:
        places = environments(len(commands), config.teacher.device)
        running = {}
        for (name, options), place in zip(commands.items(), places, strict=False):
            left = max(0.0, (until - time.perf_counter()) / 60)
            command = [sys.executable, __file__, str(args.study), *args.overrides, *options]
            command += ["--out", str(out), "--minutes", str(left)]
            log = out.with_name(f"{out.stem}.{name}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as printed:
                running[log] = subprocess.Popen(
                    command, stdout=printed, stderr=subprocess.STDOUT, env=os.environ | place
                )
        print(f"{', '.join(commands)}: see {out.with_name(out.stem)}.*.log", flush=True)
        try:
            failed = [log for log, process in running.items() if process.wait()]
        finally:
            # Ctrl-C reaches them too; whoever else stopped this one must not leave them behind.
            for process in running.values():
                process.terminate()
        if failed:
            said = failed[0].read_text(encoding="utf-8").strip().splitlines()
            raise RunError(f"{failed[0]}: {said[-1] if said else 'ended without a word'}")
        if time.perf_counter() > until:
            return


def table_path(config: StudyConfig, args: argparse.Namespace) -> Path:
    return args.out or Path(__file__).parent / f"{config.name}.jsonl"


def make(config: StudyConfig, args: argparse.Namespace) -> None:
    """Everything that the arguments ask for and the table lacks."""
    until = time.perf_counter() + 60 * args.minutes
    reporter = screen.reporter()
    bench = Workbench(config, reporter)
    if len(bench.space.replacements) != 1:
        raise InputError("space.candidates: a table names attention layers, so it takes one mixer")
    table = RowFile(table_path(config, args))
    head = {
        "kind": "head",
        "study": settings(config),
        "identity": {k: v for k, v in bench.identity.items() if not k.startswith("mixers")},
        "recall": {
            s: f"{bench.probe(s)}, {notation_of(s)}" for s in ("search", "validation", "test")
        },
    }
    if not table.rows:
        made_with = {key: value for key, value in provenance().items() if key != "command"}
        # Not compared: it may differ by an answer from one GPU to the next.
        probes = {split: bench.probe(split) for split in ("search", "validation", "test")}
        solved = {s: round(p.teacher_recall, DIGITS) for s, p in probes.items() if p is not None}
        table.add(head | {"teacher_recall": solved, "made_with": made_with})
    elif (kept := {key: table.rows[0].get(key) for key in head}) != json.loads(json.dumps(head)):
        changed = [key for key in head if kept[key] != json.loads(json.dumps(head[key]))]
        raise InputError(f"{table.path}: was begun with another {' and '.join(changed)}")

    if args.part[1] > 1 and bench.bank.missing(bench.space.replaceable):
        raise InputError("--part: needs the whole bank; run once without it and with --zero-shot 0")
    bench.bank.train(bench.space.replaceable, reporter=reporter)
    weights = {n: 1.0 for n in OBJECTIVES if n != "recall" or bench.probe("search")}
    scorer = BankScorer(
        bench.teacher,
        bench.bank,
        bench.blocks["search"],
        pairs=bench.space.replaceable,
        weights=weights,
        probe=bench.probe("search"),
        batch_size=config.search.batch_size,
    )
    if not any(table.find(kind="stage2", bank_seed=config.seed)):
        losses = {str(layer): loss for (layer, _), loss in scorer.stage2_losses().items()}
        table.add({"kind": "stage2", "bank_seed": config.seed, "losses": losses})
    if args.picks:
        picks(bench, probing(bench, scorer, table), table)
        return
    layouts = all_or_some(bench, args.zero_shot)
    layouts = list(dict.fromkeys([*layouts, *named_in(args.score, bench)]))
    wanted = [("zero_shot", layout) for layout in layouts]
    if args.zero_shot is None:
        wanted += [("probe", layout) for layout in keeping_fewer(bench)]
    rows = [r for r in table.find(bank_seed=config.seed) if r["kind"] in ("zero_shot", "probe")]
    known = {(row["kind"], row["layout"]) for row in rows}
    mine = [x for x in wanted[args.part[0] :: args.part[1]] if (x[0], name_of(x[1])) not in known]
    with reporter.stage("zero-shot", total=len(mine), unit="layout") as task:
        for kind, layout in mine:
            if time.perf_counter() > until:
                return
            table.add(row_of(kind, layout, scorer.score(layout), config.seed))
            task.advance(1)
    if not args.distil and args.layouts is None:
        return
    # What other processes have scored as well.
    table = RowFile(table.path)
    scored = {row["layout"] for row in table.find(kind="zero_shot", bank_seed=config.seed)}
    if lacking := {name_of(layout) for layout in layouts} - scored:
        reporter.say(f"{len(lacking)} layouts are not scored yet: run again to distil")
        return
    chosen = [(["asked for"], layout) for layout in named_in(args.layouts, bench)]
    if args.distil:
        known = {layout for _, layout in chosen}
        found = choose(bench, probing(bench, scorer, table), table, args.distil)
        chosen += [(why, layout) for why, layout in found if layout not in known]
    # Its memory is the students'.
    del scorer
    distil(bench, table, chosen, args, until)


def settings(config: StudyConfig) -> dict[str, Any]:
    """What the rows depend on; the bank's seed and a distillation's tokens stand in each row."""
    study = plain(config)
    study["distill"] = {"logits": {**recipe_of(to_the_end(config.distill.logits)), "tokens": None}}
    keys = ("data", "space", "budget", "bank", "distill")
    kept = {key: study[key] for key in keys} | {"search tokens": study["search"]["tokens"]}
    # Where things lie says nothing to anyone else.
    kept["data"] = {k: v for k, v in kept["data"].items() if k not in ("source", "cache")}
    kept["bank"] = {k: v for k, v in kept["bank"].items() if k not in ("path", "checkpoint_steps")}
    return kept


def to_the_end(logits: LogitsConfig) -> LogitsConfig:
    """Stage 3 on all its tokens: nobody looks at the validation split on the way."""
    return dataclasses.replace(logits, patience=0, min_gain=LogitsConfig.min_gain)


def all_or_some(bench: Workbench, count: int | None) -> list[Layout]:
    """Every layout on the budget in a fixed order, or so many at random, the same each time."""
    if count is None or count >= bench.budget.count(bench.space):
        return list(bench.budget.enumerate(bench.space))
    rng = random.Random(0)
    found: dict[Layout, None] = {}
    while len(found) < count:
        found[bench.budget.random(bench.space, rng)] = None
    return list(found)


def keeping_fewer(bench: Workbench) -> list[Layout]:
    """Every layout with fewer attention layers than the budget has, from one on."""
    most = bench.config.budget.attention_layers
    if not isinstance(most, int):
        return []
    counts = range(1 + bench.space.num_pinned_attention, most)
    return [x for n in counts for x in Budget(attention_layers=n).enumerate(bench.space)]


def row_of(kind: str, layout: Layout, score: Score, bank_seed: int) -> dict[str, Any]:
    figures = {name: round(score.mean(name), DIGITS) for name in score.per_block}
    return {"kind": kind, "bank_seed": bank_seed, "layout": name_of(layout)} | figures


def named_in(path: Path | None, bench: Workbench) -> list[Layout]:
    if path is None:
        return []
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    layouts = [bench.space.parse(line) for line in lines if line]
    for layout in layouts:
        bench.budget.check(layout)
    return layouts


@dataclasses.dataclass(frozen=True)
class Probing:
    """Scores layouts on the budget or off it, those in the table from there; keeps what is new."""

    probe: Callable[[Layout], Score]
    stage2_losses: Callable[[], Any]


def probing(bench: Workbench, scorer: BankScorer, table: RowFile) -> Probing:
    seed, names = bench.config.seed, list(scorer.weights)
    known = {
        row["layout"]: Score(
            per_block={name: (row[name],) for name in names}, tokens=0, seconds=0.0
        )
        for row in table.find(bank_seed=seed)
        if row["kind"] in ("zero_shot", "probe")
    }

    def probe(layout: Layout) -> Score:
        if name_of(layout) not in known:
            score = scorer.score(layout)
            known[name_of(layout)] = score
            table.add(row_of("probe", layout, score, seed))
        return known[name_of(layout)]

    return Probing(probe, scorer.stage2_losses)


def choose(
    bench: Workbench, scorer: Probing, table: RowFile, count: int
) -> list[tuple[list[str], Layout]]:
    """Layouts to distil, each with why: the same for the same table."""
    rows = list(table.find(kind="zero_shot", bank_seed=bench.config.seed))
    layouts = {row["layout"]: bench.space.parse(row["layout"]) for row in rows}
    scored = {layouts[row["layout"]]: row["kl"] for row in rows}
    named: list[tuple[str, Layout]] = []
    for name in (n for n in OBJECTIVES if n in rows[0]):
        best = min(rows, key=lambda row: (row[name], row["layout"]))
        named.append((f"best {name}", layouts[best["layout"]]))
    named += picks(bench, scorer, table)
    around = bench.space.neighbours(min(scored, key=scored.__getitem__))
    neighbours = [layout for layout in around if bench.budget.meets(layout)]
    chosen = choose_layouts(scored, named, count, neighbours=neighbours)
    return [(why, layout) for layout, why in chosen.items()]


def picks(bench: Workbench, scorer: Probing, table: RowFile) -> list[tuple[str, Layout]]:
    """What each selector of the study names, led by KL; the table keeps it.

    Gates learnt again may name others, and processes that share the work must agree.
    """
    row = {"kind": "picks", "bank_seed": bench.config.seed}
    if not any(table.find(**row)):
        named = [[label, name_of(layout)] for label, layout in _picks(bench, scorer)]
        table.add(row | {"named": named})
    (found,) = table.find(**row)
    return [(label, bench.space.parse(text)) for label, text in found["named"]]


def _picks(bench: Workbench, scorer: Probing) -> Iterator[tuple[str, Layout]]:
    def learn_gates(*, restarts: int, **choices: Any) -> list[Mapping[int, float]]:
        seeds = [trial_seed(bench.config.seed, n, "gates") for n in range(1, restarts + 1)]
        return [bench.learn_gates(seed=seed, **choices).worth for seed in seeds]

    context = SearchContext(
        space=bench.space,
        budget=bench.budget,
        weights={"kl": 1.0},
        finished=[],
        pending=[],
        seed=bench.config.seed,
        probe=scorer.probe,
        stage2_losses=scorer.stage2_losses,
        stage1_losses=bench.stage1_losses,
        learn_gates=learn_gates,
    )
    for label, selector in named_baselines(bench.config.search.baselines).items():
        if selector is None:
            yield label, bench.space.parse(label)
        else:
            yield from selector.layouts(context)


def distil(
    bench: Workbench,
    table: RowFile,
    chosen: Sequence[tuple[list[str], Layout]],
    args: argparse.Namespace,
    until: float,
) -> None:
    """Every budget and seed that a chosen layout lacks, small budgets first."""
    config, reporter = bench.config, bench.reporter
    at_once = args.at_once or bench.students_at_once(config.distill.logits)
    on_test = measure_on(bench, "test")

    def measure(model: Any) -> dict[str, Any]:
        tested = on_test(model)
        blocks = [round(value, 5) for value in tested["kl_blocks"]]
        found = means(tested) | {"kl_blocks": blocks, "validation": as_a_rung_sees_it(bench, model)}
        if (right := tested["recall_parts"]) is not None:
            found["recall_parts"] = [round(share, 4) for share in right]
        return found

    for seed in args.seeds:
        some = chosen if seed == args.seeds[0] else chosen[: args.seeds_of]
        for tokens in sorted(args.tokens):
            if tokens == 0 and seed != args.seeds[0]:
                continue
            row = {"kind": "distilled", "bank_seed": config.seed, "seed": seed, "tokens": tokens}
            done = {found["layout"] for found in table.find(**row)}
            # Shares are cut before what is done is left out, so that no two processes take one.
            mine = some[args.part[0] :: args.part[1]]
            left = [pair for pair in mine if name_of(pair[1]) not in done]
            # A budget's text does not depend on which other budgets there are.
            train = bench.training_text(tokens)
            for start in range(0, len(left), at_once):
                if time.perf_counter() > until:
                    return
                group = left[start : start + at_once]
                reporter.say(
                    f"seed {seed}, {tokens:,} tokens: {start} of {len(left)} layouts are done"
                )
                recipe = dataclasses.replace(config.distill.logits, tokens=tokens)
                found = distil_layouts(
                    bench.teacher,
                    [layout for _, layout in group],
                    bench.bank,
                    train=train,
                    config=recipe,
                    seed=seed,
                    measure=measure,
                    reporter=reporter,
                )
                for (why, layout), figures in zip(group, found, strict=True):
                    table.add(row | {"layout": name_of(layout), "chosen_as": why} | figures)


def as_a_rung_sees_it(bench: Workbench, student: Any) -> dict[str, Any]:
    """Figures on the validation split: means, and those of each block."""
    found, probe = bench.validation_figures(student), bench.probe("validation")
    seen: dict[str, Any] = {"kl": round(statistics.fmean(found["kl"]), DIGITS), "recall": None}
    if probe is not None:
        share = (1 - statistics.fmean(found["recall"])) * probe.teacher_recall
        seen["recall"] = round(share, DIGITS)
    # Of recall what is lost of the teacher's.
    return seen | {f"{name}_blocks": [round(x, 5) for x in found[name]] for name in found}


def means(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of the test split, as the table keeps them."""
    share = figures["recall"]
    return {
        "kl": round(statistics.fmean(figures["kl_blocks"]), DIGITS),
        "cross_entropy": round(figures["cross_entropy"], DIGITS),
        "recall": None if share is None else round(share, DIGITS),
    }


def name_of(layout: Layout) -> str:
    """Attention layers, as the user types a layout."""
    return ",".join(map(str, layout.attention_layers))


if __name__ == "__main__":
    sys.exit(main())
