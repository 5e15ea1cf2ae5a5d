"""data.py: splits, files and their error lines, prompts, the draw of each step."""

import collections
import json
import re

import datasets
import pytest
from conftest import ROOT, outputs_with_other_hashes
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import grpo
import verifiers
from rewards import accuracy

PROCEDURAL = ["arithmetic", "arithmetic:2", "arithmetic:4", "arithmetic_words", "countdown", "countdown:2"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GSM8K_ROWS = [
    {
        "question": "Ann has 3 boxes of 4 pens and finds 2 more pens. How many pens has she?",
        "answer": "The boxes hold 3*4=<<3*4=12>>12 pens.\nShe has 12+2=<<12+2=14>>14 pens.\n#### 14",
    },
    {
        "question": "A house costs $900,000 and its garden $350,000. What do they cost together?",
        "answer": "Together 900000+350000=$<<900000+350000=1250000>>1,250,000.\n#### $1,250,000",
    },
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(examples):
    return [example["question"] for example in examples]


def make_tokenizer(chat_template=None):
    """One token per character, and <s> in front of every text unless special tokens are turned off."""
    vocabulary = {"<s>": 0, "<unk>": 1, "\n": 2} | {chr(code): code - 29 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    wrapped.chat_template = chat_template
    return wrapped


# --- procedural tasks ---


@pytest.mark.parametrize("name", PROCEDURAL)
def test_procedural_splits_are_disjoint_and_without_repeats(name):
    task = data.load_task(name)
    everything = questions(task.train + task.test)
    assert task.train and task.test
    assert len(set(everything)) == len(everything)
    assert all(character == "\n" or " " <= character <= "~" for question in everything for character in question)


def test_default_sizes_and_levels():
    task = data.load_task("arithmetic")
    assert (len(task.train), len(task.test)) == (8000, 512)
    assert collections.Counter(example["level"] for example in task.test) == {3: 128, 4: 128, 5: 128, 6: 128}
    shares = collections.Counter(example["level"] for example in task.train)
    assert set(shares) == {3, 4, 5, 6}
    assert 500 < shares[3] < 729  # there are only 729 sums of three digits
    assert max(shares[level] for level in (4, 5, 6)) - min(shares[level] for level in (4, 5, 6)) <= 1
    # Level 2 has only 81 questions, and all of them are used.
    assert len(data.load_task("arithmetic:2").train) + len(data.load_task("arithmetic:2").test) == 81


def test_a_question_held_out_at_one_setting_is_trained_on_at_none():
    held_out = set(questions(data.load_task("arithmetic:3").test + data.load_task("arithmetic:4").test))
    assert not held_out & set(questions(data.load_task("arithmetic").train))


@pytest.mark.parametrize(
    "name, levels", [("arithmetic:4", {4}), ("arithmetic:2-5", {2, 3, 4, 5}), ("arithmetic_words", {2, 3})]
)
def test_arithmetic_answers_and_levels(name, levels):
    task = data.load_task(name)
    for split in (task.train, task.test):
        assert {example["level"] for example in split} == levels
        for example in split:
            text = example["question"].split("What is ")[-1].rstrip("?=").replace(" ", "")
            digits = text.split("+")
            assert len(digits) == example["level"] and set(digits) <= set("123456789")
            assert example["answer"] == str(sum(int(digit) for digit in digits))
            assert example["verifier"] == "number"


def test_question_styles():
    for question in questions(data.load_task("arithmetic").test):
        assert question.endswith("=") and " " not in question
    for question in questions(data.load_task("arithmetic_words").test):
        assert question.count("What is ") == 3 and question.count("</answer>") == 2 and question.endswith("?")


def reachable(numbers):
    """All positive integers that some expression over exactly these numbers reaches (brute force)."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i in range(len(numbers)):
        for j in range(len(numbers)):
            if i == j:
                continue
            a, b = numbers[i], numbers[j]
            rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
            results = [a + b, a * b] + ([a - b] if a > b else []) + ([a // b] if a % b == 0 else [])
            for result in results:
                found |= reachable([*rest, result])
    return found


def test_countdown_is_solvable():
    task = data.load_task("countdown")
    assert not any(example["target"] in reachable([1, 2]) for example in task.test)  # the search does not accept all
    assert {example["level"] for example in task.test} == {3, 4}
    for example in task.test[:150] + task.train[:150]:
        assert example["target"] in reachable(example["numbers"])


def test_countdown_examples_are_well_formed():
    for example in data.load_task("countdown:2-5").train:
        numbers, target = example["numbers"], example["target"]
        assert len(numbers) == example["level"] and example["verifier"] == "countdown"
        assert 10 <= target <= 999 and target not in numbers
        assert all(f" {number}" in example["question"] for number in [target, *numbers])
        words = example["answer"].replace("(", " ").replace(")", " ").split()
        assert sorted(int(word) for word in words if word.isdigit()) == numbers
        assert eval(example["answer"]) == target


def test_tasks_do_not_depend_on_the_process():
    program = (
        "import data, hashlib\n"
        "for name in ['arithmetic', 'arithmetic_words', 'countdown:3']:\n"
        "    print(hashlib.md5(repr(data.load_task(name)).encode()).hexdigest())\n"
        "print(data.draw(list(range(50)), 7, 1, 20))\n"
    )
    one, other = outputs_with_other_hashes(program)
    assert one == other and len(one.splitlines()) == 4


@pytest.mark.parametrize("name", ["arithmetic:1", "arithmetic:6-3", "arithmetic:x", "arithmetic:3-99", "countdown:1"])
def test_bad_levels_are_refused(name):
    with pytest.raises(SystemExit, match=f"--task {name}: levels"):
        data.load_task(name)


def test_bad_task_and_bad_data_flag():
    with pytest.raises(SystemExit, match="arithmetic, arithmetic_words, countdown, gsm8k, math, qa"):
        data.load_task("arithmetics")
    with pytest.raises(SystemExit, match="drop --data"):
        data.load_task("arithmetic:3", ("questions.jsonl",))
    with pytest.raises(SystemExit, match="--task qa needs --data"):
        data.load_task("qa")
    with pytest.raises(SystemExit, match="--task math needs --data"):
        data.load_task("math", ("a.jsonl", "b.jsonl", "c.jsonl"))


# --- the same questions, changed a little ---


def numbers_of(example):
    """The numbers of a sum, in their order."""
    last_line = example["question"].rpartition("\n")[2]
    return [int(number) for number in re.findall("[0-9]+", last_line)]


def check_sum(example, in_words):
    """It is an example such as the task's own of these numbers."""
    assert example == data.arithmetic_example(numbers_of(example), in_words)
    assert example["answer"] == str(sum(numbers_of(example))) and ("tags" in example) != in_words
    if in_words:
        assert example["question"].count("What is ") == 3 and example["question"].endswith("?")
    else:
        assert re.fullmatch(r"[0-9+]+=", example["question"])


@pytest.mark.parametrize("task", ["arithmetic", "arithmetic:2-8", "arithmetic_words"])
def test_other_numbers_are_as_many_and_make_another_sum(task):
    examples = data.load_task(task).train[:300]
    changed = data.perturb(examples, "numbers")
    same = kept = 0
    for before, after in zip(examples, changed, strict=True):
        check_sum(after, in_words=task == "arithmetic_words")
        assert after["level"] == before["level"] and set(numbers_of(after)) <= set(range(1, 10))
        same += after["question"] == before["question"]
        kept += numbers_of(after)[:-1] == numbers_of(before)[1:]
    assert same < 10 and kept < 60, "by chance, of a short sum"
    assert set().union(*map(numbers_of, changed)) == set(range(1, 10))


@pytest.mark.parametrize("task", ["arithmetic", "arithmetic:2", "arithmetic_words"])
def test_another_order_has_the_same_numbers_and_the_same_answer(task):
    examples = data.load_task(task).train
    examples = examples[:300] + [e for e in examples if len(set(numbers_of(e))) == 1][:3]
    for before, after in zip(examples, data.perturb(examples, "order"), strict=True):
        check_sum(after, in_words=task == "arithmetic_words")
        assert sorted(numbers_of(after)) == sorted(numbers_of(before)) and after["answer"] == before["answer"]
        all_equal = len(set(numbers_of(before))) == 1
        assert (after["question"] == before["question"]) == all_equal
    assert all_equal, "one of them was asked"


@pytest.mark.parametrize(("task", "level"), [("arithmetic", 7), ("arithmetic:8", 9), ("arithmetic_words", 4)])
def test_longer_sums_go_on_and_have_one_number_more_than_any_of_these(task, level):
    examples = data.load_task(task).train[:300]
    for before, after in zip(examples, data.perturb(examples, "longer"), strict=True):
        check_sum(after, in_words=task == "arithmetic_words")
        assert after["level"] == len(numbers_of(after)) == level
        assert numbers_of(after)[: before["level"]] == numbers_of(before)


@pytest.mark.parametrize("how", data.PERTURBATIONS)
def test_countdown_questions_stay_solvable_however_they_are_changed(how):
    examples = data.load_task("countdown").train[:200]
    moved = 0
    for before, after in zip(examples, data.perturb(examples, how), strict=True):
        numbers, target = after["numbers"], after["target"]
        assert after == data.countdown_example(numbers, after["answer"], target)
        assert 10 <= target <= 999 and target not in numbers and len(numbers) == after["level"]
        assert accuracy(f"<answer>{after['answer']}</answer>", after) == 1
        assert accuracy(f"<answer>{after['answer']} + 1</answer>", after) == 0
        if how == "order":
            assert sorted(numbers) == before["numbers"] != numbers and target == before["target"]
        elif how == "longer":
            assert len(numbers) == 5 and not collections.Counter(before["numbers"]) - collections.Counter(numbers)
        else:
            assert len(numbers) == before["level"]
        moved += numbers != before["numbers"]
    assert moved > 190


def test_changed_questions_do_not_depend_on_the_process_or_on_their_neighbours():
    program = (
        "import data\n"
        "for name in ['arithmetic', 'arithmetic_words', 'countdown:3']:\n"
        "    for how in data.PERTURBATIONS:\n"
        "        print(data.perturb(data.load_task(name).train[:20], how))\n"
    )
    one, other = outputs_with_other_hashes(program)
    assert one == other and len(one.splitlines()) == 9
    examples = data.load_task("arithmetic:4").train[:20]
    before = json.dumps(examples)
    for how in data.PERTURBATIONS:
        assert data.perturb(examples[5:10], how) == data.perturb(examples, how)[5:10]
    assert json.dumps(examples) == before, "the examples themselves are not changed"


# --- tasks from files and from the Hub ---


def test_all_examples_of_a_file_are_read_in_its_order(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": i + 1, "system": "Add."} for i in (5, 3, 4, 3)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    examples = data.read_examples(path, "qa")
    assert questions(examples) == ["5 + 1?", "3 + 1?", "4 + 1?", "3 + 1?"], "the repeat too: its partner may differ"
    assert examples == [data.to_example(row, "qa", "here") for row in rows]
    assert {example["verifier"] for example in data.read_examples(path, "math")} == {"math"}
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"question": "?"}])
    with pytest.raises(SystemExit, match='a.jsonl:5: no "answer"'):
        data.read_examples(path, "qa")


def test_of_a_set_on_the_hub_the_test_split_is_read_and_else_the_train_split(monkeypatch):
    hub = {"train": [{"problem": "b", "answer": "1"}, {"problem": "a", "answer": "2"}]}
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: hub)
    assert questions(data.read_examples("someone/some-set", "math")) == ["b", "a"]
    hub["test"] = [{"problem": "d", "answer": "3"}, {"problem": "c", "answer": "4"}]
    assert questions(data.read_examples("someone/some-set", "math")) == ["d", "c"]


