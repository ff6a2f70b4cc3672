"""Checks of set 3, LightningDiT. No student's process sees the slow_ functions."""

from checks import (
    F,
    check,
    close,
    dit,
    fill,
    gradient,
    math,
    near,
    nn,
    ok,
    randn,
    student,
    torch,
    types,
    values,
)


# --- adaln ----------------------------------------------------------------------------------------------
@check("adaln", "modulate", public=True)
def adaln_modulate():
    got = student(
        lambda: dit.modulate(torch.full((1, 1, 1), 3.0), torch.full((1, 1), 2.0), torch.full((1, 1), 0.5))
    )
    close(got, [[[6.5]]], "x = 3, scale 0.5, shift 2: scale 0 must leave x as it is")


@check("adaln", "SwiGLU", public=True)
def adaln_swiglu():
    def work():
        layer = dit.SwiGLU(1, 1)
        with torch.no_grad():
            layer.w12.weight.copy_(torch.tensor([[2.0], [3.0]]))
            layer.w12.bias.zero_()
            layer.w3.weight.fill_(1.0)
            layer.w3.bias.zero_()
            return layer(torch.ones(1, 1, 1))
    close(student(work), [[[5.284782]]], "w1 x = 2, w2 x = 3, w3 the identity")


def slow_modulate(x, shift, scale):
    rows = [[x[b, n] * (1 + scale[b]) + shift[b] for n in range(x.shape[1])] for b in range(len(x))]
    return torch.stack([torch.stack(row) for row in rows])


@check("adaln", "any tokens")
def adaln_values():
    values(
        lambda *a: dit.modulate(*a),
        slow_modulate,
        (randn(3, 3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2)),
        "an image's scale and shift act on all of its tokens",
    )


def slow_swiglu(layer):
    def forward(x):
        w, b = layer.w12.weight.double(), layer.w12.bias.double()
        n = len(w) // 2
        u, v = x @ w[:n].T + b[:n], x @ w[n:].T + b[n:]
        return (u / (1 + (-u).exp()) * v) @ layer.w3.weight.double().T + layer.w3.bias.double()
    return forward


@check("adaln", "any weights")
def adaln_weights():
    layer = fill(dit.SwiGLU(6, 5))
    values(
        layer,
        slow_swiglu(layer),
        (randn(2, 3, 6, seed=7),),
        "SiLU on the first half of w12 x, times the second",
    )


# --- rmsnorm --------------------------------------------------------------------------------------------
@check("rmsnorm", "worked example", public=True)
def rmsnorm_example():
    def work():
        norm = dit.RMSNorm(2)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, 2.0]))
            return norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    close(student(work), [[0.848528, 2.262742], [0.0, 0.0]], "rows (3, 4) and (0, 0), weight (1, 2)")


def slow_rmsnorm(norm):
    def forward(x):
        rows = [r / ((r * r).sum() / r.numel() + norm.eps).sqrt() for r in x.flatten(0, -2)]
        return torch.stack(rows).view(x.shape) * norm.weight.double()
    return forward


@check("rmsnorm", "any x and eps")
def rmsnorm_values():
    norm, wide = fill(dit.RMSNorm(6)), fill(dit.RMSNorm(6, eps=0.3), seed=3)
    values(lambda x: [norm(x), wide(x), norm(1e-3 * x)],
           lambda x: [slow_rmsnorm(norm)(x), slow_rmsnorm(wide)(x), slow_rmsnorm(norm)(1e-3 * x)],
           (randn(2, 3, 4, 6, seed=3) + 0.5,), "each row over the root of its own mean square, times weight")


@check("rmsnorm", "float16")
def rmsnorm_half():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    got = student(lambda: dit.RMSNorm(4)(x))
    close(got, torch.ones(1, 4), "300^2 overflows in float16: compute in float32", 2e-3, "any")


@check("rmsnorm", "gradient")
def rmsnorm_gradient():
    norm = fill(dit.RMSNorm(6))
    gradient(norm, slow_rmsnorm(norm), (randn(2, 3, 6),), "x")


