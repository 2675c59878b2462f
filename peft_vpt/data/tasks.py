"""The 24 tasks of the paper: groups, classes, sizes, where they come from, prompt lengths."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SpecError


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper (section 4.1, tables 7, 13 and 14; ViT-B/16 for the lengths).

    Args:
        name: Short name, as on the command line.
        title: As in the paper.
        group: "FGVC", "Natural", "Specialized" or "Structured".
        classes: Number of classes.
        train: Training images.
        val: Validation images.
        test: Test images.
        home: Where to get it: the data set's own page, or its authors and title.
        deep: Best prompt length of VPT-deep. The paper's per-task lengths are known from later
            copies only: with them the totals of table 1 come out, but single values are
            unverified.
        shallow: Best prompt length of VPT-shallow, as unverified.
        own_val: Whether val is the data set's own; otherwise it is cut from train.
        metric: What is reported.
    """

    name: str
    title: str
    group: str
    classes: int
    train: int
    val: int
    test: int
    home: str
    deep: int
    shallow: int
    own_val: bool = False
    metric: str = "top1"
    lengths_verified: bool = False


def _fgvc(
    name: str,
    title: str,
    classes: int,
    sizes: tuple[int, int, int],
    lengths: tuple[int, int],
    home: str,
) -> PaperTask:
    own_val = name == "flowers"
    return PaperTask(name, title, "FGVC", classes, *sizes, home, *lengths, own_val=own_val)


def _vtab(
    group: str,
    name: str,
    title: str,
    classes: int,
    test: int,
    lengths: tuple[int, int],
    home: str,
) -> PaperTask:
    return PaperTask(f"vtab-{name}", title, group, classes, 800, 200, test, home, *lengths)


_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_ADAPT = "https://github.com/google-research/task_adaptation"
_CLEVR = "https://cs.stanford.edu/people/jcjohns/clevr/"
_SPRITES = "https://github.com/google-deepmind/dsprites-dataset"
_NORB = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
_N, _S, _T = "Natural", "Specialized", "Structured"
TASKS: tuple[PaperTask, ...] = (
    _fgvc(
        *("cub", "CUB-200-2011", 200, (5394, 600, 5794), (10, 100)),
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    ),
    _fgvc(
        *("nabirds", "NABirds", 555, (21536, 2393, 24633), (50, 50)),
        "https://dl.allaboutbirds.org/nabirds",
    ),
    _fgvc(
        *("flowers", "Oxford Flowers", 102, (1020, 1020, 6149), (5, 100)),
        f"{_OXFORD}/flowers/102/",
    ),
    _fgvc(
        *("dogs", "Stanford Dogs", 120, (10800, 1200, 8580), (100, 100)),
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
    ),
    _fgvc(
        *("cars", "Stanford Cars", 196, (7329, 815, 8041), (200, 100)),
        "Krause et al. 2013, 3D Object Representations for Fine-Grained Categorization; its page "
        "at Stanford is offline",
    ),
    _vtab(
        *(_N, "cifar100", "CIFAR-100", 100, 10000, (10, 100)),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    _vtab(
        *(_N, "caltech101", "Caltech101", 102, 6084, (10, 5)),
        "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    _vtab(_N, "dtd", "DTD", 47, 1880, (10, 1), f"{_OXFORD}/dtd/"),
    _vtab(_N, "flowers102", "Flowers102", 102, 6149, (1, 200), f"{_OXFORD}/flowers/102/"),
    _vtab(_N, "pets", "Pets", 37, 3669, (1, 50), f"{_OXFORD}/pets/"),
    _vtab(_N, "svhn", "SVHN", 10, 26032, (50, 200), "http://ufldl.stanford.edu/housenumbers/"),
    _vtab(
        *(_N, "sun397", "Sun397", 397, 21750, (5, 1)),
        "https://vision.princeton.edu/projects/2010/SUN/",
    ),
    _vtab(
        *(_S, "camelyon", "Patch Camelyon", 2, 32768, (100, 5)),
        "https://patchcamelyon.grand-challenge.org/",
    ),
    _vtab(
        *(_S, "eurosat", "EuroSAT", 10, 5400, (100, 50)),
        "https://github.com/phelber/EuroSAT",
    ),
    _vtab(
        *(_S, "resisc45", "Resisc45", 45, 6300, (10, 50)),
        "Cheng, Han, Lu 2017, Remote Sensing Image Scene Classification (NWPU-RESISC45)",
    ),
    _vtab(
        *(_S, "retinopathy", "Retinopathy", 5, 42670, (1, 10)),
        "https://www.kaggle.com/c/diabetic-retinopathy-detection",
    ),
    _vtab(_T, "clevr-count", "Clevr/count", 8, 15000, (50, 100), _CLEVR),
    _vtab(_T, "clevr-distance", "Clevr/distance", 6, 15000, (200, 200), _CLEVR),
    _vtab(_T, "dmlab", "DMLab", 6, 22735, (100, 100), _ADAPT),
    _vtab(
        *(_T, "kitti", "KITTI/distance", 4, 711, (50, 100)),
        "https://www.cvlibs.net/datasets/kitti/",
    ),
    _vtab(_T, "dsprites-location", "dSprites/location", 16, 73728, (10, 100), _SPRITES),
    _vtab(_T, "dsprites-orientation", "dSprites/orientation", 16, 73728, (50, 100), _SPRITES),
    _vtab(_T, "smallnorb-azimuth", "SmallNORB/azimuth", 18, 12150, (200, 200), _NORB),
    _vtab(_T, "smallnorb-elevation", "SmallNORB/elevation", 9, 12150, (200, 200), _NORB),
)


def paper_task(name: str) -> PaperTask:
    """Return a task of the paper by its short name or its title, in any case.

    Raises:
        SpecError: There is no such task.
    """
    wanted = name.casefold()
    for task in TASKS:
        if wanted in (task.name, task.title.casefold()):
            return task
    known = ", ".join(task.name for task in TASKS)
    raise SpecError(f"paper_task({name!r}): no such task; the paper's are {known}.")
