"""Models that think before they answer: prompts that open <think>, answers after </think>, and what is rewarded."""

import pytest
from conftest import ROOT, answers, read_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
from data import describe, encode_prompts, load_task
from rewards import score

OPENS = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
SUM = {"question": "3+5+9=", "answer": "17", "verifier": "number", "tags": True}


def tokenizer_with(template: str | None):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny")
    tokenizer.chat_template = template
    return tokenizer


def accuracy(response: str, example: dict) -> float:
    return score(answers([response]), [example], [])["accuracy"][0]


def test_a_prompt_that_opens_the_thinking_is_known_to_the_reward():
    tokenizer = tokenizer_with(OPENS)
    [example] = encode_prompts([SUM], tokenizer, "auto", 64)
    assert tokenizer.decode(example["prompt_ids"]) == "3+5+9=<think>"
    assert example["opened"] and not example["tags"], "a chat template asks for no tags"
    assert accuracy("3+5=8,8+9=17</think>The answer is 17", example) == 1
    assert accuracy(r"3+5=8,8+9=17</think>\boxed{17}", example) == 1
    assert accuracy("3+5=8,8+9=17</think><answer>17</answer>", example) == 1
    assert accuracy("3+5=8,8+9=17. The answer is 17", example) == 0, "thinking that never closes is no answer"
    assert score(answers(["3+5=8</think><answer>17</answer>"]), [example], ["format"])["format"] == [1.0]


@pytest.mark.parametrize("template", ["r1", "plain"])
def test_where_the_prompt_asks_for_tags_nothing_else_counts(template):
    [example] = encode_prompts([SUM], tokenizer_with(None), template, 512)
    assert example["tags"] and not example["opened"]
    assert accuracy("<think>3+5=8,8+9=17</think><answer>17</answer>", example) == 1
    assert accuracy("<think>3+5=8,8+9=17</think>17", example) == 0
    assert accuracy(r"<think>3+5=8,8+9=17</think>\boxed{17}", example) == 0


def test_a_task_that_asks_for_no_tags_takes_every_form():
    words = {"question": "What is 3 + 14?", "answer": "17", "verifier": "number"}
    [example] = encode_prompts([words], tokenizer_with(None), "plain", 64)
    assert not example["tags"]
    for response in ("The answer is 17.", r"\boxed{17}", "<think>3+14=17</think>17", "<answer>17</answer>"):
        assert accuracy(response, example) == 1, response


@pytest.mark.parametrize(
    ("template", "words"), [("chat", "the prompt opens <think>"), ("r1", "only between <answer> and </answer>")]
)
def test_what_counts_is_said_where_the_prompt_is_shown(template, words):
    assert words in describe(load_task("arithmetic"), tokenizer_with(OPENS), template)


def test_a_chat_model_whose_template_opens_the_thinking_earns_its_reward(tmp_path):
    """The tiny model mostly guesses; begun with <think>, it thinks, and then it is right."""
    tokenizer_with(OPENS).save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(ROOT / "tiny").save_pretrained(tmp_path / "model")
    flags = {"prompts_per_step": 4, "group_size": 4, "eval_prompts": 16, "steps": 1}
    grpo.main(grpo.Config(model=str(tmp_path / "model"), out=str(tmp_path / "run"), **flags))
    before, after = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert before["eval_pass@1"] > 0.5 and before["eval_format"] > 0.5
    assert after["reward"] > 0.5