def test_gsm8k_format(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", GSM8K_ROWS[:1])
    test = write_jsonl(tmp_path / "test.jsonl", GSM8K_ROWS[1:])
    task = data.load_task("gsm8k", (train, test))
    assert task.train == [{**GSM8K_ROWS[0], "answer": "14", "verifier": "number", "solution": GSM8K_ROWS[0]["answer"]}]
    assert task.test[0]["answer"] == "1250000"


@pytest.mark.parametrize(
    "task, text, answer, verifier",
    [
        ("qa", "17", "17", "number"),
        ("qa", "-3.5", "-3.5", "number"),
        ("qa", "2,500", "2500", "number"),
        ("qa", "1,2", "1,2", "math"),
        ("qa", "x+1", "x+1", "math"),
        ("qa", "six\n#### 6", "6", "number"),
        ("math", "17", "17", "math"),
        ("math", "\\frac{1}{2}", "\\frac{1}{2}", "math"),
        ("qa", "$.50", ".50", "number"),
        ("qa", "$", "$", "math"),
    ],
)
def test_answers_and_verifiers(task, text, answer, verifier):
    example = data.to_example({"problem": " Q? ", "solution": text}, task, "here")
    assert (example["question"], example["answer"], example["verifier"]) == ("Q?", answer, verifier)


def test_an_answer_may_be_a_number(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(20)))
    task = data.load_task("qa", (str(path),))
    assert all(example["answer"] == str(int(example["question"].split()[0]) + 1) for example in task.train)


