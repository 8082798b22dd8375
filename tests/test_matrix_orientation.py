"""Stage 1's distance without matrices is the distance of the matrices."""

import json

import interpreting
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mohawk_nas.distill.matrix import matrix_loss
from mohawk_nas.errors import MixerError
from mohawk_nas.kernels.matrix_orientation import matrix_distance
from mohawk_nas.mixer import MatrixFactors, build_mixer, mixer_config
from mohawk_nas.teacher import Teacher
from mohawk_nas.testing import perturb, tiny_model

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TRAINED = ("c", "b", "log_decay", "diagonal")


def operands(length, *, heads=3, teacher_heads=3, kv_heads=3, batch=2, width=4, state=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "query": normal(batch, teacher_heads, length, width),
        "key": normal(batch, kv_heads, length, width),
        "c": 0.3 * normal(batch, heads, length, state),
        "b": 0.3 * normal(batch, heads, length, state),
        "log_decay": -torch.nn.functional.softplus(2 * normal(batch, heads, length)),
        "diagonal": normal(heads),
    }


def evenly(heads, teacher_heads):
    return torch.arange(heads) * teacher_heads // heads


def naive_distance(given, *, scaling, heads, window=None, mask=None):
    """Both matrices whole, in float64."""
    query, key, c, b, log_decay, diagonal = (given[name] for name in ("query", "key", *TRAINED))
    length = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, heads]
    query = query[:, heads]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = j <= i
    if window is not None:
        seen = seen & (i - j < window)
    seen = seen.expand(len(query), 1, -1, -1)
    if mask is not None:
        seen = seen & mask[:, None, None]
    weights = (query @ key.transpose(-1, -2) * scaling).exp() * seen
    teacher = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    rows = []
    for row in range(length):
        # Decays from each column to this row: products of what lies after the column.
        factors = log_decay[:, :, 1 : row + 1].exp().flip(-1).cumprod(-1).flip(-1)
        decay = torch.cat([factors, torch.ones_like(log_decay[:, :, :1])], dim=-1)
        entries = (c[:, :, row, None] * b[:, :, : row + 1]).sum(-1) * decay
        rows.append(torch.nn.functional.pad(entries, (0, length - row - 1)))
    student = torch.stack(rows, dim=2)
    if diagonal is not None:
        student = student + torch.diag_embed(diagonal[:, None].expand(-1, length))
    error = teacher - student
    if mask is not None:
        error = error * mask[:, None, :, None]
    return error.square().sum((-1, -2))


def run(distance, given, *, dtype=torch.float32, with_factors=True, **options):
    """Distances, and the gradient of a random combination of them for what is trained.

    ``dtype`` None leaves types as they are.
    """
    given = {
        n: None if t is None else t.detach().to(dtype or t.dtype, copy=True)
        for n, t in given.items()
    }
    for name in TRAINED:
        if given[name] is not None:
            given[name].requires_grad_()
    if with_factors:
        factors = MatrixFactors(**{name: given[name] for name in TRAINED})
        result = distance(given["query"], given["key"], factors, **options)
    else:
        result = distance(given, **options)
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(3))
    (result * weights.to(result)).sum().backward()
    found = {name: given[name].grad for name in TRAINED if given[name] is not None}
    return {"distance": result.detach(), **found}


def assert_agrees(given, *, block_size, tolerance=1e-5, **options):
    actual = run(matrix_distance, given, block_size=block_size, **options)
    expected = run(naive_distance, given, dtype=torch.float64, with_factors=False, **options)
    assert actual["distance"].dtype == torch.float32
    for name, tensor in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name].double() - tensor).abs().max()
        assert error <= tolerance * tensor.abs().max(), (name, error.item())


@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 128])
@pytest.mark.parametrize("length", [1, 2, 13, 17])
def test_distance_is_the_matrices(length, block_size):
    given = operands(length)
    assert_agrees(given, block_size=block_size, scaling=0.6, heads=torch.arange(3))


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_sliding_windows(window):
    given = operands(17)
    options = {"scaling": 0.6, "heads": torch.arange(3), "window": window}
    assert_agrees(given, block_size=6, **options)