# --- angles, rope ---------------------------------------------------------------------------------------
@check("angles", "worked example", public=True)
def angles_example():
    def work():
        rope = dit.RotaryEmbedding(4, 2)
        buffers = dict(rope.named_buffers())
        return buffers.get("freqs_cos"), buffers.get("freqs_sin")
    cos, sin = student(work)
    ok(cos is not None and sin is not None, "freqs_cos and freqs_sin are registered as buffers")
    ok(tuple(cos.shape) == tuple(sin.shape) == (4, 4), f"(N, head_dim) is (4, 4): got {tuple(cos.shape)}")
    close(cos[2], [0.540302, 0.540302, 1.0, 1.0], "token 2: row 1, column 0, cosines")
    close(sin[1], [0.0, 0.0, 0.841471, 0.841471], "token 1: row 0, column 1, sines")


def slow_angles(head_dim, side):
    quarter, rows = head_dim // 4, []
    for n in range(side * side):
        places = [n // side if c < head_dim // 2 else n % side for c in range(head_dim)]
        rows.append([p * 10000.0 ** (-((c // 2) % quarter) / quarter) for c, p in enumerate(places)])
    return torch.tensor(rows, dtype=torch.float64)


@check("angles", "any size")
def angles_values():
    sizes = ((8, 3), (16, 4), (12, 5))

    def work():
        ropes = [dit.RotaryEmbedding(*size) for size in sizes]
        return [(rope.freqs_cos, rope.freqs_sin) for rope in ropes]
    for size, (cos, sin) in zip(sizes, student(work)):
        angle = slow_angles(*size)
        close(cos, angle.cos(), f"cosines, head_dim and side {size}")
        close(sin, angle.sin(), f"sines, head_dim and side {size}")


def rope_with(cos, sin):
    """A RotaryEmbedding with these buffers, whatever its __init__ does."""
    rope = dit.RotaryEmbedding.__new__(dit.RotaryEmbedding)
    nn.Module.__init__(rope)
    rope.register_buffer("freqs_cos", cos)
    rope.register_buffer("freqs_sin", sin)
    return rope


@check("rope", "worked example", public=True)
def rope_example():
    x = torch.zeros(1, 2, 2, 4)
    x[0, 0, 1], x[0, 1, 1] = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    cos = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.540302, 0.540302, 1.0, 1.0]])
    sin = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.841471, 0.841471, 0.0, 0.0]])
    got = student(lambda: rope_with(cos, sin)(x))
    close(got[0, :, 0], torch.zeros(2, 4), "the first token has the angles 0")
    close(got[0, :, 1], [[0.540302, 0.841471, 1.0, 0.0], [-0.841471, 0.540302, 0.0, 1.0]],
          "the second token turns its first pair of channels by the angle 1")


def some_angles():
    return randn(9, 4, seed=5).repeat_interleave(2, dim=1)