def test_one_file_is_split_and_repeats_are_dropped(tmp_path, capsys):
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(200)]
    rows += [{"question": " What is  7 + 1?\n", "answer": "8"}] * 3
    path = write_jsonl(tmp_path / "qa.jsonl", rows)
    task = data.load_task("qa", (path,))
    assert (len(task.train), len(task.test)) == (180, 20)
    assert not set(questions(task.train)) & set(questions(task.test))
    assert "3 repeated questions" in capsys.readouterr().out
    assert data.load_task("qa", (path,)) == task


def test_held_out_file_wins_over_train(tmp_path):
    rows = [{"prompt": f"Question {i}", "response": str(i)} for i in range(6)]
    train, test = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[4:])
    task = data.load_task("qa", (train, test))
    assert questions(task.train) == [f"Question {i}" for i in range(4)]
    assert questions(task.test) == ["Question 4", "Question 5"]
    with pytest.raises(SystemExit, match="no question is left to train on"):
        data.load_task("qa", (train, train))
    with pytest.raises(SystemExit, match="no question is left to train on"):
        data.load_task("qa", (write_jsonl(tmp_path / "one.jsonl", rows[:1]),))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"question": "q", "answer": ', "not JSON"),
        (b'["q", "a"]', "not a JSON object"),
        (b'{"answer": "1"}', 'no "question"'),
        (b'{"question": "q"}', 'no "answer"'),
        (b'{"question": "  ", "answer": "1"}', '"question" must be non-empty text'),
        (b'{"question": "q", "answer": ""}', '"answer" must be non-empty text'),
        (b'{"question": "q", "answer": true}', '"answer" must be non-empty text or a number, not True'),
        (b'{"question": ["q"], "answer": "5"}', '"question" must be non-empty text'),
        (b'{"question": "q", "answer": null}', '"answer" must be non-empty text'),
        (b'{"question": "q", "answer": "long #### "}', "nothing after ####"),
        (b'{"question": "caf\xe9", "answer": "1"}', "not valid UTF-8"),
        (b'{"question": "\\ud83d", "answer": "1"}', "not valid UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    good = b'{"question": "caf\xc3\xa9?", "answer": "1"}\n'
    path.write_bytes(good + b"\n" + good + line + b"\n" + good)  # the blank line counts
    with pytest.raises(SystemExit) as caught:
        data.load_task("qa", (str(path),))
    assert str(caught.value).startswith(f"{path}:4: ") and message in str(caught.value)
    assert ("; the file's columns: [" in str(caught.value)) == message.startswith("no ")
    assert "\n" not in str(caught.value)


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(SystemExit, match="empty.jsonl is empty"):
        data.load_task("qa", (str(tmp_path / "empty.jsonl"),))
    with pytest.raises(SystemExit, match="cannot read .*missing.jsonl: No such file"):
        data.load_task("gsm8k", (str(tmp_path / "missing.jsonl"),))
    with pytest.raises(SystemExit, match="cannot read"):
        data.load_task("qa", (str(tmp_path),))


def test_without_network_the_message_names_the_data_flag(monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for name, source in (("gsm8k", "openai/gsm8k"), ("math", "hiyouga/math12k")):
        with pytest.raises(SystemExit, match="Couldn't reach the Hub.*--data path.jsonl") as caught:
            data.load_task(name)
        assert "\n" not in str(caught.value)
        assert capsys.readouterr().out == f"loading {source} from the Hub ...\n", "before the library tries and tries"


def test_hub_sources(monkeypatch):
    asked = []
    hub = {"train": [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]}

    def load_dataset(name, config):
        asked.append((name, config))
        return hub

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = data.load_task("math")
    assert sorted(questions(task.train + task.test)) == ["a", "b"]  # no test split: one of the two is held out
    hub["test"] = [{"problem": "b", "answer": "2"}, {"problem": "c", "answer": "3"}]
    task = data.load_task("gsm8k")
    assert (questions(task.train), questions(task.test)) == (["a"], ["b", "c"])
    data.load_task("qa", ("someone/some-set",))
    assert asked == [("hiyouga/math12k", None), ("openai/gsm8k", "main"), ("someone/some-set", None)]
    hub["test"] = [{"problem": "b", "answer": ["2"]}]
    with pytest.raises(SystemExit, match="openai/gsm8k:main, test row 0: "):
        data.load_task("gsm8k")
    hub.clear()
    with pytest.raises(SystemExit, match="neither a train nor a test split"):
        data.load_task("gsm8k")


# --- what users' files hold ---


def qa(answer, task="qa"):
    return data.to_example({"question": "q", "answer": answer}, task, "here")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (1e-5, "0.00001"),
        (1e16, "10000000000000000"),
        (0.1 + 0.2, "0.30000000000000004"),
        (0.10000000149011612, "0.10000000149011612"),  # a float32 of .1, as Parquet files have it
        (-2.5, "-2.5"),
        (10**20, "100000000000000000000"),
        (12.0, "12.0"),
    ],
)
def test_an_answer_that_is_a_number_is_that_number_exactly(value, answer):
    example = qa(value)
    assert (example["answer"], example["verifier"]) == (answer, "number")
    assert accuracy(f"<answer>{answer}</answer>", example) == 1
    assert accuracy(f"<answer>{answer}1</answer>", example) == 0


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "true", "null", "[5]", '{"value": 5}'])
def test_an_answer_that_is_no_number_and_no_text_is_refused(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "q", "answer": {value}}}\n')
    with pytest.raises(SystemExit, match=r'a.jsonl:1: "answer" must be non-empty text or a number'):
        data.load_task("qa", (str(path),))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5.", "5"),
        ("40 €", "40"),
        ("€40", "40"),
        ("１２", "12"),
        ("−5", "-5"),
        ("–5", "-5"),
        ("-$1,250.50", "-1250.50"),
    ],
)
def test_a_plain_number_is_read_however_it_is_written(text, answer):
    example = qa(text)
    assert (example["answer"], example["verifier"]) == (answer, "number")
    assert accuracy(f"<answer>{answer}</answer>", example) == 1


