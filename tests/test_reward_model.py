"""A learned reward model, given by its path: text is tokenised anew by its own tokenizer."""

import random

import pytest
import torch
from conftest import ROOT, answers, read_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import ppo
import rewards
from logprobs import load_value

TOKENS = ["[UNK]", "+", "=", "<", ">", "/", *"9876543210", "answer", "think", "user", "assistant"]
SIZES = {"vocab_size": len(TOKENS), "num_labels": 1, "initializer_range": 0.5, "pad_token_id": 0}
SIZES |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SUM = {"question": "3+4=", "answer": "7", "verifier": "number"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model with random weights, and a tokenizer that shares no token id with that of the tiny policy."""
    path = tmp_path_factory.mktemp("reward") / "model"
    save_tokenizer(path)
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(**SIZES)).save_pretrained(path)
    return str(path)


def save_tokenizer(path) -> None:
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(path)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))


def by_hand(folder, text):
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = PreTrainedTokenizerFast.from_pretrained(folder).encode(text)
    with torch.no_grad():
        last = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return (model.score.weight @ last).item(), ids


def test_it_scores_the_text_of_question_and_response(folder):
    example = {"question": "3+4=", "answer": "7", "verifier": "number"}
    weights = rewards.parse_weights((f"{folder}=0.5", "accuracy=1"))
    responses = ["<answer>7</answer>", "<think>3+4=7</think><answer>8</answer>", ""]
    scores = rewards.score(answers(responses), [example] * 3, weights)
    expected = [by_hand(folder, "3+4=" + response)[0] for response in responses]
    assert scores[folder] == pytest.approx(expected, abs=1e-5) and len(set(expected)) == 3
    assert rewards.weighted_sum(scores, weights) == pytest.approx(
        [0.5 * expected[0] + 1, 0.5 * expected[1], 0.5 * expected[2]]
    )


def test_its_chat_template_is_used(folder, monkeypatch):
    model = rewards.RewardModel(folder)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}/{{ m.content }}/{% endfor %}"
    expected, _ = by_hand(folder, "user/3+4=/assistant/7/")
    assert model("7", {"question": "3+4="}) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "words"), [("./no/such/model", "cannot be loaded"), (str(ROOT / "tiny"), "needs a score head")]
)
def test_what_is_no_reward_model_is_refused(name, words):
    with pytest.raises(SystemExit, match=words) as error:
        rewards.parse_weights([name])
    assert "\n" not in str(error.value)


# --- several texts at once ---


def ragged(n: int) -> list[str]:
    """Responses of 0 to 60 tokens, in no order; some end in the token that pads."""
    rng = random.Random(0)
    texts = []
    for i in range(n):
        text = "".join(rng.choices("0123456789+=", k=rng.randint(0, 60)))
        texts.append(text + "?" * (i % 3))  # an unknown word: token 0
    return texts


def watch(model, monkeypatch) -> list[tuple[int, int]]:
    """(texts, tokens of the longest) of each pass through this model, from now on."""
    shapes = []
    forward = model.forward

    def watched(ids, *arguments, **flags):
        shapes.append(tuple(ids.shape))
        return forward(ids, *arguments, **flags)

    monkeypatch.setattr(model, "forward", watched)
    return shapes


@pytest.mark.parametrize(("budget", "passes"), [(1, 30), (200, None), (16384, 1)])
def test_scores_in_batches_equal_those_one_by_one(folder, monkeypatch, budget, passes):
    texts = ragged(30)
    expected = [by_hand(folder, "3+4=" + text)[0] for text in texts]
    assert len({round(x, 3) for x in expected}) > 20
    monkeypatch.setattr(rewards, "TOKENS_AT_ONCE", budget)
    model = rewards.RewardModel(folder)
    shapes = watch(model.model.base_model, monkeypatch)
    assert model.scores(texts, [SUM] * 30) == pytest.approx(expected, abs=1e-5)
    assert sum(n for n, _ in shapes) == 30
    assert len(shapes) == passes if passes else 1 < len(shapes) < 30
    assert all(n == 1 or n * tokens <= budget for n, tokens in shapes)
    assert model.scores([], []) == []


def test_a_text_that_ends_in_the_padding_token_is_read_to_its_end(folder):
    """Transformers' own head would take the state of the last token that is not padding."""
    texts = ["7??", "7", "7+4+4+4+4", "?", "7?"]
    expected = [by_hand(folder, "3+4=" + text)[0] for text in texts]
    assert by_hand(folder, "3+4=7??")[1][-2:] == [0, 0] and len({round(x, 4) for x in expected}) == 5
    assert rewards.RewardModel(folder).scores(texts, [SUM] * 5) == pytest.approx(expected, abs=1e-5)


def test_a_model_that_sees_later_tokens_is_read_one_by_one(tmp_path, monkeypatch):
    """Padding would be among them."""
    save_tokenizer(tmp_path)
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(max_position_embeddings=80, **SIZES)).eval()
    bert.save_pretrained(tmp_path)
    texts = ragged(12)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = [bert(torch.tensor([tokenizer.encode("3+4=" + text)])).logits.item() for text in texts]
    assert len({round(x, 3) for x in expected}) > 8
    model = rewards.RewardModel(str(tmp_path))
    shapes = watch(model.model, monkeypatch)
    assert model.scores(texts, [SUM] * 12) == pytest.approx(expected, abs=1e-5)
    assert [n for n, _ in shapes] == [1] * 12


