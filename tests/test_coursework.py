"""The course: whether marks can be trusted, handouts are whole and leak nothing, and the texts are true.

ANSWERS holds a right answer for every exercise, in another form than the scripts', and wrong ones as changes of it:
`what is wrong: old => new`, several changes with `;;` between them. Right answers must get full marks; wrong ones
must lose some, in their own exercise.
"""
import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "coursework"
sys.path.insert(0, str(HERE))
import course  # noqa: E402
import grade  # noqa: E402
import handout  # noqa: E402
import worker  # noqa: E402
from course import EXERCISES, ROOT, SCRIPTS, SETS, TEXTS, of_set, questions  # noqa: E402

ANSWERS = r'''
hinge
    @hinge_generator
    return fake.neg().sum() / fake.numel()
    @hinge_discriminator
    return (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2
sign: fake.neg() => fake
a margin: fake.neg() => F.relu(1 - fake)
sum: .sum() / fake.numel() => .sum()
swapped: 1 - real => 1 + real ;; 1 + fake => 1 - fake
no half: .mean()) / 2 => .mean())
no relu: torch.clamp(1 - real, min=0) => (1 - real)
squared: torch.clamp(1 + fake, min=0) => torch.clamp(1 + fake, min=0).square()
float64: fake.neg() => fake.double().neg()
posterior
    noise = torch.empty_like(self.mean).normal_() if noise is None else noise
    return torch.addcmul(self.mean, self.logvar.exp().sqrt(), noise)
variance for deviation: .exp().sqrt() => .exp()
one noise for all: torch.empty_like(self.mean).normal_() => torch.randn(())
uniform noise: .normal_() => .uniform_()
detached: self.logvar.exp().sqrt() => self.logvar.exp().sqrt().detach()
the given noise ignored: if noise is None else noise => if True else noise
in place: return torch.addcmul(self.mean, self.logvar.exp().sqrt(), noise) => noise *= self.logvar.exp().sqrt()\nreturn self.mean + noise
half precision: noise) => noise.half())
kl
    per_value = self.mean.square() + torch.exp(self.logvar) - self.logvar - 1
    return per_value.flatten(1).sum(1).mul(0.5)
mean: .sum(1) => .mean(1)
sign: - self.logvar => + self.logvar
no half: .mul(0.5) => .mul(1)
over the batch: .flatten(1).sum(1) => .sum()
the mean not squared: .square() => .abs()
no one: - self.logvar - 1 => - self.logvar
logvar is std: torch.exp(self.logvar) => torch.exp(2 * self.logvar)
rec
    total = F.l1_loss(x_hat, x, reduction="sum")
    if lpips is not None:
        total = total + lpips_weight * lpips(x, x_hat).sum() * x.shape[1] * x.shape[2] * x.shape[3]
    return total / x.shape[0]
mean: / x.shape[0] => / x.numel()
not over the batch: / x.shape[0] => / 1
squares: F.l1_loss => F.mse_loss
LPIPS once an image: .sum() * x.shape[1] * x.shape[2] * x.shape[3] => .sum()
weight forgotten: lpips_weight * lpips => lpips
images swapped: lpips(x, x_hat) => lpips(x_hat, x)
detached: lpips(x, x_hat) => lpips(x, x_hat.detach())
resnet
    @NormSiLU.forward
    h = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    return h * h.sigmoid()
    @ResnetBlock.forward
    h = self.norm1(x)
    h = self.conv1(h)
    h = self.norm2(h)
    return self.conv2(h) + self.nin_shortcut(x)
no shortcut: + self.nin_shortcut(x) => + 0
shortcut without its layer: self.nin_shortcut(x) => (x if x.shape[1] == h.shape[1] else 0)
ReLU: h * h.sigmoid() => F.relu(h)
sigmoid: h * h.sigmoid() => h.sigmoid()
SiLU first: return h * h.sigmoid() => return F.group_norm(F.silu(x), self.num_groups, self.weight, self.bias, self.eps)
eps of the norm: self.bias, self.eps) => self.bias, 0.5)
no first norm: h = self.norm1(x) => h = x
norm after: h = self.norm2(h)\n => 
in place: h = self.norm1(x) => h = self.norm1(x.mul_(1.5))
detached: self.conv1(h) => self.conv1(h).detach()
attn
    n = self.norm(x)
    q, k, v = (layer(n).flatten(2) for layer in (self.q, self.k, self.v))
    a = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(-1)
    return x + self.proj_out(torch.einsum("bij,bcj->bci", a, v).view_as(x))
no scale: .div(q.shape[1] ** 0.5) => 
scale without the root: ** 0.5 => ** 1
wrong softmax: .softmax(-1) => .softmax(1)
no residual: return x + => return 0 * x +
not swapped back: torch.einsum("bij,bcj->bci", a, v).view_as(x) => torch.einsum("bij,bcj->bic", a, v).reshape(x.shape)
no norm: n = self.norm(x) => n = x
keys for queries: torch.einsum("bci,bcj->bij", q, k) => torch.einsum("bci,bcj->bij", k, q)
no proj_out: self.proj_out(torch => (torch
weights without a gradient: .softmax(-1) => .softmax(-1).detach()
across images: .softmax(-1) => .softmax(0)
batches
    out = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(place, n)
        out.append(int(epoch_order(n, seed, epoch)[i]))
    return torch.tensor(out)
always epoch 0: seed, epoch) => seed, 0)
off by one: range(step * batch_size, (step + 1) * batch_size) => range((step + 1) * batch_size, (step + 2) * batch_size)
seed forgotten: epoch_order(n, seed, => epoch_order(n, 0,
at random: int(epoch_order(n, seed, epoch)[i]) => int(torch.randint(n, ()))
int32: torch.tensor(out) => torch.tensor(out, dtype=torch.int32)
short at the border: out.append => if epoch == step * batch_size // n: out.append
in order: int(epoch_order(n, seed, epoch)[i]) => i
lpips
    @LPIPS.unit_features
    h, maps = (x - self.mean) / self.std, []
    for layer in self.features:
        if isinstance(layer, nn.MaxPool2d):
            maps.append(h * torch.rsqrt(h.pow(2).sum(dim=1, keepdim=True) + 1e-10))
        h = layer(h).clone()
    return maps
    @LPIPS.forward
    total = 0
    for lin, a, b in zip(self.lin, self.unit_features(x.detach()), self.unit_features(x_hat)):
        total = total + lin((a - b).square()).mean(dim=(2, 3), keepdim=True)
    return total
eps outside: h * torch.rsqrt(h.pow(2).sum(dim=1, keepdim=True) + 1e-10) => h / (torch.sqrt(h.pow(2).sum(dim=1, keepdim=True)) + 1e-10)
not normalised: h, maps = (x - self.mean) / self.std, [] => h, maps = x, []
std forgotten: (x - self.mean) / self.std => (x - self.mean)
before the ReLU: isinstance(layer, nn.MaxPool2d) => isinstance(layer, nn.ReLU) and len(maps) < 5
unit over positions: sum(dim=1, => sum(dim=(2, 3),
absolute differences: .square()) => .abs())
sum over positions: .mean(dim=(2, 3) => .sum(dim=(2, 3)
the target learns: x.detach() => x
x_hat detached: unit_features(x_hat) => unit_features(x_hat.detach())
lin forgotten: lin((a - b).square()) => (a - b).square().sum(1, keepdim=True)
eq1
    posterior = self.vae.encode(x) if hasattr(self.vae, "encode") else None
    x_hat, z, posterior = self.vae(x, noise)
    return x_hat, z, posterior, self.linear_proj(z) if self.linear_proj else None
the mean: self.linear_proj(z) => self.linear_proj(posterior.mean)
no noise: self.vae(x, noise) => self.vae(x, torch.zeros_like(noise))
detached: self.linear_proj(z) => self.linear_proj(z.detach())
always projected: self.linear_proj(z) if self.linear_proj else None => self.linear_proj(z)
order: return x_hat, z, => return z, x_hat,
W alone: self.linear_proj(z) if => F.normalize(self.linear_proj(z), dim=1) if
eq2
    cosine = torch.einsum("bchw,bchw->bhw", F.normalize(z, dim=1), F.normalize(f, dim=1))
    return torch.clamp((1 - margin) - cosine, min=0).sum() / cosine.numel()
no margin: (1 - margin) => 1
no relu: torch.clamp((1 - margin) - cosine, min=0) => (1 - margin - cosine)
wrong axis: "bchw,bchw->bhw", F.normalize(z, dim=1), F.normalize(f, dim=1) => "bchw,bchw->bch", F.normalize(z, dim=3), F.normalize(f, dim=3)
sum: .sum() / cosine.numel() => .sum()
margin's sign: (1 - margin) => (1 + margin)
the text's margin: torch.clamp((1 - margin) - cosine, min=0) => torch.where(cosine < margin, (1 - margin) - cosine, 0 * cosine)
relu after the mean: torch.clamp((1 - margin) - cosine, min=0).sum() / cosine.numel() => torch.clamp((1 - margin - cosine).mean(), min=0)
the features learn only: F.normalize(z, dim=1) => F.normalize(z.detach(), dim=1)
not normalised: F.normalize(z, dim=1) => z
margin fixed: (1 - margin) => 0.5
half a batch: cosine.numel() => (cosine.shape[1] * cosine.shape[2])
eq3
    def similarity(v):
        v = v.flatten(2)
        return F.cosine_similarity(v[:, :, :, None], v[:, :, None, :], dim=1)
    return torch.clamp((similarity(f) - similarity(z)).abs() - margin, min=0).mean()
no abs: .abs() - margin => - margin
no margin: .abs() - margin => .abs()
no relu: torch.clamp((similarity(f) - similarity(z)).abs() - margin, min=0) => ((similarity(f) - similarity(z)).abs() - margin)
without the diagonal: .mean() => .sum() / (len(z) * z[0, 0].numel() * (z[0, 0].numel() - 1))
not normalised: F.cosine_similarity(v[:, :, :, None], v[:, :, None, :], dim=1) => v.mT @ v
across images: v = v.flatten(2) => v = v.transpose(0, 1).flatten(1)[None]
channels: v = v.flatten(2) => v = v.flatten(2).mT
squares: .abs() - margin => .square() - margin
per image: .mean() => .sum(0).mean()
detached: similarity(z)) => similarity(z.detach()))
margin fixed: - margin => - 0.25
eq4
    a = torch.autograd.grad(rec_loss, weight, retain_graph=True)[0].square().sum().sqrt()
    b = torch.autograd.grad(other_loss, weight, retain_graph=True)[0].square().sum().sqrt()
    return float(torch.clamp(a / (b + 1e-4), min=0, max=max_weight))
inverted: a / (b + 1e-4) => b / (a + 1e-4)
no clamp: max=max_weight => max=1e30
clamp fixed: max=max_weight => max=1e8
graph freed: grad(other_loss, weight, retain_graph=True) => grad(other_loss, weight)
no 1e-4: (b + 1e-4) => b
1e-6: 1e-4 => 1e-6
at least 1e-4: (b + 1e-4) => b.clamp(min=1e-4)
1e-4 above, too: a / (b => (a + 1e-4) / (b
keeps a gradient: return float(torch.clamp(a / (b + 1e-4), min=0, max=max_weight)) => return torch.clamp(a / (b + 1e-4), min=0, max=max_weight) * (1 + 0 * rec_loss)
squares: .square().sum().sqrt() => .square().sum()
absolute sums: .square().sum().sqrt() => .abs().sum()
the first axis: .square().sum().sqrt() => .square().flatten()[:2].sum().sqrt()
fills .grad: a = torch.autograd.grad(rec_loss, weight, retain_graph=True)[0] => rec_loss.backward(retain_graph=True)\na = weight.grad.clone()
losses for gradients: a / (b + 1e-4) => rec_loss.abs() / (other_loss.abs() + 1e-4)
teacher
    h = 0.5 * x + 0.5
    h = (h - self.mean).div(self.std)
    if self.patch > 0:
        h = F.interpolate(h, size=[n * self.patch for n in grid], mode="bilinear")
    with torch.no_grad():
        out = self.tokens(self.net, h).to(torch.float32)
    return out.detach()
not to [0, 1]: h = 0.5 * x + 0.5 => h = x
no resizing: self.patch > 0 => False
nearest: , mode="bilinear") => )
antialias: mode="bilinear" => mode="bilinear", antialias=True
corners: mode="bilinear" => mode="bilinear", align_corners=True
patches fixed: n * self.patch => n * 14
its own dtype: .to(torch.float32) => 
grid turned: for n in grid] => for n in grid[::-1]]
mean forgotten: (h - self.mean) => h
std squared: .div(self.std) => .div(self.std ** 2)
in place: h = 0.5 * x + 0.5 => h = x.mul_(0.5).add_(0.5)
adaln
    @modulate
    return torch.einsum("bnd,bd->bnd", x, scale + 1) + shift[:, None, :]
    @SwiGLU.forward
    both = self.w12(x)
    half = both.shape[-1] // 2
    gate = both[..., :half]
    return self.w3(gate * torch.sigmoid(gate) * both[..., half:])
no 1: scale + 1 => scale
swapped: x, scale + 1) + shift[ => x, shift + 1) + scale[
token for image: torch.einsum("bnd,bd->bnd", x, scale + 1) + shift[:, None, :] => x * (1 + scale) + shift
shift first: torch.einsum("bnd,bd->bnd", x, scale + 1) + shift[:, None, :] => (x + shift[:, None]) * (1 + scale[:, None])
in place: torch.einsum("bnd,bd->bnd", x, scale + 1) + shift[:, None, :] => x.mul_(1 + scale[:, None]).add_(shift[:, None])
halves swapped: both[..., :half] => both[..., half:] ;; * both[..., half:]) => * both[..., :half])
sigmoid: gate * torch.sigmoid(gate) => torch.sigmoid(gate)
GELU: gate * torch.sigmoid(gate) => F.gelu(gate)
even and odd: both[..., :half] => both[..., ::2] ;; both[..., half:] => both[..., 1::2]
no w3: self.w3(gate => (gate
rmsnorm
    h = x.to(torch.float32)
    return h / torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + self.eps) * self.weight
layer norm: h = x.to(torch.float32) => h = x.float() - x.float().mean(-1, keepdim=True)
eps outside: torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + self.eps) => (torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1]) + self.eps)
eps written in: self.eps => 1e-6
no eps: + self.eps =>  + 0
sum: / h.shape[-1] + => +
no weight: * self.weight => * 1
in x's own type: x.to(torch.float32) => x
detached: (h * h).sum => (h * h).detach().sum
weight divided: * self.weight => / self.weight
over all tokens: (h * h).sum(-1, keepdim=True) / h.shape[-1] => (h * h).mean()
angles
    super().__init__()
    n, quarter = torch.arange(side * side), head_dim // 4
    omega = torch.tensor([10000.0 ** (-i / quarter) for i in range(quarter)])
    rows, columns = torch.outer((n // side).float(), omega), torch.outer((n % side).float(), omega)
    angle = torch.stack([torch.cat([rows, columns], 1)] * 2, 2).flatten(1)
    self.register_buffer("freqs_cos", torch.cos(angle))
    self.register_buffer("freqs_sin", torch.sin(angle))
columns first: [rows, columns] => [columns, rows]
halves for pairs: torch.stack([torch.cat([rows, columns], 1)] * 2, 2).flatten(1) => torch.cat([rows, rows, columns, columns], 1)
the exponent of the head: -i / quarter => -i / head_dim
base 100: 10000.0 => 100.0
sine and cosine swapped: torch.cos(angle) => torch.sin(angle) ;; torch.sin(angle))\n => torch.cos(angle))\n
no buffers: self.register_buffer("freqs_cos", torch.cos(angle)) => self.freqs_cos = torch.cos(angle)
float64: torch.cos(angle)) => torch.cos(angle).double())
from 1: (n // side).float() => (n // side + 1).float()
half precision: torch.sin(angle) => torch.sin(angle).half()
one row: (n // side).float() => n.float()
rope
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = self.freqs_cos[:, 0::2], self.freqs_sin[:, 0::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = b * cos + a * sin
    return out
the other way round: a * cos - b * sin => a * cos + b * sin ;; b * cos + a * sin => b * cos - a * sin
halves for pairs: x[..., 0::2], x[..., 1::2] => x.chunk(2, -1)
no minus: a * cos - b * sin => a * cos + b * sin
in place: out = torch.empty_like(x) => out = x.mul_(1.0) ;; a, b = x[..., 0::2], x[..., 1::2] => a, b = x[..., 0::2].clone(), x[..., 1::2].clone()
float64: return out => return out.double()
half precision: return out => return out.half()
heads for tokens: cos, sin = => self = type("o", (), {"freqs_cos": self.freqs_cos[:1], "freqs_sin": self.freqs_sin[:1]})\ncos, sin =
second channel lost: out[..., 1::2] = b * cos + a * sin => out[..., 1::2] = b * cos
time
    omega = torch.tensor([10000.0 ** (-i / self.half) for i in range(self.half)])
    angle = torch.outer(t.float(), omega)
    h = torch.cat([torch.cos(angle), torch.sin(angle)], -1)
    return self.mlp(h.type_as(self.mlp[0].weight))
sines first: [torch.cos(angle), torch.sin(angle)] => [torch.sin(angle), torch.cos(angle)]
times 1000: t.float() => 1000 * t.float()
one too few: -i / self.half => -i / (self.half - 1)
interleaved: torch.cat([torch.cos(angle), torch.sin(angle)], -1) => torch.stack([torch.cos(angle), torch.sin(angle)], -1).flatten(1)
no MLP: self.mlp(h.type_as(self.mlp[0].weight)) => h
no cast: h.type_as(self.mlp[0].weight) => h
angles in bfloat16: t.float(), omega) => t.to(self.mlp[0].weight.dtype), omega.to(self.mlp[0].weight.dtype))
base 1000: 10000.0 => 1000.0
labels
    if drop is None:
        drop = torch.zeros_like(y, dtype=torch.bool)
        if self.training and self.dropout_prob > 0:
            drop = torch.bernoulli(torch.full(y.shape, self.dropout_prob, device=y.device)).bool()
    y = y.clone()
    y[drop] = self.num_classes
    return self.embedding_table.weight[y]
in evaluation, too: self.training and => 
the share that is kept: self.dropout_prob, device => 1 - self.dropout_prob, device
all or none: torch.full(y.shape, self.dropout_prob, device=y.device) => torch.full((1,), self.dropout_prob)
the last class: = self.num_classes => = self.num_classes - 1
changes y: y = y.clone()\n => 
draws though told: y = y.clone() => y = y.clone()\ndrop = drop | (torch.rand(len(y)) < self.dropout_prob) if self.training else drop
never draws: self.training and => False and
half of them: self.dropout_prob, device => 0.5, device
class 0: = self.num_classes => = 0
drop reversed: y[drop] => y[~drop]
sincos
    q, rows = dim // 4, []
    omega = 10000.0 ** (-torch.arange(q, dtype=torch.float64) / q)
    for n in range(side * side):
        row, column = divmod(n, side)
        rows.append(torch.cat([(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()]))
    return torch.stack(rows)[None].float()
row first: row, column = => column, row =
cosine first: (column * omega).sin(), (column * omega).cos() => (column * omega).cos(), (column * omega).sin()
base 100: 10000.0 => 100.0
float64: .float() => 
no batch axis: [None].float() => .float()
half the frequencies: / q) => / (2 * q))
from 1: divmod(n, side) => divmod(n + side + 1, side)
unpatchify
    B, N, _ = x.shape
    side, p = round(N ** 0.5), self.patch_size
    x = x.reshape(B, side, side, p, p, self.in_channels)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(B, self.in_channels, side * p, side * p)
channel slowest: x.reshape(B, side, side, p, p, self.in_channels) => x.reshape(B, side, side, self.in_channels, p, p).permute(0, 1, 2, 4, 5, 3)
patch turned: bchpwq => bchqwp
grid turned: bchpwq => bcwphq
patches apart: bchpwq => bcphqw
no permutation: torch.einsum("bhwpqc->bchpwq", x) => x
rows apart: bchpwq => bchwpq
the whole latent: x.reshape(B, side, side, p, p, self.in_channels) => x.reshape(B, p, side, p, side, self.in_channels).permute(0, 2, 4, 1, 3, 5)
attention
    B, N, D = x.shape
    q, k, v = (u.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for u in self.qkv(x).chunk(3, dim=2))
    q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
        q, k = rope(q), rope(k)
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return self.proj(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2))
the scale of D: q.shape[-1]) => D)
no scale: / math.sqrt(q.shape[-1]) => * 1
v turns, too: q, k = rope(q), rope(k) => q, k, v = rope(q), rope(k), rope(v)
no rope: if rope is not None => if False
only q turns: rope(q), rope(k) => rope(q), k
heads interleaved: unflatten(2, (self.num_heads, -1)).transpose(1, 2) => unflatten(2, (-1, self.num_heads)).permute(0, 3, 1, 2)
one head: unflatten(2, (self.num_heads, -1)).transpose(1, 2) => unflatten(2, (1, -1)).transpose(1, 2)
no QK-norm: q, k = self.q_norm(q), self.k_norm(k)\n => 
heads not put back: bihd", weights, v).flatten(2) => bhid", weights, v).reshape(B, N, D)
softmax over queries: .softmax(-1) => .softmax(-2)
no proj: self.proj(torch.einsum("bhij => (torch.einsum("bhij
q and k swapped: q, k, v = (u => k, q, v = (u
block
    @Block.__init__
    super().__init__()
    hidden = int(width * mlp_ratio)
    self.norm1 = layer_norm(width, use_rmsnorm)
    self.attn = Attention(width, num_heads, use_qknorm, use_rmsnorm)
    self.norm2 = layer_norm(width, use_rmsnorm)
    self.mlp = SwiGLU(width, 2 * hidden // 3) if use_swiglu else mlp(width, hidden)
    self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
    @Block.forward
    s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).view(len(c), 6, 1, -1).unbind(1)
    x = x + self.attn(self.norm1(x) * (1 + k1) + s1, rope) * g1
    return x + self.mlp(self.norm2(x) * (1 + k2) + s2) * g2
scale before shift: s1, k1, g1, s2, k2, g2 = => k1, s1, g1, k2, s2, g2 =
gates last: s1, k1, g1, s2, k2, g2 = => s1, k1, s2, k2, g1, g2 =
no gate: * g1 => * 1
one gate: + s2) * g2 => + s2) * g1
both from the same x: x = x + self.attn => y = x\nx = x + self.attn ;; self.norm2(x) => self.norm2(y)
no rope: + s1, rope) => + s1, None)
the norm twice: self.norm2(x) => self.norm1(x)
no residual: return x + self.mlp => return self.mlp
as wide as the MLP: 2 * hidden // 3 => hidden
no SiLU: nn.Sequential(nn.SiLU(), => nn.Sequential(nn.Identity(),
always RMSNorm: layer_norm(width, use_rmsnorm) => RMSNorm(width)
never QK-norm: use_qknorm, use_rmsnorm) => False, use_rmsnorm)
ema
    with torch.no_grad():
        for average, weight in zip(averages, weights):
            average.mul_(decay).add_((1 - decay) * weight)
weights swapped: mul_(decay).add_((1 - decay) => mul_(1 - decay).add_(decay
not in place: average.mul_(decay).add_((1 - decay) * weight) => average = decay * average + (1 - decay) * weight
with a gradient: torch.no_grad() => torch.enable_grad()
the weights move: average.mul_(decay).add_((1 - decay) * weight) => weight.mul_(1 - decay).add_(decay * average)
the first alone: zip(averages, weights) => zip(averages[:1], weights)
another place: average.mul_(decay).add_((1 - decay) * weight) => average.data = decay * average + (1 - decay) * weight
lognorm
    u = torch.empty(n, device=device)
    if not lognorm:
        return u.uniform_(generator=generator)
    return 1 / (1 + torch.exp(-u.normal_(generator=generator)))
sigmoid of uniform: u.normal_( => u.uniform_(
torch's own seed: normal_(generator=generator) => normal_()
switch reversed: if not lognorm => if lognorm
clipped normal: 1 / (1 + torch.exp(-u.normal_(generator=generator))) => (0.5 + 0.25 * u.normal_(generator=generator)).clamp(1e-3, 1 - 1e-3)
rounded: return u.uniform_(generator=generator) => return (u.uniform_(generator=generator) * 1000).floor() / 1000
float64: torch.empty(n, => torch.empty(n, dtype=torch.float64,
twice as wide: torch.exp(-u.normal_( => torch.exp(-2 * u.normal_(
moved: torch.exp(-u.normal_( => torch.exp(0.2 - u.normal_(
flow
    mix = t[:, None, None, None]
    pred, v = model(torch.lerp(x0, x1, mix), t, y, drop), x1 - x0
    mse = torch.stack([F.mse_loss(p, q) for p, q in zip(pred, v)])
    unit = F.normalize(pred, dim=1, eps=0.1) * F.normalize(v, dim=1)
    terms = {"mse": mse, "direction": 1 - unit.sum(1).flatten(1).mean(1)}
    loss = terms["mse"].mean()
    if direction:
        loss = loss + terms["direction"].mean()
    return loss, terms
t reversed: torch.lerp(x0, x1, mix) => torch.lerp(x1, x0, mix)
v reversed: x1 - x0 => x0 - x1
cosine of the whole latent: 1 - unit.sum(1).flatten(1).mean(1) => 1 - F.cosine_similarity(pred.flatten(1), v.flatten(1))
always the direction: if direction: => if True:
the usual eps: dim=1, eps=0.1) => dim=1)
never: if direction: => if False:
labels not dropped: t, y, drop) => t, y)
summed: F.mse_loss(p, q) => F.mse_loss(p, q, reduction="sum")
t for the model: mix), t, y => mix), 1000 * t, y
predicts data: , x1 - x0 => , x1
variance preserving: torch.lerp(x0, x1, mix) => mix.sqrt() * x1 + (1 - mix).sqrt() * x0
float64: return loss, terms => return loss.double(), terms
detached: terms["direction"].mean()\n => terms["direction"].mean().detach()\n
direction lost: if direction: => if not direction:\n    terms["direction"] = 0 * mse\nif direction:
alphas
    out, product = [], 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        out.append(product)
    return torch.tensor(out, dtype=torch.float64, device=device)
no product: product *= => product =
1000 steps of 1000: k / 999 => k / 1000
starts at 1: out.append(product) => out.append(out and last or 1.0); last = product
float32: dtype=torch.float64 => dtype=torch.float32
float32 at first: out.append(product) => out.append(float(torch.tensor(product)))
Stable Diffusion's: 1 - (1e-4 + (0.02 - 1e-4) * k / 999) => 1 - (0.00085 ** 0.5 + (0.012 ** 0.5 - 0.00085 ** 0.5) * k / 999) ** 2
ddpm
    k = torch.floor(1000 * (1 - t)).long()
    k = torch.where(k > 999, torch.full_like(k, 999), k)
    a = ddpm_alphas(x1.device)[k].to(x1.dtype)[:, None, None, None]
    x = torch.sqrt(a) * x1 + torch.sqrt(1 - a) * x0
    mse = F.mse_loss(model(x, k.float(), y, drop), x0, reduction="none").flatten(1).mean(1)
    return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}
t reversed: 1000 * (1 - t) => 1000 * t
no roots: torch.sqrt(a) * x1 + torch.sqrt(1 - a) * x0 => a * x1 + (1 - a) * x0
predicts the data: drop), x0, => drop), x1,
t for k: k.float(), y => t, y
rounded: torch.floor( => torch.round(
not clamped: torch.where(k > 999, torch.full_like(k, 999), k) => k.clamp(max=998)
float64: [k].to(x1.dtype) => [k]
an integer k: k.float() => k
drop forgotten: y, drop) => y)
k from 1: k.float(), y => k.float() + 1, y
summed: .flatten(1).mean(1) => .flatten(1).sum(1)
ddpm_v
    def velocity(x, t, y):
        a = ddpm_alphas(x.device)
        grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)
        t = t.double().clamp(grid[0], grid[-1])
        i = torch.searchsorted(grid, t).clamp(1, 999)
        k = (1000 - i - (t - grid[i - 1]) / (grid[i] - grid[i - 1])).float()
        s = t.float().view(-1, 1, 1, 1)
        return (x - model(x * (s ** 2 + (1 - s) ** 2).rsqrt(), k, y)) / s
    return velocity
nearest step: k = (1000 - i - (t - grid[i - 1]) / (grid[i] - grid[i - 1])).float() => k = 999 - (grid - t[:, None]).abs().argmin(1).float()
no scale: x * (s ** 2 + (1 - s) ** 2).rsqrt() => x
multiplied: .rsqrt() => .sqrt()
not clamped: t = t.double().clamp(grid[0], grid[-1]) => t = t.double().clamp(1e-3, 1)
step reversed: k = (1000 - i - => k = (i - 1 +
over 1 - t: k, y)) / s => k, y)) / (1 - s)
sign: (x - model => -(x - model
off by one: 1000 - i => 999 - i
float64: s = t.float() => s = t
k in float64: - grid[i - 1])).float() => - grid[i - 1]))
no class: k, y)) => k, 0 * y))
draws
    last = s.uniform_from_epoch > 0 and epoch >= s.uniform_from_epoch
    times, noise, chance = (step_generator(device, s.seed, part, step) for part in ("t", "x0", "drop"))
    t = sample_time(s.batch_size, s.lognorm and not last, times, device)
    x0 = torch.randn((s.batch_size, *shape), generator=noise, device=device)
    return t, x0, torch.rand(s.batch_size, generator=chance, device=device) < s.class_dropout
torch's own noise: generator=noise, device=device) => device=device)
torch's own drop: generator=chance, device=device) => device=device)
one generator for two: x0 = torch.randn((s.batch_size, *shape), generator=noise, device=device) => x0 = torch.randn((s.batch_size, *shape), generator=noise, device=device)\nx0[:, 0, 0, 0] = torch.logit(t)
always logit-normal: s.lognorm and not last => s.lognorm
an epoch late: epoch >= s. => epoch > s.
0 is an epoch: s.uniform_from_epoch > 0 and => 
keeps what it should drop: < s.class_dropout => > s.class_dropout
the step forgotten: s.seed, part, step) => s.seed, part)
the seed forgotten: s.seed, part, step) => 0, part, step)
lognorm forgotten: s.lognorm and not last => not last
uniform noise: torch.randn( => torch.rand(
psnr
    mse = torch.stack([F.mse_loss(a, b) for a, b in zip(x, y)])
    return 20 * torch.log10(torch.tensor(float(data_range))) - 10 * torch.log10(mse)
range not squared: 20 * torch.log10(torch.tensor => 10 * torch.log10(torch.tensor
over the batch: [F.mse_loss(a, b) for a, b in zip(x, y)] => [F.mse_loss(x, y)] * len(x)
natural logarithm: - 10 * torch.log10(mse) => - 10 * torch.log(mse)
an eps: torch.log10(mse) => torch.log10(mse + 1e-6)
absolute: F.mse_loss => F.l1_loss
a sum: F.mse_loss(a, b) => F.mse_loss(a, b, reduction="sum")
float64: torch.tensor(float(data_range)) => torch.tensor(float(data_range)).double() ;; torch.log10(mse) => torch.log10(mse.double())
inception
    probs, scores = np.asarray(probs, dtype=np.float64), []
    for start in range(0, len(probs), split):
        p = probs[start:start + split]
        ratio = np.where(p > 0, p, 1) / np.where(p > 0, p.mean(0), 1)
        scores.append(np.exp((p * np.log(ratio)).sum(1).mean()))
    return float(np.mean(scores))
no split: range(0, len(probs), split) => range(0, 1)
exp before the mean: np.exp((p * np.log(ratio)).sum(1).mean()) => np.exp((p * np.log(ratio)).sum(1)).mean()
no exp: np.exp((p * np.log(ratio)).sum(1).mean()) => (p * np.log(ratio)).sum(1).mean()
last split lost: range(0, len(probs), split) => range(0, max(len(probs) - split + 1, 1), split)
log of base 2: np.log(ratio) => np.log2(ratio)
q of all: p.mean(0) => probs.mean(0)
0 log 0: np.where(p > 0, p, 1) / np.where(p > 0, p.mean(0), 1) => p / p.mean(0)
float32: dtype=np.float64 => dtype=np.float32
tensors only: np.asarray(probs, dtype=np.float64), [] => probs.numpy(), []
geometric mean: float(np.mean(scores)) => float(np.exp(np.mean(np.log(scores))))
pr
    a, b = torch.as_tensor(reference).double(), torch.as_tensor(samples).double()
    near_a = torch.cdist(a, a).sort(1).values[:, k]
    near_b = torch.cdist(b, b).kthvalue(k + 1).values
    d = torch.cdist(a, b)
    precision = (d <= near_a.view(-1, 1)).any(0).double().mean()
    recall = (d <= near_b.view(1, -1)).any(1).double().mean()
    return float(precision), float(recall)
swapped: return float(precision), float(recall) => return float(recall), float(precision)
counts itself: values[:, k] => values[:, k - 1]
axis: .any(0) => .any(1)
all balls: .any(1).double().mean() => .double().mean()
strict: d <= near_a => d < near_a - 1e-9 * near_a
float16: torch.as_tensor(reference).double() => torch.as_tensor(reference).half().double()
float32: torch.as_tensor(reference).double(), torch.as_tensor(samples).double() => torch.as_tensor(reference).float(), torch.as_tensor(samples).float()
k fixed: values[:, k] => values[:, 3]
the other's radius: near_b.view(1, -1) => near_b.mean()
ssim
    line = torch.exp(-0.5 * (torch.arange(11, dtype=x.dtype) - 5) ** 2 / 1.5 ** 2)
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(x.shape[1], 1, 11, 11)
    def blur(v):
        return F.conv2d(F.pad(v, (5, 5, 5, 5), mode="reflect"), window, groups=v.shape[1])
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x ** 2) - mx ** 2, blur(y ** 2) - my ** 2, blur(x * y) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    light = (2 * mx * my + c1) / (mx ** 2 + my ** 2 + c1)
    return (light * (2 * cov + c2) / (vx + vy + c2)).flatten(1).mean(1)
zeros outside: mode="reflect" => mode="constant"
repeated edge: mode="reflect" => mode="replicate"
box window: torch.exp(-0.5 * (torch.arange(11, dtype=x.dtype) - 5) ** 2 / 1.5 ** 2) => torch.ones(11)
range forgotten: (0.03 * data_range) => 0.03
sigma 2.25: / 1.5 ** 2) => / 2.25 ** 2)
c1 = 0: c1, c2 = (0.01 * data_range) ** 2, => c1, c2 = 0,
c1 = c2: c1, c2 = (0.01 * data_range) ** 2, => c1, c2 = (0.03 * data_range) ** 2,
c2 = c1: (0.03 * data_range) ** 2 => (0.01 * data_range) ** 2
no square of constants: (0.03 * data_range) ** 2 => 0.03 * data_range
contrast alone: (light * (2 => ((2
sample variance: vx, vy, cov = blur(x ** 2) - mx ** 2, => vx, vy, cov = (blur(x ** 2) - mx ** 2) * 121 / 120,
cropped: .flatten(1).mean(1) => [..., 3:-3, 3:-3].flatten(1).mean(1)
over the batch: .flatten(1).mean(1) => .mean().repeat(len(x))
uniformity
    p = density / density.sum()
    gini = np.abs(p[:, None] - p[None, :]).sum() / (2 * len(p) ** 2 * p.mean())
    entropy = float(-sum(v * np.log(v) for v in p) / np.log(len(p)))
    cv = np.std(density) / np.mean(density)
    return {"density cv": cv, "gini": gini, "normalized entropy": entropy}
sample deviation: np.std(density) => np.std(density, ddof=1)
gini without the 2: (2 * len(p) => (len(p)
gini of other pairs: len(p) ** 2 * p.mean() => len(p) * (len(p) - 1) * p.mean()
entropy in nats: / np.log(len(p)) => / 1
not sorted: np.abs(p[:, None] - p[None, :]).sum() / (2 * len(p) ** 2 * p.mean()) => ((2 * np.arange(1, len(p) + 1) - len(p) - 1) * p).sum() / len(p)
variance: np.std(density) => np.var(density)
sorts in place: p = density / => density.sort()\np = density /
uniform entropy: np.log(v) for => np.log(v * len(p)) for
frechet
    d = np.asarray(mu1, dtype=np.float64) - np.asarray(mu2, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.asarray(sigma1, dtype=np.float64))
    keep = values > 1e-12 * values.max()
    half1 = vectors[:, keep] * np.sqrt(values[keep])
    values, vectors = np.linalg.eigh(np.asarray(sigma2, dtype=np.float64))
    keep = values > 1e-12 * values.max()
    half2 = vectors[:, keep] * np.sqrt(values[keep])
    roots = np.linalg.svd(half1.T @ half2, compute_uv=False).sum()
    return d @ d + np.trace(sigma1) + np.trace(sigma2) - 2 * roots
not squared: d @ d + => (d @ d) ** 0.5 +
no 2: - 2 * roots => - roots
no root: * np.sqrt(values[keep]) => * values[keep]
roots one by one: np.linalg.svd(half1.T @ half2, compute_uv=False).sum() => np.trace(np.sqrt(np.abs(np.asarray(sigma1) * np.asarray(sigma2))))
one trace: + np.trace(sigma2) => + np.trace(sigma1)
float32: np.asarray(mu1, dtype=np.float64) - np.asarray(mu2, dtype=np.float64) => (np.asarray(mu1, dtype=np.float32) - np.asarray(mu2, dtype=np.float32)).astype(np.float64)
roots of rounding: half1 = vectors[:, keep] * np.sqrt(values[keep]) => half1 = vectors * np.sqrt(np.abs(values) + 1e-9)
means forgotten: return d @ d + => return
resize
    def one_axis(v, n):
        place = torch.arange(size, dtype=torch.float64) * n / size
        low = place.floor().long()
        part = (place - low).to(v.dtype)
        return torch.lerp(v[..., low], v[..., (low + 1).clamp(max=n - 1)], part)
    x = one_axis(x, x.shape[3])
    return one_axis(x.mT, x.shape[2]).mT
torch's own: x = one_axis(x, x.shape[3]) => return F.interpolate(x, (size, size), mode="bilinear")
corners aligned: x = one_axis(x, x.shape[3]) => return F.interpolate(x, (size, size), mode="bilinear", align_corners=True)
nearest: (place - low).to => (0 * place).to
antialias: x = one_axis(x, x.shape[3]) => x = one_axis(x, x.shape[3]) if x.shape[3] <= size else F.interpolate(x, (x.shape[2], size), mode="bilinear", antialias=True)
one axis: return one_axis(x.mT, x.shape[2]).mT => return F.interpolate(x, (size, size), mode="bilinear")
beyond the last: .clamp(max=n - 1) => .remainder(n)
size fixed: / size\n => / 299\n
euler
    for i in range(len(ts) - 1):
        x = torch.add(x, velocity(x, ts[i]) * (ts[i + 1] - ts[i]))
    return x
right end: velocity(x, ts[i]) => velocity(x, ts[i + 1])
equal steps: (ts[i + 1] - ts[i]) => (ts[-1] - ts[0]) / (len(ts) - 1)
backwards: torch.add(x, => torch.sub(x,
one step short: range(len(ts) - 1) => range(len(ts) - 2)
changes x: x = torch.add(x, velocity(x, ts[i]) * (ts[i + 1] - ts[i])) => x += velocity(x, ts[i]) * (ts[i + 1] - ts[i])
the middle: velocity(x, ts[i]) => velocity(x, (ts[i] + ts[i + 1]) / 2)
from 0 to 1: for i in => ts = torch.linspace(0, 1, len(ts))\nfor i in
shift
    @shift_timesteps
    return shift * t / (t * shift + 1 - t)
    @time_grid
    points = torch.arange(s.sampling_steps, dtype=torch.float64) / (s.sampling_steps - 1)
    return shift_timesteps(points, s.timestep_shift)
inverse: return shift * t / (t * shift + 1 - t) => return t / (shift + (1 - shift) * t)
multiplied: / (t * shift + 1 - t) => / 1
sign: (t * shift + 1 - t) => (1 + (1 - shift) * t)
in place: return shift * t / (t * shift + 1 - t) => t = t.mul_(1.0) if isinstance(t, torch.Tensor) else t\nreturn (t.mul_(shift) / (t + 1 - t / shift)) if isinstance(t, torch.Tensor) else shift * t / (t * shift + 1 - t)
one point more: s.sampling_steps, dtype => s.sampling_steps + 1, dtype
without 1: / (s.sampling_steps - 1) => / s.sampling_steps
not shifted: return shift_timesteps(points, s.timestep_shift) => return points
float32: dtype=torch.float64 => dtype=torch.float32
heun
    for i in range(1, len(ts)):
        h = ts[i] - ts[i - 1]
        first = velocity(x, ts[i - 1])
        second = velocity(x + h * first, ts[i])
        x = x + 0.5 * h * first + 0.5 * h * second
    return x
midpoint: second = velocity(x + h * first, ts[i]) => second = 2 * velocity(x + h / 2 * first, ts[i - 1] + h / 2) - first
sum of both: 0.5 * h * first + 0.5 * h * second => h * first + h * second
second at the old time: x + h * first, ts[i]) => x + h * first, ts[i - 1])
second at the old x: x + h * first, ts[i]) => x, ts[i])
half a step: x + h * first, ts[i]) => x + h / 2 * first, ts[i])
a third evaluation: second = => velocity(x, ts[i])\nsecond =
guidance
    times = torch.full((len(x),), float(t), device=x.device)
    v = model(x, times, y)
    if scale == 1 or float(torch.as_tensor(t, dtype=torch.float64)) < interval_start:
        return v
    null = model.num_classes if null_class is None else null_class
    v_null = model(x, times, torch.full_like(y, null))
    out, k = v.clone(), x.shape[1] if channels is None else channels
    out[:, :k] = (1 - scale) * v_null[:, :k] + scale * v[:, :k]
    return out
from v_class: (1 - scale) * v_null[:, :k] + scale * v[:, :k] => v[:, :k] + scale * (v[:, :k] - v_null[:, :k])
rest unconditional: out, k = v.clone(), => out, k = v_null.clone(),
interval's other side: < interval_start => > interval_start
<= for <: < interval_start => <= interval_start
the last channels: out[:, :k] = (1 - scale) * v_null[:, :k] + scale * v[:, :k] => out[:, -k:] = (1 - scale) * v_null[:, -k:] + scale * v[:, -k:]
null class 0 is none: model.num_classes if null_class is None else null_class => null_class or model.num_classes
0 channels are all: x.shape[1] if channels is None else channels => channels or x.shape[1]
always both: if scale == 1 or float => if float
scale 0 is 1: scale == 1 or => scale in (0, 1) or
float64 times: float(t), device => float(t), dtype=torch.float64, device
swapped: (1 - scale) * v_null[:, :k] + scale * v[:, :k] => (1 - scale) * v[:, :k] + scale * v_null[:, :k]
null class fixed: model.num_classes if null_class is None else null_class => model.num_classes
changes x: v = model(x, times, y) => v = model(x.mul_(1.1), times, y)
draw
    @draw
    noise, y = torch.empty(len(indices), *system.shape), torch.empty(len(indices), dtype=torch.int64)
    for place, i in enumerate(indices):
        noise[place] = torch.randn(system.shape, generator=step_generator("cpu", s.seed, i, "noise"))
        y[place] = class_of(system, s, i)
    return noise.to(system.device), y.to(system.device)
    @class_of
    chosen = torch.randint(len(system.classes), (1,), generator=step_generator("cpu", s.seed, i, "class"))
    return chosen.item() if s.labels == "random" else system.listed[i % len(system.listed)]
the place decides: s.seed, i, "noise" => s.seed, place, "noise"
the labels decide: s.seed, i, "noise" => s.seed, i, s.labels
place for index: class_of(system, s, i) => class_of(system, s, place)
the seed forgotten: s.seed, i, "noise" => 0, i, "noise"
uniform noise: torch.randn( => torch.rand(
torch's own class: (1,), generator=step_generator("cpu", s.seed, i, "class")) => (1,))
one class fewer: torch.randint(len(system.classes), => torch.randint(len(system.classes) - 1,
always random: chosen.item() if s.labels == "random" else system.listed[i % len(system.listed)] => chosen.item()
classes for the list: system.listed[i % len(system.listed)] => i % len(system.classes)
float classes: dtype=torch.int64 => dtype=torch.float32
step
    s, net = run.settings, run.tokenizer.vae
    with autocast(x, s.precision == "bf16"):
        x_hat, z, q, z_proj = run.ddp(x, noise)
    x_hat = x_hat.float()
    rec = reconstruction_loss(x, x_hat, run.lpips, s.lpips_weight)
    kl = q.kl().mean()
    total, out = rec + s.kl_weight * kl, {"rec": rec, "kl": kl, "l1": F.l1_loss(x_hat, x)}
    if z_proj is not None:
        f = run.foundation(x, z.shape[2:])
        out["mcos"], out["mdms"] = vf_losses(z_proj, f, s.cos_margin, s.mdms_margin, s.mcos, s.mdms)
        vf = out["mcos"] + out["mdms"]
        out["w_vf"] = s.vf_weight * adaptive_weight(rec, vf, net.encoder.conv_out.weight)
        total = total + out["w_vf"] * vf
    if run.disc is not None and batch >= s.disc_start:
        out["g"] = hinge_generator(run.disc(x_hat))
        out["w_disc"] = s.disc_weight * adaptive_weight(rec, out["g"], net.decoder.conv_out.weight, 1e4)
        total = total + out["w_disc"] * out["g"]
    run.opt.zero_grad()
    total.backward()
    run.opt.step()
    if "g" in out:
        run.opt_disc.zero_grad()
        out["d"] = hinge_discriminator(run.ddp_disc(x), run.ddp_disc(x_hat.detach()))
        out["d"].backward()
        run.opt_disc.step()
    return {name: value.detach() for name, value in out.items()}
KL summed over the batch: q.kl().mean() => q.kl().sum()
no KL: rec + s.kl_weight * kl, => rec,
the other layer: net.encoder.conv_out.weight => net.quant_conv.weight
no adaptive weight: adaptive_weight(rec, vf, net.encoder.conv_out.weight) => torch.tensor(1.0)
no w_hyper: s.vf_weight * adaptive => adaptive
gradients of the last batch: run.opt.zero_grad()\n => 
the discriminator gathers: run.opt_disc.zero_grad()\n => 
starts a batch late: batch >= s.disc_start => batch > s.disc_start
not detached: for name, value in out.items()} => for name, value in out.items()} | {"rec": rec}
real and fake swapped: run.ddp_disc(x), run.ddp_disc(x_hat.detach()) => run.ddp_disc(x_hat.detach()), run.ddp_disc(x)
no step of the discriminator: run.opt_disc.step()\n => 
the weight of g not clamped: weight, 1e4) => weight)
no autocast: s.precision == "bf16" => False
past DistributedDataParallel: run.ddp(x, noise) => run.tokenizer(x, noise)
margins swapped: s.cos_margin, s.mdms_margin => s.mdms_margin, s.cos_margin
no disc_weight: s.disc_weight * adaptive => adaptive
'''