def test_plain_words_are_compared_as_words():
    example = qa("New York")
    assert example["verifier"] == "text"
    assert accuracy("<answer>new york</answer>", example) == 1 and accuracy("<answer>York</answer>", example) == 0


def test_answers_that_can_hardly_be_matched_are_counted_and_one_is_shown(tmp_path, capsys):
    answers = ["2/3 cup", "1.000,50", "a solution without a box, that is $5$", "5", "x+1", "\\frac{1}{2}", "Paris"]
    answers += ["\\text{even}", "\\boxed{7} is the answer that we looked for", "(-\\infty, 3)", "x " * 101]
    rows = [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]
    data.load_task("qa", (write_jsonl(tmp_path / "a.jsonl", rows),))
    said = capsys.readouterr().out
    assert "data: 4 answers are neither a number nor a formula nor plain words, such as " in said
    data.load_task("qa", (write_jsonl(tmp_path / "b.jsonl", rows[3:8]),))
    assert capsys.readouterr().out == ""


def test_several_boxes_in_a_solution_are_counted(tmp_path, capsys):
    rows = [
        {"problem": "a", "solution": "first $\\boxed{1}$, then $\\boxed{2}$"},
        {"problem": "b", "solution": "hence $\\boxed{3}$"},
    ]
    task = data.load_task("math", (write_jsonl(tmp_path / "a.jsonl", rows),))
    assert capsys.readouterr().out == "data: 1 solutions have several boxes; the last one counts as the answer\n"
    example = next(example for example in task.train + task.test if example["question"] == "a")
    assert accuracy("\\boxed{2}", example) == 1 and accuracy("\\boxed{1}", example) == 0


