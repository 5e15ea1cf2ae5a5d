"""Rewards of steps, and the rewards that came with T1 and RLSP: which step is right, and at which token it ends."""

from types import SimpleNamespace

import pytest
import torch
from conftest import answers

import rewards
from batch import collate
from rewards import bad_pattern, check_steps, exploration, mixed_language, repetition, score_steps
from verifiers import has_steps, is_right, judge_steps

SUM = {"question": "3+5+9=", "answer": "17", "verifier": "number", "tags": True, "opened": False}
COUNTDOWN = {"question": "Using 3, 5, reach 8.", "answer": "3+5", "verifier": "countdown"}
END = "</think>"

# --- which step is right ---


@pytest.mark.parametrize(
    ("steps", "rest"),  # each step with all that belongs to it, and whether it is right; then what follows
    [
        # right, without and with an answer, an opening tag, a right answer
        ([("<think>3+5=8,", 1), ("8+9=17</think>", 1)], ""),
        ([("<think>3+5=8,", 1), ("8+9=17</think>", 1)], "<answer>17</answer>"),
        ([("3+5=8,", 1), ("8+9=17</think>", 1)], "<answer>17</answer>"),
        ([("<think>3+5=8,", 1), ("8+9=17</think>", 1)], "<answer>1,2,3</answer>"),
        # a wrong sum, and what adds to it rightly or not
        ([("<think>3+5=9,", 0), ("9+9=18</think>", 1)], "<answer>18</answer>"),
        ([("<think>3+5=9,", 0), ("8+9=17</think>", 0)], "<answer>17</answer>"),
        ([("<think>3+5=8,", 1), ("8+9=18</think>", 0)], ""),
        # right sums of other numbers, or of these in another order
        ([("<think>3+9=12,", 0), ("12+5=17</think>", 0)], ""),
        ([("<think>5+9=14,", 0), ("14+3=17</think>", 0)], ""),
        ([("<think>5+3=8,", 0), ("8+9=17</think>", 1)], ""),
        ([("<think>3+5+9=17</think>", 0)], "<answer>17</answer>"),
        # said twice: each step has a number of its own to add, so the repeated one takes the place of the next
        ([("<think>3+5=8,", 1), ("3+5=8,", 0), ("8+9=17</think>", 0)], ""),
        ([("<think>3+5=8,", 1), ("8+9=17,", 1), ("8+9=17</think>", 0)], ""),
        ([("<think>3+5=8,", 1), ("8+9=17,", 1), ("17+0=17</think>", 0)], ""),
        # no sum at all is wrong, and the next one goes on from the last sum
        ([("<think>3+5=8,", 1), ("wait,", 0), ("8+9=17</think>", 1)], ""),
        ([("<think>3+5=8,", 1), (",", 0), ("8+9=17</think>", 1)], ""),
        ([("<think></think>", 0)], "<answer>17</answer>"),
        ([("<think>3+5=8=8,", 0), ("3+5=8.0,", 0), ("٣+٥=٨,", 0), ("3+5=8</think>", 1)], ""),
        # spaces around a step and in it
        ([("<think> 3+5=8 ,", 1), ("\n8+9=17\n</think>", 1)], ""),
        ([(" <think>3 + 5 = 8,", 1), ("8 +9= 17</think>", 1)], ""),
        # a number that Python would refuse to read
        ([("<think>3+5=" + "8" * 5000 + ",", 0)], "8"),
        # cut off
        ([("<think>3+5=8,", 1), ("8+9=17,", 1)], ""),
        ([("<think>3+5=8,", 1)], "8+9=1"),
        ([("<think>3+5=8,", 1)], "8+9=17"),
        ([("<think>3+5=8,", 1)], "8+9=17</thin"),
        ([], "<think>3+5=8"),
        # no thinking, and thinking that is not closed
        ([], ""),
        ([], "<answer>17</answer>"),
        ([], "</think><answer>17</answer>"),
        ([("<think>3+5=8,", 1)], "8+9=17<answer>17</answer>"),
        # what follows the first </think> is no thinking
        ([("<think>3+5=8</think>", 1)], "8+9=17</think><answer>17</answer>"),
        ([("<think>3+5=8</think>", 1)], "<think>8+9=17,17</think>"),
    ],
)
def test_steps_are_judged_one_by_one(steps, rest):
    expected = []
    response = ""
    for step, right in steps:
        response += step
        expected.append((len(response), float(right)))
    assert judge_steps(response + rest, SUM) == expected


