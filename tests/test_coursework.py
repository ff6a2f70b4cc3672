"""The coursework: handouts, and whether the grader is fair.

ANSWERS holds, for every exercise, right answers that differ in form from the scripts and typical wrong ones,
as the lines that stand below the function's docstring. Right ones must get full marks; wrong ones lose some.
"""
import ast
import csv
import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import lru_cache

import coursework
import pytest
from coursework import EXERCISES, ROOT, SCRIPTS, Server, grade, grade_one

# key -> (right answers, {what is wrong: answer})
ANSWERS = {
    "sample": (["""
        noise = torch.empty_like(self.mean).normal_() if noise is None else noise
        return torch.addcmul(self.mean, self.logvar.exp().sqrt(), noise)"""], {
        "variance for deviation": """
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + self.logvar.exp() * noise""",
        "one noise for all": """
        noise = torch.randn(()) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise""",
        "uniform noise": """
        noise = torch.rand_like(self.mean) if noise is None else noise
        return self.mean + (0.5 * self.logvar).exp() * noise""",
        "detached": """
        noise = torch.randn_like(self.mean) if noise is None else noise
        return (self.mean + (0.5 * self.logvar).exp() * noise).detach()"""}),
    "kl": (["""
        per_value = self.mean.square() + torch.exp(self.logvar) - self.logvar - 1
        return per_value.flatten(1).sum(1).mul(0.5)"""], {
        "mean": "return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).mean(dim=(1, 2, 3))",
        "sign": "return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 + self.logvar).sum(dim=(1, 2, 3))",
        "without the half": """
        return (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))""",
        "over the batch": "return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).sum()"}),
    "resnet": (["""
        h = self.norm1(x)
        h = self.conv1(h * h.sigmoid())
        h = self.norm2(h)
        return self.conv2(h * h.sigmoid()) + self.nin_shortcut(x)"""], {
        "no shortcut": "return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))",
        "SiLU before the norm": """
        h = self.conv1(self.norm1(F.silu(x)))
        return self.nin_shortcut(x) + self.conv2(self.norm2(F.silu(h)))""",
        "ReLU": """
        h = self.conv1(F.relu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.relu(self.norm2(h)))""",
        "no SiLU in the middle": """
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(self.norm2(h))"""}),
    "attn": (["""
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2) for layer in (self.q, self.k, self.v))
        a = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", a, v).view_as(x))"""], {
        "no scale": """
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2) for layer in (self.q, self.k, self.v))
        a = (q.mT @ k).softmax(-1)
        return x + self.proj_out((v @ a.mT).view_as(x))""",
        "softmax over the wrong axis": """
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2) for layer in (self.q, self.k, self.v))
        a = (q.mT @ k / q.shape[1] ** 0.5).softmax(1)
        return x + self.proj_out((v @ a.mT).view_as(x))""",
        "no residual": """
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2)[:, None].mT for layer in (self.q, self.k, self.v))
        return self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))""",
        "channels for positions": """
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).reshape(x.shape))""",
        "not swapped back": """
        n = self.norm(x)
        q, k, v = (layer(n).flatten(2)[:, None].mT for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).reshape(x.shape))"""}),
    "rec": (["""
        total = F.l1_loss(x_hat, x, reduction="sum")
        if lpips is not None:
            total = total + lpips_weight * lpips(x, x_hat).sum() * x.shape[1] * x.shape[2] * x.shape[3]
        return total / x.shape[0]"""], {
        "mean": """
        loss = (x - x_hat).abs()
        return (loss if lpips is None else loss + lpips_weight * lpips(x, x_hat)).mean()""",
        "not over the batch": """
        loss = (x - x_hat).abs()
        return (loss if lpips is None else loss + lpips_weight * lpips(x, x_hat)).sum()""",
        "squares": """
        loss = (x - x_hat) ** 2
        return (loss if lpips is None else loss + lpips_weight * lpips(x, x_hat)).sum() / len(x)""",
        "LPIPS once an image": """
        loss = (x - x_hat).abs().sum()
        return (loss if lpips is None else loss + lpips_weight * lpips(x, x_hat).sum()) / len(x)"""}),
    "hinge_g": (["return fake.neg().sum() / fake.numel()"], {
        "sign": "return fake.mean()",
        "a margin": "return F.relu(1 - fake).mean()",
        "sum": "return -fake.sum()"}),
    "hinge_d": (["return (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2"], {
        "swapped": "return 0.5 * (F.relu(1 + real).mean() + F.relu(1 - fake).mean())",
        "no half": "return F.relu(1 - real).mean() + F.relu(1 + fake).mean()",
        "no relu": "return 0.5 * ((1 - real).mean() + (1 + fake).mean())",
        "one mean": "return torch.cat([F.relu(1 - real), F.relu(1 + fake)]).mean()"}),
    "eq2": (["""
        cosine = torch.einsum("bchw,bchw->bhw", F.normalize(z, dim=1), F.normalize(f, dim=1))
        return torch.clamp((1 - margin) - cosine, min=0).sum() / cosine.numel()""", """
        total = 0
        for a, b in zip(z, f):
            a, b = a.flatten(1).T, b.flatten(1).T
            for u, v in zip(a, b):
                total = total + F.relu(1 - margin - u @ v / (u.norm() * v.norm()))
        return total / (z.shape[0] * z.shape[2] * z.shape[3])"""], {
        "no margin": "return F.relu(1 - F.cosine_similarity(z, f, dim=1)).mean()",
        "no relu": "return (1 - margin - F.cosine_similarity(z, f, dim=1)).mean()",
        "wrong axis": "return F.relu(1 - margin - F.cosine_similarity(z, f, dim=-1)).mean()",
        "sum": "return F.relu(1 - margin - F.cosine_similarity(z, f, dim=1)).sum()",
        "margin's sign": "return F.relu(1 + margin - F.cosine_similarity(z, f, dim=1)).mean()",
        "relu after the mean": "return F.relu((1 - margin - F.cosine_similarity(z, f, dim=1)).mean())"}),
    "eq3": (["""
        def similarity(v):
            v = v.flatten(2)
            return F.cosine_similarity(v[:, :, :, None], v[:, :, None, :], dim=1)
        return torch.clamp((similarity(f) - similarity(z)).abs() - margin, min=0).mean()"""], {
        "no abs": """
        z, f = F.normalize(z.flatten(2), dim=1), F.normalize(f.flatten(2), dim=1)
        return F.relu(z.mT @ z - f.mT @ f - margin).mean()""",
        "no normalisation": """
        z, f = z.flatten(2), f.flatten(2)
        return F.relu((z.mT @ z - f.mT @ f).abs() - margin).mean()""",
        "without the diagonal": """
        z, f = F.normalize(z.flatten(2), dim=1), F.normalize(f.flatten(2), dim=1)
        n = z.shape[2]
        return F.relu((z.mT @ z - f.mT @ f).abs() - margin).sum() / (len(z) * n * (n - 1))""",
        "across images": """
        z, f = (F.normalize(v.flatten(2), dim=1).transpose(0, 1).flatten(1) for v in (z, f))
        return F.relu((z.mT @ z - f.mT @ f).abs() - margin).mean()""",
        "no margin": """
        z, f = F.normalize(z.flatten(2), dim=1), F.normalize(f.flatten(2), dim=1)
        return (z.mT @ z - f.mT @ f).abs().mean()"""}),
    "eq4": (["""
        a = torch.autograd.grad(rec_loss, weight, retain_graph=True)[0].square().sum().sqrt()
        b = torch.autograd.grad(other_loss, weight, retain_graph=True)[0].square().sum().sqrt()
        return torch.clamp(a / (b + 1e-4), min=0, max=max_weight)""", """
        norms = []
        for loss in (rec_loss, other_loss):
            norms.append(torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten().norm().item())
        return torch.tensor(min(norms[0] / (norms[1] + 1e-4), max_weight))"""], {
        "inverted": """
        a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (rec_loss, other_loss))
        return (b / (a + 1e-4)).clamp(0, max_weight).detach()""",
        "no clamp": """
        a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (rec_loss, other_loss))
        return (a / (b + 1e-4)).detach()""",
        "graph freed": """
        a, b = (torch.autograd.grad(v, weight)[0].norm() for v in (rec_loss, other_loss))
        return (a / (b + 1e-4)).clamp(0, max_weight).detach()""",
        "no 1e-4": """
        a, b = (torch.autograd.grad(v, weight, retain_graph=True)[0].norm() for v in (rec_loss, other_loss))
        return (a / b).clamp(0, max_weight).detach()""",
        "keeps a gradient": """
        a, b = (torch.autograd.grad(v, weight, create_graph=True)[0].norm() for v in (rec_loss, other_loss))
        return (a / (b + 1e-4)).clamp(0, max_weight) * (1 + 0 * rec_loss)""",
        "fills .grad": """
        norms = []
        for loss in (rec_loss, other_loss):
            weight.grad = None
            loss.backward(retain_graph=True)
            norms.append(weight.grad.norm().clone())
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, max_weight).detach()"""}),
    "eq1": (["""
        posterior = self.vae.encode(x)
        z = posterior.sample(noise)
        projected = self.linear_proj(z) if self.linear_proj else None
        return self.vae.decode(z), z, posterior, projected""", """
        x_hat, z, q = self.vae(x, noise)
        if self.linear_proj is None:
            return x_hat, z, q, None
        return x_hat, z, q, torch.einsum("oc,bchw->bohw", self.linear_proj.weight[:, :, 0, 0], z)"""], {
        "the mean": """
        x_hat, z, q = self.vae(x, noise)
        return x_hat, z, q, self.linear_proj(q.mean) if self.linear_proj is not None else None""",
        "no noise": """
        x_hat, z, q = self.vae(x)
        return x_hat, z, q, self.linear_proj(z) if self.linear_proj is not None else None""",
        "detached": """
        x_hat, z, q = self.vae(x, noise)
        return x_hat, z, q, self.linear_proj(z.detach()) if self.linear_proj is not None else None""",
        "without W": """
        x_hat, z, q = self.vae(x, noise)
        return x_hat, z, q, self.linear_proj(z)"""}),
    "teacher": (["""
        h = 0.5 * x + 0.5
        h = (h - self.mean).div(self.std)
        if self.patch > 0:
            h = F.interpolate(h, size=[n * self.patch for n in grid], mode="bilinear")
        with torch.no_grad():
            out = self.tokens(self.net, h).to(torch.float32)
        if out.shape[2:] != tuple(grid):
            raise ValueError(f"{out.shape[2:]} is not {grid}")
        return out.detach()"""], {
        "not to [0, 1]": """
        x = (x - self.mean) / self.std
        if self.patch:
            x = F.interpolate(x, (grid[0] * self.patch, grid[1] * self.patch), mode="bilinear")
        f = self.tokens(self.net, x)
        if tuple(f.shape[-2:]) != tuple(grid):
            raise ValueError("grid")
        return f.float()""",
        "no resizing": """
        f = self.tokens(self.net, ((x + 1) / 2 - self.mean) / self.std)
        if tuple(f.shape[-2:]) != tuple(grid):
            raise ValueError("grid")
        return f.float()""",
        "nearest": """
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.patch:
            x = F.interpolate(x, (grid[0] * self.patch, grid[1] * self.patch))
        f = self.tokens(self.net, x)
        if tuple(f.shape[-2:]) != tuple(grid):
            raise ValueError("grid")
        return f.float()""",
        "no error": """
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.patch:
            x = F.interpolate(x, (grid[0] * self.patch, grid[1] * self.patch), mode="bilinear")
        return self.tokens(self.net, x).float()"""}),
    "rmsnorm": (["return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)", """
        h = x.to(torch.float32)
        return h / torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + self.eps) * self.weight"""], {
        "layer norm": "return F.layer_norm(x.float(), x.shape[-1:], self.weight, None, self.eps)",
        "eps outside": """
        h = x.float()
        return h / (h.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight""",
        "sum": """
        h = x.float()
        return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + self.eps) * self.weight""",
        "no weight": """
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)""",
        "in x's own type": """
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight"""}),
    "swiglu": (["""
        both = self.w12(x)
        half = both.shape[-1] // 2
        gate = both[..., :half]
        return self.w3(gate * torch.sigmoid(gate) * both[..., half:])"""], {
        "halves swapped": """
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(x1 * F.silu(x2))""",
        "sigmoid": """
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(torch.sigmoid(x1) * x2)""",
        "GELU": """
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.gelu(x1) * x2)""",
        "even and odd": """
        h = self.w12(x)
        return self.w3(F.silu(h[..., ::2]) * h[..., 1::2])"""}),
    "angles": (["""
        super().__init__()
        n, quarter = torch.arange(side * side), head_dim // 4
        omega = torch.tensor([10000.0 ** (-i / quarter) for i in range(quarter)])
        rows, columns = torch.outer((n // side).float(), omega), torch.outer((n % side).float(), omega)
        angle = torch.stack([torch.cat([rows, columns], 1)] * 2, 2).flatten(1)
        self.register_buffer("freqs_cos", torch.cos(angle))
        self.register_buffer("freqs_sin", torch.sin(angle))"""], {
        "columns first": """
        super().__init__()
        n, quarter = torch.arange(side * side), head_dim // 4
        omega = 10000.0 ** (-torch.arange(quarter) / quarter)
        angle = torch.cat([torch.outer(n % side, omega), torch.outer(n // side, omega)], 1)
        angle = angle.repeat_interleave(2, 1)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())""",
        "halves for pairs": """
        super().__init__()
        n, quarter = torch.arange(side * side), head_dim // 4
        omega = 10000.0 ** (-torch.arange(quarter) / quarter)
        angle = torch.cat([torch.outer(n // side, omega)] * 2 + [torch.outer(n % side, omega)] * 2, 1)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())""",
        "exponent over the whole head": """
        super().__init__()
        n, quarter = torch.arange(side * side), head_dim // 4
        omega = 10000.0 ** (-torch.arange(quarter) / head_dim)
        angle = torch.cat([torch.outer(n // side, omega), torch.outer(n % side, omega)], 1)
        angle = angle.repeat_interleave(2, 1)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())"""}),
    "rope": (["""
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = self.freqs_cos[:, 0::2], self.freqs_sin[:, 0::2]
        out = torch.empty_like(x)
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = b * cos + a * sin
        return out"""], {
        "the other way round": """
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack([x2, -x1], dim=-1).flatten(-2) * self.freqs_sin""",
        "halves for pairs": """
        x1, x2 = x.chunk(2, dim=-1)
        return x * self.freqs_cos + torch.cat([-x2, x1], dim=-1) * self.freqs_sin""",
        "no minus": """
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.freqs_cos + torch.stack([x2, x1], dim=-1).flatten(-2) * self.freqs_sin""",
        "in place": """
        x[..., 0::2] = x[..., 0::2] * self.freqs_cos[:, 0::2] - x[..., 1::2] * self.freqs_sin[:, 0::2]
        x[..., 1::2] = x[..., 1::2] * self.freqs_cos[:, 0::2] + x[..., 0::2] * self.freqs_sin[:, 0::2]
        return x"""}),
    "modulate": (["""
        out = torch.einsum("bnd,bd->bnd", x, scale + 1)
        if shift is not None:
            out = out + shift[:, None, :]
        return out"""], {
        "no 1": "return x * scale.unsqueeze(1) + (0 if shift is None else shift.unsqueeze(1))",
        "swapped": "return x * (1 + (0 if shift is None else shift.unsqueeze(1))) + scale.unsqueeze(1)",
        "token for image": "return x * (1 + scale) + (0 if shift is None else shift)",
        "shift first": """
        return (x + (0 if shift is None else shift.unsqueeze(1))) * (1 + scale.unsqueeze(1))"""}),
    "block": (["""
        p = self.adaLN_modulation(c).view(len(c), self.parts, 1, -1)
        if self.parts == 4:
            s1, k1, g1, s2, k2, g2 = 0, p[:, 0], p[:, 1], 0, p[:, 2], p[:, 3]
        else:
            s1, k1, g1, s2, k2, g2 = p.unbind(1)
        x = x + self.attn(self.norm1(x) * (1 + k1) + s1, rope) * g1
        return x + self.mlp(self.norm2(x) * (1 + k2) + s2) * g2"""], {
        "scale before shift": """
        if self.parts == 4:
            s1 = s2 = None
            k1, g1, k2, g2 = self.adaLN_modulation(c).chunk(4, dim=1)
        else:
            k1, s1, g1, k2, s2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, k1), rope)
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, k2))""",
        "no gate": """
        if self.parts == 4:
            s1 = s2 = None
            k1, g1, k2, g2 = self.adaLN_modulation(c).chunk(4, dim=1)
        else:
            s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + self.attn(modulate(self.norm1(x), s1, k1), rope)
        return x + self.mlp(modulate(self.norm2(x), s2, k2))""",
        "both from the same x": """
        if self.parts == 4:
            s1 = s2 = None
            k1, g1, k2, g2 = self.adaLN_modulation(c).chunk(4, dim=1)
        else:
            s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        a = g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, k1), rope)
        return x + a + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, k2))""",
        "six parts only": """
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, k1), rope)
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, k2))""",
        "no rope": """
        if self.parts == 4:
            s1 = s2 = None
            k1, g1, k2, g2 = self.adaLN_modulation(c).chunk(4, dim=1)
        else:
            s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.attn(modulate(self.norm1(x), s1, k1), None)
        return x + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), s2, k2))"""}),
    "time": (["""
        omega = torch.tensor([10000.0 ** (-i / self.half) for i in range(self.half)])
        angle = torch.outer(t.float(), omega)
        h = torch.cat([torch.cos(angle), torch.sin(angle)], -1)
        return self.mlp(h.type_as(self.mlp[0].weight))"""], {
        "sines first": """
        i = torch.arange(self.half)
        a = t.float()[:, None] * torch.exp(-math.log(10000.0) * i / self.half)
        return self.mlp(torch.cat([a.sin(), a.cos()], 1).to(self.mlp[0].weight.dtype))""",
        "times 1000": """
        i = torch.arange(self.half)
        a = 1000 * t.float()[:, None] * torch.exp(-math.log(10000.0) * i / self.half)
        return self.mlp(torch.cat([a.cos(), a.sin()], 1).to(self.mlp[0].weight.dtype))""",
        "one too few": """
        i = torch.arange(self.half)
        a = t.float()[:, None] * torch.exp(-math.log(10000.0) * i / (self.half - 1))
        return self.mlp(torch.cat([a.cos(), a.sin()], 1).to(self.mlp[0].weight.dtype))""",
        "interleaved": """
        i = torch.arange(self.half)
        a = t.float()[:, None] * torch.exp(-math.log(10000.0) * i / self.half)
        return self.mlp(torch.stack([a.cos(), a.sin()], 2).flatten(1).to(self.mlp[0].weight.dtype))"""}),
    "labels": (["""
        if drop is None:
            drop = torch.zeros_like(y, dtype=torch.bool)
            if self.training and self.dropout_prob > 0:
                drop = torch.bernoulli(torch.full(y.shape, self.dropout_prob, device=y.device)).bool()
        y = y.clone()
        y[drop] = self.num_classes
        return self.embedding_table.weight[y]"""], {
        "in evaluation, too": """
        if drop is None and self.dropout_prob > 0:
            drop = torch.rand(len(y)) < self.dropout_prob
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes, y))""",
        "the share that is kept": """
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y)) > self.dropout_prob
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes, y))""",
        "all or none": """
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(1) < self.dropout_prob
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes, y))""",
        "the last class": """
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y)) < self.dropout_prob
        return self.embedding_table(y if drop is None else torch.where(drop, self.num_classes - 1, y))""",
        "changes y": """
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y)) < self.dropout_prob
        if drop is not None:
            y[drop] = self.num_classes
        return self.embedding_table(y)"""}),
    "unpatchify": (["""
        B, N, _ = x.shape
        side, p = round(N ** 0.5), self.patch_size
        x = x.reshape(B, side, side, p, p, self.in_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, self.in_channels, side * p, side * p)""", """
        side, p = math.isqrt(x.shape[1]), self.patch_size
        columns = x.reshape(len(x), side * side, p * p, -1).permute(0, 3, 2, 1).flatten(1, 2)
        return F.fold(columns, side * p, p, stride=p)"""], {
        "channel slowest": """
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.view(len(x), side, side, self.in_channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), self.in_channels, side * p, side * p)""",
        "patch turned": """
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.view(len(x), side, side, p, p, self.in_channels).permute(0, 5, 1, 4, 2, 3)
        return x.reshape(len(x), self.in_channels, side * p, side * p)""",
        "grid turned": """
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.view(len(x), side, side, p, p, self.in_channels).permute(0, 5, 2, 3, 1, 4)
        return x.reshape(len(x), self.in_channels, side * p, side * p)""",
        "patches apart": """
        side, p = math.isqrt(x.shape[1]), self.patch_size
        x = x.view(len(x), side, side, p, p, self.in_channels).permute(0, 5, 3, 1, 4, 2)
        return x.reshape(len(x), self.in_channels, side * p, side * p)"""}),
    "sincos": (["""
        q, rows = dim // 4, []
        omega = 10000.0 ** (-torch.arange(q, dtype=torch.float64) / q)
        for n in range(side * side):
            row, column = divmod(n, side)
            rows.append(torch.cat([(column * omega).sin(), (column * omega).cos(),
                                   (row * omega).sin(), (row * omega).cos()]))
        return torch.stack(rows)[None].float()"""], {
        "row first": """
        q, n = dim // 4, torch.arange(side * side)
        omega = 10000.0 ** (-torch.arange(q) / q)
        a, b = torch.outer(n // side, omega), torch.outer(n % side, omega)
        return torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], 1)[None]""",
        "cosine first": """
        q, n = dim // 4, torch.arange(side * side)
        omega = 10000.0 ** (-torch.arange(q) / q)
        a, b = torch.outer(n % side, omega), torch.outer(n // side, omega)
        return torch.cat([a.cos(), a.sin(), b.cos(), b.sin()], 1)[None]""",
        "sum for concatenation": """
        q, n = dim // 2, torch.arange(side * side)
        omega = 10000.0 ** (-torch.arange(q) / q)
        a = torch.outer(n, omega)
        return torch.cat([a.sin(), a.cos()], 1)[None]"""}),
    "lognorm": (["""
        u = torch.empty(n, device=device)
        if not lognorm:
            return u.uniform_(generator=generator)
        return 1 / (1 + torch.exp(-u.normal_(generator=generator)))"""], {
        "sigmoid of uniform": """
        u = torch.rand(n, device=device, generator=generator)
        return torch.sigmoid(u) if lognorm else u""",
        "torch's own seed": "return torch.sigmoid(torch.randn(n)) if lognorm else torch.rand(n)",
        "switch reversed": """
        if lognorm:
            return torch.rand(n, device=device, generator=generator)
        return torch.sigmoid(torch.randn(n, device=device, generator=generator))""",
        "clipped normal": """
        if lognorm:
            return (0.5 + 0.25 * torch.randn(n, device=device, generator=generator)).clamp(1e-3, 1 - 1e-3)
        return torch.rand(n, device=device, generator=generator)"""}),
    "flow": (["""
        mix = t[:, None, None, None]
        pred, v = model(torch.lerp(x0, x1, mix), t, y, drop), x1 - x0
        mse = torch.stack([F.mse_loss(p, q) for p, q in zip(pred, v)])
        unit = F.normalize(pred, dim=1) * F.normalize(v, dim=1)
        terms = {"mse": mse, "direction": 1 - unit.sum(1).flatten(1).mean(1)}
        loss = terms["mse"].mean()
        if direction:
            loss = loss + terms["direction"].mean()
        return loss, terms"""], {
        "t reversed": """
        s = t.view(-1, 1, 1, 1)
        pred, v = model((1 - s) * x1 + s * x0, t, y, drop), x1 - x0
        terms = {"mse": ((pred - v) ** 2).mean((1, 2, 3)),
                 "direction": (1 - F.cosine_similarity(pred, v, dim=1)).mean((1, 2))}
        return terms["mse"].mean() + direction * terms["direction"].mean(), terms""",
        "v reversed": """
        s = t.view(-1, 1, 1, 1)
        pred, v = model(s * x1 + (1 - s) * x0, t, y, drop), x0 - x1
        terms = {"mse": ((pred - v) ** 2).mean((1, 2, 3)),
                 "direction": (1 - F.cosine_similarity(pred, v, dim=1)).mean((1, 2))}
        return terms["mse"].mean() + direction * terms["direction"].mean(), terms""",
        "cosine of the whole latent": """
        s = t.view(-1, 1, 1, 1)
        pred, v = model(s * x1 + (1 - s) * x0, t, y, drop), x1 - x0
        terms = {"mse": ((pred - v) ** 2).mean((1, 2, 3)),
                 "direction": 1 - F.cosine_similarity(pred.flatten(1), v.flatten(1))}
        return terms["mse"].mean() + direction * terms["direction"].mean(), terms""",
        "always the direction": """
        s = t.view(-1, 1, 1, 1)
        pred, v = model(s * x1 + (1 - s) * x0, t, y, drop), x1 - x0
        terms = {"mse": ((pred - v) ** 2).mean((1, 2, 3)),
                 "direction": (1 - F.cosine_similarity(pred, v, dim=1)).mean((1, 2))}
        return terms["mse"].mean() + terms["direction"].mean(), terms""",
        "labels not dropped": """
        s = t.view(-1, 1, 1, 1)
        pred, v = model(s * x1 + (1 - s) * x0, t, y), x1 - x0
        terms = {"mse": ((pred - v) ** 2).mean((1, 2, 3)),
                 "direction": (1 - F.cosine_similarity(pred, v, dim=1)).mean((1, 2))}
        return terms["mse"].mean() + direction * terms["direction"].mean(), terms"""}),
    "alphas": (["""
        out, product = [], 1.0
        for k in range(1000):
            product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
            out.append(product)
        return torch.tensor(out, dtype=torch.float64, device=device)"""], {
        "no product": "return 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)",
        "Stable Diffusion's schedule": """
        beta = torch.linspace(1e-4 ** 0.5, 0.02 ** 0.5, 1000, dtype=torch.float64, device=device) ** 2
        return torch.cumprod(1 - beta, 0)""",
        "starts at 1": """
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=device)
        return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)[:-1]])""",
        "float32": "return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)"}),
    "ddpm": (["""
        k = torch.floor(1000 * (1 - t)).long()
        k = torch.where(k > 999, torch.full_like(k, 999), k)
        a = ddpm_alphas(x1.device)[k].to(x1.dtype)[:, None, None, None]
        x = torch.sqrt(a) * x1 + torch.sqrt(1 - a) * x0
        mse = F.mse_loss(model(x, k.float(), y, drop), x0, reduction="none").flatten(1).mean(1)
        return mse.mean(), {"mse": mse, "direction": 0 * mse}"""], {
        "t reversed": """
        k = (1000 * t).long().clamp(0, 999)
        a = ddpm_alphas(x1.device)[k].float().view(-1, 1, 1, 1)
        mse = ((model(a.sqrt() * x1 + (1 - a).sqrt() * x0, k.float(), y, drop) - x0) ** 2).mean((1, 2, 3))
        return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}""",
        "no roots": """
        k = (1000 * (1 - t)).long().clamp(0, 999)
        a = ddpm_alphas(x1.device)[k].float().view(-1, 1, 1, 1)
        mse = ((model(a * x1 + (1 - a) * x0, k.float(), y, drop) - x0) ** 2).mean((1, 2, 3))
        return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}""",
        "predicts the data": """
        k = (1000 * (1 - t)).long().clamp(0, 999)
        a = ddpm_alphas(x1.device)[k].float().view(-1, 1, 1, 1)
        mse = ((model(a.sqrt() * x1 + (1 - a).sqrt() * x0, k.float(), y, drop) - x1) ** 2).mean((1, 2, 3))
        return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}""",
        "t for k": """
        k = (1000 * (1 - t)).long().clamp(0, 999)
        a = ddpm_alphas(x1.device)[k].float().view(-1, 1, 1, 1)
        mse = ((model(a.sqrt() * x1 + (1 - a).sqrt() * x0, t, y, drop) - x0) ** 2).mean((1, 2, 3))
        return mse.mean(), {"mse": mse, "direction": torch.zeros_like(mse)}"""}),
    "ddpm_v": (["""
        import numpy as np

        def velocity(x, t, y):
            a = ddpm_alphas(x.device).cpu().numpy()
            times = np.sqrt(a) / (np.sqrt(a) + np.sqrt(1 - a))
            clamped = np.clip(t.double().cpu().numpy(), times[-1], times[0])
            k = np.interp(clamped, times[::-1], np.arange(999.0, -1, -1))
            k = torch.as_tensor(k).float().to(x.device)
            s = torch.as_tensor(clamped).float().to(x.device).view(-1, 1, 1, 1)
            return (x - model(x / torch.sqrt(s * s + (1 - s) ** 2), k, y)) / s
        return velocity"""], {
        "nearest step": """
        def velocity(x, t, y):
            a = ddpm_alphas(x.device)
            times = a.sqrt() / (a.sqrt() + (1 - a).sqrt())
            t = t.double().clamp(times[-1], times[0])
            k = (times - t[:, None]).abs().argmin(1).float()
            s = t.float().view(-1, 1, 1, 1)
            return (x - model(x * (s ** 2 + (1 - s) ** 2).rsqrt(), k, y)) / s
        return velocity""",
        "no scale": """
        def velocity(x, t, y):
            a = ddpm_alphas(x.device)
            grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)
            t = t.double().clamp(grid[0], grid[-1])
            i = torch.searchsorted(grid, t).clamp(1, 999)
            k = (1000 - i - (t - grid[i - 1]) / (grid[i] - grid[i - 1])).float()
            s = t.float().view(-1, 1, 1, 1)
            return (x - model(x, k, y)) / s
        return velocity""",
        "not clamped": """
        def velocity(x, t, y):
            a = ddpm_alphas(x.device)
            grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)
            t = t.double()
            i = torch.searchsorted(grid, t).clamp(1, 999)
            k = (1000 - i - (t - grid[i - 1]) / (grid[i] - grid[i - 1])).float()
            s = t.float().view(-1, 1, 1, 1)
            return (x - model(x * (s ** 2 + (1 - s) ** 2).rsqrt(), k, y)) / s
        return velocity""",
        "step reversed": """
        def velocity(x, t, y):
            a = ddpm_alphas(x.device)
            grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)
            t = t.double().clamp(grid[0], grid[-1])
            i = torch.searchsorted(grid, t).clamp(1, 999)
            k = (i - 1 + (t - grid[i - 1]) / (grid[i] - grid[i - 1])).float()
            s = t.float().view(-1, 1, 1, 1)
            return (x - model(x * (s ** 2 + (1 - s) ** 2).rsqrt(), k, y)) / s
        return velocity""",
        "over 1 - t": """
        def velocity(x, t, y):
            a = ddpm_alphas(x.device)
            grid = (a.sqrt() / (a.sqrt() + (1 - a).sqrt())).flip(0)
            t = t.double().clamp(grid[0], grid[-1])
            i = torch.searchsorted(grid, t).clamp(1, 999)
            k = (1000 - i - (t - grid[i - 1]) / (grid[i] - grid[i - 1])).float()
            s = t.float().view(-1, 1, 1, 1)
            return (x - model(x * (s ** 2 + (1 - s) ** 2).rsqrt(), k, y)) / (1 - s)
        return velocity"""}),
    "ema": (["""
        with torch.no_grad():
            for average, weight in zip(averages, weights):
                average.mul_(decay).add_((1 - decay) * weight)"""], {
        "weights swapped": """
        with torch.no_grad():
            for average, weight in zip(averages, weights):
                average.mul_(1 - decay).add_(decay * weight)""",
        "not in place": """
        with torch.no_grad():
            for average, weight in zip(averages, weights):
                average = decay * average + (1 - decay) * weight""",
        "with a gradient": """
        for average, weight in zip(averages, weights):
            average.mul_(decay).add_((1 - decay) * weight)""",
        "the weights move": """
        with torch.no_grad():
            for average, weight in zip(averages, weights):
                weight.mul_(1 - decay).add_(decay * average)"""}),
    "batches": (["""
        out = []
        for place in range(step * batch_size, (step + 1) * batch_size):
            epoch, i = divmod(place, n)
            out.append(int(epoch_order(n, seed, epoch)[i]))
        return torch.tensor(out)"""], {
        "each epoch starts anew": """
        per_epoch = max(1, n // batch_size)
        epoch, i = divmod(step, per_epoch)
        return epoch_order(n, seed, epoch)[i * batch_size:(i + 1) * batch_size]""",
        "always epoch 0": """
        order = epoch_order(n, seed, 0)
        return order[torch.arange(step * batch_size, (step + 1) * batch_size) % n]""",
        "at random": """
        return torch.randint(n, (batch_size,), generator=torch.Generator().manual_seed(seed + step))""",
        "off by one": """
        places = range((step + 1) * batch_size, (step + 2) * batch_size)
        return torch.stack([epoch_order(n, seed, place // n)[place % n] for place in places])"""}),
    "shift": (["return t / (t + (1 - t) / shift)"], {
        "inverse": "return t / (shift + (1 - shift) * t)",
        "multiplied": "return shift * t",
        "sign": "return shift * t / (1 + (1 - shift) * t)"}),
    "grid": (["""
        return shift_timesteps(torch.arange(s.steps, dtype=torch.float64) / (s.steps - 1), s.shift)"""], {
        "one point more": """
        return shift_timesteps(torch.linspace(0, 1, s.steps + 1, dtype=torch.float64), s.shift)""",
        "without 1": "return shift_timesteps(torch.arange(s.steps, dtype=torch.float64) / s.steps, s.shift)",
        "not shifted": "return torch.linspace(0, 1, s.steps, dtype=torch.float64)",
        "float32": "return shift_timesteps(torch.linspace(0, 1, s.steps), s.shift)"}),
    "euler": (["""
        for i in range(len(ts) - 1):
            step = ts[i + 1] - ts[i]
            x = torch.add(x, velocity(x, ts[i]) * step)
        return x"""], {
        "right end": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            x = x + (t_next - t) * velocity(x, t_next)
        return x""",
        "equal steps": """
        for t in ts[:-1]:
            x = x + (ts[-1] - ts[0]) / (len(ts) - 1) * velocity(x, t)
        return x""",
        "backwards": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            x = x - (t_next - t) * velocity(x, t)
        return x""",
        "one step short": """
        for t, t_next in zip(ts[:-2], ts[1:-1]):
            x = x + (t_next - t) * velocity(x, t)
        return x""",
        "changes x": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            x += (t_next - t) * velocity(x, t)
        return x"""}),
    "heun": (["""
        for i in range(1, len(ts)):
            h = ts[i] - ts[i - 1]
            first = velocity(x, ts[i - 1])
            second = velocity(x + h * first, ts[i])
            x = x + 0.5 * h * first + 0.5 * h * second
        return x"""], {
        "midpoint": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            h = t_next - t
            x = x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)
        return x""",
        "sum of both": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            v = velocity(x, t)
            x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next))
        return x""",
        "second at the old time": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            v = velocity(x, t)
            x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t)) / 2
        return x""",
        "second at the old x": """
        for t, t_next in zip(ts[:-1], ts[1:]):
            x = x + (t_next - t) * (velocity(x, t) + velocity(x, t_next)) / 2
        return x"""}),
    "guidance": (["""
        times = torch.full((len(x),), float(t), device=x.device)
        v = model(x, times, y)
        if scale == 1 or float(t) < interval_start:
            return v
        null = model.num_classes if null_class is None else null_class
        v_null = model(x, times, torch.full_like(y, null))
        out, k = v.clone(), x.shape[1] if channels is None else channels
        out[:, :k] = (1 - scale) * v_null[:, :k] + scale * v[:, :k]
        return out"""], {
        "from v_class": """
        times = torch.full((len(x),), float(t))
        v = model(x, times, y)
        if scale == 1 or t < interval_start:
            return v
        null = torch.full_like(y, model.num_classes if null_class is None else null_class)
        guided = v + scale * (v - model(x, times, null))
        k = x.shape[1] if channels is None else channels
        return torch.cat([guided[:, :k], v[:, k:]], 1)""",
        "rest unconditional": """
        times = torch.full((len(x),), float(t))
        v = model(x, times, y)
        if scale == 1 or t < interval_start:
            return v
        v_null = model(x, times, torch.full_like(y, model.num_classes if null_class is None else null_class))
        guided = v_null + scale * (v - v_null)
        k = x.shape[1] if channels is None else channels
        return torch.cat([guided[:, :k], v_null[:, k:]], 1)""",
        "interval's other side": """
        times = torch.full((len(x),), float(t))
        v = model(x, times, y)
        if scale == 1 or t > interval_start:
            return v
        v_null = model(x, times, torch.full_like(y, model.num_classes if null_class is None else null_class))
        guided = v_null + scale * (v - v_null)
        k = x.shape[1] if channels is None else channels
        return torch.cat([guided[:, :k], v[:, k:]], 1)""",
        "<= for <": """
        times = torch.full((len(x),), float(t))
        v = model(x, times, y)
        if scale == 1 or t <= interval_start:
            return v
        v_null = model(x, times, torch.full_like(y, model.num_classes if null_class is None else null_class))
        guided = v_null + scale * (v - v_null)
        k = x.shape[1] if channels is None else channels
        return torch.cat([guided[:, :k], v[:, k:]], 1)""",
        "the last channels": """
        times = torch.full((len(x),), float(t))
        v = model(x, times, y)
        if scale == 1 or t < interval_start:
            return v
        v_null = model(x, times, torch.full_like(y, model.num_classes if null_class is None else null_class))
        guided = v_null + scale * (v - v_null)
        k = x.shape[1] if channels is None else channels
        return torch.cat([v[:, :-k], guided[:, -k:]], 1)"""}),
    "frechet": (["""
        values, vectors = np.linalg.eigh(np.asarray(sigma1, dtype=np.float64))
        root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
        middle = np.sqrt(np.clip(np.linalg.eigvalsh(root @ sigma2 @ root), 0, None)).sum()
        return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2) - 2 * middle)""", """
        values = np.linalg.eigvals(np.asarray(sigma1, np.float64) @ np.asarray(sigma2, np.float64))
        d = mu1 - mu2
        roots = np.sqrt(np.maximum(values.real, 0)).sum()
        return d @ d + np.trace(sigma1) + np.trace(sigma2) - 2 * roots"""], {
        "not squared": """
        values = np.sqrt(np.maximum(np.linalg.eigvals(sigma1 @ sigma2).real, 0)).sum()
        return np.linalg.norm(mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * values""",
        "no 2": """
        values = np.sqrt(np.maximum(np.linalg.eigvals(sigma1 @ sigma2).real, 0)).sum()
        return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - values""",
        "roots one by one": """
        root = np.sqrt(np.maximum(sigma1 * sigma2, 0))
        return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)""",
        "no root": """
        values = np.linalg.eigvals(sigma1 @ sigma2).real.sum()
        return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * values"""}),
    "is": (["""
        probs, scores = np.asarray(probs, dtype=np.float64), []
        for start in range(0, len(probs), split):
            p = probs[start:start + split]
            ratio = np.where(p > 0, p, 1) / np.where(p > 0, p.mean(0), 1)
            scores.append(np.exp((p * np.log(ratio)).sum(1).mean()))
        return float(np.mean(scores))"""], {
        "no split": """
        p = torch.as_tensor(probs).double()
        return (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0, keepdim=True))).sum(1).mean().exp().item()""",
        "KL reversed": """
        scores = []
        for p in torch.as_tensor(probs).double().split(split):
            q = p.mean(0, keepdim=True)
            scores.append((torch.xlogy(q, q) - torch.xlogy(q, p + 1e-12)).sum(1).mean().exp().item())
        return sum(scores) / len(scores)""",
        "exp before the mean": """
        scores = []
        for p in torch.as_tensor(probs).double().split(split):
            kl = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0, keepdim=True))).sum(1)
            scores.append(kl.exp().mean().item())
        return sum(scores) / len(scores)""",
        "0 log 0": """
        scores = []
        for p in torch.as_tensor(probs).double().split(split):
            kl = (p * (p.log() - p.mean(0, keepdim=True).log())).sum(1)
            scores.append(kl.mean().exp().item())
        return sum(scores) / len(scores)""",
        "last split lost": """
        p, scores = torch.as_tensor(probs).double(), []
        for part in (p.split(split) if len(p) < split else p[:len(p) // split * split].split(split)):
            kl = (torch.xlogy(part, part) - torch.xlogy(part, part.mean(0, keepdim=True))).sum(1)
            scores.append(kl.mean().exp().item())
        return sum(scores) / len(scores)"""}),
    "pr": (["""
        a, b = torch.as_tensor(reference).double(), torch.as_tensor(samples).double()
        near_a = torch.cdist(a, a).sort(1).values[:, k]
        near_b = torch.cdist(b, b).kthvalue(k + 1).values
        d = torch.cdist(a, b)
        precision = (d <= near_a.view(-1, 1)).any(0).double().mean()
        recall = (d <= near_b.view(1, -1)).any(1).double().mean()
        return float(precision), float(recall)"""], {
        "swapped": """
        a, b = reference.double(), samples.double()
        ra, rb = (torch.cdist(v, v).sort(1).values[:, k] for v in (a, b))
        d = torch.cdist(a, b)
        return (d <= rb).any(1).double().mean().item(), (d <= ra[:, None]).any(0).double().mean().item()""",
        "counts itself": """
        a, b, k = reference.double(), samples.double(), k - 1
        ra, rb = (torch.cdist(v, v).sort(1).values[:, k] for v in (a, b))
        d = torch.cdist(a, b)
        return (d <= ra[:, None]).any(0).double().mean().item(), (d <= rb).any(1).double().mean().item()""",
        "axis": """
        a, b = reference.double(), samples.double()
        ra, rb = (torch.cdist(v, v).sort(1).values[:, k] for v in (a, b))
        d = torch.cdist(a, b)
        return (d <= ra[:, None]).any(1).double().mean().item(), (d <= rb).any(0).double().mean().item()""",
        "all balls": """
        a, b = reference.double(), samples.double()
        ra, rb = (torch.cdist(v, v).sort(1).values[:, k] for v in (a, b))
        d = torch.cdist(a, b)
        return (d <= ra[:, None]).double().mean().item(), (d <= rb).double().mean().item()"""}),
    "psnr": (["""
        mse = torch.stack([F.mse_loss(a, b) for a, b in zip(x, y)])
        return 20 * torch.log10(torch.tensor(float(data_range))) - 10 * torch.log10(mse)"""], {
        "range not squared": "return 10 * torch.log10(data_range / (x - y).square().mean((1, 2, 3)))",
        "over the batch": """
        return (10 * torch.log10(data_range ** 2 / (x - y).square().mean())).repeat(len(x))""",
        "natural logarithm": "return 10 * torch.log(data_range ** 2 / (x - y).square().mean((1, 2, 3)))",
        "20": "return 20 * torch.log10(data_range ** 2 / (x - y).square().mean((1, 2, 3)))",
        "an eps": "return 10 * torch.log10(data_range ** 2 / ((x - y).square().mean((1, 2, 3)) + 1e-3))"}),
    "ssim": (["""
        line = torch.exp(-0.5 * (torch.arange(11, dtype=x.dtype) - 5) ** 2 / 1.5 ** 2)
        window = torch.outer(line, line)
        window = (window / window.sum()).expand(x.shape[1], 1, 11, 11)

        def blur(v):
            return F.conv2d(F.pad(v, (5, 5, 5, 5), mode="reflect"), window, groups=v.shape[1])
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x ** 2) - mx ** 2, blur(y ** 2) - my ** 2, blur(x * y) - mx * my
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        light = (2 * mx * my + c1) / (mx ** 2 + my ** 2 + c1)
        return (light * (2 * cov + c2) / (vx + vy + c2)).flatten(1).mean(1)"""], {
        "zeros outside": """
        g = torch.exp(-torch.arange(-5, 6, dtype=x.dtype) ** 2 / 4.5)
        g = (torch.outer(g, g) / g.sum() ** 2)[None, None]

        def blur(v):
            return F.conv2d(v.flatten(0, 1)[:, None], g, padding=5).view(v.shape)
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        return value.mean((1, 2, 3))""",
        "box window": """
        def blur(v):
            return F.avg_pool2d(F.pad(v, (5, 5, 5, 5), mode="reflect"), 11, stride=1)
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        return value.mean((1, 2, 3))""",
        "range forgotten": """
        g = torch.exp(-torch.arange(-5, 6, dtype=x.dtype) ** 2 / 4.5)
        g = (torch.outer(g, g) / g.sum() ** 2)[None, None]

        def blur(v):
            return F.conv2d(F.pad(v, (5,) * 4, mode="reflect").flatten(0, 1)[:, None], g).view(v.shape)
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = 0.01 ** 2, 0.03 ** 2
        value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        return value.mean((1, 2, 3))""",
        "sigma squared twice": """
        g = torch.exp(-torch.arange(-5, 6, dtype=x.dtype) ** 2 / (2 * 2.25 ** 2))
        g = (torch.outer(g, g) / g.sum() ** 2)[None, None]

        def blur(v):
            return F.conv2d(F.pad(v, (5,) * 4, mode="reflect").flatten(0, 1)[:, None], g).view(v.shape)
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        return value.mean((1, 2, 3))"""}),
    "uniformity": (["""
        p = density / density.sum()
        gini = np.abs(p[:, None] - p[None, :]).sum() / (2 * len(p) ** 2 * p.mean())
        entropy = float(-sum(v * np.log(v) for v in p) / np.log(len(p)))
        cv = np.std(density) / np.mean(density)
        return {"density cv": cv, "gini": gini, "normalized entropy": entropy}"""], {
        "sample deviation": """
        p = density / density.sum()
        return {"density cv": density.std(ddof=1) / density.mean(),
                "gini": np.abs(p[:, None] - p).sum() / (2 * len(p)),
                "normalized entropy": -(p * np.log(p)).sum() / np.log(len(p))}""",
        "gini without the 2": """
        p = density / density.sum()
        return {"density cv": density.std() / density.mean(),
                "gini": np.abs(p[:, None] - p).sum() / len(p),
                "normalized entropy": -(p * np.log(p)).sum() / np.log(len(p))}""",
        "entropy in nats": """
        p = density / density.sum()
        return {"density cv": density.std() / density.mean(),
                "gini": np.abs(p[:, None] - p).sum() / (2 * len(p)),
                "normalized entropy": -(p * np.log(p)).sum()}""",
        "not sorted": """
        p, N = density / density.sum(), len(density)
        return {"density cv": density.std() / density.mean(),
                "gini": ((2 * np.arange(1, N + 1) - N - 1) * p).sum() / N,
                "normalized entropy": -(p * np.log(p)).sum() / np.log(N)}"""}),
}
# train_step is long: its answers are changes of this one, (old, new), where {} is a right answer already.
STEP = """
    s, net = run.settings, run.tokenizer.vae
    with autocast(x, s.precision == "bf16"):
        x_hat, z, q, z_proj = run.ddp(x, noise)
    x_hat = x_hat.float()
    rec = reconstruction_loss(x, x_hat, run.lpips, s.lpips_weight)
    kl = q.kl().mean()
    total, out = rec + s.kl_weight * kl, {"rec": rec, "kl": kl, "l1": F.l1_loss(x_hat, x)}
    if z_proj is not None:
        f = run.foundation(x, z.shape[2:])
        out["mcos"], out["mdms"] = vf_loss(z_proj, f, s.cos_margin, s.mdms_margin, s.mcos, s.mdms)
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
        real, fake = run.ddp_disc(x), run.ddp_disc(x_hat.detach())
        out["d"] = hinge_discriminator(real, fake)
        out["d"].backward()
        run.opt_disc.step()
    return {name: value.detach() for name, value in out.items()}"""
