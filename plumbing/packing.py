"""States of a model without computing on padding: all tokens of a batch stand in one row, the pack.

Two prompts P Q and R S, with responses A B C, D E and F G:

    rows, as in a padded batch    P Q A B C      the pack    P Q A B D R S F
                                  P Q D E
                                  R S F G

A prompt that neighbouring rows share appears once; the last token of a response predicts nothing and is left out.
Everything in a transformer but attention treats each token by itself, so it runs on the pack. Attention alone unpacks
the rows: P Q A B, P Q D, R S F, padded on the right, where the causal mask hides the padding.
"""

from dataclasses import dataclass

import torch

from batch import Rollouts
from plumbing.fail import say

ATTENTION = "packed_sdpa"  # the name of our attention in Transformers' registry
NOT_PACKED = "model: this architecture cannot leave padding out, so updates compute on padding too, and take longer"


@dataclass
class Pack:
    """N tokens in one row, and where they belong."""

    tokens: torch.Tensor  # [N]
    positions: torch.Tensor  # [N] of each token in its row
    rows: torch.Tensor  # [B, W] the places in the pack of each row's tokens; 0 where a row has ended
    first_places: torch.Tensor  # [N] where in rows.flatten() each token of the pack stands for the first time
    predicting_places: torch.Tensor  # the places in the pack whose states predict the response tokens, row after row

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, N, d] -> [B, heads, W, d]"""
        x = x[0].index_select(1, self.rows.flatten())  # [heads, B * W, d]
        return x.unflatten(1, self.rows.shape).transpose(0, 1)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B, W, heads, d] -> [1, N, heads, d]"""
        return x.flatten(0, 1).index_select(0, self.first_places)[None]


def make_pack(batch: Rollouts) -> Pack:
    """The pack of a batch."""
    B = len(batch.input_ids)
    L = batch.prompt_width
    device = batch.input_ids.device
    p = batch.prompt_lengths[:, None]  # [B, 1]
    r = batch.lengths[:, None]  # [B, 1]
    rows = torch.arange(B, device=device)[:, None]  # [B, 1]

    # Which tokens are in the pack: each prompt once, and responses without their last token, which predicts nothing.
    begins = torch.ones(B, 1, dtype=torch.bool, device=device)  # [B, 1] whether the row before has another prompt
    begins[1:, 0] = batch.prompt_index[1:] != batch.prompt_index[:-1]
    columns = torch.arange(batch.input_ids.shape[1], device=device)  # [L + T]
    prompt = (columns >= L - p) & (columns < L)  # [B, L + T]
    response = (columns >= L) & (columns < L + r - 1)  # [B, L + T]
    kept = (prompt & begins) | response  # [B, L + T]
    positions = (columns - L + p).expand(B, -1)  # [B, L + T] of a token in its row

    # Where they are: the k-th kept token has place k, and a shared prompt is that of the first row of its group.
    places = (kept.flatten().cumsum(0) - 1).view(kept.shape)  # [B, L + T]
    first_rows = torch.where(begins, rows, 0).cummax(0).values  # [B, 1]
    places = torch.where(prompt, places[first_rows[:, 0]], places)  # [B, L + T]

    # The same, row by row from the left: W columns, of which row i has p + r - 1.
    width = int((p + r).max()) - 1  # W
    shifted = torch.arange(width, device=device) + L - p  # [B, W] the column of each
    is_real = shifted < L + r - 1  # [B, W]
    rows_of_places = torch.where(is_real, places.gather(1, shifted.clamp(max=len(columns) - 1)), 0)  # [B, W]
    predicts = is_real & (shifted >= L - 1)  # [B, W] from the last token of the prompt on
    return Pack(
        tokens=batch.input_ids[kept],
        positions=positions[kept],
        rows=rows_of_places,
        first_places=(rows * width + positions)[kept],  # the column of a token in `rows` is its position
        predicting_places=rows_of_places[predicts],
    )


def packed_states(body, batch: Rollouts) -> torch.Tensor:
    """[N, H] states of a model's body that predict the N response tokens of a batch."""
    pack = make_pack(batch)
    output = body(
        input_ids=pack.tokens[None],  # [1, N]
        position_ids=pack.positions[None],  # [1, N]
        # Transformers leaves a mask with four dimensions as it is, and with a pack our attention takes no mask.
        attention_mask=torch.zeros(1, 1, 1, 1, device=pack.tokens.device),
        use_cache=False,
        packing=pack,  # Transformers hands it on to the attention of every layer
    )
    return output.last_hidden_state[0, pack.predicting_places]


def packed_attention(module, query, key, value, attention_mask, packing: Pack | None = None, **kwargs):
    """Attention as Transformers computes it by default; given a pack, between the tokens of a row."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None and attention_mask is not None and query.device.type == "cpu" and "position_bias" not in kwargs:
        return masked_attention(query, key, value, attention_mask, **kwargs)
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs["is_causal"] = True
    # Under autocast the rotary embedding leaves queries and keys in float32, twice as large as they will be used.
    query = packing.unpack(query.to(value.dtype))  # [B, heads, W, d]
    key = packing.unpack(key.to(value.dtype))
    value = packing.unpack(value)
    out, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)  # [B, W, heads, d]
    return packing.pack(out), None


def masked_attention(query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention with a mask on a CPU, where query heads share a head of keys and values, [B, heads, t, d] each.

    Transformers would first copy keys and values for every query head: the whole cache, for every sampled token.
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )  # [B, heads, t, d]
    return out.transpose(1, 2).contiguous(), None


def use_packed_attention(model) -> None:
    """Give a model the attention that can take a pack; a model that does not look its attention up keeps its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without this line padding would be attended to
    if model.config._attn_implementation == "sdpa":  # the default of most models; ours does the same without a pack
        model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        say(NOT_PACKED)


def can_pack(body, batch: Rollouts) -> bool:
    """Whether packing leaves every state as it is: tokens interact in attention only, and the attention is ours."""
    if body.config._attn_implementation != ATTENTION:
        return False
    if not hasattr(body, "packs"):  # tried once per model
        body.packs = packed_equals_alone(body)
        if not body.packs:
            say(NOT_PACKED)
    if not body.packs:
        return False
    window = getattr(body.config.get_text_config(), "sliding_window", None)
    return not window or batch.input_ids.shape[1] <= window  # beyond it attention would need a mask


@torch.no_grad()
def packed_equals_alone(body) -> bool:
    """Whether the states of a small pack are those of its rows computed one by one."""
    device = next(body.parameters()).device
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 8], [9, 2, 1, 3, 5, 0]], device=device)  # 0 is padding
    mask = (ids > 0).long()
    batch = Rollouts(
        input_ids=ids,
        attention_mask=mask,
        response_mask=mask[:, 3:].bool(),  # two responses to one prompt, and a shorter one to another
        sampler_logp=torch.zeros(3, 3, device=device),
        prompt_index=torch.tensor([0, 0, 1], device=device),
        texts=[""] * 3,
        finish_reasons=["stop"] * 3,
    )
    with torch.autocast(device.type, enabled=False):
        alone = []
        for row, real, p in zip(ids, mask.bool(), batch.prompt_lengths.tolist(), strict=True):
            states = body(row[real][None], use_cache=False).last_hidden_state[0]
            alone.append(states[p - 1 : -1])  # each state predicts the next token
        return torch.allclose(packed_states(body, batch), torch.cat(alone), rtol=1e-3, atol=1e-3)