def read_answers():
    """{key: (right answer, {what is wrong: answer})}, an answer {function: its lines}."""
    found = {}
    for block in re.split(r"\n(?=\w+\n    )", ANSWERS.strip("\n")):
        key, _, rest = block.partition("\n")
        lines = rest.split("\n")
        body = "\n".join(line[4:] for line in lines if line.startswith("    ")) + "\n"
        right, wrong = by_function(key, body), {}
        for line in lines:
            if line and not line.startswith(" "):
                name, _, changes = line.partition(": ")
                text = body
                for change in changes.split(" ;; "):    # an empty new part ends in "=> "
                    text = changed(text, *change.split(" => "), (key, name))
                wrong[name] = by_function(key, text)
        found[key] = right, wrong
    return found


def changed(text, old, new, where):
    """One change; lines that are put in get the indentation of the place, a removed line goes whole."""
    old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
    assert old in text, (where, old)
    if old.endswith("\n"):
        return text.replace(old, new) if new else re.sub("^ *" + re.escape(old), "", text, flags=re.M)
    lines = []
    for line in text.split("\n"):
        indent = line[:len(line) - len(line.lstrip())]
        lines.append(line.replace(old, new.replace("\n", "\n" + indent)))
    return "\n".join(lines)


def by_function(key, text):
    if not text.startswith("@"):
        return {EXERCISES[key].names[0]: text}
    return {name: body for name, _, body in (part.partition("\n") for part in text[1:].split("\n@"))}


