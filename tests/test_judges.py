"""The two members that train no policy: reward_model.py, which judges responses, and prm.py, which judges steps.

Their losses by hand, the model that gives their scores, the data they learn from, and runs that take what they save.
"""

import copy
import itertools
import json
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, make_sampler, read_jsonl, torchrun, without_times
from test_siblings import double
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import plumbing.steps as steps
import ppo
import rewards
import rloo
from batch import collate
from data import encode_prompts, load_task
from family import prm, process_grpo, reward_model
from family.prm import step_loss
from family.reward_model import pair_loss
from logprobs import batch_scores, load_scorer, load_value
from pairs import encode_ranked, judge_order, ranked_batch, read_ranked, sample_ranked
from plumbing.checkpoint import save_model
from plumbing.steps import encode_steps, judge_steps_of, read_steps, sample_steps, share_right, step_batch
from rewards import RewardModel, StepRewardModel, ids_and_ends, reward_ids, score_one, tokens_of
from verifiers import Unchecked, judge_steps, step_ends

CPU = torch.device("cpu")
TINY = str(ROOT / "tiny")
SMALL = {"model": TINY, "eval_prompts": 8, "pair_prompts": 32, "steps": 2, "pairs_per_step": 8, "lr": 3e-3}
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Reward models that a test names are forgotten after it."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))


def run(folder, script, **flags):
    """The metrics of a small run of one of the two scripts."""
    script.main(script.Config(out=str(folder), **SMALL | flags))
    return read_jsonl(folder / "metrics.jsonl")


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigma(z):
    return 1 / (1 + math.exp(-z))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def with_template(tokenizer, template=TEMPLATE):
    """A copy of the tokenizer that has a chat template; "" for none."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


# --- the loss of pairs ---


def test_the_loss_of_two_answers_by_hand():
    """Margins 1.5 and -2, sums 2.5 and 0."""
    scores = double(2, 0.5, -1, 1).view(2, 2)
    loss, _ = pair_loss(scores, 2, 0.0)
    assert loss.item() == pytest.approx((-math.log(sigma(1.5)) - math.log(sigma(-2))) / 2, abs=1e-12)
    centred, _ = pair_loss(scores, 2, 0.01)
    assert centred.item() == pytest.approx(loss.item() + 0.01 * (2.5**2 + 0) / 2, abs=1e-12)


def test_the_loss_of_four_answers_is_the_mean_over_six_pairs_by_hand():
    scores = double(3, 1, 2, 0)[None]  # 3-1, 3-2, 3-0, 1-2, 1-0, 2-0
    margins = [2, 1, 3, -1, 1, 2]
    sums = [4, 5, 3, 3, 1, 2]
    loss, _ = pair_loss(scores, 1, 0.0)
    assert loss.item() == pytest.approx(-sum(math.log(sigma(m)) for m in margins) / 6, abs=1e-12)
    centred, _ = pair_loss(scores, 1, 0.02)
    assert centred.item() == pytest.approx(loss.item() + 0.02 * sum(s**2 for s in sums) / 6, abs=1e-12)


def written_loss(scores, c):
    """-J of the docstring, word by word: for every question, all pairs i < j."""
    total = 0.0
    for R in scores:
        pairs_of_question = list(itertools.combinations(range(len(R)), 2))
        for i, j in pairs_of_question:
            preferred = 1 / (1 + torch.exp(-(R[i] - R[j])))
            total = total - (torch.log(preferred) - c * (R[i] + R[j]) ** 2) / len(pairs_of_question)
    return total / len(scores)


@pytest.mark.parametrize("c", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("K", [2, 3, 4, 6])
def test_loss_and_gradient_are_those_of_the_written_equation(K, c):
    scores = (2 * random(5, K)).requires_grad_()
    written = written_loss(scores, c)
    (expected,) = torch.autograd.grad(written, scores)
    loss, _ = pair_loss(scores, 5, c)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(written.item(), rel=1e-13)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)


def test_a_pair_is_weighed_by_how_probable_the_other_order_is():
    scores = double(2, 0.5, -1, 1).view(2, 2).requires_grad_()
    pair_loss(scores, 2, 0.0)[0].backward()
    expected = [-sigma(-1.5) / 2, sigma(-1.5) / 2, -sigma(2) / 2, sigma(2) / 2]
    assert scores.grad.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("K", [2, 4])
def test_a_number_added_to_all_answers_of_a_question_changes_nothing_without_the_centre(K):
    scores = random(5, K).requires_grad_()
    moved = (scores.detach() + 10 * random(5, 1, seed=1)).requires_grad_()
    losses = {}
    for c in (0.0, 0.01):
        losses[c] = [pair_loss(x, 5, c)[0] for x in (scores, moved)]
    assert losses[0.0][1].item() == pytest.approx(losses[0.0][0].item(), abs=1e-12)
    assert losses[0.01][1].item() > losses[0.01][0].item() + 0.1
    one, other = (torch.autograd.grad(loss, x)[0] for loss, x in zip(losses[0.0], (scores, moved), strict=True))
    assert torch.allclose(one, other, atol=1e-12)
    assert torch.allclose(one.sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12), "nothing moves the mean"


@pytest.mark.parametrize("c", [0.0, 0.1])
@pytest.mark.parametrize("K", [2, 3])
def test_losses_of_microbatches_of_pairs_add_up(K, c):
    scores = random(6, K)
    whole, _ = pair_loss(scores, 6, c)
    parts = [pair_loss(scores[rows], 6, c)[0] for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


def test_what_is_logged_of_pairs():
    """The pairs of 3, 1, 2 are 3-1, 3-2 and 1-2; those of three equal scores are ties, which are not right."""
    scores = double(3, 1, 2, 5, 5, 5).view(2, 3).requires_grad_()
    _, stats = pair_loss(scores, 2, 0.01)
    assert {x.shape for x in stats.values()} == {(6, 1)} and not any(x.requires_grad for x in stats.values())
    found = {name: x.flatten().tolist() for name, x in stats.items()}
    assert found == {
        "margin": [2, 1, -1, 0, 0, 0],
        "pair_accuracy": [1, 1, 0, 0, 0, 0],
        "reward_chosen": [3, 3, 1, 5, 5, 5],
        "reward_rejected": [1, 2, 2, 5, 5, 5],
    }


def test_where_three_of_four_labels_agree_the_margin_ends_at_log_3():
    for margin, sign in ((math.log(3), 0), (0.9, -1), (1.3, 1)):
        better = double(margin)[0].requires_grad_()
        worse = double(0)[0]
        right = torch.stack([better, worse])
        wrong = torch.stack([worse, better])
        pair_loss(torch.stack([right, right, right, wrong]), 4, 0.0)[0].backward()
        assert better.grad.item() == pytest.approx(0, abs=1e-12) if sign == 0 else sign * better.grad > 0


# --- the model that gives scores ---

PROMPTS = [[27, 19, 29, 37], [28, 37]]
RESPONSES = [[3, 31, 4, 1], [32], [5, 31, 6], [24, 25, 26, 27, 28, 1]]  # two to each prompt


@pytest.fixture(scope="module")
def scorer():
    """(scorer, tokenizer) of the tiny model, with a random head."""
    found, tokenizer = load_scorer(TINY, CPU)
    torch.nn.init.normal_(found.head.weight, generator=torch.Generator().manual_seed(0))
    return found, tokenizer


@pytest.fixture(scope="module")
def scorer_folder(scorer, tmp_path_factory):
    """That one, saved."""
    folder = tmp_path_factory.mktemp("scorer")
    save_model(folder, *scorer)
    return str(folder / "model")


def batch_of(prompts, responses, tokenizer):
    logps = [[0.0] * len(response) for response in responses]
    return collate(prompts, responses, logps, ["stop"] * len(responses), tokenizer, "cpu")


def texts_of(prompts, responses):
    group_size = len(responses) // len(prompts)
    return [prompts[i // group_size] + response for i, response in enumerate(responses)]


def alone(scorer, ids, place=-1):
    """The head on the state of one token of one text, computed without padding."""
    states = scorer.model.base_model(torch.tensor([ids])).last_hidden_state[0]  # [L, H]
    return scorer.head(states[place])[0]


def test_the_score_is_the_head_on_the_state_of_the_last_token_row_by_row(scorer):
    scorer, tokenizer = scorer
    batch = batch_of(PROMPTS, RESPONSES, tokenizer)
    scores = scorer(batch)
    each = scorer(batch, each=True)
    assert scores.shape == (4,) and each.shape == (4, 6) and each.dtype == torch.float32
    assert scorer.body.packs, "without computing on padding"
    for i, ids in enumerate(texts_of(PROMPTS, RESPONSES)):
        response = RESPONSES[i]
        for t in range(len(response)):
            expected = alone(scorer, ids, len(ids) - len(response) + t)
            assert each[i, t].item() == pytest.approx(expected.item(), abs=1e-4)
        assert scores[i] == each[i, len(response) - 1]
        assert not each[i, len(response) :].any()
    assert len({round(x, 2) for x in scores.tolist()}) == 4
    for budget in (1, 20, 10**6):
        whole = batch_scores(scorer, batch, budget)
        assert torch.allclose(whole, scores, atol=1e-5) and not whole.requires_grad
        assert torch.allclose(batch_scores(scorer, batch, budget, each=True), each, atol=1e-5)


def test_the_gradient_of_scores_is_that_of_the_rows_alone(scorer):
    scorer, tokenizer = scorer
    texts = texts_of(PROMPTS, RESPONSES)
    weights = [1.0, -2.0, 0.5, 3.0]
    scorer.zero_grad()
    sum(w * alone(scorer, ids) for w, ids in zip(weights, texts, strict=True)).backward()
    expected = {name: p.grad.clone() for name, p in scorer.named_parameters()}
    scorer.zero_grad()
    (scorer(batch_of(PROMPTS, RESPONSES, tokenizer)) * torch.tensor(weights)).sum().backward()
    for name, p in scorer.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-3, atol=1e-3), name
    assert all(expected[name].any() for name in expected)
    assert {id(p) for p in scorer.trained()} == {id(p) for p in scorer.model.parameters()}, "all weights learn"
    scorer.zero_grad()


def padded(texts, side, pad):
    """Token ids and attention mask, padded on one side."""
    width = max(map(len, texts))
    ids, mask = [], []
    for text in texts:
        padding = [pad] * (width - len(text))
        ids.append(padding + text if side == "left" else text + padding)
        mask.append([int(x) for x in ([0] * len(padding) + [1] * len(text))])
        if side == "right":
            mask[-1].reverse()
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_the_score_is_what_transformers_says_of_the_saved_model(scorer, scorer_folder):
    """On one text at a time, and on batches padded on either side."""
    scorer, tokenizer = scorer
    expected = scorer(batch_of(PROMPTS, RESPONSES, tokenizer)).tolist()
    texts = texts_of(PROMPTS, RESPONSES)
    theirs = AutoModelForSequenceClassification.from_pretrained(scorer_folder).eval()
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        one_by_one = [theirs(torch.tensor([ids])).logits.item() for ids in texts]
        right = theirs(**padded(texts, "right", tokenizer.pad_token_id)).logits.flatten().tolist()
        left = theirs(**padded(texts, "left", tokenizer.pad_token_id)).logits.flatten().tolist()
    assert one_by_one == pytest.approx(expected, abs=1e-4)
    assert right == pytest.approx(expected, abs=1e-4)
    assert left == pytest.approx(expected, abs=1e-4)


def test_a_last_token_that_is_the_padding_token_counts(scorer, scorer_folder):
    """Found by the length; Transformers looks for the last token that is no padding, and reads the one before."""
    scorer, tokenizer = scorer
    pad = tokenizer.pad_token_id
    responses = [[31, pad], [31], [31, pad, pad], [32, 33, 24, 25]]
    texts = texts_of(PROMPTS, responses)
    scores = scorer(batch_of(PROMPTS, responses, tokenizer)).tolist()
    assert scores == pytest.approx([alone(scorer, ids).item() for ids in texts], abs=1e-4)
    assert len({round(x, 3) for x in scores}) == 4
    theirs = AutoModelForSequenceClassification.from_pretrained(scorer_folder).eval()
    with torch.no_grad():
        other = theirs(torch.tensor([texts[0]])).logits.item()
    assert other == pytest.approx(scores[1], abs=1e-4) and abs(other - scores[0]) > 1e-2


def test_a_language_model_gets_a_head_of_zeros(tiny):
    scorer, tokenizer = load_scorer(TINY, CPU)
    assert not scorer.head.weight.any() and scorer.head.bias is None
    batch = batch_of(PROMPTS, RESPONSES, tokenizer)
    assert not scorer(batch).any() and not scorer.training
    body = tiny[0].model.base_model.state_dict()
    assert body.keys() == scorer.body.state_dict().keys()
    assert all(torch.equal(x, body[name]) for name, x in scorer.body.state_dict().items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in scorer.parameters())
    (scorer(batch) * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
    assert scorer.head.weight.grad.abs().sum() > 0, "and learns"


def test_a_saved_reward_model_begins_with_the_same_scores(scorer, scorer_folder):
    scorer, tokenizer = scorer
    again, its_tokenizer = load_scorer(scorer_folder, CPU)
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert all(torch.equal(x, dict(again.weights())[name]) for name, x in scorer.weights())
    batch = batch_of(PROMPTS, RESPONSES, tokenizer)
    assert torch.allclose(again(batch, each=True), scorer(batch, each=True), atol=1e-4) and scorer(batch).any()


def small_model(name, family, num_labels=1):
    """A small classifier with random weights, which reads the tiny model's tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(family, vocab_size=103, pad_token_id=0, num_labels=num_labels, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize(
    ("name", "family", "num_labels", "words"),
    [
        ("BertForSequenceClassification", "bert", 1, "is a causal model with a linear head on its last state"),
        (
            "ModernBertDecoderForSequenceClassification",
            "modernbert-decoder",
            1,
            "is a causal model with a linear head on its last state",
        ),
        ("LlamaForSequenceClassification", "llama", 3, "cannot be loaded as a reward model"),
    ],
)
def test_what_cannot_be_trained_to_judge_is_one_clear_line(tmp_path, tiny, capsys, name, family, num_labels, words):
    small_model(name, family, num_labels).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=words) as error:
        load_scorer(str(tmp_path), CPU)
    assert error.value.code == 2 and str(error.value).startswith(f"--model {tmp_path}")
    assert capsys.readouterr().err == f"{error.value}\n" and "\n" not in str(error.value)