STEP_WRONG = {
    "KL summed over the batch": ("q.kl().mean()", "q.kl().sum()"),
    "no KL": ("rec + s.kl_weight * kl", "rec"),
    "the other layer": ("net.encoder.conv_out.weight", "net.quant_conv.weight"),
    "no adaptive weight": ("s.vf_weight * adaptive_weight(rec, vf, net.encoder.conv_out.weight)",
                           "torch.tensor(s.vf_weight)"),
    "no w_hyper": ("s.vf_weight * adaptive", "adaptive"),
    "gradients of the last batch": ("    run.opt.zero_grad()\n", ""),
    "the discriminator gathers": ("        run.opt_disc.zero_grad()\n", ""),
    "starts a batch late": ("batch >= s.disc_start", "batch > s.disc_start"),
    "not detached": ("for name, value in out.items()}", "for name, value in out.items()} | {'rec': rec}"),
    "real and fake swapped": ("hinge_discriminator(real, fake)", "hinge_discriminator(fake, real)"),
    "no step of the discriminator": ("        run.opt_disc.step()\n", ""),
    "the weight of g not clamped": ("conv_out.weight, 1e4)", "conv_out.weight)"),
    "no autocast": ("autocast(x, s.precision == \"bf16\")", "autocast(x, False)"),
    "past DistributedDataParallel": ("run.ddp(x, noise)", "run.tokenizer(x, noise)"),
}
ANSWERS["step"] = ([STEP], {name: STEP.replace(*change) for name, change in STEP_WRONG.items()})


