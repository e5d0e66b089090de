"""How figures, settings and numbers are called where people read them"""

from __future__ import annotations

from typing import Any

from hartist.evaluation.bootstrap import Interval
from hartist.evaluation.harness.result import Figure

TITLES = {
    "fid": "FID",
    "kid": "KID",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance",
    "inception_score": "Inception score",
    "recall_at_1": "R@1",
    "recall_at_10": "R@10",
    "auc": "AUC",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "geneval": "GenEval",
    "dpg": "DPG-Bench",
}
"""Of metrics whose name says it no better."""
ARROWS = {"lower": "↓", "higher": "↑"}


def title(figure: Figure) -> str:
    """What a figure is, without its category: "Fréchet distance (EfficientNet-Lite0)"."""
    name = TITLES.get(figure.metric, figure.metric.replace("_", " "))
    if figure.metric == "clip_score":  # nothing but CLIP may be called so
        name = "CLIP score" if "CLIP" in str(figure.network) else "agreement with the prompt"
    if figure.network is None:
        return name
    return f"{name}, {figure.network}" if "(" in figure.network else f"{name} ({figure.network})"


def titled(figure: Figure) -> str:
    """The title and which way is better, never on a line of its own."""
    return f"{title(figure)}\u00a0{ARROWS[figure.better]}"


def number(value: float, *, signed: bool = False) -> str:
    """Four significant digits, and a minus that is one.

    >>> number(61.3456), number(-0.00123456), number(1234567.0), number(2.5, signed=True)
    ('61.35', '−0.001235', '1234567', '+2.5')
    """
    text = f"{value:{'+' if signed else ''}.0f}" if abs(value) >= 1000 else f"{value:{'+' if signed else ''}.4g}"
    return text.replace("-", "−")


def interval_text(interval: Interval | None, *, signed: bool = False) -> str:
    """Both ends, or nothing where there is no interval."""
    if interval is None:
        return ""
    return f"{number(interval.low, signed=signed)} … {number(interval.high, signed=signed)}"


def setting_text(value: Any) -> str:
    """A setting's value; None is the model's own."""
    if value is None:
        return "the model’s own"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
