import importlib.util
import itertools
import json
import lzma
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "studies" / "assets" / "train_teacher.py"


@pytest.fixture(scope="module")
def train_teacher():
    spec = importlib.util.spec_from_file_location("train_teacher", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path):
    """A language of eleven words: far below ln(vocabulary) nats a token once learnt."""
    rng = random.Random(0)
    words = ["the", "a", "cat", "dog", "bird", "saw", "heard", "near", "green", "hill", "river"]
    path = tmp_path / "text.jsonl.xz"
    with lzma.open(path, "wt") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=60))}) + "\n")
    return path


SMALLEST = {"--layers": 1, "--d-model": 32, "--heads": 4, "--vocab": 300, "--seq-len": 33}
SHORTEST = {"--batch": 4, "--tokens": "4K", "--lr": 1e-2}


@pytest.fixture
def run(train_teacher, text, tmp_path, monkeypatch):
    """Train a tiny model on the made-up text; options given here win over those above."""
    # Equal seeds give equal bytes on a CPU only.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run_with(*options, out=tmp_path / "teacher"):
        defaults = {"--data": text, "--validation": text, "--out": out} | SMALLEST | SHORTEST
        argv = [str(part) for pair in defaults.items() for part in pair]
        return train_teacher.main([*argv, *options])

    return run_with


@pytest.mark.parametrize("arch", ["phi", "llama"])
def test_the_saved_folder_is_a_trained_teacher(run, tmp_path, arch):
    out = tmp_path / "teacher"
    assert run("--arch", arch, "--kv-heads", "2") == 0

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == arch
    assert model.config.num_key_value_heads == 2
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if arch == "phi":
        assert model.config.rope_parameters["partial_rotary_factor"] == 0.5

    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    ids = tokenizer("the cat saw a bird\n", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "the cat saw a bird\n"
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))

    figures = json.loads((out / "training.json").read_text())
    assert figures["params"] == model.num_parameters()
    assert figures["steps"] == math.ceil(4000 / (4 * 33))
    assert figures["val_loss"] < math.log(figures["vocab_size"]) - 1
    assert len(figures["induction"]) == 2
    assert figures["data"] == ["text.jsonl.xz"]


def test_the_same_seed_gives_the_same_teacher(run, tmp_path):
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run("--seed", seed, "--recall-fraction", "0.5", out=tmp_path / name) == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_recall_fraction_reports_accuracies(run, tmp_path, capsys):
    assert run("--recall-fraction", "1") == 0
    figures = json.loads((tmp_path / "teacher" / "training.json").read_text())
    assert 0 <= figures["recall_accuracy"] <= 1
    assert 0 <= figures["copy_accuracy"] <= 1
    assert "recall_accuracy: " in capsys.readouterr().out


@pytest.mark.parametrize("length", [16, 33, 128])
def test_synthetic_labels_follow_from_what_came_before(train_teacher, length):
    """Whoever remembers what first followed the last three tokens, or fewer, meets every label."""
    for make_row in (train_teacher.recall_row, train_teacher.copy_row):
        for seed in range(50):
            row, labels = make_row(length, 300, random.Random(seed))
            assert row.shape == labels.shape == (length,)
            assert row.min() >= 0 and row.max() < 300
            labelled = (labels != train_teacher.IGNORED).nonzero().flatten().tolist()
            assert labelled
            tokens = row.tolist()
            for i in labelled:
                for size in (3, 2, 1):
                    places = [
                        p for p in range(size, i) if tokens[p - size : p] == tokens[i - size : i]
                    ]
                    if places:
                        break
                assert labels[i] == row[i] == row[places[0]]


def test_recall_is_asked_with_and_without_tokens_between(train_teacher):
    rows = [train_teacher.recall_row(400, 300, random.Random(seed)) for seed in range(200)]
    pairs = [int((labels == train_teacher.IGNORED).sum()) for _, labels in rows]
    assert min(pairs) < 220 < max(pairs)
    # Where nothing stands between, every second token of the second half is asked for.
    dense = sum(bool((labels[-40:] != train_teacher.IGNORED).sum() == 20) for _, labels in rows)
    assert 80 < dense < 140


def test_tasks_stand_anywhere_among_prose(train_teacher):
    """A block's first token must not settle what comes, or a teacher reads in one of two modes."""
    corpus = torch.arange(300, 20_300, dtype=torch.int32)
    sizes = ["--tokens", "1K", "--seq-len", "64", "--batch", "8", "--recall-fraction", "0.5"]
    files = ["--data", __file__, "--validation", __file__, "--out", "new"]
    args = train_teacher.parse_arguments([*files, *sizes])
    batches = list(itertools.islice(train_teacher.Batches(corpus, 300, args), 300))
    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    prose = inputs >= 300
    assert torch.equal(labels[prose], inputs[prose])
    with_tasks = (~prose[:, 1:]).any(dim=1)
    assert 0.45 < with_tasks.float().mean() < 0.55
    # Tasks at the beginning, at the end, in between, and from end to end.
    ends = prose[with_tasks][:, [1, -1]].unique(dim=0, return_counts=True)
    assert len(ends[0]) == 4 and ends[1].min() > 100
    # Each stands at one place.
    assert ((prose[:, 2:] != prose[:, 1:-1]).sum(dim=1) <= 2).all()
    led = inputs[:, 0] == train_teacher.END_OF_TEXT_ID
    assert 0.45 < led[~with_tasks].float().mean() < 0.55
    assert 0.5 < led[with_tasks].float().mean() < 0.9


def test_each_epoch_takes_every_block_once(train_teacher):
    starts = train_teacher.block_starts(100, 9, random.Random(0))
    epoch = sorted(next(starts) for _ in range(10))
    assert all(b - a == 9 for a, b in itertools.pairwise(epoch))
    assert epoch[0] >= 0 and epoch[-1] + 9 <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--d-model", "30"], "--d-model must be divisible by 16 (--heads 4 of --arch phi)"),
        (["--kv-heads", "3"], "--heads must be divisible by --kv-heads 3, but it is 4"),
        (["--vocab", "200"], "--vocab must be at least 257, but it is 200"),
        (["--tokens", "many"], "argument --tokens"),
        (["--recall-fraction", "1.5"], "argument --recall-fraction"),
        (["--data", "nowhere/*.jsonl"], "--data: no file matches nowhere"),
        (["--arch", "rnn"], "argument --arch"),
        (["--seq-len", "100K"], "--seq-len needs 100000 tokens"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(run, tmp_path, capsys, options, message):
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("train_teacher: error: ") and error.count("\n") == 1
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("content", ["", '{"title": "no text"}\n', '{"text": 3}\n', '{"text": "\n'])
def test_bad_data_are_one_line_and_exit_code_2(run, tmp_path, capsys, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert run("--data", str(path)) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl" in error
    assert error.startswith("train_teacher: error: ") and error.count("\n") == 1


def test_an_existing_folder_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    assert run() == 2
    assert "--out must be a new folder" in capsys.readouterr().err
    assert not any((tmp_path / "teacher").iterdir())
