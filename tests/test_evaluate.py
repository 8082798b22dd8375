"""Tasks of lm-eval from local files, recall over length, and the record of an evaluation."""

import copy
import importlib.util
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from tiny_study import make_study
from transformers import OPTConfig, OPTForCausalLM

from mohawk_nas import evaluate as evaluation
from mohawk_nas import pipeline
from mohawk_nas.cli import main
from mohawk_nas.config import dump
from mohawk_nas.errors import InputError
from mohawk_nas.evaluate import Examination, find_target
from mohawk_nas.export.hf import load_hybrid
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import Figure, evaluate_blocks
from mohawk_nas.recall import DEPTHS, most_positions
from mohawk_nas.student import assemble
from mohawk_nas.tasks import TaskSuite
from mohawk_nas.teacher import Teacher
from mohawk_nas.workbench import Workbench

SCRIPTS = Path(__file__).parents[1] / "studies"
SECTIONS = ("text", "recall_over_length", "tasks")
GOALS = ["open a tin", "cross a river", "light a lamp", "read a letter", "mend a sail"]
ENDS = [" with a key", " at the ford", " by hand", " twice", " in the harbour"]
SAY_IT = """
task: say_it
tag: mine
dataset_path: nobody/has-this
output_type: generate_until
training_split: train
test_split: test
num_fewshot: {examples}
doc_to_text: "{{{{cue}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["zzzz"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for place in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(place, True)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Workbench(make_study(tmp_path_factory.mktemp("evaluate")))


@pytest.fixture(scope="module")
def run(bench):
    _, best = pipeline.search(bench.config)
    pipeline.distill(pipeline.load_best(best))
    return best.parent


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def continuation(bench, text, *, model=None, count=3):
    """What the teacher, or another model, says after a text, without a cache."""
    model = model or bench.teacher.model
    tokens = bench.teacher.tokenizer(text, return_tensors="pt")["input_ids"]
    start = tokens.shape[1]
    for _ in range(count):
        following = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return bench.teacher.tokenizer.decode(tokens[0, start:])


@pytest.fixture
def data(bench, tmp_path):
    """Rows of four tasks, one of which is not the harness's own."""
    folder = tmp_path / "rows"
    rows = [
        {"goal": goal, "sol1": end, "sol2": other, "label": i % 2}
        for i, (goal, end, other) in enumerate(zip(GOALS, ENDS, reversed(ENDS), strict=True))
    ]
    write_rows(folder / "piqa" / "piqa.jsonl", rows)
    write_rows(
        folder / "lambada_openai" / "test.jsonl", [{"text": f"{goal} at dawn"} for goal in GOALS]
    )
    (folder / "say_it.yaml").write_text(SAY_IT.format(examples=0), encoding="utf-8")
    said = [{"cue": goal, "answer": continuation(bench, goal)} for goal in GOALS]
    # What no model of three tokens says.
    said[1]["answer"] = said[3]["answer"] = "never so"
    write_rows(folder / "say_it" / "test.jsonl", said)
    return folder