def slow_rope(x):
    angle = some_angles()[:, ::2].double()
    turned = torch.complex(x[..., ::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    return torch.stack([turned.real, turned.imag], -1).flatten(-2)


@check("rope", "any q")
def rope_values():
    values(lambda x: rope_with(some_angles().cos(), some_angles().sin())(x), slow_rope, (randn(2, 3, 9, 8),),
           "adjacent channels turn by their token's angle")


@check("rope", "gradient")
def rope_gradient():
    gradient(
        lambda x: rope_with(some_angles().cos(), some_angles().sin())(x), slow_rope, (randn(2, 3, 9, 8),), "x"
    )


# --- time, labels ---------------------------------------------------------------------------------------
def waves_of(embedder, t):
    """What the embedder feeds to its MLP, and what comes out."""
    seen = []
    handle = embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    out = embedder(t)
    handle.remove()
    ok(len(seen) == 1, "self.mlp is called once")
    return seen[0], out


@check("time", "worked example", public=True)
def time_example():
    waves, out = student(lambda: waves_of(dit.TimestepEmbedder(8), torch.tensor([0.0, 1.0])))
    ok(tuple(waves.shape) == (2, 256), f"256 waves for each time: got {tuple(waves.shape)}")
    close(waves[0], [1.0] * 128 + [0.0] * 128, "t = 0: cosines first, then sines")
    close(waves[1, [0, 1, 128, 129]], [0.540302, 0.597382, 0.841471, 0.801957],
          "t = 1: cosine and sine of the first two frequencies, 1 and 0.9306")
    ok(tuple(out.shape) == (2, 8), "(B, D)")


def slow_waves(t):
    omega = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    return torch.cat([(t[:, None] * omega).cos(), (t[:, None] * omega).sin()], 1)


@check("time", "any time")
def time_values():
    t = torch.tensor([0.013, 0.5, 0.97, 37.0, 999.0])
    waves, out = student(lambda: waves_of(fill(dit.TimestepEmbedder(8)), t))
    want, mlp = slow_waves(t.double()), fill(dit.TimestepEmbedder(8)).mlp
    close(waves, want, "t as it comes, times 10000^(-i / 128)", 1e-3)
    close(out, mlp.double()(want), "the waves go through self.mlp", 5e-3)


@check("time", "a bfloat16 model")
def time_dtype():
    waves, out = student(lambda: waves_of(dit.TimestepEmbedder(8).to(torch.bfloat16), torch.tensor([999.0])))
    want = slow_waves(torch.tensor([999.0], dtype=torch.float64))
    close(waves, want, "angles are computed in float32, and only the waves become bfloat16", 0.02, "bfloat16")
    ok(str(out.dtype) == "torch.bfloat16", "the MLP answers in its own dtype")


def numbered_labels(classes, width, dropout):
    """Row i of the table is i, i, ..."""
    embedder = dit.LabelEmbedder(classes, width, dropout)
    with torch.no_grad():
        rows = embedder.embedding_table.weight
        rows.copy_(torch.arange(float(len(rows)))[:, None].expand(rows.shape))
    return embedder


@check("labels", "worked example", public=True)
def labels_example():
    def work():
        embedder, y, drop = numbered_labels(10, 2, 0.1), torch.tensor([3, 7]), torch.tensor([False, True])
        return [net(y, drop) for net in (embedder.train(), embedder.eval())]
    for rows in student(work):
        close(rows, [[3.0, 3.0], [10.0, 10.0]], "what drop marks becomes the null class, in training or not")


@check("labels", "drop decides")
def labels_given():
    def work():
        embedder, y, drop = numbered_labels(10, 1, 0.9).train(), torch.arange(10), torch.arange(10) % 3 == 0
        given = y.clone(), drop.clone()
        rows = [embedder(y, drop) for _ in range(3)] + [embedder(y, torch.zeros(10, dtype=torch.bool))]
        rows[0].sum().backward()
        return (
            rows,
            torch.equal(given[0], y) and torch.equal(given[1], drop),
            embedder.embedding_table.weight.grad,
        )

    rows, unchanged, grad = student(work)
    want = [[10.0] if c % 3 == 0 else [float(c)] for c in range(10)]
    for got in rows[:3]:
        close(got, want, "if drop is given, it alone decides, in training, too")
    close(rows[3], [[float(c)] for c in range(10)], "if drop marks none, none is dropped")
    ok(unchanged, "y and drop themselves must not be changed")
    ok(grad is not None, "gradients must reach the table")


@check("labels", "drop not given")
def labels_draw():
    def work():
        embedder, y = numbered_labels(10, 1, 0.3), torch.arange(10).repeat(2000)
        return (
            embedder.train()(y, None).flatten(),
            embedder(y, None).flatten(),
            embedder.eval()(y, None).flatten(),
            numbered_labels(10, 1, 0.0).train()(y, None).flatten(),
        )
    one, two, evaluated, never = student(work)
    y = torch.arange(10.0).repeat(2000)
    dropped = (one == 10).float()
    near(dropped.mean(), 0.3, 0.02, "in training a share dropout_prob becomes the null class")
    near(dropped.view(2000, 10).mean(0), [0.3] * 10, 0.06, "each label by itself")
    ok(bool(((one == 10) | (one == y)).all()), "labels that are kept stay what they are")
    ok(not torch.equal(one, two), "each call draws anew")
    close(evaluated, y, "not in training nothing is dropped")
    close(never, y, "dropout_prob 0: nothing is dropped")


# --- sincos, unpatchify ---------------------------------------------------------------------------------
@check("sincos", "worked example", public=True)
def sincos_example():
    got = student(lambda: dit.sincos_pos_embed(4, 2))
    ok(tuple(got.shape) == (1, 4, 4), f"(1, N, dim) is (1, 4, 4): got {tuple(got.shape)}")
    close(got[0, 1], [0.841471, 0.540302, 0.0, 1.0], "token 1: row 0, column 1")
    close(got[0, 2], [0.0, 1.0, 0.841471, 0.540302], "token 2: row 1, column 0")


def slow_sincos(dim, side):
    q, rows = dim // 4, []
    for n in range(side * side):
        row, column = divmod(n, side)
        rows.append(
            [
                wave(place * 10000.0 ** (-i / q))
                for wave, place in ((math.sin, column), (math.cos, column), (math.sin, row), (math.cos, row))
                for i in range(q)
            ]
        )
    return torch.tensor([rows], dtype=torch.float64)


@check("sincos", "any size")
def sincos_values():
    sizes = ((8, 3), (16, 4), (4, 1))
    for size, got in zip(sizes, student(lambda: [dit.sincos_pos_embed(*s) for s in sizes])):
        close(got, slow_sincos(*size), f"dim and side {size}: sines, cosines of the column, then of the row")


def unpatchify(p, channels, x):
    return dit.LightningDiT.unpatchify(types.SimpleNamespace(patch_size=p, in_channels=channels), x)


@check("unpatchify", "worked example", public=True)
def unpatchify_example():
    patch = torch.tensor([[[1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0]]])
    one, four = student(
        lambda: (unpatchify(2, 2, patch), unpatchify(1, 1, torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])))
    )
    close(
        one,
        [[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]],
        "one token of 2x2 pixels, two channels",
    )
    close(four, [[[[1.0, 2.0], [3.0, 4.0]]]], "four tokens of one pixel, row by row")


