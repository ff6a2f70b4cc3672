"""LightningDiT, and DiT as its starting point.

Paper: arXiv 2501.01423, Sec. 4 ("Improved Diffusion Transformer"), the architecture rows of Table 1. The training rows are in train_dit.py.

How to read it: SIZES, the parts in the order in which Table 1 adds them (SwiGLU FFN, RMS Norm, Rotary Pos Embed), the block, then LightningDiT, whose
forward() is a ladder of shapes. Every trick is a switch; with use_swiglu, use_rmsnorm and use_rope off, what is left is DiT of Peebles & Xie.

Names and shapes of the weights are those of the authors' released checkpoints, so these load with strict=True.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# XL, L, B: DiT's ("our model's other architectural parameters are consistent with those of DiT" [Sec. 5.1]). 1.0B, 1.6B: Fig. 4c, the authors' code.
SIZES = {
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "1.0B": dict(depth=24, hidden_size=1536, num_heads=24),
    "1.6B": dict(depth=28, hidden_size=1792, num_heads=28),
    # ours, for preset mini (two CPU cores) and its scaling study
    "mini-XS": dict(depth=3, hidden_size=64, num_heads=2),
    "mini-S": dict(depth=4, hidden_size=128, num_heads=4),
    "mini": dict(depth=6, hidden_size=192, num_heads=6),
    "mini-L": dict(depth=8, hidden_size=320, num_heads=10),
}


# --- Embeddings ---------------------------------------------------------------------------------------------------------------------------------
def sincos_pos_embed(dim, side):
    """DiT's fixed 2-D position embedding, (1, side^2, dim): half the channels for the column, half for the row, each sines then cosines."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))   # (dim/4,)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega           # (side, dim/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                        # (side, dim/2)
    column = line[None, :, :].expand(side, side, -1)
    row = line[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, dim).float()   # (1, side^2, dim)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, width): 256 sinusoids of t as it is, in [0, 1], not times 1000 (the authors' code), then a two-layer MLP."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t):
        omega = torch.exp(-math.log(10000.0) * torch.arange(self.half, dtype=torch.float32, device=t.device) / self.half)   # (128,)
        angle = t.float()[:, None] * omega                                     # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))   # (B, 256) -> (B, width)


class LabelEmbedder(nn.Module):
    """Class embedding. The last row of the table is the null class of classifier-free guidance; it exists only if labels are dropped at all."""

    def __init__(self, num_classes, width, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y, drop):
        """y (B,) in [0, num_classes]; drop (B,) bool: which labels become the null class. None: at random in training, none else."""
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout_prob
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes, y))   # (B, width)


# --- [Table 1] + SwiGLU FFN, + RMS Norm, + Rotary Pos Embed ---------------------------------------------------------------------------------------
class SwiGLU(nn.Module):
    """[Table 1, + SwiGLU FFN] w3(silu(w1 x) * w2 x). w1 and w2 are one matrix; hidden width 2/3 of the MLP's, so that the parameters stay equal."""

    def __init__(self, width, hidden):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)                                  # 2 x (B, N, hidden)
        return self.w3(F.silu(x1) * x2)                                        # (B, N, width)


class Mlp(nn.Module):
    """DiT's feed-forward network: GELU in its tanh form."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.Module):
    """[Table 1, + RMS Norm] x / sqrt(mean(x^2) + eps) * weight, computed in fp32 whatever the autocast."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class RotaryEmbedding(nn.Module):
    """[Table 1, + Rotary Pos Embed] 2-D RoPE on q and k: half of a head's channels turn with the row, half with the column."""

    def __init__(self, head_dim, side):
        super().__init__()
        omega = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))   # (head_dim/4,)
        angle = (torch.arange(side).float()[:, None] * omega).repeat_interleave(2, dim=1)   # (side, head_dim/2), each frequency for a pair
        angle = torch.cat([angle[:, None, :].expand(side, side, -1), angle[None, :, :].expand(side, side, -1)], dim=2)   # rows, then columns
        self.register_buffer("freqs_cos", angle.reshape(side * side, head_dim).cos())   # (N, head_dim), N = side^2
        self.register_buffer("freqs_sin", angle.reshape(side * side, head_dim).sin())

    def forward(self, x):
        # (x1, x2) of a pair turns by its angle a: (x1 cos a - x2 sin a, x2 cos a + x1 sin a). x: (B, heads, N, head_dim)
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-x2, x1], dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


