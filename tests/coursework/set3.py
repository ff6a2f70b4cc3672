"""Checks of set 3, LightningDiT. No student's process sees the slow_ functions."""
from checks import F, check, close, dit, fill, gradient, math, near, nn, ok, randn, student, torch, types
from checks import and_gradient, values

# --- parts ----------------------------------------------------------------------------------------------
@check("parts", "modulate", public=True)
def parts_modulate():
    x, shift, scale = torch.full((1, 1, 1), 3.0), torch.full((1, 1), 2.0), torch.full((1, 1), 0.5)
    got = student(lambda: dit.modulate(x, shift, scale))
    close(got, [[[6.5]]], "x = 3, scale 0.5, shift 2: scale 0 must leave x as it is")

@check("parts", "SwiGLU", public=True)
def parts_swiglu():
    def work():
        layer = dit.SwiGLU(1, 1)
        layer.load_state_dict({"w12.weight": torch.tensor([[2.0], [3.0]]), "w12.bias": torch.zeros(2),
                               "w3.weight": torch.ones(1, 1), "w3.bias": torch.zeros(1)})
        return layer(torch.ones(1, 1, 1))
    close(student(work), [[[5.284782]]], "w1 x = 2, w2 x = 3, w3 the identity")

@check("parts", "RMSNorm", public=True)
def parts_rmsnorm():
    def work():
        norm = dit.RMSNorm(2)
        norm.load_state_dict({"weight": torch.tensor([1.0, 2.0])})
        return norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    close(student(work), [[0.848528, 2.262742], [0.0, 0.0]], "rows (3, 4) and (0, 0), weight (1, 2)")

def numbered_labels(dropout):
    """An embedder of ten classes; row i of its table is (i,)."""
    embedder = dit.LabelEmbedder(10, 1, dropout)
    table = embedder.embedding_table
    table.weight.data = torch.arange(float(table.num_embeddings))[:, None]
    return embedder

@check("parts", "classes", public=True)
def parts_classes():
    def work():
        embedder, y, drop = numbered_labels(1.0), torch.tensor([3, 7]), torch.tensor([False, True])
        return embedder.train()(y, drop), embedder.eval()(y, drop), y
    *rows, y = student(work)
    for got in rows:
        close(got, [[3.0], [10.0]], "drop, where it is given, alone decides, in training or not")
    close(y, [3, 7], "y itself must not be changed", kind="int64")

def slow_modulate(x, shift, scale):
    return torch.stack([image * (1 + k) + s for image, s, k in zip(x, shift, scale)])

@check("parts", "any tokens")
def parts_tokens():
    values(dit.modulate, slow_modulate, (randn(3, 3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2)),
           "an image's scale and shift act on all of its tokens")

def slow_swiglu(layer):
    def forward(x):
        gate, value = layer.double().w12(x).chunk(2, -1)
        return layer.w3(gate / (1 + (-gate).exp()) * value)
    return forward

@check("parts", "any weights")
def parts_weights():
    layer = fill(dit.SwiGLU(6, 5))
    values(layer, slow_swiglu(layer), (randn(2, 3, 6, seed=7),),
           "SiLU on the first half of w12 x, times the second")

