"""The policy and the value network: loading a model, and what it says about each token of a batch of responses."""

import copy
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from batch import Rollouts, collate
from plumbing import adapters
from plumbing.fail import fail, first_line
from plumbing.model_checks import check_folder, check_model, check_tokenizer, check_vocabulary, positions
from plumbing.packing import can_pack, packed_states, use_packed_attention
from plumbing.processes import shard

PROBE = torch.tensor([[1, 2, 3]])  # any tokens do, to compare two ways of computing the same
# The most logits in memory at once, whatever B, T and the vocabulary: 128 MiB in float32, and 1 GiB on a GPU, where
# every pass over the head costs time.
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28}


# --- the policy ---


class Policy(torch.nn.Module):
    """The policy pi, a language model; called with a batch of responses, it gives their log-probs.

    `model` is the language model as Transformers made it: the Hugging Face sampler calls it, vLLM takes its weights.
    lora_rank: train an adapter of this rank instead of the weights; 0: the weights
    """

    def __init__(self, model, gradient_checkpointing: bool = False, lora_rank: int = 0):
        super().__init__()
        self.model = model
        self.lora_rank = lora_rank
        self.load_again = None  # where it is sharded: how to get the whole policy once more
        self.eval()  # no dropout: sampler, old and current log-probs must be those of one function
        use_packed_attention(model)  # so that the update need not compute on padding
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora_rank:
            adapters.add_adapter(model, adapters.POLICY, lora_rank)

    def forward(
        self,
        batch: Rollouts,
        temperature: float,
        dtype=torch.float32,
        adapter: bool = True,
        entropy_gradient: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the response tokens, [B, T] each: see token_logprobs. adapter: or without it"""
        if self.lora_rank:
            adapters.use(self.model, adapters.POLICY if adapter else None)
        return token_logprobs(self.model, batch, temperature, dtype, entropy_gradient)

    def activate(self) -> None:
        """Let the model compute as the policy: with its adapter, where it has several, or none is in use."""
        if self.lora_rank:
            adapters.use(self.model, adapters.POLICY)

    @property
    def positions(self) -> int | None:
        """The most tokens that prompt and response may have together; None without a limit."""
        return positions(self.model)

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer changes: all, or the adapter."""
        if self.lora_rank:
            return list(adapters.adapter_weights(self.model, adapters.POLICY).values())
        return list(self.parameters())

    def weights(self):
        """Yield (name, tensor) of the language model, adapter included, one at a time: for vLLM, and to be saved."""
        yield from adapters.merged_weights(self.model)

    def reference(self):
        """The policy as it is now, frozen: called before training, pi_ref."""
        if self.lora_rank:
            return WithoutAdapter(self)
        if self.load_again:  # shards cannot be copied
            return shard(self.load_again().requires_grad_(False))
        return Policy(copy.deepcopy(self.model)).requires_grad_(False)


class WithoutAdapter:
    """The policy before the training of its adapter, used like it: the same model, whose own weights are frozen."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.model = policy.model

    @torch.no_grad()
    def __call__(self, batch: Rollouts, temperature: float, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        return self.policy(batch, temperature, dtype, adapter=False)

    def activate(self) -> None:
        """Let the model compute without its adapter."""
        adapters.use(self.model, None)

    def weights(self):
        """Yield (name, tensor) of the language model without the adapter, one at a time."""
        yield from adapters.merged_weights(self.model, None)

    def eval(self) -> None:
        self.policy.eval()


def make_policy(config, device: torch.device):
    """(policy, tokenizer) as the flags say; with --shard spread over the processes."""
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    if not config.shard:
        return load_policy(config.model, device, config.gradient_checkpointing, config.lora_rank, frozen)
    cpu = torch.device("cpu")  # until a layer is sharded it does not take the GPU's memory
    policy, tokenizer = load_policy(config.model, cpu, config.gradient_checkpointing, config.lora_rank, frozen)
    policy.load_again = lambda: load_policy(config.model, cpu)[0]
    return shard(policy), tokenizer


def load_policy(
    path: str,
    device: torch.device,
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
    frozen_dtype: torch.dtype = torch.float32,
    flag: str = "--model",
):
    """(policy, tokenizer) of a Hugging Face folder, or of a name on the Hub; of an adapter's folder it is merged.

    frozen_dtype: with LoRA, of the weights that are not trained, which need no more than bf16
    flag: what names the path on the command line
    """
    model, tokenizer = load_model(path, device, flag)
    if lora_rank:
        model.to(frozen_dtype)
    return Policy(model, gradient_checkpointing, lora_rank), tokenizer


def load_teacher(path: str, device: torch.device, tokenizer):
    """The policy of --teacher, frozen; refused if it does not have the tokens of this tokenizer, the student's."""
    if path.count("/") > 1 and not Path(path).exists():  # no name on the Hub
        fail(f"--teacher {path}: there is no such folder; python grpo.py --out runs/teacher makes one")
    teacher, its_tokenizer = load_policy(path, device, flag="--teacher")
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        fail(f"--teacher {path}: its tokens are not those of --model; give a model of the same family")
    teacher.model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)  # what is frozen needs no more
    return teacher.requires_grad_(False)


