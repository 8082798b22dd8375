import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_study import make_study

from mohawk_nas import recall
from mohawk_nas.errors import ConfigError, TeacherError
from mohawk_nas.evaluate import Examination
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.metrics import body
from mohawk_nas.pipeline import load_best, search
from mohawk_nas.recall import RecallProbe, Template, make_probe
from mohawk_nas.reporting import SILENT
from mohawk_nas.search import statistics
from mohawk_nas.search.objectives import BankScorer
from mohawk_nas.search.study import load_result
from mohawk_nas.student import assemble
from mohawk_nas.workbench import Workbench

VOCAB = 1020


class Memory(torch.nn.Module):
    """Answers with what followed the last four tokens before, or as many as came before.

    Args:
        reach: Tokens it looks back.
    """

    class Body(torch.nn.Module):
        def __init__(self, reach):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.reach = reach

        def forward(self, input_ids, **kwargs):
            rows = [self.guesses(row) for row in input_ids.tolist()]
            hidden = F.one_hot(torch.tensor(rows), VOCAB).float()
            return SimpleNamespace(last_hidden_state=hidden)

        def guesses(self, row):
            found = []
            for here in range(len(row)):
                earlier = range(max(0, here - self.reach), here)
                for length in (4, 3, 2, 1):
                    last = row[max(0, here + 1 - length) : here + 1]
                    places = [p for p in earlier if row[max(0, p + 1 - length) : p + 1] == last]
                    if places:
                        break
                found.append(row[places[-1] + 1] if places else 0)
            return found

    def __init__(self, reach=10**6):
        super().__init__()
        self.base_model = self.Body(reach)
        text = SimpleNamespace(vocab_size=VOCAB, _attn_implementation="sdpa")
        self.config = SimpleNamespace(get_text_config=lambda: text, _attn_implementation="sdpa")

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.base_model(input_ids=input_ids).last_hidden_state)


END = 7
"""In front of each document."""


class Words:
    """Three-letter words from id 300 on, from 900 on with a capital; else one id a character."""

    all_special_ids = (0,)

    def get_vocab(self):
        letters = "abcdefghij"
        words = [f"{letters[i // 100]}{letters[i // 10 % 10]}{letters[i % 10]}" for i in range(600)]
        words += [word.title() for word in words[:120]]
        return {f"\u0120{word}": 300 + i for i, word in enumerate(words)}

    def encode(self, text, add_special_tokens):
        return [ord(character) for character in text]


def teacher_of(model, *, tokenizer=None, context=2048):
    return SimpleNamespace(model=model, tokenizer=tokenizer, vocab_size=VOCAB, context=context)


@pytest.mark.parametrize("tokenizer", [None, Words()], ids=["ids", "words"])
def test_a_model_that_remembers_everything_solves_the_hardest_probe(tokenizer, monkeypatch):
    monkeypatch.setattr(recall, "NUM_TRIED", 1)
    seen = []
    for split in recall.TEMPLATES:
        teacher = teacher_of(Memory(), tokenizer=tokenizer)
        probe = make_probe(teacher, split, separator=END, num_sequences=30)
        if tokenizer is None and split != "search":
            # Without a tokenizer nothing can stand between the words.
            assert probe is None
            continue
        # 200 words a split, or 764 / 3 ids: 64 pairs are the most that fit; of the bank's 120, 32.
        templates = recall.TEMPLATES[split] if tokenizer else [Template()]
        most = 32 if split == "bank" else 64
        sizes = [min(most, size) for size in recall.NUM_PAIRS]
        count = max(len(templates), len(sizes))
        pairs = [(templates[i % len(templates)], sizes[i % len(sizes)]) for i in range(count)]
        assert probe.asked == tuple(dict.fromkeys(pairs))
        assert probe.teacher_recall == 1.0
        assert probe.tokens.shape[0] == 30 == len(probe.asked_by)
        assert probe.positions.shape == (30, recall.NUM_QUESTIONS)
        # As many sequences of each, give or take one.
        dealt = probe.asked_by.bincount()
        assert len(dealt) == len(probe.asked) and dealt.max() - dealt.min() <= 1
        seen.append({t for t in probe.tokens.flatten().tolist() if t >= 256})
    assert not any(one & other for one in seen for other in seen if one is not other)


