"""The style sheet. Colours follow Okabe and Ito's colour-blind-safe set, darker on light and lighter on dark paper."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1a1f24; --quiet: #56616b; --rule: #d8dde2; --grid: #e4e8eb; --panel: #f2f4f5;
  --link: #005a9c; --alarm: #a3200d; --alarm-paper: #fdeeea;
  --together: #0067b0; --apart: #b34700; --pooled: #00755a; --alone: #5a646e; --baseline: #8d3f84; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181b; --ink: #e5e8ea; --quiet: #a0abb4; --rule: #353d44; --grid: #2a3137; --panel: #1d2327;
  --link: #78bff5; --alarm: #ff9b86; --alarm-paper: #3a1d17;
  --together: #5cb3f2; --apart: #f2955c; --pooled: #41c79d; --alone: #b2bbc3; --baseline: #d99bd1; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body > * { max-width: 52rem; margin-inline: auto; padding-inline: 1.5rem; }
header { padding-top: 3rem; }
h1 { font-size: clamp(1.7rem, 1.3rem + 2vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: .2rem 0 1rem;
  text-wrap: balance; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 2.5rem 0 .5rem; }
p { margin: 0 0 1rem; max-width: 40rem; text-wrap: pretty; overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.eyebrow, footer, figcaption, caption, .under { color: var(--quiet); font-size: .875rem; }
.eyebrow { margin: 0; }
.lead { font-size: 1.125rem; }
section { margin-top: 3.5rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1.75rem 0 0; padding: 0; list-style: none;
  font-size: .9375rem; }
.banner, .note { padding: .9rem 1.1rem; margin: 1.25rem 0; border-inline-start: 4px solid; border-radius: 2px; }
.banner { color: var(--alarm); background: var(--alarm-paper); }
.note { color: var(--ink); background: var(--panel); border-color: var(--baseline); }
.banner p, .note p { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: 1.5rem 1.25rem;
  margin: 2rem 0 0; }
.figures div { border-top: 2px solid var(--ink); padding-top: .6rem; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }
.figures dt { font-size: .875rem; line-height: 1.4; color: var(--quiet); }
.figures dd { margin: 0 0 .2rem; font-size: 1.5rem; line-height: 1.2; letter-spacing: -.02em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.figures .void dd { text-decoration: line-through; color: var(--alarm); }
.facts { margin: 1rem 0 1.5rem; font-size: .9375rem; }
.facts div { display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr; gap: 1rem; padding: .4rem 0;
  border-bottom: 1px solid var(--grid); }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 1.25rem 0 1.75rem;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--rule), transparent) right / .75rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .8125rem; line-height: 1.4; min-width: 100%;
  font-variant-numeric: tabular-nums; }
caption { text-align: start; padding-bottom: .5rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(45rem, calc(100vw - 2.5rem)); }
th, td { padding: .45rem .4rem; text-align: end; white-space: nowrap; border-bottom: 1px solid var(--grid);
  vertical-align: top; font-weight: 400; }
thead th { font-weight: 600; border-bottom-color: var(--rule); vertical-align: bottom; }
th:first-child { text-align: start; padding-inline-start: 0; position: sticky; left: 0; background: var(--paper); }
tbody th:first-child { white-space: normal; min-width: 7rem; }
td:last-child, th:last-child { padding-inline-end: 0; }
.under { display: block; font-size: .75rem; }
.bad { color: var(--alarm); font-weight: 600; }
figure { margin: 2.25rem 0; }
figure > p { font-weight: 600; margin: 0 0 .5rem; }
figcaption { margin-top: .75rem; max-width: 40rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 0 0 .75rem; padding: 0; list-style: none;
  font-size: .8125rem; color: var(--quiet); }
.legend li { display: flex; align-items: center; gap: .4rem; }
.swatch { width: 16px; height: 16px; flex: none; }
.plot { display: block; width: 100%; height: auto; font-size: 12px; overflow: visible; }
.narrow { display: none; }
@media (max-width: 44rem) {
  body > * { padding-inline: 1.25rem; }
  header { padding-top: 2rem; }
  .wide { display: none; }
  .narrow { display: block; max-width: 30rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures div:first-child:nth-last-child(odd) { grid-column: span 2; }
  .facts div { grid-template-columns: 2fr 3fr; } }
svg .together { --series: var(--together); }
svg .apart { --series: var(--apart); }
svg .pooled { --series: var(--pooled); }
svg .alone { --series: var(--alone); }
svg .baseline { --series: var(--baseline); }
svg circle, svg polygon { fill: var(--series); stroke: none; }
svg circle.open, svg polygon.open { fill: var(--paper); stroke: var(--series); stroke-width: 1.5; }
svg polygon.baseline { stroke: var(--series); stroke-width: 1.5; }
svg line, svg polyline { fill: none; stroke: var(--series); stroke-width: 1; }
svg .grid { stroke: var(--grid); }
svg .chance { stroke: var(--quiet); stroke-dasharray: 2 3; }
svg .level { stroke-dasharray: 5 4; opacity: .75; }
svg .level.alone { stroke-dasharray: 1.5 3; }
svg .interval { stroke-width: 2; }
svg .thick { stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 4 3; stroke-width: 1.5; }
svg .bar { stroke-width: 12; opacity: .25; }
svg text { fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .value { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .panel, svg .value { fill: var(--ink); font-weight: 600; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--link); }
pre { background: var(--panel); padding: .75rem 1rem; border-radius: 3px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .875rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 3rem; padding-bottom: 3rem; }
@media print { .scroll { overflow: visible; } figure, tr { break-inside: avoid; } nav { display: none; } }
"""
