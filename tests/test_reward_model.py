"""A learned reward model, given by its path: text is tokenised anew by its own tokenizer."""

import pytest
import torch
from conftest import ROOT, answers, read_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import ppo
import rewards
from logprobs import load_value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model with random weights, and a tokenizer that shares no token id with that of the tiny policy."""
    path = tmp_path_factory.mktemp("reward") / "model"
    tokens = ["[UNK]", "+", "=", "<", ">", "/", *"9876543210", "answer", "think", "user", "assistant"]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)])
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokens), num_labels=1, initializer_range=0.5, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(path)
    return str(path)


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