UNPATCHIFY = ((2, 3, 3), (1, 5, 4), (3, 2, 2))


def slow_unpatchify(p, channels, x):
    side = math.isqrt(x.shape[1])
    want = torch.zeros(len(x), channels, side * p, side * p, dtype=torch.float64)
    for n in range(side * side):
        for i in range(p):
            for j in range(p):
                place = (i * p + j) * channels
                want[:, :, n // side * p + i, n % side * p + j] = x[:, n, place:place + channels]
    return want


@check("unpatchify", "any sizes")
def unpatchify_values():
    values(
        lambda *xs: [unpatchify(p, c, x) for (p, c, _), x in zip(UNPATCHIFY, xs)],
        lambda *xs: [slow_unpatchify(p, c, x) for (p, c, _), x in zip(UNPATCHIFY, xs)],
        [randn(2, s * s, p * p * c) for p, c, s in UNPATCHIFY],
        "tokens row by row, within a token the channel fastest",
    )


# --- attention ------------------------------------------------------------------------------------------
@check("attention", "worked example", public=True)
def attention_example():
    x = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]])

    def work():
        attn = dit.Attention(4, 1, False, True)
        with torch.no_grad():
            attn.qkv.weight.copy_(torch.eye(4).repeat(3, 1))
            attn.proj.weight.copy_(torch.eye(4))
            attn.qkv.bias.zero_()
            attn.proj.bias.zero_()
            return attn(x, None)
    close(student(work), [[[1.76159, 0.23841, 0.0, 0.0], [0.23841, 1.76159, 0.0, 0.0]]],
          "one head, q = k = v = x: scores 2 and 0, weights 0.8808 and 0.1192")


