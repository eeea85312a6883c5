import pytest
import torch

from experiments.problems.classifier import DigitsClassifier, Distortions, Labelled, distorted

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> DigitsClassifier:
    return DigitsClassifier.of(CPU)


def test_rows(problem: DigitsClassifier) -> None:
    assert problem.rows is None and problem.outputs == 10 and problem.score == "holdout_loss"
    assert problem.training.images.shape == (1500, 1, 8, 8) and len(problem.held_out) == 4096
    assert problem.training.images.min() == -1 and problem.training.images.max() == 1
    assert sorted(problem.training.labels.unique().tolist()) == list(range(10))
    assert sum(p.numel() for p in problem.initial_model(0).parameters()) == 6090
    assert problem.first_loss == pytest.approx(2.303, abs=0.05)  # log 10: it knows nothing yet


def test_rows_do_not_depend_on_the_batches(problem: DigitsClassifier) -> None:
    stream, other = problem.stream(3), problem.stream(3)
    parts = [stream.draw(n) for n in (7, 8192, 100)]
    whole = other.draw(7 + 8192 + 100)
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert not torch.equal(problem.stream(4).draw(7).images, parts[0].images)


def test_distortions_are_small_and_never_the_same() -> None:
    spot = torch.full((1, 1, 8, 8), -1.0)
    spot[0, 0, 3:5, 3:5] = 1.0  # in the middle: turning moves it little
    rows = distorted(Labelled(spot, torch.tensor([4])), 500, torch.Generator().manual_seed(0))
    assert (rows.labels == 4).all() and rows.images.flatten(1).unique(dim=0).shape[0] == 500
    assert rows.images.min() >= -1 and rows.images.max() <= 1
    weights = (rows.images + 1).squeeze(1)
    place = torch.arange(8.0)
    mass = weights.sum((1, 2))
    for centre in ((weights.sum(1) @ place) / mass, (weights.sum(2) @ place) / mass):
        moved = centre - 3.5
        # shifts are uniform within a pixel, up to the scale and the turn of the shift itself
        assert 0.85 < moved.abs().max() < 1.5 and abs(moved.mean()) < 0.1
    assert (mass / 8).min() > 0.6 and (mass / 8).max() < 1.6  # scale 0.85 to 1.15, squared


def test_held_out_images_are_none_of_the_training(problem: DigitsClassifier) -> None:
    stream = Distortions(problem.training, 0, CPU)
    seen = stream.draw(2000).images.flatten(1)
    assert torch.cdist(problem.held_out.images[:500].flatten(1), seen).min() > 0.1
