"""LightningDiT, and DiT as its starting point.

Paper: arXiv 2501.01423, Sec. 4: the architecture rows of Table 1. Its other rows are in train_dit.py.

Read it top to bottom: SIZES; the parts in the order in which Table 1 adds them (SwiGLU FFN, RMS Norm,
Rotary Pos Embed); the block; the embeddings and the final layer; LightningDiT, whose forward() is a ladder
of shapes. Every trick is a switch: without use_swiglu, use_rmsnorm and use_rope, DiT remains.

Shapes: B images, C channels and side S of a latent, patch size p, N = (S/p)^2 tokens, width D. The names
and shapes of the weights are the authors', so that their released checkpoints load strictly.
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vae import torch_load

# B, L and XL are DiT's: "our model's other architectural parameters are consistent with those of DiT"
# [Sec. 5.1]. 1.0B and 1.6B [Fig. 4c] are those of the authors' code. The mini sizes are for two CPU cores
# (our choice).
SIZES = {name: {"depth": depth, "hidden_size": width, "num_heads": heads} for name, (depth, width, heads) in {
    "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),
    "1.0B": (24, 1536, 24), "1.6B": (28, 1792, 28),
    "mini-XS": (3, 64, 2), "mini-S": (4, 128, 4), "mini": (6, 192, 6), "mini-L": (8, 320, 10)}.items()}

class SwiGLU(nn.Module):
    """(B, N, D) -> (B, N, D) [Table 1, + SwiGLU FFN]. The matrix w12 holds both w1 and w2."""
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)  # 2 x (B, N, hidden)
        # w3(silu(w1 x) * w2 x): one half of the channels gates the other
        return self.w3(F.silu(x1) * x2)  # (B, N, D)

def mlp(width, hidden):
    """(B, N, D) -> (B, N, D): DiT's feed-forward network, with the tanh approximation of GELU."""
    fc1, fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(approximate="tanh"), fc2=fc2))

class RMSNorm(nn.Module):
    """(..., width) -> (..., width) [Table 1, + RMS Norm]. Unlike LayerNorm, it does not subtract the mean."""
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        # x / sqrt(mean(x^2) + eps) * weight, in fp32 even under autocast: bf16 would round the mean too much
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight

class RotaryEmbedding(nn.Module):
    """q or k (B, heads, N, head_dim) -> the same shape, rotated [Table 1, + Rotary Pos Embed].
    In 2-D RoPE, half of a head's channels rotate with the row of the token and half with its column. The dot
    product of a rotated q and a rotated k then depends on how far apart their tokens are, not on where."""
    def __init__(self, head_dim, side):
        super().__init__()
        # omega_i = 10000^(-i / (head_dim / 4)); the base is RoPE's
        omega = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))  # (head_dim/4,)
        angle = torch.arange(side).float()[:, None] * omega  # (side, head_dim/4)
        angle = angle.repeat_interleave(2, dim=1)  # (side, head_dim/2), one angle per pair
        row, column = angle[:, None, :].expand(side, side, -1), angle[None, :, :].expand(side, side, -1)
        angle = torch.cat([row, column], dim=2).reshape(side * side, head_dim)  # (N, head_dim)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        # a pair of channels (x1, x2) rotates by its angle a: (x1 cos a - x2 sin a, x2 cos a + x1 sin a)
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)  # 2 x (B, heads, N, head_dim/2)
        quarter_turn = torch.stack([-x2, x1], dim=-1).flatten(-2)  # (B, heads, N, head_dim)
        return x * self.freqs_cos + quarter_turn * self.freqs_sin