def log_likelihood(bench, text, end):
    tokenizer = bench.teacher.tokenizer
    tokens = tokenizer(text + end, return_tensors="pt")["input_ids"]
    start = len(tokenizer(text)["input_ids"])
    logits = bench.teacher.model(tokens, use_cache=False).logits.log_softmax(-1)
    picked = logits[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    return picked[start - 1 :].sum().item()


@torch.no_grad()
def test_likelihood_tasks_are_what_they_are_by_hand(bench, data):
    suite = TaskSuite(["lambada_openai", "piqa"], data=data)
    teacher = bench.teacher
    pad = teacher.tokenizer.pad_token_id
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = {f.name: f for f in suite.run(teacher.model, teacher.tokenizer, name="teacher")}
    # The harness pads with a token of its own choice, and sets seeds; neither stays.
    assert teacher.tokenizer.pad_token_id == pad
    assert torch.equal(torch.get_rng_state(), state)
    assert set(found) == {
        "lambada_openai perplexity",
        "lambada_openai acc",
        "piqa acc",
        "piqa acc_norm",
    }
    right = []
    for line in (data / "piqa" / "piqa.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = f"Question: {row['goal']}\nAnswer:"
        # The harness puts a space in front of an answer.
        scores = [log_likelihood(bench, prompt, f" {row[key]}") for key in ("sol1", "sol2")]
        right.append(float(scores.index(max(scores)) == row["label"]))
    assert found["piqa acc"].items == tuple(right)
    assert found["piqa acc"].value == statistics.fmean(right)
    losses = [log_likelihood(bench, f"{goal} at", " dawn") for goal in GOALS]
    expected = math.exp(-statistics.fmean(losses))
    assert found["lambada_openai perplexity"].value == pytest.approx(expected, rel=1e-3)
    # A mean of its questions it is not; the harness draws them again for its error.
    assert found["lambada_openai perplexity"].items == ()
    assert found["lambada_openai perplexity"].standard_error > 0
    assert not found["lambada_openai perplexity"].higher_is_better
    assert suite.settings["items"] == {"lambada_openai": 5, "piqa": 5}
    assert suite.settings["local"] == ["lambada_openai", "piqa"]


@torch.no_grad()
def test_likelihoods_of_half_precision_are_added_in_float32(bench, data):
    suite = TaskSuite(["lambada_openai"], data=data, limit=1)
    teacher = bench.teacher
    model = copy.deepcopy(teacher.model).bfloat16()
    found = {f.name: f for f in suite.run(model, teacher.tokenizer, name="teacher")}
    loss = math.log(found["lambada_openai perplexity"].value)
    assert loss == pytest.approx(-log_likelihood(bench, f"{GOALS[0]} at", " dawn"), rel=0.05)
    assert abs(torch.tensor(loss).bfloat16().item() - loss) > 1e-5 * loss


def test_generation_tasks_of_ones_own(bench, data):
    teacher = bench.teacher
    # By its tag; and only the first of its questions.
    for name, limit, right in (("mine", None, (1, 0, 1, 0, 1)), ("say_it", 2, (1, 0))):
        suite = TaskSuite([name], data=data, limit=limit, batch_size=2)
        (figure,) = suite.run(teacher.model, teacher.tokenizer, name="teacher")
        assert figure.name == "say_it exact_match"
        assert figure.items == tuple(map(float, right))
    (data / "both.yaml").write_text("group: both\ntask: [say_it, piqa]\n", encoding="utf-8")
    suite = TaskSuite(["both"], data=data, limit=2)
    found = suite.run(teacher.model, teacher.tokenizer, name="teacher")
    assert [f.name for f in found if f.items] == [
        "say_it exact_match",
        "piqa acc",
        "piqa acc_norm",
    ]


@pytest.mark.parametrize("kept", [[0, 2], []], ids=["hybrid", "no attention"])
@torch.no_grad()
def test_students_generate_what_they_predict(kept, bench, data):
    layout = Layout.keeping(kept, num_layers=4, replacement="mamba2")
    bench.bank.train(bench.space.replaceable, reporter=bench.reporter)
    student = assemble(bench.teacher, layout, bench.bank)
    # Prompts of different lengths are padded on the left.
    rows = [{"cue": goal, "answer": continuation(bench, goal, model=student)} for goal in GOALS]
    assert [row["answer"] for row in rows] != [continuation(bench, goal) for goal in GOALS]
    write_rows(data / "say_it" / "test.jsonl", rows)
    suite = TaskSuite(["say_it"], data=data, batch_size=3)
    (figure,) = suite.run(student, bench.teacher.tokenizer, name="student")
    assert figure.items == (1.0,) * len(GOALS)


def test_examples_come_from_their_own_split(bench, data):
    (data / "say_it.yaml").write_text(SAY_IT.format(examples=2), encoding="utf-8")
    with pytest.raises(InputError, match=r"say_it: must hold the split 'train' .*train.jsonl"):
        TaskSuite(["say_it"], data=data)
    write_rows(data / "say_it" / "train-00000-of-00001.jsonl", [{"cue": "a", "answer": "b"}] * 3)
    suite = TaskSuite(["say_it"], data=data)
    suite.run(bench.teacher.model, bench.teacher.tokenizer, name="teacher")
    assert suite.settings["examples"] == {"say_it": 2}
    assert suite.settings["items"] == {"say_it": 5}
    assert TaskSuite(["say_it"], data=data, fewshot=0).names == ("say_it",)


def test_a_task_of_ones_own_beside_its_rows_is_found_wherever_one_stands(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert TaskSuite(["say_it"], data=Path(data.name)).names == ("say_it",)
    text = (data / "say_it.yaml").read_text(encoding="utf-8")
    (data / "say_it.yaml").write_text(f"{text}\nno_such_setting: 1\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"the task say_it cannot be loaded with .*no_such_setting"
    ):
        TaskSuite(["say_it"], data=data)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["arc_eazy"], r"^--tasks: unknown task 'arc_eazy'. Did you mean 'arc_easy'\?$"),
        (["arc_easy"], r"data set allenai/ai2_arc, .*; put them into \S+/rows/arc_easy/test.jsonl"),
        # A group is told by the task that lacks its rows.
        (["ai2_arc"], r"rows of arc_challenge are .*/rows/arc_challenge/test.jsonl \(or .parquet"),
        (["sciq"], r"rows/sciq: must hold the split 'test' of sciq .*but holds train.jsonl$"),
        (["boolq"], r"rows/boolq: the task boolq cannot be loaded with these rows, .*'passage'"),
    ],
)
def test_what_cannot_be_asked(names, message, data):
    write_rows(data / "sciq" / "train.jsonl", [{"question": "?"}])
    write_rows(data / "boolq" / "validation.jsonl", [{"question": "is it", "label": 1}])
    with pytest.raises(InputError, match=message):
        TaskSuite(names, data=data)