def test_a_head_with_a_bias_under_another_name_is_trained_and_saved_too(tmp_path, tiny):
    """Of GPT-NeoX the token classifier's head is called classifier, and has a bias; the other one's is called score."""
    small_model("GPTNeoXForSequenceClassification", "gpt_neox").save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    scorer, tokenizer = load_scorer(str(tmp_path), CPU)
    batch = batch_of(PROMPTS, RESPONSES, tokenizer)
    expected = [alone(scorer, ids).item() for ids in texts_of(PROMPTS, RESPONSES)]
    assert scorer(batch).tolist() == pytest.approx(expected, abs=1e-3) and len(set(expected)) == 4
    save_model(tmp_path / "again", scorer, tokenizer)
    again, _ = load_scorer(str(tmp_path / "again" / "model"), CPU)
    assert torch.allclose(again(batch), scorer(batch), atol=1e-4)


# --- ranked answers that are read ---

LIMITS = SimpleNamespace(max_prompt_tokens=512, max_new_tokens=64, eval_prompts=128, data=("a file",))


def ranked(question, *answers, **more):
    return {"prompt": question, "question": question, "system": "", "ranked": list(answers)} | more


def test_ranked_rows_and_pairs_may_stand_in_one_file(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    rows += [{"prompt": f"q{i}", "ranked": [f"best {i}", f"worst {i}"]} for i in range(10)]
    train, held_out = read_ranked((write(tmp_path / "a.jsonl", rows),))
    assert len(train) == 18 and len(held_out) == 2
    found = {question["question"]: question["ranked"] for question in train + held_out}
    for i in range(10):
        assert found[f"p{i}"] == [f"good {i}", f"bad {i}"] and found[f"q{i}"] == [f"best {i}", f"worst {i}"]


def test_a_second_source_of_ranked_answers_is_held_out(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "ranked": ["a", "b", "c"]} for i in range(3)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"p{i}", "ranked": ["c", "b", "a"]} for i in range(2, 4)])
    train, held_out = read_ranked((a, b))
    assert [question["question"] for question in train] == ["p0", "p1"]
    assert [question["ranked"] for question in held_out] == [["c", "b", "a"]] * 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "ranked": "ab"}, '"ranked" must be a list of two answers or more, the best one first'),
        ({"prompt": "p", "ranked": []}, '"ranked" must be a list of two answers or more'),
        ({"prompt": "p", "ranked": ["a"]}, '"ranked" must be a list of two answers or more'),
        ({"prompt": "p", "ranked": ["a", ""]}, "each of them text"),
        ({"prompt": "p", "ranked": ["a", 7]}, "each of them text"),
        ({"prompt": "p", "ranked": None}, '"ranked" must be a list'),
        ({"ranked": ["a", "b"]}, 'no "prompt"'),
        ({"prompt": "p", "ranked": ["a", "b"], "system": 7}, '"system" must be text'),
        ({"prompt": "p", "chosen": "a"}, 'no "rejected"'),
    ],
)
def test_bad_ranked_answers_are_one_clear_line(tmp_path, row, words):
    good = {"prompt": "q", "ranked": ["a", "b"]}
    with pytest.raises(SystemExit, match=words) as error:
        read_ranked((write(tmp_path / "a.jsonl", [good, row]),))
    assert error.value.code == 2 and "a.jsonl:2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["", TEMPLATE])
def test_the_tokens_are_those_that_a_reward_model_reads(tmp_path, scorer_folder, template):
    model = RewardModel(scorer_folder)
    model.tokenizer.chat_template = template
    read = []  # the token ids of each text that the model reads
    model.model.base_model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0][0].tolist()))
    questions = [ranked("3+4=", "<think>3+4=7</think>7", "8", "?"), ranked("why", "so", "that is so", "7")]
    train, _ = encode_ranked(questions, [], LIMITS, model.tokenizer)
    for question in train:
        for text, ids in zip(question["ranked"], question["ranked_ids"], strict=True):
            model(text, question)
            assert question["prompt_ids"] + ids == read[-1] == reward_ids(model.tokenizer, question["question"], text)
    assert len(read) == 6 and ("[user]" in model.tokenizer.decode(read[0])) == bool(template)


@pytest.mark.parametrize("template", ["", TEMPLATE])
def test_rows_of_a_batch_of_ranked_answers_are_scored_as_the_texts_are(scorer, scorer_folder, template):
    """From data to score: the batch that a run learns from gives what --rewards gives for these texts."""
    scorer, tokenizer = scorer
    tokenizer = with_template(tokenizer, template)
    questions = [ranked("3+4=", "<think>3+4=7</think>7", "7", "77"), ranked("1+1=", "2", "<pad>", "<answer>2</answer>")]
    train, _ = encode_ranked(questions, [], LIMITS, tokenizer)
    scores = scorer(ranked_batch(train, tokenizer, CPU)).tolist()
    model = RewardModel(scorer_folder)
    model.tokenizer.chat_template = template
    texts = [answer for question in questions for answer in question["ranked"]]
    examples = [question for question in questions for _ in range(3)]
    assert scores == pytest.approx(model.scores(texts, examples), abs=1e-4)
    assert len({round(x, 3) for x in scores}) == 6


