"""Models of the shape that remote code has: of Baichuan's and ChatGLM's, and hopeless ones."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCABULARY = 97


class RemoteConfig(PretrainedConfig):
    model_type = "remote"

    def __init__(
        self,
        vocab_size: int = VOCABULARY,
        hidden_size: int = 48,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 3,
        mixer: str = "sdpa",
        z_loss_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.mixer, self.z_loss_weight = mixer, z_loss_weight
        super().__init__(**kwargs)


class RemoteRotaryEmbedding(nn.Module):
    """Makes tables of seq_len positions, as code of 2023 does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor, seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(seq_len or 0).float(), self.inv_freq)
        table = torch.cat([angles, angles], dim=-1)
        return table.cos()[None, None], table.sin()[None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    cos, sin = (t[0, 0][position_ids][:, None] for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class RemoteAttention(nn.Module):
    """Baichuan's: one projection, a mask made by the model, torch's attention."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.num_attention_heads, config.hidden_size
        self.W_pack = nn.Linear(self.dim, 3 * self.dim, bias=False)
        self.o_proj = nn.Linear(self.dim, self.dim, bias=False)
        self.rotary_emb = RemoteRotaryEmbedding(self.dim // self.heads)

    def projected(self, x: Tensor, position_ids: Tensor) -> list[Tensor]:
        b, n, _ = x.shape
        q, k, v = self.W_pack(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = self.rotary_emb(v, seq_len=k.shape[-2])
        return [rotate(q, cos, sin, position_ids), rotate(k, cos, sin, position_ids), v]

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = self.projected(x, position_ids)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class OwnSoftmaxAttention(RemoteAttention):
    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = self.projected(x, position_ids)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + attention_mask
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class AlibiAttention(RemoteAttention):
    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = self.projected(x, position_ids)
        slopes = torch.tensor([2.0**-i for i in range(1, self.heads + 1)])[:, None, None]
        bias = attention_mask + slopes * torch.arange(k.shape[2])
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class WindowedAttention(RemoteAttention):
    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = self.projected(x, position_ids)
        n = q.shape[2]
        near = torch.ones(n, n).tril().triu(-4).bool()
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=near[None, None])
        return self.o_proj(output.transpose(1, 2).flatten(2))


class TokenShift(nn.Module):
    """Mixes each token with the one before, as RWKV does."""

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.proj(x + F.pad(x, (0, 0, 1, -1)))


class ShardPositions(RemoteAttention):
    """Ignores position_ids and counts tokens itself."""

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(x, attention_mask, torch.arange(x.shape[1])[None])


class GlmAttention(RemoteAttention):
    """ChatGLM's: tokens first, and a causal flag instead of a mask."""

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        q, k, v = self.projected(x, position_ids)
        q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(output.transpose(1, 2).flatten(2))


MIXERS: dict[str, type[nn.Module]] = {
    "sdpa": RemoteAttention,
    "glm": GlmAttention,
    "softmax": OwnSoftmaxAttention,
    "alibi": AlibiAttention,
    "window": WindowedAttention,
    "shift": TokenShift,
    "positions": ShardPositions,
}


class RemoteLayer(nn.Module):
    def __init__(self, config: RemoteConfig) -> None:
        super().__init__()
        self.mixer = MIXERS[config.mixer](config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 96), nn.GELU(), nn.Linear(96, config.hidden_size)
        )

    def forward(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x), attention_mask, position_ids)
        return x + self.mlp(self.norm(x))


class RemoteForCausalLM(PreTrainedModel):
    """Shifts labels and computes the loss itself."""

    config_class = RemoteConfig
    config: RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RemoteLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        b, n = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(n)[None].expand(b, n)
        hidden = ~torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            hidden = hidden | ~attention_mask.bool()[:, None, None]
        mask = torch.zeros(b, 1, n, n).masked_fill(hidden, torch.finfo(torch.float32).min)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, mask, position_ids)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            scores = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(scores, labels[:, 1:].flatten())
            if self.config.z_loss_weight:
                loss = loss + self.config.z_loss_weight * scores.max(-1).values.square().mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits)