def load_model(path: str, device: torch.device, flag: str = "--model"):
    """(language model, tokenizer) of a Hugging Face folder, or of a name on the Hub.

    The weights are in float32: in bfloat16 an update of 1e-6 would be lost to rounding.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # imported here: --help does not wait seconds for it

    quieten_transformers()
    check_folder(flag, path, adapter_too=True)
    base = adapters.base_of(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        if base != path:
            model = adapters.merge_folder(model, path)
    except Exception as error:  # of many types: no such model, no network, an unknown architecture, a broken file
        fail(f"{flag} {path} cannot be loaded ({type(error).__name__}): {first_line(error)}")
    missing = sorted(report["missing_keys"])
    if missing:  # Transformers would make them up
        fail(f"{flag} {path}: {len(missing)} of its weights are not in its files, such as {missing[0]}")
    check_model(flag, path, model)
    check_tokenizer(flag, path, tokenizer, model)
    model.to(device)
    model.eval()
    try:  # with a few tokens
        head_is_last = logits_are_head_of_states(model)
        padding_is_ignored = head_is_last and padding_changes_nothing(model, tokenizer)
    except Exception as error:  # of many types: each architecture has its own ways
        fail(f"{flag} {path} does not work here ({type(error).__name__}): {first_line(error)}")
    if not head_is_last:
        fail(f"{flag} {path}: it changes its logits after the LM head, which is not supported here")
    if not padding_is_ignored:
        fail(f"{flag} {path}: padding changes its log-probs, so a batch of responses would get wrong ones")
    return model, tokenizer


@torch.no_grad()
def logits_are_head_of_states(model) -> bool:
    """Whether the LM head on the states of the body gives the logits: token_logprobs applies it by itself."""
    ids = PROBE.to(model.device)
    states = model.base_model(ids).last_hidden_state
    by_head = model.get_output_embeddings()(states)
    return torch.allclose(by_head, model(ids).logits, atol=1e-3)


@torch.no_grad()
def padding_changes_nothing(model, tokenizer) -> bool:
    """Whether the log-probs of a padded batch are those of its rows alone."""
    prompts = [[1, 2, 3, 4, 5], [6]]
    responses = [[7], [8, 9, 1]]
    batch = collate(prompts, responses, [[0.0], [0.0] * 3], ["stop"] * 2, tokenizer, model.device)
    logp, _ = token_logprobs(model, batch, 1.0)  # [2, 3]
    for i, response in enumerate(responses):
        ids = torch.tensor([prompts[i] + response], device=model.device)
        log_p = model(ids).logits[0, :-1].float().log_softmax(-1)
        alone = log_p.gather(1, ids[0, 1:, None])[-len(response) :, 0]  # of the response tokens
        if not torch.allclose(logp[i, : len(response)], alone, atol=1e-2):
            return False
    return True


def quieten_transformers() -> None:
    """No progress bars of loading beside that of the training, and no reports about heads that are not loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


# --- log-probs ---