def test_an_answer_may_be_the_beginning_of_another(tiny):
    """All of them have a token of their own, or there would be nothing to score."""
    tokenizer = tiny[1]
    (question,), _ = encode_ranked([ranked("1+1=", "2", "22", "222")], [], LIMITS, tokenizer)
    assert question["prompt_ids"] == tokenizer.encode("1+1=")
    assert question["ranked_ids"] == [tokenizer.encode(x) for x in ("2", "22", "222")]
    (question,), _ = encode_ranked([ranked("1+1=", "2", "")], [], LIMITS, tokenizer)
    assert question["prompt_ids"] + question["ranked_ids"][0] == tokenizer.encode("1+1=2")
    assert question["prompt_ids"] + question["ranked_ids"][1] == tokenizer.encode("1+1=")


def test_what_is_equal_after_the_limit_is_left_out_and_counted(tiny, capsys):
    """Prompt and answer have 4 + 4 tokens together."""
    limits = SimpleNamespace(max_prompt_tokens=4, max_new_tokens=4, eval_prompts=3, data=("a file",))
    differ = ranked("1+1=", "2abc", "2abd")
    later = ranked("1+1=", "2abcd", "2abce")  # they differ in the fifth token
    equal = ranked("1+1=", "2", "2")
    held_out = [differ, later, ranked("1+1=12345", "2", "3"), differ]
    train, test = encode_ranked([later, differ, equal, later], held_out, limits, tiny[1])
    assert [question["ranked"] for question in train] == [["2abc", "2abd"]]
    assert [question["ranked"] for question in test] == [["2abc", "2abd"]], "of the first three"
    assert capsys.readouterr().out.splitlines() == [
        "data: 3 training questions have answers that are equal after 8 tokens and were left out",
        "data: 2 held-out questions have answers that are equal after 8 tokens and were left out",
    ]
    encode_ranked([differ], [differ], limits, tiny[1])
    assert capsys.readouterr().out == "", "nothing is said where nothing is lost"


def test_two_equal_answers_of_three_are_too_many(tiny, capsys):
    train, _ = encode_ranked([ranked("1+1=", "2", "3", "2")], [], LIMITS, tiny[1])
    assert train == [] and "1 training questions" in capsys.readouterr().out


def test_questions_with_other_numbers_of_answers_are_one_clear_line(tiny, capsys):
    with pytest.raises(SystemExit, match="questions have 2 to 3 ranked answers; give all of them as many") as error:
        encode_ranked([ranked("1+1=", "2", "3")], [ranked("1+2=", "3", "4", "5")], LIMITS, tiny[1])
    assert error.value.code == 2 and capsys.readouterr().err == f"{error.value}\n"


# --- ranked answers of the model itself ---

GOLD = {"accuracy": 1.0, "format": 0.5}


