"""Tasks of lm-eval from local files, recall over length, and the record of an evaluation."""

import json
import math
import statistics
import sys

import pytest
import torch
from tiny_study import make_study
from transformers import OPTConfig, OPTForCausalLM

from mohawk_nas import evaluate as evaluation
from mohawk_nas import pipeline
from mohawk_nas.cli import main
from mohawk_nas.errors import InputError
from mohawk_nas.evaluate import Examination, find_target
from mohawk_nas.metrics import Figure
from mohawk_nas.recall import DEPTHS, most_positions
from mohawk_nas.tasks import TaskSuite
from mohawk_nas.teacher import Teacher
from mohawk_nas.workbench import Workbench

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


def continuation(bench, text, count=3):
    """What the teacher says after a text, without a cache."""
    tokens = bench.teacher.tokenizer(text, return_tensors="pt")["input_ids"]
    start = tokens.shape[1]
    for _ in range(count):
        following = bench.teacher.model(tokens, use_cache=False).logits[:, -1].argmax(-1)
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["arc_eazy"], r"^--tasks: unknown task 'arc_eazy'. Did you mean 'arc_easy'\?$"),
        (["arc_easy"], r"data set allenai/ai2_arc, .*; put them into \S+/rows/arc_easy/test.jsonl"),
        # A group is told by the task that lacks its rows.
        (["ai2_arc"], r"rows of arc_challenge are .*/rows/arc_challenge/test.jsonl \(or .parquet"),
        (["sciq"], r"rows/sciq: must hold the split 'test' of sciq .*but holds train.jsonl$"),
        (["boolq"], r"rows/boolq: rows must have the fields of the data set .*'passage'"),
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
    assert record["provenance"]["versions"]["torch"]
    teacher, undistilled, distilled = record["models"]
    assert [len(m["figures"]) for m in record["models"]] == [17, 2, 17]
    assert undistilled["name"] == "undistilled student"
    figures = {figure["name"]: figure for figure in distilled["figures"]}
    depths = [f"needle, 160 tokens, depth {depth:g}" for depth in DEPTHS]
    wanted = {"key-value, 144 tokens", *depths, "piqa acc_norm", "say_it exact_match"}
    assert wanted <= set(figures)
    # The teacher says what was taken down from it.
    its = {figure["name"]: figure["value"] for figure in teacher["figures"]}
    assert its["say_it exact_match"] == 0.5
    for name, figure in figures.items():
        gap = figure["more_than_teacher"] if name in its and "KL" not in name else None
        if gap is not None:
            assert gap["value"] == pytest.approx(figure["value"] - its[name], abs=1e-12)
    shown = figures["cross-entropy"]["more_than_teacher"]
    assert f"{shown['value']:+.4f} ± {shown['standard_error']:.4f}" in out
    assert 0 < shown["standard_error"] < figures["cross-entropy"]["standard_error"]
    # Once more, and nothing is lost.
    evaluation.evaluate(find_target(run), write_to=run / "evaluation.json")
    assert json.loads((run / "evaluation.json.old-1").read_text(encoding="utf-8")) == record


@pytest.mark.parametrize("text", ["512,x", "0", "-4"])
def test_lengths_are_numbers(text, run, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), "--recall-lengths", text])
    assert ended.value.code == 2
    assert "--recall-lengths: must be numbers such as 512,1024" in capsys.readouterr().err


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
