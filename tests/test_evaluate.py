"""evaluate.py: its numbers are a run's own and those of a count by hand; what it asks, writes and refuses."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, make_sampler, read_jsonl, run_script
from matplotlib.image import imread

import evaluate
import grpo
import rewards
from data import encode_prompts, load_task, read_examples
from logprobs import load_policy
from plumbing.checkpoint import save_model
from plumbing.evaluation import answer
from rewards import accuracy
from verifiers import final_answers

TINY = str(ROOT / "tiny")
METRICS = ["greedy", "pass@1", "pass@8", "majority@8", "format", "length", "unchecked", "truncated"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Without --out the folder is made where one is."""
    monkeypatch.chdir(tmp_path)


def config_of(*models, **flags):
    """Flags of an evaluation that takes a second."""
    return evaluate.Config(models=models or (TINY,), **{"eval_prompts": 8, "max_new_tokens": 48} | flags)


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(size: int, start: int = 1) -> list[dict]:
    return [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(start, start + size)]


def questions(examples) -> list[str]:
    return [example["question"] for example in examples]


def refusal(config) -> str:
    """What evaluate.py says in one line when it refuses."""
    with pytest.raises(SystemExit) as error:
        evaluate.main(config)
    assert error.value.code == 2 and "\n" not in str(error.value)
    return str(error.value)


def means_of(config) -> dict:
    """Metric -> its mean over all held-out questions, for the one model of this evaluation."""
    found = evaluate.evaluate(config.models[0], config, evaluate.question_sets(config))
    return {metric: mean for metric, (mean, _) in evaluate.rows_of(found)["held out"].items()}


# --- the numbers ---


@pytest.mark.parametrize(("prompts", "k"), [(8, 8), (7, 3)])
def test_the_numbers_are_those_of_a_run_to_the_digit(tmp_path, prompts, k):
    flags = {"task": "arithmetic:3", "eval_prompts": prompts, "eval_samples": k, "max_new_tokens": 40}
    flags |= {"temperature": 0.9}
    steps = {"steps": 1, "prompts_per_step": 4, "group_size": 4, "lr": 1e-3}
    grpo.main(grpo.Config(out=str(tmp_path / "run"), model=TINY, **flags, **steps))
    before, after = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    means = means_of(config_of(str(tmp_path / "run" / "model"), **flags))
    for ours, theirs in {"pass@1": "eval_pass@1", f"pass@{k}": f"eval_pass@{k}", "greedy": "eval_accuracy"}.items():
        assert means[ours] == after[theirs], ours
    for ours, theirs in {"format": "eval_format", "length": "eval_response_length"}.items():
        # Those of a question are averaged first. That rounds, unless k is a power of two.
        assert means[ours] == (after[theirs] if k == 8 else pytest.approx(after[theirs], rel=1e-14)), ours
    assert 0 < after["eval_pass@1"] < after[f"eval_pass@{k}"]
    assert means["length"] != before["eval_response_length"], "the step has changed something"


def test_every_number_of_a_question_is_that_of_a_count_by_hand(tiny):
    """Of real responses; whether one is right, and what it answers, is asked anew."""
    k = 6
    examples = encode_prompts(load_task("arithmetic:3").test[:8], tiny[1], "plain", 64)
    answers = answer(make_sampler(*tiny, max_new_tokens=24), examples, k, 1.0)
    found = [evaluate.numbers(answers, i, example, k) for i, example in enumerate(examples)]
    for i, example in enumerate(examples):
        rows = range(i * k, (i + 1) * k)
        texts = [answers.sampled.texts[row] for row in rows]
        right = [accuracy(text, example) for text in texts]
        expected = {"question": example["question"], "level": example["level"]}
        expected["greedy"] = accuracy(answers.greedy.texts[i], example)
        for size in (1, k):
            subsets = list(itertools.combinations(right, size))
            expected[f"pass@{size}"] = sum(map(any, subsets)) / len(subsets)
        votes = [final_answers(text, example) for text in texts]
        winner = max((vote for vote in votes if vote), key=votes.count, default=None)
        expected[f"majority@{k}"] = float(winner is not None and right[votes.index(winner)])
        expected["format"] = sum(float(score) for score in answers.scores["format"][i * k : (i + 1) * k]) / k
        expected["length"] = sum(int(answers.sampled.response_mask[row].sum()) for row in rows) / k
        expected["unchecked"] = sum(answers.scores.unchecked[i * k : (i + 1) * k]) / k
        expected["truncated"] = sum(answers.sampled.finish_reasons[row] == "length" for row in rows) / k
        assert found[i] == pytest.approx(expected, abs=1e-12)
    for metric in ("pass@1", f"pass@{k}", f"majority@{k}", "format", "length", "truncated"):
        assert len({numbers[metric] for numbers in found}) > 1, "or nothing is compared"


