"""Rollouts: the two samplers that generate responses.

Training uses exactly the token ids that were sampled: their text, tokenised again, need not give the same ones.
"""

import importlib.util
import os
import random

import torch

from batch import Rollouts, collate, left_pad
from plumbing.fail import fail


def check_sampler(name: str) -> str:
    """What --sampler means here, "hf" or "vllm". Where vLLM cannot run it ends the run, before any model is loaded."""
    installed = importlib.util.find_spec("vllm") is not None
    several_processes = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "hf":
        return "hf"
    if name == "auto" and (several_processes or not installed or not torch.cuda.is_available()):
        return "hf"
    if not installed:
        fail("--sampler vllm: vLLM is not installed: pip install '.[vllm]'; or use --sampler hf")
    if several_processes:
        fail("--sampler vllm: vLLM runs in one process; or use --sampler hf")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: weights are handed over, not serialised
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # or it fills the screen; read at its first import
    from vllm.platforms import current_platform

    if not torch.cuda.is_available() and not current_platform.is_cpu():
        fail("--sampler vllm: this vLLM needs a CUDA GPU and sees none: use --sampler hf")
    return "vllm"


def make_sampler(config, policy, tokenizer, stop: list[str], autocast):
    """The sampler that --sampler names, with the policy's weights.

    stop: texts that end a response, besides the end tokens
    autocast: makes the context in which models compute, accelerator.autocast
    """
    ends = end_tokens(policy.model, tokenizer)
    if check_sampler(config.sampler) == "vllm":
        return VLLMSampler(config, policy, tokenizer, ends, stop, autocast)
    return HFSampler(config, policy, tokenizer, ends, stop, autocast)


def end_tokens(model, tokenizer) -> set[int]:
    """The ids of the tokens that end a response."""
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    generation_eos = model.generation_config.eos_token_id  # one id, several, or None
    if isinstance(generation_eos, list):
        ends.update(generation_eos)
    else:
        ends.add(generation_eos)
    ends.discard(None)
    return ends


# --- Hugging Face ---


