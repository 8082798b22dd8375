import copy
import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch
from tiny_study import make_study

from mohawk_nas.config import LogitsConfig, StageConfig
from mohawk_nas.distill import logits
from mohawk_nas.distill.logits import LogitsTrainer, distill_logits, trainable_parameters
from mohawk_nas.distill.logits_trainer import student_to_train
from mohawk_nas.distill.losses import logits_loss, loss_of_hidden
from mohawk_nas.distill.optimizer import ClippedAdamW, learning_rate
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.errors import TrainingError
from mohawk_nas.files import load_tensors
from mohawk_nas.layout import Layout
from mohawk_nas.reporting import SILENT, Silent
from mohawk_nas.student import assemble, is_trained
from mohawk_nas.teacher import Teacher
from mohawk_nas.workbench import Workbench

LAYOUT = Layout.keeping((0, 2), num_layers=4, replacement="mamba2")
CONFIG = LogitsConfig(
    tokens=640, batch_size=4, lr=3e-4, validate_steps=3, checkpoint_steps=2, warmup=0.2
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    work = Workbench(make_study(tmp_path_factory.mktemp("distill")))
    work.bank.train(work.space.replaceable, reporter=SILENT)
    return work


def student_of(bench):
    return assemble(bench.teacher, LAYOUT, bench.bank, share=False)


def run(bench, folder, config=CONFIG, student=None, **options):
    student = student_of(bench) if student is None else student
    result = distill_logits(
        bench.teacher,
        student,
        train=bench.blocks["bank"],
        validation=bench.blocks["validation"],
        config=config,
        folder=folder,
        seed=0,
        **{"reporter": SILENT, **options},
    )
    return student, result


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_kl_and_soft_cross_entropy_have_the_same_gradient():
    torch.manual_seed(0)
    teacher = torch.randn(2, 5, 7)
    tokens = torch.randint(0, 7, (2, 5))
    found = []
    for loss in ("kl", "soft_ce"):
        student = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = logits_loss(teacher, student, tokens, LogitsConfig(loss=loss, temperature=2.0))
        value.backward()
        found.append((value.item(), student.grad))
    torch.testing.assert_close(found[0][1], found[1][1])
    entropy = torch.distributions.Categorical(logits=teacher / 2).entropy().mean() * 4
    assert found[1][0] - found[0][0] == pytest.approx(entropy.item(), rel=1e-5)


def test_hard_labels_are_mixed_in():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 7)
    tokens = torch.randint(0, 7, (2, 5))
    soft = logits_loss(teacher, student, tokens, LogitsConfig())
    hard = logits_loss(teacher, student, tokens, LogitsConfig(hard_label_weight=1.0))
    mixed = logits_loss(teacher, student, tokens, LogitsConfig(hard_label_weight=0.25))
    torch.testing.assert_close(mixed, 0.75 * soft + 0.25 * hard)


def test_reverse_kl_weighs_by_the_student():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    labels = torch.zeros(3, 5, dtype=torch.long)
    for temperature in (1.0, 2.0):
        config = LogitsConfig(loss="reverse_kl", temperature=temperature)
        p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
        expected = (q * (q / p).log()).sum(-1).mean() * temperature**2
        torch.testing.assert_close(logits_loss(teacher, student, labels, config), expected)
        assert logits_loss(student, student, labels, config) == 0


def test_the_rate_rises_stays_and_falls():
    config = StageConfig(lr=1.0, warmup=0.2, decay=0.3, min_lr=0.0)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3])
    assert rates[2:7] == [1.0] * 5
    assert rates[7:] == pytest.approx([0.75, 0.5, 0.25])


