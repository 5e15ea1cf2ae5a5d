"""Rollouts: the two samplers that write responses, and the log-probs of a model on a batch of them (see data.py).

Training uses exactly the token ids that were sampled: their text, tokenised again, need not give the same ones.
"""

import importlib.util
import os
import random
from contextlib import suppress
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from data import Rollouts, collate, left_pad, resolve_template, stop_strings

logging.disable_progress_bar()  # ours shows the training
logging.set_verbosity_error()  # a value network has a new head: no report about that
LOGITS_AT_ONCE = 2**25  # logits that stand in memory together: 128 MiB in float32, whatever B, T and the vocabulary


# --- the model and its log-probs ---


def load_model(path: str, device: torch.device, gradient_checkpointing: bool = False):
    """(model, tokenizer) of a Hugging Face folder or Hub name; float32 weights, or updates of 1e-6 would be lost."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {path} is no folder here, nor on the Hub: {str(error).splitlines()[0]}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.eval()  # no dropout: sampler, old and current log-probs must be those of one function
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.tensor([[tokenizer.eos_token_id] * 2], device=device)
    with torch.no_grad():  # token_logprobs applies the head itself: make sure that this is all there is to it
        by_head = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        if not torch.allclose(by_head, model(ids).logits, atol=1e-3):
            raise SystemExit(f"--model {path}: it changes its logits after the LM head, which is not supported here")
    return model, tokenizer


def attention(module, query, key, value, attention_mask, packing=None, **kwargs):
    """Transformers' attention; packed tokens [1, heads, N, d] become a row for each response, and are packed again."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, back = packing  # [B, W] the places of each row's tokens in the pack; [N] those of the pack in rows.flatten()
    places = rows.flatten()  # of what now becomes [B, heads, W, d]
    q, k, v = (x[0].index_select(1, places).unflatten(1, rows.shape).transpose(0, 1) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs | {"is_causal": True})  # [B, W, heads, d]
    return out.flatten(0, 1).index_select(0, back)[None], None


AttentionInterface.register("sdpa", attention)  # what models have unless told otherwise


def packed_states(model, batch: Rollouts) -> torch.Tensor:
    """response_states without computing on padding: all tokens stand in one row, a prompt once for all its neighbours.

    Prompt P Q with responses A B and C D: the pack is P Q A C, the states are those of Q A Q C. Attention alone sees
    rows, P Q A and P Q C; what fills them up is to the right, so the causal mask hides it.
    """
    L, device = batch.input_ids.shape[1] - batch.response_mask.shape[1], batch.input_ids.device
    pack, rows, states, previous = [], [], [], None

    def add(tokens: list[int], row: int, start: int) -> list[int]:
        pack.extend((token, row, start + t) for t, token in enumerate(tokens))
        return list(range(len(pack) - len(tokens), len(pack)))  # their places in the pack

    lists = (batch.prompt_index, batch.input_ids, batch.attention_mask[:, :L].sum(1), batch.lengths)
    for i, (index, ids, prompt, length) in enumerate(zip(*(x.tolist() for x in lists), strict=True)):
        if index != previous:
            prompt_places, previous = add(ids[L - prompt : L], i, 0), index
        places = prompt_places + add(ids[L : L + length - 1], i, prompt)
        rows.append(torch.tensor(places))
        states += places[prompt - 1 :][:length]
    rows = pad_sequence(rows, batch_first=True).to(device)  # [B, W]
    ids, row_of, positions = torch.tensor(pack, device=device).T  # [N] each
    no_mask = torch.zeros(1, 1, 1, 1, device=device)  # Transformers leaves a mask of this form alone, and so do we
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": no_mask, "use_cache": False}
    return model(**inputs, packing=(rows, row_of * rows.shape[1] + positions)).last_hidden_state[0, states]


def padded_states(model, batch: Rollouts) -> torch.Tensor:
    """response_states of any model."""
    mask, T = batch.attention_mask, batch.response_mask.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, L + T] left padding does not count
    hidden = model(batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    return hidden[:, -T - 1 : -1][batch.response_mask]


def can_pack(model, batch: Rollouts) -> bool:
    """Whether in this model tokens meet in attention only, and in Transformers' own: then packing changes nothing."""
    if not hasattr(model, "packs"):  # tried once: two responses to one prompt, one to another
        device, model.packs = batch.input_ids.device, False
        ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8], [9, 2, 1, 3, 5, 0]], device=device)
        mask, index = (ids > 0).long(), torch.tensor([0, 0, 1], device=device)
        trial = Rollouts(ids, mask, mask[:, 3:].bool(), mask[:, 3:], index, [""] * 3, [""] * 3)
        with suppress(Exception), torch.no_grad(), torch.autocast(device.type, enabled=False):  # it may not take a pack
            model.packs = torch.allclose(packed_states(model, trial), padded_states(model, trial), rtol=1e-3, atol=1e-3)
    window = getattr(model.config.get_text_config(), "sliding_window", None)  # beyond it attention needs a mask
    return model.packs and (not window or batch.input_ids.shape[1] <= window)


