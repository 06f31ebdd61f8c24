"""The style of all pages: light and dark, from 400 pixels on."""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --panel: #fff; --text: #1b2330; --soft: #5b6675; --edge: #dde2e8;
  --s0: #98a5b5; --s1: #0b7fab; --s2: #d9822b; --s3: #2f9e6e; --s4: #b0508f; --s5: #7a6bd1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --panel: #1b2129; --text: #e6eaf0; --soft: #9aa6b5; --edge: #313a46;
    --s0: #6c7a8b; --s1: #3db2de; --s2: #eda55b; --s3: #57c796; --s4: #d983bb; --s5: #a79af0;
  }
}
* { box-sizing: border-box; }
body {
  background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 74rem; overflow-wrap: anywhere; padding: 1.5rem 1rem 3rem;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
a { color: var(--s1); }
code, pre { font: .88em/1.5 ui-monospace, monospace; }
pre { margin: 0; overflow-x: auto; overflow-wrap: normal; }
.card, .chart, details, .tile, .scroll {
  background: var(--panel); border: 1px solid var(--edge); border-radius: 8px;
}
.card { padding: 1.1rem 1.2rem; }
.verdict { font-size: 1.2rem; font-weight: 600; line-height: 1.35; margin: 0 0 1rem; }
.tiles {
  display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
}
.tile { background: var(--page); padding: .7rem .9rem; }
.tile h3 { color: var(--soft); font-size: .8rem; font-weight: 600; margin: 0 0 .2rem; }
.tile p { margin: 0; }
.tile .big { font-size: 1.2rem; font-weight: 600; line-height: 1.35; }
.tile .row + .row { border-top: 1px solid var(--edge); margin-top: .4rem; padding-top: .4rem; }
.small, small, .note { color: var(--soft); font-size: .85rem; }
.charts {
  align-items: start; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
}
.chart { margin: 0; min-width: 0; padding: .9rem 1rem; }
.wide { margin: 0 auto; max-width: 40rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.note { margin: .4rem 0 0; }
.legend { color: var(--soft); display: flex; flex-wrap: wrap; font-size: .85rem; gap: 0 1rem; }
.key::before {
  background: currentColor; background: var(--color); border-radius: 2px; content: "";
  display: inline-block; height: .7em; margin-right: .4em; width: .7em;
}
.bars {
  align-items: center; display: grid; gap: .15rem .7rem; margin-top: .4rem;
  grid-template-columns: minmax(0, 1fr) max-content;
}
.label { font-size: .9rem; grid-column: 1 / -1; line-height: 1.3; margin-top: .5rem; }
.track { background: var(--page); border-radius: 3px; height: .85rem; }
.fill { background: var(--color); border-radius: 3px; height: 100%; min-width: 2px; }
.value { font-size: .85rem; line-height: 1.2; text-align: right; }
.s0 { --color: var(--s0); } .s1 { --color: var(--s1); } .s2 { --color: var(--s2); }
.s3 { --color: var(--s3); } .s4 { --color: var(--s4); } .s5 { --color: var(--s5); }
svg { display: block; height: auto; margin-top: .4rem; width: 100%; }
svg text {
  fill: var(--soft); font: 10.5px system-ui, sans-serif;
  paint-order: stroke; stroke: var(--panel); stroke-width: 3px;
}
@media (min-width: 44rem) { .wide svg text { font-size: 8px; } }
svg .x { text-anchor: middle; } svg .y { text-anchor: end; }
.grid { fill: none; stroke: var(--edge); }
.line { fill: none; stroke: var(--s1); stroke-linejoin: round; stroke-width: 2; }
.mark { fill: none; stroke: var(--color); stroke-linecap: round; stroke-width: 2.5; }
.dot { fill: var(--color); stroke: var(--panel); }
.front { fill: none; stroke: var(--soft); stroke-dasharray: 3 3; }
details { margin: .8rem 0; padding: 0 1rem; }
summary { cursor: pointer; font-weight: 600; padding: .6rem 0; }
details[open] { padding-bottom: 1rem; }
details .scroll { border: 0; }
.scroll { margin: .4rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
td, th {
  border-bottom: 1px solid var(--edge); overflow-wrap: normal; padding: .35rem .8rem;
  text-align: right; vertical-align: top;
}
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-size: .85rem; font-weight: 600; white-space: nowrap; }
td:first-child, th:first-child, .text { text-align: left; }
@media (max-width: 40rem) {
  table { font-size: .82rem; }
  td, th { padding: .35rem .4rem; }
}
"""