@lru_cache(maxsize=400)
def answer(key, body, source=None):
    """The exercise's script with this body in its place."""
    e = EXERCISES[key]
    lines = textwrap.dedent(body.strip("\n")).split("\n")
    return coursework.replace_body(source or (ROOT / e.file).read_text(), e.name, lines)


@dataclass
class Grader:
    """One server for all tests; submissions are written into one folder after another."""
    server: Server
    home: object
    count: int = 0

    def folder(self, files):
        self.count += 1
        folder = self.home / str(self.count)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return folder

    def mark(self, key, source, timeout=60.0):
        return grade_one(self.server, self.folder({EXERCISES[key].file: source}), key, timeout)


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    with Server() as server:
        yield Grader(server, tmp_path_factory.mktemp("submissions"))


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """The handout of all exercises."""
    folder = tmp_path_factory.mktemp("handout")
    coursework.handout(folder, list(EXERCISES), True)
    return folder


@pytest.mark.parametrize("key", EXERCISES)
def test_right_answers_pass_and_wrong_ones_lose_points(grader, key):
    right, wrong = ANSWERS[key]
    for body in right:
        mark = grader.mark(key, answer(key, body))
        assert mark.score == mark.exercise.points, (mark.reason, body)
    for name, body in wrong.items():
        mark = grader.mark(key, answer(key, body))
        assert mark.score < mark.exercise.points, name
        assert mark.note is None and mark.reason, name


