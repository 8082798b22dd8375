"""Train a small stock Phi or Llama from scratch, to be the teacher of an experiment.

With the shape and schedule of phi-tiny, which lies beside this script:

    python studies/assets/train_teacher.py --arch phi --data 'corpus/train-*.jsonl.xz' \\
        --validation corpus/valid.jsonl.xz --out my-teacher --layers 8 --d-model 192 --heads 6 \\
        --vocab 4096 --tokens 383M --seq-len 1024 --batch 64 --lr 2e-3

Data are JSON lines with a `text` field, plain or compressed (.xz, .gz, .zst); a record is a
document. The script trains a byte-level BPE on them, packs all documents into one stream with
<|endoftext|> (id 0) in front of each, trains on blocks of that stream, and writes a folder that
`AutoModelForCausalLM` and `AutoTokenizer` load, with the figures in `training.json`.

From prose alone a model of a few million parameters hardly learns to look things up, and a search
that scores recall then measures noise. `--recall-fraction 0.1` puts into a tenth of the training
blocks random tokens that can only be predicted by looking back (`recall_row` and `copy_row` below),
with prose before and after them, and <|endoftext|> at the head of half of all blocks. The accuracy
on fresh ones is printed as training goes on. It stays at zero for long and then rises within a few
hundred steps.
"""

import argparse
import glob
import itertools
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NoReturn

import torch
import transformers
from datasets import load_dataset
from datasets import logging as datasets_logging
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

END_OF_TEXT, END_OF_TEXT_ID = "<|endoftext|>", 0
# The label that cross_entropy, and with it every loss in transformers, leaves out.
IGNORED = -100
SHORTEST_TASK = 16
NUM_PROBES = 64
LOG_EVERY, PROBE_EVERY = 50, 500


