"""tiny/make.py: demonstrations of mixed quality and the new model; and the shipped model, which was made from both."""

import collections

import pytest
import torch
from conftest import ROOT, make_sampler, outputs_with_other_hashes
from transformers import LlamaConfig, LlamaForCausalLM

import sft
from data import encode_prompts, load_task
from rewards import evaluation_metrics, score
from tiny.make import MIXTURE, demonstrate, demonstrations, new_model

# --- demonstrations ---


def kind_of(response):
    """The kind of a demonstration, told from its format alone."""
    if response.startswith("<answer>"):
        return "guess"
    if ",wait" in response:
        return "ramble"
    return "think" if response.endswith("</answer>") else "broken"


def test_demonstrations():
    task = load_task("arithmetic")
    pairs = demonstrations(4000, seed=0)
    prompts = {pair["prompt"] for pair in pairs}
    assert prompts <= {example["question"] for example in task.train}
    assert not prompts & {example["question"] for example in task.test}
    assert pairs == demonstrations(4000, seed=0) != demonstrations(4000, seed=1)

    kinds = collections.defaultdict(list)
    for pair in pairs:
        kinds[kind_of(pair["response"])].append((pair["response"], sum(map(int, pair["prompt"][:-1].split("+")))))
    for kind, share in MIXTURE.items():
        assert len(kinds[kind]) / len(pairs) == pytest.approx(share, abs=0.03)

    for response, total in kinds["think"]:
        assert response.startswith("<think>") and response.endswith(f"</think><answer>{total}</answer>")
        sums = response[len("<think>") : response.index("</think>")].split(",")
        assert all(eval(left) == int(right) for left, right in (step.split("=") for step in sums))
    right = sum(response == f"<answer>{total}</answer>" for response, total in kinds["guess"])
    assert 0 < right < 0.15 * len(kinds["guess"])
    assert not any("<answer>" in response and "</answer>" in response for response, _ in kinds["broken"])
    answered = sum("</answer>" in response for response, _ in kinds["ramble"])
    assert 0.4 < answered / len(kinds["ramble"]) < 0.6
    assert all(65 <= len(response) <= 110 for response, _ in kinds["ramble"])


def test_running_sums_of_one_demonstration():
    response = demonstrate({"question": "3+5+9="}, "think", rng=None)
    assert response == "<think>3+5=8,8+9=17</think><answer>17</answer>"


def test_demonstrations_may_outnumber_the_questions():
    pairs = demonstrations(9000, seed=0)
    assert len(pairs) == 9000 and len({pair["prompt"] for pair in pairs}) == 8000


def test_demonstrations_do_not_depend_on_the_process():
    program = (
        "import hashlib\n"
        "from tiny.make import demonstrations\n"
        "print(hashlib.md5(repr(demonstrations(500, 3)).encode()).hexdigest())\n"
    )
    one, other = outputs_with_other_hashes(program)
    assert one == other and len(one.splitlines()) == 1


# --- the model ---


def test_a_new_model_is_the_shipped_one_before_it_learned(tiny):
    model, tokenizer = new_model(0)
    shipped = tiny[0].model
    assert tokenizer.get_vocab() == tiny[1].get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (tiny[1].pad_token_id, tiny[1].eos_token_id)
    assert {k: p.shape for k, p in model.named_parameters()} == {k: p.shape for k, p in shipped.named_parameters()}
    assert not model.training and 330_000 < model.num_parameters() < 350_000
    ends = model.config.eos_token_id, model.config.pad_token_id
    assert ends == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_seed_of_a_new_model_is_that_of_its_weights():
    one, again, other = (torch.nn.utils.parameters_to_vector(new_model(seed)[0].parameters()) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_tiny_model_is_an_ordinary_small_llama(tiny):
    model = tiny[0].model
    assert isinstance(model, LlamaForCausalLM) and isinstance(model.config, LlamaConfig)
    assert model.num_parameters() < 1_000_000
    assert sum(file.stat().st_size for file in (ROOT / "tiny").iterdir()) < 5_000_000
    text = "3+4=<think>3+4=7</think><answer>7</answer>"
    assert tiny[1].decode(tiny[1].encode(text)) == text


def test_the_tiny_model_leaves_something_to_learn(tiny):
    """Mostly wrong alone, mostly right among eight, and it thinks in fewer than half of its samples."""
    examples = encode_prompts(load_task("arithmetic").test[:200], tiny[1], "plain", 64)
    batch = make_sampler(*tiny).generate([e["prompt_ids"] for e in examples], n=8, temperature=1.0, seed=0)
    scores = score(batch, [e for e in examples for _ in range(8)], ["format"])
    metrics = evaluation_metrics([0.0], scores, batch.lengths.tolist(), 8)
    assert 0.2 < metrics["eval_pass@1"] < 0.4 and metrics["eval_pass@8"] > 0.8
    assert sum(text.startswith("<think>") for text in batch.texts) < 0.5 * len(batch.texts)


# --- a larger one ---


def test_a_new_model_may_be_larger():
    small, _ = new_model(0)
    large, tokenizer = new_model(0, hidden_size=256, layers=4)
    assert 0.33e6 < small.num_parameters() < 0.35e6 and 2.6e6 < large.num_parameters() < 2.7e6
    assert (large.config.hidden_size, large.config.num_hidden_layers) == (256, 4)
    assert tokenizer.get_vocab() == new_model(1)[1].get_vocab(), "so that it may teach the small one"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": str(ROOT / "tiny"), "hidden_size": 64}, "--hidden-size is for a new model"),
        ({"model": str(ROOT / "tiny"), "layers": 4}, "--layers is for a new model"),
        ({"hidden_size": 100}, "--hidden-size 100: it must be a multiple of 32"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        sft.main(sft.Config(out=str(tmp_path / "run"), **flags))
    assert message in capsys.readouterr().err