def test_no_two_splits_ask_in_the_same_notation():
    written = [template for templates in recall.TEMPLATES.values() for template in templates]
    assert len(set(written)) == len(written)


def test_questions_ask_for_pairs_that_were_named_once(monkeypatch):
    monkeypatch.setitem(recall.TEMPLATES, "test", recall.TEMPLATES["test"][:2])
    teacher = teacher_of(Memory(), tokenizer=Words())
    probe = make_probe(teacher, "test", separator=END, num_sequences=12)
    assert str(probe) == "2 notations such as 'KEY =VALUE,', 16 to 64 pairs"
    found = []
    for part, number in zip(probe.batches(1), probe.asked_by.tolist(), strict=True):
        (row,), (positions,) = part.tokens.tolist(), part.positions.tolist()
        # As a document begins.
        assert row[0] == END
        glued = ord("=") in row
        # Characters are ids here: "word =word," or "wordword.".
        width, place = (5, 3) if glued else (3, 1)
        answers = [row[p + 1] for p in positions]
        row = row[1:]
        entries = [row[i : i + width] for i in range(0, len(row), width)]
        num_pairs = len(entries) - recall.NUM_EXAMPLES - recall.NUM_QUESTIONS
        pairs = {entry[0]: entry[place] for entry in entries[:num_pairs]}
        assert len(pairs) == num_pairs == len(set(pairs.values()) - set(pairs))
        asked = entries[num_pairs:]
        assert len({entry[0] for entry in asked}) == len(asked)
        assert all(pairs[entry[0]] == entry[place] for entry in asked)
        assert answers == [entry[place] for entry in asked[recall.NUM_EXAMPLES :]]
        found.append((glued, num_pairs))
        # What the probe says of this sequence.
        template, size = probe.asked[number]
        assert (template.between == " =", size) == found[-1]
    # Two templates take two of the four sizes each, and there are no words for 128 pairs; each of
    # these three times, the short ones first.
    asked = [(True, 16), (False, 32), (True, 64), (False, 64)]
    assert sorted(found) == sorted(asked * 3)
    assert found[0] == (False, 32) and found[-1] == (True, 64)


def test_the_probe_grows_until_the_teacher_fails(monkeypatch):
    monkeypatch.setitem(recall.TEMPLATES, "test", recall.TEMPLATES["test"][:2])
    # 16 pairs of two tokens and 16 questions more: what lies further back is forgotten.
    probe = make_probe(teacher_of(Memory(reach=44)), "search", separator=END)
    assert probe.asked == ((Template(), 16),)
    assert str(probe) == "'KEYVALUE', 16 pairs"
    assert make_probe(teacher_of(Memory(reach=8)), "search", separator=END) is None
    # A probe must fit into what the teacher was made for.
    short = make_probe(teacher_of(Memory(), context=120), "search", separator=END)
    assert short.asked == ((Template(), 16), (Template(), 32))
    assert probe.teacher_recall == recall.recall(Memory(reach=44), probe) >= recall.SOLVED
    # Each template as far as it is solved: five tokens a pair, or three.
    two = make_probe(teacher_of(Memory(reach=110), tokenizer=Words()), "test", separator=END)
    assert [size for _, size in two.asked] == [16, 32]