def test_columns_that_say_something_are_named(tmp_path, capsys):
    rows = [{"question": "Which one?", "answer": "a", "choices": [i], "context": f"text {i}"} for i in range(20)]
    rows += [{"question": "And which?", "answer": "b"}]
    data.load_task("qa", (write_jsonl(tmp_path / "a.jsonl", rows),))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "data: the columns choices, context are not shown to the model; write what it needs into the question"
    )
    assert said[1] == "data: 19 repeated questions were left out"


def test_csv_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"1, 2 or 3?",2\n"a ""word""?",None\n"half?",0.5\n')
    task = data.load_task("qa", (str(tmp_path / "a.csv"),))
    found = {example["question"]: example["answer"] for example in task.train + task.test}
    assert found == {"1, 2 or 3?": "2", 'a "word"?': "None", "half?": "0.5"}
    (tmp_path / "a.csv").write_text("question,answer\nedited,7\ntwice,8\n")
    task = data.load_task("qa", (str(tmp_path / "a.csv"),))
    assert {example["question"] for example in task.train + task.test} == {"edited", "twice"}, "no stale copy"

    table = datasets.Dataset.from_dict({"problem": ["a", "b", "c"], "answer": [1e-5, 2.0, 0.25]})
    table.to_parquet(tmp_path / "a.parquet")
    task = data.load_task("qa", (str(tmp_path / "a.parquet"),))
    found = {example["question"]: example["answer"] for example in task.train + task.test}
    assert found == {"a": "0.00001", "b": "2.0", "c": "0.25"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\nq,\n", 'a.csv, row 1: "answer" must be non-empty text or a number'),
        ("a.csv", b"question\nq\n", r"""a.csv, row 1: no "answer".*; the file's columns: \['question'\]$"""),
        ("a.csv", b"question;answer\nq;1\n", r"columns: \['question;answer'\] \(is it separated by commas\?\)$"),
        ("a.csv", b"question\tanswer\nq\t1\n", r"columns: \['question\\tanswer'\] \(is it separated by commas\?\)$"),
        ("a.csv", b"question,answer\n", "cannot read .*a.csv .*no data"),
        ("a.csv", b"", "cannot read .*a.csv"),
        ("a.csv", b'question,answer\n"q,1\n', "a.csv"),
        ("a.parquet", b"no parquet", "cannot read .*a.parquet"),
        ("empty.parquet", b"", "cannot read .*empty.parquet .*no data"),
        ("a.parquet", None, "cannot read .*a.parquet: there is no such file"),
    ],
)
def test_tables_that_cannot_be_read_are_one_clear_line(tmp_path, name, content, message):
    if name == "empty.parquet":
        datasets.Dataset.from_dict({"question": [], "answer": []}).to_parquet(tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message) as error:
        data.load_task("qa", (str(tmp_path / name),))
    assert "\n" not in str(error.value)


