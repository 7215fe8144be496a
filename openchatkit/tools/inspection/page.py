"""What `tools/inspect_data.py` finds, as one page that needs nothing else: no scripts, nothing from elsewhere."""

from collections.abc import Sequence
from pathlib import Path

from openchatkit import storage
from openchatkit.tools.inspection.figures import MixtureFigures, Quarantine
from openchatkit.tools.inspection.sampled import Sample, visible
from openchatkit.tools.inspection.terminal import (
    mixture_note,
    mixture_title,
    number,
    percent,
    sample_title,
    spelled_lines,
)

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Training data</title>
<style>
:root { color-scheme: light dark;
  --ground: #fff; --card: #f6f7f9; --line: #d9dde3; --text: #1b1f24; --soft: #6b7480;
  --trained: #d3f2dc; --trained-text: #0b4a21; --special: #8a2be2; --note: #0b6bcb; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --card: #1c2127; --line: #343b44; --text: #e4e8ed; --soft: #939ca8;
  --trained: #12402a; --trained-text: #b4f0c9; --special: #c99bff; --note: #6cb6ff; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem }
p { margin: .25rem 0 } .soft { color: var(--soft) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500 }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 11rem }
tfoot td { font-weight: 600; border-bottom: 0 }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .5rem }
.shares { display: grid; grid-template-columns: max-content 1fr; gap: .4rem .9rem; align-items: center }
.bar { display: flex; height: 1.5rem; border-radius: 4px; overflow: hidden; background: var(--card) }
.bar i { min-width: 1px; border-right: 1px solid var(--ground) } .bar i:last-child { border: 0 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin-top: .6rem }
section { margin: 0 0 1rem; border: 1px solid var(--line); border-radius: 6px; overflow: hidden }
h3 { margin: 0; padding: .5rem .8rem; font-size: .9rem; font-weight: 500; background: var(--card);
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
pre { margin: 0; padding: .8rem; max-height: 34rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.55 ui-monospace, monospace; color: var(--soft) }
b { font-weight: 400; color: var(--trained-text); background: var(--trained); border-radius: 2px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone }
em { font-style: normal; color: var(--special); outline: 1px solid; outline-offset: -1px; border-radius: 3px }
hr { border: 0; border-top: 1px dashed var(--note); margin: .4rem 0 }
.pad { color: var(--note) }
</style>
</head>
<body>
<h1>Training data</h1>
<p class="soft">{{ title }}. {{ note }}.</p>

<h2>Shares of the mixture</h2>
<div class="shares">
{%- for name, key in (("sequences", "sequences"), ("the loss", "loss")) %}
  <span class="soft">of {{ name }}</span>
  <div class="bar">
  {%- for source in mixture.sources %}
    <i style="flex: {{ source[key] }} 0 0; background: {{ colour(loop.index0) }}" title="{{ source.name | visible }}:
      {{- ' ' ~ percent(source[key]) }}"></i>
  {%- endfor %}
  </div>
{%- endfor %}
</div>
<div class="legend">
{%- for source in mixture.sources %}
  <span><span class="dot" style="background: {{ colour(loop.index0) }}"></span>{{ source.name | visible }}</span>
{%- endfor %}
</div>

<h2>Sources</h2>
<div class="scroll"><table>
<thead><tr><th>source<th>rows<th>set aside<th>documents<th>tokens<th>trained on<th>weight<th>sequences<th>samples
<th>epochs<th>of the loss<th>waste</tr></thead>
<tbody>
{%- for source in mixture.sources %}
<tr><td><span class="dot" style="background: {{ colour(loop.index0) }}"></span>{{ source.name | visible }}
<td>{{ "{:,}".format(source.rows) }}<td>{{ "{:,}".format(source.quarantined) }}
<td>{{ "{:,}".format(source.documents) }}<td>{{ "{:,}".format(source.tokens) }}
<td>{{ percent(source.trained_tokens / source.tokens) }}<td>{{ "{:g}".format(source.weight) }}
<td>{{ percent(source.sequences) }}<td>{{ "{:,}".format(source.samples) }}<td>{{ number(source.epochs) }}
<td>{{ percent(source.loss) }}<td>{{ percent(source.waste) }}</tr>
{%- endfor %}
</tbody>
<tfoot><tr><td>all
{%- for name in ("rows", "quarantined", "documents", "tokens") %}
<td>{{ "{:,}".format(mixture.sources | sum(attribute=name)) }}
{%- endfor %}
<td>{{ percent((mixture.sources | sum(attribute="trained_tokens")) / (mixture.sources | sum(attribute="tokens"))) }}
<td><td>100%<td>{{ "{:,}".format(mixture.samples) }}<td><td>100%<td>{{ percent(mixture.waste) }}</tr></tfoot>
</table></div>

{%- if quarantines %}
<h2>Rows set aside</h2>
{%- for quarantine in quarantines %}
<section><h3>{{ quarantine.source | visible }}: {{ "{:,}".format(quarantine.rows) }} set aside, listed in
{{ quarantine.path | string | visible }}</h3>
<pre>{% for row in quarantine.first %}{{ row | visible }}
{% endfor %}{% if quarantine.rows > quarantine.first | length %}and
{{- " {:,}".format(quarantine.rows - quarantine.first | length) }} more{% endif %}</pre></section>
{%- endfor %}
{%- endif %}

<h2>Samples</h2>
<div class="legend"><span><b>trained on</b></span><span class="soft">only read</span>
<span><em>special token</em></span>
<span><span class="pad">┄┄</span> a document that sees nothing of those above</span></div>
<p></p>
{%- for sample in samples %}
<section><h3>{{ sample_title(sample) | visible }}</h3>
<pre>
{%- for span in sample.spans %}
{%- if span.border %}<hr>{% endif %}
{%- set text = span.text | lines %}
{%- if span.special %}{% set text %}<em>{{ text }}</em>{% endset %}{% endif %}
{%- if span.trained %}<b>{{ text }}</b>{% else %}{{ text }}{% endif %}
{%- if span.special and not loop.last %}{{ "\\n" }}{% endif %}
{%- endfor %}
{%- if sample.padding %}<span class="pad"> … {{ "{:,}".format(sample.padding) }} tokens of padding</span>{% endif -%}
</pre></section>
{%- endfor %}
</body>
</html>
"""


def render(mixture: MixtureFigures, quarantines: Sequence[Quarantine], samples: Sequence[Sample]) -> str:
    """The page as HTML. Whatever data hold is escaped, and a browser is told to run nothing."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(visible=visible, lines=spelled_lines)
    environment.globals.update(colour=_colour, number=number, percent=percent, sample_title=sample_title)
    return environment.from_string(_TEMPLATE).render(
        mixture=mixture,
        quarantines=quarantines,
        samples=samples,
        title=mixture_title(mixture),
        note=mixture_note(mixture),
    )


def write(path: Path, mixture: MixtureFigures, quarantines: Sequence[Quarantine], samples: Sequence[Sample]) -> None:
    """Write the page; it appears when it is whole."""
    storage.write_text(path, render(mixture, quarantines, samples))


def _colour(source: int) -> str:
    """A colour for a source, far from those of its neighbours, readable on light and dark."""
    return f"hsl({(205 + source * 137.5) % 360:.0f} 60% 52%)"