def test_the_first_step_adds_the_first_two_numbers_however_many_there_are():
    two = SUM | {"question": "30+12="}
    assert judge_steps("<think>30+12=42</think>", two) == [(23, 1.0)]
    six = SUM | {"question": "1+2+3+4+5+6="}
    thinking = "<think>1+2=3,3+3=6,6+4=10,10+5=15,15+6=21</think>"
    assert [right for _, right in judge_steps(thinking, six)] == [1.0] * 5


def test_no_steps_of_any_response_are_worth_more_than_the_numbers_of_the_question():
    pieces = ["3+5=8", "8+9=17", "17+3=20", "3+9=12", "9+9=18", "wait", ""]
    for a in pieces:
        for b in pieces:
            for c in pieces:
                judged = judge_steps(f"<think>{a},{b},{c}</think>", SUM)
                assert sum(right for _, right in judged) <= 2


def test_only_sums_have_steps(capsys):
    assert has_steps({"question": "3+5="}) and has_steps({"question": "30+5+9+11="})
    for question in ("3=", "3+5", "3-5=", "3+5=?", "What is 3+5=", " 3+5=", "3+5=\n", "3.5+1=", "٣+٥="):
        assert not has_steps({"question": question}), question
    check_steps([SUM, SUM])
    with pytest.raises(SystemExit) as error:
        check_steps([SUM, COUNTDOWN])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "no judge of steps for questions like 'Using 3, 5, reach 8.'; give --task arithmetic\n"
    )


# --- at which token it ends ---


def batch_of(texts, tokenizer, cut=()):
    """The responses as the sampler gives them, for one question; with an end token, unless they were cut."""
    responses = []
    reasons = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        responses.append(ids if text in cut else ids + [tokenizer.eos_token_id])
        reasons.append("length" if text in cut else "stop")
    logps = [[0.0] * len(ids) for ids in responses]
    return collate([[5, 6]], responses, logps, reasons, tokenizer, "cpu")


def test_rewards_are_at_the_last_tokens_of_steps_and_of_the_answer(tiny):
    """In the tiny model's tokens every character is one, and every tag."""
    tokenizer = tiny[1]
    right = "<think>3+5=8,8+9=17</think><answer>17</answer>"
    wrong = "<think>3+5=9,9+9=18</think><answer>18</answer>"
    guess = "<answer>17</answer>"
    open_end = "<think>3+5=8,8+9"
    batch = batch_of([right, wrong, guess, open_end], tokenizer, cut=[open_end])
    found, ends = score_steps(batch, [SUM] * 4, tokenizer)
    assert found.shape == ends.shape == batch.response_mask.shape
    assert found.dtype == torch.float32 and ends.dtype == torch.bool

    # <think> 3 + 5 = 8 , 8 + 9 = 1 7 </think> <answer> 1 7 </answer> <eos>
    #       0 1 2 3 4 5 6 7 8 9 ...         13       14 15 16       17    18
    comma, closing = 6, 13
    expected = [
        {comma: 1.0, closing: 1.0, 18: 1.0},
        {comma: 0.0, closing: 1.0, 18: 0.0},
        {4: 1.0},  # the answer alone
        {comma: 1.0, 9: 0.0},  # cut off: the last token is the end of an answer that there is not
    ]
    for i, steps in enumerate(expected):
        assert ends[i].nonzero()[:, 0].tolist() == sorted(steps)
        assert {t: found[i, t].item() for t in steps} == steps
    assert not found[~ends].any()


