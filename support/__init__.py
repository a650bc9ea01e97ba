"""What any training program needs, and knows no color: imports nothing from the scripts above it.

Imported ahead of Paddle by every one of them.
"""

import zlib  # noqa: F401  ahead of Paddle, whose 2.x GPU builds carry a zlib with which Pillow reads no PNG