def slow_rmsnorm(norm):
    def forward(x):
        return x / ((x * x).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    return forward

@check("parts", "any x and eps")
def parts_norms():
    norm, wide = fill(dit.RMSNorm(6)), fill(dit.RMSNorm(6, eps=0.3), seed=3)
    values(lambda x: [norm(x), wide(x), norm(1e-3 * x)],
           lambda x: [slow_rmsnorm(norm)(x), slow_rmsnorm(wide)(x), slow_rmsnorm(norm)(1e-3 * x)],
           (randn(2, 3, 4, 6, seed=3) + 0.5,), "each row over the root of its own mean square, times weight")

@check("parts", "float16")
def parts_half():
    def work():
        out = dit.RMSNorm(4)(torch.full((1, 4), 300.0, dtype=torch.float16))
        return out, out.requires_grad
    got, learns = student(work)
    ok(learns, "no gradient reaches self.weight")
    close(got, torch.ones(1, 4), "300^2 overflows in float16: compute in float32", 2e-3, "any")

@check("parts", "gradient")
def parts_gradient():
    norm, layer = fill(dit.RMSNorm(6)), fill(dit.SwiGLU(6, 5))
    gradient(lambda x: [norm(x), layer(x), dit.modulate(x, x[:, 0], x[:, 1])],
             lambda x: [slow_rmsnorm(norm)(x), slow_swiglu(layer)(x), slow_modulate(x, x[:, 0], x[:, 1])],
             (randn(2, 3, 6),), "x")

@check("parts", "drop not given")
def parts_drop():
    y = torch.arange(10).repeat(2000)

    def work():
        embedder = numbered_labels(0.3)
        rows = [embedder.train()(y, None), embedder(y, None), embedder(y, torch.zeros(len(y)).bool()),
                embedder.eval()(y, None), numbered_labels(0.0).train()(y, None)]
        return rows[0].requires_grad, *(row.flatten() for row in rows)
    learns, one, two, told, evaluated, never = student(work)
    ok(learns, "no gradient reaches self.embedding_table")
    close(told, y, "drop is given and no label is dropped, in training")
    near((one == 10).view(2000, 10).double().mean(0), [0.3] * 10, 0.06,
         "in training a share dropout_prob becomes the null class, each label by itself")
    ok(bool(((one == 10) | (one == y)).all()), "labels that are kept stay what they are")
    ok(not torch.equal(one, two), "each call draws anew")
    close(evaluated, y, "not in training nothing is dropped")
    close(never, y, "dropout_prob 0: nothing is dropped")

# --- rope -----------------------------------------------------------------------------------------------
@check("rope", "angles", public=True)
def rope_angles():
    def work():
        buffers = dict(dit.RotaryEmbedding(4, 2).named_buffers())
        return buffers.get("freqs_cos"), buffers.get("freqs_sin")
    angle = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0] * 4])
    close(student(work), [angle.cos(), angle.sin()], "buffers freqs_cos and freqs_sin, head_dim 4, side 2")

def slow_angles(head_dim, side):
    quarter, rows = head_dim // 4, []
    for n in range(side * side):
        places = [n // side if c < head_dim // 2 else n % side for c in range(head_dim)]
        rows.append([p * 10000.0 ** (-((c // 2) % quarter) / quarter) for c, p in enumerate(places)])
    return torch.tensor(rows, dtype=torch.float64)

@check("rope", "any size")
def rope_sizes():
    sizes = ((8, 3), (16, 4), (12, 5))

    def work():
        ropes = [dit.RotaryEmbedding(*size) for size in sizes]
        return [(rope.freqs_cos, rope.freqs_sin) for rope in ropes]
    for size, got in zip(sizes, student(work)):
        angle = slow_angles(*size)
        close(got, [angle.cos(), angle.sin()], f"cosines and sines, head_dim and side {size}")

def rope_with(cos, sin):
    """A RotaryEmbedding with these buffers, whatever its __init__ does."""
    rope = dit.RotaryEmbedding.__new__(dit.RotaryEmbedding)
    nn.Module.__init__(rope)
    rope.register_buffer("freqs_cos", cos)
    rope.register_buffer("freqs_sin", sin)
    return rope

@check("rope", "rotation", public=True)
def rope_rotation():
    x = torch.zeros(1, 2, 2, 4)
    x[0, 0, 1], x[0, 1, 1] = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    cos = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.540302, 0.540302, 1.0, 1.0]])
    sin = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.841471, 0.841471, 0.0, 0.0]])
    got = student(lambda: rope_with(cos, sin)(x))
    close(got[0, :, 0], torch.zeros(2, 4), "the first token has the angles 0")
    close(got[0, :, 1], [[0.540302, 0.841471, 1.0, 0.0], [-0.841471, 0.540302, 0.0, 1.0]],
          "the second token turns its first pair of channels by the angle 1")

def some_rope(x):
    angle = randn(9, 4, seed=5).repeat_interleave(2, dim=1)
    return rope_with(angle.cos(), angle.sin())(x)

def slow_rope(x):
    angle = randn(9, 4, seed=5).double()
    turned = torch.complex(x[..., ::2], x[..., 1::2]) * torch.polar(torch.ones_like(angle), angle)
    return torch.stack([turned.real, turned.imag], -1).flatten(-2)

@check("rope", "any q")
def rope_values():
    values(some_rope, slow_rope, (randn(2, 3, 9, 8),), "adjacent channels turn by their token's angle")

@check("rope", "gradient")
def rope_gradient():
    gradient(some_rope, slow_rope, (randn(2, 3, 9, 8),), "x")