def token_logprobs(
    model, batch: Rollouts, temperature: float, dtype=torch.float32, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the response tokens, with gradient, and entropies in nats: [B, T], 0 off the mask.

    Taken at the sampling temperature: the policy that acted is softmax(logits / temperature). The LM head runs on
    response positions only and in chunks, so the logits [B, T, V] are never all in memory.
    dtype: of the softmax and the results; float64, with a model in float64, is for comparing with another reference
    entropy_gradient: whether the entropies have a gradient too, for an entropy bonus
    """
    hidden = response_states(model.base_model, batch)  # [N, H] N response tokens
    targets = batch.response_ids[batch.response_mask]  # [N]
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE[hidden.device.type] // head.weight.shape[0])
    logps = []
    entropies = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if len(targets) > chunk:  # the logits of a chunk are not kept for the backward pass, but computed again
            logp, entropy = checkpoint(
                head_logprobs, head, h, y, temperature, dtype, entropy_gradient, use_reentrant=False
            )
        else:
            logp, entropy = head_logprobs(head, h, y, temperature, dtype, entropy_gradient)
        logps.append(logp)
        entropies.append(entropy)
    logp = on_mask(torch.cat(logps), batch.response_mask)  # [B, T]
    entropy = on_mask(torch.cat(entropies), batch.response_mask)  # [B, T]
    return logp, entropy


def head_logprobs(
    head, hidden, targets, temperature, dtype, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of its distribution, [N] each, from hidden states [N, H]."""
    with own_cast(hidden.device):
        log_p = (head(hidden).to(dtype) / temperature).log_softmax(-1)  # [N, V]
    spread = log_p if entropy_gradient else log_p.detach()  # [N, V]
    entropy = -(spread.exp() * spread).sum(-1)  # [N]
    logp = log_p.gather(-1, targets[:, None]).squeeze(-1)  # [N]
    return logp, entropy


def own_cast(device: torch.device):
    """Under autocast, a context in which weights are cast to bf16 anew, without autocast's memory of what it has cast.

    Otherwise the gradients of all chunks would be added up in bf16, in which small numbers are lost beside a large sum.
    """
    enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def on_mask(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N] values of the N response tokens -> [B, T], 0 off the mask."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


def response_states(body, batch: Rollouts) -> torch.Tensor:
    """[N, H] hidden states of a model's body that predict the N response tokens, row after row.

    The hidden state that predicts a token is that of the token before it, hence the shift by one.
    """
    for layer in body.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = torch.is_grad_enabled()  # Transformers checkpoints in training mode only
    if can_pack(body, batch):
        return packed_states(body, batch)  # the same states, without computing on padding
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, L + T] padding on the left does not count
    output = body(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False)
    T = batch.response_mask.shape[1]
    before_each = output.last_hidden_state[:, -T - 1 : -1]  # [B, T, H] the state of the token before each
    return before_each[batch.response_mask]  # [N, H]


def one_token_more(batch: Rollouts) -> Rollouts:
    """The batch with one more token after each response: before it comes the state of the response's last token."""
    T = batch.response_mask.shape[1]
    columns = torch.arange(T + 1, device=batch.response_mask.device)  # [T + 1]
    response_mask = columns <= batch.lengths[:, None]  # [B, T + 1]
    return Rollouts(
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 1)),  # which token it is does not matter
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 1)),  # nor does anything look at it
        response_mask=response_mask,
        sampler_logp=torch.nn.functional.pad(batch.sampler_logp, (0, 1)),
        prompt_index=batch.prompt_index,
        texts=batch.texts,
        finish_reasons=batch.finish_reasons,
    )


@torch.no_grad()
def batch_logprobs(policy: Policy, batch: Rollouts, temperature: float, budget: int) -> torch.Tensor:
    """[B, T] log-probs of a whole batch without gradient, computed in micro-batches of at most `budget` tokens."""
    logp = torch.zeros_like(batch.sampler_logp)  # [B, T]
    for micro in batch.microbatches(batch["row"], budget):
        part, _ = policy(micro, temperature)  # [b, t]
        logp[micro["row"], : part.shape[1]] = part
    return logp


# --- the value network ---


