"""Images in files: which there are, what becomes of them, and bits that depend on (replica, step) alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from teams import together
from torchvision import transforms

from sparselth.config import Cell, Recipe
from sparselth.data import DATASETS, DatasetSpec, Images, MissingData, folders, load, look, resolve, when
from sparselth.data import streamed as module
from sparselth.data.batches import Batches, Resident
from sparselth.data.files import where
from sparselth.data.streamed import Decoded, Decoder, Looked, Streamed, StreamedBatches, Wanted, opened
from sparselth.engine.dense import init_weights
from sparselth.engine.many import Found, Many
from sparselth.engine.state import Job, State
from sparselth.engine.team import Team
from sparselth.errors import SparselthError, UsageError
from sparselth.models import AvgPool, BatchNorm, Conv, Linear, MaxPool, Model, ReLU
from sparselth.streams import stream
from sparselth.train import accuracies_on_test, fit

SPEC = DatasetSpec(
    name="tiny-pictures",
    title="tiny pictures",
    shape=(3, 32, 28),
    classes=1000,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
    n_train=10**6,
    n_test=10**4,
    folder="tiny",
    pictures=True,
)
SMALL = Model(
    "small",
    SPEC.shape,
    (Conv(4, 3, 1, 2), BatchNorm(), ReLU(), MaxPool(3, 2, 1), AvgPool(), Linear(10)),
    {},
    "",
)
WHO = [Cell(0, "ticket", 1), Cell(0, "reinit", 1), Cell(1, "ticket", 1)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("data")
    pictures.folder(home / "tiny")
    return home


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS.things, SPEC.name, SPEC)


@pytest.fixture
def images(home: Path) -> Images:
    return load(SPEC.name, home)


def test_files_and_classes_are_the_folder_s(images: Images, home: Path) -> None:
    assert (images.spec.n_train, images.spec.n_test, images.spec.classes) == (32, 8, 2)
    assert images.root == home / "tiny"
    assert images.train_images[0] == b"train/n01/n01_0.JPEG"
    for names, labels in (
        (images.train_images, images.train_labels),
        (images.test_images, images.test_labels),
    ):
        assert [pictures.CLASSES[label] for label in labels] == [
            name.split(b"/")[1].decode() for name in names
        ]
        assert all((images.root / name.decode()).is_file() for name in names)
    assert resolve(SPEC.name, home, lambda text: None).digest == images.digest


@pytest.mark.parametrize("shape", [(1, 32, 28), (3, 32), (32, 28, 3)])
def test_files_are_of_three_colours(shape: tuple[int, ...], home: Path) -> None:
    with pytest.raises(SparselthError, match="of tiny-pictures: expected 3 x height x width"):
        folders.images(replace(SPEC, shape=shape), home)


def test_another_file_is_another_data_set(images: Images, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    assert load(SPEC.name, tmp_path).digest == images.digest
    (tmp_path / "tiny" / "val" / "n01" / "n01_0.JPEG").rename(tmp_path / "tiny" / "val" / "n01" / "x.JPEG")
    assert load(SPEC.name, tmp_path).digest != images.digest


def test_what_is_not_there_is_a_line_that_says_where_it_goes(tmp_path: Path) -> None:
    with pytest.raises(MissingData) as missing:
        resolve("imagenet", tmp_path, lambda text: None)
    said = str(missing.value)
    assert f"{tmp_path}/imagenet/train: no such folder; ImageNet cannot be downloaded" in said
    assert f"put its images into {tmp_path}/imagenet/train/CLASS" in said
    assert when(DATASETS["imagenet"], tmp_path, missing.value) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("rm -r tiny/val/n02", "train has the class n02, val has not"),
        ("mkdir tiny/val/n03 tiny/train/n03", "Found no valid file for the classes n03"),
        ("rm -r tiny/val/n01 tiny/val/n02", "tiny/val: has no folder of a class; expected one for each"),
        ("rm tiny/train/n01/*_[1-9]* tiny/train/n02/*_[1-9]*", "has 2 images; expected 8 at least"),
    ],
)
def test_a_folder_that_is_none_is_a_line(changes: str, said: str, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    command, *places = changes.split()
    for place in places:
        for path in tmp_path.glob(place) if command == "rm" else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if command == "mkdir":
            (tmp_path / place).mkdir()
    with pytest.raises(SparselthError, match=said) as error:
        look(SPEC.name, tmp_path)
    assert not isinstance(error.value, MissingData)


@pytest.mark.parametrize("words", ["ls datasets", "doctor"])
def test_where_images_lie_is_said_without_a_list_of_their_files(
    words: str, home: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ImageNet there are 1,331,167."""

    def walked(folder: Path) -> None:
        raise AssertionError(f"{folder} was walked")

    monkeypatch.setattr(folders, "_listed", walked)
    code, out, _ = cli(*words.split(), "--data-dir", str(home))
    (line,) = [line for line in out.splitlines() if line.startswith(SPEC.name)]
    assert code == 0
    assert str(home / "tiny") in line
    assert ("counted when first used" in line) is (words == "doctor")