@pytest.mark.parametrize(("teacher_heads", "kv_heads"), [(6, 2), (6, 1), (6, 3)])
@pytest.mark.parametrize("heads", [6, 4, 8, 3])
def test_grouped_and_unequal_heads(heads, teacher_heads, kv_heads):
    given = operands(11, heads=heads, teacher_heads=teacher_heads, kv_heads=kv_heads)
    pairs = evenly(heads, teacher_heads)
    assert_agrees(given, block_size=4, scaling=0.6, heads=pairs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("block_size", [3, 16])
def test_left_padding(block_size, window):
    given = operands(13, batch=3)
    mask = torch.arange(13)[None] >= torch.tensor([0, 6, 12])[:, None]
    # A mixer's padded positions hold zeros, and a decay of one.
    for name in ("c", "b"):
        given[name] = given[name] * mask[:, None, :, None]
    given["log_decay"] = given["log_decay"] * mask[:, None]
    options = {"scaling": 0.6, "heads": torch.arange(3), "window": window}
    assert_agrees(given, block_size=block_size, mask=mask, **options)
    # The real tokens alone are as far from each other.
    together = run(matrix_distance, given, mask=mask, block_size=block_size, **options)
    for row, start in enumerate((0, 6, 12)):
        alone = {
            name: tensor if name == "diagonal" else tensor[row : row + 1, :, start:]
            for name, tensor in given.items()
        }
        distance = run(matrix_distance, alone, block_size=block_size, **options)["distance"]
        torch.testing.assert_close(together["distance"][row], distance[0])


def test_a_matrix_without_diagonal():
    given = operands(13) | {"diagonal": None}
    assert_agrees(given, block_size=5, scaling=0.6, heads=torch.arange(3))


def test_long_sums_of_decays_stay_exact():
    given = operands(300, heads=1, teacher_heads=1, kv_heads=1, batch=1)
    steps = torch.logspace(-6, 1, 300)[
        torch.randperm(300, generator=torch.Generator().manual_seed(0))
    ]
    given["log_decay"] = -steps.expand(1, 1, -1)
    assert_agrees(given, block_size=64, scaling=0.6, heads=torch.arange(1))


def test_bfloat16_operands_are_computed_in_float32():
    given = {n: t.bfloat16() for n, t in operands(17).items()}
    given["log_decay"] = given["log_decay"].float()
    exact = {n: t.double() for n, t in given.items()}
    options = {"scaling": 0.6, "heads": torch.arange(3)}
    factors = MatrixFactors(**{name: given[name] for name in TRAINED})
    actual = matrix_distance(given["query"], given["key"], factors, block_size=5, **options)
    torch.testing.assert_close(actual.double(), naive_distance(exact, **options))


def test_no_gradient_is_asked_of_the_teacher():
    given = operands(9)
    factors = MatrixFactors(**{name: given[name].requires_grad_() for name in TRAINED})
    with torch.no_grad():
        distance = matrix_distance(
            given["query"], given["key"], factors, scaling=0.6, heads=torch.arange(3)
        )
    assert not distance.requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_matrix_of_the_whole_sequence_is_made():
    batch, heads, length, block_size = 2, 3, 256, 16
    given = operands(length, batch=batch)
    with Largest() as naive:
        mask = torch.zeros(batch, heads, length, length)
    assert naive.elements == mask.numel()
    options = {"scaling": 0.6, "heads": torch.arange(heads), "block_size": block_size}
    with Largest() as largest:
        run(matrix_distance, given, **options)
    assert largest.elements <= batch * heads * length * block_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_waits_for_backward_grows_with_the_length_alone(dtype):
    held = {}
    for length in (128, 256, 512):
        given = {name: tensor.to(dtype) for name, tensor in operands(length).items()}
        given["log_decay"] = given["log_decay"].float()
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        factors = MatrixFactors(**{name: given[name].requires_grad_() for name in TRAINED})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            matrix_distance(
                given["query"],
                given["key"],
                factors,
                scaling=0.6,
                heads=torch.arange(3),
                block_size=16,
            )
        held[length] = sum(storage.nbytes() for storage in storages.values())
    assert held[512] - held[256] <= 2.2 * (held[256] - held[128]), held


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_in_float64_are_those_of_small_steps(window):
    given = {n: t.double() for n, t in operands(7, teacher_heads=6, kv_heads=2).items()}
    pairs = evenly(3, 6)

    def distance(*trained):
        factors = MatrixFactors(**dict(zip(TRAINED, trained, strict=True)))
        options = {"scaling": 0.6, "heads": pairs, "window": window, "block_size": 3}
        return matrix_distance(given["query"], given["key"], factors, **options)

    trained = [given[name].requires_grad_() for name in TRAINED]
    assert distance(*trained).dtype == torch.float64
    assert torch.autograd.gradcheck(distance, trained)


# The fused kernel. On a GPU: test_matrix_orientation_gpu.py.


def test_a_kernel_that_cannot_run_says_why():
    given = operands(5)
    factors = MatrixFactors(**{name: given[name] for name in TRAINED})
    options = {"scaling": 0.6, "heads": torch.arange(3)}

    def distance(**more):
        return matrix_distance(given["query"], given["key"], factors, **options, **more)

    assert torch.equal(distance(), distance(backend="torch"))
    with pytest.raises(ValueError, match="backend 'triton' cannot run: the tensors are on cpu"):
        distance(backend="triton")
    with pytest.raises(ValueError, match="has a padding mask"):
        distance(backend="triton", mask=torch.ones(2, 5, dtype=torch.bool))


INTERPRETED = {
    "short": ({"length": 17}, {}),
    "one token": ({"length": 1}, {}),
    "grouped heads": (
        {"length": 37, "heads": 4, "teacher_heads": 6, "kv_heads": 2, "width": 5, "state": 18},
        {},
    ),
    "window": ({"length": 50}, {"window": 5}),
    "window longer than a tile": ({"length": 70, "batch": 1}, {"window": 40}),
    "no decay": ({"length": 45}, {"decay": -1e-6}),
    "strong decay": ({"length": 130, "batch": 1}, {"decay": -20.0}),
    "strong decay in a window": ({"length": 130, "batch": 1}, {"decay": -20.0, "window": 30}),
    "no diagonal": ({"length": 33}, {"diagonal": None}),
    # The interpreter multiplies bfloat16 as if its bits were integers.
    "float16": ({"length": 37, "state": 18}, {"dtype": torch.float16}),
}


def interpreted():
    """Relative errors of the kernel by case and tensor; to be called where Triton interprets."""
    from mohawk_nas.kernels import _matrix_orientation_triton as fused

    interpreting.ready()
    # Small tiles, unequal from kernel to kernel, so that small inputs have many.
    one, two = fused.Launch(16, 16, 4, 1), fused.Launch(32, 16, 4, 1)
    fused.choose = lambda *args, **kwargs: fused.Launches(two, one, two)
    errors = {}
    for case, (shape, settings) in INTERPRETED.items():
        given = operands(**shape)
        settings = dict(settings)
        if "decay" in settings:
            decay = settings.pop("decay")
            given["log_decay"] = decay * (0.5 + torch.rand_like(given["log_decay"]))
        if "diagonal" in settings:
            given["diagonal"] = settings.pop("diagonal")
        dtype = settings.pop("dtype", torch.float32)
        for name in ("query", "key", "c", "b"):
            given[name] = given[name].to(dtype)
        # As a mixer hands them over: heads beside each other in a token, decays last.
        for name in ("c", "b", "log_decay"):
            given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
        pairs = evenly(given["c"].shape[1], given["query"].shape[1])
        options = {"scaling": 0.6, "heads": pairs, **settings}
        actual = run(matrix_distance, given, dtype=None, backend="triton", **options)
        expected = run(naive_distance, given, dtype=torch.float64, with_factors=False, **options)
        errors[case] = {}
        for name, tensor in expected.items():
            norm = max(tensor.norm().item(), 1e-30)
            errors[case][name] = ((actual[name].double() - tensor).norm() / norm).item()
            assert actual[name].dtype == (given.get(name, tensor.float()).dtype), (case, name)
    print(json.dumps(errors))


@pytest.fixture(scope="module")
def interpreted_errors():
    return interpreting.errors_of(__name__)


@pytest.mark.parametrize("case", INTERPRETED)
def test_the_fused_kernel_is_the_matrices(interpreted_errors, case):
    found = interpreted_errors[case]
    assert set(found) >= {"distance", "c", "b", "log_decay"}
    limit = 1e-3 if case == "float16" else 2e-6
    assert all(error <= limit for error in found.values()), found


# Stage 1 itself


@pytest.mark.parametrize(
    ("arch", "options", "settings"),
    [
        ("llama", {}, {}),
        ("phi", {"init": "random", "num_heads": 4, "d_state": 5}, {}),
        ("mistral", {}, {"sliding_window": 5}),
    ],
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_stage_one_is_the_distance_of_the_mixing_matrix(arch, options, settings, padded):
    eager = tiny_model(arch, attention="eager", **settings)
    teacher = Teacher(tiny_model(arch, **settings))
    tokens = torch.randint(3, 61, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 13, dtype=torch.bool)
    if padded:
        mask[0, :6] = False
    given = mask if padded else None
    captures = []
    teacher.run(tokens, mask=given, on_layer=captures.append, matrices=True)
    weights = eager(tokens, attention_mask=given, output_attentions=True).attentions
    for capture, attention in zip(captures, weights, strict=True):
        config = mixer_config({"mixer": "mamba2", **options})
        mixer = build_mixer(config, capture.view, seed=0)
        perturb(mixer, scale=0.1)
        loss = matrix_loss(mixer, capture)
        pairs = mixer.head_pairs(capture.view.num_heads)
        error = attention[:, pairs] - mixer.mixing_matrix(capture.hidden, mask=given)
        expected = (error * mask[:, None, :, None]).square().sum((-1, -2)).sqrt().mean()
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=0)
        squared = matrix_loss(mixer, capture, squared=True)
        expected = (error * mask[:, None, :, None]).square().sum((-1, -2)).mean()
        torch.testing.assert_close(squared, expected, rtol=4e-4, atol=0)
        loss.backward()
        assert mixer.in_proj.weight.grad.any()
        assert not any(p.requires_grad for p in teacher.model.parameters())


def test_stage_one_needs_factors():
    teacher = Teacher(tiny_model("llama"))
    captures = []
    teacher.run(torch.tensor([[3, 4, 5]]), on_layer=captures.append, matrices=True)
    mixer = build_mixer(mixer_config({"mixer": "attention"}), captures[0].view, seed=0)
    with pytest.raises(MixerError, match=r"layer 0: stage 1 needs .* AttentionMixer does not; set"):
        matrix_loss(mixer, captures[0])
