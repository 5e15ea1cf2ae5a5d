"""Rollouts: the two samplers that generate responses.

Training uses exactly the token ids that were sampled: their text, tokenised again, need not give the same ones.
"""

import contextlib
import functools
import importlib.util
import logging
import math
import os
import random

import torch
from tqdm import tqdm

from batch import Rollouts, collate, left_pad
from plumbing.adapters import base_of
from plumbing.fail import fail, first_line
from plumbing.memory import PER_WEIGHT, cache_bytes, vllm_share
from plumbing.processes import own_part


def check_sampler(name: str) -> str:
    """What --sampler means here, "hf" or "vllm". Where vLLM cannot run it ends the run, before any model is loaded."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "hf":
        return "hf"
    if name == "auto" and (not installed or not torch.cuda.is_available()):
        return "hf"
    if not installed:
        fail("--sampler vllm: vLLM is not installed: pip install '.[vllm]'; or use --sampler hf")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: weights are handed over, not serialised
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # or it fills the screen; read at its first import
    from vllm.platforms import current_platform

    if not torch.cuda.is_available() and not current_platform.is_cpu():
        fail("--sampler vllm: this vLLM needs a CUDA GPU and sees none: use --sampler hf")
    return "vllm"


def make_sampler(config, policy, tokenizer, stop: list[str], autocast, optimizer=None):
    """The sampler that --sampler names, with the policy's weights.

    stop: texts that end a response, besides the end tokens
    autocast: makes the context in which models compute, accelerator.autocast
    optimizer: of all that is trained; its future state must have room beside vLLM
    """
    ends = end_tokens(policy.model, tokenizer)
    if check_sampler(config.sampler) == "vllm":
        return VLLMSampler(config, policy, tokenizer, ends, stop, autocast, optimizer)
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


def check_finite(logps: list[list[float]]) -> None:
    """End the run if a sampled token has no finite log-prob: then the policy gives nan."""
    for row in logps:
        if not all(math.isfinite(x) for x in row):
            fail("sampler: the policy's log-probs are not finite (nan or inf); a lower --lr is the usual remedy")


# --- Hugging Face ---


AT_ONCE = 2**24  # the most probabilities that sample_tokens holds at once: 128 MiB in float64


class HFSampler:
    """Samples from the policy itself. The prompt of a group is computed once; finished responses leave the batch.

    Prompts are taken in waves of whole groups, so that the cache never holds more than --sampler-tokens. A response
    does not depend on its wave: its random numbers belong to its row.
    """

    def __init__(self, config, policy, tokenizer, ends: set[int], stop: list[str], autocast):
        self.policy = policy
        self.model = policy.model
        self.tokenizer = tokenizer
        self.ends = ends
        self.stop = stop
        self.autocast = autocast
        self.max_new_tokens = config.max_new_tokens
        self.sampler_tokens = config.sampler_tokens
        self.device = policy.model.device
        self.check(policy)

    def check(self, policy) -> None:
        """End the run if decoding with a cache gives other log-probs than the trainer: not every cache can be used."""
        try:
            with torch.inference_mode(), self.autocast():
                prompts = [[1, 2, 3, 4], [5]]
                bar = tqdm(disable=True)
                responses, logps, finish_reasons = self.decode(prompts, 2, 1.0, [0, 1, 2, 3], bar, max_new_tokens=4)
        except Exception as error:  # of many types: a model's cache is its own
            fail(
                f"--sampler hf: the cache of this model cannot be used ({type(error).__name__}: {first_line(error)}); "
                "use --sampler vllm, or another model"
            )
        batch = collate(prompts, responses, logps, finish_reasons, self.tokenizer, self.device)
        with torch.no_grad(), self.autocast():
            logp, _ = policy(batch, 1.0)
        gap = (logp - batch.sampler_logp)[batch.response_mask].abs().mean().item()
        limit = 0.2 if self.device.type == "cuda" else 0.01  # some 0.05 in bfloat16, near 1e-6 in float32
        if not gap <= limit:  # written so that nan fails too
            fail(
                f"--sampler hf: with its cache this model's log-probs are off by {gap:.2g} nats; use --sampler vllm, "
                "or another model"
            )

    def push(self, policy) -> None:
        """Sample from this policy from now on: from its own weights, so there is nothing to copy."""
        self.policy = policy
        self.model = policy.model
        policy.eval()  # layers that were checkpointed in the update would drop the cache

    def sleep(self) -> None:
        """Nothing to free."""

    def generate(self, prompts: list[list[int]], n: int, temperature: float, seed: int, show: str = "") -> Rollouts:
        """n responses to each of P prompts (token ids); temperature 0 is greedy. The same seed gives the same ones.

        show: what a progress bar is called; without it there is none
        """
        row_seeds = random.Random(seed).sample(range(2**62), len(prompts) * n)
        responses = []
        logps = []
        finish_reasons = []
        bar = tqdm(total=len(prompts) * n, desc=show, disable=not show, leave=False, unit="response")
        with bar, torch.inference_mode(), self.autocast():  # one context for all tokens: it casts the weights once
            for start, end in waves(prompts, n, self.max_new_tokens, self.sampler_tokens):
                wave = self.decode(prompts[start:end], n, temperature, row_seeds[start * n : end * n], bar)
                responses += wave[0]
                logps += wave[1]
                finish_reasons += wave[2]
        check_finite(logps)
        return collate(prompts, responses, logps, finish_reasons, self.tokenizer, self.device, self.ends)

    def decode(self, prompts: list[list[int]], n: int, temperature: float, row_seeds: list[int], bar, max_new_tokens=0):
        """Token ids, their log-probs and the finish reason of B = P * n responses: three lists.

        row_seeds: a seed for each response; bar: is told of each response that is complete
        max_new_tokens: 0 for --max-new-tokens
        """
        from plumbing.cache import roomy_cache

        self.policy.activate()
        max_new_tokens = max_new_tokens or self.max_new_tokens
        numbers = random_numbers(row_seeds, max_new_tokens).to(self.device)  # [B, T] one for each token
        cache = roomy_cache(self.model.config)
        ids, mask = left_pad(prompts, self.tokenizer.pad_token_id, self.device)  # [P, L] each
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # [P, L] padding on the left does not count
        alive = list(range(len(prompts) * n))  # the b of the B rows that are still being written
        responses = [[] for _ in alive]
        logps = [[] for _ in alive]
        finish_reasons = ["length" for _ in alive]
        for t in range(max_new_tokens):
            logits = self.next_logits(ids, mask, positions, cache)  # [b, V]
            if t == 0:  # the prompt of a group was computed once; from here on its n responses part
                rows = torch.arange(len(prompts), device=self.device).repeat_interleave(n)  # [B] the prompt of each
                logits = logits[rows]
                mask = mask[rows]
                positions = positions[rows, -1:]  # [B, 1]
                cache.reorder_cache(rows)
            ids, logp = sample_tokens(logits, temperature, numbers[:, t : t + 1])  # [b, 1] each
            sampled = torch.cat([ids.double(), logp.double()], dim=1).tolist()  # one wait for the GPU, not two
            still_running = []  # which of the b rows
            for row, i in enumerate(alive):
                token, token_logp = sampled[row]
                responses[i].append(int(token))
                logps[i].append(token_logp)
                if self.is_over(responses[i]):
                    finish_reasons[i] = "stop"
                else:
                    still_running.append(row)
            bar.update(len(alive) - len(still_running))
            if not still_running:
                break
            if len(still_running) < len(alive):
                alive = [alive[row] for row in still_running]
                rows = torch.tensor(still_running, device=self.device)
                ids = ids[rows]
                mask = mask[rows]
                positions = positions[rows]
                numbers = numbers[rows]
                cache.reorder_cache(rows)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions + 1
        bar.update(finish_reasons.count("length"))
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


def waves(prompts: list[list[int]], n: int, max_new_tokens: int, sampler_tokens: int):
    """Yield (start, end) of consecutive prompts whose groups of n responses fit into `sampler_tokens` together.

    Each response is counted with the longest prompt of its wave and with max_new_tokens. A group that does not fit
    goes alone.
    """
    start = 0
    longest = 0
    for i, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        tokens = (i + 1 - start) * n * (longest + max_new_tokens)
        if i > start and tokens > sampler_tokens:
            yield start, i
            start = i
            longest = len(prompt)
    yield start, len(prompts)


def random_numbers(seeds: list[int], length: int) -> torch.Tensor:
    """[B, length] float64 in [0, 1): row i depends on seed i only, and on no device."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample_tokens(logits: torch.Tensor, temperature: float, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row and its log-prob, [b, 1] each, from logits [b, V] and a random number in [0, 1) each [b, 1].

    The token is the first one at which the probabilities, added up, exceed u: the inverse of the cumulative
    distribution. Temperature 0 takes the most probable token.
    """
    ids = []
    logps = []
    at_once = max(1, AT_ONCE // logits.shape[1])  # rows
    for part, number in zip(logits.split(at_once), u.split(at_once), strict=True):
        if temperature == 0:
            logp = part.log_softmax(-1)  # [b, V]
            token = logp.argmax(-1, keepdim=True)
        else:
            logp = (part / temperature).log_softmax(-1)  # [b, V]
            cumulative = logp.double().exp().cumsum(-1)  # [b, V] in float64: V small numbers are added up
            token = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)  # [b, 1]
            token = token.clamp(max=logits.shape[1] - 1)  # beyond the end by rounding, or where logits are nan
        ids.append(token)
        logps.append(logp.gather(-1, token))
    return torch.cat(ids), torch.cat(logps)


# --- vLLM ---

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


class VLLMSampler:
    """Samples with vLLM in this process. The trained weights are pushed into it after every update, and checked.

    vLLM sets seeds, threads and the precision of products for the whole process. It changes nothing here: every draw
    has a generator of its own, and products run in bf16 under autocast or in full float32.
    """

    def __init__(self, config, policy, tokenizer, ends: set[int], stop: list[str], autocast, optimizer=None):
        from vllm import LLM, SamplingParams

        self.policy = policy
        self.tokenizer = tokenizer
        self.ends = ends
        self.stop = stop
        self.autocast = autocast
        self.max_new_tokens = config.max_new_tokens
        self.SamplingParams = SamplingParams
        self.device = policy.model.device
        self.cuda = on_gpu(self.device)
        longest = config.max_prompt_tokens + config.max_new_tokens
        rows = rows_at_once(config)
        if self.cuda:
            memory = {"gpu_memory_utilization": gpu_share(policy.model, optimizer, rows, longest)}
        else:
            memory = {"kv_cache_memory_bytes": 2**30}
        base = base_of(config.model)
        if PROCESSES > 1:  # each has an engine of its own, in the process group that is there
            memory["distributed_executor_backend"] = "external_launcher"
        self.llm = LLM(
            base,
            dtype="bfloat16" if self.cuda else "float32",
            enforce_eager=not self.cuda,
            max_model_len=min(longest, policy.model.config.max_position_embeddings),
            max_num_seqs=rows,
            logprobs_mode="processed_logprobs",  # "processed": at the temperature
            enable_sleep_mode=self.cuda,
            **memory,
        )
        if base != config.model:  # it is an adapter, which the policy has among its weights
            self.load(policy)
        self.noise = self.gap()  # both sides have the same weights yet: this is what rounding does

    def push(self, policy) -> None:
        """Give vLLM this policy's present weights, wake it, and stop if they evidently did not arrive.

        The check finds weights that are lost, not weights that are one small update old.
        """
        self.policy = policy
        torch.cuda.empty_cache()  # vLLM cannot wake in memory that torch merely keeps
        self.llm.wake_up(tags=["weights"])  # does nothing where it is awake
        self.load(policy)
        self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():  # cached keys and values are those of the old weights
            raise RuntimeError("vLLM did not empty its prefix cache, so it would sample with keys of the old weights")
        gap = self.gap()
        check_finite([[gap]])
        limit = min(0.3, 0.01 + 10 * self.noise)
        if gap > limit:
            raise RuntimeError(
                f"the pushed weights did not arrive in vLLM: log-probs differ by {gap:.2g} nats per token from the "
                f"trainer's, at first by {self.noise:.2g}; use --sampler hf, or another vLLM"
            )

    def load(self, policy) -> None:
        """Put the policy's weights in the place of vLLM's."""
        weights = policy.weights()  # names a tied LM head too, of which vLLM may keep a copy
        with no_weights_missing():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def sleep(self) -> None:
        """Leave the GPU's memory to the update. Weights and cache go: the next push brings the weights back."""
        if self.cuda:
            self.llm.sleep(level=2)

    def generate(
        self, prompts: list[list[int]], n: int, temperature: float, seed: int, show: str = "", limit: int = 0
    ) -> Rollouts:
        """n responses to each of P prompts (token ids); temperature 0 is greedy. The same seed gives the same ones.

        show: what a progress bar is called; without it there is none
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
                flat_logprobs=True,  # numbers in lists, not an object for every token
                stop=self.stop,
                detokenize=bool(self.stop),
                stop_token_ids=list(self.ends),
            )
            params.append(request)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        bar = functools.partial(tqdm, desc=show, leave=False) if show else False
        outputs_of_requests = self.llm.generate(requests, params, use_tqdm=bar)
        responses = []
        logps = []
        finish_reasons = []
        for request in outputs_of_requests:
            for output in request.outputs:
                responses.append(list(output.token_ids))
                logps.append(sampled_logps(output))
                finish_reasons.append(output.finish_reason)
        check_finite(logps)
        return collate(prompts, responses, logps, finish_reasons, self.tokenizer, self.device, self.ends)

    def gap(self) -> float:
        """Mean |log-prob in vLLM - log-prob in the trainer| in nats, on a few short samples."""
        prompts = [self.tokenizer.encode(text) for text in ("1 + 1 =", "The answer is", "3+4+5=")]
        batch = self.generate(prompts, n=2, temperature=1.0, seed=0, limit=16)
        with torch.no_grad(), self.autocast():
            logp, _ = self.policy(batch, 1.0)
        return (logp - batch.sampler_logp)[batch.response_mask].abs().mean().item()


def on_gpu(device: torch.device) -> bool:
    """Whether vLLM shares a GPU with the training, and so has to sleep during updates."""
    return device.type == "cuda"


def rows_at_once(config) -> int:
    """The most responses that vLLM writes at the same time: those of a rollout, at most 512."""
    if hasattr(config, "prompts_per_step"):
        responses = config.prompts_per_step * config.group_size
    else:
        responses = config.eval_prompts * config.eval_samples
    return min(512, max(1, responses // PROCESSES))


def gpu_share(model, optimizer, rows: int, row_tokens: int) -> float:
    """vLLM's share of this GPU, on which all models of the training are already."""
    total = torch.cuda.get_device_properties(model.device).total_memory
    trained = 0
    for group in optimizer.param_groups if optimizer else []:
        trained += sum(own_part(p).numel() for p in group["params"])
    trainer = torch.cuda.memory_allocated(model.device) + PER_WEIGHT["adam"] * trained
    text_config = model.config.get_text_config()
    return vllm_share(total, trainer, model.num_parameters(), cache_bytes(text_config), rows, row_tokens)


def sampled_logps(output) -> list[float]:
    """The log-prob of each sampled token of a response by vLLM."""
    found = output.logprobs
    assert found.token_ids == list(output.token_ids), "vLLM gave log-probs of other tokens than the sampled ones"
    return found.logprobs


@contextlib.contextmanager
def no_weights_missing():
    """Make an error of vLLM's warning that some weights were not among those given; vLLM itself keeps what it had."""
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    missing = [warning for warning in warnings if "not loaded" in warning]
    if missing:
        raise RuntimeError(f"the pushed weights did not arrive in vLLM: {missing[0]}")