RIGHT_AND_WRONG = read_answers()


def answered(key, bodies, source=None):
    """The exercise's script with these functions' bodies in their place."""
    source = source or (ROOT / EXERCISES[key].file).read_text()
    for name, body in bodies.items():
        source = handout.replace_body(source, name, body.rstrip("\n").split("\n"))
    return source


class Grader:
    """One worker for all tests; submissions are written into one folder after another."""

    def __init__(self, runner, home):
        self.worker, self.home, self.count = runner, home, 0

    def folder(self, files):
        self.count += 1
        folder = self.home / str(self.count)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def mark(self, key, source, timeout=60.0):
        return grade.grade_one(self.worker, self.folder({EXERCISES[key].file: source}), key, timeout)


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    with grade.Worker() as runner:
        yield Grader(runner, tmp_path_factory.mktemp("submissions"))


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """The handout of set 1, in which the functions of all sets are empty."""
    folder = tmp_path_factory.mktemp("handout") / "set1"
    handout.handout(folder, 1)
    return folder


def run(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


# --- Marks ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", EXERCISES)
def test_right_answers_pass_and_wrong_ones_lose_points(grader, key):
    right, wrong = RIGHT_AND_WRONG[key]
    mark = grader.mark(key, answered(key, right))
    assert mark.score == mark.exercise.total, mark.reason
    marks = {name: grader.mark(key, answered(key, bodies)) for name, bodies in wrong.items()}
    assert len(marks) >= 4
    assert not [name for name, mark in marks.items() if mark.score == mark.exercise.total]
    assert not [(name, mark.note) for name, mark in marks.items() if mark.note or not mark.reason]


def test_the_scripts_get_full_marks_and_the_handout_none(grader, blank):
    for key, e in EXERCISES.items():
        mark = grade.grade_one(grader.worker, ROOT, key)
        assert mark.score == e.total, (key, mark.reason)
        mark = grade.grade_one(grader.worker, blank, key)
        assert mark.score == 0 and "not attempted" in mark.reason, key


def test_each_solved_exercise_gets_exactly_its_points(grader, blank):
    """Of the empty handout with one exercise solved: no exercise needs another, or gives points for one."""
    for file in SCRIPTS:
        keys = [key for key, e in EXERCISES.items() if e.file == file]
        for key in keys:
            folder = grader.folder({file: answered(key, RIGHT_AND_WRONG[key][0], (blank / file).read_text())})
            scores = {k: grade.grade_one(grader.worker, folder, k).score for k in {key, keys[0], keys[-1]}}
            assert scores == {k: EXERCISES[k].total if k == key else 0 for k in scores}


def test_marks_follow_understanding(grader):
    """A missing permutation leaves no point of unpatchify, a forgotten RoPE takes one of the block's many."""
    for key, name, least, most in (("unpatchify", "no permutation", 0, 0), ("block", "no rope", 7, 11),
                                   ("labels", "draws though told", 3, 5), ("attn", "weights without a gradient", 6, 6),
                                   ("eq2", "the features learn only", 5, 5)):
        mark = grader.mark(key, answered(key, RIGHT_AND_WRONG[key][1][name]))
        assert least <= mark.score <= most, (key, name, mark.score, mark.checks)


GOOD = "return F.relu(1 - margin - F.cosine_similarity(z, f, dim=1)).mean()"
CHEATS = {
    "reads the script": """
        space = {"__name__": "x"}
        exec(open("vf_loss.py").read(), space)
        return space["marginal_cosine_loss"](z, f, margin)""",
    "reads the repository": f"""
        space = {{"__name__": "x"}}
        exec(open("{ROOT}/vf_loss.py").read(), space)
        return space["marginal_cosine_loss"](z, f, margin)""",
    "imports the repository": f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("other", "{ROOT}/vf_loss.py")
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        return other.marginal_cosine_loss(z, f, margin)""",
    "looks for the grader's file": """
        import __main__, pathlib
        found = list(pathlib.Path(__main__.__file__).resolve().parent.parent.rglob("vf_loss.py"))
        exec(found[0].read_text())
        return marginal_cosine_loss(z, f, margin)""",
    "patches the comparison": """
        import __main__, checks
        for module in (__main__, checks):
            module.close = module.ok = module.near = module.values = lambda *a, **k: None
        return z.sum()""",
    "reports its own marks": """
        import sys
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()):
                if getattr(value, "__name__", "") == "send":
                    for i in range(9):
                        value({"check": i, "message": None})
                    value({"done": True})
            frame = frame.f_back
        return z.sum()""",
    "looks for expected values": """
        import sys
        module = sys.modules["set2"]
        return [f for name, f in vars(module).items() if name.startswith("slow")][0](z, f, ((margin,),))[0]""",
    "searches memory": """
        import gc
        for thing in gc.get_objects():
            if getattr(thing, "__name__", "") == "slow_eq2":
                return thing(z, f, ((margin,),))[0]
        return z.sum()""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_get_nothing_and_are_flagged(grader, name):
    mark = grader.mark("eq2", answered("eq2", {"marginal_cosine_loss": CHEATS[name]}))
    assert mark.score == 0 and mark.look, (mark.score, mark.look, mark.reason)


def test_what_the_worker_gets_holds_no_answer():
    """Of the target's functions only stubs, no slow reference, nothing after a check's question."""
    import base64
    import marshal
    for key, e in EXERCISES.items():
        job = grade.job_of(key, "", 1.0)
        for name in e.names:
            body, i = worker.find(ast.parse(job["given"]), name)
            assert worker.is_stub(body[i]), key
        assert set(job["code"]) == {f[:-3] for f in SCRIPTS if f != e.file} | {"checks", f"set{e.set}"}
        names, pending = set(), [marshal.loads(base64.b64decode(job["code"][f"set{e.set}"]))]
        while pending:
            code = pending.pop()
            names |= {code.co_name, *code.co_names}
            pending += [c for c in code.co_consts if hasattr(c, "co_name")]
        assert not [n for n in names if n.startswith("slow")] and "close" in names


HOSTILE = {
    "a loop without end": "while True:\n    pass",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "prints without end": "print('{\"done\": true}' * 10 ** 6)\nprint('0' * (1 << 30))\nreturn 1",
    "forges messages": """
        import os
        for fd in range(3, 64):
            try:
                os.write(fd, b'{"check": 0, "answer": 0}\\n{"done": true}\\n')
            except OSError:
                pass
        os._exit(0)""",
    "changes torch": "torch.Tensor.all = lambda *a, **k: torch.ones(1)\nreturn z.new_zeros(())",
    "a child that lives on": "import os\nif os.fork() == 0:\n    import time\n    time.sleep(30)\nos._exit(0)",
    "takes all memory": "x = [bytearray(1 << 30) for _ in range(64)]\nreturn z.sum()",
    "calls itself": "return marginal_cosine_loss(z, f, margin)",
    "kills itself": "import os, signal\nsignal.raise_signal(9)",
    "kills the grader": "import os\nos.kill(os.getppid(), 9)\nreturn z.sum()",
    "waits for input": "return float(input())",
    "an answer of its own type": "return type('T', (), {})()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_costs_its_own_exercise(grader, name):
    """Its points are lost, the others of the file are graded as ever, and the grader continues."""
    source = answered("eq2", {"marginal_cosine_loss": HOSTILE[name]})
    mark = grader.mark("eq2", source, timeout=2.0)
    assert mark.score == 0 and mark.reason, mark
    assert grader.mark("eq3", source).score == EXERCISES["eq3"].total
    assert all((ROOT / file).exists() for file in SCRIPTS)


def test_broken_files(grader):
    """Each costs its file's exercises and says where."""
    source = answered("eq2", {"marginal_cosine_loss": GOOD})
    line = source[:source.index(GOOD)].count("\n") + 1
    for text, words in ((source.replace(GOOD, GOOD + ")"), f"vf_loss.py, line {line}"),
                        ("", "has no marginal_cosine_loss"), ("\0", "vf_loss.py"),
                        (source.replace("def marginal_cosine", "def cosine"), "its name must stay"),
                        (source.replace(GOOD, "return (" + "(" * 5000), "vf_loss.py"),
                        (source + "\nreturn 1\n", "has no") if False else ("import sys\n", "its name must stay")):
        mark = grader.mark("eq2", text)
        assert mark.score == 0 and words in mark.note, mark.note
    folder = grader.folder({})
    assert "not in the folder" in grade.grade_one(grader.worker, folder, "eq2").reason
    (folder / "vf_loss.py").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in grade.grade_one(grader.worker, folder, "eq2").reason
    source = answered("eq2", {"marginal_cosine_loss": "z = z.nonsense()\nreturn z"})
    line = source.split("\n").index("    z = z.nonsense()") + 1
    assert f"(vf_loss.py, line {line})" in grader.mark("eq2", source).reason
    source = answered("eq2", {"marginal_cosine_loss": "import einops_of_mine\nreturn z"})
    assert "not installed here" in grader.mark("eq2", source).reason


HELPED = '''
import statistics
from functools import partial

SCALE = []
SCALE.append(1.0)
print("I may print")


def rule(function):
    return function


class Cosine:
    def __call__(self, z, f):
        return unit(z, f).sum(1)


def unit(z, f):
    return F.normalize(z, dim=1) * F.normalize(f, dim=1)


@rule
def marginal_cosine_loss(z, f, margin=0.5):
    """Mine."""
    threshold = statistics.fmean([1.0]) * SCALE[0] - margin
    return partial(clip)(threshold - Cosine()(z, f)).mean()


def clip(v):
    return v.clamp(min=0)
'''


def test_helpers_of_the_student_keep_working(grader):
    source = (ROOT / "vf_loss.py").read_text().replace("def marginal_cosine_loss", "def replaced")
    for text in (source + HELPED, source + "\nmarginal_cosine_loss = lambda z, f, margin=0.5: F.relu(\n"
                 "    1 - margin - F.cosine_similarity(z, f, dim=1)).mean()\n"):
        mark = grader.mark("eq2", text)
        assert mark.score == mark.exercise.total and not mark.look, mark.reason
    # a method and a constant of the class; a helper that another exercise uses does not reach it
    source = answered("kl", {"Posterior.kl": "return self.WEIGHT * self.values().sum((1, 2, 3))"}).replace(
        "    def mode(self):", "    WEIGHT = 0.5\n\n    def values(self):\n"
        "        return self.mean ** 2 + self.logvar.exp() - 1 - self.logvar\n\n    def mode(self):")
    assert grader.mark("kl", source).score == EXERCISES["kl"].total
    assert grader.mark("posterior", source + "\nraise SystemExit\n").score == EXERCISES["posterior"].total
    # changes to functions that are no exercise do not count
    source = answered("eq2", {"marginal_cosine_loss": GOOD}).replace("def vf_losses(", "def other(")
    assert grader.mark("eq2", source).score == EXERCISES["eq2"].total


# --- The command ----------------------------------------------------------------------------------------
def test_a_class_in_one_command(tmp_path):
    """Text, Gradescope's results.json, a CSV; a broken submission and a cheat among good ones; names without
    paths; the folder does not decide what is marked."""
    texts = {"ada": answered("eq2", {"marginal_cosine_loss": GOOD}), "bob": "def (:",
             "cy": answered("eq2", {"marginal_cosine_loss": "return z.mean()"}),
             "di": answered("eq2", {"marginal_cosine_loss": CHEATS["reads the script"]})}
    for name, text in texts.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "vf_loss.py").write_text(text)
        (tmp_path / "in" / name / "exercises.txt").write_text("eq2\n")
    done = run("tests/coursework", "grade", *sorted((tmp_path / "in").iterdir()), "--exercises", "eq2", "eq3", "--jobs", 1,
               "--json", tmp_path / "results.json", "--csv", tmp_path / "marks.csv")
    points = EXERCISES["eq2"].total + EXERCISES["eq3"].total
    assert f"total {points} / {points}" in done.stdout and "vf_loss.py, line 1" in done.stdout, done.stderr
    assert "LOOK: exec, open" in done.stdout
    rows = list(csv.DictReader((tmp_path / "marks.csv").open()))
    assert list(rows[0]) == ["submission", "total", "possible", "eq2", "eq3", "look"]
    assert [row["submission"] for row in rows] == ["ada", "bob", "cy", "di"]
    assert [row["eq2"] for row in rows] == [str(EXERCISES["eq2"].total), "0", "0", "0"]
    assert rows[0]["total"] == rows[0]["possible"] == str(points) and "eq2: exec, open" in rows[3]["look"]
    results = {Path(k).name: v for k, v in json.loads((tmp_path / "results.json").read_text()).items()}
    assert results["ada"]["score"] == points and results["bob"]["score"] == 0
    for test in results["cy"]["tests"]:
        assert {"number", "name", "score", "max_score", "status", "output", "visibility"} <= set(test)
        hidden = test["name"] not in ("eq2: worked example", "eq3: worked example")
        assert test["visibility"] == ("after_published" if hidden else "visible")
    assert [t["visibility"] for t in results["di"]["tests"] if t["name"] == "to look at"] == ["hidden"]
    assert results["ada"]["execution_time"] >= 0
    refused = run("tests/coursework", "grade", tmp_path / "in" / "ada")
    assert refused.returncode == 2 and "--set" in refused.stderr


def test_a_missing_package_is_never_a_pass(tmp_path, monkeypatch):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "scipy.py").write_text("raise ModuleNotFoundError('no scipy', name='scipy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    with pytest.raises(handout.Refused, match="scipy, and nothing was graded"):
        grade.grade([ROOT], ["psnr"])


def test_lists_answers_and_solutions_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    for arguments, words in ((["list"], "marginal_cosine_loss"), (["answers", "--set", "3"], "Q3.1"),
                             (["solutions", "--set", "2"], "def adaptive_weight")):
        code = (f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['x', *{arguments!r}]; "
                f"runpy.run_path({str(HERE)!r}, run_name='__main__')")
        done = run("-c", code)
        assert words in done.stdout, done.stderr


# --- Handouts and texts ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def handouts(tmp_path_factory):
    home = tmp_path_factory.mktemp("handouts")
    for s in SETS:
        handout.handout(home / str(s), s)
    return home


def test_handouts_hold_no_solution_of_their_set_or_a_later_one(handouts):
    for s in SETS:
        for e in EXERCISES.values():
            for name in e.names:
                given, ours = (worker.find(ast.parse((folder / e.file).read_text()), name)
                               for folder in (handouts / str(s), ROOT))
                node, reference = (body[i] for body, i in (given, ours))
                assert worker.is_stub(node) == (e.set >= s), (s, name)
                assert ast.get_docstring(node) == ast.get_docstring(reference)
        text = (handouts / str(s) / "ASSIGNMENT.md").read_text()
        for line in (HERE / "answers.md").read_text().splitlines():
            assert len(line) < 60 or line.startswith("**Q") or line not in text
        assert text.count("<details>") == TEXTS[s].count("**Hint") and "points:" not in text
        assert "{" + "psnr_low" not in text and not re.search(r"\{[a-z0-9_]+\}", re.sub(r"\$[^$]*\$|`[^`]*`", "", text))
    with pytest.raises(handout.Refused, match="not empty"):
        handout.handout(handouts / "1", 1)


def test_public_tests_need_only_their_exercise(handouts, tmp_path):
    """On the handout all fail, in a few lines; with one exercise solved (and those it names), its own pass."""
    for s in SETS:
        folder = tmp_path / str(s)
        shutil.copytree(handouts / str(s), folder)
        names = re.findall(r"def (test_\w+)\(", (folder / f"test_set{s}.py").read_text())
        for e in of_set(s):
            own = [n for n in names if n.startswith(f"test_{e.key}__")]
            assert own and [n for n in names if e.key in n] == own, e.key
    solved = {}
    for s in SETS:    # in one process each: all exercises of the set solved by answers, not by the scripts
        folder = tmp_path / str(s)
        empty = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_set{s}.py", cwd=folder)
        assert " passed" not in empty.stdout and "NotImplementedError" in empty.stdout
        for e in of_set(s):
            path = folder / e.file
            path.write_text(answered(e.key, RIGHT_AND_WRONG[e.key][0], path.read_text()))
        solved[s] = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_set{s}.py", cwd=folder)
        assert solved[s].returncode == 0, solved[s].stdout


def test_a_failing_public_test_is_short(handouts):
    shutil.copy(ROOT / "train_vae.py", handouts / "1")
    wrong = answered("rec", RIGHT_AND_WRONG["rec"][1]["squares"])
    (handouts / "1" / "train_vae.py").write_text(wrong)
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "rec", cwd=handouts / "1")
    assert "1 failed" in done.stdout and "E       " in done.stdout, done.stdout
    assert sum(line.startswith(("    ", ">", "E")) for line in done.stdout.split("\n")) <= 20, done.stdout


