"""rewards.py: the named rewards as tables and on hostile text, weights and scores, and pass@k by brute force."""

import itertools

import pytest
from conftest import answers
from test_verifiers import COUNTDOWN, HOSTILE, bounded_time, example, random_responses, tagged

import rewards
import verifiers

# --- accuracy, format, tagged, r1_zero ---


@pytest.mark.parametrize(("answer", "expected"), [("18.0", 1.0), ("17", 0.0), ("", 0.0)])
def test_accuracy_is_a_number(answer, expected):
    value = rewards.accuracy(tagged(answer), example("number", "18"))
    assert value == expected
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" \n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n ", 1.0),
        ("a</think><answer>b</answer>", 0.0),  # unless the prompt opened the thinking
        ("<think></think><answer>b</answer>", 1.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a</think><answer> \n</answer>", 0.0),
        ("<think>a</think>b<answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer>c", 0.0),
        ("<think>a</think><answer>b</answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer>\n\nSo it is b.", 0.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
        ("<answer>b</answer>", 0.0),
        ("<answer>b</answer></think>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</think></answer>", 0.0),
        ("<think>a <answer>b</answer></think><answer>c</answer>", 0.0),
        ("<THINK>a</THINK><ANSWER>b</ANSWER>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, expected):
    assert rewards.thinks_then_answers(response, {}) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("a</think><answer>b</answer>", 1.0),
        ("\na\n</think>\n\n<answer>b</answer>", 1.0),
        ("</think><answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer>", 0.0),  # a second <think>
        ("<answer>b</answer>", 0.0),
        ("a", 0.0),
    ],
)
def test_format_where_the_prompt_opened_the_thinking(response, expected):
    assert rewards.thinks_then_answers(response, {"opened": True}) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>7</answer>", 1.0),
        ("4 + 3 is <answer>7</answer>\n", 1.0),
        ("<answer>7</answer> and more", 0.0),
        ("<answer>7", 0.0),
        ("7</answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("<answer>6</answer><answer>7</answer>", 0.0),
        ("<answer><answer>7</answer>", 0.0),
        ("7", 0.0),
        ("", 0.0),
    ],
)
def test_tagged(response, expected):
    assert rewards.tagged(response, {}) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [(tagged("18"), 1.0), (tagged("17"), 0.0), ("<answer>18</answer>", 0.0), ("18", 0.0), ("<think>so", 0.0)],
)
def test_r1_zero_needs_both(response, expected):
    assert rewards.r1_zero(response, example("number", "18")) == expected


# --- hostile text ---


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_scores_zero_in_bounded_time(case):
    for name in ("accuracy", "format", "r1_zero"):
        with bounded_time():
            value = rewards.REWARDS[name](HOSTILE[case], COUNTDOWN)
        # Some of these are well-formed in their way; none is right.
        assert value == (1.0 if name == "format" and HOSTILE[case].startswith("<think>so</think>") else 0.0)


def test_fuzz_numbers_countdown_and_format():
    responses, names = list(random_responses(1, 5000)), list(rewards.REWARDS)
    for ex in (example("number", "18"), COUNTDOWN):
        values = rewards.score(answers(responses), [ex] * len(responses), names)
        assert all(0 <= value <= 1 for column in values.values() for value in column)
        shares = ("exploration", "repetition", "mixed_language")
        yes_or_no = [column for name, column in values.items() if name not in shares]
        assert all(value in (0.0, 1.0) for column in yes_or_no for value in column)
        both = [min(pair) for pair in zip(values["format"], values["accuracy"], strict=True)]
        assert values["r1_zero"] == both
    assert 0 < sum(values["format"]) < len(responses)


# --- the registry, weights, score, pass@k ---


