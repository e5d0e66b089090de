"""The style sheet of reports: one column, legible on a phone, light or dark as the reader's system is"""

from __future__ import annotations

COLOURS = ("#2563c9", "#c2500a", "#15803d", "#9333b5", "#b3261e", "#0e7490")
"""Of the series of plots, on a light ground."""
DARK_COLOURS = ("#7aa7f7", "#f2a36b", "#6cc98a", "#cf9be8", "#f28b82", "#67c5d6")


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--series-{i}: {colour}; " for i, colour in enumerate(colours))


LIGHT = f"color-scheme: light dark; --ground: #ffffff; --card: #f5f6f8; --text: #1c2024; --soft: #5d6670; \
--line: #d9dde2; --link: #1d4fa8; {_variables(COLOURS)}"
DARK = f"--ground: #14171a; --card: #1e2328; --text: #e6e9ec; --soft: #9aa4ae; --line: #343b42; --link: #8ab4f8; \
{_variables(DARK_COLOURS)}"
PLOT_STYLE = f"svg {{ {LIGHT} color: var(--text); }} @media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}"
"""For a plot that stands alone."""

STYLE = f"""
:root {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--ground); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }}
header, main {{ max-width: 64rem; margin: 0 auto; padding: 0 1.25rem; }}
header {{ padding-top: 2rem; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.25rem; margin: 0 0 .75rem; }}
header p, .gallery small, .tile span, .tile small {{ color: var(--soft); }}
header p {{ margin: 0; }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: .75rem; font-size: .9rem; }}
a {{ color: var(--link); text-decoration: none; }}
a:hover {{ text-decoration: underline; }}
section {{ margin: 1.75rem 0; padding-top: 1.5rem; border-top: 1px solid var(--line); scroll-margin-top: 1rem; }}
p {{ max-width: 46rem; }}
small {{ font-size: .8rem; line-height: 1.35; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .75rem; margin: 1rem 0; }}
.tile {{ display: flex; flex-direction: column; background: var(--card); border-radius: 10px; padding: .9rem 1rem; }}
.tile span {{ font-size: .85rem; line-height: 1.3; }}
.tile b {{ font-size: 1.7rem; font-weight: 600; line-height: 1.35; margin-top: auto; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }}
thead th {{ color: var(--soft); font-weight: 500; vertical-align: bottom; }}
tbody th {{ font-weight: 500; }}
.numbers {{ overflow-wrap: normal; }}
.numbers td, .numbers thead th + th {{ text-align: right; padding: .35rem 0 .35rem .9rem; }}
.numbers td {{ white-space: nowrap; }}
.numbers tbody th {{ min-width: 7rem; }}
.facts th {{ white-space: nowrap; }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1.1rem .9rem;
  margin: 1rem 0; }}
.gallery.wide {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
.pictures {{ display: flex; gap: .4rem; }}
.pictures div {{ flex: 1 1 0; min-width: 0; display: flex; flex-direction: column; }}
.wide .pictures div {{ max-width: 10rem; }}
.gallery img {{ display: block; width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--line);
  background: var(--card); }}
figcaption {{ font-size: .85rem; line-height: 1.35; margin-top: .35rem; }}
figcaption small {{ display: block; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem;
  margin: 1rem 0; align-items: start; }}
.plots figcaption {{ margin: 0 0 .4rem; font-weight: 500; }}
.plots svg {{ display: block; width: 100%; height: auto; color: var(--text); }}
@media (max-width: 40rem) {{
  body {{ font-size: 15px; }}
  header {{ padding-top: 1.25rem; }}
  header, main {{ padding-left: 1rem; padding-right: 1rem; }}
  .tiles {{ grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }}
  .tile b {{ font-size: 1.35rem; }}
  .gallery {{ grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }}
  .facts th {{ white-space: normal; }}
}}
"""
