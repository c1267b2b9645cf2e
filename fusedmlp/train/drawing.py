"""What every picture is drawn with: a figure off screen, readable names, PNG bytes.

matplotlib is imported for the first picture.
"""

import contextlib
import io
import os
import sys

from .errors import TrainError

NAME_LENGTH = 40  # characters
RIGHT_COLOUR, WRONG_COLOUR = "#1a7f37", "#c0261c"
PART_COLOURS = {"train": "#1f6fb4", "val": "#b8860b", "test": "#c0261c"}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **settings):
    """(figure, array of axes) without pyplot, whose state and window system belong to the
    caller.

    settings  further ones of Figure.subplots
    """
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def import_matplotlib():
    """matplotlib, whatever MPLBACKEND says: importing it fails where that names a backend which is
    not installed, as in a shell that a notebook started."""
    named = None
    if "matplotlib" not in sys.modules:
        named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise TrainError(f"{error}: pip install 'fusedmlp[train]'") from error
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        with contextlib.suppress(ValueError):  # for pyplot, which the caller may use later
            matplotlib.rcParams["backend"] = named
    return matplotlib


def readable(name: str, length: int = NAME_LENGTH) -> str:
    """A user's name as a label: it is cut short, characters that the font lacks become escapes, and
    a dollar sign, with which matplotlib would begin a formula, is escaped."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    name = name if len(name) <= length else name[: length - 3] + "..."
    characters = (
        c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in name
    )
    return "".join(characters).replace("$", r"\$")


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