def test_every_exercise_has_answers():
    for key, (right, wrong) in ANSWERS.items():
        assert len(right) >= 1 and len(wrong) >= 3 and len(set(wrong.values())) == len(wrong), key
        assert all(ast.parse(f"def f():\n{textwrap.indent(textwrap.dedent(body), '    ')}") for body in
                   [*right, *wrong.values()])
    assert set(ANSWERS) == set(EXERCISES) and len(EXERCISES) >= 30
    assert {e.set for e in EXERCISES.values()} == {1, 2, 3, 4, 5, 6}
    for e in EXERCISES.values():
        assert len(e.checks) >= 2 and any(c.public for c in e.checks) and all(c.name for c in e.checks), e.key
        assert e.text and e.example and set(e.after) <= set(EXERCISES), e.key


def test_an_answer_changes_nothing_in_other_exercises():
    """What is run for an exercise is the same whether the others in its file are the reference's or wrong."""
    for file in SCRIPTS:
        reference = (ROOT / file).read_text()
        keys = [key for key, e in EXERCISES.items() if e.file == file]
        for key in keys:
            source, name = reference, EXERCISES[key].name
            for other in keys:
                if other != key:
                    source = answer(other, next(iter(ANSWERS[other][1].values())), source)
            mixed, plain = (coursework.assemble(reference, text, name, file) for text in (source, reference))
            assert ast.dump(mixed) == ast.dump(plain)


