import copy

import pytest
import torch
from tiny_study import make_study

from mohawk_nas.layout import Layout
from mohawk_nas.metrics import kl_divergence
from mohawk_nas.reporting import SILENT
from mohawk_nas.search import objectives
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher
from mohawk_nas.workbench import Workbench

ALL = 'search.objective={"kl": 1.0, "stage2_cascade": 1.0, "stage2_local": 1.0}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("objectives")


@pytest.fixture(scope="module")
def bench(folder):
    work = Workbench(make_study(folder, ALL))
    work.bank.train(work.space.replaceable, reporter=SILENT)
    return work


def keeping(*layers):
    return Layout.keeping(layers, num_layers=4, replacement="mamba2")


def naive(bench, layout):
    """Every objective from stock forward passes over one block at a time."""
    student = assemble(bench.teacher, layout, bench.bank)
    found = {"kl": [], "stage2_cascade": [], "stage2_local": []}
    for i in range(len(bench.blocks["search"])):
        tokens = bench.blocks["search"].batch([i])
        captures = []
        bench.teacher.run(tokens, on_layer=captures.append)
        outputs = dict.fromkeys(layout.replaced_layers)
        for layer in outputs:
            bench.teacher.slots[layer].get(student).register_forward_hook(
                lambda m, a, r, layer=layer, into=outputs: into.__setitem__(layer, r[0])
            )
        with torch.no_grad():
            logits = student(tokens, use_cache=False).logits
            target = bench.teacher.model(tokens).logits
            local = {n: bench.bank.mixer(n, "mamba2")(captures[n].hidden) for n in outputs}
        found["kl"].append(kl_divergence(target, logits).mean().item())
        for name, made in (("stage2_cascade", outputs), ("stage2_local", local)):
            total = 0.0
            for layer, output in made.items():
                wanted = captures[layer].output
                total += ((output - wanted).square().sum() / wanted.square().sum()).item()
            found[name].append(total)
    return found


@pytest.mark.parametrize("kept", [(0, 3), (1, 2), ()])
def test_objectives_equal_their_definition(bench, kept):
    score = bench.scorer().score(keeping(*kept))
    for name, values in naive(bench, keeping(*kept)).items():
        torch.testing.assert_close(
            torch.tensor(score.per_block[name]), torch.tensor(values), rtol=2e-4, atol=1e-6
        )
    assert score.tokens == 128


def test_the_teacher_scores_zero(bench):
    score = bench.scorer().score(keeping(0, 1, 2, 3))
    assert abs(score.mean("kl")) < 1e-6
    assert score.mean("stage2_cascade") == score.mean("stage2_local") == 0


@pytest.mark.parametrize(
    "kept", [{"teacher": 0, "students": 0}, {"teacher": 70_000, "students": 9000}]
)
def test_scores_do_not_depend_on_what_is_kept_in_memory(bench, monkeypatch, kept):
    layouts = [keeping(0, 3), keeping(1, 2), keeping(0, 2), keeping(2, 3), keeping(), keeping(3)]
    first, scorer = bench.scorer(), bench.scorer()
    scorer.kept_bytes = kept
    for layout in layouts:
        alone = bench.scorer().score(layout)
        assert first.score(layout).per_block == alone.per_block
        assert scorer.score(layout).per_block == alone.per_block
    assert scorer._runner.kept_bytes <= kept["students"]
    # Some were entered in the middle, and that is why they were faster.
    num_batches = len(first._batches)
    assert first._runner.layers_run < scorer._runner.layers_run <= num_batches * 4 * len(layouts)


def test_less_is_kept_where_others_have_taken_the_memory(bench, monkeypatch):
    layout, scorer = keeping(0, 3), bench.scorer()
    alone, real, tried = scorer.score(layout), scorer._score_assembled, []

    def score_once_there_is_room(layout):
        tried.append(dict(scorer.kept_bytes))
        assert "_runner" not in vars(scorer) or len(tried) == 1, "what was kept is let go"
        if len(tried) < 3:
            raise torch.OutOfMemoryError("no room")
        return real(layout)

    monkeypatch.setattr(scorer, "_score_assembled", score_once_there_is_room)
    assert scorer.score(layout).per_block == alone.per_block
    first = objectives.KEPT_BYTES
    assert tried == [{name: kept // 2**i for name, kept in first.items()} for i in range(3)]

    def never(layout):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(scorer, "_score_assembled", never)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(layout)
    assert not any(scorer.kept_bytes.values())


def test_stage2_losses_are_the_local_objective_of_single_layers(bench):
    losses = bench.scorer().stage2_losses()
    assert set(losses) == {(i, "mamba2") for i in range(4)}
    for layer in range(4):
        others = [i for i in range(4) if i != layer]
        score = bench.scorer().score(keeping(*others))
        assert score.mean("stage2_local") == pytest.approx(losses[layer, "mamba2"], rel=1e-5)


def test_training_anew_in_each_trial_gives_the_banks_numbers(bench, folder):
    work = Workbench(make_study(folder, ALL, "search.evaluation=per_trial", "bank.path=nowhere"))
    scorer = work.scorer()
    assert isinstance(scorer, objectives.PerTrialScorer)
    for kept in ((1, 3), (0, 1)):
        assert (
            scorer.score(keeping(*kept)).per_block == bench.scorer().score(keeping(*kept)).per_block
        )
    assert scorer.stage2_losses() == bench.scorer().stage2_losses()


def test_beside_a_bfloat16_teacher_both_stage2_objectives_compute_alike(bench):
    model = copy.deepcopy(bench.teacher.model).to(torch.bfloat16)
    teacher = Teacher(model, bench.teacher.tokenizer)
    scorer = objectives.BankScorer(
        teacher,
        bench.bank,
        bench.blocks["search"],
        pairs=bench.space.replaceable,
        weights={"stage2_local": 1.0, "stage2_cascade": 1.0, "kl": 1.0},
        batch_size=4,
    )
    # Up to its first replaced layer a student is the teacher.
    for layer in range(4):
        score = scorer.score(keeping(*(i for i in range(4) if i != layer)))
        assert score.per_block["stage2_local"] == score.per_block["stage2_cascade"]
        assert score.mean("kl") > 0
