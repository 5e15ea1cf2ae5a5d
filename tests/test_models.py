"""Models and tokenizers: what a run with any of them needs is right, mended and said, or refused in one line.

Small models with random weights stand for their architectures. T is the shipped tiny model with something changed.
"""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, answers, load_pairs, make_sampler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import data
import dpo
import grpo
import pairs
import sft
from batch import collate
from data import encode_prompt, encode_prompts, encode_task, load_task
from logprobs import load_policy, load_value, token_logprobs
from plumbing.checkpoint import save_model
from plumbing.run import Run
from rewards import score
from rollout import end_tokens
from tiny.make import new_tokenizer

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 106, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
MODELS = {  # family -> what its configuration needs beside SHAPE
    "llama": {}, "qwen2": {}, "qwen3": {"tie_word_embeddings": True}, "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": 8}, "phi3": {}, "gpt2": GPT2, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": {}, "gpt_neox": {}, "bloom": {"n_head": 4, "n_layer": 2}, "mpt": {"d_model": 32, "n_heads": 4},
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "gpt_oss": EXPERTS | {"sliding_window": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2}, "qwen3_5_text": LINEAR, "qwen3_next": LINEAR | EXPERTS,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "num_hidden_layers": 2},
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [7, 9, 11, 5, 2, 30, 31, 3, 4], [60]]  # of unequal lengths: padded on the left


def make_model(family: str, **more):
    """A model of this family with random weights, large enough for every fault to show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | MODELS.get(family, {}) | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3)
    return model


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or new_tokenizer()).save_pretrained(folder)
    return str(folder)


def copy_of_tiny(folder, **changes):
    """T: a copy of tiny/; `changes` maps a file's stem to a function that changes its JSON."""
    shutil.copytree(ROOT / "tiny", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, change in changes.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return str(folder)


def refusal(*arguments, load=load_policy) -> str:
    """What loading says, in one line, when it refuses."""
    with pytest.raises(SystemExit) as error:
        load(*arguments)
    assert error.value.code == 2 and "\n" not in str(error.value)
    return str(error.value)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alone(model, prompt, response):
    """Log-probs of a response by itself: without padding, without a cache, from the model's own logits."""
    ids = torch.tensor(prompt + response)
    log_p = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[:-1]  # each row predicts the next token
    return log_p.gather(1, ids[1:, None])[-len(response) :, 0]


# --- the architectures ---


@pytest.mark.parametrize("family", MODELS)
def test_sampler_and_trainer_and_gradient_are_those_of_each_row_alone(tmp_path, family):
    """And the log-probs are the same after the model was saved and loaded again."""
    plain = make_model(family)
    policy, tokenizer = load_policy(save(tmp_path / "a", plain), CPU)
    batch = make_sampler(policy, tokenizer, max_new_tokens=20).generate(PROMPTS, n=3, temperature=1.0, seed=0)
    assert len(set(batch.lengths.tolist())) > 1 or batch.lengths.max() == 20, "padded on the right, too"
    weights = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(0))
    logp, _ = policy(batch, 1.0)
    assert (logp - batch.sampler_logp).abs().max() < 1e-4
    total = 0.0
    for i, length in enumerate(batch.lengths.tolist()):
        expected = alone(plain, PROMPTS[i // 3], batch.response_ids[i, :length].tolist())
        assert (logp[i, :length] - expected).abs().max() < 1e-4
        total = total + (expected * weights[i, :length]).sum()
    total.backward()
    (logp * weights).sum().backward()
    squares = []  # of the differences and of the gradients, of each parameter
    for (name, p), q in zip(policy.model.named_parameters(), plain.parameters(), strict=True):
        if p.grad is None or q.grad is None:  # of experts to which no token came
            assert p.grad is None and q.grad is None, name
            continue
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-4, name
        squares.append([(p.grad - q.grad).square().sum(), q.grad.square().sum()])
    difference, whole = torch.tensor(squares).sum(0).sqrt()
    assert difference < 1e-4 * whole

    save_model(tmp_path / "b", policy, tokenizer)
    again, _ = load_policy(str(tmp_path / "b" / "model"), CPU)
    with torch.no_grad():
        assert torch.equal(again(batch, 1.0)[0], logp)


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("gemma2", {}, "it changes its logits after the LM head"),  # a soft cap
        ("cohere", {}, "it changes its logits after the LM head"),  # a scale
        ("rwkv", {"attention_hidden_size": 32}, "padding changes its log-probs"),  # transformers#27210
        ("llama4_text", EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8}, "does not work here"),
    ],
)
def test_architectures_that_would_be_wrong_are_refused_when_loaded(tmp_path, family, more, words):
    assert words in refusal(save(tmp_path / "m", make_model(family, **more)), CPU)


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("mamba", {"state_size": 8}, "with its cache this model's log-probs are off by"),
        ("minimax", EXPERTS, "the cache of this model cannot be used"),
    ],
)
def test_ms_swift_9565_a_cache_that_cannot_be_used_is_refused_by_the_sampler(tmp_path, family, more, words):
    """The trainer's log-probs of these are right, so another sampler may have them."""
    policy, tokenizer = load_policy(save(tmp_path / "m", make_model(family, **more)), CPU)
    said = refusal(policy, tokenizer, load=make_sampler)
    assert words in said and said.endswith("use --sampler vllm, or another model")


