"""Images at every resolution, and the order in which they come."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from coconv_surgery.generation.growth import Growth
from coconv_surgery.generation.images import CIFAR10Images, FolderImages, GrowingBatches

GROWTH = Growth(resolution=16, images=150, stabilise=24, fade=20, batches={4: 8, 8: 8, 16: 4})


@pytest.fixture
def noise(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "inner").mkdir()
    for name, image in zip(("b.png", "inner/c.PNG", "a.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path, pixels[[2, 0, 1]]


@pytest.mark.parametrize("side", [4, 8, 16])
def test_smaller_images_are_rounded_means_over_squares(noise, side):
    root, pixels = noise
    data = FolderImages(root, 16)
    assert len(data) == 3
    for index, image in enumerate(pixels.astype(float)):
        means = image.reshape(side, 16 // side, side, 16 // side, 3).mean((1, 3))
        found = data[index, side].permute(1, 2, 0).numpy()
        assert np.abs(found - means).max() <= 0.51
    assert data[0, side].dtype == torch.uint8


def test_grey_images_have_one_channel(noise):
    assert FolderImages(noise[0], 16, colours=1)[0, 8].shape == (1, 8, 8)


def test_a_crop_is_taken_before_anything_else(tmp_path):
    pixels = np.arange(20 * 12 * 3, dtype=np.uint8).reshape(20, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    found = FolderImages(tmp_path, 8, crop=(5, 2, 8, 8))[0, 8]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels[5:13, 2:10])


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ((20, 16), {}, r"a.png has 20×16 pixels: resolution=16 takes squares .* or give crop="),
        ((24, 24), {}, "a.png has 24×24 pixels: resolution=16 takes squares"),
        ((8, 8), {}, "a.png has 8×8 pixels: resolution=16"),
        ((16, 16), {"crop": (4, 0, 16, 16)}, r"a.png cannot be read: it has 16×16 .* reaches out of it"),
    ],
)
def test_an_image_of_a_wrong_size_is_named_at_whatever_side_it_is_asked_for(tmp_path, size, arguments, message):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        FolderImages(tmp_path, 16, **arguments)[0, 4]


@pytest.mark.parametrize("mode", ["I;16", "F", "I"])
def test_an_image_of_more_than_eight_bits_is_refused(tmp_path, mode):
    Image.new(mode, (16, 16)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=f"deep.tif cannot be read: its pixels are of the kind '{mode}': convert it"):
        FolderImages(tmp_path, 16)[0, 4]


def test_a_damaged_image_is_named(noise):
    root, _ = noise
    whole = (root / "a.png").read_bytes()
    (root / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.png cannot be read: image file is truncated"):
        FolderImages(root, 16)[0, 16]


def test_hidden_files_and_folders_with_the_name_of_an_image_are_left_out(noise):
    root, _ = noise
    (root / "folder.png").mkdir()
    (root / "._a.png").write_bytes(b"not an image")
    assert len(FolderImages(root, 16)) == 3


def test_a_photograph_is_turned_as_it_says(tmp_path):
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))  # above, until it is turned
    exif = picture.getexif()
    exif[0x0112] = 3  # by 180 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    found = FolderImages(tmp_path, 16)[0, 16]
    assert found[:, :8].max() == 0
    assert found[:, 8:].min() == 255


def test_an_image_is_not_enlarged(noise):
    with pytest.raises(ValueError, match="32×32 pixels are asked for, of images for 16×16"):
        FolderImages(noise[0], 16)[0, 32]


def test_a_crop_of_nothing_is_named(noise):
    with pytest.raises(ValueError, match=r"crop=\(0, 0, 0, 8\) .*: nothing is left"):
        FolderImages(noise[0], 16, crop=(0, 0, 0, 8))


def test_an_empty_folder_and_none_at_all_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no images \(\.jpg"):
        FolderImages(tmp_path, 16)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        FolderImages(tmp_path / "none", 16)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """CIFAR-10 in miniature, in the form it was published in: pickled batches in an archive, with their checksums."""
    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng, sums = np.random.default_rng(0), {}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123")}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    archive = tmp_path / "data" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return archive.parent, folder


def test_cifar_10_is_read_from_its_archive_and_from_its_folder(published):
    root, made = published
    pixels = pickle.loads((made / "data_batch_1").read_bytes())["data"].reshape(4, 3, 32, 32)
    for _ in range(2):  # unpacked by now
        data = CIFAR10Images(root)
        assert len(data) == 20
        assert np.array_equal(data[0, 32].numpy(), pixels[0])
        assert data[1, 4].shape == (3, 4, 4)
    assert len(CIFAR10Images(root, train=False)) == 4


def test_cifar_10_that_is_not_there_or_damaged_is_named_and_not_downloaded(published, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", None)
    root, _ = published
    with pytest.raises(ValueError, match=r"does not hold CIFAR-10, or not all of it: get cifar-10-python.tar.gz from"):
        CIFAR10Images(tmp_path)
    (root / CIFAR10.filename).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="does not hold CIFAR-10"):
        CIFAR10Images(root)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**32))
def test_every_image_is_seen_before_any_is_seen_again(count, seed):
    seen = [index for batch in GrowingBatches(GROWTH, count, seed) for index, _ in batch]
    for first in range(0, len(seen) - count + 1, count):
        assert sorted(seen[first : first + count]) == list(range(count))


@settings(deadline=None)
@given(st.sampled_from((2, 4, 8)), st.integers(1, 50))
def test_processes_share_the_batches_of_one(world, count):
    growth = Growth(resolution=8, images=900, stabilise=160, fade=240, batches={4: 32, 8: 64})
    whole = list(GrowingBatches(growth, count))
    shares = [list(GrowingBatches(growth, count, rank=rank, world=world)) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [request for together in zip(*parts, strict=True) for request in together] == batch


@given(st.integers(0, 25))
def test_batches_go_on_where_they_stopped(stop):
    whole = list(GrowingBatches(GROWTH, 20, seed=3))
    seen = sum(map(len, whole[:stop]))
    rest = GrowingBatches(GROWTH, 20, seed=3, seen=seen)
    assert list(rest) == whole[stop:]
    assert len(rest) == len(whole[stop:])


def test_batches_have_the_sizes_and_sides_of_the_schedule():
    found = [(len(batch), {side for _, side in batch}) for batch in GrowingBatches(GROWTH, 20)]
    assert found == [(step.batch, {step.resolution}) for _, step in GROWTH.walk()]


@pytest.mark.parametrize(
    ("batch", "world"),
    [(8, 3), (12, 2), (4, 2)],  # 2⅔, 6 and 2 images each: none can be grouped by four
)
def test_a_batch_that_cannot_be_shared_is_named(batch, world):
    growth = Growth(resolution=4, images=100, batches={4: batch})
    with pytest.raises(ValueError, match=rf"batches\[4\]={batch} cannot be shared among {world} processes"):
        GrowingBatches(growth, 20, world=world)