class Remembering:
    """A sampler that does not write the same responses twice."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.known = {}
        self.seeds = []

    def generate(self, prompts, n, temperature, seed):
        self.seeds.append(seed)
        key = json.dumps([prompts, n, temperature, seed])
        if key not in self.known:
            self.known[key] = self.sampler.generate(prompts, n, temperature, seed)
        return self.known[key]


@pytest.fixture(scope="module")
def questions(tiny):
    return encode_prompts(load_task("arithmetic").train[:200], tiny[1], "plain", 64)


@pytest.fixture(scope="module")
def remembering(tiny):
    return Remembering(make_sampler(*tiny))


def sampled(sampler, questions, flip=0.0, seed=0, group_size=4):
    config = SimpleNamespace(group_size=group_size, temperature=1.0, flip=flip)
    return sample_ranked(config, sampler, questions, GOLD, seed)


def gold_of(text, example):
    return sum(weight * score_one(name, text, example) for name, weight in GOLD.items())


def test_the_models_own_answers_stand_in_the_order_of_the_gold_reward(remembering, questions):
    """They are the first response and the first with another reward; questions without such a one are left out."""
    found = {pair["question"]: pair for pair in sampled(remembering, questions)}
    kept = 0
    for first in range(0, 200, 64):
        part = questions[first : first + 64]
        batch = remembering.generate([question["prompt_ids"] for question in part], 4, 1.0, first)
        for i, example in enumerate(part):
            group = batch.texts[4 * i : 4 * i + 4]
            gold = [gold_of(text, example) for text in group]
            if len(set(gold)) == 1:
                assert example["question"] not in found
                continue
            kept += 1
            other = next(j for j in range(4) if gold[j] != gold[0])
            best, worst = (0, other) if gold[0] > gold[other] else (other, 0)
            pair = found[example["question"]]
            assert pair["ranked"] == [group[best], group[worst]]
            assert pair["gold"] == pytest.approx([gold[best], gold[worst]]) and pair["gold"][0] > pair["gold"][1]
            assert pair["prompt"] == example["question"] and pair["system"] == ""
    assert kept == len(found) > 100
    assert {x for pair in found.values() for x in pair["gold"]} > {0.0, 1.5}


def test_one_in_four_labels_is_flipped_and_nothing_else_changes(remembering, questions):
    plain = sampled(remembering, questions)
    flipped = sampled(remembering, questions, flip=0.25)
    assert len(plain) == len(flipped) > 100
    wrong = 0
    for before, after in zip(plain, flipped, strict=True):
        if after != before:
            wrong += 1
            assert after["ranked"] == before["ranked"][::-1] and after["gold"] == before["gold"][::-1]
            assert after["gold"][0] < after["gold"][1], "the rewards stay with their answers"
            assert after | before == before
    share = wrong / len(plain)
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(plain))
    assert sampled(remembering, questions, flip=0.25) == flipped, "the same ones every time"


def flips(found):
    """Question -> whether its pair stands the wrong way round."""
    return {pair["question"]: pair["gold"][0] < pair["gold"][1] for pair in found}


def test_which_labels_are_flipped_depends_on_question_and_seed_alone(tiny, remembering, questions):
    whole = flips(sampled(remembering, questions, flip=0.25))
    part = flips(sampled(remembering, questions[150:][::-1], flip=0.25))  # other responses, in another order
    both = whole.keys() & part.keys()
    assert len(both) > 20 and all(whole[question] == part[question] for question in both)
    more = flips(sampled(remembering, questions, flip=0.4))
    assert all(more[question] for question in whole if whole[question]) and sum(more.values()) > sum(whole.values())
    other = flips(sampled(remembering, questions, flip=0.25, seed=10**6))
    both = whole.keys() & other.keys()
    assert any(whole[question] != other[question] for question in both)
    fresh = sampled(make_sampler(*tiny), questions[:64], flip=0.25)
    assert fresh == sampled(remembering, questions[:64], flip=0.25), "sampled anew they are the same"


# --- how sure it is of an order ---


def assert_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


def test_calibration_of_an_order_by_hand(tmp_path):
    """Margins 2, -1 and .4: confidences of .88, .73 and .60, which lie in bins of their own; the second is wrong."""
    scores = double(2, 0, 0, 1, 0.5, 0.1).view(3, 2)
    gold = [{"gold": [1.0, 0.0]}, {"gold": [0.0, 1.0]}, {"gold": [0.0, 0.5]}]
    metrics = judge_order(scores, gold, tmp_path / "calibration.png")
    expected = (1 - sigma(2) + sigma(1) + 1 - sigma(0.4)) / 3
    assert metrics["eval_calibration"] == pytest.approx(expected, abs=1e-9)
    assert metrics["eval_gold_accuracy"] == pytest.approx(2 / 3), "the second, whose label is wrong, and the first"
    assert metrics.keys() == {"eval_calibration", "eval_gold_accuracy"}
    assert_picture(tmp_path / "calibration.png")


def test_calibration_counts_all_pairs_of_ranked_answers(tmp_path):
    """Margins 1.0, 1.1, .1: two of one bin, .731 and .750, and one of .525, all of them right."""
    metrics = judge_order(double(1.1, 0.1, 0)[None], [{}], tmp_path / "calibration.png")
    expected = ((2 - sigma(1.0) - sigma(1.1)) + 1 - sigma(0.1)) / 3
    assert metrics == {"eval_calibration": pytest.approx(expected, abs=1e-9)}
    wrong = judge_order(double(0, 0.1, 1.1)[None], [{}], tmp_path / "calibration.png")
    assert wrong["eval_calibration"] == pytest.approx((sigma(1.0) + sigma(1.1) + sigma(0.1)) / 3, abs=1e-9)


def test_the_bins_of_an_order_are_a_twentieth_wide(tmp_path):
    """Confidences of .525, right, and .574, wrong: from .5 to .55, and from .55 to .6."""
    metrics = judge_order(double(0.1, 0, 0, 0.3).view(2, 2), [{}] * 2, tmp_path / "calibration.png")
    assert metrics["eval_calibration"] == pytest.approx((1 - sigma(0.1) + sigma(0.3)) / 2, abs=1e-9)


@pytest.mark.parametrize("gold", [[1.0, 0.0], [0.0, 1.0]])
def test_a_tie_is_no_order(tmp_path, gold):
    """Before the first update all scores are 0."""
    metrics = judge_order(double(0, 0)[None], [{"gold": gold}], tmp_path / "calibration.png")
    assert metrics["eval_gold_accuracy"] == 0


# --- a reward model from end to end ---


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    records = run(folder, reward_model, flip=0.25)
    return folder, records


def made(folder):
    """(train, held_out) of a run."""
    return json.loads((folder / "pairs.json").read_text())


def test_a_run_writes_what_it_found(reward_run):
    folder, records = reward_run
    assert [record["step"] for record in records] == [0, 1, 2]
    first, step, last = records
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) == step["loss"], "a head of zeros knows nothing"
    assert first["eval_margin"] == first["eval_pair_accuracy"] == 0
    assert first["eval_calibration"] == pytest.approx(0.5), "as sure as a coin, of ties"
    assert step["tokens"] > 0 and step["grad_norm"] > 0 and step["lr"] == 3e-3
    assert last["loss"] != step["loss"] and last["eval_loss"] != first["eval_loss"]
    train, held_out = made(folder)
    assert 16 < len(train) <= 32 and 4 <= len(held_out) <= 8
    task = load_task("arithmetic")
    assert {pair["question"] for pair in train} <= {example["question"] for example in task.train}
    assert {pair["question"] for pair in held_out} <= {example["question"] for example in task.test[:8]}
    assert any(flips(train).values()) and not all(flips(train).values())
    assert_picture(folder / "calibration.png"), assert_picture(folder / "curves.png")


def test_held_out_metrics_of_pairs_are_those_of_the_saved_model(reward_run):
    """As --rewards would score them."""
    folder, records = reward_run
    model = RewardModel(str(folder / "model"))
    _, held_out = made(folder)
    scores = torch.tensor([model.scores(pair["ranked"], [pair] * 2) for pair in held_out]).double()  # [N, 2]
    margin = scores[:, 0] - scores[:, 1]
    loss = -torch.log(torch.sigmoid(margin)) + 0.01 * scores.sum(1).square()
    gold = torch.tensor([pair["gold"] for pair in held_out])
    last = records[-1]
    assert last["eval_loss"] == pytest.approx(loss.mean().item(), abs=1e-5)
    assert last["eval_margin"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert last["eval_pair_accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert last["eval_reward_chosen"] == pytest.approx(scores[:, 0].mean().item(), abs=1e-5)
    assert last["eval_reward_rejected"] == pytest.approx(scores[:, 1].mean().item(), abs=1e-5)
    same_order = (margin > 0) == (gold[:, 0] > gold[:, 1])
    assert last["eval_gold_accuracy"] == pytest.approx(same_order.double().mean().item())
    confidence = margin.abs().sigmoid().tolist()
    error = rewards.calibration_error(confidence, (margin > 0).double().tolist(), low=0.5)
    assert last["eval_calibration"] == pytest.approx(error, abs=1e-5)
    assert margin.abs().min() > 1e-4, "no tie"


RL = {"model": TINY, "prompts_per_step": 2, "group_size": 4, "eval_prompts": 8, "eval_samples": 1, "steps": 1}


def scores_of_samples(folder, path):
    """(logged, found): the rewards in samples.jsonl, and what the saved model says of these texts, by Scorer."""
    scorer, tokenizer = load_scorer(path, CPU)
    samples = read_jsonl(folder / "samples.jsonl")
    assert len(samples) == 8
    texts = [reward_ids(tokenizer, line["question"], line["completion"]) for line in samples]
    batch = batch_of([ids[:1] for ids in texts], [ids[1:] for ids in texts], tokenizer)
    return [line[f"reward/{path}"] for line in samples], scorer(batch).tolist()


@pytest.mark.parametrize("script", [rloo, ppo])
def test_what_it_saves_is_a_reward(tmp_path, reward_run, script):
    path = str(reward_run[0] / "model")
    specs = (f"{path}=1", "accuracy=0", "format=0")
    script.main(script.Config(out=str(tmp_path / "run"), rewards=specs, **RL))
    record = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
    logged, found = scores_of_samples(tmp_path / "run", path)
    assert logged == pytest.approx(found, abs=1e-5) and max(found) - min(found) > 1e-3
    assert record["reward"] == pytest.approx(sum(found) / 8, abs=1e-5)
    assert record[f"reward/{path}"] == pytest.approx(record["reward"], abs=1e-6)
    assert record["grad_norm"] > 0


def test_what_it_saves_is_the_beginning_of_a_value_network(tmp_path, reward_run, monkeypatch):
    """At the end token V is what the reward model says of question and response."""
    path = str(reward_run[0] / "model")
    folder = tmp_path / "run"
    ppo.main(ppo.Config(out=str(folder), rewards=(f"{path}=1", "accuracy=0", "format=0"), value_model=path, **RL))
    model = RewardModel(path)
    first = [line for line in read_jsonl(folder / "held_out.jsonl") if line["step"] == 0]
    ended = [line for line in first if line["finish_reason"] == "stop"]
    assert len(ended) > 3
    (name,) = [name for name in first[0] if name.startswith("value")]
    V = [line[name][-1] for line in ended]
    expected = model.scores([line["response"] for line in ended], ended)
    assert V == pytest.approx(expected, abs=1e-5) and max(V) - min(V) > 1e-3
    value = load_value(path, CPU, model.tokenizer)
    scorer, tokenizer = load_scorer(path, CPU)
    batch = batch_of(PROMPTS, RESPONSES, tokenizer)
    each = scorer(batch, each=True)
    for i, length in enumerate(batch.lengths.tolist()):
        assert torch.allclose(value(batch)[i, 1:length], each[i, : length - 1], atol=1e-5), "V before is R after"


def answers_in_order(path, K=3):
    """A file of 20 questions with K answers each, the larger the better; K = 2: as pairs."""
    rows = []
    for i in range(20):
        best = [f"{i + j}" for j in reversed(range(K))]
        rows.append({"prompt": f"{i}+1=", "ranked": best})
    return write(path, rows)


def continued(folder, tmp_path, monkeypatch, script, **flags):
    """A run of two steps goes on to a third one, in a copy; it samples nothing again. (folder, metrics)"""
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    for name in ("sample_ranked", "sample_steps"):
        monkeypatch.setattr(script, name, None, raising=False)
    return part, run(part, script, steps=3, resume=str(part), **flags)


def the_same_to_the_bit(one, other):
    """Two folders of runs with equal metrics and weights."""
    records = without_times(read_jsonl(one / "metrics.jsonl"))
    assert records == without_times(read_jsonl(other / "metrics.jsonl"))
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    weights, others = saved(one)["policy"], saved(other)["policy"]
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_resumed_reward_model_is_the_same_to_the_bit(tmp_path, reward_run, monkeypatch):
    run(tmp_path / "whole", reward_model, steps=3, eval_every=2, flip=0.25)
    part, _ = continued(reward_run[0], tmp_path, monkeypatch, reward_model, eval_every=2, flip=0.25)
    the_same_to_the_bit(tmp_path / "whole", part)
    assert made(part) == made(tmp_path / "whole")


@pytest.mark.slow
def test_a_resumed_reward_model_of_ranked_answers_is_the_same_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.delitem(SMALL, "pair_prompts")
    data = (answers_in_order(tmp_path / "a.jsonl"),)
    run(tmp_path / "whole", reward_model, steps=3, eval_every=2, data=data)
    run(tmp_path / "two", reward_model, steps=2, eval_every=2, data=data)
    part, _ = continued(tmp_path / "two", tmp_path, monkeypatch, reward_model, eval_every=2, data=data)
    the_same_to_the_bit(tmp_path / "whole", part)


def alike(records, others):
    """Metrics that differ by rounding only."""
    for one, other in zip(without_times(records), without_times(others), strict=True):
        assert one.keys() == other.keys()
        for metric in one:
            assert one[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-4), metric


def test_any_microbatch_size_gives_the_same_reward_model(tmp_path, reward_run):
    alike(reward_run[1], run(tmp_path / "run", reward_model, flip=0.25, tokens_per_microbatch=1))


def test_all_answers_of_a_question_are_in_one_microbatch(tmp_path, monkeypatch):
    """Of the update, whose number of questions divides the loss; and the flag --centre is in each."""
    monkeypatch.delitem(SMALL, "pair_prompts")
    data = (answers_in_order(tmp_path / "a.jsonl", K=4),)
    seen = Counter()
    loss = reward_model.pair_loss

    def watched(scores, num_questions, centre):
        seen[(*scores.shape, num_questions, centre)] += 1
        return loss(scores, num_questions, centre)

    monkeypatch.setattr(reward_model, "pair_loss", watched)
    flags = {"tokens_per_microbatch": 1, "pairs_per_step": 3, "centre": 0.2}
    records = run(tmp_path / "run", reward_model, data=data, **flags)
    assert seen == {(1, 4, 3, 0.2): 2 * 3, (2, 4, 2, 0.2): 2}, "two updates; before and after, the two held out"
    assert records[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[1]["tokens"] <= 3 * 4 * 3, "what the answers share is read as their prompt"


def refused(tmp_path, capsys, script, flags, words):
    """The run ends with these words in one line, and leaves nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match=words) as error:
        script.main(script.Config(out=str(tmp_path / "run"), **flags))
    assert error.value.code == 2 and capsys.readouterr().err == f"{error.value}\n"
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_rank": 8}, "--lora-rank is not for reward models, whose weights are all trained here"),
        ({"shard": True}, "--shard is not for reward models"),
        ({"flip": 0.6}, "--flip 0.6: below 0.5, or the labels mean their opposite"),
        ({"flip": 0.5}, "--flip 0.5: below 0.5"),
        ({"flip": math.nan}, "--flip nan: below 0.5"),
        ({"data": ("a.jsonl",), "gold": ("accuracy=1",)}, "--gold is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "flip": 0.1}, "--flip is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "task": "countdown"}, "--task is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "pair_prompts": 16}, "--pair-prompts is for pairs of the model's own responses"),
        ({"data": ("a.jsonl",), "group_size": 4}, "--group-size is for pairs of the model's own responses"),
    ],
)
def test_a_flag_that_a_reward_model_cannot_mean_is_one_clear_line(tmp_path, capsys, flags, words):
    refused(tmp_path, capsys, reward_model, flags, words)


def test_a_gold_reward_that_there_is_not_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="unknown reward 'accurracy'"):
        run(tmp_path / "run", reward_model, gold=("accurracy=1",))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_no_pairs_to_learn_from_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="0 pairs to learn from, 0 held out: each takes two responses") as error:
        run(tmp_path / "run", reward_model, max_new_tokens=2)  # too short for any answer
    assert "\n" not in str(error.value)


# --- the loss of steps ---

ENDS = torch.tensor([[True, False, True], [False, True, False]])
LABELS = double(1, 0, 0, 0, 0.25, 0).view(2, 3)