def test_numbers_of_a_question_are_of_its_own_samples():
    right = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    texts = [f"<answer>{x}</answer>" for x in "788" + "577"]
    sampled = SimpleNamespace(
        texts=texts,
        lengths=torch.tensor([10, 20, 30, 4, 5, 6]),
        finish_reasons=["length", "stop", "stop", "length", "length", "stop"],
    )
    scores = rewards.Scores({"accuracy": right, "format": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]})
    scores.unchecked = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    answers = SimpleNamespace(sampled=sampled, scores=scores, greedy_scores={"accuracy": [0.0, 1.0]})
    example = {"question": "3+4=", "answer": "7", "verifier": "number"}
    assert evaluate.numbers(answers, 0, example, 3) == {
        "question": "3+4=",
        "level": None,
        "greedy": 0.0,
        "pass@1": pytest.approx(1 / 3),
        "pass@3": 1.0,
        "majority@3": 0.0,
        "format": pytest.approx(2 / 3),
        "length": 20.0,
        "unchecked": pytest.approx(1 / 3),
        "truncated": pytest.approx(1 / 3),
    }
    second = evaluate.numbers(answers, 1, example, 3)
    assert (second["greedy"], second["majority@3"], second["length"]) == (1.0, 1.0, 5.0)


def test_the_error_is_the_std_over_the_questions_by_the_root_of_their_number():
    values = np.random.default_rng(0).random(50)
    mean, error = evaluate.mean_and_error(values.tolist())
    assert mean == pytest.approx(values.mean(), abs=1e-15)
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50), abs=1e-15)
    assert evaluate.mean_and_error([0.25]) == (0.25, 0.0)


def table_of(level_and_value) -> list[dict]:
    return [{"question": f"q{i}", "level": level, "pass@1": x} for i, (level, x) in enumerate(level_and_value)]


def test_there_is_a_row_for_each_level():
    rows = evaluate.rows_of({"held out": table_of([(4, 1.0), (3, 0.0), (4, 0.5), (3, 0.0), (4, 0.0)])})
    assert list(rows) == ["held out", "held out, 3 numbers", "held out, 4 numbers"]
    assert rows["held out"]["pass@1"] == evaluate.mean_and_error([1.0, 0.0, 0.5, 0.0, 0.0])
    assert rows["held out, 3 numbers"] == {"pass@1": (0.0, 0.0)}
    assert rows["held out, 4 numbers"]["pass@1"] == (0.5, pytest.approx(0.5 / math.sqrt(3)))
    assert list(evaluate.rows_of({"a.jsonl": table_of([(None, 1.0), (None, 0.0)])})) == ["a.jsonl"]


def test_the_error_of_a_difference_is_that_of_the_paired_differences():
    rng = np.random.default_rng(1)
    first = rng.random(30)
    second = first - 0.2 + 0.01 * rng.random(30)  # a difficult question has a difficult partner
    found = {name: table_of([(None, x) for x in values]) for name, values in (("a", first), ("b", second))}
    rows = evaluate.rows_of(found)
    assert list(rows) == ["a", "b", "difference"]
    mean, error = rows["difference"]["pass@1"]
    assert mean == pytest.approx(second.mean() - first.mean(), abs=1e-12)
    assert error == pytest.approx((second - first).std(ddof=1) / math.sqrt(30), abs=1e-12)
    unpaired = math.hypot(rows["a"]["pass@1"][1], rows["b"]["pass@1"][1])
    assert error < unpaired / 10


# --- which questions ---