def test_the_rate_follows_half_a_cosine():
    config = LogitsConfig(lr=1.0, warmup=0.2, decay=0.3, min_lr=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    # Half of the way after half of the ten steps that are no warm-up.
    assert rates[7] == pytest.approx(0.55)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0.1 < rates[-1] < 0.13


def test_only_matrices_decay():
    module = torch.nn.Linear(3, 2)
    optimizer = ClippedAdamW(module.parameters(), StageConfig(weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_what_is_trained(bench):
    student = student_of(bench)
    mixers = trainable_parameters(student, "mixers")
    assert mixers and all(".self_attn.mixer." in name for name in mixers)
    assert {name.split(".")[2] for name in mixers} == {"1", "3"}
    without_mlp = trainable_parameters(student, "all_but_mlp")
    assert not [name for name in without_mlp if ".mlp." in name]
    assert not is_trained("model.decoder.layers.0.fc1.weight", "all_but_mlp")
    everything = trainable_parameters(student, "all")
    assert set(mixers) < set(without_mlp) < set(everything)
    assert set(everything) == {name for name, _ in student.named_parameters()}


def test_distillation_lowers_validation_kl_and_leaves_the_teacher_alone(bench, tmp_path):
    before = {n: p.clone() for n, p in bench.teacher.model.state_dict().items()}
    entry = {n: p.clone() for n, p in bench.bank.mixer(1, "mamba2").state_dict().items()}
    _, result = run(bench, tmp_path)
    assert result.after.mean_kl < result.before.mean_kl
    assert result.best_step > 0 and result.tokens == 640
    for name, tensor in bench.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in bench.bank.mixer(1, "mamba2").state_dict().items():
        assert torch.equal(tensor, entry[name]), name
    best = min(e["validation_kl"] for e in log_of(tmp_path) if "validation_kl" in e)
    assert result.after.mean_kl == pytest.approx(best, rel=1e-6)


def test_worse_weights_than_the_undistilled_are_never_kept(bench, tmp_path):
    undistilled = student_of(bench).state_dict()
    student, result = run(bench, tmp_path, dataclasses.replace(CONFIG, lr=3.0))
    assert result.best_step == 0
    assert result.after.mean_kl == result.before.mean_kl
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, undistilled[name]), name


def test_a_worse_start_is_replaced_by_the_undistilled_student(bench, tmp_path):
    spoiled = student_of(bench)
    with torch.no_grad():
        for name, parameter in spoiled.named_parameters():
            if "mixer" in name:
                parameter.add_(torch.randn_like(parameter))
    none = dataclasses.replace(CONFIG, tokens=0)
    student, result = run(bench, tmp_path, none, spoiled, undistilled=lambda: student_of(bench))
    assert result.after == result.before
    assert torch.equal(
        student.state_dict()["model.layers.1.self_attn.mixer.D"], bench.bank.mixer(1, "mamba2").D
    )


def test_the_undistilled_student_is_gone_before_the_trainer_is_made(bench, tmp_path, monkeypatch):
    made, make = [], logits.make_trainer

    def compared():
        made.append(weakref.ref(model := assemble(bench.teacher, LAYOUT, bench.bank)))
        return model

    def make_trainer(*args):
        # Where it divides the teacher, nobody else may hold the whole.
        gc.collect()
        assert [model() for model in made] == [None]
        return make(*args)

    monkeypatch.setattr(logits, "make_trainer", make_trainer)
    _, result = run(bench, tmp_path, undistilled=compared)
    assert result.after.mean_kl < result.before.mean_kl


# Of 40 steps the first four warm up. The looks after 9 and 12 never gain as much as is asked, so
# that the second of them ends the run after 15, the last three at falling rates.
PATIENT = dataclasses.replace(CONFIG, tokens=2560, warmup=0.1, patience=2, min_gain=0.9)


def test_where_validation_stops_improving_the_rate_falls_and_the_run_ends(bench, tmp_path):
    said, totals = [], []

    class Listening(Silent):
        def say(self, text):
            said.append(text)

        def expect(self, total):
            totals.append(total)

    _, result = run(bench, tmp_path / "early", PATIENT, reporter=Listening())
    log = log_of(tmp_path / "early")
    assert [entry["step"] for entry in log] == list(range(1, 16)) and totals == [15]
    assert result.tokens == 15 * 64
    expected = [learning_rate(PATIENT, step, 40) for step in range(4)] + [PATIENT.lr] * 8
    expected += [learning_rate(PATIENT, step, 15) for step in range(12, 15)]
    assert [entry["lr"] for entry in log] == expected and expected[-1] < expected[-3] < PATIENT.lr
    assert [e["step"] for e in log if "validation_kl" in e] == [3, 6, 9, 12, 15]
    assert said == [
        "stage 3: validation KL has not fallen by 90.0% in 2 looks, so the rate falls from step 12 "
        "on and the run ends after 15 of 40"
    ]
    # Without a decay there is nothing left to do.
    none = dataclasses.replace(PATIENT, decay=0.0)
    _, result = run(bench, tmp_path / "no decay", none)
    assert result.tokens == 12 * 64
    assert run(bench, tmp_path / "no decay", none)[1] == result


def test_a_run_that_goes_on_improving_is_as_long_as_it_was(bench, tmp_path):
    _, expected = run(bench, tmp_path / "plain")
    _, found = run(bench, tmp_path / "patient", dataclasses.replace(CONFIG, patience=1, min_gain=0))
    kl = [e["validation_kl"] for e in log_of(tmp_path / "plain") if "validation_kl" in e]
    assert kl == sorted(kl, reverse=True)
    assert found == expected
    assert log_of(tmp_path / "patient") == log_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("config", "stop_after"),
    [(CONFIG, 1), (CONFIG, 3), (CONFIG, 4), (CONFIG, 7), (PATIENT, 10), (PATIENT, 13)],
)
def test_a_killed_run_ends_bitwise_as_an_unbroken_one(
    bench, tmp_path, monkeypatch, config, stop_after
):
    import mohawk_nas.distill.logits as module

    whole, expected = run(bench, tmp_path / "whole", config)
    real, calls = module.LogitsTrainer.step, 0

    def dying(*args):
        nonlocal calls
        if calls == stop_after:
            raise KeyboardInterrupt
        calls += 1
        return real(*args)

    monkeypatch.setattr(module.LogitsTrainer, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path / "broken", config)
    monkeypatch.setattr(module.LogitsTrainer, "step", real)
    again, found = run(bench, tmp_path / "broken", config)
    assert found == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "whole")