def test_reference_gets_full_marks_and_the_handout_none(grader, blank):
    for key, e in EXERCISES.items():
        mark = grade_one(grader.server, ROOT, key)
        assert mark.score == e.points, (key, mark.reason)
        mark = grade_one(grader.server, blank, key)
        assert mark.score == 0 and "not attempted" in mark.reason, key


@pytest.mark.parametrize("file", SCRIPTS)
def test_each_solved_exercise_gets_exactly_its_points(grader, blank, file):
    """Of the handout with one exercise solved; other files' exercises do not look at this file."""
    keys = [key for key, e in EXERCISES.items() if e.file == file]
    for key in keys:
        folder = grader.folder({file: answer(key, ANSWERS[key][0][0], (blank / file).read_text())})
        scores = {k: grade_one(grader.server, folder, k).score for k in keys}
        assert scores == {k: EXERCISES[k].points if k == key else 0 for k in keys}


def test_handout_holds_no_solutions(blank, tmp_path):
    assert "YOUR CODE HERE" in (blank / "vf_loss.py").read_text()
    text = (blank / "ASSIGNMENT.md").read_text()
    for x in coursework.EXPERIMENTS:
        assert x.title in text and x.questions in text
        assert not any(line.strip() in text for line in x.answers.splitlines() if len(line) > 30)
    for e in EXERCISES.values():
        assert e.text in text
        source, reference = (blank / e.file).read_text(), (ROOT / e.file).read_text()
        (node, i), (old, j) = (coursework.find(ast.parse(s), e.name) for s in (source, reference))
        assert coursework.is_stub(node[i]) and ast.get_docstring(node[i]) == ast.get_docstring(old[j])
        assert e.title in source
    tests = "".join(path.read_text() for path in blank.glob("test_*.py"))
    for e in EXERCISES.values():
        for c in e.checks:
            assert (f"def test_{c.function.__name__}(" in tests) == c.public
    coursework.handout(tmp_path / "two", ["eq2", "rope"], False)
    assert sorted(path.name for path in (tmp_path / "two").glob("test_*")) == ["test_set2.py", "test_set3.py"]
    assert (tmp_path / "two" / "train_vae.py").read_text() == (ROOT / "train_vae.py").read_text()
    assert "eq3" not in (tmp_path / "two" / "ASSIGNMENT.md").read_text()
    assert coursework.keys_of(tmp_path / "two") == ["eq2", "rope"]
    with pytest.raises(SystemExit, match="not empty"):
        coursework.handout(tmp_path / "two", ["eq2"], False)