def test_one_file_is_asked_in_its_order_with_repeats_and_up_to_the_limit(tmp_path):
    rows = [*sums(5, start=3), *sums(5)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    sets = evaluate.question_sets(config_of(task="qa", data=(path,), eval_prompts=100))
    assert list(sets) == [path] and questions(sets[path]) == questions(rows)
    assert sets[path] == read_examples(path, "qa")
    sets = evaluate.question_sets(config_of(task="qa", data=(path,), eval_prompts=4))
    assert questions(sets[path]) == questions(rows[:4])


def test_two_files_are_partners_line_by_line(tmp_path):
    original = write_jsonl(tmp_path / "original.jsonl", sums(6))
    perturbed = write_jsonl(tmp_path / "perturbed.jsonl", sums(6, start=20))
    sets = evaluate.question_sets(config_of(task="qa", data=(original, perturbed), eval_prompts=5))
    assert list(sets) == [original, perturbed], "so the difference is that of the second to the first"
    assert questions(sets[original]) == questions(sums(5))
    assert questions(sets[perturbed]) == questions(sums(5, start=20))


def test_files_that_are_no_pair_are_refused(tmp_path):
    six, five = write_jsonl(tmp_path / "six.jsonl", sums(6)), write_jsonl(tmp_path / "five.jsonl", sums(5))
    said = refusal(config_of(task="qa", data=(six, five)))
    assert said == "--data: one source, or two with as many questions each; these have [5, 6]"
    third = write_jsonl(tmp_path / "third.jsonl", sums(6))
    fourth = write_jsonl(tmp_path / "fourth.jsonl", sums(6))
    said = refusal(config_of(task="qa", data=(six, third, fourth)))
    assert said.startswith("--data: one source, or two with as many questions each")
    assert "cannot read no/such.jsonl" in refusal(config_of(task="qa", data=(six, "no/such.jsonl")))


def test_without_data_the_held_out_questions_of_the_task_are_asked():
    for task in ("arithmetic", "countdown:3", "arithmetic_words"):
        sets = evaluate.question_sets(config_of(task=task, eval_prompts=50))
        assert sets == {"held out": load_task(task).test[:50]}
    assert "unknown --task arithmetics" in refusal(config_of(task="arithmetics"))


def terms(question: str) -> list[int]:
    return [int(number) for number in re.findall("[0-9]+", question)]


@pytest.mark.parametrize("how", ["numbers", "order", "longer"])
def test_perturbed_questions_stand_beside_those_trained_on(how):
    task = load_task("arithmetic")
    sets = evaluate.question_sets(config_of(perturb=how, eval_prompts=60))
    assert list(sets) == ["trained on", how]
    assert sets["trained on"] == task.train[:60] and len(sets[how]) == 60
    for trained, changed in zip(*sets.values(), strict=True):
        before, after = terms(trained["question"]), terms(changed["question"])
        if how == "order":
            assert sorted(after) == sorted(before)
        elif how == "numbers":
            assert len(after) == len(before)
        else:
            assert after[: len(before)] == before and len(after) == 7


def test_longer_is_longer_than_anything_in_training_however_few_are_asked():
    for prompts in (1, 2, 60):
        sets = evaluate.question_sets(config_of(task="arithmetic:2-5", perturb="longer", eval_prompts=prompts))
        assert len(sets["longer"]) == prompts and {example["level"] for example in sets["longer"]} == {6}


@pytest.mark.parametrize("task", ["arithmetic:4", "arithmetic_words"])
@pytest.mark.parametrize("how", ["numbers", "order"])
def test_most_perturbed_questions_are_not_trained_on(task, how):
    """Or one who has learned the training questions by heart would not lose."""
    trained = set(questions(load_task(task).train))
    sets = evaluate.question_sets(config_of(task=task, perturb=how, eval_prompts=128))
    assert sum(question in trained for question in questions(sets[how])) < 64


def test_perturb_is_refused_where_no_program_makes_the_questions(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", sums(20))
    said = refusal(config_of(task="qa", data=(path,), perturb="numbers"))
    assert said.startswith("--perturb") and "--data ORIGINAL PERTURBED" in said


def test_perturb_of_a_set_from_the_hub_is_refused(monkeypatch):
    hub = {"train": sums(20), "test": sums(5, start=50)}
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: hub)
    said = refusal(config_of(task="gsm8k", perturb="order"))
    assert said == "--perturb: --task gsm8k is not made by a program; give two files, --data ORIGINAL PERTURBED"
    assert questions(evaluate.question_sets(config_of(task="gsm8k"))["held out"]) == questions(hub["test"])


def test_a_pair_of_which_one_prompt_is_too_long_is_refused(tmp_path):
    original = write_jsonl(tmp_path / "a.jsonl", sums(6))
    rows = sums(6)
    rows[2]["question"] = "1+" * 40 + "1="
    perturbed = write_jsonl(tmp_path / "b.jsonl", rows)
    flags = {"task": "qa", "eval_samples": 1, "max_prompt_tokens": 30}
    assert "its partner would be alone" in refusal(config_of(data=(original, perturbed), **flags))
    found = evaluate.evaluate(TINY, config_of(**flags), {"b": read_examples(perturbed, "qa")})
    assert len(found["b"]) == 5, "alone it is left out"


# --- a question of one's own ---


def asked(capsys, question: str, **flags) -> str:
    evaluate.main(config_of(ask=question, **flags))
    return capsys.readouterr().out


def test_a_sum_is_answered_with_rewards_and_the_log_prob_of_every_token(tiny, capsys, tmp_path):
    out = tmp_path / "out"
    said = asked(capsys, "3+4+5=", eval_samples=3, out=str(out))
    example = evaluate.asked("3+4+5=")
    assert (example["answer"], example["level"], example["tags"]) == ("12", 3, True)
    examples = encode_prompts([example], tiny[1], "plain", 64)
    batch = answer(make_sampler(*tiny, max_new_tokens=48), examples, 3, 1.0).sampled
    for i, text in enumerate(batch.texts):
        length = int(batch.lengths[i])
        logps = batch.sampler_logp[i, :length].tolist()
        scores = f"accuracy {accuracy(text, example):g}, format [01], {length} tokens, log-prob {sum(logps):.2f}"
        tokens = [
            f"{tiny[1].decode([token])!r} {logp:.2f}"
            for token, logp in zip(batch.response_ids[i, :length].tolist(), logps, strict=True)
        ]
        shown = re.escape(f"\n{text}\n    ") + scores + re.escape("\n    " + " | ".join(tokens) + "\n")
        assert re.search(shown, said), shown
    assert len(re.findall(r"tokens, log-prob -", said)) == 3
    assert not out.exists(), "to ask writes nothing"


@pytest.mark.parametrize("question", ["3+4+5", "What is 3+4?", "12"])
def test_of_another_question_no_answer_is_known_so_no_accuracy_is_shown(capsys, question):
    said = asked(capsys, question, eval_samples=1, max_new_tokens=8)
    assert re.search(r"\n    format [01], \d tokens, log-prob -\d", said) and "accuracy" not in said


def test_two_models_can_be_asked(capsys):
    evaluate.main(config_of(TINY, TINY, ask="1+2=", eval_samples=1, max_new_tokens=8))
    first, second = re.findall(r"accuracy [01], format [01], \d tokens, log-prob \S+", capsys.readouterr().out)
    assert first == second


# --- what it writes and refuses ---


def check_written(folder, models, rows) -> None:
    """The table has a line for each of these rows of each model, and the picture is there."""
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[0] == "| | " + " | ".join(METRICS) + " |"
    assert {line.count("|") for line in lines} == {len(METRICS) + 2}
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == [f"{model}: {row}" for model in models for row in rows]
    number = r"-?\d[\d.e+-]*"
    for line in lines[2:]:
        cells = line.removesuffix(" |").split(" | ")[1:]
        assert all(re.fullmatch(f"{number} ± {number}", cell) for cell in cells), line
    pixels = imread(folder / "bars.png")[..., :3]
    for colour in np.array([[0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00]])[: len(models)] / 255:
        assert (np.abs(pixels - colour).max(-1) < 0.02).sum() > 500, "bars, not only axes and text"


def test_a_table_a_picture_and_all_numbers_are_written(tmp_path, capsys):
    out = tmp_path / "out"
    config = config_of(perturb="longer", eval_prompts=3, max_new_tokens=32, out=str(out))
    evaluate.main(config)
    said = capsys.readouterr().out
    saved = json.loads((out / "questions.json").read_text())
    assert list(saved) == [TINY] and list(saved[TINY]) == ["trained on", "longer"]
    rows = evaluate.rows_of(saved[TINY])
    assert list(rows)[-2:] == ["longer, 7 numbers", "difference"]
    check_written(out, [TINY], list(rows))
    assert (out / "table.md").read_text() in said and str(out) in said
    lines = (out / "table.md").read_text().splitlines()[2:]
    for line, row in zip(lines, rows.values(), strict=True):
        assert line.endswith(" | ".join(["", *(f"{mean:.3g} ± {error:.2g}" for mean, error in row.values())]) + " |")
    for numbers in saved[TINY]["longer"]:
        assert list(numbers) == ["question", "level", *METRICS] and numbers["level"] == 7


def test_every_flag_is_in_the_help(capsys):
    for help_flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as stop:
            tyro.cli(evaluate.Config, args=[help_flag], description=evaluate.__doc__)
        said = capsys.readouterr().out
        assert stop.value.code == 0 and "evaluate.py tiny runs/grpo/model" in said
        for field in dataclasses.fields(evaluate.Config):
            shown = "folders, adapters or Hub" if field.name == "models" else "--" + field.name.replace("_", "-")
            assert shown in said, field.name


@pytest.mark.parametrize("model", ["./no/such/folder", "no-such/name-on-the-hub"])
def test_a_model_that_is_not_there_is_one_clear_line(model, tmp_path):
    said = refusal(config_of(model, out=str(tmp_path / "out")))
    assert model in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [{"eval_samples": 0}, {"eval_prompts": 0}, {"temperature": 0.0}])
