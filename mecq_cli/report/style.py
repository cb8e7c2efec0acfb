"""The style of a report: light and dark, screens of any width, paper; no script, no font file."""

CSS = """
:root { color-scheme: light dark; --text: #1b2026; --soft: #59636e; --page: #ffffff;
  --card: #f5f7f9; --line: #d5dbe1; --fp: #46698c; --integer: #c4531d; --good: 30 110 170;
  --bad: 200 80 25; --ok: #1a7f37; --c1: #c4531d; --c2: #2f6fab; --c3: #2d8049; --c4: #8552b5;
  --c5: #a8780a; --c6: #0f8791; --c7: #b83a6b; --c8: #636c76; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ed; --soft: #9aa6b2; --page: #14181c;
  --card: #1d2329; --line: #363f48; --fp: #8db4dc; --integer: #f0905a; --good: 80 160 230;
  --bad: 240 130 70; --ok: #57b96f; --c1: #f0905a; --c2: #6fb0ec; --c3: #6cc387; --c4: #bd93e8;
  --c5: #d9ac3f; --c6: #4fc1ca; --c7: #ea7fa6; --c8: #a3adb7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--c2); }
.soft, figcaption, caption { color: var(--soft); font-size: .88rem; }
nav { margin: .8rem 0 0; font-size: .9rem; display: flex; flex-wrap: wrap; gap: .1rem .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0; padding: 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; }
.tile dt { color: var(--soft); font-size: .85rem; }
.tile dd { margin: 0; font-size: 1.35rem; font-weight: 600; line-height: 1.3; }
.tile dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft);
  line-height: 1.35; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal;
  min-width: min(100%, 24rem); }
.matrix { min-width: 0; }
th:last-child, td:last-child { padding-right: 0; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3.5rem; align-items: flex-start; }
.beside > * { min-width: 0; max-width: 100%; }
.beside > .column { flex: 1 1 24rem; max-width: 31rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .28rem 1.2rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead .number { white-space: normal; }
.wide { width: 100%; font-size: .85rem; }
.wide th, .wide td { padding-right: .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1rem 1.4rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .15rem; color: var(--text); font-weight: 500; }
figcaption .soft { font-weight: 400; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; list-style: none; margin: .3rem 0;
  padding: 0; font-size: .85rem; }
.legend i { display: inline-block; width: 1.1em; height: .3em; border-radius: 2px;
  margin-right: .4em; vertical-align: middle; }
.meter { display: inline-block; width: 3.2rem; height: .5rem; margin-right: .4rem;
  background: var(--line); border-radius: 2px; overflow: hidden; vertical-align: middle; }
.meter i { display: block; height: 100%; background: var(--integer); }
.matrix td, .matrix th { padding: .25rem .4rem; border: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; }
.matrix thead th { vertical-align: bottom; }
.matrix thead th span { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.matrix .same { outline: 2px solid var(--soft); outline-offset: -2px; }
.images { display: flex; flex-wrap: wrap; gap: .6rem; list-style: none; margin: .3rem 0 .8rem;
  padding: 0; }
.images li { width: 6.4rem; font-size: .78rem; line-height: 1.3; color: var(--soft); }
.images img { display: block; width: 6.4rem; height: 6.4rem; object-fit: contain;
  background: var(--card); border-radius: .3rem; }
.answers { list-style: none; margin: .6rem 0; padding: 0; }
.answers li { display: grid; gap: .5rem; margin-bottom: 1rem; max-width: 52rem;
  grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.answers img { display: block; width: 100%; max-height: 16rem; object-fit: contain;
  background: var(--card); border-radius: .3rem; }
.answers figcaption { margin: .2rem 0 0; }
.swatch { display: inline-block; width: .8rem; height: .8rem; margin-right: .45rem;
  border-radius: 2px; vertical-align: -.05rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--c2); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
.note { border-left: 3px solid var(--integer); padding: .1rem 0 .1rem .8rem; }
.yes { color: var(--ok); font-weight: 600; }
.no { color: rgb(var(--bad)); font-weight: 600; }
@media (min-width: 40rem) { .pairs th { white-space: nowrap; } }
@media (max-width: 40rem) { th, td { padding-right: .75rem; } }
.wide tbody th, .matrix tbody th { position: sticky; left: 0; background: var(--page); }
@media print { nav { display: none; } body { max-width: none; } .scroll { overflow: visible; } }
"""