def test_a_notation_counts_as_one_answer_and_blocks_have_their_own():
    teacher = teacher_of(Memory(), tokenizer=Words())
    probe = make_probe(teacher, "search", separator=END, num_sequences=16)
    assert len(probe.asked) == recall.FEW_NOTATIONS
    # Sequences stand by their length, so a notation's are anywhere.
    assert probe.asked_by.tolist() != sorted(probe.asked_by.tolist())
    # A sequence's place in its notation, the notation and its size.
    twice = torch.zeros(16)
    twice[probe.asked_by.argsort(stable=True)] = torch.tensor([0.0, 1.0]).repeat(8)
    # As if it solved all sizes.
    asked = [(probe.asked[i][0], recall.NUM_PAIRS[i % 4]) for i in range(8)]
    probe, sizes = dataclasses.replace(probe, asked=asked), torch.tensor(2 * recall.NUM_PAIRS)
    right = twice + probe.asked_by / 10 + sizes[probe.asked_by]
    of_each = torch.tensor([right[probe.asked_by == number].mean() for number in range(8)])
    # Of the two notations of a size the first has 0.2 less than their mean, and 4 of 7 are free.
    parts = probe.parts(right) - of_each.mean()
    first = torch.arange(8) < 4
    torch.testing.assert_close(parts, torch.where(first, -0.2, 0.2) * (7 / 4) ** 0.5)
    # A block is of all sizes: here of the first sequences of the first notation of each, and so on.
    dealt = probe.by_block(right, 4) - sizes.float().mean()
    firsts = [kept.nonzero().float().mean().item() / 10 for kept in (first, ~first)]
    wanted = [part + place for part in firsts for place in (0.0, 1.0)]
    assert dealt.tolist() == pytest.approx(wanted, abs=1e-5)
    assert probe.by_block(right, 8).mean().item() == pytest.approx(right.mean().item())
    few = dataclasses.replace(probe, asked=probe.asked[:7])
    assert few.parts(right) is right
    assert (probe.parts_are, few.parts_are) == ("notations", "sequences")


@pytest.mark.parametrize(("notations", "least", "most"), [(8, 0.91, 0.945), (24, 0.935, 0.96)])
def test_intervals_over_notations_hold_as_often_as_they_say(notations, least, most):
    sizes = torch.tensor(recall.NUM_PAIRS).repeat(notations // 4)
    template = recall.TEMPLATES["test"][0]
    probe = RecallProbe(
        split="test",
        asked=[(template, int(size)) for size in sizes],
        asked_by=torch.arange(notations),
        tokens=torch.zeros(notations, 2, dtype=torch.long),
        positions=torch.zeros(notations, 1, dtype=torch.long),
        teacher_recall=1.0,
    )
    rng, repeats, within = torch.Generator().manual_seed(0), 4000, 0
    for _ in range(repeats):
        # Sizes differ by far more than notations do, and are the same each time.
        right = sizes + 0.05 * torch.randn(notations, generator=rng)
        found = statistics.paired([(1.0, probe.parts(right).double().numpy())])
        within += found.low < sizes.double().mean() < found.high
    assert least < within / repeats < most


def test_a_forgetful_model_answers_what_it_can_reach():
    probe = make_probe(teacher_of(Memory()), "search", separator=END)
    shares = [recall.recall(Memory(reach=reach), probe) for reach in (10, 60, 100, 10**6)]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] == 1.0


# As a study's objective


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Workbench(make_study(tmp_path_factory.mktemp("recall")))
    bench.bank.train(bench.space.replaceable, reporter=SILENT)
    return bench


def probe_for(bench, model, *, wrong):
    """Asks for what a model says anyway, but in ``wrong`` of the sequences for something else."""
    blocks = len(bench.blocks["search"])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(300, 400, (2 * blocks, 12), generator=generator)
    with torch.no_grad():
        hidden = body(model, tokens)
    # Every other sequence is asked earlier, as short ones are.
    positions = torch.full((len(tokens), 1), 10)
    positions[::2] = 7
    probe = RecallProbe(
        split="search",
        # A block's answers are those of one notation, two sequences that follow one another.
        asked=((Template(), 4),) * blocks,
        asked_by=torch.arange(len(tokens)) // 2,
        tokens=tokens,
        positions=positions,
        teacher_recall=0.8,
    )
    rows, asked = torch.arange(len(tokens)), positions[:, 0]
    tokens[rows, asked + 1] = bench.teacher.logits(hidden)[rows, asked].argmax(-1)
    tokens[rows[:wrong], asked[:wrong] + 1] += 1
    return probe


def scorer(bench, probe, **options):
    weights = {"kl": 1.0, "recall": 0.5}
    return BankScorer(
        bench.teacher,
        bench.bank,
        bench.blocks["search"],
        pairs=bench.space.replaceable,
        weights=weights,
        probe=probe,
        **options,
    )


