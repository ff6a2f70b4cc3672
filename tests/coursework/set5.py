"""Checks of set 5, measures. No student's process sees the slow_ functions."""
import importlib
import time

from checks import Wrong, check, close, fid, math, np, ok, randn, student, torch, values


# --- psnr -----------------------------------------------------------------------------------------------
@check("psnr", "worked example", public=True)
def psnr_example():
    x = torch.full((1, 3, 2, 2), 0.5)
    one, two = student(lambda: (fid.psnr(x, x + 0.1), fid.psnr(x, x + 0.1, 2.0)))
    close(one, [20.0], "an error of 0.1 everywhere, data_range 1")
    close(two, [26.0206], "the same with data_range 2")

def slow_psnr(x, y):
    return torch.stack([10 * torch.log10(255 ** 2 / (a - b).square().mean()) for a, b in zip(x, y)])

@check("psnr", "any images")
def psnr_values():
    x, y = (torch.sigmoid(randn(3, 2, 4, 5, seed=s)).double() for s in (0, 1))
    y[2] = x[2]
    values(lambda x, y: fid.psnr(x, y, 255.0), slow_psnr, (x, y),
           "float64 images: each has a mean of its own; identical images give inf", kind="float64")

# --- inception ------------------------------------------------------------------------------------------
@check("inception", "worked example", public=True)
def inception_example():
    two, one, split = student(lambda: (fid.inception_score(torch.eye(2)),
                                       fid.inception_score(torch.full((4, 3), 1 / 3)),
                                       fid.inception_score(torch.eye(2).repeat_interleave(3, 0), split=3)))
    close(two, 2.0, "two certain rows of different classes", kind="number")
    close(one, 1.0, "equal rows", kind="number")
    close(split, 1.0, "two splits of one class each", kind="number")

def certain_probs():
    probs = (2 * randn(11, 4)).double().softmax(1)
    probs[3] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    return probs

def slow_inception(probs, split=5000):
    scores = []
    for start in range(0, len(probs), split):
        part = probs[start:start + split]
        kl = [sum(p * math.log(p / q) for p, q in zip(row, part.mean(0)) if p > 0) for row in part]
        scores.append(math.exp(sum(kl) / len(kl)))
    return sum(scores) / len(scores)

@check("inception", "any probabilities and splits")
def inception_values():
    values(lambda p: [fid.inception_score(p), *(fid.inception_score(p, split=s) for s in (11, 4))],
           lambda p: [slow_inception(p), *(slow_inception(p, s) for s in (11, 4))],
           (certain_probs().float(),), "float64; 11 rows in contiguous splits of 5000 (not given), 11 and 4",
           1e-9, "number")

@check("inception", "NumPy arrays")
def inception_arrays():
    values(lambda p: fid.inception_score(p.numpy(), split=4), lambda p: slow_inception(p, 4),
           (certain_probs(),), "an array is as good as a tensor", 1e-9, "number")

# --- pr -------------------------------------------------------------------------------------------------
@check("pr", "worked example", public=True)
def pr_example():
    reference, samples = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.0], [4.0], [8.0]])
    got = student(lambda: fid.precision_recall(reference, samples, k=1))
    close(list(got), [1 / 3, 1.0], "precision: only sample 2 is inside a reference's ball; recall: the ball "
          "of sample 2 holds all references", kind="number")

def slow_share(points, centres, k):
    radii = [sorted((c - other).norm().item() for other in centres)[k] for c in centres]
    inside = [any((p - c).norm().item() <= r for c, r in zip(centres, radii)) for p in points]
    return sum(inside) / len(points)

def slow_pr(reference, samples, k=3):
    return [slow_share(samples, reference, k), slow_share(reference, samples, k)]

def two_sets():
    reference, samples = randn(30, 3), 0.8 * randn(20, 3, seed=1) + 0.4
    reference[:9], samples[:6] = reference[9:18], samples[6:12]    # equal features: neighbours at distance 0
    return reference, samples

@check("pr", "any features")
def pr_values():
    values(lambda r, s: [fid.precision_recall(r, s), fid.precision_recall(r, s, 1)],
           lambda r, s: [slow_pr(r, s), slow_pr(r, s, 1)], two_sets(),
           "precision and recall for k = 3 (not given), then for k = 1", 1e-6, "number")

@check("pr", "float64")
def pr_precise():
    values(lambda r, s: fid.precision_recall(r, s), slow_pr, [v + 1e4 for v in two_sets()],
           "features around 10,000: distances need float64", 1e-6, "number")

@check("pr", "block")
def pr_block():
    values(lambda r, s: [fid.precision_recall(r, s, 2, block=b) for b in (7, 1, 2000)],
           lambda r, s: 3 * [slow_pr(r, s, 2)], two_sets(),
           "the result must not depend on block", 1e-6, "number")