# --- The transformer ----------------------------------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width, num_heads, use_qknorm, use_rmsnorm):
        super().__init__()
        head_norm = RMSNorm if use_rmsnorm else nn.LayerNorm
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # QK-norm keeps the logits bounded: the way out when bf16 training meets NaN late (authors' issue tracker)
        self.q_norm = head_norm(width // num_heads) if use_qknorm else nn.Identity()
        self.k_norm = head_norm(width // num_heads) if use_qknorm else nn.Identity()

    def forward(self, x, rope):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)   # 3 x (B, heads, N, C/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)    # softmax(q k^T / sqrt(C/heads)) v
        return self.proj(h.transpose(1, 2).reshape(B, N, C))                   # (B, N, C)


def modulate(x, shift, scale):
    """adaLN: x (B, N, C) scaled and shifted by the condition (B, C). shift None: wo_shift."""
    x = x * (1 + scale.unsqueeze(1))
    return x if shift is None else x + shift.unsqueeze(1)


def layer_norm(width, use_rmsnorm):
    return RMSNorm(width) if use_rmsnorm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """DiT's block with adaLN-Zero; wo_shift leaves out the two shifts."""

    def __init__(self, width, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, wo_shift):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = layer_norm(width, use_rmsnorm), layer_norm(width, use_rmsnorm)
        self.attn = Attention(width, num_heads, use_qknorm, use_rmsnorm)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if use_swiglu else Mlp(width, hidden)
        self.wo_shift = wo_shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (4 if wo_shift else 6) * width))

    def forward(self, x, c, rope):
        chunks = self.adaLN_modulation(c).chunk(4 if self.wo_shift else 6, dim=1)   # each (B, C)
        if self.wo_shift:
            (scale1, gate1, scale2, gate2), shift1, shift2 = chunks, None, None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, patch_size, out_channels, use_rmsnorm):
        super().__init__()
        self.norm_final = layer_norm(width, use_rmsnorm)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))         # (B, N, p*p*C)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                         # (B, N, width), N = (S/p)^2


class LightningDiT(nn.Module):
    """LightningDiT [Sec. 4]; the defaults are XL/1 on f16d32 latents of 256x256 images, 675 M parameters.

    input_size: side S of the latent. patch_size: p; "we set the patch size of DiT to 1" [Sec. 5.1]. in_channels: d. The three use_* switches that
    default to True are Table 1's architecture rows. use_qknorm, wo_shift: options of the authors' code, off in the paper's systems.
    """

    def __init__(self, input_size=16, patch_size=1, in_channels=32, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0, num_classes=1000,
                 class_dropout_prob=0.1, use_qknorm=False, use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=False):
        super().__init__()
        for what, size, divisor in (("input_size", input_size, patch_size), ("hidden_size", hidden_size, num_heads),
                                    ("hidden_size / num_heads", hidden_size // num_heads, 4), ("hidden_size", hidden_size, 4)):
            if size % divisor:
                raise ValueError(f"LightningDiT: {what} = {size} is not divisible by {divisor}")
        self.patch_size, self.in_channels, self.num_classes, self.checkpointing = patch_size, in_channels, num_classes, False
        side = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # LightningDiT keeps DiT's absolute positions beside RoPE (the authors' code)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, side), requires_grad=False)
        self.feat_rope = RotaryEmbedding(hidden_size // num_heads, side) if use_rope else None
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, wo_shift) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels, use_rmsnorm)
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's initialisation: Xavier for linear layers, N(0, 0.02) for embeddings, zero where a block or the output must start as identity or 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))   # as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)                                       # adaLN-Zero
            nn.init.zeros_(layer.bias)

    def unpatchify(self, x):
        """(B, N, p*p*C) -> (B, C, S, S)"""
        B, N, _ = x.shape
        side, p = math.isqrt(N), self.patch_size
        x = x.view(B, side, side, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4)   # (B, C, side, p, side, p)
        return x.reshape(B, self.in_channels, side * p, side * p)

    def forward(self, x, t, y, drop=None):
        """Velocity at (x, t) for class y.

        x (B, C, S, S): noised latent. t (B,) in [0, 1]: 0 is noise, 1 is data. y (B,) int64: class, num_classes is the null class.
        drop (B,) bool: labels to replace by the null class (training passes it; see LabelEmbedder). Returns (B, C, S, S).
        """
        x = self.x_embedder(x) + self.pos_embed                                # (B, N, width)
        c = self.t_embedder(t) + self.y_embedder(y, drop)                      # (B, width)
        for block in self.blocks:
            if self.checkpointing and self.training:                           # memory for time: keep only each block's input
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=False)
            else:
                x = block(x, c, self.feat_rope)                                # (B, N, width)
        return self.unpatchify(self.final_layer(x, c))                         # (B, N, p*p*C) -> (B, C, S, S)