def test_the_loss_of_steps_by_hand():
    scores = double(1, 9, -2, 9, 0.5, 9).view(2, 3)
    expected = -(math.log(sigma(1)) + math.log(1 - sigma(-2)))
    expected -= 0.25 * math.log(sigma(0.5)) + 0.75 * math.log(1 - sigma(0.5))
    loss, stats = step_loss(scores, LABELS, ENDS, 3)
    assert loss.item() == pytest.approx(expected / 3, abs=1e-12)
    assert stats["step_accuracy"].tolist() == [[1], [1], [0]] and stats["label"].tolist() == [[1], [0], [0.25]]


def test_the_loss_of_steps_is_the_binary_cross_entropy_of_their_ends():
    scores = random(4, 6).requires_grad_()
    ends = random(4, 6, seed=1) > 0
    labels = random(4, 6, seed=2).sigmoid()
    loss, _ = step_loss(scores, labels, ends, ends.sum())
    expected = binary_cross_entropy_with_logits(scores[ends], labels[ends])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    by_hand = (scores.detach().sigmoid() - labels) * ends / ends.sum()
    assert torch.allclose(scores.grad, by_hand, atol=1e-14)


def test_a_step_is_called_right_above_0_and_its_label_is_right_from_a_half_on():
    scores = double(1, 1, 1, -1, -1, 0, 0)[None]
    labels = double(0.5, 0.75, 0.49, 0.49, 0.5, 1, 0)[None]
    _, stats = step_loss(scores, labels, torch.ones(1, 7, dtype=torch.bool), 7)
    assert stats["step_accuracy"].flatten().tolist() == [1, 1, 0, 1, 0, 0, 1]


def test_off_the_ends_of_steps_nothing_counts():
    scores = random(2, 3)
    clean, stats = step_loss(scores, LABELS, ENDS, 3)
    dirty = scores.masked_fill(~ENDS, 1e9).requires_grad_()
    loss, again = step_loss(dirty, LABELS.masked_fill(~ENDS, 0.7), ENDS, 3)
    loss.backward()
    assert loss.item() == clean.item() and torch.equal(dirty.grad != 0, ENDS)
    assert all(torch.equal(stats[name], again[name]) for name in stats)


