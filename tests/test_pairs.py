"""pairs.py: preference pairs that are read or sampled, demonstrations, and the batches of both."""

import json
import re

import pytest
import torch
from conftest import load_pairs

import data
import pairs
import sft
from batch import collate
from dpo import Config, verified_pairs
from logprobs import batch_logprobs
from pairs import Reference, encode_pairs, pair_batch, read_pairs, read_preferences
from rewards import accuracy


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i, **more):
    return {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | more


def prompts_of(pairs):
    return [pair["prompt"] for pair in pairs]


# --- preference pairs from a file or from the Hub ---


def test_pairs_from_a_file(tmp_path, tiny, capsys):
    tokenizer = tiny[1]
    path = write(tmp_path / "a.jsonl", *(pair(i) for i in range(30)))
    train, test = load_pairs(Config(data=(path,), max_new_tokens=7), tokenizer)
    assert len(train) == 27 and len(test) == 3 and not set(prompts_of(train)) & set(prompts_of(test))
    again, _ = load_pairs(Config(data=(path,), seed=5), tokenizer)
    assert set(prompts_of(again)) == set(prompts_of(train)), "whatever the seed"
    first = next(p for p in train + test if p["prompt"] == "p1")
    assert tokenizer.decode(first["prompt_ids"]) == "p1"
    assert first["chosen_ids"] == tokenizer.encode("good 1") + [tokenizer.eos_token_id]
    assert first["rejected_ids"] == tokenizer.encode("bad 1") + [tokenizer.eos_token_id]
    cut = next(p for p in train + test if p["prompt"] == "p12")
    assert cut["chosen_ids"] == tokenizer.encode("good 12")
    said = dict(re.findall(r"data: (\d+) (.*) responses are longer than --max-new-tokens 7", capsys.readouterr().out))
    counts = {"training": sum(int(p["prompt"][1:]) >= 10 for p in train)}
    counts["held-out"] = 20 - counts["training"]  # "good 10" and all that follow have 8 tokens
    assert {split: int(count) for count, split in said.items()} == {k: n for k, n in counts.items() if n}


def test_a_second_source_is_held_out(tmp_path, tiny):
    a, b = write(tmp_path / "a.jsonl", pair(1), pair(2)), write(tmp_path / "b.jsonl", pair(2), pair(3))
    train, test = load_pairs(Config(data=(a, b)), tiny[1])
    assert prompts_of(train) == ["p1"] and prompts_of(test) == ["p2", "p3"]
    with pytest.raises(SystemExit, match="one source of pairs, or two"):
        read_pairs((a, b, a))


def test_no_more_pairs_are_held_out_than_asked_for(tmp_path, tiny):
    a, b = write(tmp_path / "a.jsonl", pair(1)), write(tmp_path / "b.jsonl", *(pair(i) for i in range(2, 9)))
    train, test = load_pairs(Config(data=(a, b), eval_prompts=3), tiny[1])
    assert prompts_of(train) == ["p1"] and prompts_of(test) == ["p2", "p3", "p4"]


def test_no_pair_of_a_training_prompt_is_lost(tmp_path, tiny, capsys):
    path = write(tmp_path / "a.jsonl", *(pair(i % 20, chosen=f"good {i}") for i in range(200)))
    train, test = load_pairs(Config(data=(path,)), tiny[1])
    assert len(train) == 180 and len(test) == 20 and len(set(prompts_of(test))) == 2
    assert not set(prompts_of(train)) & set(prompts_of(test))
    path = write(tmp_path / "b.jsonl", *(pair(i) for i in range(20)), pair(30, rejected="good 30"))
    train, test = load_pairs(Config(data=(path,)), tiny[1])
    assert len(train) + len(test) == 20
    assert re.search("data: 1 (training|held-out) pairs have equal responses", capsys.readouterr().out)


def test_conversations_and_system_prompts(tmp_path, tiny, capsys):
    user, good = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}
    talk = {"chosen": [user, good], "rejected": [user, {"role": "assistant", "content": "bad"}]}
    system = {"role": "system", "content": "be brief"}
    with_system = {name: [system, *messages] for name, messages in talk.items()}
    longer = {name: [user, good, *messages] for name, messages in talk.items()}
    path = write(tmp_path / "a.jsonl", talk, pair(1, system="be kind"), with_system, longer, {"prompt": [user], **talk})
    (first, second, third, fourth), _ = read_preferences(path)
    assert (first["prompt"], first["chosen"], first["rejected"], first["system"]) == ("hi", "good", "bad", "")
    assert (third["prompt"], third["chosen"], third["system"]) == ("hi", "good", "be brief") and fourth == first
    said = capsys.readouterr().out
    assert said == f"data: 1 rows of {path} are conversations of several turns and were left out\n"
    with pytest.raises(SystemExit, match='a.jsonl:1: "system" must be text'):
        read_preferences(write(tmp_path / "a.jsonl", pair(1, system=["x"])))
    assert data.render_prompt(second, tiny[1], "plain") == "be kind\n\np1"
    for broken in (["x"], [], [{"role": "user"}]):
        with pytest.raises(SystemExit, match=r"a.jsonl:1: a conversation is a list"):
            read_preferences(write(tmp_path / "a.jsonl", pair(1, chosen=broken)))


