"""Classifiers in closed form: as a start, as the whole model, and on the tuned features."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import webdataset
from held_out import held_out_temperature
from lightning.pytorch import Callback, LightningDataModule, callbacks
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from tiny import SMALL, plain_sgd, trainer_in
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset, default_collate

from ncfinetune import FineTuner
from ncfinetune.datamodules import Digits
from ncfinetune.heads import classifier_of
from ncfinetune.probes import lda, nearest_simplex, ridge, simplex_etf

FITS = {"ridge": ridge, "lda": lda}


def _clusters(classes: int = 3, each: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes * each) % classes
    means = 2 * torch.randn(classes, width, generator=generator)
    return means[labels] + torch.randn(len(labels), width, generator=generator) + 7, labels


def _data(**options) -> Digits:
    return Digits([0, 1, 2], shots=8, batch_size=5, **options)


def _model(**knobs) -> FineTuner:
    torch.manual_seed(0)
    return FineTuner(3, SMALL, optimizer=plain_sgd, allow_random=True, **knobs)


def _features(model: FineTuner, data: Digits) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_plain_dataloader()]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        return model.eval()._joined(images), labels


@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_head_is_the_probe_at_the_temperature_of_its_left_out_scores(kind: str) -> None:
    features, labels = _clusters()
    weight, bias = classifier_of(kind, zip(features.split(4), labels.split(4), strict=True), 3)
    head = FITS[kind](features, labels, 3)
    expected = head.scores(features) / held_out_temperature(head, labels)
    torch.testing.assert_close(features.double() @ weight.T + bias, expected)


@pytest.mark.parametrize("kind", ["ridge", "lda"])
def test_weights_of_classes_enter_the_closed_form(kind: str, tmp_path: Path) -> None:
    features, labels = _clusters()
    rows = torch.cat([torch.arange(18)[labels == 0][:2], torch.arange(18)[labels > 0]])
    features, labels = features[rows], labels[rows]
    weight, bias = classifier_of(kind, [(features, labels)], 3, "balanced")
    head = FITS[kind](features, labels, 3, class_weight="balanced")
    expected = head.scores(features) / held_out_temperature(head, labels)
    torch.testing.assert_close(features.double() @ weight.T + bias, expected)
    plain, _ = classifier_of(kind, [(features, labels)], 3)
    assert not torch.allclose(plain / plain.norm(), weight / weight.norm(), atol=1e-3)
    model, data = _model(head_init=kind, class_weight=[1.0, 2.0, 5.0]), _data()
    trainer_in(tmp_path, max_epochs=0).fit(model, data)
    inputs, targets = _features(model, data)
    head = FITS[kind](inputs, targets, 3, class_weight=[1.0, 2.0, 5.0])
    assert torch.equal(model.head(inputs).argmax(1), head.scores(inputs).argmax(1))


def test_simplex_head_has_equal_angles_and_decides_for_the_nearest_direction() -> None:
    features, labels = _clusters(classes=4, each=20)
    weight, bias = classifier_of("etf", [(features, labels)], 4)
    gram = weight @ weight.T
    torch.testing.assert_close(gram / gram[0, 0], 4 / 3 * torch.eye(4, dtype=torch.float64) - 1 / 3)
    means = torch.stack([features[labels == label].double().mean(0) for label in range(4)])
    torch.testing.assert_close(means.mean(0) @ weight.T + bias, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
    assert ((features.double() @ weight.T + bias).argmax(1) == labels).double().mean() > 0.8


def test_nearest_simplex_is_nearer_than_others() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64)
    best = nearest_simplex(weight)
    distance = (weight - best).square().sum()
    for seed in range(200):
        frame = simplex_etf(4, 6, seed)
        scale = (frame * weight).sum() / frame.square().sum()
        assert (weight - scale * frame).square().sum() > distance
    for _ in range(20):
        turn = torch.randn(6, 6, dtype=torch.float64)
        turned = best @ torch.linalg.matrix_exp(0.01 * (turn - turn.T))
        assert (weight - turned).square().sum() > distance
    with pytest.raises(ValueError, match="a width of at least num_classes - 1, got num_classes=4 and dim=2"):
        nearest_simplex(weight[:, :2])


@pytest.mark.parametrize("kind", ["ridge", "etf"])
def test_one_image_a_class_gives_small_logits_and_keeps_the_decisions(kind: str) -> None:
    features = torch.eye(3, 5) * torch.tensor([1.0, 2.0, 3.0])[:, None]
    weight, bias = classifier_of(kind, [(features, torch.arange(3))], 3)
    logits = features.double() @ weight.T + bias
    assert logits.argmax(1).tolist() == [0, 1, 2]
    assert logits.std() < 0.5


def test_features_that_say_nothing_give_a_finite_head() -> None:
    weight, bias = classifier_of("ridge", [(torch.ones(6, 4), torch.arange(6) % 3)], 3)
    assert weight.isfinite().all()
    assert bias.isfinite().all()


BOTH_SKIPS = {"skip_from": ["layer2.0", "layer3.0"], "skip_join": "only"}


@pytest.mark.parametrize(
    ("knobs", "cache", "nothing"),
    [
        ({}, "none", "max_epochs"),
        (BOTH_SKIPS, "memory", "max_steps"),
        pytest.param({}, "memory", "max_steps", marks=pytest.mark.slow),
        pytest.param(BOTH_SKIPS, "none", "max_epochs", marks=pytest.mark.slow),
    ],
)
def test_run_of_no_step_is_the_closed_form(knobs: dict, cache: str, nothing: str, tmp_path: Path) -> None:
    model, data = _model(head_init="ridge", cache=cache, **knobs), _data()
    trainer = trainer_in(tmp_path, enable_checkpointing=True, **{nothing: 0})
    trainer.fit(model, data)
    features, labels = _features(model, data)
    head = ridge(features, labels, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            model.head(features) if not knobs else model.head.fc(features),
            (head.scores(features) / held_out_temperature(head, labels)).float(),
            rtol=1e-5,
            atol=1e-5,
        )
    folder = Path(trainer.checkpoint_callback.dirpath)
    again = FineTuner.load_from_checkpoint(folder / "last.ckpt").eval()
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(images), model(images))
    assert (folder / "delta.safetensors").is_file()
    assert trainer.test(model, data, verbose=False)[0]["test/acc"] > 0.5


def test_start_is_made_of_plain_images_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heads = []
    for augmentation in ("plain", "standard"):
        model = _model(head_init="ridge")
        with caplog.at_level("INFO"):
            trainer_in(tmp_path, max_epochs=0).fit(model, _data(augmentation=augmentation))
        heads.append(model.head.weight)
    assert torch.equal(*heads)
    assert "classifier: initialised as ridge of the training images without augmentation" in caplog.text


class Sampled(LightningDataModule):
    """A stranger's: the last third of one data set validates, with other labels, and samplers tell the parts apart."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        features, labels = torch.randn(36, 1, 8, 8), torch.arange(36) % 3
        self.train, self.val = list(range(24)), list(range(24, 36))
        self.images = TensorDataset(features, torch.where(torch.arange(36) < 24, labels, 2 - labels))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 5, sampler=SubsetRandomSampler(self.train))

    def train_plain_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 5, sampler=self.train)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.images, 5, sampler=self.val)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_start_is_of_the_images_that_the_plain_loader_draws(cache: str, tmp_path: Path) -> None:
    data, model = Sampled(), _model(head_init="ridge", cache=cache)
    trainer_in(tmp_path, max_epochs=0).fit(model, data)
    images, labels = (part[:24] for part in data.images.tensors)
    with torch.no_grad():
        features = model.eval()._joined(images)
    head = ridge(features, labels, 3)
    expected = head.scores(features) / held_out_temperature(head, labels)
    torch.testing.assert_close(model.head(features), expected.float(), rtol=1e-4, atol=1e-4)


