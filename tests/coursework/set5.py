"""Checks of set 5, measures. No student's process sees the slow_ functions."""
from checks import check, close, fid, math, np, ok, randn, student, torch, values


# --- psnr -----------------------------------------------------------------------------------------------
@check("psnr", "worked example", public=True)
def psnr_example():
    x = torch.full((1, 3, 2, 2), 0.5)
    one, two = student(lambda: (fid.psnr(x, x + 0.1), fid.psnr(x, x + 0.1, 2.0)))
    close(one, [20.0], "an error of 0.1 everywhere, data_range 1")
    close(two, [26.0206], "the same with data_range 2")


@check("psnr", "any images")
def psnr_values():
    x, y = torch.sigmoid(randn(3, 2, 4, 5)), torch.sigmoid(randn(3, 2, 4, 5, seed=1))
    y[2] = x[2]
    values(lambda x, y: fid.psnr(x, y, 255.0), lambda x, y: torch.stack(
        [10 * torch.log10(255 ** 2 * a.numel() / (a - b).square().sum()) for a, b in zip(x, y)]), (x, y),
        "each image has a mean of its own; identical images give inf")


# --- inception ------------------------------------------------------------------------------------------
@check("inception", "worked example", public=True)
def inception_example():
    two, one, split = student(
        lambda: (
            fid.inception_score(torch.eye(2)),
            fid.inception_score(torch.full((4, 3), 1 / 3)),
            fid.inception_score(torch.eye(2).repeat_interleave(3, 0), split=3),
        )
    )
    close(two, 2.0, "two certain rows of different classes", kind="number")
    close(one, 1.0, "equal rows", kind="number")
    close(split, 1.0, "two splits of one class each", kind="number")


def certain_probs():
    probs = (2 * randn(11, 4)).double().softmax(1)
    probs[3] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    return probs


def slow_inception(probs, split):
    scores = []
    for start in range(0, len(probs), split):
        part = probs[start:start + split].tolist()
        q = [sum(row[c] for row in part) / len(part) for c in range(len(part[0]))]
        kl = [sum(p * math.log(p / r) for p, r in zip(row, q) if p > 0) for row in part]
        scores.append(math.exp(sum(kl) / len(kl)))
    return torch.tensor(sum(scores) / len(scores), dtype=torch.float64)


SPLITS = (5000, 11, 4)


@check("inception", "any probabilities and splits")
def inception_values():
    values(lambda p: [fid.inception_score(p, split=s) for s in SPLITS] + [fid.inception_score(p)],
           lambda p: [slow_inception(p, s) for s in (*SPLITS, 5000)], (certain_probs(),),
           "contiguous splits of 5000 (also if not given), 11 and 4 of 11 rows", 1e-9, "number")


@check("inception", "NumPy arrays")
def inception_arrays():
    got = student(lambda: fid.inception_score(certain_probs().numpy(), split=4))
    close(got, slow_inception(certain_probs(), 4), "an array is as good as a tensor", 1e-9, "number")


# --- pr -------------------------------------------------------------------------------------------------
@check("pr", "worked example", public=True)
def pr_example():
    reference, samples = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.0], [4.0], [8.0]])
    got = student(lambda: fid.precision_recall(reference, samples, k=1))
    ok(len(got) == 2, "two numbers")
    close(got[0], 1 / 3, "precision: only sample 2 is inside a reference's ball", kind="number")
    close(got[1], 1.0, "recall: the ball of sample 2 holds all references", kind="number")


def slow_share(points, centres, k):
    radii = [sorted((c - other).norm().item() for other in centres)[k] for c in centres]
    inside = [any((p - c).norm().item() <= r for c, r in zip(centres, radii)) for p in points]
    return sum(inside) / len(points)


def slow_pr(reference, samples, k):
    return [slow_share(samples, reference, k), slow_share(reference, samples, k)]


def two_sets():
    return randn(30, 3), 0.8 * randn(20, 3, seed=1) + 0.4


@check("pr", "any features")
def pr_values():
    reference, samples = two_sets()
    got = student(
        lambda: [fid.precision_recall(reference, samples), fid.precision_recall(reference, samples, 1)]
    )
    for k, pair in zip((3, 1), got):
        for name, value, want in zip(("precision", "recall"), pair,
                                     slow_pr(reference.double(), samples.double(), k)):
            close(value, want, f"{name}, k = {k}{' (not given)' if k == 3 else ''}", 1e-6, "number")


@check("pr", "float64")
def pr_precise():
    reference, samples = two_sets()
    reference, samples = reference.double() + 1e4, samples.double() + 1e4
    got = student(lambda: fid.precision_recall(reference, samples))
    for name, value, want in zip(("precision", "recall"), got, slow_pr(reference, samples, 3)):
        close(value, want, f"{name} of features around 10,000: distances need float64", 1e-6, "number")