def test_accumulated_batches_are_one_large_batch(bench, tmp_path):
    small = dataclasses.replace(CONFIG, batch_size=2, accumulate=2)
    run(bench, tmp_path / "large", CONFIG)
    run(bench, tmp_path / "small", small)
    large = load_tensors(tmp_path / "large/checkpoint.safetensors")
    parts = load_tensors(tmp_path / "small/checkpoint.safetensors")
    name = "weight/model.layers.1.self_attn.mixer.out_proj.weight"
    torch.testing.assert_close(large[name], parts[name], rtol=1e-3, atol=1e-5)


def test_students_side_by_side_are_trained_as_each_alone(bench):
    def train(students):
        trainer = LogitsTrainer(bench.teacher, students, CONFIG)
        for step in range(3):
            trainer.step([bench.blocks["bank"].batch([step, step + 1])], 1e-3)
        return [list(losses) for losses in zip(*(row for row, _ in trainer.read()), strict=True)]

    layouts = [LAYOUT, Layout.keeping((1, 3), num_layers=4, replacement="mamba2")]

    def students():
        return [assemble(bench.teacher, layout, bench.bank, share=False) for layout in layouts]

    together, alone = students(), students()
    assert train(together) == [losses for s in alone for losses in train([s])]
    for one, other in zip(together, alone, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_beside_a_bfloat16_teacher_masters_move_in_float32(bench, tmp_path):
    model = copy.deepcopy(bench.teacher.model).to(torch.bfloat16)
    teacher = Teacher(model, bench.teacher.tokenizer)
    student = assemble(teacher, LAYOUT, bench.bank, share=False).float()
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer = LogitsTrainer(teacher, [student], CONFIG)
    types = {name: p.dtype for name, p in student.named_parameters()}
    assert types["model.layers.0.mlp.fc1.weight"] == torch.bfloat16
    assert types["model.layers.1.self_attn.mixer.D"] == torch.float32
    # So small a step is lost in bfloat16.
    trainer.step([bench.blocks["bank"].batch([0, 1])], 1e-6)
    trainer.release()
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32
        moved = (parameter - before[name]).abs().max()
        assert 0 < moved < 3e-6 or "embed" in name, name
    result = distill_logits(
        teacher,
        student,
        train=bench.blocks["bank"],
        validation=bench.blocks["validation"],
        config=CONFIG,
        folder=tmp_path,
        seed=0,
        reporter=SILENT,
    )
    assert result.after.mean_kl < result.before.mean_kl


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "soft_ce"])
@pytest.mark.parametrize("trained", ["all", "mixers"])
def test_the_loss_of_some_tokens_at_a_time_is_that_of_all(bench, monkeypatch, loss, trained):
    import mohawk_nas.distill.losses as module

    student = student_of(bench)
    for parameter in trainable_parameters(student, trained).values():
        parameter.requires_grad_(True)
    tokens = bench.blocks["bank"].batch([0, 1, 2])
    target = bench.teacher.run(tokens)
    config = LogitsConfig(loss=loss, hard_label_weight=0.5, temperature=2.0)
    made, real = [], module.logits_from_hidden

    def counted(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(module, "logits_from_hidden", counted)
    found = []
    # All at once, and seven tokens, which end within a block.
    for values in (2**30, 7 * 4096):
        made.clear()
        monkeypatch.setattr(module, "HEAD_VALUES", {"cpu": values, "cuda": values})
        hidden = student.base_model(tokens).last_hidden_state
        student.zero_grad()
        value = loss_of_hidden(bench.teacher.model, target, student, hidden, tokens, config)
        (3 * value).backward()
        grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        found.append((value.detach(), grads))
        assert max(logits.numel() for logits in made) <= values
        with torch.no_grad():
            again = loss_of_hidden(bench.teacher.model, target, student, hidden, tokens, config)
        torch.testing.assert_close(again, value.detach())
    # Teacher's and student's, and again without gradients: none was made twice for backward.
    assert len(made) == 4 * 7
    assert ("model.embed_tokens.weight" in found[0][1]) == (trained == "all")
    assert len(found[0][1]) > 10
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_hard_labels_are_the_next_tokens_of_the_same_block(bench):
    student = student_of(bench)
    tokens = bench.blocks["bank"].batch([0, 1])
    with torch.no_grad():
        hidden = student.base_model(tokens).last_hidden_state
        config = LogitsConfig(hard_label_weight=1.0)
        target = bench.teacher.run(tokens)
        found = loss_of_hidden(bench.teacher.model, target, student, hidden, tokens, config)
        assert found == pytest.approx(student(tokens, labels=tokens).loss.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_trained_is_the_teachers_own(bench, dtype):
    teacher = Teacher(copy.deepcopy(bench.teacher.model).to(dtype), bench.teacher.tokenizer)
    before = {n: p.clone() for n, p in teacher.model.named_parameters()}
    stock = dict(teacher.model.named_parameters())
    for which in ("mixers", "all_but_mlp", "all"):
        student = student_to_train(teacher, LAYOUT, bench.bank, which, taught_in=dtype)
        trainer = LogitsTrainer(teacher, [student], dataclasses.replace(CONFIG, trainable=which))
        shared = {
            name for name, p in student.named_parameters() if name in stock and p is stock[name]
        }
        trained = set(trainable_parameters(student, which))
        assert shared == set(dict(student.named_parameters())) - trained
        assert bool(shared) == (which != "all")
        trainer.step([bench.blocks["bank"].batch([0, 1])], 1e-2)
        assert not trainer.read()[0][1][0]
        trainer.release()
        for name, parameter in teacher.model.named_parameters():
            assert parameter.dtype == dtype and torch.equal(parameter, before[name]), name
        # It is handed back in float32, with what moved moved.
        for name, parameter in student.named_parameters():
            assert parameter.dtype == torch.float32
            if name in trained and name in before and "norm" not in name:
                assert not torch.equal(parameter, before[name].float()), name
        student(bench.blocks["bank"].batch([0]))


def test_layers_that_are_run_again_give_the_same_gradients(bench):
    def gradients(recomputes):
        config = dataclasses.replace(CONFIG, activation_checkpointing=recomputes)
        student = student_of(bench)
        trainer = LogitsTrainer(bench.teacher, [student], config)
        runs = []
        mlp = student.model.layers[1].mlp
        mlp.register_forward_pre_hook(lambda *args: runs.append(1))
        trainer._add_gradients(bench.blocks["bank"].batch([0, 1]))
        found = {name: p.grad.clone() for name, p in trainer.parameters[0].items()}
        trainer.release()
        assert "forward" not in vars(student.model.layers[1])
        return found, len(runs)

    plain, once = gradients(False)
    again, twice = gradients(True)
    assert (once, twice) == (1, 2)
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_random_numbers_go_on_where_they_were(bench, tmp_path, monkeypatch):
    import mohawk_nas.distill.logits as module

    def noisy(folder):
        student = student_of(bench)
        student.model.layers[1].mlp.register_forward_hook(
            lambda m, args, out: out + 0.1 * torch.randn_like(out)
        )
        run(bench, folder, student=student)
        return log_of(folder)

    whole = noisy(tmp_path / "whole")
    torch.rand(3)
    real, calls = module.LogitsTrainer.step, 0

    def dying(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module.LogitsTrainer, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        noisy(tmp_path / "broken")
    monkeypatch.setattr(module.LogitsTrainer, "step", real)
    state = torch.get_rng_state()
    assert noisy(tmp_path / "broken") == whole
    assert torch.equal(torch.get_rng_state(), state)


def test_curves_go_to_tensorboard(bench, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(bench, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "validation_kl"):
        expected = [(e["step"], e[name]) for e in log_of(tmp_path) if name in e]
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected])


def test_gradients_that_are_not_finite_never_reach_the_weights(bench, tmp_path, monkeypatch):
    import mohawk_nas.distill.losses as module

    student = student_of(bench)
    before = {n: p.clone() for n, p in student.state_dict().items()}
    monkeypatch.setattr(module, "logits_loss", lambda t, s, *rest, **more: s.sum() * float("nan"))
    long = dataclasses.replace(CONFIG, tokens=64 * 20)
    with pytest.raises(
        TrainingError,
        match=r"finite in 1[1-3] steps, more than distill\.logits\.max_bad_steps \(10\); lower",
    ):
        run(bench, tmp_path, long, student)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_short_distillation_that_fails_names_the_rates_that_it_may_have(bench, monkeypatch):
    monkeypatch.setattr(LogitsTrainer, "read", lambda self: [([math.nan], [True])] * 11)
    named = r"in 11 steps; lower search\.rungs\.lr, or distill\.logits\.lr where that is not given"
    with pytest.raises(TrainingError, match=named):
        distil_layouts(
            bench.teacher,
            [LAYOUT],
            bench.bank,
            train=bench.blocks["bank"],
            config=CONFIG,
            seed=0,
            measure=len,
        )