# --- ssim -----------------------------------------------------------------------------------------------
@check("ssim", "worked example", public=True)
def ssim_example():
    x, noise = torch.full((1, 3, 12, 12), 0.25), torch.sigmoid(randn(1, 3, 12, 12))
    flat, dark, same = student(lambda: (fid.ssim(x, 3 * x), fid.ssim(x / 25, 3 * x / 25),
                                        fid.ssim(noise, noise)))
    close(flat, [0.600064], "flat images of 0.25 and 0.75: only the means count", 2e-3)
    close(dark, [0.636364], "flat images of 0.01 and 0.03: the constant c1 counts, too", 3e-5)
    close(same, [1.0], "an image is 1 like itself", 1e-4)

def slow_ssim(x, y, span=1.0):
    line = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    window, c1, c2 = np.outer(line, line) / line.sum() ** 2, (0.01 * span) ** 2, (0.03 * span) ** 2

    def blur(v):
        v = np.pad(v, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
        return (np.lib.stride_tricks.sliding_window_view(v, (11, 11), (2, 3)) * window).sum((4, 5))
    p, q = x.numpy(), y.numpy()
    mp, mq = blur(p), blur(q)
    vp, vq, cov = blur(p * p) - mp ** 2, blur(q * q) - mq ** 2, blur(p * q) - mp * mq
    maps = (2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2))
    return torch.from_numpy(maps.mean((1, 2, 3)))

def ssim_pair(contrast):
    x = 0.5 + contrast * randn(2, 2, 12, 15)
    return x, x + 0.5 * contrast * randn(2, 2, 12, 15, seed=1) + 0.1

@check("ssim", "any images")
def ssim_values():
    x, y = ssim_pair(0.15)
    values(lambda x, y: torch.cat([fid.ssim(x, y), fid.ssim(x, 1 - y)]),
           lambda x, y: torch.cat([slow_ssim(x, y), slow_ssim(x, 1 - y)]), (x.double(), y.double()),
           "float64 images and negatives of them; data_range not given", 2e-4, "float64")

@check("ssim", "constants and range")
def ssim_constants():
    values(lambda x, y: [fid.ssim(x, y), fid.ssim(4 * x, 4 * y, 4.0), fid.ssim(x, y, 2.0)],
           lambda x, y: [slow_ssim(x, y), slow_ssim(4 * x, 4 * y, 4.0), slow_ssim(x, y, 2.0)],
           ssim_pair(0.015), "images of little contrast, where c2 counts; data_range 1, 4 and 2", 1e-3)

# --- uniformity -----------------------------------------------------------------------------------------
@check("uniformity", "worked example", public=True)
def uniformity_example():
    points = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    two, equal = np.array([1.0, 3.0]), np.array([2.0] * 4)
    got = student(lambda: [fid.density_measures(two), fid.density_measures(equal), fid.uniformity(points)])
    wanted = {"the densities 1 and 3": (0.5, 0.25, 0.811278), "equal densities": (0.0, 0.0, 1.0),
              "the corners and the centre of a square": (0.141849, 0.05674, 0.994134)}
    for found, (which, want) in zip(got, wanted.items()):
        ok([len(name) for name in found] == [10, 4, 18],
           "three keys, of 10, 4 and 18 characters: Table 6's headings")
        close(list(found.values()), want, f"{which}, in the order of Table 6", kind="number")

def slow_measures(d):
    mean, p = d.mean(), d / d.sum()
    return {"density cv": math.sqrt(((d - mean) ** 2).mean()) / mean,
            "gini": sum(abs(u - v) for u in d for v in d) / (2 * len(d) ** 2 * mean),
            "normalized entropy": -(p * np.log(p)).sum() / math.log(len(d))}

def slow_uniformity(points):
    """A Gaussian kernel of the points' covariance times N ** (-1 / 3), Scott's rule in a plane."""
    inverse = np.linalg.inv(np.cov(points.T) * len(points) ** (-1 / 3))
    gaps = points[:, None] - points
    return slow_measures(np.exp(-np.einsum("ijk,kl,ijl->ij", gaps, inverse, gaps) / 2).mean(1))

@check("uniformity", "any densities")
def uniformity_values():
    values(fid.density_measures, slow_measures, ((randn(15, seed=2).abs() + 0.1).double().numpy(),),
           "densities in any order", 1e-6, "number")

@check("uniformity", "any points")
def uniformity_points():
    values(fid.uniformity, slow_uniformity, (randn(20, 2, seed=3).double().numpy(),),
           "how Sec. 6.4 gets densities from points, with scipy's default bandwidth", 1e-6, "number")