class Value(torch.nn.Module):
    """The value network V: the body of a causal language model, and a linear head that gives one number per token."""

    def __init__(
        self, body, head: torch.nn.Linear | None = None, gradient_checkpointing: bool = False, lora_rank: int = 0
    ):
        """
        head: the trained head of a reward model or of another value network; without one V is 0 at first
        lora_rank: train the head and an adapter of this rank, in a body that may be the policy's too; 0: everything
        """
        super().__init__()
        self.body = body
        self.lora_rank = lora_rank
        use_packed_attention(body)
        if gradient_checkpointing:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        if lora_rank:
            adapters.add_adapter(body, adapters.VALUE, lora_rank)
        self.head = torch.nn.Linear(body.config.get_text_config().hidden_size, 1)
        self.head.weight.data.zero_()
        self.head.bias.data.zero_()
        if head is not None:
            self.head.weight.data.copy_(head.weight)
            if head.bias is not None:
                self.head.bias.data.copy_(head.bias)
        self.eval()  # no dropout

    def forward(self, batch: Rollouts, dtype=torch.float32, after: bool = False) -> torch.Tensor:
        """V_t of the response tokens, with gradient: [B, T], 0 off the mask. V_t is taken before token t.

        after: or after it, so that it knows the token; then it is no value but a judgement
        """
        if self.lora_rank:
            adapters.use(self.body, adapters.VALUE)
        if after:
            longer = one_token_more(batch)
            V = self.head(response_states(self.body, longer)).squeeze(-1)  # [N + B]
            return on_mask(V.to(dtype), longer.response_mask)[:, 1:] * batch.response_mask
        V = self.head(response_states(self.body, batch)).squeeze(-1)  # [N]
        return on_mask(V.to(dtype), batch.response_mask)

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer changes: all, or adapter and head."""
        if self.lora_rank:
            return [*adapters.adapter_weights(self.body, adapters.VALUE).values(), *self.head.parameters()]
        return list(self.parameters())


class Scorer(Value):
    """A reward model: a linear head on the state of each response token after it was written; the last one's counts.

    `model` is the sequence-classification model as Transformers made it, which other programs load.
    """

    def __init__(self, model, gradient_checkpointing: bool = False):
        torch.nn.Module.__init__(self)
        self.model = model
        self.lora_rank = 0
        use_packed_attention(model.base_model)
        if gradient_checkpointing:
            model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.eval()  # no dropout

    @property
    def body(self):
        return self.model.base_model

    @property
    def head(self) -> torch.nn.Linear:
        return scalar_head(self.model)

    def forward(self, batch: Rollouts, each: bool = False) -> torch.Tensor:
        """The score of each response, [B]; with `each` what it would be after each token, [B, T]. With gradient."""
        scores = super().forward(batch, after=True)  # [B, T]
        if each:
            return scores
        last = batch.lengths[:, None] - 1  # [B, 1]
        return scores.gather(1, last).squeeze(1)  # [B]

    @property
    def positions(self) -> int | None:
        """The most tokens that question and response may have together; None without a limit."""
        return positions(self.model)

    def weights(self):
        """Yield (name, tensor) of the model, one at a time, to be saved."""
        yield from self.model.state_dict().items()


def load_scorer(path: str, device: torch.device, gradient_checkpointing: bool = False):
    """(reward model, tokenizer) that starts from a language model, with a head of zeros, or from a reward model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quieten_transformers()
    check_folder("--model", path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many types, as in load_model
        fail(f"--model {path} cannot be loaded as a reward model ({type(error).__name__}): {first_line(error)}")
    check_model("--model", path, model)
    check_tokenizer("--model", path, tokenizer, model)
    model.config.pad_token_id = tokenizer.pad_token_id  # or Transformers would not score a padded batch
    model.eval()
    head = scalar_head(model)
    missing = set(report["missing_keys"])
    in_head = set()
    for name, module in model.named_modules():
        if module is head:
            in_head = {f"{name}.weight", f"{name}.bias"}
    if head is None or missing - in_head:
        fail(f"--model {path}: it cannot be made a reward model with a linear head on its states")
    if missing:  # a language model, which has no such head
        torch.nn.init.zeros_(head.weight)
    if not scores_the_last_token(model):
        fail(f"--model {path}: a reward model here is a causal model with a linear head on its last state")
    return Scorer(model.to(device), gradient_checkpointing), tokenizer


@torch.no_grad()
def batch_scores(scorer: Scorer, batch: Rollouts, budget: int, each: bool = False) -> torch.Tensor:
    """The scores of a whole batch without gradient, [B] or with `each` [B, T], in micro-batches of `budget` tokens."""
    scores = torch.zeros_like(batch.sampler_logp)  # [B, T]
    for micro in batch.microbatches(batch["row"], budget):
        part = scorer(micro, each=True)  # [b, t]
        scores[micro["row"], : part.shape[1]] = part
    if each:
        return scores
    return scores.gather(1, batch.lengths[:, None] - 1).squeeze(1)  # [B]


def make_value(config, policy: Policy, tokenizer) -> Value:
    """The value network that --value-model names, or a copy of the policy; with --lora-rank, on the policy's body.

    Scripts without that flag begin with the copy.
    """
    device = policy.model.device
    checkpointing = config.gradient_checkpointing
    if config.lora_rank:
        return Value(policy.model.base_model, None, checkpointing, config.lora_rank).to(device)
    path = getattr(config, "value_model", "") or config.model
    if config.shard:
        return shard(load_value(path, torch.device("cpu"), tokenizer, checkpointing))
    return load_value(path, device, tokenizer, checkpointing)


def load_value(path: str, device: torch.device, tokenizer=None, gradient_checkpointing: bool = False) -> Value:
    """The value network that starts from a language model, or from a reward model together with its head.

    The body is that of the class that the folder's config.json names, and the head is the linear layer beside it that
    has one output, whatever its name.
    tokenizer: the policy's, whose tokens the value network reads; a model with another vocabulary is refused
    """
    import transformers

    quieten_transformers()
    check_folder("--value-model", path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        name = config.architectures[0] if config.architectures else "AutoModelForCausalLM"
        if not hasattr(transformers, name):
            fail(f"--value-model {path}: its config.json names the class {name}, which Transformers does not have")
        model = getattr(transformers, name).from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # of many types, as in load_model
        fail(f"--value-model {path} cannot be loaded ({type(error).__name__}): {first_line(error)}")
    check_model("--value-model", path, model)
    if tokenizer is not None:
        check_vocabulary("--value-model", path, model, tokenizer)
    model.eval()
    head = scalar_head(model)
    if head is None and model.get_output_embeddings() is None:
        fail(f"--value-model {path}: neither a language model nor a head with one output, as a reward model has")
    if not sees_the_past_only(model.base_model):
        fail(f"--value-model {path}: its states depend on later tokens; it needs a causal model")
    if head is not None and not scores_are_head_of_states(model, head):
        fail(f"--value-model {path}: there is more than a linear head on its states, which is not supported here")
    return Value(model.base_model, head, gradient_checkpointing).to(device)


def scalar_head(model) -> torch.nn.Linear | None:
    """The linear layer with one output that stands beside the body of a model, if there is one."""
    body = set(model.base_model.modules())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 1 and module not in body:
            return module
    return None


def scores_the_last_token(model) -> bool:
    """Whether a reward model is a causal model with a linear head, which gives its score on the last token's state."""
    head = scalar_head(model)
    if head is None:
        return False
    try:
        return sees_the_past_only(model.base_model) and scores_are_head_of_states(model, head)
    except Exception:  # of many types: an architecture that wants more than tokens is none
        return False


@torch.no_grad()
def sees_the_past_only(body) -> bool:
    """Whether the state of a token is the same without the tokens after it."""
    whole = body(PROBE).last_hidden_state[:, 0]
    alone = body(PROBE[:, :1]).last_hidden_state[:, 0]
    return torch.allclose(whole, alone, atol=1e-3)


@torch.no_grad()
def scores_are_head_of_states(model, head: torch.nn.Linear) -> bool:
    """Whether the head on the last state gives the last score of a reward model or value network."""
    by_head = head(model.base_model(PROBE).last_hidden_state[0, -1])
    return torch.allclose(by_head, model(PROBE).logits.flatten()[-1], atol=1e-3)


@torch.no_grad()
def batch_values(value: Value, batch: Rollouts, budget: int) -> torch.Tensor:
    """[B, T] values of a whole batch without gradient, computed in micro-batches of at most `budget` tokens."""
    values = torch.zeros_like(batch.sampler_logp)  # [B, T]
    for micro in batch.microbatches(batch["row"], budget):
        part = value(micro)  # [b, t]
        values[micro["row"], : part.shape[1]] = part
    return values


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, all_sum, eps=1e-8) -> float:
    """1 - Var(returns - values) / (Var(returns) + eps) over the tokens on the mask, [B, T] each.

    1: V predicts every return; 0: no better than a constant; below: worse. Returns that are all equal leave 1 or less.
    all_sum adds up a number over the processes.
    """
    n = all_sum(mask.sum())  # tokens

    def variance(x):
        mean = all_sum((x * mask).sum()) / n
        return all_sum(((x - mean) * mask).square().sum()) / n

    return 1 - (variance(returns - values) / (variance(returns) + eps)).item()