def test_ruff_finds_nothing_in_handouts(handouts):
    """Unused imports of a script whose functions are empty are the student's to use."""
    for s in SETS:
        done = run("-m", "ruff", "check", "--isolated", "--line-length", 110, "--extend-select", "E501",
                   *(handouts / str(s)).glob("test_*.py"), *(handouts / str(s)).glob("run_*.py"))
        assert done.returncode == 0, done.stdout
        done = run("-m", "ruff", "check", "--isolated", "--ignore", "F401,E402", handouts / str(s))
        assert done.returncode == 0, done.stdout


def test_texts_and_checks_agree():
    import checks
    for e in EXERCISES.values():
        titles = [c.title for c in e.checks]
        assert titles == list(e.points) and set(titles) == {t for t, _, _ in checks.CHECKS[e.key]}, e.key
        assert e.checks[0].public and not all(c.public for c in e.checks), e.key
        assert e.tier in course.TIERS and set(e.after) <= set(EXERCISES) and "**Example.**" in e.text or e.key in (
            "lpips", "draws", "draw"), e.key
        assert all(worker.find(ast.parse((ROOT / e.file).read_text()), name) for name in e.names)
    assert set(RIGHT_AND_WRONG) == set(EXERCISES)
    for s in SETS:
        tiers = [e.tier for e in of_set(s)]
        assert tiers.count("warm-up") == 1 and tiers.count("design") == 2 and tiers == sorted(
            tiers, key=course.TIERS.index)
        assert [e.number for e in of_set(s)] == [f"{s}.{i}" for i in range(1, len(tiers) + 1)]
        assert "## Now run it" in TEXTS[s] and "Hand in" in TEXTS[s]
        answers = (HERE / "answers.md").read_text()
        assert questions(TEXTS[s]) == [q for q in questions(answers) if q[0].startswith(f"{s}.")]


def test_the_readme_s_numbers_are_the_course_s():
    """The README is checked once it describes this course; its draft is checked until then."""
    text = (ROOT / "README.md").read_text()
    if "tests/coursework/" not in text:
        pytest.skip("the README still describes the old course")
    exercises, asked = len(EXERCISES), sum(len(questions(TEXTS[s])) for s in SETS)
    points = sum(e.total for e in EXERCISES.values()) + sum(n for s in SETS for _, n in questions(TEXTS[s]))
    minutes = sum(e.minutes for e in EXERCISES.values()) + 5 * sum(n for s in SETS for _, n in questions(TEXTS[s]))
    section = " ".join(text[text.index("## In a course"):].split("\n## ")[0].split())
    for words in (f"{exercises} exercises", f"{asked} questions", f"{points} points", f"{round(minutes / 60)} hours"):
        assert words in section, words