class Images(IterableDataset):
    """The training images of `Sampled` as a stream."""

    def __iter__(self) -> Iterator:
        torch.manual_seed(0)
        return iter([Sampled().images[index] for index in range(24)])


class Batches(Dataset):
    """The same in batches of six."""

    def __init__(self) -> None:
        self.images = list(Images())

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return default_collate(self.images[6 * index : 6 * index + 6])


class Loaded(LightningDataModule):
    """A stranger's, of one kind of loader."""

    num_classes = 3

    def __init__(self, loader: Callable) -> None:
        super().__init__()
        self.train_dataloader = self.train_plain_dataloader = self.val_dataloader = loader


LOADERS = {
    "stream": lambda: DataLoader(Images(), 5),
    "webdataset": lambda: webdataset.WebLoader(Images(), batch_size=5, num_workers=0),
    "batches": lambda: DataLoader(Batches(), None),
    "list": lambda: list(DataLoader(Images(), 5)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_start_is_of_the_images_of_any_loader(kind: str, tmp_path: Path) -> None:
    heads = []
    for loader in (LOADERS[kind], lambda: DataLoader(list(Images()), 24)):
        model = _model(head_init="ridge")
        trainer_in(tmp_path, max_epochs=0, limit_val_batches=0).fit(model, Loaded(loader))
        heads.append(model.head.weight)
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)
    message = (
        "the cache needs a DataLoader of single images that can be read in any order, got several loaders, a stream, "
        'or a data set that makes its batches; use cache="none"'
    )
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path).fit(_model(cache="memory"), Loaded(LOADERS[kind]))