@check("pr", "block")
def pr_block():
    got = student(lambda: [fid.precision_recall(*two_sets(), 2, block=b) for b in (7, 1, 2000)])
    want = slow_pr(*(v.double() for v in two_sets()), 2)
    for pair in got:
        close(list(pair), want, "the result must not depend on block", 1e-6, "number")


# --- ssim -----------------------------------------------------------------------------------------------
@check("ssim", "worked example", public=True)
def ssim_example():
    x, noise = torch.full((1, 3, 12, 12), 0.25), torch.sigmoid(randn(1, 3, 12, 12))
    flat, dark, same = student(
        lambda: (fid.ssim(x, 3 * x), fid.ssim(x / 25, 3 * x / 25), fid.ssim(noise, noise))
    )
    close(flat, [0.600064], "flat images of 0.25 and 0.75: only the means count", 2e-3)
    close(dark, [0.636364], "flat images of 0.01 and 0.03: the constant c1 counts, too", 3e-5)
    close(same, [1.0], "an image is 1 like itself", 1e-4)


def slow_ssim(x, y, span):
    line = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window, c1, c2 = np.outer(line, line) / line.sum() ** 2, (0.01 * span) ** 2, (0.03 * span) ** 2

    def blur(v):
        v = np.pad(v, 5, mode="reflect")
        return (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) * window).sum((2, 3))
    means = []
    for b in range(len(x)):
        maps = []
        for p, q in zip(x[b].numpy(), y[b].numpy()):
            mp, mq = blur(p), blur(q)
            vp, vq, cov = blur(p * p) - mp ** 2, blur(q * q) - mq ** 2, blur(p * q) - mp * mq
            maps.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2)))
        means.append(np.mean(maps))
    return torch.tensor(means, dtype=torch.float64)


def ssim_pair(contrast):
    x = 0.5 + contrast * randn(2, 2, 12, 15)
    return x, x + 0.5 * contrast * randn(2, 2, 12, 15, seed=1) + 0.1


@check("ssim", "any images")
def ssim_values():
    values(lambda x, y: fid.ssim(x, y), lambda x, y: slow_ssim(x, y, 1.0), ssim_pair(0.15),
           "data_range not given", 2e-4)


@check("ssim", "constants and range")
def ssim_constants():
    x, y = ssim_pair(0.015)
    values(lambda x, y: [fid.ssim(x, y), fid.ssim(4 * x, 4 * y, 4.0), fid.ssim(x, y, 2.0)],
           lambda x, y: [slow_ssim(x, y, 1.0), slow_ssim(4 * x, 4 * y, 4.0), slow_ssim(x, y, 2.0)], (x, y),
           "images of little contrast, where c2 counts; data_range 1, 4 and 2", 1e-3)


# --- uniformity -----------------------------------------------------------------------------------------
MEASURES = ("density cv", "gini", "normalized entropy")


@check("uniformity", "worked example", public=True)
def uniformity_example():
    got = student(
        lambda: [fid.density_measures(np.array([1.0, 3.0])), fid.density_measures(np.array([2.0] * 4))]
    )
    for found, want, which in zip(got, ((0.5, 0.25, 0.8112781), (0.0, 0.0, 1.0)), ("1 and 3", "2, 2, 2, 2")):
        ok(set(found) == set(MEASURES), f"the keys are {', '.join(MEASURES)}")
        for name, value in zip(MEASURES, want):
            close(found[name], value, f"{name} of the densities {which}", kind="number")


@check("uniformity", "any densities")
def uniformity_values():
    d = (randn(15, seed=2).abs() + 0.1).double().numpy()

    def work():
        given = d.copy()
        return fid.density_measures(given), given
    got, after = student(work)
    mean, p = d.sum() / 15, d / d.sum()
    close(
        got["density cv"],
        math.sqrt(sum((v - mean) ** 2 for v in d) / 15) / mean,
        "density cv",
        1e-6,
        "number",
    )
    close(
        got["gini"],
        sum(abs(u - v) for u in d for v in d) / (2 * 225 * mean),
        "gini: all pairs, in any order",
        1e-6,
        "number",
    )
    close(
        got["normalized entropy"], -(p * np.log(p)).sum() / math.log(15), "normalized entropy", 1e-6, "number"
    )
    close(after, d, "d itself must not be changed", kind="any")