def test_losses_of_microbatches_of_steps_add_up():
    scores = random(5, 6)
    ends = random(5, 6, seed=1) > 0
    labels = (random(5, 6, seed=2) > 0).double()
    whole, _ = step_loss(scores, labels, ends, ends.sum())
    parts = [step_loss(scores[x], labels[x], ends[x], ends.sum())[0] for x in (slice(0, 1), slice(1, 3), slice(3, 5))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


def test_the_best_probability_of_a_step_is_its_label():
    for label, score, sign in ((0.25, -math.log(3), 0), (0.25, 0.0, 1), (0.75, 0.0, -1)):
        s = double(score)[None].requires_grad_()
        step_loss(s, double(label)[None], torch.ones(1, 1, dtype=torch.bool), 1)[0].backward()
        assert s.grad.item() == pytest.approx(0, abs=1e-12) if sign == 0 else sign * s.grad > 0


# --- where steps end ---


@pytest.mark.parametrize(
    ("rule", "parts", "rest"),  # each step with all that belongs to it; then what follows
    [
        ("comma", ["<think>3+5=8,", "8+9=17</think>"], "<answer>17</answer>"),
        ("comma", ["<think>3+5=8,", "8+9=17,"], "</think>17"),
        ("comma", ["a,", ",", "b\nc</think>"], "1,2"),
        ("comma", ["a,"], "b"),
        ("comma", [], "</think>17"),
        ("comma", [], ""),
        ("line", ["<think>first\n", "then\n\n", "so</think>"], "\n17\n"),
        ("line", ["first\n", "then, well\n"], "so"),
        ("line", ["first\n"], "</think>17"),
        ("line", ["one line, with a comma</think>"], "17"),
        ("line", [], "one line"),
        ("line", ["line\n"], ""),
        ("line", [], ""),
    ],
)
def test_steps_end_by_the_rule(rule, parts, rest):
    ends = [len("".join(parts[: i + 1])) for i in range(len(parts))]
    assert step_ends("".join(parts) + rest, rule) == ends


def test_only_sums_have_steps_that_end_at_commas():
    assert rewards.rule_of({"question": "3+5+9="}) == "comma"
    assert rewards.rule_of({"question": "What is 3+5?"}) == "line"


def tokenizer_of(*pieces, first="", last=""):
    """A tokenizer whose tokens are these pieces of text; with special tokens before and after every text, if named."""
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", "<eos>", "<bos>", *pieces]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, pieces))), "isolated")
    if first or last:
        single = " ".join(filter(None, [first, "$A", last]))
        special = [(token, vocabulary[token]) for token in (first, last) if token]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def pieces_of(tokenizer, ids):
    return [tokenizer.convert_ids_to_tokens(token) for token in ids]


RESPONSE = "<think>3+5=8,8+9=17</think><answer>17</answer>"
AT = [13, 27, 46]  # after the comma, after </think>, at the very end


@pytest.mark.parametrize(
    ("pieces", "before", "tokens"),
    [
        # every step ends with a token
        (["3+5+9=", "<think>3+5=8,", "8+9=17</think>", "<answer>17</answer>"], 1, [1, 2, 3]),
        # in the middle of one, which is the beginning of the next step too
        (["3+5+9=", "<think>3+5=", "8,8", "+9=1", "7</think><ans", "wer>17</answer>"], 1, [2, 4, 5]),
        # a token that has the end of the question and the beginning of the response belongs to the response
        (["3+5+9", "=<think>3+5=8", ",", "8+9=17</", "think>", "<answer>17</answer>"], 1, [2, 4, 5]),
        # the whole response in one token
        (["3+", "5+9=", RESPONSE], 2, [2, 2, 2]),
    ],
)
def test_steps_are_carried_to_the_tokens_that_have_their_last_characters(pieces, before, tokens):
    tokenizer = tokenizer_of(*pieces)
    assert [RESPONSE[:n][-1] for n in AT] == [",", ">", ">"] and len(RESPONSE) == AT[-1]
    ids, found, places = ids_and_ends(tokenizer, "3+5+9=", RESPONSE, AT)
    assert pieces_of(tokenizer, ids) == pieces
    assert found == before and places == tokens
    assert ids == reward_ids(tokenizer, "3+5+9=", RESPONSE)


def test_a_special_token_before_every_text_moves_all_by_one():
    pieces = ["3+5+9=", "<think>3+5=8,", "8+9=17</think>", "<answer>17</answer>"]
    ids, before, places = ids_and_ends(tokenizer_of(*pieces, first="<bos>"), "3+5+9=", RESPONSE, AT)
    assert len(ids) == 5 and before == 2 and places == [2, 3, 4]


def test_a_special_token_that_the_chat_template_writes_is_there_once():
    """The tokenizer would put one before every text, too."""
    pieces = ["<bos>", "3+5+9=", "/", "<think>3+5=8,", "8+9=17</think>", "<answer>17</answer>"]
    template = "<bos>{% for m in messages %}{{ m.content }}/{% endfor %}"
    tokenizer = with_template(tokenizer_of(*pieces, first="<bos>"), template)
    ids, before, places = ids_and_ends(tokenizer, "3+5+9=", RESPONSE, AT)
    assert pieces_of(tokenizer, ids) == [*pieces, "/"] and ids == reward_ids(tokenizer, "3+5+9=", RESPONSE)
    assert before == 3 and places == [3, 4, 5]


@pytest.mark.parametrize("cuts", [2, 3, 4])
def test_a_special_token_after_every_text_changes_nothing(cuts):
    answer = ["<answer>17</answer>", "<answer>", "17</answer>", "<answer>", "17", "</answer>"]
    start = {2: 0, 3: 1, 4: 3}[cuts]
    pieces = ["3+5+9=", "<think>3+5=8,8+9=17</think>", *answer[start : start + cuts - 1]]
    ids, before, places = ids_and_ends(tokenizer_of(*pieces, last="<eos>"), "3+5+9=", RESPONSE, AT)
    assert len(ids) == len(pieces) + 1 and before == 1
    assert places == [1, 1, len(pieces) - 1]


def test_in_a_chat_template_the_response_is_found(tiny):
    """Also where the question has the same words."""
    tokenizer = with_template(tiny[1])
    ids, before, places = ids_and_ends(tokenizer, "3+5+9=" + RESPONSE, RESPONSE, AT)
    assert ids == reward_ids(tokenizer, "3+5+9=" + RESPONSE, RESPONSE)
    assert tokenizer.decode(ids[:before]).endswith("[end]\n[assistant]")
    written = [tokenizer.decode(ids[before : place + 1]) for place in places]
    assert written == [RESPONSE[:n] for n in AT]
    assert tokenizer.decode(ids[places[-1] + 1 :]) == "[end]\n"


def test_a_response_that_the_template_writes_after_it_once_more_is_found(tiny):
    tokenizer = with_template(tiny[1])
    ids, before, places = ids_and_ends(tokenizer, "3+5+9=", "end", [3])
    assert tokenizer.decode(ids[before : places[0] + 1]) == "end"
    assert tokenizer.decode(ids[:before]).endswith("[assistant]")


def test_a_template_that_changes_the_response_is_one_clear_line(tiny):
    """Many trim it, and those of models that think take the thinking away."""
    tokenizer = with_template(tiny[1], TEMPLATE.replace("m.content", "m.content.split('</think>')[-1] | trim"))
    with pytest.raises(SystemExit):
        ids_and_ends(tokenizer, "3+5+9=", RESPONSE, AT)


def bytes_tokenizer():
    """Every byte is a token, as in GPT-2's vocabulary without its merges."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_character_of_several_tokens_is_reached_in_the_last_one():
    _, before, places = ids_and_ends(bytes_tokenizer(), "q", "é\nか。", [2, 4])
    assert before == 1
    assert places == [3, 9], "two bytes and one, then three and three"


def spaces_tokenizer():
    """The token of a word has the space before it, as SentencePiece writes them; at the beginning of a text it goes."""
    words = ["▁so", "▁it", "▁is", "\n", "x"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    ("tokenizer", "ids", "text", "tokens"),
    [
        (bytes_tokenizer(), None, "né\nか\nx", [3, 7]),
        (spaces_tokenizer(), [0, 1, 2, 3, 4, 1, 3, 4], "so it is\nx it\nx", [3, 6]),
    ],
)
def test_in_sampled_tokens_a_step_ends_where_its_text_ends(tokenizer, ids, text, tokens):
    """Of them family/process_grpo.py and Monte-Carlo labels find the ends by tokens_of."""
    ids = ids or tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokens_of(ids, step_ends(text, "line"), tokenizer) == tokens


# --- judged responses that are read ---


def judged(question, *texts, labels=None):
    ends = [len("".join(texts[: i + 1])) for i in range(len(texts))]
    labels = labels or [1.0] * len(texts)
    return {"question": question, "response": "".join(texts), "ends": ends, "labels": labels}


def test_steps_are_read_with_their_labels(tmp_path):
    rows = [{"prompt": f"p{i}", "steps": ["one\n", "two\n", "3"], "labels": [1, 0.5, False]} for i in range(11)]
    train, held_out = read_steps((write(tmp_path / "a.jsonl", rows),))
    assert len(train) == 9 and len(held_out) == 2
    for response in train + held_out:
        assert response["response"] == "one\ntwo\n3" and response["ends"] == [4, 8, 9]
        assert response["labels"] == [1.0, 0.5, 0.0] and response["question"] == response["prompt"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"labels": [1]}, '"steps" must be a list of texts'),
        ({"steps": "one", "labels": [1]}, '"steps" must be a list of texts'),
        ({"steps": [], "labels": []}, '"steps" must be a list of texts'),
        ({"steps": ["one", ""], "labels": [1, 1]}, '"steps" must be a list of texts'),
        ({"steps": ["one", 2], "labels": [1, 1]}, '"steps" must be a list of texts'),
        ({"steps": ["one"]}, '"labels" must be a list with a number for each of the 1 steps'),
        ({"steps": ["one", "two"], "labels": [1]}, '"labels" must be a list with a number for each of the 2 steps'),
        ({"steps": ["one"], "labels": 1}, '"labels" must be a list'),
        ({"steps": ["one"], "labels": [1.5]}, "a label is a number from 0, wrong, to 1, right"),
        ({"steps": ["one"], "labels": [-1]}, "a label is a number from 0"),
        ({"steps": ["one"], "labels": [math.nan]}, "a label is a number from 0"),
        ({"steps": ["one"], "labels": ["right"]}, "a label is a number from 0"),
        ({"steps": ["one"], "labels": [None]}, "a label is a number from 0"),
        ({"prompt": "", "steps": ["one"], "labels": [1]}, '"prompt" must be non-empty text'),
        ({"steps": ["one"], "labels": [1], "system": 7}, '"system" must be text'),
    ],
)
def test_bad_steps_are_one_clear_line(tmp_path, row, words):
    good = {"prompt": "q", "steps": ["one"], "labels": [1]}
    path = write(tmp_path / "a.jsonl", [good, {"prompt": "p"} | row])
    with pytest.raises(SystemExit, match=words) as error:
        read_steps((path,))
    assert error.value.code == 2 and "a.jsonl:2" in str(error.value) and "\n" not in str(error.value)


def test_steps_beyond_the_limit_are_left_out_and_counted(tiny, capsys):
    """In the tiny model's tokens every character is one. The limit is 8 tokens, with the prompt of 2."""
    tokenizer = tiny[1]
    limits = SimpleNamespace(max_prompt_tokens=2, max_new_tokens=6, eval_prompts=2, data=("a file",))
    fits = judged("1=", "a,", "b,", "cd", labels=[1.0, 0.0, 0.5])
    cut = judged("1=", "a,", "b,", "cde", labels=[1.0, 0.0, 0.5])
    gone = judged("1=", "abcdefg,", "h", labels=[1.0, 0.0])
    long = judged("1=2=3=4=5=", "a", labels=[1.0])
    train, held_out = encode_steps([fits, cut, gone, long], [cut, gone, fits], limits, tokenizer)
    assert capsys.readouterr().out == (
        "data: 5 responses are longer than 8 tokens with their prompt; their last steps were left out\n"
    )
    assert [response["end_ids"] for response in train] == [[1, 3, 5], [1, 3]]
    assert [response["labels"] for response in train] == [[1.0, 0.0, 0.5], [1.0, 0.0]]
    assert [response["end_ids"] for response in held_out] == [[1, 3]], "of the first two"
    for response in train:
        assert tokenizer.decode(response["prompt_ids"]) == "1="
        assert tokenizer.decode(response["response_ids"]) == response["response"][: response["end_ids"][-1] + 1]
    encode_steps([fits], [fits], limits, tokenizer)
    assert capsys.readouterr().out == "", "nothing is said where nothing is lost"


def test_nothing_after_the_last_step_is_read(tiny):
    """A chat template ends the turn after it."""
    tokenizer = with_template(tiny[1])
    (response,), _ = encode_steps([judged("1=", "a,", "b")], [], LIMITS, tokenizer)
    assert tokenizer.decode(response["prompt_ids"]) == "[user]1=[end]\n[assistant]"
    assert tokenizer.decode(response["response_ids"]) == "a,b" and response["end_ids"] == [1, 2]


def test_labels_of_a_batch_stand_at_the_ends(tiny):
    responses = [judged("1+1=", "a,", "b,", "cd", labels=[1.0, 0.25, 0.0]), judged("2=", "ab", labels=[0.5])]
    train, _ = encode_steps(responses, [], LIMITS, tiny[1])
    batch = step_batch(train, tiny[1], CPU)
    assert batch.texts == ["a,b,cd", "ab"] and batch.prompt_lengths.tolist() == [4, 2]
    assert batch["ends"].tolist() == [[False, True, False, True, False, True], [False, True] + [False] * 4]
    assert batch["labels"].tolist() == [[0, 1.0, 0, 0.25, 0, 0.0], [0, 0.5, 0, 0, 0, 0]]
    assert batch["ends"].dtype == torch.bool and batch["labels"].dtype == torch.float32


def test_of_two_steps_that_end_in_one_token_the_later_one_counts():
    tokenizer = tokenizer_of("1=", "a,", "b,c,d")
    responses = [judged("1=", "a,", "b,", "c,", "d", labels=[0.25, 1.0, 0.0, 0.5])]
    train, _ = encode_steps(responses, [], LIMITS, tokenizer)
    batch = step_batch(train, tokenizer, CPU)
    assert train[0]["end_ids"] == [0, 1, 1, 1]
    assert batch["labels"].tolist() == [[0.25, 0.5]] and batch["ends"].sum() == 2


def test_accuracy_and_calibration_of_each_place_by_hand(tmp_path):
    ends = torch.tensor([[True, False, True, True], [False, True, False, True], [True, False, False, False]])
    labels = torch.tensor([[1, 0, 0, 1.0], [0, 1, 0, 0.5], [0.25, 0, 0, 0]])
    scores = torch.tensor([[2, 9, 1, 3.0], [9, -1, 9, 0.5], [-2, 9, 9, 9]])
    batch = {"ends": ends, "labels": labels}
    metrics = judge_steps_of(scores, batch, tmp_path / "calibration.png")
    # first: 2, -1, -2 with labels 1, 1, .25; second: 1, .5 with 0, .5; third: 3 with 1
    assert metrics["eval_step_accuracy/1"] == pytest.approx(2 / 3)
    assert metrics["eval_step_accuracy/2"] == pytest.approx(1 / 2)
    assert metrics["eval_step_accuracy/3"] == 1
    first = 1 - sigma(2), 1 - sigma(-1), 0.25 - sigma(-2)  # .88 .27 .12, in bins of their own
    second = sigma(1), sigma(0.5) - 0.5  # .73 and .62
    third = 1 - sigma(3)  # .95
    assert metrics["eval_calibration/1"] == pytest.approx(sum(map(abs, first)) / 3, abs=1e-6)
    assert metrics["eval_calibration/2"] == pytest.approx(sum(second) / 2, abs=1e-6)
    assert metrics["eval_calibration/3"] == pytest.approx(third, abs=1e-6)
    whole = (sum(map(abs, first)) + sum(second) + third) / 6  # still one in each bin
    assert metrics["eval_calibration"] == pytest.approx(whole, abs=1e-6)
    assert len(metrics) == 7
    assert_picture(tmp_path / "calibration.png")


# --- labels ---

SUM3 = {"question": "3+5+9=", "answer": "17", "verifier": "number", "tags": True, "opened": False, "system": ""}


class Scripted:
    """A sampler that is told what to write: first these responses, then rests(text) after each prefix.

    rests gives all that can follow, equally probable, and each is written as often as the others: an enumeration.
    """

    def __init__(self, tokenizer, responses, rests=None):
        self.tokenizer = tokenizer
        self.responses = responses
        self.rests = rests
        self.calls = []  # (prompts as text, n, temperature, seed)

    def generate(self, prompts, n, temperature, seed):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        if not self.calls:
            written = self.responses
        else:
            written = []
            for text in texts:
                rests = self.rests(text)
                assert n % len(rests) == 0
                written += rests * (n // len(rests))
        self.calls.append((texts, n, temperature, seed))
        ids = [self.tokenizer.encode(text) + [self.tokenizer.eos_token_id] for text in written]
        return batch_of(prompts, ids, self.tokenizer)


def labelled(sampler, examples, **flags):
    """What sample_steps makes of these questions."""
    config = SimpleNamespace(group_size=1, temperature=1.0, labels="mc", continuations=8)
    vars(config).update(flags)
    asked = [example | {"prompt_ids": sampler.tokenizer.encode(example["question"])} for example in examples]
    config.group_size = len(sampler.responses) // len(examples)
    return sample_steps(config, sampler, sampler.tokenizer, asked, 0)


WRITTEN = [
    "<think>3+5=8,8+9=17</think><answer>17</answer>",
    "<think>3+5=9,9+9=18</think><answer>17</answer>",
    "<think>3+5=8,8+9=18</think><answer>18</answer>",
    "<answer>17</answer>",
]


def test_labels_of_the_verifier_are_those_of_the_steps_and_of_the_answer(tiny):
    sampler = Scripted(tiny[1], WRITTEN)
    found = labelled(sampler, [SUM3], labels="verifier")
    assert [response["labels"] for response in found] == [[1, 1, 1], [0, 1, 1], [1, 0, 0], [1]]
    for text, response in zip(WRITTEN, found, strict=True):
        assert response["response"] == text and response["question"] == response["prompt"] == "3+5+9="
        assert response["ends"] == [end for end, _ in judge_steps(text, SUM3)] + [len(text)]
    assert len(sampler.calls) == 1, "nothing is continued"


def rests_of(text):
    """All ways to go on: a sum is right or one too large, the answer is the last result or one less."""
    results = [int(x) for x in re.findall(r"=(\d+)", text.removeprefix("3+5+9="))]
    if text.endswith(","):
        sums = [results[-1] + 9, results[-1] + 10]
        return [f"{results[-1]}+9={total}</think>{rest}" for total in sums for rest in answers_from(total)]
    assert text.endswith("</think>")
    return answers_from(results[-1])


def answers_from(result):
    return [f"<answer>{result}</answer>", f"<answer>{result - 1}</answer>"]


def test_monte_carlo_labels_are_the_shares_of_an_enumeration(tiny):
    """After 8: 17 or 18, which may be answered 17 16 18 17: two of four are right. After 9: 18 17 19 18, one of four.

    After a second step that ends at 17 or 18 one of two is right: a wrong step that is repaired as often is worth as
    much.
    """
    tokenizer = tiny[1]
    sampler = Scripted(tokenizer, WRITTEN, rests_of)
    found = labelled(sampler, [SUM3], continuations=8)
    assert [response["labels"] for response in found] == [
        [1 / 2, 1 / 2, 1],
        [1 / 4, 1 / 2, 1],
        [1 / 2, 1 / 2, 0],
        [1],
    ]
    assert [response["ends"] for response in found] == [
        [end for end, _ in judge_steps(text, SUM3)] + [len(text)] for text in WRITTEN
    ]
    (_, (prefixes, n, temperature, _)) = sampler.calls
    expected = ["3+5+9=" + text[:end] for text in WRITTEN for end, _ in judge_steps(text, SUM3)]
    assert prefixes == expected and n == 8 and temperature == 1.0


def test_labels_stay_with_their_prefixes_however_many_there_are(tiny):
    """80 responses with 160 prefixes: they are continued in parts of 64."""
    tokenizer = tiny[1]
    examples = [SUM3, SUM3 | {"question": "4+5+9=", "answer": "18"}]
    texts = (WRITTEN[:2] * 40)[:80]
    sampler = Scripted(tokenizer, texts, rests_of_either)
    found = labelled(sampler, examples, continuations=4)
    assert [len(prompts) for prompts, *_ in sampler.calls] == [2, 64, 64, 32]
    expected = [[1 / 2, 1 / 2, 1], [1 / 4, 1 / 2, 1]] * 20  # for 17, as above
    expected += [[1 / 4, 0, 0], [1 / 2, 1 / 2, 0]] * 20  # for 18: of 17 16 18 17 one, of 18 17 19 18 two; 17 16; 18 17
    assert [response["labels"] for response in found] == expected
    assert len({seed for *_, seed in sampler.calls[1:]}) == 3, "with random numbers of their own"


def rests_of_either(text):
    return rests_of("3+5+9=" + text.partition("=")[2])


def test_continuations_have_other_random_numbers_than_the_responses(tiny):
    sampler = Scripted(tiny[1], WRITTEN, rests_of)
    labelled(sampler, [SUM3])
    (*_, first), (*_, second) = sampler.calls
    assert first != second


def test_what_the_last_token_of_a_prefix_has_of_the_next_step_is_not_lost(monkeypatch):
    """The comma and the 8 after it are one token."""
    tokenizer = tokenizer_of("3+5+9=", "<think>3+5=8", ",8", "+9=17</think>", "<answer>17</answer>")
    sampler = Scripted(tokenizer, WRITTEN[:1], lambda text: [rest_after(text)])
    judged_texts = []
    monkeypatch.setattr(steps, "share_right", lambda texts, example: judged_texts.extend(texts) or 1.0)
    labelled(sampler, [SUM3], continuations=1)
    assert sampler.calls[1][0][0] == "3+5+9=<think>3+5=8,8"
    assert judged_texts == WRITTEN[:1] * 2


def rest_after(text):
    return ("3+5+9=" + WRITTEN[0]).removeprefix(text)


def test_a_response_that_ends_with_a_step_has_no_answer_and_is_left_out(tiny):
    texts = ["<think>3+5=8,", "<think>3+5=8,8+9=17</think>", "", "<think>3+5=8,8", "17"]
    found = labelled(Scripted(tiny[1], texts), [SUM3], labels="verifier")
    assert [response["response"] for response in found] == ["<think>3+5=8,8", "17"]
    assert [response["labels"] for response in found] == [[1, 0], [0]]


def test_a_continuation_that_cannot_be_checked_is_not_wrong(monkeypatch):
    def is_right(response, example):
        if response.endswith("?"):
            raise Unchecked("?")
        return response.endswith("17")

    monkeypatch.setattr(steps, "is_right", is_right)
    assert share_right(["17", "?", "18", "17"], SUM3) == pytest.approx(2 / 3)
    assert share_right(["?", "18"], SUM3) == 0
    assert share_right(["?", "?"], SUM3) is None


def test_a_response_with_a_step_that_could_not_be_checked_is_left_out(tiny, monkeypatch):
    def is_right(response, example):
        if response.startswith("<think>3+5=9"):
            raise Unchecked("?")
        return response.endswith("<answer>17</answer>")

    monkeypatch.setattr(steps, "is_right", is_right)
    found = labelled(Scripted(tiny[1], WRITTEN, rests_of), [SUM3])
    assert [response["response"] for response in found] == [WRITTEN[0], WRITTEN[2], WRITTEN[3]]


def test_a_response_whose_answer_could_not_be_checked_is_left_out(tiny, monkeypatch):
    def accuracy(response, example):
        if response == WRITTEN[1]:
            raise Unchecked("?")
        return 1.0

    monkeypatch.setitem(rewards.REWARDS, "accuracy", accuracy)
    found = labelled(Scripted(tiny[1], WRITTEN, rests_of), [SUM3])
    assert WRITTEN[1] not in [response["response"] for response in found]


def test_labels_of_the_tiny_model_are_within_4_standard_errors_of_other_samples(tiny):
    """256 continuations of each step, against as many with other random numbers."""
    policy, tokenizer = tiny
    sampler = make_sampler(policy, tokenizer, max_new_tokens=32)
    K = 256
    example = SUM3 | {"prompt_ids": tokenizer.encode("3+5+9=")}
    texts = WRITTEN[:2]
    ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
    batch = batch_of([example["prompt_ids"]], ids, tokenizer)
    config = SimpleNamespace(continuations=K, temperature=1.0)
    labels = steps.continued(config, sampler, tokenizer, batch, [example] * 2, seed=0)
    assert list(map(len, labels)) == [2, 2]
    shares = []
    for text in texts:
        for end, _ in judge_steps(text, SUM3):
            other = sampler.generate([tokenizer.encode("3+5+9=" + text[:end])], K, 1.0, seed=999 + len(shares))
            right = [score_one("accuracy", text[:end] + rest, SUM3) for rest in other.texts]
            shares.append(sum(right) / K)
    found = [label for row in labels for label in row]
    for label, share in zip(found, shares, strict=True):
        p = (label + share) / 2
        assert abs(label - share) <= 4 * math.sqrt(2 * p * (1 - p) / K) + 1e-12
    assert max(found) > 0.3 and min(found) < 0.1 and any(0.05 < x < 0.95 for x in found), (found, shares)


# --- a judge of steps from end to end ---


@pytest.fixture(scope="module")
def prm_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prm") / "run"
    records = run(folder, prm)
    return folder, records


def test_a_run_on_steps_writes_what_it_found(prm_run):
    folder, records = prm_run
    first, step, last = records
    assert [record["step"] for record in records] == [0, 1, 2]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) == step["loss"], "a head of zeros knows nothing"
    assert first["eval_step_accuracy"] == pytest.approx(1 - first["eval_label"]), "a half is not called right"
    train, held_out = made(folder)
    assert 50 < len(train) <= 64, "two responses to each question"
    assert len(held_out) >= 8
    labels = [label for response in train for label in response["labels"]]
    assert set(labels) == {0.0, 1.0}
    for response in train:
        judged_by_verifier = [x for _, x in judge_steps(response["response"], response)]
        assert response["labels"][:-1] == judged_by_verifier
    assert_picture(folder / "calibration.png"), assert_picture(folder / "curves.png")


def test_held_out_metrics_of_steps_are_those_of_the_saved_model(prm_run):
    """As family/process_grpo.py would judge them."""
    folder, records = prm_run
    judge = StepRewardModel(str(folder / "model"))
    _, held_out = made(folder)
    by_place = {}  # place -> [(probability, label)]
    for response in held_out:
        (judged_steps,) = judge.step_scores([response["response"]], [response])
        assert [end for end, _ in judged_steps] == response["ends"], "the steps are the same ones"
        for place, ((_, p), label) in enumerate(zip(judged_steps, response["labels"], strict=True), 1):
            by_place.setdefault(place, []).append((p, label))
    last = records[-1]
    everything = [pair for place in by_place.values() for pair in place]
    error = rewards.calibration_error(*zip(*everything, strict=True))
    loss = sum(-label * math.log(p) - (1 - label) * math.log(1 - p) for p, label in everything)
    hits = [(p > 0.5) == (label >= 0.5) for p, label in everything]
    assert last["eval_loss"] == pytest.approx(loss / len(everything), abs=1e-5)
    assert last["eval_step_accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    assert last["eval_label"] == pytest.approx(sum(label for _, label in everything) / len(everything), abs=1e-6)
    assert last["eval_calibration"] == pytest.approx(error, abs=1e-5)
    for place, found in by_place.items():
        hits = [(p > 0.5) == (label >= 0.5) for p, label in found]
        assert last[f"eval_step_accuracy/{place}"] == pytest.approx(sum(hits) / len(hits))
        error = rewards.calibration_error(*zip(*found, strict=True))
        assert last[f"eval_calibration/{place}"] == pytest.approx(error, abs=1e-5)
    assert len([name for name in last if name.startswith("eval_calibration/")]) == len(by_place) > 2


def test_what_it_saves_judges_the_steps_of_process_grpo(tmp_path, prm_run, monkeypatch):
    """At the end of a step, the sigmoid of the score there; at the end token that of the answer's; 0 elsewhere."""
    path = str(prm_run[0] / "model")
    seen = []
    score_steps = process_grpo.score_steps

    def watched(batch, examples, tokenizer, judge):
        seen.append((batch, examples, *score_steps(batch, examples, tokenizer, judge)))
        return seen[-1][2:]

    monkeypatch.setattr(process_grpo, "score_steps", watched)
    process_grpo.main(process_grpo.Config(out=str(tmp_path / "run"), judge=path, **RL | {"prompts_per_step": 8}))
    ((batch, examples, found, ends),) = seen
    scorer, tokenizer = load_scorer(path, CPU)
    p = batch_scores(scorer, batch, 10**6, each=True).sigmoid()  # [B, T]
    assert not found[~ends].any() and not ends[~batch.response_mask].any()
    several = 0
    for i, length in enumerate(batch.lengths.tolist()):
        whole = batch.response_ids[i, :length].tolist()
        text = tokenizer.encode(batch.texts[i])
        assert whole[: len(text)] == text, "tokenised again it is the same"
        steps_of_row = [end for end, _ in judge_steps(batch.texts[i], examples[i])]
        expected = {len(tokenizer.encode(batch.texts[i][:end])) - 1: None for end in steps_of_row}
        for t in expected:
            expected[t] = p[i, t].item()
        if text:
            expected[length - 1] = p[i, len(text) - 1].item()
        assert set(ends[i].nonzero()[:, 0].tolist()) == set(expected) | {length - 1}
        for t, value in expected.items():
            assert found[i, t].item() == pytest.approx(value, abs=1e-5)
        several += len(expected) > 2
    assert several > 1 and len({round(x, 3) for x in found[ends].tolist()}) > 5
    record = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
    assert record["step_reward"] == pytest.approx((found.sum(1) / ends.sum(1)).mean().item(), abs=1e-5)
    assert record["grad_norm"] > 0


def test_an_empty_response_is_judged_by_its_question(prm_run):
    judge = StepRewardModel(str(prm_run[0] / "model"))
    (((end, p),),) = judge.step_scores([""], [SUM3])
    states = judge.model.base_model(torch.tensor([judge.tokenizer.encode("3+5+9=")])).last_hidden_state[0]
    assert end == 0 and p == pytest.approx(judge.head(states[-1]).sigmoid().item(), abs=1e-6)


def test_a_judge_of_steps_that_is_no_causal_model_is_one_clear_line(tmp_path, tiny):
    small_model("BertForSequenceClassification", "bert").save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="a judge of steps must be a causal model with a linear head") as error:
        StepRewardModel(str(tmp_path)).step_scores(["17"], [SUM3])
    assert "\n" not in str(error.value)


def step_rows(path):
    """20 questions, with steps in lines, of which the second is right in every second one."""
    rows = []
    for i in range(20):
        parts = ["so\n", f"{i + i % 2}\n", "done"]
        rows.append({"prompt": f"What is {i}+1?", "steps": parts, "labels": [1, i % 2, 0.5]})
    return write(path, rows)


def test_a_resumed_judge_of_steps_is_the_same_to_the_bit(tmp_path, prm_run, monkeypatch):
    run(tmp_path / "whole", prm, steps=3, eval_every=2)
    part, _ = continued(prm_run[0], tmp_path, monkeypatch, prm, eval_every=2)
    the_same_to_the_bit(tmp_path / "whole", part)
    assert made(part) == made(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mc", "data"])
def test_resumed_it_is_the_same_to_the_bit_whatever_the_labels(tmp_path, monkeypatch, kind):
    if kind == "data":
        monkeypatch.delitem(SMALL, "pair_prompts")
        flags = {"data": (step_rows(tmp_path / "a.jsonl"),)}
    else:
        flags = {"labels": "mc", "continuations": 3}
    run(tmp_path / "whole", prm, steps=3, eval_every=2, **flags)
    run(tmp_path / "two", prm, steps=2, eval_every=2, **flags)
    part, _ = continued(tmp_path / "two", tmp_path, monkeypatch, prm, eval_every=2, **flags)
    the_same_to_the_bit(tmp_path / "whole", part)


def test_any_microbatch_size_gives_the_same_judge_of_steps(tmp_path, prm_run):
    """The mean is over the steps of the update, of which responses have unequally many."""
    alike(prm_run[1], run(tmp_path / "run", prm, tokens_per_microbatch=1))


def test_a_run_on_steps_that_are_read(tmp_path, monkeypatch):
    monkeypatch.delitem(SMALL, "pair_prompts")
    records = run(tmp_path / "run", prm, data=(step_rows(tmp_path / "a.jsonl"),), steps=1)
    train, held_out = made(tmp_path / "run")
    assert len(train) == 18 and len(held_out) == 2
    assert records[1]["label"] == pytest.approx(0.5, abs=0.2) and "eval_step_accuracy/3" in records[1]
    assert records[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_run_on_monte_carlo_labels(tmp_path):
    flags = {"labels": "mc", "continuations": 3, "pair_prompts": 24, "steps": 1}
    records = run(tmp_path / "run", prm, **flags)
    train, _ = made(tmp_path / "run")
    labels = [label for response in train for label in response["labels"][:-1]]
    assert {round(3 * label, 6) for label in labels} <= {0, 1, 2, 3} and len(set(labels)) > 2
    assert records[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lora_rank": 8}, "--lora-rank is not for reward models, whose weights are all trained here"),
        ({"shard": True}, "--shard is not for reward models"),
        ({"data": ("a.jsonl",), "labels": "mc"}, "--labels is for the model's own responses"),
        ({"data": ("a.jsonl",), "continuations": 4}, "--continuations is for the model's own responses"),
        ({"data": ("a.jsonl",), "task": "countdown"}, "--task is for the model's own responses"),
        ({"data": ("a.jsonl",), "pair_prompts": 16}, "--pair-prompts is for the model's own responses"),
        ({"data": ("a.jsonl",), "group_size": 4}, "--group-size is for the model's own responses"),
    ],
)
def test_a_flag_that_a_judge_of_steps_cannot_mean_is_one_clear_line(tmp_path, capsys, flags, words):
    refused(tmp_path, capsys, prm, flags, words)


def test_questions_whose_steps_the_verifier_cannot_judge_are_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="no judge of steps for questions like") as error:
        run(tmp_path / "run", prm, task="countdown")
    assert "\n" not in str(error.value)


def test_no_steps_to_learn_from_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.delitem(SMALL, "pair_prompts")
    data = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "steps": ["a" * 30], "labels": [1]} for i in range(20)])
    with pytest.raises(SystemExit, match="0 responses to learn from, 0 held out: there must be responses") as error:
        run(tmp_path / "run", prm, data=(data,), max_new_tokens=2, max_prompt_tokens=4)
    assert "\n" not in str(error.value)