def test_parse_weights():
    assert rewards.parse_weights(("accuracy=1", "format=0.2")) == {"accuracy": 1.0, "format": 0.2}
    assert rewards.parse_weights(["r1_zero"]) == {"r1_zero": 1.0}
    assert rewards.parse_weights(["format=-1e-1"]) == {"format": -0.1}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["acuracy=1"], "unknown reward 'acuracy' (did you mean 'accuracy'?); choose from: "),
        (["waits=1"], "unknown reward 'waits'; choose from: "),
        (["waits=1"], "; a new one is a function in rewards.py with @reward on the line above it"),
        ([""], "unknown reward ''"),
        (["accuracy=1,short=0.2"], "bad weight in 'accuracy=1,short=0.2'"),
        (["accuracy=1,short=0.2"], "; separate rewards by spaces"),
        (
            ["accuracy,format"],
            "unknown reward 'accuracy,format' (did you mean 'accuracy'?); separate rewards by spaces",
        ),
        (["accuracy=much"], "bad weight in 'accuracy=much'"),
        (["accuracy="], "bad weight"),
        (["accuracy=1=2"], "bad weight"),
        (["accuracy=nan"], "bad weight"),
        (["accuracy=inf"], "bad weight"),
        (["accuracy", "format", "accuracy=2"], "'accuracy' is named twice"),
        ([], "no reward named"),
    ],
)
def test_parse_weights_says_what_is_wrong(specs, message):
    with pytest.raises(SystemExit) as error:
        rewards.parse_weights(specs)
    text = str(error.value)
    assert message in text and "\n" not in text
    assert all(name in text for name in rewards.REWARDS)
    assert ("separate rewards by spaces" in text) == any("," in spec for spec in specs)