def test_rows_that_are_nowhere(tmp_path):
    with pytest.raises(InputError, match=r"put them into DIR/piqa/validation.jsonl .*--task-data"):
        TaskSuite(["piqa"])
    with pytest.raises(InputError, match="--task-data: must be a folder"):
        TaskSuite(["piqa"], data=tmp_path / "none")


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"needs lm-eval, .*pip install 'mohawk-nas\[eval\]'"):
        TaskSuite(["piqa"])


def test_a_difference_is_paired_where_it_can_be():
    one = Figure.mean_of("x", [1.0, 2.0, 4.0], higher_is_better=True)
    other = Figure.mean_of("x", [0.0, 1.5, 2.0], higher_is_better=True)
    gap = one.minus(other)
    assert gap.items == (1.0, 0.5, 2.0)
    assert gap.standard_error == statistics.stdev([1.0, 0.5, 2.0]) / math.sqrt(3)
    apart = Figure(name="x", value=2.0, standard_error=3.0).minus(
        Figure(name="x", value=5.0, standard_error=4.0)
    )
    assert (apart.value, apart.standard_error) == (-3.0, 5.0)
    assert Figure.mean_of("x", [1.0], higher_is_better=True).standard_error is None


def test_evaluate_writes_what_it_prints(run, data, capsys):
    command = ["evaluate", run, "--tasks", "piqa,say_it", "--task-data", data, "--limit", 4]
    with pytest.raises(SystemExit) as ended:
        # The teacher was made for 64 tokens.
        main([str(part) for part in [*command, "--recall-lengths", "160,144"]])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert "length 144 is beyond the 64 tokens that the teacher was made for" in err
    assert "Wrote" in out and "bootstrapping" not in out
    record = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert record["layout"] == list(pipeline.load_best(run).layout.candidates)
    assert record["asked"]["lengths"] == [144, 160]
    assert record["asked"]["tasks"]["limit"] == 4
    # This teacher solves no probe.
    assert record["asked"]["recall_probe"] is None is record["asked"]["recall_errors_over"]
    assert record["provenance"]["versions"]["torch"]
    teacher, undistilled, distilled = record["models"]
    counts = [[len(m[s]) for s in SECTIONS] for m in record["models"]]
    assert counts == [[2, 12, 3], [2, 0, 0], [2, 12, 3]]
    assert undistilled["name"] == "undistilled student"
    figures = {figure["name"]: figure for s in SECTIONS for figure in distilled[s]}
    depths = [f"needle, 160 tokens, depth {depth:g}" for depth in DEPTHS]
    wanted = {"key-value, 144 tokens", *depths, "piqa acc_norm", "say_it exact_match"}
    assert wanted <= set(figures)
    # The teacher says what was taken down from it.
    its = {figure["name"]: figure["value"] for s in SECTIONS for figure in teacher[s]}
    assert its["say_it exact_match"] == 0.5
    assert "more_than_teacher" not in figures.pop("KL to the teacher")
    for name, figure in figures.items():
        gap = figure["more_than_teacher"]["value"]
        assert gap == pytest.approx(figure["value"] - its[name], abs=1e-12)
    shown = figures["cross-entropy"]["more_than_teacher"]
    assert f"{shown['value']:+.4f} ± {shown['standard_error']:.4f}" in out
    assert 0 < shown["standard_error"] < figures["cross-entropy"]["standard_error"]
    # Once more, and nothing is lost.
    evaluation.evaluate(find_target(run), write_to=run / "evaluation.json")
    assert json.loads((run / "evaluation.json.old-1").read_text(encoding="utf-8")) == record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recall-lengths", "512,x"], "--recall-lengths: must be numbers such as 512,1024"),
        (["--recall-lengths", "0"], "--recall-lengths: must be numbers such as 512,1024"),
        (["--limit", "5"], "go with --tasks"),
    ],
)
def test_options_that_cannot_be(options, message, run, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_positions_that_were_learnt_are_a_limit(bench, monkeypatch):
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=48,
            word_embed_proj_dim=32,
        )
    )
    assert most_positions(Teacher(model)) == 48
    assert most_positions(bench.teacher) is None
    monkeypatch.setattr(evaluation, "most_positions", lambda teacher: 150)
    examination = Examination(bench=bench, lengths=[160, 144])
    assert {probe.length for probe in examination.length_probes} == {144}
    assert examination.left_out == {160: "the teacher has learnt 150 positions, and no more"}
    with pytest.raises(InputError, match="must hold 16 pairs and the questions for them"):
        Examination(bench=bench, lengths=[40])


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS / "benchmarks" / "full_distillation.py")


