"""Real images at every resolution, and the order in which a training sees them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity

from coconv_surgery.generation.growth import Growth
from coconv_surgery.layers.arguments import whole_numbers
from coconv_surgery.zoo.progan import resolution_index

Request = tuple[int, int]

# Those of eight bits a colour; conversion would cut the others off.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class GrowingImages(Dataset[torch.Tensor]):
    """Images by number and resolution: smaller ones are means over squares, rounded, as ProGAN's data sets have them.

    Args:
        resolution: The largest side that is asked for.
        colours: 3, or 1 for grey images.

    Raises:
        ValueError: If ``resolution`` is not 4, 8, …, 1024, or ``colours`` not 1 or 3.
    """

    def __init__(self, resolution: int, colours: int = 3) -> None:
        resolution_index(resolution)
        if colours not in (1, 3):
            raise ValueError(f"colours={colours!r} must be 3, or 1 for grey images")
        self.resolution, self.colours = resolution, colours

    def __len__(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        """An image as it is stored."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        raise NotImplementedError

    def __getitem__(self, request: Request) -> torch.Tensor:
        """Read an image.

        Args:
            request: Its number, and the side that it is wanted at.

        Returns:
            ``(colours, side, side)`` of unsigned bytes.

        Raises:
            ValueError: If the image cannot be read, has more than eight bits a colour, or is not square with the side
                of the data set or a multiple of it; or if it is asked for larger than that.
        """
        index, side = request
        if side > self.resolution:
            raise ValueError(f"{side}×{side} pixels are asked for, of images for {self.resolution}×{self.resolution}")
        try:
            picture = self.picture(index)
            if picture.mode not in _MODES:
                raise ValueError(f"its pixels are of the kind {picture.mode!r}: convert it to eight bits a colour")
            picture = picture.convert("RGB" if self.colours == 3 else "L")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error}") from error
        width, height = picture.size
        if width != height or width % self.resolution:
            raise ValueError(
                f"{self.name(index)} has {width}×{height} pixels: resolution={self.resolution} takes squares of that "
                "side, or of a multiple. Resize the images, or give crop=(top, left, height, width)"
            )
        pixels = np.asarray(picture.reduce(width // side)).reshape(side, side, self.colours)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class FolderImages(GrowingImages):
    """The images of a folder and of all folders in it, sorted by path; hidden files are left out.

    Photographs are turned as they say that they are to be, and what is transparent has the colour that is stored.

    Args:
        root: The folder.
        resolution: As of :class:`GrowingImages`.
        colours: As of :class:`GrowingImages`.
        crop: Top, left, height and width of the part that is used. For the aligned images of CelebA (178×218), the
            reference implementation takes ``(57, 25, 128, 128)``.

    Raises:
        ValueError: If the folder has no images, or ``crop`` is not four numbers.
        FileNotFoundError: If there is no such folder.
    """

    def __init__(self, root: str | Path, resolution: int, colours: int = 3, crop: Sequence[int] | None = None) -> None:
        super().__init__(resolution, colours)
        if not Path(root).is_dir():
            raise FileNotFoundError(f"root={str(root)!r}: there is no such folder")
        found = (path for path in Path(root).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        self.paths = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
        if not self.paths:
            raise ValueError(f"{root} has no images ({', '.join(IMG_EXTENSIONS)})")
        form = "must be the top, left, height and width of what is used"
        self.crop = None if crop is None else whole_numbers(crop, "crop", form, lengths=[4], at_least=0)
        if self.crop is not None and 0 in self.crop[2:]:
            raise ValueError(f"crop={self.crop} {form}: nothing is left")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def picture(self, index: int) -> Image.Image:
        """An image as it is stored, cropped."""
        picture: Image.Image = ImageOps.exif_transpose(Image.open(self.paths[index]))
        if self.crop is None:
            return picture
        top, left, height, width = self.crop
        if top + height > picture.height or left + width > picture.width:
            raise ValueError(f"it has {picture.width}×{picture.height} pixels, and crop={self.crop} reaches out of it")
        return picture.crop((left, top, left + width, top + height))

    def name(self, index: int) -> str:
        """The path of an image."""
        return str(self.paths[index])


class CIFAR10Images(GrowingImages):
    """CIFAR-10's images as they were published: the archive for Python, unpacked or not. Nothing is downloaded.

    Args:
        root: The folder that holds ``cifar-10-batches-py``, or ``cifar-10-python.tar.gz``, which is unpacked then.
        resolution: As of :class:`GrowingImages`; 32, or less.
        train: Whether to take the 50,000 images for training rather than the 10,000 for tests.

    Raises:
        ValueError: If they are not there, or damaged.
    """

    def __init__(self, root: str | Path, resolution: int = 32, train: bool = True) -> None:
        super().__init__(resolution)
        archive = Path(root) / CIFAR10.filename
        try:
            # Where the archive is whole, "download" unpacks it and gets nothing.
            unpack = not (Path(root) / CIFAR10.base_folder).is_dir() and check_integrity(str(archive), CIFAR10.tgz_md5)
            self.pixels = CIFAR10(str(root), train=train, download=unpack).data
        except RuntimeError as error:
            raise ValueError(
                f"{root} does not hold CIFAR-10, or not all of it: get {CIFAR10.filename} from {CIFAR10.url} and put "
                f"it there, or the folder {CIFAR10.base_folder} that is in it"
            ) from error

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def picture(self, index: int) -> Image.Image:
        """An image as it is stored."""
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        """The number of an image."""
        return f"CIFAR-10's image {index}"


class GrowingBatches(Sampler[list[Request]]):
    """Batches of a growing network: what they are depends on the images seen before, and on nothing else.

    All images are seen in an order of chance before any is seen again. Of every batch, a process gets each so many-th
    image, and a multiple of four, so that those which the discriminator looks at together are the same with any number
    of processes.

    Args:
        growth: Sizes of the batches and of the images.
        count: Number of images.
        seed: Of the orders.
        rank: Index of this process.
        world: Number of processes.
        seen: Real images seen before.

    Raises:
        ValueError: If there are no images, or a batch cannot be shared out evenly.

    >>> growth = Growth(resolution=8, images=12, stabilise=4, fade=0, batches={4: 4, 8: 2})
    >>> [[side for _, side in batch] for batch in GrowingBatches(growth, 6)]
    [[4, 4, 4, 4], [8, 8], [8, 8], [8, 8], [8, 8]]
    """

    sampler = None  # where mmengine's hooks look for one to tell the epoch to

    def __init__(self, growth: Growth, count: int, seed: int = 0, rank: int = 0, world: int = 1, seen: int = 0) -> None:
        for side in {phase.resolution for phase in growth.phases}:
            if world > 1 and growth.batches[side] % (4 * world):
                raise ValueError(
                    f"batches[{side}]={growth.batches[side]} cannot be shared among {world} processes: each takes a "
                    "multiple of 4 images"
                )
        self.growth, self.count, self.seed, self.rank, self.world, self.seen = growth, count, seed, rank, world, seen

    def __len__(self) -> int:
        """How many batches remain."""
        return self.growth.steps(self.seen)

    def __iter__(self) -> Iterator[list[Request]]:
        """Numbers and sides of images, batch by batch."""
        epoch, order = -1, torch.empty(0)
        for seen, step in self.growth.walk(self.seen):
            batch = []
            for position in range(seen + self.rank, seen + step.batch, self.world):
                if position // self.count != epoch:
                    epoch = position // self.count
                    order = torch.randperm(self.count, generator=seeded(self.seed, epoch))
                batch.append((int(order[position % self.count]), step.resolution))
            yield batch


def seeded(*numbers: int) -> torch.Generator:
    """A generator of random numbers on the CPU that depends on some numbers alone.

    >>> a, b, c = (torch.rand(1, generator=seeded(0, n)).item() for n in (1, 1, 2))
    >>> a == b, a == c
    (True, False)
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]) >> 1)