@pytest.fixture
def register(monkeypatch):
    """Register rewards for one test only."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    return rewards.reward


def test_a_new_reward_is_one_function(register):
    @register
    def length(response, example):
        return len(response)

    assert rewards.parse_weights(["length=2"]) == {"length": 2.0}
    values = rewards.score(answers(["18", "#### 17"]), [example("number", "18")] * 2, ["length", "accuracy"])
    assert values == {"length": [2.0, 7.0], "accuracy": [1.0, 0.0]}
    assert all(isinstance(value, float) for column in values.values() for value in column)
    assert rewards.weighted_sum(values, {"length": -0.5, "accuracy": 2.0}) == [1.0, -3.5]
    assert rewards.weighted_sum(values, {"accuracy": 1.0}) == [1.0, 0.0]


def test_a_reward_replaces_no_other(register):
    with pytest.raises(SystemExit, match="rewards.py: there already is a reward 'accuracy'; give yours another name"):

        @register
        def accuracy(response, example):
            return 1.0

    assert rewards.REWARDS["accuracy"] is rewards.accuracy


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (lambda response, example, length: 0, "unknown argument 'length'"),
        (lambda response, example, tokens, *, text: 0, "unknown argument 'text'"),
        (lambda response: 0, "too many positional arguments"),
        (lambda response, tokens: 0, "multiple values for argument 'tokens'"),
        (lambda response, example, finish_reason, tokens: 0, ""),
        (lambda text, row, limit=3, **more: 0, ""),
    ],
)
def test_the_arguments_of_a_reward_are_checked_with_its_weight(register, function, wrong):
    function.__name__ = "odd"
    register(function)
    if not wrong:
        assert rewards.parse_weights(["odd=0.5"]) == {"odd": 0.5}
        assert rewards.score(answers(["x"]), [example("number", "1")], ["odd"])["odd"] == [0.0]
        return
    rule = "it may have (response, example) and, by these names, tokens and finish_reason"
    with pytest.raises(SystemExit) as error:
        rewards.parse_weights(["odd=0.5"])
    assert str(error.value) == f"reward 'odd': {wrong}; {rule}"


@pytest.mark.parametrize("returned", [None, "much", "0.5", [1.0], 10**400, float("nan"), float("inf")])
def test_a_reward_that_returns_no_number_ends_the_run(register, monkeypatch, capsys, returned):
    @register
    def odd(response, example):
        return returned

    monkeypatch.setenv("RANK", "1")  # said by any process: only one may have met it
    with pytest.raises(SystemExit) as error:
        rewards.score(answers(["x"]), [example("number", "1")], ["accuracy", "odd"])
    assert str(error.value) == f"reward 'odd' returned {returned!r:.40}; return a number on every path"
    assert error.value.code == 2 and capsys.readouterr().err == f"{error.value}\n"


def test_score_names_a_reward_that_raises(register):
    @register
    def broken(response, example):
        return example["missing"]

    with pytest.raises(RuntimeError, match="reward 'broken' failed: KeyError: 'missing'") as error:
        rewards.score(answers(["x"]), [example("number", "1")], ["broken"])
    assert isinstance(error.value.__cause__, KeyError)


def test_what_cannot_be_checked_is_0_and_counted(monkeypatch):
    def check(response, example):
        if response.endswith("?</answer>"):
            raise verifiers.Unchecked("too long")
        return True

    monkeypatch.setattr(rewards, "is_right", check)
    responses = [tagged("1"), tagged("?"), tagged("?"), "1"]
    examples = [example("math", "1")] * 4
    scores = rewards.score(answers(responses), examples, ["r1_zero", "format"])
    assert scores == {"accuracy": [1.0, 0.0, 0.0, 1.0], "r1_zero": [1.0, 0.0, 0.0, 0.0], "format": [1.0, 1.0, 1.0, 0.0]}
    assert scores.unchecked == [0.0, 1.0, 1.0, 0.0]
    assert rewards.weighted_sum(scores, {"accuracy": 1.0, "format": 0.5}) == [1.5, 0.5, 0.5, 1.0]
    arguments = [1.0, 0.0, 0.0, 1.0], scores, [3, 3, 3, 3], ["stop"] * 4, 2
    assert rewards.rollout_metrics(*arguments)["unchecked"] == 0.0
    metrics = rewards.rollout_metrics(*arguments, unchecked=scores.unchecked)
    assert list(metrics)[-1] == "unchecked" and metrics["unchecked"] == 0.5 and metrics["accuracy"] == 0.5
    metrics = rewards.evaluation_metrics([1.0], scores, [3, 3, 3, 3], 4)
    assert metrics["eval_unchecked"] == 0.0 and metrics["eval_reward/r1_zero"] == 0.25
    metrics = rewards.evaluation_metrics([1.0], scores, [3, 3, 3, 3], 4, unchecked=scores.unchecked)
    assert metrics["eval_unchecked"] == 0.5


def test_score_needs_one_example_per_response():
    with pytest.raises(ValueError, match="shorter"):
        rewards.score(answers(["1", "2"]), [example("number", "1")], ["accuracy"])


def test_pass_at_k_against_all_subsets():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                hits = sum(any(i < correct for i in subset) for subset in subsets)
                assert rewards.pass_at_k(n, correct, k) == pytest.approx(hits / len(subsets), abs=1e-12)
    assert rewards.pass_at_k(10**4, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses(n, correct, k):
    with pytest.raises(ValueError, match="pass@k"):
        rewards.pass_at_k(n, correct, k)


# --- what the majority says, and how sure ---


@pytest.mark.parametrize(
    ("texts", "right", "expected"),
    [
        (["7", "8", "7"], [1, 0, 1], True),
        (["8", "7", "8"], [0, 1, 0], False),
        (["7", "8"], [1, 0], True),  # as frequent: the first
        (["8", "7"], [0, 1], False),
        (["9", "8", "7", "7", "8"], [0, 0, 1, 1, 0], False),  # 8 comes before 7
        (["9", "7", "8", "8", "7"], [0, 1, 0, 0, 1], True),
        (["7"], [1], True),
        ([None, None], [0, 0], False),
        ([None, None, None, "7"], [0, 0, 0, 1], True),  # no answer, no vote
        ([None, "8", None, "7", "7"], [0, 0, 0, 1, 1], True),
        (["7", "7.0", "8", "8"], [1, 1, 0, 0], False),  # as text 7 and 7.0 differ
    ],
)
def test_the_answer_that_most_responses_give_counts(texts, right, expected):
    responses = ["<think>7" if text is None else tagged(text) for text in texts]
    right = [float(x) for x in right]
    assert right == [rewards.accuracy(response, example("number", "7")) for response in responses]
    assert rewards.majority_is_right(responses, right, example("number", "7")) is expected


def test_several_boxes_are_one_vote_and_spaces_make_no_other():
    both = r"\boxed{0.50} or \boxed{0.5}"
    half = example("number", "0.5")
    assert verifiers.final_answers(both, half) == ["0.50", "0.5"]
    three, alone = r"\boxed{3}", r"\boxed{0.5}"
    assert [rewards.accuracy(text, half) for text in (three, both, alone)] == [0.0, 1.0, 1.0]
    assert rewards.majority_is_right([three, both, alone], [0.0, 1.0, 1.0], half) is False, "three votes of one each"
    assert rewards.majority_is_right([three, both, both], [0.0, 1.0, 1.0], half) is True
    spaced = [tagged("3"), tagged(" 0.5"), tagged("0.5 ")]
    assert rewards.majority_is_right(spaced, [0.0, 1.0, 1.0], half) is True


def test_only_an_answer_in_the_form_of_the_question_votes():
    responses = ["The answer is 8.", "The answer is 8.", tagged("7")]
    seven = example("number", "7")
    assert rewards.majority_is_right(responses, [0.0, 0.0, 1.0], seven) is False
    assert rewards.majority_is_right(responses, [0.0, 0.0, 1.0], seven | {"tags": True}) is True


def test_calibration_error_against_a_table_worked_by_hand():
    """10 bins from .5 to 1, each .05 wide."""
    table = [  # confidence, right
        (0.52, 1), (0.54, 0),  # bin 0: 1.06 expected, 1 right
        (0.72, 1), (0.74, 1),  # bin 4: 1.46 and 2
        (0.81, 1),  # bin 6: .81 and 1
        (0.96, 1), (1.0, 0),  # bin 9, which has 1 too: 1.96 and 1
    ]  # fmt: skip
    confidence, right = zip(*table, strict=True)
    bins = rewards.calibration_bins(confidence, right, 10, low=0.5)
    assert [len(held) for held in bins] == [2, 0, 0, 0, 2, 0, 1, 0, 0, 2]
    assert bins[9] == [(0.96, 1), (1.0, 0)]
    expected = (0.06 + 0.54 + 0.19 + 0.96) / 7
    assert rewards.calibration_error(confidence, right, low=0.5) == pytest.approx(expected, abs=1e-12)
    assert rewards.calibration_error(confidence, right, bins=1, low=0.5) == pytest.approx(0.29 / 7, abs=1e-12)
    shuffled = [table[i] for i in (6, 0, 3, 5, 1, 4, 2)]
    again = rewards.calibration_error(*zip(*shuffled, strict=True), low=0.5)
    assert again == pytest.approx(expected, abs=1e-12), "whatever the order"


def test_calibration_error_of_the_sure_and_of_those_who_say_how_often_they_are_right():
    assert rewards.calibration_error([1.0] * 4, [1.0] * 4, low=0.5) == 0
    assert rewards.calibration_error([1.0] * 4, [0.0] * 4, low=0.5) == 1
    assert rewards.calibration_error([0.75] * 4, [1.0, 0.0, 1.0, 1.0], low=0.5) == 0
    assert rewards.calibration_error([0.0, 0.04, 0.96], [0.0, 0.0, 1.0]) == pytest.approx(0.08 / 3)


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_a_border_belongs_to_the_bin_above_and_1_to_the_last(low):
    borders = [low + (1 - low) * i / 10 for i in range(11)]
    bins = rewards.calibration_bins(borders, [1.0] * 11, 10, low)
    assert [[c for c, _ in held] for held in bins] == [[c] for c in borders[:9]] + [borders[9:]]