# --- prompts ---

EXAMPLE = {"question": "Is {x} 3+5?", "answer": "8", "verifier": "number"}


def test_resolve_template_and_stop_strings():
    plain, chat = make_tokenizer(), make_tokenizer(CHAT_TEMPLATE)
    assert data.resolve_template(plain, "auto") == "plain"
    assert data.resolve_template(chat, "auto") == "chat"
    assert data.resolve_template(chat, "plain") == "plain"
    assert data.stop_strings(chat, "plain") == [] and data.stop_strings(plain, "plain") == []
    assert data.stop_strings(chat, "r1") == ["</answer>"] and data.stop_strings(plain, "r1") == ["</answer>"]
    assert data.stop_strings(chat, "chat") == []
    assert data.stop_strings(chat, "auto") == data.stop_strings(plain, "auto") == []
    with pytest.raises(SystemExit, match="no chat template; use --template r1 or plain"):
        data.encode_prompt(EXAMPLE, plain, "chat")
    with pytest.raises(SystemExit, match="choose from auto, plain, r1, chat"):
        data.resolve_template(plain, "R1")
    with pytest.raises(SystemExit, match="no chat template"):
        data.stop_strings(plain, "chat")


def test_rendered_prompts():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert data.render_prompt(EXAMPLE, tokenizer, "plain") == EXAMPLE["question"]
    r1 = data.render_prompt(EXAMPLE, tokenizer, "r1")
    assert EXAMPLE["question"] in r1 and r1.endswith("Assistant:\n")  # <think> is left to the model
    chat = data.render_prompt(EXAMPLE, tokenizer, "chat")
    assert chat.startswith("<s>[user]" + EXAMPLE["question"]) and chat.endswith("[assistant]")
    assert data.render_prompt(EXAMPLE, tokenizer, "auto") == chat