def test_pairs_from_the_hub(monkeypatch, tiny):
    import datasets

    splits = {"train": [pair(1), pair(2)], "test": [pair(2), pair(3)]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits if name == "some/pairs" else {})
    train, test = load_pairs(Config(data=("some/pairs",)), tiny[1])
    assert prompts_of(train) == ["p1"] and prompts_of(test) == ["p2", "p3"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "p", "chosen": "c"}], 'no "rejected"'),
        ([pair(1, rejected="")], '"rejected" must be non-empty text'),
        ([pair(1)], "no pair is left to train on"),
    ],
)
def test_bad_pairs_are_one_clear_line(tmp_path, rows, words, tiny):
    with pytest.raises(SystemExit, match=words) as error:
        load_pairs(Config(data=(write(tmp_path / "a.jsonl", *rows),)), tiny[1])
    assert "\n" not in str(error.value)


def test_pairs_are_read_without_a_tokenizer(tmp_path):
    """So that wrong data end a run before the weights are loaded."""
    train, test = read_pairs((write(tmp_path / "a.jsonl", *(pair(i) for i in range(20))),))
    assert sorted(prompts_of(train + test)) == sorted(f"p{i}" for i in range(20)) and len(test) == 2
    assert not any(name.endswith("_ids") for one in train + test for name in one)


def test_pairs_longer_than_the_models_positions_are_one_clear_line(tmp_path, tiny):
    config = Config(data=(write(tmp_path / "a.jsonl", *(pair(i) for i in range(20))),))
    train, test = read_pairs(config.data)
    longest = len(tiny[1].encode("p19good 19")) + 1
    encode_pairs(train, test, config, tiny[1], longest)
    with pytest.raises(SystemExit, match=f"up to {longest} tokens together, and the model has {longest - 1} positions"):
        encode_pairs(train, test, config, tiny[1], longest - 1)


# --- conversations that are no pair ---


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(*messages):
    """A conversation and its last words in two ways: chosen and rejected."""
    return {"chosen": [*messages, assistant("good")], "rejected": [*messages, assistant("bad")]}


PART_EARLY = {
    "in a system text": {"chosen": [{"role": "system", "content": "s"}, *talk(user("hi"))["chosen"]]},
    "in the question": talk(user("ho")) | {"chosen": [user("hi"), assistant("good")]},
    "in an earlier answer": talk(user("a"), assistant("b"), user("c"))
    | {"rejected": [user("a"), assistant("x"), user("c"), assistant("bad")]},
    "one has no question": {"chosen": [user("hi"), assistant("good")], "rejected": [assistant("bad")]},
    "the prompt is another one": talk(user("hi")) | {"prompt": [user("ho")]},
    "a user has the last word": {"chosen": [user("hi"), user("good")], "rejected": [user("hi"), user("bad")]},
}