# --- tokenizers ---


def test_trl_2897_tags_that_are_special_tokens_reach_the_reward(tmp_path, tiny, prompts, capsys):
    """In the text of rollouts, and so of evaluations, and in sampled pairs."""

    def tags_are_special(tokenizer):
        for token in tokenizer["added_tokens"][3:]:
            token["special"] = True

    policy, tokenizer = load_policy(copy_of_tiny(tmp_path / "T", tokenizer=tags_are_special), CPU)
    said = capsys.readouterr().out
    assert "model: <think>, </think>, <answer>, </answer> are special tokens; they stay in the text" in said
    ours = make_sampler(policy, tokenizer).generate(prompts, n=4, temperature=1.0, seed=0)
    plain = make_sampler(*tiny).generate(prompts, n=4, temperature=1.0, seed=0)
    assert ours.texts == plain.texts and any("<answer>" in text for text in ours.texts)
    assert not any("<eos>" in text or "<pad>" in text for text in ours.texts), "end and padding tokens alone are hidden"
    examples = encode_prompts(load_task("arithmetic").train[:40], tokenizer, "plain", 64)
    assert capsys.readouterr().out == "", "nor are they counted as control tokens in a question"
    of_ours = pairs.sample_pairs(dpo.Config(), make_sampler(policy, tokenizer), examples, dpo.verified_pairs, 0)
    of_plain = pairs.sample_pairs(dpo.Config(), make_sampler(*tiny), examples, dpo.verified_pairs, 0)
    assert of_ours == of_plain and of_ours
    example = examples[0]
    assert score(answers([f"<answer>{example['answer']}</answer>"]), [example], [])["accuracy"] == [1.0]


def test_trl_1283_an_end_token_that_the_tokenizer_appends_is_taken_off_a_prompt(tmp_path, tiny, capsys):
    def ends_every_text(tokenizer):
        template = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
        core = Tokenizer.from_str((ROOT / "tiny" / "tokenizer.json").read_text())
        core.post_processor = template
        tokenizer.update(json.loads(core.to_str()))

    _, tokenizer = load_policy(copy_of_tiny(tmp_path / "T", tokenizer=ends_every_text), CPU)
    assert "ends every text with its end token; prompts are taken without it" in capsys.readouterr().out
    assert tokenizer.encode("1")[-1] == tokenizer.eos_token_id
    example = load_task("arithmetic").train[0]
    assert encode_prompt(example, tokenizer, "plain") == encode_prompt(example, tiny[1], "plain")
    assert encode_prompt(example, tokenizer, "r1") == encode_prompt(example, tiny[1], "r1")
    pair = [{"prompt": "1+1=", "response": "2"}]
    (ours,) = pairs.encode_demonstrations(pair, tokenizer, sft.Config(), "training")
    (plain,) = pairs.encode_demonstrations(pair, tiny[1], sft.Config(), "training")
    assert ours == plain and ours["response_ids"].count(tokenizer.eos_token_id) == 1


def bos_tokenizer():
    """The tiny model's tokenizer with <s> before every text, and a chat template that writes <s> itself."""
    core = Tokenizer.from_str((ROOT / "tiny" / "tokenizer.json").read_text())
    core.add_special_tokens(["<s>"])
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[you]"
    return tokenizer