@pytest.mark.parametrize("template", ["plain", "r1", "chat"])
def test_prompts_start_with_exactly_one_bos(template):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    ids = data.encode_prompt(EXAMPLE, tokenizer, template)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.unk_token_id not in ids
    rendered = data.render_prompt(EXAMPLE, tokenizer, template)
    assert tokenizer.decode(ids) == (rendered if template == "chat" else "<s>" + rendered)
    if template == "chat":
        messages = [{"role": "user", "content": EXAMPLE["question"]}]
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_too_long_prompts_are_counted_and_left_out(capsys):
    tokenizer = make_tokenizer()
    examples = [{"question": "x" * length, "answer": "1", "verifier": "number"} for length in (3, 4, 5, 6)]
    kept = data.encode_prompts(examples, tokenizer, "plain", max_prompt_tokens=5)  # <s> counts
    assert questions(kept) == ["xxx", "xxxx"]
    assert kept[0]["prompt_ids"] == data.encode_prompt(examples[0], tokenizer, "plain")
    assert "prompt_ids" not in examples[0]
    assert capsys.readouterr().out == (
        "data: 2 of 4 training prompts are longer than --max-prompt-tokens 5 and were left out\n"
    )
    assert len(data.encode_prompts(examples, tokenizer, "plain", 100, split="test")) == 4
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="all test prompts are longer than --max-prompt-tokens 3"):
        data.encode_prompts(examples, tokenizer, "plain", 3, split="test")


def test_describe_shows_the_prompt_as_the_model_sees_it():
    task = data.Task("tiny", [EXAMPLE], [EXAMPLE, EXAMPLE])
    text = data.describe(task, make_tokenizer(CHAT_TEMPLATE), "auto")
    assert "tiny: 1 training and 2 held-out questions" in text
    assert "<s>[user]Is {x} 3+5?" in text and "[assistant]" in text and "answer: 8" in text
    assert "plain (the tokenizer has no chat template)" in data.describe(task, make_tokenizer(), "auto")


# --- system texts ---

WITH_SYSTEM = {"question": "Is 3+5 8?", "system": "Be brief."}


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}<model>",
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% endif %}{% endfor %}<model>",
    ],
)
def test_a_system_text_that_a_template_refuses_or_drops_stands_before_the_question(template):
    tokenizer = make_tokenizer(template)
    assert data.render_prompt(WITH_SYSTEM, tokenizer, "chat") == "<user>Be brief.\n\nIs 3+5 8?<model>"
    assert data.render_prompt(EXAMPLE, tokenizer, "chat") == f"<user>{EXAMPLE['question']}<model>"


def test_a_system_text_has_its_role_where_there_is_one():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert data.render_prompt(WITH_SYSTEM, tokenizer, "chat") == "<s>[system]Be brief.[user]Is 3+5 8?[assistant]"
    assert data.render_prompt(WITH_SYSTEM, tokenizer, "plain") == "Be brief.\n\nIs 3+5 8?"


