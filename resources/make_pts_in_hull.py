"""Write `pts_in_hull.npy`, the paper's 313 ab bins in their published order.

    python resources/make_pts_in_hull.py

The order (a ascending, then b ascending) matters: the channels of every published network follow it. The bins are the
points of a grid of 10 that lie "in gamut"; the tables below contain the first and the last b for each value of a.
All but four follow from the sRGB gamut (`tests/test_resources.py` lists the four): this is a table, not a formula.
"""

from pathlib import Path

import numpy as np

GRID = 10
A = range(-90, 101, GRID)
FIRST_B = (50, 20, 0, -20, -30, -40, -50, -50, -60, -70, -80, -80, -90, -100, -100, -110, -110, -110, -110, -90)
LAST_B = (90, 90, 90, 90, 100, 100, 100, 100, 100, 100, 90, 90, 90, 90, 80, 80, 80, 70, 70, 0)


def ab_bins():
    """Return the bins as int64 [313, 2]."""
    return np.array([(a, b) for a, first, last in zip(A, FIRST_B, LAST_B) for b in range(first, last + GRID, GRID)])


if __name__ == "__main__":
    path = Path(__file__).parent / "pts_in_hull.npy"
    np.save(path, ab_bins().astype(np.int64))
    print(f"{path}: {len(ab_bins())} bins")