@pytest.mark.parametrize("row", PART_EARLY.values(), ids=PART_EARLY)
def test_conversations_that_part_early_are_left_out_and_counted(tmp_path, capsys, row):
    path = write(tmp_path / "a.jsonl", talk(user("hi")), talk(user("hi")) | row)
    found, _ = read_preferences(path)
    assert len(found) == 1 and found[0]["chosen"] == "good"
    assert capsys.readouterr().out == (
        f"data: 1 rows of {path} were left out: their conversations differ before the last message, "
        "or do not end with the assistant's\n"
    )


@pytest.mark.parametrize("before", [[user("a"), assistant("b"), user("c")], [user("a"), user("b")], [assistant("a")]])
def test_conversations_of_several_turns_are_left_out_and_counted(tmp_path, capsys, before):
    path = write(tmp_path / "a.jsonl", talk(user("hi")), talk(*before))
    assert len(read_preferences(path)[0]) == 1
    assert "data: 1 rows of" in capsys.readouterr().out


def test_a_prompt_that_is_a_conversation_with_responses_that_are_its_continuation(tmp_path, capsys):
    system = {"role": "system", "content": "be brief"}
    only = {"chosen": [assistant("good")], "rejected": [assistant("bad")]}
    rows = [{"prompt": [system, user("hi")]} | only, {"prompt": "hi"} | only, pair(1, prompt=[user("hi")])]
    first, second, third = read_preferences(write(tmp_path / "a.jsonl", *rows))[0]
    assert (first["prompt"], first["system"], first["chosen"]) == ("hi", "be brief", "good")
    assert (second["prompt"], second["system"], second["rejected"]) == ("hi", "", "bad")
    assert (third["question"], third["chosen"]) == ("hi", "good 1")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "hi"}], 5])
def test_a_message_whose_content_is_no_text_is_one_clear_line(tmp_path, content):
    path = write(tmp_path / "a.jsonl", talk(user("hi")), talk({"role": "user", "content": content}))
    for read in (read_preferences, pairs.read_demonstrations):
        with pytest.raises(SystemExit, match='a.jsonl:2: the "content" of a message must be text'):
            read(path)


# --- preference pairs of a model's own responses ---


