"""One look for the plots of the app and of the analyses: colours, type and axes as plain data. Never plotly."""

from typing import Any

FONT = ("Inter", "Segoe UI", "system-ui", "sans-serif")
# Mid-tones that read on white and on near-black.
BLUE, TEAL, AMBER, CORAL, GREY = "#5b79e8", "#2fae9f", "#dca340", "#df755c", "#8d96a5"
PALETTE = (BLUE, CORAL, TEAL, AMBER, "#9a82dd", "#6dbb78", GREY)
TEXT = "#8792a1"
GRID = "rgba(128,138,152,0.22)"
AXIS: dict[str, Any] = {
    "gridcolor": GRID,
    "zeroline": False,
    "showline": False,
    "ticks": "",
    "automargin": True,
    "ticklabelstandoff": 6,
}


def layout(height: int) -> dict[str, Any]:
    """Return the layout that all plots share: transparent, no frame, the legend above; `height` in pixels."""
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 4, "r": 8, "t": 30, "b": 4},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": ", ".join(FONT), "size": 12, "color": TEXT},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "#1d232d", "bordercolor": "#1d232d", "font": {"color": "#e8ebf0", "size": 12}},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "x": 1,
            "xanchor": "right",
            "font": {"size": 11},
        },
    }