class Attention(nn.Module):
    """(B, N, D) -> (B, N, D): self-attention over all tokens of a latent."""
    def __init__(self, width, num_heads, use_qknorm, use_rmsnorm):
        super().__init__()
        self.num_heads, head_norm = num_heads, RMSNorm if use_rmsnorm else nn.LayerNorm
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # QK-norm bounds the logits. The paper does not use it; the authors' issues recommend it against the
        # NaN that bf16 training can meet late, after some 200,000 steps.
        self.q_norm = head_norm(width // num_heads) if use_qknorm else nn.Identity()
        self.k_norm = head_norm(width // num_heads) if use_qknorm else nn.Identity()

    def forward(self, x, rope):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        # unbinding before transposing lets autograd write the gradient of qkv once, in its own layout
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 x (B, heads, N, D/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        # softmax(q k^T / sqrt(D/heads)) v
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(h.transpose(1, 2).reshape(B, N, D))  # (B, N, D)

def modulate(x, shift, scale):
    """adaLN: x (B, N, D) times 1 + scale (B, D), plus shift (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

def layer_norm(width, use_rmsnorm):
    """The norm before a branch. DiT's LayerNorm has no weights, since adaLN scales and shifts after it;
    RMSNorm keeps its weight (authors' code)."""
    return RMSNorm(width) if use_rmsnorm else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

class Block(nn.Module):
    """Tokens x (B, N, D), condition c (B, D) -> (B, N, D): DiT's block with adaLN-Zero.
    The condition (time and class) sets the scale and shift after each norm and the gate of each branch. The
    gates start at 0, so that a fresh block is the identity; DiT compared four ways to condition and found
    this one the best."""
    def __init__(self, width, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(width, use_rmsnorm), layer_norm(width, use_rmsnorm)
        self.attn = Attention(width, num_heads, use_qknorm, use_rmsnorm)
        # SwiGLU has three matrices where the MLP has two: 2/3 of the width keeps the number of weights
        hidden = int(width * mlp_ratio)
        self.mlp = SwiGLU(width, int(2 / 3 * hidden)) if use_swiglu else mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 x (B, D)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))

# --- Embeddings of position, time and class, and the final layer ---
def sincos_pos_embed(dim, side):
    """DiT's fixed 2-D position embedding (1, N, dim): half of the channels for the column, half for the
    row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim/4,)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, dim/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, dim/2)
    column, row = line[None, :, :].expand(side, side, -1), line[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, dim).float()  # (1, N, dim)

class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D): DiT's 256 sinusoids of t, then a two-layer MLP.
    The time is not scaled: it runs from 0 to 999 in DDPM and from 0 to 1 in rectified flow, where no sinusoid
    completes a period (authors' code)."""
    def __init__(self, width, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t):
        # omega_i = 10000^(-i / 128); the base is the Transformer's
        i = torch.arange(self.half, dtype=torch.float32, device=t.device)  # (128,)
        angle = t.float()[:, None] * torch.exp(-math.log(10000.0) * i / self.half)  # (B, 128)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, 256)
        # the cast is for models whose weights are bf16, used without autocast
        return self.mlp(waves.to(self.mlp[0].weight.dtype))  # (B, D)

class LabelEmbedder(nn.Module):
    """Class y (B,) int64 in [0, num_classes] -> (B, D). num_classes itself is the null class of guidance, the
    last row of the table, which exists only if labels are dropped (dropout_prob > 0). drop (B,) bool: labels
    to replace by the null class. None: draw them with dropout_prob in training, drop none otherwise."""
    def __init__(self, num_classes, width, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y, drop):
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout_prob
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes, y))

class FinalLayer(nn.Module):
    """Tokens (B, N, D), condition c (B, D) -> (B, N, p*p*C)."""
    def __init__(self, width, patch_size, out_channels, use_rmsnorm):
        super().__init__()
        self.norm_final = layer_norm(width, use_rmsnorm)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # 2 x (B, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class LightningDiT(nn.Module):
    """LightningDiT [Sec. 4]. The defaults are XL/1 for f16d32 latents of 256x256 images, 675 M weights.
    input_size: side S of the latent. patch_size: p; "we set the patch size of DiT to 1" [Sec. 5.1].
    in_channels: C. use_swiglu, use_rmsnorm, use_rope: rows 6, 7 and 8 of Table 1. use_qknorm: an option of
    the authors' code, off in the paper. ValueError unless patch_size divides input_size and 4 * num_heads
    divides hidden_size."""
    def __init__(self, input_size=16, patch_size=1, in_channels=32, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, use_qknorm=False, use_swiglu=True,
                 use_rope=True, use_rmsnorm=True):
        super().__init__()
        # a head has a multiple of 4 channels: RoPE rotates pairs of them, and there are two axes
        if input_size % patch_size or hidden_size % num_heads or hidden_size // num_heads % 4:
            raise ValueError(f"LightningDiT: input_size {input_size} must be a multiple of patch_size "
                             f"{patch_size}, hidden_size {hidden_size} of 4 x num_heads {num_heads}")
        self.patch_size, self.in_channels, side = patch_size, in_channels, input_size // patch_size
        self.num_classes, self.checkpointing = num_classes, False
        # one token per p x p latent pixels: a convolution whose windows do not overlap
        patches = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.x_embedder = nn.Sequential(OrderedDict(proj=patches))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # DiT's absolute positions stay beside RoPE (authors' code).
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, side), requires_grad=False)
        self.feat_rope = RotaryEmbedding(hidden_size // num_heads, side) if use_rope else None
        args = hidden_size, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm
        self.blocks = nn.ModuleList(Block(*args) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels, use_rmsnorm)
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's initialisation: Xavier for linear layers, N(0, 0.02) for embeddings, 0 for gates and
        output."""
        # the convolution that makes tokens is a linear layer of each patch
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for layer in linear + [self.x_embedder.proj]:
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(layer.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-Zero: scales, shifts and gates start at 0, and so does the network's output
        modulations = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in modulations + [self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)

    def unpatchify(self, x):
        """(B, N, p*p*C) -> (B, C, S, S)"""
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.view(len(x), side, side, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.in_channels, side * p, side * p)  # from (B, C, S/p, p, S/p, p)

    def forward(self, x, t, y, drop=None):
        """Noised latent x (B, C, S, S), time t (B,), class y (B,) -> velocity (B, C, S, S).
        t is in [0, 1], where 0 is noise and 1 is data. y int64: num_classes is the null class. drop (B,)
        bool: labels to replace by it, in training. In row 0 of Table 1 the output is DDPM's noise and t is
        DDPM's step, from 0 (data) to 999 (noise): row 1 changes the objective and, with it, the range of
        t."""
        x = self.x_embedder(x).flatten(2).transpose(1, 2)  # (B, D, S/p, S/p) -> (B, N, D)
        # contiguous, or all blocks would keep the transposed layout, which costs a copy before each product
        x = x.contiguous() + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, drop)  # (B, D)
        for block in self.blocks:
            if self.checkpointing and self.training:
                # saves memory and costs time: only each block's input is kept, the rest is computed again
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=False)
            else:
                x = block(x, c, self.feat_rope)  # (B, N, D)
        return self.unpatchify(self.final_layer(x, c))  # (B, N, p*p*C) -> (B, C, S, S)

# === Plumbing: files, flags, processes ===
def read_released_dit(path):
    """Weights of the authors' checkpoint or of ours: its `ema`, else its `model`, else the file itself,
    without what DistributedDataParallel (module.) and torch.compile (_orig_mod.) put in front of the
    names."""
    state = torch_load(path)
    weights = state.get("ema", state.get("model", state))
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value
            for name, value in weights.items() if torch.is_tensor(value)}