def test_where_images_should_lie_other_classes_are_noticed(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "tiny", tmp_path / "tiny")
    assert where(SPEC.name, tmp_path) == str(tmp_path / "tiny")
    (tmp_path / "tiny" / "val" / "n03").mkdir()
    with pytest.raises(SparselthError, match="val has the class n03, train has not"):
        where(SPEC.name, tmp_path)


def streamed(images: Images, processes: int = 0, most: int = 0) -> Streamed:
    return Streamed(images, "cpu", 3, most, processes=processes)


def batches(
    images: Images, steps: range, processes: int = 0, augment: str = "crop-flip"
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of 28 training images, so that an epoch is four steps of 7."""
    some = streamed(images, processes).batches(WHO, 7, augment)
    return [some.first(step) for step in steps]


def test_bits_are_those_of_the_step_however_many_decode_and_wherever_training_began(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 5)  # so that a step's images are decoded by several
    straight = batches(images, range(6))
    for other in (batches(images, range(6), processes=2), batches(images, range(2, 6), processes=1)):
        for (x, y), (x_other, y_other) in zip(straight[-len(other) :], other, strict=True):
            assert torch.equal(x, x_other)
            assert torch.equal(y, y_other)
    some = streamed(images).batches(WHO, 7, "crop-flip")
    for step in (5, 1, 2, 2):
        assert torch.equal(some.first(step)[0], straight[step][0])


def test_shares_side_by_side_are_the_batch(images: Images) -> None:
    whole, data = batches(images, range(3, 6)), streamed(images)
    parts = [data.batches(WHO, 7, "crop-flip", share) for share in (slice(0, 3), slice(3, 7))]
    for step, (x, y) in enumerate(whole, 3):
        some = [part.first(step) for part in parts]
        assert torch.equal(torch.cat([x for x, _ in some], 1), x)
        assert torch.equal(torch.cat([y for _, y in some], 1), y)
        assert all(torch.equal(part.labels(step), y) for part in parts)


def test_batches_are_the_files_that_memory_would_give_cut_out_by_torchvision(images: Images) -> None:
    """In the order of `Batches`, each crop drawn from the number of its image."""
    data = streamed(images)
    x, y = batches(images, range(5, 6))[0]
    assert (x.shape, y.shape, x.dtype) == ((3, 7, 3, 32, 28), (3, 7), torch.float32)
    assert x[0].is_contiguous(memory_format=torch.channels_last)
    pixels = np.zeros((32, 3 * 32 * 28), np.uint8)
    resident = Resident(replace(images, train_images=pixels, test_images=pixels[:8], root=None), "cpu", 3)
    places = Batches(resident, WHO, 7).index(5)
    assert torch.equal(y.flatten(), torch.from_numpy(images.train_labels)[places])
    cut = transforms.Compose([transforms.RandomResizedCrop((32, 28)), transforms.RandomHorizontalFlip()])
    numbers = [
        number
        for who in WHO
        for number in torch.randint(
            2**63 - 1, (7,), generator=stream(who.seed, who.arm, who.level, "crops/5", who.draw)
        ).tolist()
    ]
    with torch.random.fork_rng(devices=[]):
        for found, place, number in zip(x.flatten(0, 1), places.tolist(), numbers, strict=True):
            torch.manual_seed(number)
            same_as_file(found, cut(picture(images, images.train_images[place])))
    assert isinstance(data.batches(WHO, 7), StreamedBatches)


def picture(images: Images, name: bytes) -> Image.Image:
    assert images.root is not None
    return Image.open(images.root / name.decode()).convert("RGB")


def same_as_file(found: torch.Tensor, expected: Image.Image) -> None:
    """Scaled by channel, in float64."""
    pixels = torch.from_numpy(np.array(expected)).double().permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (SPEC.mean, SPEC.std))
    torch.testing.assert_close(found.double(), (pixels - mean) / std, rtol=0, atol=2e-6)


def test_without_crops_and_in_evaluations_it_is_the_middle(images: Images) -> None:
    data = streamed(images)
    middle = transforms.Compose([transforms.Resize(37), transforms.CenterCrop((32, 28))])
    x, y = batches(images, range(1), augment="none")[0]
    places = data.batches(WHO, 7).index(0)
    same_as_file(x[2, 6], middle(picture(images, images.train_images[places[-1]])))
    few = streamed(images, 1, most=2)
    for looked, order, names, labels in (
        (data.validation_first(1), data.split(1)[1], images.train_images, images.train_labels),
        (data.training_first(1, 5), data.split(1)[0][:5], images.train_images, images.train_labels),
        (data.test_first(), torch.arange(8), images.test_images, images.test_labels),
        (few.test_first(), torch.tensor([0, 4]), images.test_images, images.test_labels),
    ):
        assert len(looked) == -(-len(order) // 3)
        seen = [(x, int(y)) for some, y_some in looked for x, y in zip(some, y_some, strict=True)]
        assert [label for _, label in seen] == labels[order].tolist()
        for (x, _), place in zip(seen, order.tolist(), strict=True):
            same_as_file(x, middle(picture(images, names[place])))
    x, y = data.shown(torch.tensor([31, 3, 8, 4]))
    assert y.tolist() == [1, 0, 0, 0]
    same_as_file(x[2], middle(picture(images, images.train_images[8])))
    looked = data.validation_first(1)
    whole = [*looked]
    assert torch.equal(looked[1][0], whole[1][0])
    assert isinstance(looked[1:], Looked)
    assert [y.tolist() for _, y in looked[1:]] == [y.tolist() for _, y in whole[1:]]


def test_what_many_networks_look_at_is_decoded_once(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory has room for it; and what they come to is the same."""
    decoded, decode = list[int](), Decoder.__getitem__
    weights = torch.stack([init_weights(SMALL, stream(i, "ticket", 0, "init")) for i in range(3)])

    def counted(self: Decoder, wanted: Wanted) -> Decoded | str:
        decoded.extend(wanted[0])
        return decode(self, wanted)

    def looked() -> list[Found]:
        decoded.clear()
        many = Many(SMALL, streamed(images), 0, "autograd", batches=2)
        lots = [many.training(7), many.test(8)]
        return many.measure(len(weights), lambda i, j: weights[i:j].clone(), lots)

    monkeypatch.setattr(Decoder, "__getitem__", counted)
    found = looked()
    assert len(decoded) == 6 + 7 + 8  # batch norms' statistics, training, test
    monkeypatch.setattr(module, "memory_bytes", lambda: 0)
    assert looked() == found
    assert len(decoded) == 3 + 3 * (6 + 7 + 8)  # and once to know how many the last batch has


def test_nobody_s_generator_is_moved(images: Images) -> None:
    """Dropout draws from it behind the batch: a resumed run begins to decode where another went on."""
    before = torch.get_rng_state()
    for processes in (0, 1):
        batches(images, range(2), processes)
        [*streamed(images, processes).test_first()]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_broken_file_is_a_line_that_names_it(processes: int, images: Images, tmp_path: Path) -> None:
    assert images.root is not None
    shutil.copytree(images.root, tmp_path / "tiny")
    file = tmp_path / "tiny" / "train" / "n02" / "n02_3.JPEG"
    file.write_bytes(file.read_bytes()[:400])
    broken = streamed(replace(images, root=tmp_path / "tiny"), processes)
    with pytest.raises(SparselthError, match=f"{file}: cannot be decoded \\(.*[Tt]runcated") as error:
        [*broken.training_first(0, 28), *broken.validation_first(0)]
    assert len(str(error.value).splitlines()) == 1
    file.unlink()
    with pytest.raises(SparselthError, match=f"{file}: cannot be decoded \\(.*No such file"):
        [*broken.training_first(0, 28), *broken.validation_first(0)]


def test_who_wants_images_in_memory_is_told_so(images: Images) -> None:
    for wants in (lambda data: data.images, lambda data: data.test(), lambda data: data.validation(0)):
        with pytest.raises(SparselthError, match="tiny-pictures: its images stay in files"):
            wants(streamed(images))
    with pytest.raises(UsageError, match="tiny-pictures has files"):
        Streamed(images, "cpu", 3, inputs="norm")
    x, _ = Streamed(images, "cpu", 3, inputs="unit").test_first()[0]
    assert 0 <= x.min() < x.max() <= 1
    assert isinstance(opened(images, "cpu", 3), Streamed)
    assert type(opened(load("mnist5k", Path()), "cpu", 3)) is Resident


def test_a_gpu_s_share_of_the_cores_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 16)
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_STEP_NUM_TASKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (module.loaders("cpu"), module.loaders("cuda")) == (0, 16)
    ranks = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "here"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert module.loaders("cuda") == 4