class HFSampler:
    """Samples from the policy itself. The prompt of a group is computed once; finished responses leave the batch."""

    def __init__(self, config, policy, tokenizer, ends: set[int], stop: list[str], autocast):
        self.model = policy.model
        self.tokenizer = tokenizer
        self.ends = ends
        self.stop = stop
        self.autocast = autocast
        self.max_new_tokens = config.max_new_tokens
        self.device = policy.model.device

    def push(self, policy) -> None:
        """The sampler has the policy's own weights, so there is nothing to copy."""
        policy.eval()  # layers that were checkpointed in the update would drop the cache

    def sleep(self) -> None:
        """Nothing to free."""

    def generate(self, prompts: list[list[int]], n: int, temperature: float, seed: int) -> Rollouts:
        """n responses to each of P prompts (token ids); temperature 0 is greedy. The same seed gives the same ones."""
        with torch.inference_mode(), self.autocast():  # one context for all tokens: it casts the weights once
            responses, logps, finish_reasons = self.decode(prompts, n, temperature, seed)
        return collate(prompts, responses, logps, finish_reasons, self.tokenizer, self.device)

    def decode(self, prompts: list[list[int]], n: int, temperature: float, seed: int):
        """Token ids, their log-probs and the finish reason of B = P * n responses: three lists."""
        from plumbing.cache import roomy_cache

        generator = torch.Generator(self.device).manual_seed(seed)
        cache = roomy_cache(self.model.config)
        ids, mask = left_pad(prompts, self.tokenizer.pad_token_id, self.device)  # [P, L] each
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [P, L] padding on the left does not count
        alive = list(range(len(prompts) * n))  # the b of the B rows that are still being written
        responses = [[] for _ in alive]
        logps = [[] for _ in alive]
        finish_reasons = ["length" for _ in alive]
        for t in range(self.max_new_tokens):
            logits = self.next_logits(ids, mask, positions, cache)  # [b, V]
            if t == 0:  # the prompt of a group was computed once; from here on its n responses part
                logits = logits.repeat_interleave(n, 0)
                mask = mask.repeat_interleave(n, 0)
                positions = positions[:, -1:].repeat_interleave(n, 0)  # [b, 1]
                cache.batch_repeat_interleave(n)
            ids, logp = sample_token(logits, temperature, generator)  # [b, 1] each
            tokens = ids[:, 0].tolist()
            token_logps = logp[:, 0].tolist()
            still_running = []  # which of the b rows
            for row, i in enumerate(alive):
                responses[i].append(tokens[row])
                logps[i].append(token_logps[row])
                if self.is_over(responses[i]):
                    finish_reasons[i] = "stop"
                else:
                    still_running.append(row)
            if not still_running:
                break
            if len(still_running) < len(alive):
                alive = [alive[row] for row in still_running]
                rows = torch.tensor(still_running, device=self.device)
                ids = ids[rows]
                mask = mask[rows]
                positions = positions[rows]
                cache.batch_select_indices(rows)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions + 1
        return responses, logps, finish_reasons

    def next_logits(self, ids, mask, positions, cache) -> torch.Tensor:
        """[b, V] logits of the token after `ids`, the tokens that the cache does not know yet."""
        output = self.model(
            ids,
            attention_mask=None if mask.all() else mask,  # without padding the fast kernels of attention can be used
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def is_over(self, response: list[int]) -> bool:
        """Whether the last token ends the response, by itself or by completing a stop string."""
        if response[-1] in self.ends:
            return True
        if not self.stop:
            return False
        text = self.tokenizer.decode(response[-20:])
        return any(stop in text for stop in self.stop)


def sample_token(logits: torch.Tensor, temperature: float, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row and its log-prob: [b, V] -> [b, 1] each. Temperature 0 takes the most probable token."""
    if temperature == 0:
        logp = logits.log_softmax(-1)  # [b, V]
        ids = logp.argmax(-1, keepdim=True)
    else:
        logp = (logits / temperature).log_softmax(-1)  # [b, V]
        ids = torch.multinomial(logp.exp(), 1, generator=generator)
    return ids, logp.gather(-1, ids)


# --- vLLM ---


class VLLMSampler:
    """Samples with vLLM in this process. The trained weights are pushed into it after every update, and checked."""

    def __init__(self, config, policy, tokenizer, ends: set[int], stop: list[str], autocast):
        from vllm import LLM, SamplingParams

        self.policy = policy
        self.tokenizer = tokenizer
        self.ends = ends
        self.stop = stop
        self.autocast = autocast
        self.max_new_tokens = config.max_new_tokens
        self.SamplingParams = SamplingParams
        self.device = policy.model.device
        self.cuda = self.device.type == "cuda"
        longest = config.max_prompt_tokens + config.max_new_tokens
        if self.cuda:
            memory = {"gpu_memory_utilization": 0.5}
        else:
            memory = {"kv_cache_memory_bytes": 2**30}
        self.llm = LLM(
            config.model,
            dtype="bfloat16" if self.cuda else "float32",
            enforce_eager=not self.cuda,
            max_model_len=min(longest, policy.model.config.max_position_embeddings),
            logprobs_mode="processed_logprobs",  # "processed": at the temperature
            enable_sleep_mode=self.cuda,
            **memory,
        )
        self.noise = self.gap()  # both sides have the same weights yet: this is what rounding does

    def push(self, policy) -> None:
        """Give vLLM the policy's present weights, wake it, and stop if they evidently did not arrive."""
        torch.cuda.empty_cache()  # vLLM cannot wake in memory that torch merely keeps
        self.llm.wake_up(tags=["weights"])  # does nothing where it is awake
        parameters = policy.model.state_dict().items()  # names a tied LM head too, of which vLLM may keep a copy
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": parameters})
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()  # cached keys and values are those of the old weights
        gap = self.gap()
        limit = min(0.3, 0.01 + 10 * self.noise)
        if not gap <= limit:  # written so that nan fails too
            raise RuntimeError(
                f"the pushed weights did not arrive in vLLM: log-probs differ by {gap:.2g} nats per token from the "
                f"trainer's, at first by {self.noise:.2g}; use --sampler hf, or another vLLM"
            )

    def sleep(self) -> None:
        """Leave the GPU's memory to the update. Weights and cache go: the next push brings the weights back."""
        if self.cuda:
            self.llm.sleep(level=2)

    def generate(self, prompts: list[list[int]], n: int, temperature: float, seed: int, limit: int = 0) -> Rollouts:
        """n responses to each of P prompts (token ids); temperature 0 is greedy. The same seed gives the same ones.

        limit: the most tokens of a response; 0 for --max-new-tokens
        """
        seeds = random.Random(seed).sample(range(2**31), len(prompts))  # sample i of a request gets its seed + i
        params = []
        for request_seed in seeds:
            request = self.SamplingParams(
                n=n,
                temperature=temperature,
                max_tokens=limit or self.max_new_tokens,
                seed=request_seed,
                logprobs=0,  # of the sampled token only
                stop=self.stop,
                detokenize=bool(self.stop),
                stop_token_ids=list(self.ends),
            )
            params.append(request)
        requests = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        responses = []
        logps = []
        finish_reasons = []
        for request in requests:
            for output in request.outputs:
                token_ids = list(output.token_ids)
                token_logps = []
                for token, by_id in zip(token_ids, output.logprobs, strict=True):
                    token_logps.append(by_id[token].logprob)
                responses.append(token_ids)
                logps.append(token_logps)
                finish_reasons.append(output.finish_reason)
        return collate(prompts, responses, logps, finish_reasons, self.tokenizer, self.device)

    def gap(self) -> float:
        """Mean |log-prob in vLLM - log-prob in the trainer| in nats, on a few short samples."""
        prompts = [self.tokenizer.encode(text) for text in ("1 + 1 =", "The answer is", "3+4+5=")]
        batch = self.generate(prompts, n=2, temperature=1.0, seed=0, limit=16)
        with torch.no_grad(), self.autocast():
            logp, _ = self.policy(batch, 1.0)
        return (logp - batch.sampler_logp)[batch.response_mask].abs().mean().item()
