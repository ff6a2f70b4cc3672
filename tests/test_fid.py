"""fid.py against independent implementations: scipy, torchmetrics, pytorch-fid, torch-fidelity, closed forms, loops."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torchvision.models import inception_v3

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fid  # noqa: E402


def gaussian(rng, n, d, shift=0.0):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d ** 0.5 + shift


def fit(x):
    return x.mean(0), np.cov(x, rowvar=False)


def by_sqrtm(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


# --- distances --------------------------------------------------------------------------------------------------------

def test_frechet_distance_equals_scipy_sqrtm():
    rng = np.random.default_rng(0)
    a, b = fit(gaussian(rng, 500, 64)), fit(gaussian(rng, 400, 64, 0.3))
    assert fid.frechet_distance(*a, *b) == pytest.approx(by_sqrtm(*a, *b), rel=1e-6)
    assert fid.frechet_distance(*b, *a) == pytest.approx(fid.frechet_distance(*a, *b), rel=1e-9)


def test_frechet_distance_equals_pytorch_fid_and_torch_fidelity():
    rng = np.random.default_rng(1)
    a, b = fit(gaussian(rng, 500, 64)), fit(gaussian(rng, 400, 64, 0.3))
    ours = fid.frechet_distance(*a, *b)
    score = pytest.importorskip("pytorch_fid.fid_score")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    # both predate the scipy that removed sqrtm's `disp`; give them the pair that they unpack
    sqrtm, patch = scipy.linalg.sqrtm, pytest.MonkeyPatch()
    patch.setattr(scipy.linalg, "sqrtm", lambda m, disp=True: sqrtm(m) if disp else (sqrtm(m), 0.0))
    with patch.context():
        assert ours == pytest.approx(score.calculate_frechet_distance(*a, *b), rel=1e-6)
    patch.undo()
    stat = [{"mu": mu, "sigma": sigma} for mu, sigma in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*stat, False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_of_diagonal_covariances_has_a_closed_form():
    rng = np.random.default_rng(2)
    mu1, mu2, s1, s2 = rng.normal(size=20), rng.normal(size=20), rng.random(20), rng.random(20)
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 ** 0.5 - s2 ** 0.5) ** 2).sum()
    assert fid.frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("images, dimensions", [(500, 64), (40, 128), (100, 600)])
def test_frechet_distance_to_itself_is_zero(images, dimensions):
    a = fit(10 * gaussian(np.random.default_rng(3), images, dimensions))
    assert fid.frechet_distance(*a, *a) < 1e-6


def test_frechet_distance_with_fewer_images_than_dimensions():
    rng = np.random.default_rng(4)
    a, b = fit(gaussian(rng, 60, 128)), fit(gaussian(rng, 50, 128, 0.1))
    assert np.linalg.matrix_rank(a[1]) < 128
    assert fid.frechet_distance(*a, *b) == pytest.approx(by_sqrtm(*a, *b), rel=1e-3)


def test_inception_score():
    logits = torch.randn(230, 17, generator=torch.Generator().manual_seed(0)) * 2
    probs = logits.softmax(1)
    scores = []
    for start in range(0, 230, 100):     # splits of 100, 100 and 30: the last one is short and counts, as in ADM
        p = probs[start:start + 100].double().numpy()
        scores.append(np.exp(np.mean([sum(v * np.log(v / q) for v, q in zip(row, p.mean(0))) for row in p])))
    assert fid.inception_score(probs, split=100) == pytest.approx(np.mean(scores), rel=1e-9)
    assert fid.inception_score(torch.eye(8), split=100) == pytest.approx(8)       # sure and varied: zeros in p log p
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = isc.isc_features_to_metric(logits[:200], splits=2, shuffle=False)["inception_score_mean"]
    assert fid.inception_score(probs[:200], split=100) == pytest.approx(theirs, rel=1e-6)


def test_precision_recall():
    g = torch.Generator().manual_seed(0)
    reference, samples = torch.randn(150, 8, generator=g), torch.randn(130, 8, generator=g) * 0.7 + 0.2
    a, b = reference.double().numpy(), samples.double().numpy()

    def inside(points, centres):         # loops over the definition
        radii = [sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[2] for i, c in enumerate(centres)]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points])

    ours = fid.precision_recall(reference, samples, block=37)
    assert ours == pytest.approx((inside(b, a), inside(a, b)), rel=1e-12)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1 and ours[0] != ours[1]
    assert fid.precision_recall(reference, reference) == (1.0, 1.0)
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = prc.calculate_precision_recall_full(samples.double(), reference.double())
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 11, 40)])
def test_psnr_and_ssim_equal_torchmetrics(shape):
    metrics = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=g)
    y = (x + 0.1 * torch.randn(shape, generator=g)).clamp(0, 1)
    for scale in (1.0, 255.0):
        ours = fid.psnr(scale * x, scale * y, data_range=scale), fid.ssim(scale * x, scale * y, data_range=scale)
        for i in range(len(x)):
            pair = scale * x[i:i + 1], scale * y[i:i + 1]
            assert ours[0][i].item() == pytest.approx(metrics.peak_signal_noise_ratio(*pair, data_range=scale).item(), abs=1e-4)
            theirs = metrics.structural_similarity_index_measure(*pair, data_range=scale).item()
            assert ours[1][i].item() == pytest.approx(theirs, abs=2e-5)
    assert fid.ssim(x, x).tolist() == pytest.approx([1.0] * len(x))
    assert torch.isinf(fid.psnr(x, x)).all()


def test_statistics_are_streamed_and_in_the_layout_of_adm():
    rng = np.random.default_rng(5)
    pool, spatial = gaussian(rng, 230, 12, 3.0), gaussian(rng, 230, 7)
    statistics = fid.Statistics()
    for start in range(0, 230, 64):
        statistics.add(*(torch.from_numpy(v[start:start + 64]) for v in (pool, spatial, rng.random((230, 4)))))
    arrays = statistics.reference(keep=100)
    for name, expected in zip(("mu", "sigma", "mu_s", "sigma_s"), (*fit(pool), *fit(spatial))):
        np.testing.assert_allclose(arrays[name], expected, rtol=1e-9, atol=1e-12)
    assert arrays["count"] == 230 and arrays["pool"].shape == (100, 12)


# --- Inception --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception_cache(tmp_path_factory):
    """TORCH_HOME with a file of the right name and shapes and random values, and the beginning of its SHA-256."""
    home = tmp_path_factory.mktemp("torch_home")
    path = home / "hub" / "checkpoints" / fid.INCEPTION_URL.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)     # features neither vanish nor explode
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    net.fc.bias.data.normal_()                               # large, so that using it would show
    torch.save(net.state_dict(), path)
    return home, path, hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def settings(tmp_path, **change):
    preset = {"out": str(tmp_path), "device": "cpu", **change}
    return fid.Settings(**preset)


def load_inception(inception_cache, monkeypatch, tmp_path, input="tf"):
    home, _, sha = inception_cache
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(fid, "INCEPTION_SHA256", sha)
    return fid.feature_network(settings(tmp_path, features="inception", inception_input=input), {}, "cpu")[0]


def photos(n, height, width):
    g = torch.Generator().manual_seed(7)
    coarse = torch.rand(n, 3, 6, 5, generator=g)
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") + 0.1 * torch.rand(n, 3, height, width, generator=g)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 48), (320, 300)])
def test_inception_features_equal_torch_fidelity(inception_cache, monkeypatch, tmp_path, size):
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    net = load_inception(inception_cache, monkeypatch, tmp_path)
    theirs = extractor.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_cache[1]))
    x = photos(2, *size)
    pool, spatial, probs = net.features(x)
    expected, logits = theirs(x)
    assert (pool - expected).abs().max() < 1e-4 * expected.abs().max() and expected.std() > 0.01
    assert (probs - logits.softmax(1)).abs().max() < 1e-4
    # the spatial features, read off the other implementation's own branch: channels last varies fastest (N, H, W, C)
    caught = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: caught.append(out))
    theirs(x)
    expected = np.transpose(caught[0][:, :7].numpy(), (0, 2, 3, 1)).reshape(2, -1)
    assert spatial.shape == (2, 2023) and np.abs(spatial.numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@torch.no_grad()
def test_inception_features_equal_pytorch_fid(inception_cache, monkeypatch, tmp_path):
    inception = pytest.importorskip("pytorch_fid.inception")
    state = torch.load(inception_cache[1], weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: state)
    theirs = inception.InceptionV3().eval()
    x = photos(2, 64, 80)
    expected = theirs(x / 255)[0].flatten(1)
    pool = load_inception(inception_cache, monkeypatch, tmp_path, "pytorch-fid").features(x)[0]
    assert (pool - expected).abs().max() < 1e-4 * expected.abs().max()
    tf = load_inception(inception_cache, monkeypatch, tmp_path).features(x)[0]
    assert (tf - expected).abs().max() > 1e-3 * expected.abs().max()      # the switch does something


def test_inception_weights_missing_or_damaged_is_one_clear_line(inception_cache, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(inception_cache[0]))
    with pytest.raises(SystemExit) as stop:      # the real hash: random weights must not pass for Inception's
        fid.feature_network(settings(tmp_path, features="inception"), {}, "cpu")
    assert "6726825d" in str(stop.value) + capsys.readouterr().err
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")   # nobody listens
    with pytest.raises(SystemExit) as stop:
        fid.feature_network(settings(tmp_path, features="inception"), {}, "cpu")
    assert str(tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth") in str(stop.value) + capsys.readouterr().err


# --- sources ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_pieces(tmp_path, save):
    x = np.random.default_rng(0).integers(0, 256, (23, 6, 5, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", arr_0=x, meta=np.array(json.dumps({"sampler": "euler"})))
    source = fid.NpzSource(tmp_path / "a.npz", 100)
    got = torch.cat(list(source.batches(4, "x"))).permute(0, 2, 3, 1).numpy()
    assert (got == x).all() and source.meta == {"sampler": "euler"}
    few = fid.NpzSource(tmp_path / "a.npz", 5)
    assert (torch.cat(list(few.batches(4, "x"))).permute(0, 2, 3, 1).numpy() == x[[0, 4, 9, 13, 18]]).all()
    assert few.key != source.key


def test_folder_names_what_is_wrong(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("b/1.png", 20), ("a/2.png", 20)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(tmp_path / name)     # grey
    source = fid.open_source(tmp_path, settings(tmp_path), {})
    (batch,) = source.batches(10, "x")
    assert batch.shape == (2, 3, 20, 20)
    assert (batch[0].permute(1, 2, 0).numpy() == np.array(Image.open(tmp_path / "a/2.png").convert("RGB"))).all()
    Image.fromarray(rng.integers(0, 256, (30, 26, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(SystemExit):
        list(fid.open_source(tmp_path, settings(tmp_path), {}).batches(10, "x"))
    source = fid.open_source(tmp_path, settings(tmp_path, image_size=20), {})
    assert next(source.batches(10, "x")).shape == (3, 3, 20, 20)
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        list(fid.open_source(tmp_path, settings(tmp_path), {}).batches(10, "x"))
    assert "d.png" in str(stop.value)


class Toy(torch.nn.Module):
    """Features that are quick and known: 2x2 average-pooled pixels."""

    def features(self, images):
        pool = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return pool, pool[:, :5], pool.softmax(1)


def test_adm_reference_statistics_are_used_and_references_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    stored = {"mu": np.ones(12), "sigma": np.eye(12), "mu_s": np.zeros(5), "sigma_s": 2 * np.eye(5)}
    np.savez(tmp_path / "adm.npz", arr_0=x, **stored)
    np.savez(tmp_path / "only_statistics.npz", **stored)
    source, s = fid.NpzSource(tmp_path / "adm.npz", 100), settings(tmp_path, features="inception")
    got = fid.reference_statistics(source, Toy(), "net", s, "cpu")
    assert all((got[k] == v).all() for k, v in stored.items()) and got["pool"].shape == (40, 12) and "count" not in got
    bare = fid.reference_statistics(fid.NpzSource(tmp_path / "only_statistics.npz", 100), Toy(), "net", s, "cpu")
    assert fid.compare(fid.gather(source, Toy(), s, "cpu", "x"), bare, "abcde", "cpu")["d"] is None       # no images, no precision
    # statistics of other features than those stored are computed, kept, and read again without the network
    mini = settings(tmp_path)
    first = fid.reference_statistics(source, Toy(), "net", mini, "cpu")
    np.testing.assert_allclose(first["mu"], Toy().features(torch.from_numpy(x).permute(0, 3, 1, 2))[0].mean(0), rtol=1e-6)
    again = fid.reference_statistics(source, None, "net", mini, "cpu")
    assert all((first[k] == again[k]).all() for k in first)
    with pytest.raises(AttributeError):          # another network is another key: it must be asked
        fid.reference_statistics(source, None, "other net", mini, "cpu")


# --- tokenizers -------------------------------------------------------------------------------------------------------

class Posterior:
    def __init__(self, x):
        self.mean = x

    def mode(self):
        return self.mean

    def sample(self, noise):
        return self.mean + 0.1 * noise


class Identity:
    def __init__(self, noise=0.0):
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    def encode(self, x):
        return Posterior(x)

    def decode(self, z):
        return z + self.noise * torch.randn(z.shape, generator=self.generator)


def test_tokenizer_scores_and_noise_worsens_every_one(tmp_path):
    images, s = photos(60, 16, 16), settings(tmp_path, batch_size=25)
    source = fid.Source(list(images), "toy", 100, "toy")
    perfect, real = fid.score_tokenizer(Identity(), source, Toy(), s, "cpu")
    assert perfect["rFID"] < 1e-6 and perfect["PSNR"] == float("inf") and perfect["SSIM"] == pytest.approx(1)
    assert perfect["LPIPS"] is None and real.count == 60
    scores = [fid.score_tokenizer(Identity(noise), source, Toy(), s, "cpu")[0] for noise in (0.02, 0.1, 0.4, 1.0)]
    assert all(a["rFID"] < b["rFID"] and a["PSNR"] > b["PSNR"] and a["SSIM"] > b["SSIM"] for a, b in zip(scores, scores[1:]))
    sampled = fid.score_tokenizer(Identity(), source, Toy(), settings(tmp_path, posterior="sample"), "cpu")[0]
    assert sampled["PSNR"] == pytest.approx(26, abs=1)       # noise 0.1 of a range of 2: 20 log10(2 / 0.1) = 26 dB


def test_noise_raises_every_distance_monotonically(tmp_path):
    torch.manual_seed(0)
    net, s, x = fid.ScoreNet(10).eval().requires_grad_(False), settings(tmp_path), photos(500, 32, 32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def source(level):
        return fid.Source(list((x + level * noise).round().clamp(0, 255).to(torch.uint8)), "toy", 1000, "toy")

    reference = fid.gather(source(0), net, s, "cpu", "x").reference()
    scores = [fid.compare(fid.gather(source(level), net, s, "cpu", "x"), reference, ("FID", "sFID", "IS", "p", "r"), "cpu")
              for level in (0, 5, 15, 40, 100)]
    assert scores[0]["FID"] < 1e-6 and scores[0]["sFID"] < 1e-6 and scores[0]["p"] == scores[0]["r"] == 1
    for name in ("FID", "sFID"):
        assert all(a[name] < b[name] for a, b in zip(scores, scores[1:])), name


# --- uniformity -------------------------------------------------------------------------------------------------------

def test_uniformity_measures_equal_loops():
    d = np.random.default_rng(0).random(60)
    points = np.zeros((60, 2))
    got = fid.uniformity(points, d)
    assert got["gini"] == pytest.approx(sum(abs(a - b) for a in d for b in d) / (2 * 60 ** 2 * d.mean()), rel=1e-9)
    assert got["density cv"] == pytest.approx(np.sqrt(((d - d.mean()) ** 2).mean()) / d.mean(), rel=1e-9)
    assert got["normalized entropy"] == pytest.approx(-sum(p * np.log2(p) for p in d / d.sum()) / np.log2(60), rel=1e-9)
    even = fid.uniformity(points, np.full(60, 3.0))
    assert list(even.values()) == pytest.approx([0, 0, 1], abs=1e-12)


def test_uniformity_of_a_gaussian_has_a_closed_form_and_orders_shapes():
    rng, n = np.random.default_rng(0), 3000
    normal, square = rng.normal(size=(n, 2)), rng.random((n, 2))
    # half the points in a wide cloud, half in a narrow one far off: two very different densities
    mixture = np.concatenate([6 * rng.normal(size=(n // 2, 2)), rng.normal(size=(n - n // 2, 2)) + 40])
    got = fid.uniformity(normal)
    # A KDE of bandwidth h sees N(0, 1 + h^2): at points of N(0, 1) its values are c U^a, U uniform, a = 1 / (1 + h^2)
    a = 1 / (1 + n ** (-1 / 3))                               # Scott: h = n^(-1/6)
    assert got["density cv"] == pytest.approx(np.sqrt((1 + a) ** 2 / (1 + 2 * a) - 1), rel=0.05)
    assert got["gini"] == pytest.approx(a / (a + 2), rel=0.05)
    assert got["normalized entropy"] == pytest.approx(1 - (np.log(1 + a) - a / (1 + a)) / np.log(n), abs=2e-3)
    scores = [fid.uniformity(p) for p in (square, normal, mixture)]
    assert all(x["density cv"] < y["density cv"] and x["gini"] < y["gini"]
               and x["normalized entropy"] > y["normalized entropy"] for x, y in zip(scores, scores[1:]))


def test_latent_vectors_and_embeddings(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 5, 3, 4)) * np.arange(1, 6)[:, None, None] + 7
    np.save(tmp_path / "latents.npy", z.astype(np.float32))
    got = fid.latent_vectors(tmp_path, seed=0)
    assert got.shape == (300, 5) and np.allclose(got.mean(0), 0, atol=1e-6) and np.allclose(got.std(0), 1)
    # every vector is a position of its own image, up to the normalisation
    index = [np.abs((z.transpose(0, 2, 3, 1).reshape(300, 12, 5)[i] - g)).sum(1).argmin() for i, g in
             enumerate(got * z.std((0, 2, 3)) + z.mean((0, 2, 3)))]
    assert len(set(index)) > 6
    np.save(tmp_path / "latents.npy", np.stack([z, z[..., ::-1]], 1).astype(np.float32))        # (N, 2, d, h, w), as train_dit.py leaves them
    assert (fid.latent_vectors(tmp_path, seed=0) == got).all() and (fid.latent_vectors(tmp_path, seed=1) != got).any()
    torch.save(torch.from_numpy(z[:, :2, 0, 0]), tmp_path / "flat.pt")
    flat = fid.latent_vectors(tmp_path / "flat.pt", seed=0)
    assert np.allclose(np.sort(flat[:, 0]), np.sort(z[:, 0, 0, 0])) and fid.embed(flat, "tsne", 0) is flat      # 2-D: as it is
    pca = fid.embed(got, "pca", 0)
    assert np.allclose(np.sort(np.linalg.eigvalsh(np.cov(got.T)))[-2:], np.sort(pca.var(0, ddof=1)))
    pytest.importorskip("sklearn")
    assert fid.embed(got[:100], "tsne", 0).shape == (100, 2)


# --- tables and the command line --------------------------------------------------------------------------------------

def test_table_puts_the_paper_beside_the_same_setting_only(tmp_path):
    def run(name, features, row, images=10_000, change=(), **meta):
        (tmp_path / name).mkdir()
        setting = {"spec": "f16d32", "vf": "dinov2", "image_size": 256, **fid.ROWS.get(row, ({},))[0], "preset": row, **dict(change)}
        (tmp_path / name / "scores.json").write_text(json.dumps({
            "run": name, "features": features, "network": "",
            "tokenizer": {"values": {"rFID": 0.3, "PSNR": 28.0, "LPIPS": None, "SSIM": 0.8}, "images": 50_000, "reference": "",
                          "posterior": "mode", "settings": setting},
            "samples": {"values": {"FID": 16.1, "sFID": 5, "IS": 100, "precision": 0.7, "recall": 0.6}, "images": images, "source": "",
                        "reference": "", "reference_images": 0, "meta": meta}}))
        return str(tmp_path / name)

    names = [run("same", "inception", "imagenet256", model="B/1", guidance=1.0),
             run("large", "inception", "table2-f16d64-mae", model="XL/1", guidance=1.0),
             run("guided", "inception", "table2-f16d32-none", model="B/1", guidance=2.0),
             run("changed", "inception", "table2-f16d32-none", change={"vf": "sam"}, model="B/1", guidance=1.0),
             run("small", "mini", "imagenet256", model="B/1", guidance=1.0),
             run("system", "inception", "table2-f16d32-dinov2", 50_000, model="XL/1", guidance=6.7, preset="official-800ep")]
    text = fid.table([*names, str(tmp_path / "no scores here")])
    rows = {line.split("|")[1].strip(): line for line in text.split("\n\n")[0].splitlines()}
    assert "f16d32 | dinov2 | 0.3 (0.28) | 28 (27.96) | - (0.096) | 0.8 (0.79) | B/1 | 16.1 (15.82) |" in rows["same"]
    assert "0.3 (0.15)" in rows["large"] and "16.1 (11.69)" in rows["large"]
    assert "0.3 (0.26)" in rows["guided"] and "22.62" not in rows["guided"]
    assert "(0." not in rows["changed"] and "(0." not in rows["small (mini-)"]
    assert "| system | XL/1 | 6.7 | 16.1 (1.35) | 5 (4.15) | 100 (295.3) | 0.7 (0.79) | 0.6 (0.65) | 50000 |" in text
    with pytest.raises(SystemExit):
        fid.table([str(tmp_path / "nothing")])


def cli(*flags, cwd, fails=False):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, str(ROOT / "fid.py"), *flags], cwd=cwd, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1] if fails else done.stdout


def test_command_line_scores_an_npz_against_a_folder(tmp_path):
    x = photos(24, 32, 32).permute(0, 2, 3, 1).numpy()
    meta = {"integrator": "euler", "guidance": 1.5, "labels": "balanced"}
    np.savez(tmp_path / "samples.npz", arr_0=x, arr_1=np.arange(24), meta=np.array(json.dumps(meta)))
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02}.png")
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / "ab"[i % 2] / f"{i:02}.png")
    flags = ("--out", "run", "--samples", "samples.npz", "--reference", "photos", "--data", "data", "--image-size", "32",
             "--steps", "3", "--device", "cpu")
    printed = cli(*flags, cwd=tmp_path)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    values = scores["samples"]["values"]
    assert values["mini-FID"] < 1e-6 and values["mini-precision"] == values["mini-recall"] == 1
    assert scores["samples"]["meta"] == meta and scores["samples"]["images"] == scores["samples"]["reference_images"] == 24
    assert "mini-FID" in printed and "| FID" not in printed and "guidance 1.5" in printed and "photos" in printed
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir() if p.name != "scores.json"}
    assert len(made) == 2                                     # ScoreNet and the reference's statistics
    assert cli(*flags, cwd=tmp_path) == printed
    assert made == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir() if p.name != "scores.json"}
    assert "| run (mini-) | - | 1.5 |" in cli("--table", "run", "nothing", cwd=tmp_path)


def test_command_line_uniformity(tmp_path):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(400, 2)))
    printed = cli("--uniformity", "z.npy", "--out", "run", "--uniformity-seeds", "2", cwd=tmp_path)
    assert "2-D" in printed and "density cv" in printed
    assert Image.open(tmp_path / "run" / "uniformity.png").size == (800, 800)


@pytest.mark.parametrize("flags, word", [
    ((), "train_vae.py"),
    (("--samples", "."), "--data"),
    (("--samples", "one.npz", "--data", "shapes", "--image-size", "32"), "arr_0"),
    (("--samples", "nothing.npz", "--data", "shapes", "--image-size", "32"), "nothing.npz"),
    (("--table", "nothing"), "scores.json"),
    (("--uniformity", "nothing.npy"), "nothing.npy"),
])
def test_mistakes_are_one_clear_line(tmp_path, flags, word):
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    np.savez(tmp_path / "one.npz", mu=np.zeros(3))
    assert word in cli(*flags, "--out", "run", cwd=tmp_path, fails=True)