def slow_attention(attn, rope, heads, norms=(None, None)):
    def forward(x):
        B, N, D = x.shape
        rows = x @ attn.qkv.weight.double().T + attn.qkv.bias.double()
        q, k, v = (
            rows[..., i * D : (i + 1) * D].view(B, N, heads, D // heads).transpose(1, 2) for i in range(3)
        )
        q, k = (u if norm is None else slow_rmsnorm(norm)(u) for u, norm in zip((q, k), norms))
        q, k = rope(q), rope(k)
        out = torch.empty_like(q)
        for b in range(B):
            for h in range(heads):
                weights = (q[b, h] @ k[b, h].T / math.sqrt(D // heads)).softmax(-1)
                out[b, h] = weights @ v[b, h]
        return out.transpose(1, 2).reshape(B, N, D) @ attn.proj.weight.double().T + attn.proj.bias.double()
    return forward


@check("attention", "several heads")
def attention_values():
    attn = fill(dit.Attention(12, 3, False, True))
    values(lambda x: attn(x, None), slow_attention(attn, lambda v: v, 3), (randn(2, 5, 12, seed=40),),
           "each head attends with its own D / heads channels of q, k and v", 1e-3)


@check("attention", "RoPE")
def attention_rope():
    attn, calls = fill(dit.Attention(12, 3, False, True)), []

    def rope(v):
        calls.append(tuple(v.shape))
        return v * (1 + torch.arange(v.shape[-1] * v.shape[-2]).view(v.shape[-2:]).to(v) / 10)

    def fast(x):
        calls.clear()
        return attn(x, rope), torch.tensor(len(calls))
    got = student(lambda: (*fast(randn(2, 5, 12, seed=40)), calls))
    ok(all(shape == [2, 3, 5, 4] or shape == (2, 3, 5, 4) for shape in map(tuple, got[2])),
       "rope gets (B, heads, N, D / heads)")
    close(got[0], slow_attention(attn, rope, 3)(randn(2, 5, 12, seed=40).double()),
          "rope turns q and k, and leaves v alone", 1e-3)


@check("attention", "QK-norm")
def attention_norm():
    attn = fill(dit.Attention(12, 3, True, True))
    values(lambda x: attn(x, None), slow_attention(attn, lambda v: v, 3, (attn.q_norm, attn.k_norm)),
           (randn(2, 5, 12, seed=40),), "self.q_norm and self.k_norm act on each head's q and k", 1e-3)


# --- block ----------------------------------------------------------------------------------------------
def make_block(width=8, heads=2, ratio=2.0, norm=False, swiglu=True, rms=True):
    return dit.Block(width, heads, ratio, norm, swiglu, rms)


def give(factor, value):
    """A network part that gives a multiple of its input plus a number, and notes all arguments."""
    class Give(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x, rope=None):
            self.seen.append((x.detach(), rope))
            return factor * x + value
    return Give()


def staged_block(parts, rope="rope"):
    """A block whose norms do nothing, whose branches are give(), and whose six parts are these numbers."""
    block = make_block()
    block.norm1 = block.norm2 = nn.Identity()
    block.attn, block.mlp = give(1.0, 2.0), give(3.0, 10.0)
    with torch.no_grad():
        last = block.adaLN_modulation[1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor(parts).repeat_interleave(8))
    return block, block(torch.ones(1, 4, 8), torch.zeros(1, 8), rope)


@check("block", "worked example", public=True)
def block_example():
    def work():
        block, out = staged_block([0.0, 0.0, 0.5, 0.0, 0.0, 0.1])
        return out, block.attn.seen[0][0], block.mlp.seen[0][0]
    out, attn, mlp = student(work)
    close(attn, torch.ones(1, 4, 8), "attention sees x = 1, scaled by 1 and not shifted")
    close(
        mlp,
        torch.full((1, 4, 8), 2.5),
        "the feed-forward network sees the x that attention has changed: 1 + 0.5 * 3",
    )
    close(out, torch.full((1, 4, 8), 4.25), "2.5 + 0.1 * (3 * 2.5 + 10)")


@check("block", "six parts in order")
def block_parts():
    parts = [0.3, 0.7, 0.5, -0.2, 0.4, 0.1]

    def work():
        block, out = staged_block(parts)
        return out, block.attn.seen[0][0], block.mlp.seen[0][0]
    out, attn, mlp = student(work)
    close(attn, torch.full((1, 4, 8), 2.0), "the first two parts are shift and scale of the first norm")
    first = 1 + 0.5 * (2.0 + 2.0)
    close(
        mlp,
        torch.full((1, 4, 8), first * 1.4 - 0.2),
        "the third is its gate, then shift and scale of the second",
    )
    close(
        out,
        torch.full((1, 4, 8), first + 0.1 * (3 * (first * 1.4 - 0.2) + 10)),
        "the sixth is the second gate",
    )


@check("block", "RoPE is passed on")
def block_rope():
    seen = student(lambda: staged_block([0.0] * 6)[0].attn.seen)
    ok(len(seen) == 1 and seen[0][1] == "rope", "attention gets rope")


@check("block", "its parts")
def block_shapes():
    def work():
        blocks = [make_block(16, 2, 4.0), make_block(16, 2, 4.0, True, False, False)]
        state = [{n: list(p.shape) for n, p in b.state_dict().items()} for b in blocks]
        x = randn(2, 4, 16)
        fresh = make_block(16, 2, 4.0)
        nn.init.zeros_(fresh.adaLN_modulation[1].weight)
        nn.init.zeros_(fresh.adaLN_modulation[1].bias)
        return state, fresh(x, randn(2, 16, seed=1), None)
    (light, plain), out = student(work)
    for got, right, name in (
        (light, BLOCK | LIGHT, "SwiGLU and RMSNorm"),
        (plain, BLOCK | PLAIN, "MLP and LayerNorm"),
    ):
        ok(got == right, f"names and shapes of the weights with {name}: different are "
           f"{sorted(set(map(str, got.items())) ^ set(map(str, right.items())))[:4]}")
    close(out, randn(2, 4, 16), "with gates of 0 the block is the identity")


BLOCK = {
    "attn.qkv.weight": [48, 16],
    "attn.qkv.bias": [48],
    "attn.proj.weight": [16, 16],
    "attn.proj.bias": [16],
    "adaLN_modulation.1.weight": [96, 16],
    "adaLN_modulation.1.bias": [96],
}
LIGHT = {"norm1.weight": [16], "norm2.weight": [16], "mlp.w12.weight": [84, 16], "mlp.w12.bias": [84],
         "mlp.w3.weight": [16, 42], "mlp.w3.bias": [16]}
PLAIN = {
    "attn.q_norm.weight": [8],
    "attn.q_norm.bias": [8],
    "attn.k_norm.weight": [8],
    "attn.k_norm.bias": [8],
    "mlp.fc1.weight": [64, 16],
    "mlp.fc1.bias": [64],
    "mlp.fc2.weight": [16, 64],
    "mlp.fc2.bias": [16],
}


def slow_block(block, rope):
    def forward(x, c):
        parts = (
            F.silu(c) @ block.adaLN_modulation[1].weight.double().T + block.adaLN_modulation[1].bias.double()
        )
        s1, k1, g1, s2, k2, g2 = (p[:, None].expand(x.shape) for p in parts.split(x.shape[2], 1))
        attn = slow_attention(block.attn, rope, 2)
        x = x + g1 * attn(slow_rmsnorm(block.norm1)(x) * (1 + k1) + s1)
        return x + g2 * slow_swiglu(block.mlp)(slow_rmsnorm(block.norm2)(x) * (1 + k2) + s2)
    return forward


@check("block", "any weights")
def block_values():
    block = fill(make_block(), scale=0.3)
    values(
        lambda x, c: block(x, c, lambda v: 2 * v),
        slow_block(block, lambda v: 2 * v),
        (randn(4, 4, 8, seed=3), randn(4, 8, seed=4)),
        "norm, scale and shift, branch, gate, sum, twice",
        1e-3,
    )


@check("block", "gradient")
def block_gradient():
    block = fill(make_block(), scale=0.3)
    gradient(lambda x, c: block(x, c, lambda v: v), slow_block(block, lambda v: v),
             (randn(2, 4, 8, seed=3), randn(2, 8, seed=4)), "x, c", 1e-3)


