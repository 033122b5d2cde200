"""The record of an evaluation: its verdicts so far, image by image, and the file from which it
resumes."""

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..attacks.checks import described, whole
from ..attacks.suite import CORRUPTED
from ..errors import UsageError
from ..runs import checkpoint
from ..runs.progress import bar, pieces

UNKNOWN, RIGHT, WRONG = range(3)
SAVE_EVERY = 2.0  # seconds


@dataclass
class Cost:
    """The cost of a stage: images attacked, wall-clock seconds, images passed forward and backward.
    Beside it, how often something went wrong in the attack."""

    images: int = 0
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    bad_gradients: int = 0  # with NaN or infinity, over images and steps
    disputed: int = 0  # misclassified by the twin, not by the model
    invalid: int = 0  # outside ball or box: not counted as broken
    largest: float = 0.0  # distance to x of what counts as broken

    def add(self, other):
        """Adds the cost of another part of the same stage."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "largest" else mine + value)


@dataclass
class Record:
    """Verdicts uint8 [N] (UNKNOWN, RIGHT, WRONG), costs and details of examples by stage.

    A stage that nobody attacked yet is UNKNOWN throughout, and so are its images until they were.
    folder: where `state.safetensors` is kept, if any. key: what the verdicts depend on; a folder of
    another key is refused. examples: float32 [N, ...], the images to begin with, which take the
    first example that broke each; None keeps none.
    """

    count: int
    key: dict = field(default_factory=dict)
    folder: Path | None = None
    examples: np.ndarray | None = None
    verdicts: dict = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    costs: dict = field(default_factory=dict)
    asked: dict = field(default_factory=dict)
    saved: float = 0.0

    def __post_init__(self):
        if whole("count", self.count, 0) < 1:
            raise ValueError("there are no images to evaluate")
        examples = self.examples
        if examples is not None and np.shape(examples)[:1] != (self.count,):
            raise ValueError(
                f"examples has shape {np.shape(examples)}, must be [{self.count}, ...]"
            )
        if not isinstance(examples, (np.ndarray, type(None))):
            raise TypeError(f"examples is {described(examples)}, must be a numpy array")
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            if self._state.exists():
                self._load()

    @property
    def _state(self):
        return Path(self.folder) / "state.safetensors"

    def _load(self):
        tensors, metadata = checkpoint.load(self._state)
        try:
            key, self.asked = {**metadata["key"]}, {**metadata.get("asked", {})}
            self.costs = {name: Cost(**cost) for name, cost in metadata["costs"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{self._state} is not an evaluation's state") from error
        for name in self.key | key:
            theirs, mine = key.get(name), self.key.get(name)
            if theirs != mine:
                raise UsageError(
                    f"{self.folder} has an evaluation with {name} {theirs!r}, this one has "
                    f"{mine!r}: choose another folder (--out)"
                )
        self.details = {name: tensors.pop(name) for name in [*tensors] if "/" in name}
        self.verdicts = tensors

    def stage(self, name):
        """(verdicts, cost) of a stage, made where there is none."""
        self.costs.setdefault(name, Cost())
        unknown = torch.full((self.count,), UNKNOWN, dtype=torch.uint8)
        return self.verdicts.setdefault(name, unknown), self.costs[name]

    def outputs(self, name):
        """(predicted, confidence) of a stage's examples, made where there is none: the class that
        the model takes them for, int32 [N], -1 where it is not known, and its probability there,
        float32 [N]."""
        empty = {
            "predicted": torch.full((self.count,), -1, dtype=torch.int32),
            "confidence": torch.zeros(self.count),
        }
        return tuple(
            self.details.setdefault(f"{name}/{kind}", values) for kind, values in empty.items()
        )

    def broken(self, rows):
        """bool: which images of `rows` an attack has broken, or were wrong without."""
        attacks = [v for name, v in self.verdicts.items() if not name.startswith(CORRUPTED)]
        return torch.stack([verdicts[rows] == WRONG for verdicts in attacks]).any(0)

    def distance(self, name):
        """The distances of a stage that looks for the nearest adversarial point, float64 [N], made
        where there are none: 0 for all images. Infinity is of those where none was found."""
        unknown = torch.zeros(self.count, dtype=torch.float64)
        return self.details.setdefault(f"{name}/distance", unknown)

    def bind(self, name, attack):
        """Refuses to go on with a stage by another attack than it has been begun with."""
        if self.asked.setdefault(name, attack) != attack:
            raise UsageError(f"record has {name} by {self.asked[name]}, must be by {attack}")

    def right(self, name):
        """bool [N]: which images are classified right under a stage (and those before it, in a
        suite). Raises ValueError while any was not attacked."""
        verdicts = self.stage(name)[0]
        if todo := int((verdicts == UNKNOWN).sum()):
            raise ValueError(f"{name}: {todo} of {self.count} images were not attacked yet")
        return verdicts == RIGHT

    def save(self, force=False):
        """Writes the state, at most every SAVE_EVERY seconds unless forced."""
        if self.folder is None or not (force or time.monotonic() - self.saved > SAVE_EVERY):
            return
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        tensors = self.verdicts | self.details
        metadata = {"key": self.key, "asked": self.asked, "costs": costs}
        checkpoint.save(self._state, tensors, metadata)
        self.saved = time.monotonic()

    def keep(self, rows, x_adv):
        """Stores the adversarial examples of `rows`."""
        if self.examples is not None and len(rows):
            self.examples[rows.numpy()] = x_adv.numpy()
            if isinstance(self.examples, np.memmap):
                self.examples.flush()


def open_examples(path, images, begun):
    """The float32 array [N, C, H, W] in the .npy file at `path`, to be written to; made of
    `images`, uint8 or in [0, 1], unless the evaluation has `begun`. float64 images have a float64
    array. Raises ValueError for a file that is not whole then."""
    if not begun:
        part = path.with_suffix(".part")
        dtype = np.float64 if images.dtype == torch.float64 else np.float32
        made = np.lib.format.open_memmap(part, "w+", dtype, tuple(images.shape))
        for first in bar(range(0, len(images), 1024), "examples"):
            made[first : first + 1024] = floating(images[first : first + 1024]).numpy()
        made.flush()
        part.rename(path)
    try:
        whole = np.load(path, mmap_mode="r").shape == tuple(images.shape)
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise UsageError(f"{path}: missing or damaged: choose another folder (--out)")
    return np.load(path, mmap_mode="r+")


def floating(images):
    """Images as models take them, in [0, 1]."""
    return images if images.is_floating_point() else images.float() / 255


def digest(tensors):
    """The first 16 digits of the SHA-256 of the tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        for piece in pieces(tensor):
            total.update(piece)
    return total.hexdigest()[:16]