# --- slow ---


@pytest.mark.slow
@pytest.mark.parametrize("script", ["reward_model", "prm"])
def test_two_processes_train_the_same_judge(tmp_path, script):
    data = answers_in_order(tmp_path / "a.jsonl") if script == "reward_model" else step_rows(tmp_path / "a.jsonl")
    flags = ["--data", data, "--steps", 2, "--pairs-per-step", 5, "--eval-prompts", 4, "--model", TINY]
    for n in (1, 2):
        torchrun(n, ROOT / "family" / f"{script}.py", *flags, "--out", tmp_path / str(n))
    one, two = (read_jsonl(tmp_path / n / "metrics.jsonl") for n in ("1", "2"))
    assert len(one) == 3
    alike(one, two)


@pytest.mark.slow
def test_it_learns_an_order_in_which_a_quarter_of_the_labels_is_wrong(tmp_path):
    """Held out it knows the gold order better than its own labels do."""
    flags = {"steps": 40, "pairs_per_step": 64, "pair_prompts": 1024, "eval_prompts": 128, "lr": 3e-4, "eval_every": 0}
    clean = run(tmp_path / "clean", reward_model, **flags)[-1]
    assert clean["eval_pair_accuracy"] > 0.85 and clean["eval_loss"] < 0.45
    assert clean["eval_gold_accuracy"] == pytest.approx(clean["eval_pair_accuracy"])
    noisy = run(tmp_path / "noisy", reward_model, flip=0.25, **flags)[-1]
    held_out = flips(made(tmp_path / "noisy")[1])
    label_accuracy = 1 - sum(held_out.values()) / len(held_out)
    assert 0.6 < label_accuracy < 0.9
    assert noisy["eval_gold_accuracy"] > label_accuracy
    assert noisy["eval_pair_accuracy"] < noisy["eval_gold_accuracy"]


@pytest.mark.slow
def test_it_learns_which_steps_are_right(tmp_path):
    flags = {"steps": 30, "pairs_per_step": 64, "pair_prompts": 512, "eval_prompts": 128, "lr": 3e-4, "eval_every": 0}
    first, *_, last = run(tmp_path / "run", prm, **flags)
    assert last["eval_step_accuracy"] > 0.9 > first["eval_step_accuracy"]
    assert last["eval_loss"] < 0.35