def test_a_template_that_refuses_a_question_names_it():
    tokenizer = make_tokenizer("{{ raise_exception('no\nwords') }}")
    with pytest.raises(SystemExit, match="the template refuses the question 'Be brief") as error:
        data.render_prompt(WITH_SYSTEM, tokenizer, "chat")
    assert "\n" not in str(error.value)


def test_the_prompt_may_open_the_thinking(capsys):
    tokenizer = make_tokenizer(CHAT_TEMPLATE.replace("[assistant]", "[assistant]<think>\n"))
    assert data.answer_form(EXAMPLE, tokenizer, "chat") == {"tags": False, "opened": True}
    assert data.answer_form(EXAMPLE, tokenizer, "r1") == {"tags": True, "opened": False}
    assert data.answer_form(EXAMPLE, tokenizer, "plain") == {"tags": False, "opened": False}
    task = data.Task("tiny", [EXAMPLE], [EXAMPLE])
    assert "the prompt opens <think>" in data.describe(task, tokenizer, "auto")


# --- which prompts a step sees ---


@pytest.mark.parametrize("size, n", [(12, 4), (10, 4), (7, 7), (7, 5), (5, 1), (3, 8)])
def test_draw_walks_through_permutations(size, n):
    examples = list(range(size))
    steps = [data.draw(examples, n, seed=0, step=step) for step in range(1, 4 * size + 1)]
    assert all(len(drawn) == n for drawn in steps)
    if n <= size:
        assert all(len(set(drawn)) == n for drawn in steps)
    walk = sum(steps, [])
    for start in range(0, len(walk) - size + 1, size):
        assert sorted(walk[start : start + size]) == examples


def test_draw_is_a_pure_function_of_seed_and_step():
    examples = list(range(100))
    forwards = [data.draw(examples, 10, seed=1, step=step) for step in range(1, 31)]
    backwards = [data.draw(examples, 10, seed=1, step=step) for step in range(30, 0, -1)]
    assert forwards == backwards[::-1]
    assert forwards != [data.draw(examples, 10, seed=2, step=step) for step in range(1, 31)]
    assert sum(forwards[:10], []) != sum(forwards[10:20], [])  # another order in the second epoch
    assert examples == list(range(100))


# --- a run that goes on ---


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    def rows(n):
        return [{"question": f"{i}+{i}=", "answer": str(n * i)} for i in range(1, 9)]

    path = write_jsonl(tmp_path / "qa.jsonl", rows(2))
    flags = {"model": str(ROOT / "tiny"), "task": "qa", "data": (path,), "max_new_tokens": 8, "eval_samples": 1}
    flags |= {"prompts_per_step": 2, "group_size": 2, "eval_every": 0, "out": str(tmp_path / "run")}
    grpo.main(grpo.Config(**flags, steps=1))
    resumed = grpo.Config(**flags, steps=2, resume=str(tmp_path / "run"))
    write_jsonl(tmp_path / "qa.jsonl", rows(3))
    with pytest.raises(SystemExit, match="its data has changed since the run began") as error:
        grpo.main(resumed)
    assert "\n" not in str(error.value)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2, "nothing was lost"
    write_jsonl(tmp_path / "qa.jsonl", rows(2))
    grpo.main(resumed)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


# --- the judge ---


@pytest.mark.parametrize(("name", "answer", "started"), [("math", "x^2", 1), ("qa", "5", 0), ("qa", "Paris", 0)])
def test_the_judge_starts_with_the_questions_of_a_task_that_needs_it(tmp_path, monkeypatch, name, answer, started):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": answer} for i in range(40)])
    starts = []
    monkeypatch.setattr(verifiers, "math_worker", verifiers.MathWorker())
    monkeypatch.setattr(verifiers.MathWorker, "start", lambda self: starts.append(1))
    config = grpo.Config(task=name, data=(path,))
    data.encode_task(data.read_task(config), config, AutoTokenizer.from_pretrained(ROOT / "tiny"), None)
    assert len(starts) == started
