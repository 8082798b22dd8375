"""Steps that are replayed from a CUDA graph do what plain ones do."""

import copy
import gc

import pytest
import torch

from mohawk_nas.config import LogitsConfig, MatrixConfig, StageConfig
from mohawk_nas.distill import graph
from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.distill.logits import LogitsTrainer
from mohawk_nas.distill.optimizer import ClippedAdamW
from mohawk_nas.distill.trainer import LayerJob, LayerTrainer, Stage
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import build_mixer, mixer_config
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher
from mohawk_nas.testing import tiny_model

pytestmark = pytest.mark.gpu

STEPS = 8
SHAPE = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture
def plainly(monkeypatch):
    def never_record():
        monkeypatch.setattr(graph, "PLAIN_STEPS", 10**9)

    return never_record


def make_teacher(arch="phi", dtype=torch.float32, **settings):
    model = tiny_model(arch, **SHAPE, num_key_value_heads=4, **settings)
    return Teacher(model.to(dtype).cuda())


def batches(count=STEPS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 61, (2, 64), generator=generator) for _ in range(count)]


def jobs_of(teacher):
    config = mixer_config({"mixer": "mamba2"})
    return [
        LayerJob(
            layer=view.layer_idx,
            candidate="mamba2",
            mixer=build_mixer(config, view, seed=view.layer_idx).float().cuda(),
        )
        for view in teacher.views
    ]


def train_layers(teacher, jobs, stage, given):
    trainer = LayerTrainer(teacher, jobs, stage)
    for number, tokens in enumerate(given):
        trainer.step(tokens, 1e-3 * (number + 1))
    recorded = trainer._step._graph is not None
    losses = trainer.read()
    trainer.release()
    return losses, recorded


def stage_of(name):
    config = MatrixConfig(batch_size=2) if name == "matrix" else StageConfig(batch_size=2)
    return Stage(name=name, config=config)


def assert_same(one, other):
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["matrix", "hidden"])
@pytest.mark.parametrize("arch", ["phi", "llama"])
def test_recorded_steps_train_layers_as_plain_ones(plainly, arch, name, dtype):
    teacher = make_teacher(arch, dtype)
    recorded = jobs_of(teacher)
    losses, was_recorded = train_layers(teacher, recorded, stage_of(name), batches())
    assert was_recorded
    plainly()
    plain = jobs_of(teacher)
    expected, was_recorded = train_layers(teacher, plain, stage_of(name), batches())
    assert not was_recorded
    assert losses == pytest.approx(expected, rel=1e-5)
    for one, other in zip(recorded, plain, strict=True):
        assert_same(one.mixer.state_dict(), other.mixer.state_dict())


def test_a_resumed_run_is_recorded_again_and_goes_on(plainly):
    teacher, stage = make_teacher(dtype=torch.bfloat16), stage_of("hidden")
    whole = jobs_of(teacher)
    train_layers(teacher, whole, stage, batches(12))
    broken = jobs_of(teacher)
    train_layers(teacher, broken, stage, batches(12)[:5])
    for job in broken:
        # What a bank stores and reads back.
        state = {name: t.clone() for name, t in job.mixer.state_dict().items()}
        moments = copy.deepcopy(job.optimizer.state_dict()["state"])
        fresh = build_mixer(job.mixer.config, teacher.views[job.layer], seed=99).float().cuda()
        fresh.load_state_dict(state)
        job.mixer, job.optimizer = fresh, ClippedAdamW(fresh.parameters(), stage.config)
        parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
        for index, entry in moments.items():
            job.optimizer.state[parameters[index]] = entry
    trainer = LayerTrainer(teacher, broken, stage)
    for number, tokens in list(enumerate(batches(12)))[5:]:
        trainer.step(tokens, 1e-3 * (number + 1))
    assert trainer._step._graph is not None
    for one, other in zip(whole, broken, strict=True):
        assert_same(one.mixer.state_dict(), other.mixer.state_dict())


@pytest.mark.parametrize(("accumulate", "sparing"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["phi", "llama"])
def test_recorded_steps_distil_as_plain_ones(
    plainly, monkeypatch, arch, dtype, accumulate, sparing
):
    if sparing:
        # The loss is made for 40 of 128 tokens at a time.
        monkeypatch.setattr("mohawk_nas.distill.losses.HEAD_VALUES", {"cuda": 40 * 61})
    teacher = make_teacher(arch, dtype, tie_word_embeddings=True)
    bank = {job.layer: job.mixer for job in jobs_of(teacher)}
    config = LogitsConfig(batch_size=2, accumulate=accumulate, activation_checkpointing=sparing)

    class Bank:
        def mixer(self, layer, name):
            return bank[layer]

    def train():
        students = [
            assemble(teacher, Layout(kinds), Bank(), share=False).float()
            for kinds in (("mamba2", "attention"), ("attention", "mamba2"))
        ]
        trainer = LogitsTrainer(teacher, students, config)
        for number in range(STEPS):
            parts = batches(STEPS * accumulate)[number * accumulate :][:accumulate]
            trainer.step(parts, 1e-3)
            if number == 6:
                # Weights that are loaded between two replays are those that are trained.
                trainer.load(0, {n: 0.9 * p.detach() for n, p in trainer.parameters[0].items()})
        losses = [row for row, _ in trainer.read()]
        recorded = trainer._backward._graph is not None
        trainer.release()
        return losses, recorded, [s.state_dict() for s in students]

    losses, recorded, students = train()
    assert recorded
    plainly()
    expected, recorded, plain = train()
    assert not recorded
    for row, wanted in zip(losses, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
    for one, other in zip(students, plain, strict=True):
        assert all(t.dtype == torch.float32 for n, t in one.items() if "weight" in n)
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_a_step_that_waits_for_the_gpu_runs_plainly_and_says_so(caplog):
    total = torch.zeros(3, device="cuda")

    def step(tokens):
        total.add_(tokens)
        assert total[0].item() >= 0

    recorded = RecordedStep(step, torch.device("cuda"))
    for _ in range(STEPS):
        recorded(torch.ones(3))
    assert "cannot be recorded" in caplog.text
    assert total.tolist() == [STEPS] * 3


def test_what_a_recording_holds_is_given_back():
    teacher = make_teacher(dtype=torch.bfloat16)
    train_layers(teacher, jobs_of(teacher), stage_of("hidden"), batches())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        train_layers(teacher, jobs_of(teacher), stage_of("hidden"), batches())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**22


def test_memory_that_runs_out_in_a_recording_is_free_again():
    def step(tokens):
        if torch.cuda.is_current_stream_capturing():
            # On a stream that joins no more, as where a backward pass fails.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                kept = torch.empty(2**30, dtype=torch.uint8, device="cuda")
                kept[: tokens.shape[0]] = 1
                torch.empty(torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")

    recorded = RecordedStep(step, torch.device("cuda", torch.cuda.current_device()))
    stream, tokens = torch.cuda.current_stream(), torch.zeros(2, dtype=torch.long)
    for _ in range(graph.PLAIN_STEPS):
        recorded(tokens)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.raises(torch.OutOfMemoryError):
        recorded(tokens)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    assert torch.cuda.current_stream() == stream
    torch.zeros(2**20, device="cuda").sum().item()