@pytest.mark.parametrize("template", ["auto", "chat", "plain", "r1"])
def test_open_r1_462_all_scripts_see_one_prompt_with_one_bos(tmp_path, template):
    tokenizer = bos_tokenizer()
    prompt = encode_prompt({"question": "1+1="}, tokenizer, template)
    assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1
    path = write(tmp_path / "a.jsonl", *({"prompt": f"{i}+1=", "chosen": "2", "rejected": "3"} for i in (1, 2)))
    flags = {"data": (path,), "template": template}
    train, held_out = load_pairs(dpo.Config(**flags), tokenizer)
    (of_dpo,) = [pair for pair in train + held_out if pair["prompt"] == "1+1="]
    read, _ = pairs.read_demonstrations(path)
    of_sft = pairs.encode_demonstrations(read, tokenizer, sft.Config(**flags), "training")[0]
    assert of_dpo["prompt_ids"] == of_sft["prompt_ids"] == prompt
    assert of_dpo["chosen_ids"] == of_sft["response_ids"]


def metaspace_tokenizer():
    """As of Llama 2: every text begins with a space, written as an underscore, and with <s>."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"0123456789+=abc", "▁a", "▁b"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "b")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokenizers_1258_a_response_is_encoded_as_it_continues_its_prompt(tmp_path):
    tokenizer = metaspace_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "chosen": "2", "rejected": " a"},
        {"prompt": "1+2=", "chosen": "3</s>", "rejected": "4</s>"},
    )
    train, held_out = load_pairs(dpo.Config(data=(path,)), tokenizer)
    by_prompt = {pair["prompt"]: pair for pair in train + held_out}
    first = by_prompt["1+1="]
    assert first["prompt_ids"] + first["chosen_ids"] == tokenizer.encode("1+1=2") + [tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(first["chosen_ids"]) == ["2", "</s>"], "no space comes between"
    assert tokenizer.convert_ids_to_tokens(first["rejected_ids"]) == ["▁a", "</s>"], "but where there is one"
    second = by_prompt["1+2="]
    assert tokenizer.convert_ids_to_tokens(second["chosen_ids"]) == ["3", "</s>"], "one end, where it has one already"


def test_where_a_token_joins_prompt_and_response_they_are_encoded_apart():
    core = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    example = {"question": "a", "prompt_ids": [1]}
    assert tokenizer.encode("ab") == [3]
    assert pairs.encode_response(example, "b", tokenizer, "plain") == [2, 0], "the prompt stays what was encoded"


def test_transformers_29279_control_tokens_in_the_data_are_counted_and_said(tmp_path, tiny, capsys):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    rows = [
        {"prompt": "what is <eos>?", "chosen": "a token<eos>", "rejected": "a <|im_end|> b"},
        {"prompt": "x", "chosen": "<think>c</think>", "rejected": "d"},
    ]
    train, _ = pairs.preferences([("", row) for row in rows], "here"), None
    pairs.encode_preferences(train, tokenizer, dpo.Config(), "training")
    said = capsys.readouterr().out
    assert "data: 1 training questions spell a special token, such as '<eos>'; the model reads the token itself" in said
    assert "data: 1 training responses spell a special token, such as '<|im_end|>'" in said, "an end at the end is none"
    demonstrations = [{"prompt": "x", "response": "a<eos>b"}, {"prompt": "y", "response": "b<eos>"}]
    pairs.encode_demonstrations(demonstrations, tokenizer, sft.Config(), "training")
    assert "data: 1 training responses spell a special token, such as '<eos>'" in capsys.readouterr().out


def test_own_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    def no_end(config):
        del config["eos_token"]

    assert "has no end token" in refusal(copy_of_tiny(tmp_path / "T", tokenizer_config=no_end), CPU)


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    said = refusal(save(tmp_path / "m", make_model("llama", vocab_size=90)), CPU)
    assert f"its tokenizer has ids up to {len(new_tokenizer()) - 1}, its embedding only 90 rows" in said


def test_padded_rows_of_the_vocabulary_are_no_fault(tmp_path):
    policy, tokenizer = load_policy(save(tmp_path / "m", make_model("llama", vocab_size=128)), CPU)
    batch = make_sampler(policy, tokenizer, max_new_tokens=20).generate(PROMPTS, n=8, temperature=1.0, seed=0)
    assert (batch.response_ids >= len(tokenizer)).any(), "they are sampled here, as the random model has it"
    with torch.no_grad():
        assert (policy(batch, 1.0)[0] - batch.sampler_logp).abs().max() < 1e-4
    assert len(batch.texts) == 24


def test_a_missing_padding_token_is_the_end_token_and_keeps_its_meaning(tmp_path, tiny, prompts):
    def no_padding(config):
        del config["pad_token"]

    policy, tokenizer = load_policy(copy_of_tiny(tmp_path / "T", tokenizer_config=no_padding), CPU)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ours = make_sampler(policy, tokenizer).generate(prompts, n=4, temperature=1.0, seed=0)
    plain = make_sampler(*tiny).generate(prompts, n=4, temperature=1.0, seed=0)
    assert ours.texts == plain.texts and torch.equal(ours.response_mask, plain.response_mask)


# --- what stands beside the weights ---


def test_transformers_29988_a_generation_config_that_cannot_be_saved_is_mended(tmp_path, capsys):
    path = copy_of_tiny(tmp_path / "T", generation_config=lambda config: config.update(temperature=0.6, top_p=0.9))
    policy, tokenizer = load_policy(path, CPU)
    assert f"model: the generation_config of {path} contradicts itself; it was mended" in capsys.readouterr().out
    save_model(tmp_path, policy, tokenizer)
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved["do_sample"] is True and (saved["temperature"], saved["top_p"]) == (0.6, 0.9)
    load_policy(str(tmp_path / "model"), CPU)
    assert "mended" not in capsys.readouterr().out


def test_a_generation_config_that_cannot_be_mended_keeps_its_end_tokens(tmp_path, capsys):
    strange = {"length_penalty": 2.0, "eos_token_id": [1, 9]}  # a flag of beam search, but no beams
    policy, tokenizer = load_policy(copy_of_tiny(tmp_path / "T", generation_config=lambda c: c.update(strange)), CPU)
    assert "mended" in capsys.readouterr().out
    assert end_tokens(policy.model, tokenizer) == {1, 9}
    save_model(tmp_path, policy, tokenizer)


def test_sampling_defaults_in_the_folder_change_no_sample(tmp_path, tiny, prompts):
    defaults = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 2.0}
    policy, tokenizer = load_policy(copy_of_tiny(tmp_path / "T", generation_config=lambda c: c.update(defaults)), CPU)
    ours = make_sampler(policy, tokenizer).generate(prompts, n=4, temperature=1.0, seed=0)
    plain = make_sampler(*tiny).generate(prompts, n=4, temperature=1.0, seed=0)
    assert ours.texts == plain.texts and torch.equal(ours.sampler_logp, plain.sampler_logp)


def test_every_one_of_several_end_tokens_ends_a_response(tmp_path, prompts):
    policy, tokenizer = load_policy(
        copy_of_tiny(tmp_path / "T", generation_config=lambda config: config.update(eos_token_id=[1, 5])), CPU
    )
    sampler = make_sampler(policy, tokenizer)
    sampler.ends = end_tokens(policy.model, tokenizer)
    assert sampler.ends == {1, 5}
    batch = sampler.generate(prompts, n=4, temperature=1.0, seed=0)
    for ids, n, text in zip(batch.response_ids.tolist(), batch.lengths.tolist(), batch.texts, strict=True):
        assert not {1, 5} & set(ids[: n - 1]) and (ids[n - 1] in (1, 5) or n == 64)
        assert "<answer>" not in text and "<eos>" not in text, "an end token is no part of the text"
    assert 5 in batch.response_ids[torch.arange(len(batch.texts)), batch.lengths - 1]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trl_3500_dropout_is_zero_in_the_update_too(tmp_path, gradient_checkpointing):
    drops = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "layerdrop": 0.1}
    path = save(tmp_path / "m", make_model("opt", **drops))
    policy, tokenizer = load_policy(path, CPU, gradient_checkpointing)
    assert policy.model.config.dropout == 0.1, "the configuration, which is saved, stays"
    batch = make_sampler(policy, tokenizer, max_new_tokens=20).generate(PROMPTS, n=3, temperature=1.0, seed=0)
    with torch.no_grad():
        without_gradient, _ = policy(batch, 1.0)
    with_gradient, _ = policy(batch, 1.0)
    assert (with_gradient - without_gradient).abs().max() < 1e-5
    policy.train()
    in_training_mode, _ = token_logprobs(policy.model, batch, 1.0)
    assert (in_training_mode - without_gradient).abs().max() < 1e-5


# --- positions ---

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
ROPES = {
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 32, "max_position_embeddings": 128},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
}


@pytest.mark.parametrize(("family", "limit"), [("phi3", 32), ("llama", 64)])
def test_transformers_25104_rope_that_depends_on_the_length_is_held_below_it(tmp_path, tiny, family, limit):
    """Beyond it a row's log-probs depend on its neighbours; up to it they do not."""
    policy, _ = load_policy(save(tmp_path / "m", make_model(family, **ROPES[family])), CPU)
    assert policy.positions == limit

    def change(longest: int) -> float:
        """How much the log-probs of a short row change with a neighbour of this length."""
        responses = [[7] * 10, [8, 9] * ((longest - 2) // 2)]
        logps = [[0.0] * len(response) for response in responses]
        batch = collate([[5, 6], [5, 7]], responses, logps, ["stop"] * 2, tiny[1], CPU)
        with torch.no_grad():
            together, _ = policy(batch, 1.0)
            by_itself, _ = policy(batch.select(torch.tensor([0])), 1.0)
        return (together[0, :10] - by_itself[0]).abs().max().item()

    assert change(limit) < 1e-4 < 1e-2 < change(limit + 10)


def test_rope_of_one_kind_for_each_type_of_layer():
    from plumbing.model_checks import positions

    ropes = {"full_attention": LONG | {"original_max_position_embeddings": 32}, "sliding_attention": {}}
    config = SimpleNamespace(max_position_embeddings=128, rope_parameters=ropes)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert positions(model) == 32
    config.rope_parameters = None
    assert positions(model) == 128
    config.max_position_embeddings = None
    assert positions(model) is None


def test_gpt_neo_273_more_tokens_than_positions_are_refused_at_the_start(tmp_path):
    policy, tokenizer = load_policy(save(tmp_path / "m", make_model("gpt2", **GPT2, n_positions=64)), CPU)
    assert policy.positions == 64
    task = load_task("arithmetic:3")
    encode_task(task, grpo.Config(max_new_tokens=58), tokenizer, policy.positions)  # 3+4+5= has 6
    said = refusal(task, grpo.Config(max_new_tokens=59), tokenizer, policy.positions, load=encode_task)
    assert said == (
        "prompt and response have up to 65 tokens together, and the model has 64 positions; "
        "lower --max-prompt-tokens or --max-new-tokens"
    )
    sampler = make_sampler(policy, tokenizer, max_new_tokens=58)
    assert sampler.generate([[5] * 6], n=4, temperature=1.0, seed=0).input_ids.shape[1] <= 64


def test_trl_3180_dpo_and_sft_count_the_tokens_of_each_pair(tmp_path):
    """A limit far above what the data has is no reason to refuse it."""
    path = save(tmp_path / "m", make_model("gpt2", **GPT2, n_positions=64))
    policy, tokenizer = load_policy(path, CPU)
    long = "x" * 60  # and the end token
    rows = [{"prompt": "a" * 3, "chosen": long, "rejected": "c"}, {"prompt": "b" * 30, "chosen": "c", "rejected": "d"}]
    good = write(tmp_path / "good.jsonl", *rows)
    bad = write(tmp_path / "bad.jsonl", rows[1], {"prompt": "aaaa", "chosen": "c", "rejected": long})
    load_pairs(dpo.Config(data=(good,), max_new_tokens=500), tokenizer, policy.positions)
    said = refusal(dpo.Config(data=(bad,), max_new_tokens=500), tokenizer, policy.positions, load=load_pairs)
    assert "up to 65 tokens together, and the model has 64 positions" in said

    bad = write(tmp_path / "sft.jsonl", {"prompt": "b", "response": "c"}, {"prompt": "aaaa", "response": long})
    said = refusal(sft.Config(model=path, data=(bad,), out=str(tmp_path / "run")), load=sft.main)
    assert said.endswith("64 positions; lower --max-prompt-tokens or --max-response-tokens")


# --- what is refused when it is loaded ---


def test_own_a_lora_adapter_and_a_run_and_an_empty_folder_are_refused_by_name(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter; merge it" in refusal(str(tmp_path / "adapter"), CPU, load=load_value)
    assert "names no model that the adapter is for" in refusal(str(tmp_path / "adapter"), CPU)
    (tmp_path / "empty").mkdir()
    assert "there is no config.json, so it is no model's folder" in refusal(str(tmp_path / "empty"), CPU)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("")
    assert "is the folder of a run that has saved no model yet" in refusal(str(run), CPU)
    copy_of_tiny(run / "model")
    assert refusal(str(run), CPU) == f"--model {run} is the folder of a run; its model is {run / 'model'}"


def test_own_a_model_type_that_nobody_knows_is_refused(tmp_path):
    path = copy_of_tiny(tmp_path / "T", config=lambda config: config.update(model_type="no_such_type"))
    assert refusal(path, CPU).startswith(f"--model {path} cannot be loaded (")


def test_own_a_missing_path_is_refused():
    assert refusal("no/such-model", CPU).startswith("--model no/such-model cannot be loaded (")
    assert refusal("no/such-model", CPU, load=load_value).startswith("--value-model no/such-model cannot be loaded (")


def test_own_a_value_model_with_another_vocabulary_is_refused(tmp_path, tiny):
    path = save(tmp_path / "small", make_model("llama", vocab_size=90))
    assert "its embedding has only 90 rows" in refusal(path, CPU, tiny[1], load=load_value)
    tokens = new_tokenizer().get_vocab()
    words = {f"w{i}": i for i in range(len(tokens))}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    path = save(tmp_path / "other", make_model("llama"), other)
    assert "its vocabulary is not that of the policy" in refusal(path, CPU, tiny[1], load=load_value)
    load_value(str(ROOT / "tiny"), CPU, tiny[1])


def test_weights_come_from_safetensors_only(tmp_path, tiny):
    path = copy_of_tiny(tmp_path / "T")
    torch.save(tiny[0].model.state_dict(), tmp_path / "T" / "pytorch_model.bin")
    (tmp_path / "T" / "model.safetensors").unlink()
    assert refusal(path, CPU).startswith(f"--model {path} cannot be loaded (OSError)")
    assert refusal(path, CPU, load=load_value).startswith(f"--value-model {path} cannot be loaded (OSError)")


def test_code_of_a_models_author_is_not_run(tmp_path):
    def custom(config):
        config.update(model_type="custom", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"})

    path = copy_of_tiny(tmp_path / "T", config=custom)
    (tmp_path / "T" / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert refusal(path, CPU).startswith(f"--model {path} cannot be loaded (")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, tiny, value):
    model = copy.deepcopy(tiny[0].model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    path = save(tmp_path / "m", model, tiny[1])
    assert "the weights model.layers.1.mlp.up_proj.weight are not finite" in refusal(path, CPU)
    assert "are not finite" in refusal(path, CPU, load=load_value)


def test_weights_that_are_not_there_are_not_made_up(tmp_path, tiny):
    """A reward model's folder has no LM head."""
    from transformers import LlamaForSequenceClassification

    config = AutoConfig.for_model("llama", **SHAPE, num_labels=1, tie_word_embeddings=False)
    path = save(tmp_path / "m", LlamaForSequenceClassification(config), tiny[1])
    assert "1 of its weights are not in its files, such as lm_head.weight" in refusal(path, CPU)


def test_tied_weights_are_saved_once_and_loaded_tied(tmp_path, tiny):
    policy = copy.deepcopy(tiny[0])
    policy.model.get_input_embeddings().weight.data[9] += 1.0
    save_model(tmp_path, policy, tiny[1])
    again, _ = load_policy(str(tmp_path / "model"), CPU)
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight
    assert torch.equal(again.model.get_output_embeddings().weight, policy.model.get_input_embeddings().weight)


def test_lm_evaluation_harness_3511_fewer_questions_than_processes_are_refused():
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    said = refusal(run, 0, None, [{"question": "1+1="}], load=Run.evaluate)
    assert said == "1 held-out questions: each of 2 processes needs one"


def test_a_saved_tokenizer_encodes_as_before(tmp_path, tiny):
    for i, tokenizer in enumerate((tiny[1], bos_tokenizer(), metaspace_tokenizer())):
        tokenizer.save_pretrained(tmp_path / str(i))
        again = AutoTokenizer.from_pretrained(tmp_path / str(i))
        assert again.encode("1+2= a") == tokenizer.encode("1+2= a") and again.chat_template == tokenizer.chat_template
    assert data.resolve_template(bos_tokenizer(), "auto") == "chat"