# --- frechet --------------------------------------------------------------------------------------------
@check("frechet", "worked example", public=True)
def frechet_example():
    got = student(
        lambda: fid.frechet_distance(np.array([3.0, 4.0]), np.diag([4.0, 9.0]), np.zeros(2), np.eye(2))
    )
    close(got, 30.0, "25 + 13 + 2 - 2 (2 + 3)", 1e-6, "number")


def covariance(d, n, seed):
    return np.cov(randn(n, d, seed=seed).double().numpy(), rowvar=False)


def slow_frechet(m1, s1, m2, s2):
    """By the eigenvalues of the product, which are real and not negative."""
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots


def gaussians(seed):
    m = [randn(5, seed=seed + i).double().numpy() for i in (2, 3)]
    return m[0], covariance(5, 40, seed), m[1], 3 * covariance(5, 40, seed + 1)


@check("frechet", "any Gaussians")
def frechet_values():
    got = student(lambda: [fid.frechet_distance(*gaussians(s)) for s in (0, 4)]
                  + [fid.frechet_distance(*gaussians(0)[2:], *gaussians(0)[:2])])
    for value, seed in zip(got, (0, 4, 0)):
        close(value, slow_frechet(*gaussians(seed)), "the formula above, the same both ways", 1e-9, "number")


@check("frechet", "singular covariances")
def frechet_singular():
    full, flat = covariance(6, 50, 0), covariance(6, 4, 1)
    got = student(lambda: fid.frechet_distance(np.zeros(6), full, np.zeros(6), flat))
    close(
        got,
        slow_frechet(np.zeros(6), full, np.zeros(6), flat),
        "fewer samples than dimensions",
        1e-4,
        "number",
    )


@check("frechet", "to itself")
def frechet_itself():
    pairs = [covariance(6, 50, 0), covariance(6, 4, 1), covariance(64, 20, 3)]
    got = student(lambda: [fid.frechet_distance(np.ones(len(s)), s, np.ones(len(s)), s) for s in pairs])
    for value, s in zip(got, pairs):
        value = float(value)
        ok(math.isfinite(value) and abs(value) <= 1e-5 * np.trace(s),
           f"the distance to itself is 0, up to 1e-5 of the trace (got {value:.4g})")


@check("frechet", "far from the origin")
def frechet_precise():
    m1, s1, m2, s2 = gaussians(0)
    got = student(lambda: fid.frechet_distance(m1 + 1e5, s1, m2 + 1e5, s2))
    close(got, slow_frechet(m1 + 1e5, s1, m2 + 1e5, s2), "means around 100,000: float64", 1e-7, "number")


# --- resize ---------------------------------------------------------------------------------------------
@check("resize", "worked example", public=True)
def resize_example():
    x = torch.tensor([[[[0.0, 8.0], [4.0, 12.0]]]])
    got = student(lambda: fid.resize_tf1(x, 4))
    close(
        got,
        [[[[0.0, 4.0, 8.0, 8.0], [2.0, 6.0, 10.0, 10.0], [4.0, 8.0, 12.0, 12.0], [4.0, 8.0, 12.0, 12.0]]]],
        "2x2 to 4x4: output i comes from input 2 i / 4, no further than the last pixel",
    )


def slow_resize(x, size, step=1):
    H, W = x.shape[2:]
    out = torch.zeros(*x.shape[:2], size, size, dtype=torch.float64)
    for i in range(0, size, step):
        for j in range(0, size, step):
            a, b = min(i * H / size, H - 1), min(j * W / size, W - 1)
            top, left = int(a), int(b)
            down, right = min(top + 1, H - 1), min(left + 1, W - 1)
            u, v = a - top, b - left
            out[:, :, i, j] = ((1 - u) * (1 - v) * x[:, :, top, left] + (1 - u) * v * x[:, :, top, right]
                               + u * (1 - v) * x[:, :, down, left] + u * v * x[:, :, down, right])
    return out[:, :, ::step, ::step]


@check("resize", "larger")
def resize_larger():
    values(
        lambda x: fid.resize_tf1(x, 13), lambda x: slow_resize(x, 13), (randn(2, 3, 5, 8),), "5x8 to 13x13"
    )


@check("resize", "smaller")
def resize_smaller():
    values(
        lambda x: [fid.resize_tf1(x, 7), fid.resize_tf1(x, 16)],
        lambda x: [slow_resize(x, 7), slow_resize(x, 16)],
        (randn(2, 3, 16, 12),),
        "16x12 to 7x7, without antialias, and to 16x16",
        1e-4,
    )


@check("resize", "299 pixels")
def resize_default():
    x = randn(1, 1, 4, 4)
    got = student(lambda: fid.resize_tf1(x)[:, :, ::23, ::23])
    close(got, slow_resize(x.double(), 299, 23), "the size is 299 if it is not given")