class InputError(Exception):
    """Something the user can put right: one line, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    try:
        train_teacher(parse_arguments(argv))
    except InputError as error:
        print(f"train_teacher: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train_teacher: failed: {error}", file=sys.stderr)
        return 1
    return 0


def train_teacher(args: Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(args.data, args.vocab)
    corpus = token_stream(tokenizer, args.data, args.seq_len)
    validation = token_stream(tokenizer, args.validation, args.seq_len)
    model = build_model(args, tokenizer.get_vocab_size()).to(device)
    figures = {
        "name": args.out.name,
        "params": sum(p.numel() for p in model.parameters()),
        "corpus_tokens": len(corpus),
        "vocab_size": model.config.vocab_size,
    }
    print(", ".join(f"{name} {value}" for name, value in figures.items()), f"on {device}")

    figures |= train(model, corpus, args)
    # Measured on the weights as they are saved, not on their float32 originals.
    model.to(torch.bfloat16).float().eval()
    blocks = validation[: len(validation) // args.seq_len * args.seq_len].view(-1, args.seq_len)
    learnt = {
        "val_loss": token_losses(model, blocks, args.batch).mean().item(),
        "induction": induction(model, args),
    }
    if args.recall_fraction:
        learnt["recall_accuracy"] = accuracy(model, recall_row, args)
        learnt["copy_accuracy"] = accuracy(model, copy_row, args)
    print(*(f"{name}: {value}" for name, value in learnt.items()), sep="\n")
    save(model, tokenizer, figures | learnt, args)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_arguments(argv: list[str] | None) -> Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train_teacher", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="files, or quoted glob patterns")
    add("--validation", nargs="+", required=True, help="the same, of text held out")
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--arch", choices=("phi", "llama"), default="phi")
    add("--layers", type=count, default=8)
    add("--d-model", type=count, default=192)
    add("--heads", type=count, default=6)
    add("--kv-heads", type=count, help="fewer than --heads for grouped queries")
    add("--vocab", type=count, default=4096, help="most tokens the tokenizer may have")
    add("--tokens", type=count, required=True, help="to train on, for example 383M")
    add("--seq-len", type=count, default=1024)
    add("--batch", type=count, default=64, help="sequences a step")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--warmup", type=fraction, default=0.02, help="share of the steps")
    add("--decay", type=fraction, default=0.2, help="share of the steps")
    add(
        "--recall-fraction",
        type=fraction,
        default=0.0,
        help="share of the blocks with tasks in them",
    )
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args(argv)
    args.kv_heads = args.kv_heads or args.heads
    check(args)
    args.data = matching_files("--data", args.data)
    args.validation = matching_files("--validation", args.validation)
    return args


def count(text: str) -> int:
    scale = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper())
    number = float(text[:-1]) * scale if scale else float(text)
    if number < 1 or not number.is_integer():
        raise ValueError(text)
    return int(number)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


def check(args: Namespace) -> None:
    # Rotary embedding turns pairs of channels, and phi turns only half of the channels.
    pairs = args.heads * (4 if args.arch == "phi" else 2)
    if args.d_model % pairs:
        why = f"{pairs} (--heads {args.heads} of --arch {args.arch})"
        raise InputError(f"--d-model must be divisible by {why}, but it is {args.d_model}")
    if args.heads % args.kv_heads:
        why = f"--kv-heads {args.kv_heads}"
        raise InputError(f"--heads must be divisible by {why}, but it is {args.heads}")
    # All bytes and <|endoftext|>; the shortest sequence with a few answers in it.
    least_of = (("--vocab", args.vocab, 257), ("--seq-len", args.seq_len, SHORTEST_TASK))
    for name, value, least in least_of:
        if value < least:
            raise InputError(f"{name} must be at least {least}, but it is {value}")
    if args.out.exists():
        raise InputError(f"--out must be a new folder, but {args.out} exists")


def matching_files(option: str, patterns: list[str]) -> list[str]:
    files = sorted({file for pattern in patterns for file in glob.glob(pattern, recursive=True)})
    if not files:
        raise InputError(f"{option}: no file matches {' '.join(patterns)}")
    return files


def documents(files: list[str]) -> Iterator[str]:
    return (record["text"] for record in records(files))


def records(files: list[str]) -> Iterator[dict]:
    # The parser prints what it also raises.
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        for record in load_dataset("json", data_files=files, split="train", streaming=True):
            if not isinstance(record.get("text"), str):
                raise InputError(f"{files[0]}: each record must have a string in `text`")
            yield record
    except InputError:
        raise
    # Every parser and decompressor has errors of its own; a file without records is StopIteration.
    except Exception as error:
        reason = str(error).partition("\n")[0] or "no records, or cut short"
        raise InputError(f"cannot read {' '.join(files)}: {reason}") from error


def train_tokenizer(files: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(files), trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, files: list[str], seq_len: int) -> Tensor:
    """All documents in a row, <|endoftext|> in front of each; shape `(tokens,)`."""
    parts = [torch.empty(0, dtype=torch.int32)]
    texts = documents(files)
    while batch := list(itertools.islice(texts, 256)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            parts.append(torch.tensor([END_OF_TEXT_ID, *encoding.ids], dtype=torch.int32))
    stream = torch.cat(parts)
    if len(stream) < seq_len:
        raise InputError(f"{files[0]}: --seq-len needs {seq_len} tokens, got {len(stream)}")
    return stream


class Batches(IterableDataset):
    """Endless inputs and labels (not shifted), both of shape `(batch, seq_len)`."""

    def __init__(self, corpus: Tensor, vocab_size: int, args: Namespace) -> None:
        self.corpus, self.vocab_size, self.args = corpus, vocab_size, args

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        args, rng = self.args, Random(self.args.seed)
        starts = block_starts(len(self.corpus), args.seq_len, rng)
        while True:
            first = torch.tensor(list(itertools.islice(starts, args.batch)))
            inputs = self.corpus[first[:, None] + torch.arange(args.seq_len)].long()
            labels = inputs.clone()
            for i in range(args.batch if args.recall_fraction else 0):
                if rng.random() < args.recall_fraction:
                    put_tasks(inputs[i], labels[i], self.vocab_size, rng)
                if rng.random() < 0.5:
                    inputs[i, 0] = labels[i, 0] = END_OF_TEXT_ID
            yield inputs, labels


def block_starts(num_tokens: int, seq_len: int, rng: Random) -> Iterator[int]:
    """Every block once an epoch; each epoch cuts the stream at other places."""
    while True:
        offset = rng.randrange(min(seq_len, num_tokens - seq_len + 1))
        starts = range(offset, num_tokens - seq_len + 1, seq_len)
        yield from rng.sample(starts, len(starts))


def put_tasks(inputs: Tensor, labels: Tensor, vocab_size: int, rng: Random) -> None:
    """Write tasks over a part of a block, at its beginning as often as anywhere else.

    What comes next must follow from the text alone. Where blocks are tasks from end to end, their
    first token tells them from prose, and a model is made that is two: one that reads, and one that
    looks things up and cannot read.
    """
    length = len(inputs)
    first = rng.choice((0, rng.randint(0, length - SHORTEST_TASK)))
    last = rng.choice((length, rng.randint(first + SHORTEST_TASK, length)))
    inputs[first:last], labels[first:last] = synthetic_row(last - first, vocab_size, rng)


def synthetic_row(length: int, vocab_size: int, rng: Random) -> tuple[Tensor, Tensor]:
    """Tasks of both kinds one after another, short ones as likely as long ones.

    Looking back is learnt on short tasks first; a row that is one long task asks the same few
    things hundreds of times, or things that are still too hard.
    """
    inputs = torch.full((length,), END_OF_TEXT_ID)
    labels = torch.full_like(inputs, IGNORED)
    start = 0
    while (left := length - start) >= SHORTEST_TASK:
        wanted = round(math.exp(rng.uniform(math.log(SHORTEST_TASK), math.log(length))))
        make_row, size = rng.choice((recall_row, copy_row)), min(wanted, left)
        place = slice(start, start + size)
        inputs[place], labels[place] = make_row(size, vocab_size, rng)
        start += size
    return inputs, labels


# Both kinds of task have one right answer at each label: no token occurs twice in the part that is
# to be remembered, and a token that nothing before it determines is no label.


def recall_row(length: int, vocab_size: int, rng: Random) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then some of them again in any order; the labels are the values.

    Half of the sequences write `k1 v1 k2 v2 ...`, the others put the same few tokens before,
    between and after every key and value, as text would. Few pairs are as likely as many.
    """
    glue = [0, 0, 0] if rng.random() < 0.5 else [rng.randint(0, most) for most in (2, 2, 1)]
    if length < 4 * (2 + sum(glue)):
        glue = [0, 0, 0]
    size = 2 + sum(glue)
    most_pairs = min(length // (2 * size), (vocab_size - 1 - sum(glue)) // 2)
    num_pairs = round(math.exp(rng.uniform(math.log(2), math.log(most_pairs))))
    tokens = rng.sample(range(1, vocab_size), sum(glue) + 2 * num_pairs)
    before, between, after = (
        tokens[start : start + count]
        for start, count in zip(itertools.accumulate([0, *glue]), glue, strict=False)
    )
    words = tokens[sum(glue) :]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    row, answers = [END_OF_TEXT_ID], []
    for key, value in [*pairs, *rng.choices(pairs, k=length // size)]:
        row += [*before, key, *between]
        answers.append(len(row))
        row += [value, *after]
    inputs = torch.tensor(row[:length])
    labels = torch.full_like(inputs, IGNORED)
    asked = torch.tensor([place for place in answers[num_pairs:] if place < length])
    labels[asked] = inputs[asked]
    return inputs, labels


def copy_row(length: int, vocab_size: int, rng: Random) -> tuple[Tensor, Tensor]:
    """A string of tokens, over and over; the labels begin with the second token of its copy."""
    longest = min(length // 2, vocab_size) - 2
    period = round(math.exp(rng.uniform(math.log(4), math.log(longest))))
    string = rng.sample(range(1, vocab_size), period)
    row = torch.tensor([END_OF_TEXT_ID, *string * (length // period + 1)])[:length]
    labels = row.clone()
    labels[: period + 2] = IGNORED
    return row, labels


def build_model(args: Namespace, vocab_size: int) -> PreTrainedModel:
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": args.d_model,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 2 * args.seq_len,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
    }
    if args.arch == "phi":
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
        config = transformers.PhiConfig(
            intermediate_size=4 * args.d_model, rope_parameters=rope, **shape
        )
        return transformers.PhiForCausalLM(config)
    # Three matrices instead of phi's two: 8/3 of the width makes them about as large.
    width = math.ceil(args.d_model / 24) * 64
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=width, **shape))


def train(model: PreTrainedModel, corpus: Tensor, args: Namespace) -> dict[str, float]:
    step_tokens = args.batch * args.seq_len
    num_steps = math.ceil(args.tokens / step_tokens)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=fused)

    def rate(step: int) -> float:
        warmed_up = (step + 1) / max(1.0, args.warmup * num_steps)
        still_to_go = (num_steps - step) / max(1.0, args.decay * num_steps)
        return min(1.0, warmed_up, still_to_go)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    forward = torch.compile(model) if args.compile else model
    # A process of its own, since a GPU would wait for rows made in Python.
    ahead = {"num_workers": 1, "pin_memory": True} if fused else {}
    dataset = Batches(corpus, model.config.vocab_size, args)
    data = iter(DataLoader(dataset, batch_size=None, **ahead))
    losses = torch.zeros((), device=model.device)
    logged_step, logged_at = 0, time.perf_counter()
    model.train()
    for step in range(1, num_steps + 1):
        inputs, labels = (x.to(model.device, non_blocking=True) for x in next(data))
        with autocast(model):
            loss = forward(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses += loss.detach()
        if step == 1 or step % LOG_EVERY == 0 or step == num_steps:
            # The only line of most steps that waits for the device.
            average = losses.item() / (step - logged_step)
            if not math.isfinite(average):
                raise FloatingPointError(f"loss {average} by step {step}; try a lower --lr")
            speed = (step - logged_step) * step_tokens / (time.perf_counter() - logged_at)
            left = f"{(num_steps - step) * step_tokens / speed / 60:.1f} min left"
            line = f"step {step}/{num_steps}: loss {average:.4f}, {speed:,.0f} tokens/s, {left}"
            print(line, flush=True)
            if args.recall_fraction and step % PROBE_EVERY == 0:
                model.eval()
                for name, make_row in (("recall", recall_row), ("copy", copy_row)):
                    print(f"  {name}: {accuracy(model, make_row, args):.1%} right", flush=True)
                model.train()
            losses.zero_()
            logged_step, logged_at = step, time.perf_counter()
    return {"steps": num_steps, "tokens": num_steps * step_tokens, "train_loss": average}


def autocast(model: PreTrainedModel) -> torch.autocast:
    device = model.device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


@torch.inference_mode()
def logits(model: PreTrainedModel, rows: Tensor) -> Tensor:
    with autocast(model):
        return model(rows, use_cache=False).logits[:, :-1].float()


def token_losses(model: PreTrainedModel, rows: Tensor, batch: int) -> Tensor:
    """Nats for each token but the first of each row; `(rows, length)` to `(rows, length - 1)`."""
    losses = []
    for part in rows.long().split(batch):
        part = part.to(model.device)
        scores = logits(model, part).transpose(1, 2)
        losses.append(F.cross_entropy(scores, part[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def induction(model: PreTrainedModel, args: Namespace) -> tuple[float, float]:
    """Nats a token on a random string, and on the same string repeated straight after it.

    A model that copies well has a second figure near 0; one that cannot has two equal ones, both
    above ln(vocabulary), since it expects text.
    """
    half = (args.seq_len - 1) // 2
    rng = Random(args.seed + 1)
    strings = [rng.choices(range(1, model.config.vocab_size), k=half) for _ in range(NUM_PROBES)]
    rows = torch.tensor([[END_OF_TEXT_ID, *string, *string] for string in strings])
    losses = token_losses(model, rows, args.batch)
    return losses[:, :half].mean().item(), losses[:, half:].mean().item()


def accuracy(model: PreTrainedModel, make_row: Callable, args: Namespace) -> float:
    """Share of the labels of fresh synthetic sequences that the model's first choice meets."""
    rng = Random(args.seed + 2)
    met = []
    for _ in range(NUM_PROBES):
        row, labels = make_row(args.seq_len, model.config.vocab_size, rng)
        choices = logits(model, row[None].to(model.device))[0].argmax(-1).cpu()
        met.append((choices == labels[1:])[labels[1:] != IGNORED])
    return torch.cat(met).float().mean().item()


def save(model: PreTrainedModel, tokenizer: Tokenizer, figures: dict, args: Namespace) -> None:
    # Of the inputs only the names: where they lay says nothing to anyone else.
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "tokens", "vocab")}
    settings |= {k: [Path(file).name for file in settings[k]] for k in ("data", "validation")}
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    # Written beside and then renamed, so that a folder of that name is a whole one.
    beside = args.out.with_name(f"{args.out.name}.part")
    model.to(torch.bfloat16).save_pretrained(beside)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    length = model.config.max_position_embeddings
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, model_max_length=length, **special).save_pretrained(beside)
    (beside / "training.json").write_text(json.dumps(figures | settings, indent=2) + "\n")
    beside.replace(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