class OfTheFirst(IterableDataset):
    """Images of which the first process has all, as of a single file that processes divide."""

    def __init__(self, images: TensorDataset) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Any]:
        return iter(()) if dist.is_initialized() and dist.get_rank() else iter(self.images)


class Streamed(Sampled):
    def train_plain_dataloader(self) -> DataLoader:
        return DataLoader(OfTheFirst(self.images), 5)


def test_a_process_whose_part_of_a_stream_is_empty(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            torch.save(pl_module.head.weight.detach(), tmp_path / f"{trainer.world_size}{trainer.global_rank}.pt")

    data = Streamed()
    for spread in ({}, {"strategy": "ddp_fork", "devices": 2}):
        torch.manual_seed(0)
        trainer_in(tmp_path, max_epochs=0, callbacks=[Keep()], **spread).fit(_model(head_init="ridge"), data)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("10", "20", "21"))
    torch.testing.assert_close(first, alone)
    assert torch.equal(first, second)


class Compared(Callback):
    """Compares the head that is validated, and that is saved, with the closed form on the features of that moment."""

    def __init__(self) -> None:
        self.validated: list[bool] = []
        self.saved: list[bool] = []

    def _is_closed(self, model: FineTuner) -> bool:
        features, labels = _features(model, model.trainer.datamodule)
        head = ridge(features, labels, 3)
        return torch.allclose(model.head.weight.double(), head.weight / held_out_temperature(head, labels), 1e-3)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.validated.append(self._is_closed(pl_module))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        training = pl_module.training
        self.saved.append(self._is_closed(pl_module))
        pl_module.train(training)


@pytest.mark.parametrize("validates", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_validated_and_saved_is_refitted(validates: bool, tmp_path: Path) -> None:
    model, seen = _model(train="layer4.0", refit="ridge", head_lr_factor=2), Compared()
    options = {} if validates else {"limit_val_batches": 0}
    callbacks = [seen, ModelCheckpoint(save_top_k=-1)]
    trainer = trainer_in(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=callbacks, **options)
    trainer.fit(model, _data(augmentation="plain"))
    assert seen.saved == [True] * 3
    assert seen.validated == [True] * (3 if validates else 0)


def test_another_run_of_as_many_steps_refits_too(tmp_path: Path) -> None:
    model = _model(train="layer4.0", refit="ridge")
    for run in ("first", "second"):
        seen = Compared()
        trainer = trainer_in(tmp_path / run, enable_checkpointing=True, callbacks=[seen], limit_val_batches=0)
        trainer.fit(model, _data(augmentation="plain"))
        assert seen.saved == [True]


def test_validation_between_steps_is_of_the_refitted_classifier(tmp_path: Path) -> None:
    seen = Compared()
    trainer = trainer_in(tmp_path, val_check_interval=1, accumulate_grad_batches=4, callbacks=[seen])
    trainer.fit(_model(train="layer4.0", refit="ridge"), _data(augmentation="plain"))
    assert seen.validated == [True] * 5  # of 24 images in batches of 5


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}])
def test_training_goes_on_as_if_there_were_no_refit(options: dict, tmp_path: Path) -> None:
    heads: dict[str, list[torch.Tensor]] = {"none": [], "ridge": []}
    models = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            heads[pl_module.refit].append(pl_module.head.weight.detach().clone())

    for refit in ("none", "ridge"):
        models.append(_model(train="layer4.0", refit=refit, head_init="ridge"))
        trainer_in(tmp_path / refit, max_epochs=3, callbacks=[Watch()], **options).fit(models[-1], _data())
    assert all(torch.equal(a, b) for a, b in zip(heads["none"], heads["ridge"], strict=True))
    plain, refitted = (dict(model.named_parameters()) for model in models)
    assert [name for name in plain if not torch.equal(plain[name], refitted[name])] == ["head.weight", "head.bias"]