def test_scores_that_are_not_finite_end_the_run_in_one_line(folder, capsys):
    model = rewards.RewardModel(folder)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    capsys.readouterr()
    rewards.REWARDS["the/model"] = model
    with pytest.raises(SystemExit) as error:
        rewards.score(answers(["7", "8"]), [SUM] * 2, ["the/model"])
    assert error.value.code == 2
    assert capsys.readouterr().err == "rewards: the reward model's scores are not finite (nan or inf)\n"


@pytest.mark.parametrize(
    ("lengths", "budget", "parts"),
    [
        ([3, 5, 1, 5, 2], 10, [[1, 3], [0, 4, 2]]),  # 2 x 5, then 3 x 3 tokens
        ([3, 5, 1, 5, 2], 9, [[1], [3], [0, 4, 2]]),
        ([3, 5, 1, 5, 2], 25, [[1, 3, 0, 4, 2]]),
        ([3, 5, 1, 5, 2], 1, [[1], [3], [0], [4], [2]]),
        ([2, 12, 2], 10, [[1], [0, 2]]),  # longer than the budget: alone
        ([], 10, []),
    ],
)
def test_texts_of_like_length_share_a_batch(lengths, budget, parts):
    assert rewards.parts_of_like_length([[0] * length for length in lengths], budget) == parts


# --- a run ---


def test_ppo_learns_from_a_reward_model_and_its_value_network_starts_from_it(folder, tmp_path, tiny):
    # The value network reads the policy's tokens, so it can start from a reward model that has the same tokenizer.
    policy, tokenizer = tiny
    own = tmp_path / "own"
    scorer = LlamaForSequenceClassification.from_pretrained(str(ROOT / "tiny"), num_labels=1)
    scorer.save_pretrained(own), tokenizer.save_pretrained(own)
    value = load_value(str(own), torch.device("cpu"))
    assert torch.equal(value.head.weight, scorer.score.weight) and value.head.weight.abs().sum() > 0

    flags = {"model": str(ROOT / "tiny"), "eval_prompts": 8, "steps": 15, "eval_every": 0, "lr": 3e-4, "beta": 0.0}
    config = ppo.Config(out=str(tmp_path / "run"), rewards=(f"{folder}=1",), value_model=str(own), **flags)
    ppo.main(config)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1:]
    learned = [record[f"reward/{folder}"] for record in records]
    assert learned == pytest.approx([record["reward"] for record in records], abs=1e-6)
    assert sum(learned[-3:]) / 3 > sum(learned[:3]) / 3 + records[0]["reward_std"] / 4
