"""Distil a classifier of scikit-learn's digits into a smaller one that sees few labels, by KL(teacher‖student).

    python examples/distillation.py

The student minimises the KL to the teacher's softened distribution over the ten classes on all images, without their
labels. Its twin of the same size is trained on the same few labels alone.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_klloss import AutoKL, categorical

NUM_TRAIN, NUM_LABELS = 1300, 60
TEMPERATURE = 3.0


def classifier(hidden: int) -> nn.Module:
    """Return a network from 64 pixels to the logits of ten digits."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(model: nn.Module, inputs: tuple[Tensor, ...], loss: object, epochs: int) -> None:
    """Minimise loss(model, *batch)."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs[0])).split(64):
            optimiser.zero_grad()
            loss(model, *(t[rows] for t in inputs)).backward()
            optimiser.step()


def by_labels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of the labels."""
    return nn.functional.cross_entropy(model(x), y)


def distil(teacher: nn.Module) -> object:
    """Return the loss of a student: T² KL(teacher‖student) at temperature T, which keeps the gradient's scale."""
    kl = AutoKL()

    def loss(student: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = categorical(teacher(x) / TEMPERATURE)
        return TEMPERATURE**2 * kl(target, categorical(student(x) / TEMPERATURE))

    return loss


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that are classified correctly."""
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train teacher, student and twin; print and return their accuracies on held-out images."""
    parser = argparse.ArgumentParser(description="Distil a classifier of digits into a smaller one.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # small models are several times slower on two
    torch.manual_seed(args.seed)
    digits = load_digits()
    order = torch.randperm(len(digits.data))
    x = torch.as_tensor(digits.data, dtype=torch.float32)[order] / 16
    y = torch.as_tensor(digits.target)[order]
    train_x, train_y, test = x[:NUM_TRAIN], y[:NUM_TRAIN], (x[NUM_TRAIN:], y[NUM_TRAIN:])

    teacher, student, twin = classifier(256), classifier(24), classifier(24)
    train(teacher, (train_x, train_y), by_labels, args.epochs)
    train(student, (train_x,), distil(teacher), args.epochs)
    train(twin, (train_x[:NUM_LABELS], train_y[:NUM_LABELS]), by_labels, args.epochs * NUM_TRAIN // NUM_LABELS)

    route = AutoKL().route(categorical(teacher(test[0])), categorical(student(test[0])))
    results = {
        "teacher": accuracy(teacher, *test),
        "student": accuracy(student, *test),
        "twin": accuracy(twin, *test),
    }
    print(f"KL(teacher‖student) takes the route {route!r}")
    print(f"teacher, 256 hidden units, {NUM_TRAIN} labels:      {results['teacher']:.1%} right")
    print(f"student, 24 hidden units, the teacher alone:   {results['student']:.1%}")
    print(f"its twin, 24 hidden units, {NUM_LABELS} labels:          {results['twin']:.1%}")
    return results


if __name__ == "__main__":
    main()