def response_states(model, batch: Rollouts) -> torch.Tensor:
    """[N, H] states of a model's body that predict the N response tokens of a batch: each is one token to the left."""
    for layer in (x for x in model.modules() if getattr(x, "gradient_checkpointing", False)):
        layer.training = torch.is_grad_enabled()  # or it would not checkpoint
    return packed_states(model, batch) if can_pack(model, batch) else padded_states(model, batch)


def head_logprobs(head, hidden, targets, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of its distribution, [N] each, from hidden states [N, H]."""
    log_p = (head(hidden).float() / temperature).log_softmax(-1)  # [N, V]
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)  # [N]
    return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy  # [N], [N]


def token_logprobs(model, batch: Rollouts, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens, with gradient, and entropies in nats, without: [B, T] float32, 0 off the mask.

    Taken at the sampling temperature: the policy that acted is softmax(logits / temperature). The LM head runs on
    response positions only and in chunks that are computed again in the backward pass, so [B, T, V] never exists.
    """
    mask = batch.response_mask  # [B, T]
    hidden = response_states(model.base_model, batch)  # [N, H]
    targets = batch.input_ids[:, -mask.shape[1] :][mask]  # [N]
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    compute = partial(checkpoint, head_logprobs, use_reentrant=False) if len(targets) > chunk else head_logprobs
    parts = [compute(head, *x, temperature) for x in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
    logp, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return tuple(torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x) for x in (logp, entropy))


@torch.no_grad()
def batch_logprobs(model, batch: Rollouts, temperature: float, budget: int) -> torch.Tensor:
    """[B, T] log-probs of a whole batch without gradient, computed in micro-batches of at most `budget` tokens."""
    logp = torch.zeros_like(batch.sampler_logp)
    for micro in batch.microbatches(batch["row"], budget):
        part, _ = token_logprobs(model, micro, temperature)
        logp[micro["row"], : part.shape[1]] = part
    return logp


# --- samplers ---


def check_sampler(name: str) -> str:
    """What --sampler means here, "hf" or "vllm"; one clear line, before any model loads, where vLLM cannot run."""
    installed, several = importlib.util.find_spec("vllm") is not None, int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "hf" or (name == "auto" and (several or not installed or not torch.cuda.is_available())):
        return "hf"
    if not installed or several:
        problem = "runs in one process" if installed else "is not installed: pip install '.[vllm]'"
        raise SystemExit(f"--sampler vllm: vLLM {problem}; or use --sampler hf")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: weights are handed over, not serialised
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # or it fills the screen; read at its first import
    from vllm.platforms import current_platform

    if not torch.cuda.is_available() and not current_platform.is_cpu():
        raise SystemExit("--sampler vllm: this vLLM needs a CUDA GPU and sees none: use --sampler hf")
    return "vllm"


def make_sampler(config, policy, tokenizer, accelerator):
    """The sampler of --sampler, ready to write responses with the policy's present weights."""
    eos, stop = policy.generation_config.eos_token_id, stop_strings(resolve_template(tokenizer, config.template))
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>"), *(eos if isinstance(eos, list) else [eos])}
    sampler = VLLMSampler if check_sampler(config.sampler) == "vllm" else HFSampler
    return sampler(config, policy, tokenizer, ends - {None}, stop, accelerator.autocast)


class RoomyLayer(DynamicLayer):
    """A layer of the cache with spare room for new keys and values: DynamicLayer copies all of them for every token."""

    room = None  # for keys and for values, [B, heads, more than t, d] each

    def update(self, key_states, value_states, *args, **kwargs):
        new, t, end = (key_states, value_states), self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if t < 128:  # to copy so little is faster
            return super().update(*new)
        if self.room is None or end > self.room[0].shape[2]:
            self.room = [torch.nn.functional.pad(x, (0, 0, 0, t // 2)) for x in (self.keys, self.values)]
        self.room[0][:, :, t:end], self.room[1][:, :, t:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.room = None


class HFSampler:
    """Samples from the policy itself. The prompt of a group is computed once; finished responses leave the batch."""

    def __init__(self, config, policy, tokenizer, ends: set[int], stop: list[str], autocast):
        self.policy, self.tokenizer, self.ends, self.stop, self.device = policy, tokenizer, ends, stop, policy.device
        self.max_new_tokens, self.generate = config.max_new_tokens, autocast()(self.generate)  # weights are cast once

    def push(self, policy) -> None:
        """It samples from the very weights that are trained."""
        policy.eval()  # layers that were checkpointed in the update would drop the cache

    def sleep(self) -> None:
        """Nothing to free."""

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], n: int, temperature: float, seed: int) -> Rollouts:
        """n responses to each of P prompts (token ids); temperature 0 is greedy. The same seed gives the same ones."""
        generator, cache = torch.Generator(self.device).manual_seed(seed), DynamicCache(config=self.policy.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        ids, mask = left_pad(prompts, self.tokenizer.pad_token_id, self.device)  # [P, L] each
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [P, L]
        alive = list(range(len(prompts) * n))  # b of the B rows are still being written
        responses, logps, finish_reasons = [[] for _ in alive], [[] for _ in alive], ["length" for _ in alive]
        for t in range(self.max_new_tokens):
            inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": cache, "logits_to_keep": 1}
            logits = self.policy(attention_mask=None if mask.all() else mask, **inputs).logits[:, -1]  # [b, V]
            if t == 0:  # the prompt of a group was computed once; from here on its n responses part
                logits, mask, positions = (x.repeat_interleave(n, 0) for x in (logits, mask, positions[:, -1:]))
                cache.batch_repeat_interleave(n)
            logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # [b, V]
            ids = torch.multinomial(logp.exp(), 1, generator=generator) if temperature else logp.argmax(-1, True)
            for i, token, x in zip(alive, ids[:, 0].tolist(), logp.gather(-1, ids)[:, 0].tolist(), strict=True):
                responses[i].append(token)
                logps[i].append(x)
                if token in self.ends or any(text in self.tokenizer.decode(responses[i][-20:]) for text in self.stop):
                    finish_reasons[i] = "stop"
            keep = [j for j, i in enumerate(alive) if finish_reasons[i] == "length"]
            if not keep:
                break
            if len(keep) < len(alive):
                alive, rows = [alive[j] for j in keep], torch.tensor(keep, device=self.device)
                ids, mask, positions = ids[rows], mask[rows], positions[rows]
                cache.batch_select_indices(rows)
            mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions + 1
        with torch.inference_mode(False):  # the tensors that go into training
            return collate(prompts, responses, logps, finish_reasons, self.tokenizer, self.device)


class VLLMSampler:
    """Samples with vLLM in this process. The trained weights are pushed into it after every update, and checked."""

    def __init__(self, config, policy, tokenizer, ends: set[int], stop: list[str], autocast):
        from vllm import LLM, SamplingParams

        self.policy, self.tokenizer, self.ends, self.stop, self.autocast = policy, tokenizer, ends, stop, autocast
        self.max_new_tokens, self.SamplingParams = config.max_new_tokens, SamplingParams
        self.cuda = policy.device.type == "cuda"
        memory = {"gpu_memory_utilization": 0.5} if self.cuda else {"kv_cache_memory_bytes": 2**30}
        self.llm = LLM(
            config.model, dtype="bfloat16" if self.cuda else "float32", enforce_eager=not self.cuda, **memory,
            max_model_len=min(config.max_prompt_tokens + config.max_new_tokens, policy.config.max_position_embeddings),
            logprobs_mode="processed_logprobs", enable_sleep_mode=self.cuda,  # "processed": at the temperature
        )  # fmt: skip
        self.noise = self._gap()  # both sides have the same weights yet: this is what rounding does

    def push(self, policy) -> None:
        """Give vLLM the policy's present weights, wake it, and stop if they evidently did not arrive."""
        torch.cuda.empty_cache()  # vLLM cannot wake in memory that torch merely keeps
        self.llm.wake_up(tags=["weights"])  # does nothing where it is awake
        weights = policy.state_dict().items()  # names a tied LM head too, of which vLLM may keep a copy
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # cached keys and values are those of the old weights
        if not (gap := self._gap()) <= min(0.3, 0.01 + 10 * self.noise):  # also where it is nan
            told = f"log-probs differ by {gap:.2g} nats per token from the trainer's, at first by {self.noise:.2g}"
            raise RuntimeError(f"the pushed weights did not arrive in vLLM: {told}; use --sampler hf, or another vLLM")

    def sleep(self) -> None:
        """Leave the GPU's memory to the update. Weights and cache go: the next push brings the weights back."""
        if self.cuda:
            self.llm.sleep(level=2)

    def generate(self, prompts: list[list[int]], n: int, temperature: float, seed: int, limit: int = 0) -> Rollouts:
        """n responses to each of P prompts (token ids); temperature 0 is greedy. The same seed gives the same ones."""
        flags = {"n": n, "temperature": temperature, "max_tokens": limit or self.max_new_tokens, "logprobs": 0}
        flags |= {"stop": self.stop, "detokenize": bool(self.stop), "stop_token_ids": list(self.ends)}
        seeds = random.Random(seed).sample(range(2**31), len(prompts))  # sample i of a request gets its seed + i
        params = [self.SamplingParams(seed=s, **flags) for s in seeds]
        requests = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        outputs = [out for request in requests for out in request.outputs]
        responses, reasons = [list(out.token_ids) for out in outputs], [out.finish_reason for out in outputs]
        logps = [[by_id[i].logprob for i, by_id in zip(out.token_ids, out.logprobs, strict=True)] for out in outputs]
        return collate(prompts, responses, logps, reasons, self.tokenizer, self.policy.device)

    def _gap(self) -> float:
        """Mean |log-prob in vLLM - log-prob in the trainer| in nats, on a few short samples."""
        prompts = [self.tokenizer.encode(text) for text in ("1 + 1 =", "The answer is", "3+4+5=")]
        batch = self.generate(prompts, n=2, temperature=1.0, seed=0, limit=16)
        with torch.no_grad(), self.autocast():
            logp, _ = token_logprobs(self.policy, batch, temperature=1.0)
        return (logp - batch.sampler_logp)[batch.response_mask].abs().mean().item()