# --- waves ----------------------------------------------------------------------------------------------
def waves_of(embedder, t):
    """What the embedder feeds to its MLP, and what comes out."""
    seen = []
    handle = embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    out = embedder(t)
    handle.remove()
    return seen[0], out, out.requires_grad

@check("waves", "time", public=True)
def waves_time():
    waves, *_ = student(lambda: waves_of(dit.TimestepEmbedder(8), torch.tensor([0.0, 1.0])))
    close(waves[0], [1.0] * 128 + [0.0] * 128, "t = 0: cosines first, then sines")
    close(waves[1, [0, 1, 128, 129]], [0.540302, 0.597382, 0.841471, 0.801957],
          "t = 1: cosine and sine of the first two frequencies, 1 and 0.9306")

def slow_waves(t):
    omega = torch.tensor([10000.0 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    return torch.cat([(t[:, None] * omega).cos(), (t[:, None] * omega).sin()], 1)

@check("waves", "any time")
def waves_times():
    t = torch.tensor([0.013, 0.5, 0.97, 37.0, 998.6])
    waves, out, learns = student(lambda: waves_of(fill(dit.TimestepEmbedder(8)), t))
    want, mlp = slow_waves(t.double()), fill(dit.TimestepEmbedder(8)).mlp
    close(waves, want, "t as it comes, times 10000^(-i / 128)", 1e-3)
    close(out, mlp.double()(want), "the waves go through self.mlp", 5e-3)
    ok(learns, "no gradient reaches self.mlp")

@check("waves", "a bfloat16 model")
def waves_half():
    t = torch.tensor([999.0])
    waves, out, _ = student(lambda: waves_of(dit.TimestepEmbedder(8).to(torch.bfloat16), t))
    close(waves, slow_waves(t.double()), "angles are computed in float32, and only the waves become bfloat16",
          0.02, "bfloat16")
    ok(str(out.dtype) == "torch.bfloat16", "the MLP answers in its own dtype")

@check("waves", "positions", public=True)
def waves_positions():
    got = student(lambda: dit.sincos_pos_embed(4, 2))
    close(got[:, 1:3], [[[0.841471, 0.540302, 0.0, 1.0], [0.0, 1.0, 0.841471, 0.540302]]],
          "tokens 1 (row 0, column 1) and 2 (row 1, column 0)")

def slow_sincos(dim, side):
    omega, rows = [10000.0 ** (-4 * i / dim) for i in range(dim // 4)], []
    for n in range(side * side):
        row, column = divmod(n, side)
        waves = (math.sin, column), (math.cos, column), (math.sin, row), (math.cos, row)
        rows.append([wave(place * w) for wave, place in waves for w in omega])
    return torch.tensor([rows], dtype=torch.float64)

@check("waves", "any size")
def waves_sizes():
    sizes = ((8, 3), (16, 4), (4, 1))
    for size, got in zip(sizes, student(lambda: [dit.sincos_pos_embed(*s) for s in sizes])):
        close(got, slow_sincos(*size), f"dim and side {size}: sines, cosines of the column, then of the row")

# --- unpatchify -----------------------------------------------------------------------------------------
def unpatchify(p, channels, x):
    return dit.LightningDiT.unpatchify(types.SimpleNamespace(patch_size=p, in_channels=channels), x)

@check("unpatchify", "worked example", public=True)
def unpatchify_example():
    patch = torch.tensor([[[1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 4.0, 40.0]]])
    tokens = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    one, four = student(lambda: (unpatchify(2, 2, patch), unpatchify(1, 1, tokens)))
    close(one, [[[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]]],
          "one token of 2x2 pixels, two channels")
    close(four, [[[[1.0, 2.0], [3.0, 4.0]]]], "four tokens of one pixel, row by row")

UNPATCHIFY = ((2, 3, 3), (1, 5, 4), (3, 2, 2))

def slow_unpatchify(p, channels, x):
    patches = x.unflatten(2, (p * p, channels)).transpose(2, 3).flatten(2)  # the channel slowest, for fold
    return F.fold(patches.transpose(1, 2), p * math.isqrt(x.shape[1]), p, stride=p)

@check("unpatchify", "any sizes")
def unpatchify_values():
    values(and_gradient(lambda *xs: [unpatchify(p, c, x) for (p, c, _), x in zip(UNPATCHIFY, xs)]),
           and_gradient(lambda *xs: [slow_unpatchify(p, c, x) for (p, c, _), x in zip(UNPATCHIFY, xs)]),
           [randn(2, s * s, p * p * c) for p, c, s in UNPATCHIFY],
           "tokens row by row, within a token the channel fastest")

# --- switches -------------------------------------------------------------------------------------------
COMMON = {"attn.qkv.weight": [48, 16], "attn.qkv.bias": [48], "attn.proj.weight": [16, 16],
          "attn.proj.bias": [16], "adaLN_modulation.1.weight": [96, 16], "adaLN_modulation.1.bias": [96]}
MLP = {"mlp.fc1.weight": [64, 16], "mlp.fc1.bias": [64], "mlp.fc2.weight": [16, 64], "mlp.fc2.bias": [16]}

def weights_of(*switches):
    """{name: shape} of a block of width 16 with two heads and mlp_ratio 4."""
    block = dit.Block(16, 2, 4.0, *switches)
    return {name: list(p.shape) for name, p in block.named_parameters()}

def same_weights(got, right, name):
    different = sorted(set(map(str, got.items())) ^ set(map(str, right.items())))
    ok(got == right, f"names and shapes of the weights {name}: different are {different[:4]}")

@check("switches", "all off", public=True)
def switches_off():
    same_weights(student(lambda: weights_of(False, False, False)), COMMON | MLP, "without any switch")

@check("switches", "norms")
def switches_norms():
    plain, light = student(lambda: (weights_of(True, False, False), weights_of(True, False, True)))
    norms = {f"attn.{name}.weight": [8] for name in ("q_norm", "k_norm")}
    biases = {name.replace("weight", "bias"): shape for name, shape in norms.items()}
    same_weights(plain, COMMON | MLP | norms | biases, "with QK-norm")
    norms |= {"norm1.weight": [16], "norm2.weight": [16]}
    same_weights(light, COMMON | MLP | norms, "with QK-norm and RMSNorm")

@check("switches", "the width of SwiGLU")
def switches_width():
    def work():
        swiglu, plain = (dit.Block(24, 2, 2.49, False, switch, False) for switch in (True, False))
        shapes = [list(swiglu.mlp.w12.weight.shape), list(plain.mlp.fc1.weight.shape), [plain.attn.num_heads]]
        return weights_of(False, True, False), shapes
    got, narrow = student(work)
    swiglu = {"mlp.w12.weight": [84, 16], "mlp.w12.bias": [84],
              "mlp.w3.weight": [16, 42], "mlp.w3.bias": [16]}
    same_weights(got, COMMON | swiglu, "with SwiGLU")
    close(narrow, [[78, 24], [59, 24], [2]],
          "D = 24, two heads, mlp_ratio 2.49: the shapes of w12 and fc1, attn.num_heads", kind="number")

@check("switches", "adaLN")
def switches_adaln():
    def work():
        block = dit.Block(16, 2, 4.0, False, True, True)
        parts = block.adaLN_modulation
        return parts(randn(3, 16)), parts[1].weight, parts[1].bias
    got, weight, bias = student(work)
    close(got, F.silu(randn(3, 16)) @ weight.T + bias, "adaLN_modulation: a SiLU, then a linear layer", 1e-3)

# --- attention ------------------------------------------------------------------------------------------
@check("attention", "worked example", public=True)
def attention_example():
    x = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]])

    def work():
        attn = dit.Attention(4, 1, False, True)
        attn.load_state_dict({"qkv.weight": torch.eye(4).repeat(3, 1), "qkv.bias": torch.zeros(12),
                              "proj.weight": torch.eye(4), "proj.bias": torch.zeros(4)})
        return attn(x, None)
    close(student(work), [[[1.76159, 0.23841, 0.0, 0.0], [0.23841, 1.76159, 0.0, 0.0]]],
          "one head, q = k = v = x: scores 2 and 0, weights 0.8808 and 0.1192")

def slow_attention(attn, rope=lambda v: v):
    def forward(x):
        (B, N, D), heads = x.shape, attn.num_heads
        parts = attn.double().qkv(x).split(D, 2)
        q, k, v = (part.view(B, N, heads, D // heads).transpose(1, 2) for part in parts)
        q, k = rope(attn.q_norm(q)), rope(attn.k_norm(k))
        weights = (q @ k.transpose(2, 3) / math.sqrt(D // heads)).softmax(3)
        return attn.proj((weights @ v).transpose(1, 2).reshape(B, N, D))
    return forward

def scaled(v):
    """In the place of RoPE: a factor for each token and channel of a head, and channels mix."""
    return v * (1 + torch.arange(v.shape[-1] * v.shape[-2]).view(v.shape[-2:]).to(v) / 10) + v.flip(-1)

@check("attention", "several heads")
def attention_values():
    attn = fill(dit.Attention(12, 3, False, True))
    values(and_gradient(lambda x: attn(x, None)), and_gradient(slow_attention(attn)),
           (randn(2, 5, 12, seed=40),),
           "each head attends with its own D / heads channels of q, k and v", 1e-3)

@check("attention", "RoPE")
def attention_rope():
    attn = fill(dit.Attention(12, 3, False, True))
    values(lambda x: attn(x, scaled), slow_attention(attn, scaled), (randn(2, 5, 12, seed=40),),
           "rope turns q and k, (B, heads, N, D / heads) each, and leaves v alone", 1e-3)

@check("attention", "QK-norm")
def attention_norm():
    attn = fill(dit.Attention(12, 3, True, True))
    values(lambda x: attn(x, scaled), slow_attention(attn, scaled), (randn(2, 5, 12, seed=40),),
           "self.q_norm and self.k_norm act on each head's q and k, before rope", 1e-3)

# --- block ----------------------------------------------------------------------------------------------
def staged_block(parts):
    """A block whose norms do nothing, whose six parts are these numbers and whose branches are x + 2 and
    3 x + 10, for x = 1 -> what comes out, what attention got, what the feed-forward network got."""
    block, seen = dit.Block.__new__(dit.Block), []
    nn.Module.__init__(block)
    block.norm1, block.norm2 = nn.Identity(), nn.Identity()

    def attn(x, rope):
        seen.extend([x, rope])
        return x + 2

    def mlp(x):
        seen.append(x)
        return 3 * x + 10
    block.attn, block.mlp = attn, mlp
    block.adaLN_modulation = lambda c: torch.tensor(parts).repeat_interleave(8).repeat(len(c), 1)
    return block(torch.ones(1, 4, 8), torch.zeros(1, 8), "rope"), *seen

@check("block", "worked example", public=True)
def block_example():
    out, attn, _, mlp = student(lambda: staged_block([0.0, 0.0, 0.5, 0.0, 0.0, 0.1]))
    close(attn, torch.ones(1, 4, 8), "attention sees x = 1, scaled by 1 and not shifted")
    close(mlp, torch.full((1, 4, 8), 2.5),
          "the feed-forward network sees the x that attention has changed: 1 + 0.5 * 3")
    close(out, torch.full((1, 4, 8), 4.25), "2.5 + 0.1 * (3 * 2.5 + 10)")

@check("block", "six parts in order")
def block_parts():
    out, attn, _, mlp = student(lambda: staged_block([0.3, 0.7, 0.5, -0.2, 0.4, 0.1]))
    first = 1 + 0.5 * (2.0 + 2.0)
    second = first * 1.4 - 0.2
    close(attn, torch.full((1, 4, 8), 2.0), "the first two parts are shift and scale of the first norm")
    close(mlp, torch.full((1, 4, 8), second), "the third is its gate, then shift and scale of the second")
    close(out, torch.full((1, 4, 8), first + 0.1 * (3 * second + 10)), "the sixth is the second gate")

@check("block", "RoPE is passed on")
def block_rope():
    ok(student(lambda: staged_block([0.0] * 6))[2] == "rope", "attention gets rope")

def slow_block(block):
    block.double()

    def forward(x, c):
        s1, k1, g1, s2, k2, g2 = block.adaLN_modulation(c)[:, None].split(x.shape[2], 2)
        x = x + g1 * block.attn(block.norm1(x) * (1 + k1) + s1, None)
        return x + g2 * block.mlp(block.norm2(x) * (1 + k2) + s2)
    return forward

def some_block():
    return fill(dit.Block(8, 2, 2.0, False, True, True), scale=0.3)

@check("block", "any weights")
def block_values():
    block = some_block()
    values(lambda x, c: block(x, c, None), slow_block(some_block()), (randn(4, 4, 8, seed=3), randn(4, 8)),
           "norm, scale and shift, branch, gate, sum, twice", 1e-3)

@check("block", "gradient")
def block_gradient():
    block = some_block()
    gradient(lambda x, c: block(x, c, None), slow_block(some_block()),
             (randn(2, 4, 8, seed=3), randn(2, 8)), "x, c", 1e-3)
