import pytest
import torch
from torch import nn

from experiments.problems.autoencoder import Autoencoder, DigitsAutoencoder, cross_entropy, entropy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> DigitsAutoencoder:
    return DigitsAutoencoder.of(CPU)


def test_images(problem: DigitsAutoencoder) -> None:
    assert problem.training.shape == (1500, 784) and problem.held_out.shape == (297, 784)
    assert problem.rows == 1500 and problem.dim == 784
    assert problem.training.min() == 0 and problem.training.max() <= 1
    assert problem.training.std() > 0.2
    assert problem.stream(0).draw(1500) is problem.training


def test_layers(problem: DigitsAutoencoder) -> None:
    model = problem.initial_model(0)
    widths = [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == list(zip(widths, widths[1:], strict=False))
    code = model.encoder(problem.training[:5])  # type: ignore[operator]
    assert code.shape == (5, 6) and (code < 0).any()
    assert (model(problem.training[:5]) < 0).any()
    assert sum(isinstance(layer, nn.Sigmoid) for layer in model.modules()) == 10


def test_initial_weights_are_sparse(problem: DigitsAutoencoder) -> None:
    for layer in problem.initial_model(0).modules():
        if isinstance(layer, nn.Linear):
            nonzero = layer.weight != 0
            assert (nonzero.sum(1) == min(15, layer.in_features)).all()
            assert (layer.bias == 0).all()
            # Each unit chooses its own inputs, all of them in the end.
            if layer.in_features < layer.out_features or layer.out_features >= 100:
                assert nonzero.any(0).all()
    largest = next(layer for layer in problem.initial_model(0).modules() if isinstance(layer, nn.Linear))
    weights = largest.weight[largest.weight != 0]
    assert weights.std().item() == pytest.approx(1, abs=0.05) and abs(weights.mean().item()) < 0.05


def test_code_depends_on_the_image(problem: DigitsAutoencoder) -> None:
    with torch.no_grad():
        code = problem.initial_model(0).encoder(problem.training)  # type: ignore[operator]
    assert (code.std(0) > 0.01).all()


def test_cross_entropy_is_summed_over_pixels() -> None:
    grey = torch.tensor([[0.25, 1.0], [0.5, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[0.3, -2.0], [1.0, 0.5]], dtype=torch.float64)
    p = 1 / (1 + (-logits).exp())
    expected = -(grey * p.log() + (1 - grey) * (1 - p).log()).sum() / 2
    torch.testing.assert_close(cross_entropy(logits, grey), expected)


def test_perfect_images_have_no_excess(problem: DigitsAutoencoder) -> None:
    class Perfect(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.logit(images, eps=1e-7)

    judged = problem.evaluate(Perfect())
    assert abs(judged["train_excess"]) < 2e-3 and judged["squared_error"] < 1e-6
    assert judged["holdout_loss"] == pytest.approx(entropy(problem.held_out), abs=2e-3)
    assert entropy(torch.tensor([[0.5, 0.0, 1.0]])) == pytest.approx(0.6931, abs=1e-4)


def test_excess_is_the_loss_above_the_floor(problem: DigitsAutoencoder) -> None:
    model = problem.initial_model(0)
    judged = problem.evaluate(model)
    loss = problem.loss(model, problem.training).item()
    assert judged["train_excess"] == pytest.approx(loss - problem.noise_floor)
    squared = (model(problem.training).sigmoid() - problem.training).square().sum(1).mean().item()
    assert judged["squared_error"] == pytest.approx(squared, rel=1e-5)


def test_no_hidden_layer() -> None:
    with pytest.raises(ValueError, match=r"widths=\(784, 6\) has no hidden layer"):
        Autoencoder((784, 6))
