"""Packing: states without computing on padding are the same states, where a model allows it."""

import copy

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batch import collate
from logprobs import Policy, token_logprobs
from plumbing.packing import ATTENTION, can_pack

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
MODELS = {  # family -> what its configuration needs beside SHAPE; whether its tokens meet in attention only
    "llama": ({}, True), "qwen2": ({}, True), "qwen3": ({}, True), "gemma": ({}, True), "olmo2": ({}, True),
    "smollm3": ({}, True), "phi3": ({}, True), "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 4}, True),
    "mistral": ({"sliding_window": 8}, True), "gemma3_text": ({"sliding_window": 8}, True),
    "gpt_neox": ({}, True), "qwen3_5_text": (LINEAR, False), "bloom": ({"n_head": 4}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_logprobs_of_a_batch_are_those_of_each_response_alone(tiny, family):
    """Packed, where that is right, or padded: with prompts and responses of all lengths."""
    more, packs = MODELS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | more)).eval()
    policy = Policy(model)
    for p in model.parameters():
        p.data.normal_(0, 0.3) if p.dim() > 1 else None
    prompts, lengths = [[5, 6, 7, 8, 9], [7, 9, 11, 5, 2, 30, 31, 3, 4], [60]], [7, 1, 4, 12, 12, 3]
    responses = [torch.randint(2, 60, (n,)).tolist() for n in lengths]
    batch = collate(prompts, responses, [[0.0] * n for n in lengths], [""] * 6, tiny[1], torch.device("cpu"))
    with torch.no_grad():
        logp, _ = policy(batch, 1.0)
        for i, response in enumerate(responses):
            ids = torch.tensor(prompts[i // 2] + response)
            alone = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[-len(response) :, 0]
            assert torch.allclose(logp[i, : len(response)], alone, atol=1e-4), i
    assert getattr(model.base_model, "packs", False) == packs
    width = batch.input_ids.shape[1]
    assert can_pack(model.base_model, batch) == (packs and more.get("sliding_window", width) >= width)


@pytest.mark.parametrize("together", [True, False])
def test_a_pack_has_no_padding_and_a_prompt_once_for_neighbours(tiny, together):
    seen = []
    model = copy.deepcopy(tiny[0].model)
    lengths = [3, 9, 1, 4]
    batch = collate([[5, 6], [7]], [[8] * n for n in lengths], [[0.0] * n for n in lengths], [""] * 4, tiny[1], "cpu")
    batch = batch.select(torch.tensor([0, 1, 2, 3] if together else [0, 2, 1, 3]))
    model.base_model.packs = False
    padded, _ = token_logprobs(model, batch, 1.0)
    model.base_model.packs = True
    model.base_model.register_forward_pre_hook(lambda m, args, flags: seen.append(flags["input_ids"]), with_kwargs=True)
    packed, _ = token_logprobs(model, batch, 1.0)
    assert torch.allclose(packed, padded, atol=1e-5)
    prompts = 2 + 1 if together else 2 * (2 + 1)
    assert [x.shape for x in seen] == [(1, prompts + sum(lengths) - 4)], "nor the last tokens, which predict nothing"


def test_packed_and_padded_have_the_same_gradient(tiny, batch):
    policy = Policy(copy.deepcopy(tiny[0].model).double())
    weights = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(0))

    def gradient(packs: bool):
        policy.model.base_model.packs = packs
        policy.zero_grad()
        for micro in batch.microbatches(batch["row"], 300):
            logp, _ = policy(micro, 1.0)
            (logp * weights[micro["row"], : logp.shape[1]]).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    assert can_pack(policy.model.base_model, batch)
    packed = gradient(True)
    padded = gradient(False)
    assert (packed - padded).norm() < 1e-6 * padded.norm()


# --- the name in Transformers' registry ---


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_neo", "gptj", "falcon", "gpt_neox", "bloom"])
def test_left_padding_is_not_attended_to(family):
    """A prompt gives the same logits with padding before it, whatever attention the model has after Policy took it."""
    torch.manual_seed(0)
    more = {"gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4}}
    more |= {"gptj": {"n_head": 4, "rotary_dim": 4, "n_embd": 32}, "gpt2": {"n_head": 4}, "bloom": {"n_head": 4}}
    shape = SHAPE | more.get(family, {})
    if family == "falcon":
        del shape["head_dim"]  # it follows from the others
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    Policy(model)
    has_own_attention = family in ("gpt_neo", "gptj", "falcon", "bloom")
    assert model.config._attn_implementation == (before if has_own_attention else ATTENTION)
    ids = torch.tensor([[7, 9, 11, 5, 2, 30]])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    flags = {} if family == "bloom" else {"position_ids": positions}
    with torch.no_grad():
        alone = model(ids).logits
        with_padding = model(padded, attention_mask=mask, **flags).logits[:, 4:]
    assert torch.allclose(alone, with_padding, atol=1e-5)


def test_a_model_that_others_load_keeps_its_attention(tiny, tmp_path):
    tiny[0].model.save_pretrained(tmp_path)
    assert tiny[0].model.config._attn_implementation == ATTENTION
    assert "packed" not in (tmp_path / "config.json").read_text()
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_log_probs_of_a_model_that_no_policy_took_are_those_of_the_policy(tiny, batch):
    plain = AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32).eval()
    logp, entropy = token_logprobs(plain, batch, 0.8)
    assert not can_pack(plain.base_model, batch)
    expected_logp, expected_entropy = tiny[0](batch, 0.8)
    assert torch.allclose(logp, expected_logp, atol=1e-5)
    assert torch.allclose(entropy, expected_entropy, atol=1e-5)