def test_in_responses_of_the_tiny_model_steps_end_at_commas_and_at_the_tag(tiny, batch, prompts):
    """The prompts of the fixture are the first 12 held-out questions."""
    from data import load_task

    tokenizer = tiny[1]
    questions = load_task("arithmetic").test[:12]
    examples = [questions[i] for i in batch.prompt_index.tolist()]
    found, ends = score_steps(batch, examples, tokenizer)
    comma, closing = tokenizer.convert_tokens_to_ids([",", END])
    for i, length in enumerate(batch.lengths.tolist()):
        ids = batch.response_ids[i, :length].tolist()
        thinking = ids[: ids.index(closing)] if closing in ids else ids
        expected = {t for t, token in enumerate(thinking) if token == comma}
        if closing in ids[1:]:
            expected.add(len(thinking))
        expected.add(length - 1)
        assert set(ends[i].nonzero()[:, 0].tolist()) == expected
        assert found[i, length - 1] == is_right(batch.texts[i], examples[i])
    assert not found[~ends].any() and set(found[ends].tolist()) == {0.0, 1.0}
    assert (ends.sum(1) > 2).any() and (ends.sum(1) == 1).any()


class OtherTokens:
    """A tokenizer in whose tokens several characters stand together."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def batch(self, *responses):
        """A batch of these responses, lists of token ids; what is beyond their end is token 0."""
        width = max(map(len, responses))
        return SimpleNamespace(
            response_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in responses]),
            lengths=torch.tensor([len(ids) for ids in responses]),
            response_mask=torch.tensor([[t < len(ids) for t in range(width)] for ids in responses]),
            sampler_logp=torch.zeros(len(responses), width),
            texts=[self.decode(ids).removesuffix("<eos>") for ids in responses],
        )


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        # the comma in the middle of a token, which is the end of one step and the beginning of the next
        (["<think>3+5=", "8,8", "+9=1", "7</think><ans", "wer>17</answer>", "<eos>"], {1: 1, 3: 1, 5: 1}),
        # at the end of a token, at its beginning, and beside empty tokens
        (["<think>3+5=8,", "8+9=17", "</think>", "<answer>17</answer>", "<eos>"], {0: 1, 2: 1, 4: 1}),
        (["<think>3+5=8", ",8+9=17</", "think>", "<answer>17</answer>", "<eos>"], {1: 1, 2: 1, 4: 1}),
        (["", "<think>3+5=8,", "", "8+9=18</think>", "", "<answer>18</answer>", "<eos>"], {1: 1, 3: 0, 6: 0}),
        # the whole response in one token: the answer is what counts there
        (["<think>3+5=8,8+9=17</think><answer>18</answer>"], {0: 0}),
        (["<think>3+5=9,8+9=18</think><answer>17</answer>"], {0: 1}),
    ],
)
def test_a_step_ends_in_the_token_that_has_its_last_character(pieces, expected):
    tokenizer = OtherTokens(*pieces)
    ids = list(range(len(pieces)))
    batch = tokenizer.batch(ids, ids[-1:] * (len(ids) + 2))  # the other row is longer
    found, ends = score_steps(batch, [SUM] * 2, tokenizer)
    assert {t: int(found[0, t]) for t in ends[0].nonzero()[:, 0].tolist()} == expected
    assert not found[0][~ends[0]].any()


# --- the other new rewards ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0),
        ("a b c", 0),
        ("a a a", 0),  # three words are no run of four
        ("a b c d e f g h", 0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("a,b,c,d,a,b,c,d", 1 / 5),
        ("a, b,, c\n d a\tb c d", 1 / 5),
        ("1 1 1 1 1", 1 / 2),
        ("wait " * 13, 9 / 10),
        ("<think>3+5=8,8+9=17</think><answer>17</answer>", 0),
        ("<think>" + "3+5=8," * 6 + "</think>", 1 / 4),  # 7 words, of which the first and the last are others
    ],
)
def test_repetition_by_hand(response, expected):
    assert repetition(response, {}) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0),
        ("3+5=8, 8+9=17", 0),
        ("so it is eight", 0),
        ("naïve Straße", 0),
        ("abcд", 1 / 4),
        ("абвгдежзиdef", 1 / 4),  # most of them are Cyrillic
        ("abc def д з! 1234567890", 1 / 4),
        ("angle αβγδ of π", 0),  # Greek is maths
        ("αβγ", 0),
        ("abcбвгα", 1 / 2),
        ("漢字かなカナ", 0),
        ("漢字漢abc", 1 / 2),
        ("한국어abc", 1 / 2),
    ],
)
def test_mixed_language_by_hand(response, expected):
    assert mixed_language(response, {}) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("response", "finish_reason", "expected"),
    [
        ("a b c d e f", "stop", 0.0),
        ("a b c d e f", "length", 1.0),
        ("", "stop", 0.0),
        ("", "length", 1.0),
        ("a b c d a b c d", "stop", 0.0),  # .2
        ("1 1 1 1 1", "stop", 1.0),  # .5
        ("abcdefghi д", "stop", 0.0),  # .1
        ("abcdefgh д", "stop", 1.0),
        ("3+5=8 α", "stop", 0.0),
    ],
)
def test_a_bad_pattern_is_cut_off_or_repeats_or_mixes(response, finish_reason, expected):
    assert bad_pattern(response, {}, finish_reason) == expected


def test_exploration_rises_with_the_length_and_stays_below_1():
    values = [exploration("whatever", {}, [7] * n) for n in (*range(200), 10_000, 100_000)]
    assert values[0] == 0.0 and values[100] == 0.5 and values[10] == pytest.approx(1 / 11)
    assert all(0 <= x < 1 for x in values)
    assert values == sorted(set(values))
    assert exploration("", SUM, [7] * 10) == exploration("right or wrong", {}, [0] * 10)


def test_score_gives_these_rewards_what_they_ask_for():
    batch = answers(["<answer>17</answer>", "1 1 1 1 1", "<answer>17</answer>"])
    batch.finish_reasons = ["stop", "stop", "length"]
    batch.response_ids = torch.ones(3, 300, dtype=torch.long)
    batch.lengths = torch.tensor([100, 300, 25])
    scores = rewards.score(batch, [SUM] * 3, ["bad_pattern", "exploration", "repetition", "mixed_language"])
    assert scores["accuracy"] == [1.0, 0.0, 1.0]
    assert scores["bad_pattern"] == [0.0, 1.0, 1.0]
    assert scores["exploration"] == [0.5, 0.75, 0.2]
    assert scores["repetition"] == [0.0, 0.5, 0.0] and scores["mixed_language"] == [0.0] * 3
    weighted = rewards.weighted_sum(scores, {"accuracy": 1.0, "bad_pattern": -1.0})
    assert weighted == [1.0, -1.0, 0.0], "added to the reward, which a wrong response has none of"


@pytest.mark.parametrize("text", ["データ データ コーヒー", "人々", "5 µm", "x ∈ ℝ, 𝑥 = π", "ＡＢＣ abc"])
def test_forms_of_the_same_letters_are_no_mixture(text):
    assert mixed_language(text, {}) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<think>三加四等于七，所以答案是七。</think><answer>7</answer>",
        "因此答案是 \\boxed{12}",
        "设 x 为未知数，则 2x+3=7",
        "<think>Три плюс пять</think><answer>8</answer>",
    ],
)
def test_tags_and_maths_are_in_no_language(text):
    assert mixed_language(text, {}) == 0
    assert mixed_language(text + " we then compute", {}) > 0.2
