"""dit.py against independent formulas: complex rotation for RoPE, loops for positions, and the whole network
written again as plain functions."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import user_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dit
from dit import SIZES, LightningDiT
from vae import load_weights

TINY = {"input_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomise(module, std=0.3):
    """Random values for every trainable weight. Fresh gates are 0 (adaLN-Zero), which hides what is behind
    them."""
    generator = torch.Generator().manual_seed(7)
    for p in module.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return module


def batch(side=4, channels=3, n=3, classes=5):
    g = torch.Generator().manual_seed(3)
    x, t = torch.randn(n, channels, side, side, generator=g), torch.rand(n, generator=g)
    return x, t, torch.tensor([0, classes, 2])[:n]


# --- parts ---

def test_rmsnorm():
    norm = randomise(dit.RMSNorm(12))
    x = torch.randn(2, 5, 12) * 3
    want = torch.empty_like(x, dtype=torch.float64)
    for i, j in itertools.product(range(2), range(5)):
        row = x[i, j].double()
        want[i, j] = row / math.sqrt((row ** 2).sum().item() / 12 + 1e-6) * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), want.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-6))
    tiny = dit.RMSNorm(12)(torch.full((1, 12), 1e-3))  # here eps is as large as the mean square
    torch.testing.assert_close(tiny, torch.full((1, 12), 0.5 ** 0.5))


def test_rmsnorm_is_computed_in_fp32():
    """The sum of squares of 300 overflows float16, and bfloat16 has 8 bits."""
    x = torch.full((1, 64), 300.0)
    torch.testing.assert_close(dit.RMSNorm(64)(x.half()).float(), torch.ones(1, 64))
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16()
    exact = (x.double() / (x.double() ** 2).mean(-1, keepdim=True).sqrt()).bfloat16().float()
    assert torch.equal(dit.RMSNorm(64)(x).float(), exact)  # rounded once, at the end


def test_swiglu():
    torch.manual_seed(0)
    mlp, x = randomise(dit.SwiGLU(6, 10)).double(), torch.randn(2, 4, 6, dtype=torch.float64)
    w1, w2, b1, b2 = mlp.w12.weight[:10], mlp.w12.weight[10:], mlp.w12.bias[:10], mlp.w12.bias[10:]
    gate = x @ w1.T + b1
    want = (gate / (1 + (-gate).exp()) * (x @ w2.T + b2)) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), want)


def test_the_width_of_swiglu_keeps_the_parameters_of_the_mlp():
    block = LightningDiT(**{**TINY, "hidden_size": 96}).blocks[0]
    assert block.mlp.w3.in_features == int(2 / 3 * 4 * 96) == 256
    assert dit.SwiGLU(1152, int(2 / 3 * 4 * 1152)).w12.weight.shape == (6144, 1152)  # the released XL


def test_rope_is_a_rotation_of_complex_numbers():
    torch.manual_seed(0)
    head_dim, side = 16, 3
    rope = dit.RotaryEmbedding(head_dim, side).double()
    x = torch.randn(2, 4, side * side, head_dim, dtype=torch.float64)
    # (2, 4, N, 8): neighbours make a pair
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()).numpy()
    want = np.empty_like(z)
    for n in range(side * side):
        row, column = divmod(n, side)
        for pair in range(8):
            position = row if pair < 4 else column  # first half of the head: rows
            want[:, :, n, pair] = z[:, :, n, pair] * np.exp(1j * position * 10000 ** (-(pair % 4) / 4))
    want = torch.view_as_real(torch.from_numpy(want)).flatten(-2)
    torch.testing.assert_close(rope(x), want, atol=1e-6, rtol=1e-6)  # the buffers are float32


def test_rope_attention_depends_on_distance_only():
    torch.manual_seed(0)
    rope, q, k = dit.RotaryEmbedding(16, 4), torch.randn(16), torch.randn(16)
    q, k = (rope(v.expand(1, 1, 16, 16))[0, 0].view(4, 4, 16) for v in (q, k))
    same = [(q[i, j] @ k[i + 1, j + 2]).item() for i in range(3) for j in range(2)]
    assert max(same) - min(same) < 1e-5
    assert abs((q[0, 0] @ k[1, 2]) - (q[0, 0] @ k[2, 1])) > 1e-3  # rows and columns are told apart


def test_position_embedding():
    dim, side = 16, 3
    got = dit.sincos_pos_embed(dim, side)
    want = torch.zeros(1, side * side, dim, dtype=torch.float64)
    for n in range(side * side):
        row, column = divmod(n, side)
        for i in range(dim // 4):
            omega = 1 / 10000 ** (i / (dim / 4))
            for offset, position in ((0, column), (dim // 2, row)):  # MAE's and DiT's order: the column first
                want[0, n, offset + i] = math.sin(position * omega)
                want[0, n, offset + dim // 4 + i] = math.cos(position * omega)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)
    model = LightningDiT(**TINY)
    torch.testing.assert_close(model.pos_embed, dit.sincos_pos_embed(32, 4))
    assert not model.pos_embed.requires_grad


def test_timestep_embedding_has_cosines_first_and_t_as_it_is():
    embed, seen = dit.TimestepEmbedder(8), []
    embed.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t = torch.tensor([0.0, 0.3, 1.0])
    embed(t)
    got, = seen  # (3, 256): what goes into the MLP
    for i in range(128):
        angle = t.double() * 10000 ** (-i / 128)
        torch.testing.assert_close(got[:, i].double(), angle.cos(), atol=1e-6, rtol=0)
        torch.testing.assert_close(got[:, 128 + i].double(), angle.sin(), atol=1e-6, rtol=0)


def test_unpatchify_is_the_inverse_of_cutting_patches():
    model, x = LightningDiT(**{**TINY, "patch_size": 2, "input_size": 8}), torch.randn(2, 3, 8, 8)
    tokens = torch.empty(2, 16, 12)
    for n in range(16):
        i, j = divmod(n, 4)
        for a, b in itertools.product(range(2), range(2)):
            # within a patch: rows, columns, channels
            tokens[:, n, (a * 2 + b) * 3:(a * 2 + b) * 3 + 3] = x[:, :, 2 * i + a, 2 * j + b]
    assert torch.equal(model.unpatchify(tokens), x)


# --- the whole network, written again ---

def reference(sd, x, t, y, *, patch_size=1, num_heads, depth, use_qknorm, use_swiglu, use_rope, use_rmsnorm):
    """LightningDiT's forward pass in float64, from a state_dict alone, with loops."""
    sd = {k: v.double() for k, v in sd.items()}
    silu = F.silu

    def linear(name, v):
        return v @ sd[name + ".weight"].T + sd[name + ".bias"]

    def normed(name, v):
        if use_rmsnorm:
            return v / ((v ** 2).mean(-1, keepdim=True) + 1e-6) ** 0.5 * sd[name + ".weight"]
        # DiT's q_norm and k_norm have weights and torch's default eps.
        v, eps = v - v.mean(-1, keepdim=True), 1e-5 if name + ".weight" in sd else 1e-6
        v = v / ((v ** 2).mean(-1, keepdim=True) + eps) ** 0.5
        return v * sd[name + ".weight"] + sd[name + ".bias"] if name + ".weight" in sd else v

    B, C, S, _ = x.shape
    side, width = S // patch_size, sd["pos_embed"].shape[-1]
    tokens = []
    for i, j in itertools.product(range(side), range(side)):
        cut = x.double()[:, :, i * patch_size:(i + 1) * patch_size, j * patch_size:(j + 1) * patch_size]
        cut = torch.einsum("bcij,ocij->bo", cut, sd["x_embedder.proj.weight"])
        tokens.append(cut + sd["x_embedder.proj.bias"])
    h = torch.stack(tokens, 1) + sd["pos_embed"]
    angle = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = c + sd["y_embedder.embedding_table.weight"][y]

    d = width // num_heads
    rotation = torch.ones(side * side, d // 2, dtype=torch.complex128)
    if use_rope:
        for n, p in itertools.product(range(side * side), range(d // 2)):
            position = n // side if p < d // 4 else n % side
            angle = torch.tensor(position * 10000.0 ** (-(p % (d // 4)) / (d / 4)), dtype=torch.float64)
            rotation[n, p] = torch.polar(torch.ones_like(angle), angle)

    for i in range(depth):
        block = f"blocks.{i}"
        m = linear(f"{block}.adaLN_modulation.1", silu(c))[:, None]  # (B, 1, 6 width)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.tensor_split(6, -1)
        v = linear(f"{block}.attn.qkv", normed(f"{block}.norm1", h) * (1 + scale1) + shift1)
        heads = []
        for k in range(num_heads):
            q, key, value = (v[..., j * width + k * d:j * width + (k + 1) * d] for j in range(3))
            if use_qknorm:
                q, key = normed(f"{block}.attn.q_norm", q), normed(f"{block}.attn.k_norm", key)
            q, key = (torch.view_as_real(torch.complex(u[..., 0::2], u[..., 1::2]) * rotation).flatten(-2)
                      for u in (q, key))
            heads.append((q @ key.transpose(1, 2) / d ** 0.5).softmax(-1) @ value)
        h = h + gate1 * linear(f"{block}.attn.proj", torch.cat(heads, -1))
        v = normed(f"{block}.norm2", h) * (1 + scale2) + shift2
        if use_swiglu:
            a, b = linear(f"{block}.mlp.w12", v).tensor_split(2, -1)
            v = linear(f"{block}.mlp.w3", silu(a) * b)
        else:
            a = linear(f"{block}.mlp.fc1", v)
            v = linear(f"{block}.mlp.fc2",
                       0.5 * a * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a ** 3))))
        h = h + gate2 * v
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].tensor_split(2, -1)
    out = linear("final_layer.linear", normed("final_layer.norm_final", h) * (1 + scale) + shift)
    image = torch.empty(B, C, S, S, dtype=torch.float64)
    for n in range(side * side):
        i, j = n // side * patch_size, n % side * patch_size
        patch = out[:, n].view(B, patch_size, patch_size, C).permute(0, 3, 1, 2)
        image[:, :, i:i + patch_size, j:j + patch_size] = patch
    return image


SWITCHES = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm")


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("on", list(itertools.product((False, True), repeat=4)),
                         ids=lambda on: "".join(str(int(v)) for v in on))
def test_the_network_equals_plain_functions(on, patch_size):
    switches = dict(zip(SWITCHES, on))
    model = randomise(LightningDiT(**{**TINY, "patch_size": patch_size}, **switches), 0.15).eval()
    x, t, y = batch()
    with torch.no_grad():
        got = model(x, t, y)
        want = reference(model.state_dict(), x, t, y, patch_size=patch_size, num_heads=2, depth=2, **switches)
    assert want.std() > 0.1
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_and_mlp_of_plain_dit_are_those_of_timm(qk_norm):
    """The DiT of Peebles and Xie is built of these two."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    ours = randomise(LightningDiT(**TINY, use_rope=False, use_rmsnorm=False, use_swiglu=False,
                                  use_qknorm=qk_norm)).blocks[0]
    attn = vit.Attention(32, num_heads=2, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    mlp = vit.Mlp(32, 128, act_layer=lambda: nn.GELU(approximate="tanh"))
    attn.load_state_dict(ours.attn.state_dict())
    mlp.load_state_dict(ours.mlp.state_dict())
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.attn(x, None), attn(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.mlp(x), mlp(x), atol=1e-5, rtol=1e-5)


def test_bf16_autocast_runs_and_is_near():
    model = randomise(LightningDiT(**TINY, use_qknorm=True), 0.1).eval()
    x, t, y = batch()
    with torch.no_grad():
        exact = model(x, t, y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = model(x, t, y)
    assert (near - exact).norm() < 0.03 * exact.norm()


# --- labels ---

def test_the_null_class_is_the_last_row():
    model = randomise(LightningDiT(**TINY)).eval()
    x, t, _ = batch()
    y, null = torch.tensor([0, 1, 4]), torch.full((3,), 5)
    assert model.num_classes == 5 and model.y_embedder.embedding_table.num_embeddings == 6
    mixed = model(x, t, y, drop=torch.tensor([True, False, True]))
    assert torch.equal(mixed[[0, 2]], model(x, t, null)[[0, 2]]) and torch.equal(mixed[1], model(x, t, y)[1])
    assert not torch.equal(mixed[0], model(x, t, y)[0])
    assert LightningDiT(**TINY, class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 5


def test_labels_are_dropped_in_training_only_and_at_the_stated_rate():
    torch.manual_seed(0)
    embed = dit.LabelEmbedder(7, 1, 0.3)
    embed.embedding_table.weight.data = torch.arange(8.0)[:, None]
    y = torch.randint(7, (20_000,))
    got = embed.train()(y, None)[:, 0]
    dropped = got == 7
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(got[~dropped], y[~dropped].float())
    assert torch.equal(embed.eval()(y, None)[:, 0], y.float())
    # a mask that is given decides
    assert torch.equal(embed.train()(y, torch.zeros(20_000, dtype=torch.bool))[:, 0], y.float())


# --- initialisation ---

def test_a_fresh_network_says_zero_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    model = LightningDiT(**TINY)
    x, t, y = batch()
    assert model(x, t, y).abs().max() == 0
    h, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](h, c, model.feat_rope), h)


def test_initialisation():
    torch.manual_seed(0)
    m = LightningDiT(**{**TINY, "hidden_size": 256, "num_heads": 4, "in_channels": 16, "patch_size": 2,
                        "num_classes": 500})
    bounded = {m.blocks[1].attn.qkv.weight: (256, 768), m.blocks[0].attn.proj.weight: (256, 256),
               m.blocks[0].mlp.w12.weight: (256, 2 * 682),
               # the convolution: as the linear layer that it is
               m.blocks[0].mlp.w3.weight: (682, 256), m.x_embedder.proj.weight: (64, 256)}
    for weight, (fan_in, fan_out) in bounded.items():
        a = math.sqrt(6 / (fan_in + fan_out))
        assert 0.95 * a < weight.abs().max() <= a
        assert weight.std().item() == pytest.approx(a / 3 ** 0.5, rel=0.05)
    for weight in (m.y_embedder.embedding_table.weight, m.t_embedder.mlp[0].weight,
                   m.t_embedder.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05) and weight.abs().max() > 0.06
    zero = [p for name, p in m.named_parameters() if "adaLN" in name or "final_layer.linear" in name
            or name.endswith(".bias")]
    assert all(p.abs().max() == 0 for p in zero) and len(zero) > 10
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in m.named_parameters() if "norm" in name
               and name.endswith("weight"))


# --- training, cost, errors ---

def test_checkpointing_changes_no_gradient():
    x, t, y = batch()
    grads = []
    for checkpointing in (False, True):
        model = randomise(LightningDiT(**TINY)).train()
        model.checkpointing = checkpointing
        calls = []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(x, t, y, drop=torch.tensor([True, False, False])).square().mean().backward()
        assert len(calls) == 1 + checkpointing  # the second run is the recomputation
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_every_trainable_weight_has_a_gradient():
    model = randomise(LightningDiT(**TINY, use_qknorm=True)).train()
    x, t, y = batch()
    model(x, t, y).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_the_residual_stream_is_contiguous():
    """The transposed layout of the first convolution would cost a copy before every matrix product."""
    model, layouts = LightningDiT(**TINY), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x: layouts.extend((args[0].is_contiguous(),
                                                                          x.is_contiguous())))
    model(*batch())
    assert layouts == [True] * 4


def test_the_gradient_of_qkv_is_contiguous():
    """It is that of (B, N, 3, heads, D / heads), which has to be copied unless it has this layout."""
    model, ends, layouts = randomise(LightningDiT(**TINY)).train(), [], []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda qkv, args, output: ends.append(output.grad_fn))
    loss = model(*batch()).square().mean()
    seen, found = set(), [loss.grad_fn]
    for node in found:  # the whole graph; the view of qkv's output is the node before that output's
        before = {parent for parent, _ in node.next_functions} - {None}
        if before & set(ends):
            node.register_prehook(lambda gradients: layouts.append(gradients[0].is_contiguous()))
        found += before - seen
        seen |= before
    loss.backward()
    assert layouts == [True] * 2


@pytest.mark.parametrize("name, millions", [("B", None), ("L", None), ("XL", 675.26), ("1.0B", None),
                                            ("1.6B", None)])
def test_sizes(name, millions):
    """Depth, width, heads of the paper's sizes, and the parameters counted layer by layer."""
    depth, width, heads = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),
                           "1.0B": (24, 1536, 24), "1.6B": (28, 1792, 28)}[name]
    assert SIZES[name] == {"depth": depth, "hidden_size": width, "num_heads": heads}
    with torch.device("meta"):
        total = sum(p.numel() for p in LightningDiT(**SIZES[name]).parameters())
    hidden, linear = int(2 / 3 * 4 * width), lambda a, b: a * b + b
    block = (2 * width + linear(width, 3 * width) + linear(width, width) + linear(width, 2 * hidden)
             + linear(hidden, width) + linear(width, 6 * width))
    ends = (256 * width + linear(32, width) + linear(256, width) + linear(width, width) + 1001 * width + width
            + linear(width, 32) + linear(width, 2 * width))
    assert total == depth * block + ends
    assert millions is None or round(total / 1e6, 2) == millions
    if name in ("1.0B", "1.6B"):
        assert round(total / 1e9, 1) == float(name[:-1])


def test_the_default_is_xl_1_and_costs_237_gflop():
    with torch.device("meta"):
        model, x = LightningDiT(), torch.zeros(1, 32, 16, 16)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert (len(model.blocks), model.blocks[0].attn.num_heads, model.pos_embed.shape[-1],
            model.num_classes) == (28, 16, 1152, 1000)
    assert counter.get_total_flops() / 1e9 == pytest.approx(237, rel=0.005)


def test_names_of_xl_1_without_the_list():
    with torch.device("meta"):
        got = {k: tuple(v.shape) for k, v in LightningDiT().state_dict().items()}
    for name, shape in {
        "pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 32, 1, 1),
        "t_embedder.mlp.0.weight": (1152, 256), "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152), "feat_rope.freqs_cos": (256, 72),
        "feat_rope.freqs_sin": (256, 72),
        "blocks.27.norm2.weight": (1152,), "blocks.0.attn.qkv.weight": (3456, 1152),
        "blocks.0.attn.proj.bias": (1152,),
        "blocks.0.mlp.w12.weight": (6144, 1152), "blocks.0.mlp.w3.weight": (1152, 3072),
        "blocks.0.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.norm_final.weight": (1152,), "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
    }.items():
        assert got[name] == shape, name
    assert len(got) == 351


@pytest.mark.parametrize("wrong, message", [
    ({"input_size": 15, "patch_size": 2}, "input_size 15 must be a multiple of patch_size 2"),
    ({"hidden_size": 100, "num_heads": 3}, "hidden_size 100 of 4 x num_heads 3"),
    ({"hidden_size": 36, "num_heads": 6}, "hidden_size 36 of 4 x num_heads 6")])
def test_sizes_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        LightningDiT(**{**TINY, **wrong})


def test_a_training_step_of_b_1_at_full_latent_size():
    torch.manual_seed(0)
    model = LightningDiT(**SIZES["B"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    x, t, y = torch.randn(2, 32, 16, 16), torch.rand(2), torch.tensor([1, 999])
    deep, last = (p.detach().clone() for p in (model.blocks[0].attn.qkv.weight,
                                               model.final_layer.linear.weight))
    loss = (model(x, t, y) - x).square().mean()
    loss.backward()
    optimizer.step()
    assert loss.item() == pytest.approx(x.square().mean().item())  # a fresh network says 0
    grad = model.final_layer.linear.weight.grad
    want = last - 2e-4 * grad / (grad.abs() + 1e-8)  # Adam's first step, by hand
    torch.testing.assert_close(model.final_layer.linear.weight.detach(), want, atol=1e-7, rtol=1e-4)
    assert torch.equal(model.blocks[0].attn.qkv.weight, deep)  # behind a zero: no gradient yet


# --- released weights ---

def test_released_weights_are_found_in_every_layout(tmp_path):
    weights, other = (randomise(LightningDiT(**TINY), std).state_dict() for std in (0.3, 0.4))
    compiled = {f"_orig_mod.{k}": v for k, v in weights.items()}
    layouts = [{"model": other, "ema": weights, "opt": {}, "args": None}, {"model": weights}, weights,
               {"ema": {f"module.{k}": v for k, v in weights.items()}}, {"model": compiled},
               {"ema": {f"module.{k}": v for k, v in compiled.items()}}]
    for state in layouts:
        torch.save(state, tmp_path / "file.pt")
        got = dit.read_released_dit(tmp_path / "file.pt")
        assert got.keys() == weights.keys() and all(torch.equal(got[k], v) for k, v in weights.items())
    torch.save({"step": 3}, tmp_path / "no.pt")
    wrong = dit.read_released_dit(tmp_path / "no.pt")
    assert "no.pt does not fit" in user_error(load_weights, LightningDiT(**TINY), wrong, tmp_path / "no.pt")
    assert "none.pt" in user_error(dit.read_released_dit, tmp_path / "none.pt")