# --- frechet --------------------------------------------------------------------------------------------
@check("frechet", "worked example", public=True)
def frechet_example():
    m1, s1 = np.array([3.0, 4.0]), np.diag([4.0, 9.0])
    got = student(lambda: fid.frechet_distance(m1, s1, np.zeros(2), np.eye(2)))
    close(got, 30.0, "25 + 13 + 2 - 2 (2 + 3)", 1e-6, "number")

def covariance(d, n, seed):
    return np.cov(randn(n, d, seed=seed).double().numpy(), rowvar=False)

def slow_frechet(m1, s1, m2, s2):
    """By the eigenvalues of the product, which are real and not negative."""
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots

def gaussians(far=0.0):
    m1, m2 = (randn(5, seed=s).double().numpy() + far for s in (2, 3))
    return m1, covariance(5, 40, 0), m2, 3 * covariance(5, 40, 1)

@check("frechet", "any Gaussians")
def frechet_values():
    values(lambda a, s, b, t: [fid.frechet_distance(a, s, b, t), fid.frechet_distance(b, t, a, s)],
           lambda a, s, b, t: 2 * [slow_frechet(a, s, b, t)], gaussians(),
           "the formula above, the same both ways", 1e-9, "number")

@check("frechet", "singular covariances")
def frechet_singular():
    full, flat, zero = covariance(6, 50, 0), covariance(6, 4, 1), np.zeros(6)
    values(fid.frechet_distance, slow_frechet, (zero, full, zero, flat),
           "fewer samples than dimensions", 1e-4, "number")

@check("frechet", "to itself")
def frechet_itself():
    pairs = [covariance(6, 50, 0), covariance(6, 4, 1), covariance(64, 20, 3)]

    def refused(*_, **__):
        raise Wrong("sqrtm is not to be used")

    def work():
        importlib.import_module("scipy.linalg").sqrtm = importlib.import_module("fid").sqrtm = refused
        return [fid.frechet_distance(np.ones(len(s)), s, np.ones(len(s)), s) for s in pairs]
    got = student(work)
    for value, s in zip(got, pairs):
        ok(math.isfinite(float(value)) and abs(float(value)) <= 1e-5 * np.trace(s),
           f"the distance to itself is 0, up to 1e-5 of the trace (got {float(value):.4g})")

@check("frechet", "far from the origin")
def frechet_precise():
    values(lambda *g: [fid.frechet_distance(*g), fid.frechet_distance(*(v.numpy() for v in g))],
           lambda *g: 2 * [slow_frechet(*(v.numpy() for v in g))],
           [torch.from_numpy(v).float() for v in gaussians(1e5)],
           "means around 100,000, tensors and arrays of float32: compute in float64", 1e-7, "number")

# --- resize ---------------------------------------------------------------------------------------------
@check("resize", "worked example", public=True)
def resize_example():
    got = student(lambda: fid.resize_tf1(torch.tensor([[[[0.0, 8.0], [4.0, 12.0]]]]), 4))
    last = [4.0, 8.0, 12.0, 12.0]
    close(got, [[[[0.0, 4.0, 8.0, 8.0], [2.0, 6.0, 10.0, 10.0], last, last]]],
          "2x2 to 4x4: output i comes from input 2 i / 4, no further than the last pixel")

def slow_resize(x, size, step=1):
    """Every step-th pixel of every step-th row."""
    H, W = x.shape[2:]
    out = torch.zeros(*x.shape[:2], size, size, dtype=torch.float64)
    for i in range(0, size, step):
        for j in range(0, size, step):
            a, b = min(i * H / size, H - 1), min(j * W / size, W - 1)
            top, left = int(a), int(b)
            down, right, u, v = min(top + 1, H - 1), min(left + 1, W - 1), a - top, b - left
            upper = (1 - v) * x[:, :, top, left] + v * x[:, :, top, right]
            out[:, :, i, j] = (1 - u) * upper + u * ((1 - v) * x[:, :, down, left] + v * x[:, :, down, right])
    return out[:, :, ::step, ::step]

@check("resize", "larger")
def resize_larger():
    values(lambda x: fid.resize_tf1(x, 13), lambda x: slow_resize(x, 13), (randn(2, 3, 5, 8),),
           "5x8 to 13x13")

@check("resize", "smaller")
def resize_smaller():
    values(lambda x: [fid.resize_tf1(x, n) for n in (7, 12)],
           lambda x: [slow_resize(x, n) for n in (7, 12)], (randn(2, 3, 16, 12),),
           "16x12 to 7x7, without antialias, and to 12x12")

@check("resize", "299 pixels")
def resize_default():
    def work():
        start = time.process_time()
        return fid.resize_tf1(randn(1, 1, 4, 4))[:, :, ::23, ::23], time.process_time() - start
    got, seconds = student(work)
    close(got, slow_resize(randn(1, 1, 4, 4).double(), 299, 23), "the size is 299 if it is not given")
    ok(seconds < 1, f"no loop over pixels: one small image took {seconds:.1f} seconds")