@pytest.fixture
def study(bench, run, tmp_path):
    """The study's file; it has been searched."""
    path = tmp_path / "study.yaml"
    path.write_text(dump(bench.config), encoding="utf-8")
    return str(path)


def test_the_command_that_is_kept_says_nothing_of_where_things_lie(script, monkeypatch):
    said = ["/here/full.py", "study.yaml", "teacher.source=/here/x.gguf", "a=[b]", "--out", "/o"]
    monkeypatch.setattr(sys, "argv", said)
    assert script.command() == "python full.py study.yaml teacher.source=x.gguf a=[b] --out o"


def test_layouts_are_distilled_in_full_and_evaluated(
    script, study, bench, run, data, tmp_path, capsys, monkeypatch
):
    options = [study, "--layouts", "searched,uniform,none", "--tasks", "piqa", "--limit", "3"]
    options += ["--task-data", str(data), "--recall-lengths", "150", "--out", str(tmp_path)]
    assert script.main([*options, "--part", "1/2"]) == 0
    assert "Not there yet: uniform" in capsys.readouterr().out
    assert script.main([*options, "--part", "2/2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "full_distillation_tiny.json").read_text(encoding="utf-8"))
    result = bench.result()
    phases = [x for label, x in result.baselines.items() if label.startswith("uniform/")]
    uniform = min(phases, key=lambda layout: result.by_layout[layout].value)
    layouts = {"searched": result.best.layout, "uniform": uniform}
    kept = {name: list(layout.attention_layers) for name, layout in layouts.items()}
    assert {r["chosen_as"]: r["attention_layers"] for r in content["layouts"]} == {
        **kept,
        # Off the search's budget of two.
        "none": [],
    }
    for row in content["layouts"]:
        undistilled, student = row["models"]
        strip = "".join("A" if i in row["attention_layers"] else "M" for i in range(4))
        model = load_hybrid(run / "full" / strip / "640" / "distill" / "model")
        figures = evaluate_blocks(bench.teacher, model, bench.blocks["test"])
        assert student["text"][0]["value"] == pytest.approx(figures.mean_kl, rel=1e-5)
        assert student["text"][0]["value"] != undistilled["text"][0]["value"]
        assert row["tokens"] == 640 and row["validation_kl"] < row["validation_kl_before"]
        looks = dict(row["validation_curve"])
        assert row["validation_kl"] == pytest.approx(looks[row["best_step"]])
        assert row["validation_kl"] == pytest.approx(min(looks.values()))
        assert row["made_with"]["versions"]["torch"] and row["made_with"]["cpu"]
        cell = f"{student['text'][0]['value']:.4f} ± {student['text'][0]['standard_error']:.4f}"
        (line,) = [
            line for line in lines if line.startswith(f"| {row['chosen_as']} | ") and "±" in line
        ]
        assert cell in line and line.count("|") == lines[0].count("|")
        if row["chosen_as"] != "searched":
            above = row["more_kl_than_first"]
            first = content["layouts"][0]["models"][1]["text"][0]["value"]
            assert above["value"] == pytest.approx(student["text"][0]["value"] - first)
            assert f"{above['value']:+.4f} ± {above['standard_error']:.4f}" in line
    assert "| piqa |" in lines[0]
    assert any(line.startswith("|  | key-value, 150 | needle, 150 |") for line in lines)

    # A layout that is named twice is one; a row goes by the names that are asked for.
    mine = ",".join(map(str, kept["searched"]))
    jobs = list(script.named(bench, ["none", "searched", mine]))
    assert [job.chosen_as for job in jobs] == ["none", f"searched = {mine}"]
    again = [*options[:2], "none", mine, *options[3:]]
    assert script.main(again) == 0
    assert any(line.startswith(f"| {mine} | ") for line in capsys.readouterr().out.splitlines())

    # What is there is not made again; another budget is.
    def never(*args, **kwargs):
        raise AssertionError("distilled again")

    monkeypatch.setattr(script.pipeline, "distill", never)
    assert script.main([*options, "--part", "1/1"]) == 0
    with pytest.raises(AssertionError, match="distilled again"):
        script.main([*options, "--tokens", "704"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layouts", "best"], "--layouts: best: .*; or name searched, uniform, none"),
        (["--layouts", "9"], "--layouts: 9: layer 9 is out of range"),
        (["--tasks", "pica"], "unknown task 'pica'"),
        (["output=elsewhere", "--part", "1/2"], "must hold a finished search; run it first"),
    ],
)
def test_what_cannot_be_distilled(options, message, script, study, capsys):
    assert script.main([study, *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_rows_of_another_harness_are_taken_apart(bench, tmp_path):
    rows = {
        "lambada_openai": {"context": "The cat sat on the", "continuation": "mat"},
        "piqa": {"query": "Question: open a tin\n", "choices": ["a", "b"], "gold": 1},
        "arc_easy": {"query": "Question: what?", "choices": ["x", "y", "z"], "gold": 2},
    }
    files = [tmp_path / f"{task}.jsonl" for task in rows]
    for file, row in zip(files, rows.values(), strict=True):
        write_rows(file, [row])
    make = load_script(SCRIPTS / "assets" / "make_task_rows.py")
    assert make.main([*map(str, files), "--out", str(tmp_path / "rows")]) == 0
    suite = TaskSuite(list(rows), data=tmp_path / "rows")
    tasks = {task.task_name: task for task in suite._tasks}
    prompts = {
        name: (task.doc_to_text(doc), task.doc_to_target(doc))
        for name, task in tasks.items()
        for doc in task.eval_docs
    }
    assert prompts == {
        "lambada_openai": ("The cat sat on the", " mat"),
        "piqa": ("Question: open a tin\nAnswer:", 1),
        "arc_easy": ("Question: what?\nAnswer:", 2),
    }
    files[0].write_text('{"text": "no"}\n', encoding="utf-8")
    assert make.main([str(files[0]), "--out", str(tmp_path / "rows")]) == 2