def test_the_objective_is_the_share_of_recall_that_is_lost(bench):
    layouts = list(bench.budget.enumerate(bench.space))
    student = assemble(bench.teacher, layouts[1], bench.bank)
    blocks = len(bench.blocks["search"])
    probe = probe_for(bench, student, wrong=blocks // 2)
    nothing = {"teacher": 0, "students": 0}
    for options in ({}, {"kept_bytes": nothing}, {"batch_size": 1}):
        scored = scorer(bench, probe, **options)
        # Another layout first, so that there are prefixes to go on from.
        others = [scored.score(layouts[i]) for i in (0, 2)]
        score = scored.score(layouts[1])
        lost = score.per_block["recall"]
        assert len(lost) == blocks
        # A quarter of the blocks have nothing right.
        assert lost == pytest.approx([1.0] * (blocks // 4) + [1 - 1 / 0.8] * (blocks - blocks // 4))
        assert score.value({"kl": 1.0, "recall": 0.5}) == pytest.approx(
            score.mean("kl") + 0.5 * score.mean("recall")
        )
        assert all(other.mean("recall") > score.mean("recall") for other in others)


def test_rungs_tell_the_share_that_is_lost_after_distillation(bench, monkeypatch):
    layout = next(iter(bench.budget.enumerate(bench.space)))
    student = assemble(bench.teacher, layout, bench.bank)
    blocks = len(bench.blocks["validation"])
    probe = probe_for(bench, student, wrong=blocks // 2)
    monkeypatch.setitem(bench._probes, "validation", probe)
    # So little changes that it still answers as before.
    slow = dataclasses.replace(bench.config.distill.logits, lr=1e-8)
    distill = dataclasses.replace(bench.config.distill, logits=slow)
    monkeypatch.setattr(bench, "config", dataclasses.replace(bench.config, distill=distill))
    (score,) = bench.distiller(scorer(bench, probe))([layout], 100, 0)
    assert score.tokens == 64, "whole steps"
    assert score.per_block["recall"] == pytest.approx(
        [1.0] * (blocks // 4) + [1 - 1 / 0.8] * (blocks - blocks // 4)
    )
    assert len(score.per_block["kl"]) == blocks


def test_a_study_leaves_recall_out_where_the_teacher_has_none(tmp_path):
    said = []

    class Listener(type(SILENT)):
        def say(self, text):
            said.append(text)

    study = make_study(tmp_path)
    both = dataclasses.replace(
        study, search=dataclasses.replace(study.search, objective={"kl": 1.0, "recall": 1.0})
    )
    result, _ = search(both, reporter=Listener())
    assert any("recall is left out" in line for line in said)
    assert set(result.best.score.per_block) == {"kl"}
    # Read again as it was written.
    again = Workbench(load_best(both.run_dir).study)
    found = load_result(again.study, again.space, again.budget, run_dir=both.run_dir)
    assert found.best.layout == result.best.layout
    alone = dataclasses.replace(
        study, search=dataclasses.replace(study.search, objective={"recall": 1.0})
    )
    # Told before anything is trained.
    alone = dataclasses.replace(
        alone, name="alone", bank=dataclasses.replace(alone.bank, path=str(tmp_path / "other"))
    )
    with pytest.raises(TeacherError, match="solves no recall probe"):
        search(alone)
    assert not (tmp_path / "other").exists()


def test_recall_is_left_out_of_a_pareto_set_too(tmp_path):
    said = []

    class Listener(type(SILENT)):
        def say(self, text):
            said.append(text)

    study = make_study(tmp_path, "search.pareto=[recall,kl,cache]")
    result, _ = search(study, reporter=Listener())
    assert any(line.endswith("recall is left out of search.pareto") for line in said)
    assert result.pareto == ("kl", "cache") and result.pareto_set
    again = make_study(tmp_path, "search.pareto=[recall,kl]", "name=other")
    with pytest.raises(TeacherError, match="and kl alone makes no Pareto set"):
        search(again)


def test_recall_can_be_a_figure_of_the_pareto_set_alone(bench):
    pareto = dataclasses.replace(bench.config.search, pareto=["recall", "kl", "cache"])
    work = Workbench(dataclasses.replace(bench.config, search=pareto))
    layout = next(bench.budget.enumerate(bench.space))
    probe = probe_for(bench, assemble(bench.teacher, layout, bench.bank), wrong=0)
    # One that this teacher solves.
    work._probes["search"] = probe
    assert work.study.search.pareto == ["recall", "kl", "cache"]
    assert work.identity["recall probe"] == f"{probe}, {probe.fingerprint}"
    score = work.scorer().score(layout)
    assert list(score.per_block) == ["kl", "recall", "cache"]
    assert score.mean("recall") == pytest.approx(1 - 1 / 0.8)
    assert score.value(work.study.search.objective) == score.mean("kl")


def test_all_attention_loses_nothing(bench):
    student = bench.teacher.model
    probe = probe_for(bench, student, wrong=0)
    probe = dataclasses.replace(probe, teacher_recall=recall.recall(student, probe))
    everything = Layout((ATTENTION,) * bench.teacher.num_layers)
    assert scorer(bench, probe).score(everything).mean("recall") == 0


def test_what_cannot_do_without_recall_is_told_before_the_bank_is_trained(tmp_path):
    study = make_study(
        tmp_path, "search.objective={kl: 1, recall: 1}", "search.baselines=[recall_drop]"
    )
    with pytest.raises(ConfigError, match=r"must score recall.*recall_drop.*solves no recall prob"):
        search(study)
    assert not list((tmp_path / "bank").glob("*"))


def test_sequences_begin_with_what_the_study_puts_in_front_of_documents(tmp_path, monkeypatch):
    bench = Workbench(make_study(tmp_path, "data.separator=' the'"))
    (separator,) = bench.teacher.tokenizer.encode(" the", add_special_tokens=False)
    assert separator != bench.teacher.tokenizer.bos_token_id
    asked = []
    monkeypatch.setattr(recall, "make_probe", lambda *args, **options: asked.append(options))
    probes = Examination(bench=bench, lengths=[256]).length_probes
    assert [options["separator"] for options in asked] == [separator]
    assert {int(token) for probe in probes for token in probe.tokens[:, 0]} == {separator}


@pytest.mark.parametrize("reach", [10**6, 330, 40])
def test_what_is_found_over_length_is_what_is_within_reach(reach):
    teacher = teacher_of(Memory(reach), tokenizer=Words(), context=256)
    text = torch.randint(10, 250, (500,), generator=torch.Generator().manual_seed(0))
    # Longer than the teacher was made for, and than the text.
    probes = recall.make_length_probes(teacher, text, [300, 600], separator=END, num_sequences=3)
    assert [(p.length, p.depth) for p in probes if p.kind == "needle"] == [
        (length, depth) for length in (300, 600) for depth in recall.DEPTHS
    ]
    for probe in probes:
        assert probe.tokens.shape == (3, probe.length)
        share = recall.answers(teacher.model, probe).mean().item()
        if probe.kind == "needle":
            # From the question back to the word.
            cue = len(recall.FACT) + 1
            back = (1 - probe.depth) * (probe.length - 2 * cue) + cue
            assert share == float(back < reach), str(probe)
        elif reach == 330:
            assert share == float(probe.length == 300)
        else:
            assert share == float(reach > 330)


def test_length_probes_hold_what_they_ask_for_once():
    teacher = teacher_of(Memory(), tokenizer=Words())
    text = torch.randint(10, 250, (300,), generator=torch.Generator().manual_seed(0))
    # Half of the test split's words stand in the prose, of which each passage is all.
    words = recall._words(teacher, "test")
    text[: len(words) // 2] = torch.tensor(words[: len(words) // 2])
    for probe in recall.make_length_probes(teacher, text, [300], separator=END, num_sequences=4):
        for row, positions in zip(probe.tokens.tolist(), probe.positions.tolist(), strict=True):
            values = [row[position + 1] for position in positions]
            assert len(set(values)) == len(values) == (12 if probe.kind == "key-value" else 1)
            assert all(row.count(value) == 2 for value in values)
            assert set(values) <= set(words[len(words) // 2 :])
    again = recall.make_length_probes(teacher, text, [300], separator=END, num_sequences=4)
    more = recall.make_length_probes(teacher, text, [300, 500], separator=END, num_sequences=4)
    assert torch.equal(again[0].tokens, more[0].tokens)
    other = recall.make_length_probes(teacher, text, [300], separator=END, num_sequences=4, seed=1)
    assert not torch.equal(again[0].tokens, other[0].tokens)