def test_public_tests_fail_on_the_handout_and_pass_on_the_scripts(blank, tmp_path):
    for path in blank.glob("test_set*.py"):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_set5.py"]
    failed = subprocess.run(command, cwd=blank, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and " passed" not in failed.stdout, failed.stdout
    assert "NotImplementedError" in failed.stdout
    for file in SCRIPTS:
        shutil.copy(ROOT / file, tmp_path)
    passed = subprocess.run(command[:-1], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert passed.returncode == 0, passed.stdout


GOOD = "return F.relu(1 - margin - F.cosine_similarity(z, f, dim=1)).mean()"
HOSTILE = {
    "a loop without end": """
        while True:
            pass""",
    "sys.exit": """
        import sys
        sys.exit(0)""",
    "os._exit": """
        import os
        os._exit(0)""",
    "prints without end": """
        print('{"done": true}' * 10 ** 6)
        print("0" * (1 << 30))
        return 1""",
    "deletes the scripts": """
        import glob, os
        for path in glob.glob("*.py"):
            os.remove(path)
        return z.sum()""",
    "changes the tests": """
        import gc
        for thing in gc.get_objects():
            if type(thing) is dict and "EXERCISES" in thing:
                thing["EXERCISES"].clear()
        return z.sum()""",
    "forges the results": """
        import os
        for fd in range(3, 64):
            try:
                os.write(fd, b'{"check": 0, "message": null}\\n{"done": true}\\n')
            except OSError:
                pass
        os._exit(0)""",
    "changes torch": """
        torch.Tensor.all = lambda *a, **k: torch.ones(1)
        torch.Tensor.__le__ = lambda a, b: torch.ones(a.shape, dtype=torch.bool)
        return z.new_zeros(())""",
    "a child that lives on": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(30)
        os._exit(0)""",
    "takes all memory": """
        x = [bytearray(1 << 30) for _ in range(64)]
        return z.sum()""",
    "calls itself": "return marginal_cosine_loss(z, f, margin)",
    "kills itself": """
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)""",
    "kills the grader": """
        import os, signal
        os.kill(os.getppid(), signal.SIGKILL)
        return z.sum()""",
    "waits for input": "return float(input())",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_costs_its_own_exercise(grader, name):
    """Its points are lost, the others of the file are graded as ever, and the grader goes on."""
    source = answer("eq2", HOSTILE[name])
    mark = grader.mark("eq2", source, timeout=2.0)
    assert mark.score <= 1 and mark.reason, mark
    assert grader.mark("eq3", source).score == EXERCISES["eq3"].points
    assert all((ROOT / file).exists() for file in SCRIPTS)


def test_broken_files(grader, tmp_path):
    """Each costs its file's exercises and says where."""
    source = answer("eq2", GOOD)
    line = source[:source.index(GOOD)].count("\n") + 1
    for text, words in ((source.replace(GOOD, GOOD + ")"), f"vf_loss.py, line {line}"),
                        ("", "has no marginal_cosine_loss"), ("\0", "vf_loss.py"),
                        (source.replace("def marginal_cosine", "def cosine"), "its name must stay"),
                        (source.replace(GOOD, "return (" + "(" * 5000), "vf_loss.py"),
                        ("import sys\nsys.exit(1)\n", "has no marginal_cosine_loss")):
        mark = grader.mark("eq2", text)
        assert mark.score == 0 and words in mark.note, mark.note
    folder = grader.folder({})
    assert "not in the folder" in grade_one(grader.server, folder, "eq2").reason
    (folder / "vf_loss.py").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in grade_one(grader.server, folder, "eq2").reason
    mark = grader.mark("eq2", answer("eq2", "z = z.nonsense()\nreturn z"))
    start = answer("eq2", "z = z.nonsense()\nreturn z").split("\n").index("    z = z.nonsense()") + 1
    assert f"(vf_loss.py, line {start})" in mark.reason
    assert "not installed here" in grader.mark("eq2", answer("eq2", "import einops_of_mine\nreturn z")).reason


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
        assert mark.score == mark.exercise.points, mark.reason
    # a method and a constant of the class; a helper that another exercise uses does not reach it
    source = answer("kl", "return self.WEIGHT * self.values().sum((1, 2, 3))").replace(
        "    def mode(self):", "    WEIGHT = 0.5\n\n    def values(self):\n"
        "        return self.mean ** 2 + self.logvar.exp() - 1 - self.logvar\n\n    def mode(self):")
    assert grader.mark("kl", source).score == EXERCISES["kl"].points
    assert grader.mark("sample", source + "\nraise SystemExit\n").score == EXERCISES["sample"].points


def test_changes_elsewhere_in_the_file_do_not_count(grader):
    source = answer("eq3", "return z.sum()", answer("eq2", GOOD)).replace("def vf_loss(", "def other(")
    assert grader.mark("eq2", source).score == EXERCISES["eq2"].points
    assert grader.mark("eq3", source).score < EXERCISES["eq3"].points


def test_grade_many_folders(tmp_path, capsys, monkeypatch):
    """The command: text, Gradescope's results.json, a CSV; a broken submission between two good ones."""
    folders = []
    texts = {"ada": answer("eq2", GOOD), "bob": "def (:", "cy": answer("eq2", "return z.mean()")}
    for name, text in texts.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "vf_loss.py").write_text(text)
    out = [str(tmp_path / name) for name in ("results.json", "marks.csv")]
    options = ["--exercises", "eq2", "eq3", "--jobs", "1", "--json", out[0], "--csv", out[1]]
    monkeypatch.setattr(sys, "argv", ["coursework.py", "grade", *map(str, folders), *options])
    coursework.main()
    text = capsys.readouterr().out
    points = EXERCISES["eq2"].points + EXERCISES["eq3"].points
    assert f"total {points} / {points}" in text and "vf_loss.py, line 1" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[str(folders[0])]["score"] == points and results[str(folders[1])]["score"] == 0
    test = results[str(folders[2])]["tests"][0]
    assert set(test) == {"name", "score", "max_score", "output", "visibility"}
    assert test["score"] < test["max_score"]
    assert "worked example" in test["output"]
    rows = list(csv.DictReader((tmp_path / "marks.csv").open()))
    assert [row["eq3"] for row in rows] == [str(EXERCISES["eq3"].points), "0", str(EXERCISES["eq3"].points)]
    assert rows[0]["rope"] == "" and rows[0]["total"] == rows[0]["possible"] == str(points)


def test_a_missing_package_is_never_a_pass(tmp_path, monkeypatch):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "scipy.py").write_text("raise ModuleNotFoundError('no scipy', name='scipy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    with pytest.raises(SystemExit, match="scipy, and nothing was graded"):
        grade([ROOT], ["psnr"])


def test_list_needs_no_torch():
    code = """if True:
        import sys
        sys.modules["torch"], sys.argv = None, ["coursework.py", "list"]
        import coursework
        coursework.main()"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    assert "marginal_cosine_loss" in done.stdout