def test_training_is_resumed_to_the_same_bits(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd: stopped at any step, with processes or without."""
    recipe = Recipe(
        steps=5, lr=0.1, batch_size=9, optimizer="sgd", augment="crop-flip", eval_every=2
    )  # an epoch is three steps

    def trained(processes: int, stop: int | None = None) -> Job:
        data = streamed(images, processes)
        weights = init_weights(SMALL, stream(0, "ticket", 0, "init"))[None]
        job = Job(Cell(0, "ticket", 0), State.start(weights, recipe), SMALL.params.full_mask())
        if stop:
            ask = iter([False] * stop + [True] * 9)
            fit(SMALL, data, [job], recipe, kernels="autograd", should_stop=lambda: next(ask))
            assert 0 < job.state.step < 5
            data = streamed(images, 0)
        fit(SMALL, data, [job], recipe, kernels="autograd")
        assert accuracies_on_test(SMALL, data, [job], "autograd")[0][1] >= 0
        return job

    before = {*active_children()}  # for what an error in a test before holds
    straight = trained(1)
    assert {*active_children()} <= before  # nobody decodes for those who have gone
    for other in (trained(0), trained(1, 2), trained(0, 4)):
        assert torch.equal(other.state.weights, straight.state.weights)
        assert other.state.evaluations == straight.state.evaluations


@pytest.mark.host
@pytest.mark.forks
def test_a_team_trains_on_its_shares_of_the_files(images: Images) -> None:
    """Nine images over two workers; evaluations, too, look at each file once."""
    recipe = Recipe(steps=4, lr=0.1, batch_size=9, optimizer="sgd", augment="crop-flip", eval_every=2)

    def trained(team: Team | None) -> tuple[torch.Tensor, list[float]]:
        weights = init_weights(SMALL, stream(0, "ticket", 0, "init"))[None]
        job = Job(Cell(0, "ticket", 0), State.start(weights, recipe), SMALL.params.full_mask(), team=team)
        data = streamed(images)
        fit(SMALL, data, [job], recipe, kernels="autograd")
        found = [one["validation_loss"] for one in job.state.evaluations]
        return job.state.weights, [*found, *accuracies_on_test(SMALL, data, [job], "autograd")[0]]

    (weights, found), (same, others) = together(trained)
    alone, expected = trained(None)
    assert torch.equal(weights, same)
    assert found == others
    assert torch.allclose(weights, alone, rtol=1e-4, atol=1e-6)
    assert found == pytest.approx(expected, rel=1e-4)
