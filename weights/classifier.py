"""The small image classifier that weights/quality.py judges by."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from weights.data import Split, evened, shifted

EPOCHS = 10
BATCH_SIZE = 100
LEARNING_RATE = 4e-3  # the maximum
MAX_SHIFT = 2  # pixels


class Classifier(nn.Module):
    """Three convolutions that each halve the image, then 64 features, then a logit for each class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_stage(channels, 16),
            *_stage(16, 32),
            *_stage(32, 64),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 64),
        )
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images [B, channels, 32, 32] in −1 … 1 to [B, 64]."""
        return F.relu(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, channels, 32, 32] in −1 … 1 to logits [B, classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def _stage(in_ch: int, out_ch: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_ch, out_ch, 3, padding=1), nn.BatchNorm2d(out_ch), nn.ReLU(), nn.MaxPool2d(2)


def train(split: Split, seed: int) -> Classifier:
    """Train on the training split, randomly shifted and balanced by class. Return the classifier in evaluation mode."""
    torch.manual_seed(seed)
    classifier = Classifier(split.train_x.shape[1], split.classes)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    deck = evened(split.train_y, 0)
    N = len(deck)
    steps_an_epoch = -(-N // BATCH_SIZE)
    optimiser = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, EPOCHS * steps_an_epoch)
    cross_entropy = nn.CrossEntropyLoss()
    with tqdm(desc="training the classifier", total=schedule.total_steps, unit="step", mininterval=2) as bar:
        for _ in range(EPOCHS):
            order = torch.randperm(N)
            for first in range(0, N, BATCH_SIZE):
                chosen = deck[order[first : first + BATCH_SIZE]]
                x = shifted(split.train_x[chosen], MAX_SHIFT, torch.default_generator)
                loss = cross_entropy(classifier(x), split.train_y[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
    return classifier.requires_grad_(False).eval()
