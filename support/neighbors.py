"""Exact nearest neighbors in the plane by a lookup grid."""

import numpy as np
import paddle

LIMIT = 128  # `Lookup` is exact for points within ±LIMIT on both axes; centers may lie anywhere
CELL_SIDE = 2
CELLS = 2 * LIMIT // CELL_SIDE  # per axis


class Lookup:
    """Find the k nearest of some centers for any points, as a full search would.

    The plane is divided into square cells. For each cell a table lists the few centers that can be among the nearest
    of a point in it, and only those are compared.

    Args:
        centers (Tensor): float32 [Q, 2].
        k (int): Number of neighbors, from 1 to Q.
    """

    def __init__(self, centers, k):
        self.k = k
        self.candidates, self.x, self.y = _candidates(centers, k)

    def nearest(self, points):
        """Return the k centers nearest to each point.

        Args:
            points (Tensor): float32 [M, 2], within ±LIMIT.

        Returns:
            tuple[Tensor, Tensor]: Indices of the centers, int64 [M, k], nearest first, and their squared distances,
            float32 [M, k].
        """
        row, column = ((points + LIMIT) / CELL_SIDE).floor().clip(0, CELLS - 1).astype("int32").unbind(axis=1)
        cell = row * CELLS + column  #                                                                   [M]
        offset_x = paddle.gather(self.x, cell) - points[:, :1]  #                                        [M, C]
        offset_y = paddle.gather(self.y, cell) - points[:, 1:]
        squared, order = paddle.topk(offset_x.square() + offset_y.square(), self.k, axis=1, largest=False)
        return paddle.take_along_axis(paddle.gather(self.candidates, cell), order, axis=1), squared


def _candidates(centers, k):
    """List each cell's candidates: indices, int64 [cells, C], and coordinates, float32 [cells, C] twice.

    A center is a candidate if its distance from the cell's nearest point is at most the k-th smallest of the centers'
    distances from the cell's farthest points. Rows are filled up with centers at infinity.
    """
    centers = centers.numpy().astype(np.float64)
    middles = (np.arange(CELLS) + 0.5) * CELL_SIDE - LIMIT
    x_offset = np.abs(middles[:, None] - centers[:, 0])[:, None, :]  #                             [CELLS, 1, Q]
    y_offset = np.abs(middles[:, None] - centers[:, 1])[None, :, :]  #                             [1, CELLS, Q]
    half = CELL_SIDE / 2
    closest = np.hypot((x_offset - half).clip(0), (y_offset - half).clip(0)).reshape(-1, len(centers))
    farthest = np.hypot(x_offset + half, y_offset + half).reshape(-1, len(centers))
    bound = np.partition(farthest, k - 1, axis=1)[:, k - 1 : k]
    possible = closest <= bound + 1e-3  # the margin covers float32's rounding of the distances
    width = possible.sum(axis=1).max()
    indices = np.argsort(~possible, axis=1, kind="stable")[:, :width]  # the possible ones first
    coordinates = centers[indices].astype(np.float32)  #                                           [cells, C, 2]
    coordinates[~np.take_along_axis(possible, indices, axis=1)] = np.inf
    return tuple(map(paddle.to_tensor, (indices, coordinates[..., 0], coordinates[..., 1])))
