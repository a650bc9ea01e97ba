"""Regions of an image: the surroundings of a place, which end at edges.

The distance is geodesic, as in Criminisi, Sharp and Blake, "GeoS: Geodesic Image Segmentation" (ECCV 2008).
"""

import numpy as np

SMOOTHING = 1.5  # standard deviation in pixels; texture and noise would lengthen all paths
END = 1.5  # times the reach: the distance at which the weight becomes 0


def geodesic_distance(gray, across, down):
    """Measure how far each pixel is from a place, along the path that is shortest and crosses the weakest edges.

    The length of a path is the share of the longer side that it covers, plus the slope of gray per pixel, summed along
    the path: crossing a step adds the step's height.

    Args:
        gray (ndarray): [H, W], in [0, 1].
        across (float): The place as a share of the width, in [0, 1].
        down (float): The place as a share of the height, in [0, 1].

    Returns:
        ndarray: float64 [H, W].
    """
    from skimage import filters, graph  # 0.2 s, which programs that use no regions need not wait for

    height, width = gray.shape
    place = min(int(down * height), height - 1), min(int(across * width), width - 1)
    slope = filters.sobel(filters.gaussian(gray, SMOOTHING)) / np.sqrt(2)
    return graph.MCP_Geometric(1 / max(height, width) + slope).find_costs([place])[0]


def region_weights(distance, reach):
    """Weigh pixels by their distance: 1 up to the reach, then falling smoothly to 0.

    Args:
        distance (ndarray): [...], see `geodesic_distance`.
        reach (float): Greater than 0, in the same unit.

    Returns:
        ndarray: [...], in [0, 1].
    """
    x = ((END - distance / reach) / (END - 1)).clip(0, 1)
    return x * x * (3 - 2 * x)