def test_a_number_that_cannot_be_meant_is_refused(flags):
    name = next(iter(flags)).replace("_", "-")
    assert refusal(config_of(**flags)).startswith(f"--{name} ")


def test_more_tokens_than_the_model_has_positions_are_refused(tiny):
    """As in a run: beyond them what it writes means nothing."""
    positions = tiny[0].positions
    said = refusal(config_of(eval_prompts=1, eval_samples=1, max_new_tokens=positions))
    assert f"the model has {positions} positions" in said


def test_it_has_at_most_180_lines():
    assert len((ROOT / "evaluate.py").read_text().splitlines()) <= 180


def test_an_adapter_is_evaluated_as_the_model_it_makes(tmp_path):
    policy, tokenizer = load_policy(TINY, torch.device("cpu"), lora_rank=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.trained():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    save_model(tmp_path, policy, tokenizer, base=TINY)
    flags = {"eval_prompts": 4, "eval_samples": 2, "max_new_tokens": 32}
    start, adapter, merged = (
        means_of(config_of(model, **flags)) for model in (TINY, str(tmp_path / "adapter"), str(tmp_path / "model"))
    )
    assert adapter == merged != start


@pytest.mark.slow
def test_two_models_side_by_side_from_the_command_line(tmp_path):
    flags = ["--eval-prompts", 8, "--max-new-tokens", 48]
    run = tmp_path / "run"
    training = ["--steps", 1, "--eval-every", 0, "--prompts-per-step", 4, "--lr", 1e-3, *flags]
    run_script("grpo.py", "--lora-rank", 4, "--out", run, *training)
    models = [TINY, str(run / "adapter")]
    result = run_script("evaluate.py", *models, *flags, "--out", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "questions.json").read_text())
    assert list(saved) == models and saved[models[0]] != saved[models[1]]
    check_written(tmp_path / "out", models, list(evaluate.rows_of(saved[TINY])))
    assert (tmp_path / "out" / "table.md").read_text() in result.stdout
    here = config_of()
    assert saved[TINY] == evaluate.evaluate(TINY, here, evaluate.question_sets(here)), "wherever it is computed"
    last = read_jsonl(run / "metrics.jsonl")[-1]
    for metric, name in (("pass@1", "eval_pass@1"), ("greedy", "eval_accuracy"), ("length", "eval_response_length")):
        mean = evaluate.rows_of(saved[models[1]])["held out"][metric][0]
        assert mean == pytest.approx(last[name], abs=1e-12), "the adapter is the policy at the end of its run"


@pytest.fixture(scope="module")
def one_is_missing(tmp_path_factory):
    """What the script says where the first of two models is not there."""
    out = tmp_path_factory.mktemp("missing") / "out"
    result = run_script("evaluate.py", "no/such/folder", TINY, "--eval-prompts", 4, "--out", out, check=False)
    assert not out.exists()
    return result


@pytest.mark.slow
def test_one_of_two_models_that_is_not_there_is_one_clear_line(one_is_missing):
    assert one_is_missing.returncode == 2 and "Traceback" not in one_is_missing.stderr
    assert one_is_missing.stderr.count("--model no/such/folder cannot be loaded") == 1


@pytest.mark.slow
def test_no_other_model_is_evaluated_in_vain_after_that(one_is_missing):
    assert f"{TINY}, held out" not in one_is_missing.stderr