def test_callbacks_at_the_end_of_an_epoch_see_the_refitted_classifier(tmp_path: Path) -> None:
    seen = []

    class Watch(Compared):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            training = pl_module.training
            seen.append(self._is_closed(pl_module))
            pl_module.train(training)

    trainer = trainer_in(tmp_path, max_epochs=4, check_val_every_n_epoch=2, callbacks=[Watch()])
    trainer.fit(_model(train="layer4.0", refit="ridge"), _data(augmentation="plain"))
    assert seen == [True] * 4


class First(Callback):
    """Keeps the classifier that the first batch trains, as it was before."""

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step == 0:
            self.head = pl_module.head.weight.detach().clone()


def test_another_fit_goes_on_with_the_trained_classifier_and_with_one_that_is_loaded(tmp_path: Path) -> None:
    trained, first = [], First()

    class Last(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            trained.append(pl_module.head.weight.detach().clone())

    model = _model(train="layer4.0", refit="ridge")
    trainer_in(tmp_path, max_epochs=2, callbacks=[Last()]).fit(model, _data())
    trainer_in(tmp_path, max_epochs=1, callbacks=[first]).fit(model, _data())
    assert torch.equal(first.head, trained[-1])
    loaded = {**model.state_dict(), "head.weight": torch.full_like(model.head.weight, 0.5)}
    model.load_state_dict(loaded)
    trainer_in(tmp_path, max_epochs=1, callbacks=[first]).fit(model, _data())
    assert torch.equal(first.head, loaded["head.weight"])


def test_the_classifier_set_aside_is_that_of_the_loaded_checkpoint(tmp_path: Path) -> None:
    model = _model(train="layer4.0", refit="ridge")
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = trainer_in(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saved])
    trainer.fit(model, _data())
    early, late = (torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True) for epoch in range(2))
    assert not torch.equal(early["classifier_set_aside"][0][0], late["classifier_set_aside"][0][0])
    trainer.validate(model, _data(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert torch.equal(again["classifier_set_aside"][0][0], early["classifier_set_aside"][0][0])


def test_fixed_simplex_stays_while_the_layer_trains(tmp_path: Path) -> None:
    model = _model(train="layer4.0", head_init="etf", head_lr_factor=0)
    heads = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            heads.append(pl_module.head.weight.detach().clone())

    trainer = trainer_in(tmp_path, max_epochs=2, callbacks=[Watch()])
    before = model.backbone.net.layer4[0].conv1.weight.detach().clone()
    trainer.fit(model, _data())
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert torch.equal(model.head.weight, heads[0])
    assert not torch.equal(model.backbone.net.layer4[0].conv1.weight, before)
    model.save_delta(tmp_path / "delta.safetensors")
    assert {"head.weight", "head.bias"} <= set(model._tuned_and_frozen()[0])


def test_averaged_weights_and_refits_exclude_each_other(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_epochs=3, callbacks=[StochasticWeightAveraging(swa_lrs=0.1)])
    with pytest.raises(ValueError, match="Averaging averages weights, and an average of refitted classifiers is"):
        trainer.fit(_model(train="layer4.0", refit="ridge"), _data())


def test_too_few_images_for_a_discriminant_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lda needs two samples more than there are classes with samples, got 3"):
        trainer_in(tmp_path).fit(_model(head_init="lda"), Digits([0, 1, 2], shots=1, val_fraction=0.0))


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning has it from 2.6 on")
@pytest.mark.parametrize("epochs", [0, 1])
def test_averages_that_have_not_begun_are_of_the_closed_form(epochs: int, tmp_path: Path) -> None:
    data, model = _data(val_fraction=0.5), _model(head_init="ridge", head_lr_factor=0, train="layer4.1")
    model._optimizer = partial(torch.optim.SGD, lr=0.0)
    later = callbacks.EMAWeightAveraging(update_starting_at_step=100)
    saved = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    trainer = trainer_in(tmp_path, max_epochs=epochs, callbacks=[later, saved], enable_checkpointing=True)
    trainer.fit(model, data)
    features, labels = _features(_model(), data)
    expected = classifier_of("ridge", [(features, labels)], 3)
    heads = [model.head.state_dict(), FineTuner.load_from_checkpoint(tmp_path / "last.ckpt").head.state_dict()]
    for head in heads:
        torch.testing.assert_close([head["weight"], head["bias"]], [part.float() for part in expected])
