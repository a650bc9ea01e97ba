"""Write `pts_in_hull.npy`, the paper's 313 ab bins in their published order.

    python resources/make_pts_in_hull.py

The order (a ascending, then b ascending) matters: the channels of every published network follow it. The bins are the
points of a grid of 10 that lie "in gamut"; each row below contains one value of a and the first and last b of its bins.
All but four follow from the sRGB gamut (`tests/test_resources.py` lists the four): this is a table, not a formula.
"""

from pathlib import Path

import numpy as np

GRID = 10
ROWS = (  # a, first b, last b
    (-90, 50, 90),
    (-80, 20, 90),
    (-70, 0, 90),
    (-60, -20, 90),
    (-50, -30, 100),
    (-40, -40, 100),
    (-30, -50, 100),
    (-20, -50, 100),
    (-10, -60, 100),
    (0, -70, 100),
    (10, -80, 90),
    (20, -80, 90),
    (30, -90, 90),
    (40, -100, 90),
    (50, -100, 80),
    (60, -110, 80),
    (70, -110, 80),
    (80, -110, 70),
    (90, -110, 70),
    (100, -90, 0),
)


def ab_bins():
    """Return the bins as int64 [313, 2]."""
    return np.array([(a, b) for a, first, last in ROWS for b in range(first, last + GRID, GRID)])


if __name__ == "__main__":
    path = Path(__file__).parent / "pts_in_hull.npy"
    np.save(path, ab_bins().astype(np.int64))
    print(f"{path}: {len(ab_bins())} bins")
