"""Contact sheets: rows of thumbnails under column headings, with a name below each row."""

from itertools import islice
from pathlib import Path

from support.files import atomic_path

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = (320, 240)  # largest width and height of a thumbnail, in pixels
ROWS = 12  # of a contact sheet
MARGIN, HEAD, FOOT = 10, 44, 30  # pixels: gap, headings, name below a row
# With East Asian characters, of Linux, Windows and macOS (of a collection, matplotlib knows the first), and its own
FONTS = ["Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "Hiragino Sans GB", "Hiragino Sans", "DejaVu Sans"]


def fit(image, cell=CELL):
    """Return a copy, resized to fill a cell in one direction."""
    image = image.copy()
    image.thumbnail(cell)  # faster than `contain` for a large one
    return ImageOps.contain(image, cell)


def contact_sheet(rows, columns, cell_width=CELL[0]):
    """Draw rows of (name, thumbnails) under column headings. Return one image."""
    width = len(columns) * (cell_width + MARGIN) + MARGIN
    heights = [max(image.height for image in images) + FOOT for _, images in rows]
    sheet = Image.new("RGB", (width, HEAD + sum(heights)), "white")
    draw, heading, caption = ImageDraw.Draw(sheet), font(20), font(14)
    centers = [MARGIN + column * (cell_width + MARGIN) + cell_width // 2 for column in range(len(columns))]
    for center, text in zip(centers, columns):
        draw.text((center, HEAD // 2), text, "black", heading, anchor="mm")
    top = HEAD
    for (name, images), height in zip(rows, heights):
        for center, image in zip(centers, images):
            sheet.paste(image, (center - image.width // 2, top))
        top += height
        text = name[-(width // 16) :]  # the end of a long name: few characters are wider than 16 pixels
        draw.text((width // 2, top - FOOT * 2 // 3), text, "dimgray", caption, anchor="mm")
    return sheet


def font(size):
    """Return one of the FONTS that is installed."""
    from matplotlib.font_manager import FontProperties, findfont  # searches the system for fonts when imported

    return ImageFont.truetype(findfont(FontProperties(family=FONTS)), size)


def write_sheets(rows, columns, folder):
    """Write contact sheets of rows of (name, thumbnails), sheet_001.png, sheet_002.png, …. Return their number."""
    rows, count = iter(rows), 0
    while page := list(islice(rows, ROWS)):
        count += 1
        with atomic_path(Path(folder) / f"sheet_{count:03d}.png") as temporary:
            contact_sheet(page, columns).save(temporary, format="PNG")
    return count