def test_sampled_pairs_are_what_they_say(tiny, sampler):
    tokenizer = tiny[1]
    questions = data.encode_prompts(data.load_task("arithmetic").train[:70], tokenizer, "plain", 64)
    sampled = pairs.sample_pairs(Config(group_size=8), sampler, questions, verified_pairs, seed=0)
    assert len(sampled) > 40 and len(set(prompts_of(sampled))) == len(sampled)
    examples = {question["question"]: question for question in questions}
    for one in sampled:
        example = examples[one["prompt"]]
        assert one["prompt_ids"] == example["prompt_ids"]
        assert accuracy(one["chosen"], example) == 1 and accuracy(one["rejected"], example) == 0
        for name in ("chosen", "rejected"):
            ids = one[f"{name}_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == one[name]
            assert (ids[-1] == tokenizer.eos_token_id) or len(ids) == 64
    batch = pair_batch(sampled[:5], tokenizer, torch.device("cpu"))
    assert batch.texts == [one[name] for one in sampled[:5] for name in ("chosen", "rejected")]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_chosen_pairs_are_rows_of_their_own_group(tiny):
    texts = [["7", "8", "9"], ["1", "22", "333"]]  # the answers are 8 and 333
    ids = [tiny[1].encode(text) for group in texts for text in group]
    batch = collate([[5], [6]], ids, [[0.0] * len(x) for x in ids], ["stop"] * 6, tiny[1], "cpu")
    questions = [
        {"question": f"q{i}", "answer": answer, "verifier": "number", "prompt_ids": [5 + i]}
        for i, answer in enumerate(("8", "333"))
    ]
    seen = []

    def choose(right, lengths):
        seen.append((right, lengths))
        return [(right.index(True), 0), (right.index(True), right.index(False, 1))]

    chosen = pairs.pairs_of_batch(batch, questions, 3, choose)
    assert seen == [([False, True, False], [1, 1, 1]), ([False, False, True], [1, 2, 3])]
    texts = [(one["prompt"], one["prompt_ids"], one["chosen"], one["rejected"]) for one in chosen]
    assert texts == [
        ("q0", [5], "8", "7"),
        ("q0", [5], "8", "9"),
        ("q1", [6], "333", "1"),
        ("q1", [6], "333", "22"),
    ]
    assert [tiny[1].decode(one["rejected_ids"]) for one in chosen] == ["7", "9", "1", "22"], "without padding"


@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_no_pair_is_parted(tiny, budget):
    ids = [3, 4, 5]
    rows = [
        {"prompt_ids": ids[: i % 3 + 1], "chosen_ids": [7] * (i + 1), "rejected_ids": [8] * (10 - i)} for i in range(10)
    ]
    batch = pair_batch(rows, tiny[1], torch.device("cpu"))
    parts = list(batch.microbatches(batch["row"], budget, together=2))
    seen = torch.cat([part["row"] for part in parts])
    assert torch.equal(seen[0::2] + 1, seen[1::2]) and sorted(seen.tolist()) == list(range(20))
    assert all(part.input_ids.numel() <= budget or len(part.texts) == 2 for part in parts)
    assert {1: len(parts) == 10, 150: 1 < len(parts) < 10, 10**6: len(parts) == 1}[budget]


# --- the reference of pairs ---


def some_pairs(tokenizer, n=8):
    """Pairs of ragged prompts and responses."""
    examples = [
        {"prompt": f"{i}+1=" * (1 + i % 3), "chosen": f"{i + 1}" * (1 + i % 2), "rejected": "0"} for i in range(n)
    ]
    return [{f"{name}_ids": tokenizer.encode(text) for name, text in example.items()} | example for example in examples]


def counting(policy):
    """A reference of the policy that counts the rows that it is given."""
    reference, rows = policy.reference(), []
    reference.register_forward_pre_hook(lambda module, arguments: rows.extend(arguments[0].texts))
    return Reference(reference), rows


def test_log_probs_of_the_reference_are_those_of_the_policy_it_holds(tiny):
    sample, config = some_pairs(tiny[1]), Config(temperature=0.7)
    batch = pair_batch(sample, tiny[1], torch.device("cpu"))
    expected = batch_logprobs(tiny[0], batch, 0.7, config.tokens_per_microbatch)
    found = Reference(tiny[0].reference()).logprobs(sample, config, tiny[1], torch.device("cpu"))
    assert torch.equal(found, expected) and not found.requires_grad and not found[~batch.response_mask].any()


def test_the_reference_computes_a_pair_once(tiny):
    sample, config = some_pairs(tiny[1]), Config()
    reference, rows = counting(tiny[0])
    get = lambda pairs: reference.logprobs(pairs, config, tiny[1], torch.device("cpu"))  # noqa: E731
    first, mixed = get(sample[:4]), get(sample[2:6])
    assert len(rows) == 2 * 6, "of the second four two are new"
    again = get(sample[:4])
    assert len(rows) == 2 * 6 and torch.equal(again, first)
    width = min(first.shape[1], mixed.shape[1])
    assert torch.equal(mixed[:4, :width], first[4:, :width]), "kept values, to the bit"


def test_pairs_of_one_prompt_are_not_taken_for_each_other(tiny):
    one, *_ = some_pairs(tiny[1])
    exchanged = one | {"chosen_ids": one["rejected_ids"], "rejected_ids": one["chosen_ids"]}
    logp = Reference(tiny[0].reference()).logprobs([one, exchanged], Config(), tiny[1], torch.device("cpu"))
    assert torch.equal(logp[[3, 2]], logp[:2]) and not torch.equal(logp[0], logp[1])


def test_a_repeated_pair_is_computed_once_and_given_twice(tiny):
    sample = some_pairs(tiny[1], 3)
    reference, rows = counting(tiny[0])
    logp = reference.logprobs([sample[0], sample[1], sample[0]], Config(), tiny[1], torch.device("cpu"))
    assert len(rows) == 2 * 2 and len(logp) == 2 * 3 and torch.equal(logp[:2], logp[4:])


def test_the_reference_is_saved_with_what_it_has_computed(tiny, tmp_path):
    sample, config = some_pairs(tiny[1]), Config()
    reference, _ = counting(tiny[0])
    first = reference.logprobs(sample, config, tiny[1], torch.device("cpu"))
    torch.save(reference.state_dict(), tmp_path / "state.pt")
    later, rows = counting(tiny[0])
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(later.logprobs(sample, config, tiny[1], torch.device("cpu")), first) and not rows


# --- demonstrations ---


def test_demonstrations_from_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1+1=", "response": " 2\\n"}\r\n{"question": "2+2=", "completion": "4"}')
    first = {"prompt": "1+1=", "question": "1+1=", "response": " 2\n", "system": ""}
    second = {"prompt": "2+2=", "question": "2+2=", "response": "4", "system": ""}
    assert pairs.read_demonstrations(str(path)) == ([first, second], [])
    path.write_text('{"prompt": "1+1="}\n')
    with pytest.raises(SystemExit, match='pairs.jsonl:1: no "response"'):
        pairs.read_demonstrations(str(path))


def test_a_batch_of_demonstrations(tiny):
    tokenizer = tiny[1]
    plain = [{"prompt": "1+1=", "response": "<answer>2</answer>"}, {"prompt": "10+7=", "response": "17"}]
    encoded = pairs.encode_demonstrations(plain, tokenizer, sft.Config(), "training")
    assert [one["prompt_ids"] for one in encoded] == [tokenizer.encode("1+1="), tokenizer.encode("10+7=")]
    assert all(one["response_ids"][-1] == tokenizer.eos_token_id for one in encoded), "or it never learns to stop"
    assert "prompt_ids" not in plain[0]
    batch = pairs.demonstration_batch(encoded, tokenizer, torch.device("cpu"))
    assert batch.texts == ["<answer>2</answer>", "17"] and batch.prompt_index.tolist() == [0, 1]
    assert batch.lengths.tolist() == [4, 3] and not batch.sampler_logp.any()
    assert batch.finish_reasons == ["stop", "stop"]


def test_the_chosen_responses_of_pairs_are_demonstrations(tmp_path):
    system = {"role": "system", "content": "be brief"}
    rows = [pair(1), talk(system, user("hi")), {"prompt": [user("ho")], "completion": [assistant("he")]}]
    found, _ = pairs.read_demonstrations(write(tmp_path / "a.jsonl", *rows))
    assert [(one["question"], one["response"], one["system"]) for one in found] == [
        ("p1", "good 1", ""),
        ("hi", "good", "be brief"),
        ("ho", "he", ""),
    ]


def test_demonstrations_are_held_out_by_prompt(tmp_path):
    rows = [{"prompt": f"p{i % 20}", "response": f"r{i}"} for i in range(60)]
    a, b = write(tmp_path / "a.jsonl", *rows), write(tmp_path / "b.jsonl", *rows[:1], {"prompt": "x", "response": "y"})
    train, test = pairs.load_demonstrations((a,))
    assert len(train) == 54 and len(test) == 6 and not set(prompts_of(train)) & set(prompts_of(test))
    train, test = pairs.load_demonstrations((a, b))
    assert len(train) == 57 and prompts_of(test) == ["p0", "x"], "a second file is held out"
    with pytest.raises(SystemExit, match="one source of demonstrations, or two"):
        pairs.load_demonstrations((a, b, a))
    with pytest.raises(SystemExit, match="two different prompts or more"):
        pairs.load_demonstrations((write(tmp_path / "c.jsonl", *rows[:1]),))


def test_long_demonstrations_are_cut_and_counted(tiny, capsys):
    tokenizer = tiny[1]
    rows = [{"prompt": "p" * n, "response": "r" * n} for n in (3, 4, 5, 9)]
    config = sft.Config(max_response_tokens=5, max_prompt_tokens=8)
    encoded = pairs.encode_demonstrations(rows, tokenizer, config, "training")
    lengths = [len(one["response_ids"]) for one in encoded]
    ended = [one["response_ids"][-1] == tokenizer.eos_token_id for one in encoded]
    assert lengths == [4, 5, 5] and ended == [True, True, False]
    assert capsys.readouterr().out.splitlines() == [
        "data: 1 of 4 training prompts are longer than --max-prompt-tokens 8 and were left out",
        "data: 1 training responses are longer than --max-response-tokens 5 and were cut there",
    ]
