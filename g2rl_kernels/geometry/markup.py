"""Pieces of HTML that figures and tables share: escaped text, a model's colour, the style sheet."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def escaped(value: Any) -> str:
    """The value as text of an HTML page."""
    return html.escape(str(value), quote=True)


def beginning(text: str, limit: int) -> str:
    """The text on one line, cut to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def dot(index: int) -> str:
    """A dot in the colour of the model at `index`."""
    return f'<span class="dot m{index}"></span>'


# Okabe and Ito's colours, which are distinct under most kinds of colour blindness
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#8a7300", "#3d8bc4")
_DARK = ("#56b4e9", "#ff8a3d", "#2fc79c", "#e08fc0", "#e6c619", "#9ecbee")


def colours(count: int) -> str:
    """Rules that give class m0, m1, ... of each model its colour, on light and on dark pages."""

    def rules(palette: Sequence[str]) -> str:
        return "".join(f".m{i}{{--c:{palette[i % len(palette)]}}}" for i in range(count))

    return f"{rules(_LIGHT)}@media(prefers-color-scheme:dark){{{rules(_DARK)}}}"


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2128;--soft:#5b6570;--line:#dfe3e8;--card:#f6f7f9;
  --pos:#b2182b;--neg:#2166ac}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e3e7ec;--soft:#98a3af;--line:#30363d;
  --card:#1c2127;--pos:#e8604c;--neg:#5aa2e0}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 22px 60px}
h1{font-size:27px;margin:0 0 6px}h2{font-size:19px;margin:38px 0 8px;border-bottom:1px solid var(--line);
  padding-bottom:4px}
h3{font-size:16px;margin:20px 0 6px}h4{font-size:14px;margin:0 0 8px;font-weight:600}
.lead{max-width:78ch;margin:0 0 10px}.note{color:var(--soft);font-size:13.5px;max-width:95ch;
  margin:6px 0 12px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;padding:0;margin:10px 0 16px;
  font-weight:600}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--c);margin-right:.45em}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px}
figcaption{font-size:13px;color:var(--soft);margin-bottom:6px}figcaption b{color:var(--fg);font-size:14.5px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11.5px}
svg .value{fill:var(--fg);font-weight:600}
.grid{stroke:var(--line);stroke-width:1}.zero{stroke:var(--fg);stroke-width:1.2;stroke-dasharray:4 3}
.area{fill:var(--c);fill-opacity:.18;stroke:var(--c);stroke-width:1.8}.mean,.bar{fill:var(--c)}
.dots{stroke:var(--c);stroke-width:3.2;stroke-linecap:round;stroke-opacity:.32;fill:none}
.ring{fill:var(--c);stroke:var(--bg);stroke-width:2.5}.whisker{stroke:var(--fg);stroke-width:1.5;fill:none}
.scroll{overflow-x:auto}.tall{max-height:620px;overflow-y:auto;border:1px solid var(--line);
  border-radius:8px}
.tall thead th{position:sticky;top:0;background:var(--card)}
table{border-collapse:collapse;font-size:14px}th,td{padding:6px 14px;text-align:left;
  border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.name{white-space:nowrap}
.tall th:first-child{min-width:230px}.tall thead .num{white-space:normal}.tall th,.tall td{padding:5px 9px}
small{display:block;color:var(--soft);font-weight:400;font-size:12px}
.question{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);
  padding:2px 0 2px 12px;margin:12px 0 8px;color:var(--soft)}
.pair{border:1px solid var(--line);border-left:4px solid var(--pos);border-radius:8px;padding:12px 14px;
  margin:8px 0 14px;background:var(--card)}
.pair.opposed{border-left-color:var(--neg)}.sides{display:grid;grid-template-columns:1fr 1fr;gap:14px}
@media(max-width:760px){.sides{grid-template-columns:1fr}}
.facts{margin:0 0 4px;font-size:13px;color:var(--soft)}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:380px;overflow-y:auto;
  font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;background:var(--bg);border:1px solid var(--line);
  border-radius:6px;padding:10px}
.mapgrid{display:flex;flex-wrap:wrap;gap:16px}.maps{display:flex;flex-wrap:wrap;gap:10px;
  align-content:flex-start}
.maps .question{flex-basis:100%;width:0;min-width:100%;margin:4px 0;font-size:13px;max-height:4.6em;
  overflow:hidden}
.maps figure{width:270px}.map .pos,.scale .pos{fill:var(--pos)}.map .neg{fill:var(--neg)}
.map text{font-size:10px}.map .cell{fill:var(--fg)}
.scale{font-size:13px;color:var(--soft)}.scale span{display:inline-block;width:1em;height:1em;
  margin:0 .3em 0 .8em;vertical-align:-.12em;border:1px solid var(--line)}
.scale .pos{background:var(--pos)}.scale .neg{background:var(--neg)}.scale .zero{background:var(--bg)}
details{border-bottom:1px solid var(--line);padding:6px 0}summary{cursor:pointer;overflow-wrap:anywhere}
"""
