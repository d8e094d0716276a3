"""The report's page, a template of Jinja's: in Python, as Flower's bundle takes no other file."""

# ruff: noqa: E501
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1c2430; --soft: #5b6675; --line: #d9dee6; --page: #ffffff; --mark: #eef4ff }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ee; --soft: #9aa5b4; --line: #333b47; --page: #14181e; --mark: #1d2a40 }
}
body { margin: 0 auto; padding: 1rem; max-width: 1400px; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: .3rem 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: .95rem; margin: .3rem 0 0; font-weight: 600; text-align: center }
p { color: var(--soft); margin: .3rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid var(--soft) }
td.best { font-weight: 700; background: var(--mark) }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); gap: .5rem }
.panels > div { min-width: 0 }
.plot { height: 340px }
details { margin: 1rem 0 }
figure { margin: 0; min-width: 0 }
figure img { width: 100%; height: auto; background: #ffffff; border-radius: 4px }
figcaption { color: var(--soft); text-align: center; font-size: .85rem; overflow-wrap: anywhere }
summary { cursor: pointer; font-weight: 600 }
.runs { font-size: .85rem }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ runs }} runs. Drag over a curve to zoom, double-click to go back; a click on a name in a legend hides it.</p>

{% if verdicts %}
<h2>What the runs say</h2>
<ul id="verdicts">
{% for line in verdicts %}
<li>{{ line }}</li>
{% endfor %}
</ul>
<p>Points of {{ headline }}, with 95% intervals of differences paired over seeds; unclear: the interval holds zero.</p>
{% endif %}

<h2>{{ headline }} (%)</h2>
<div class="wide"><table id="headlines">
<thead><tr><th>method</th>{% for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row, cells in table.rows %}
<tr><td>{{ row }}</td>{% for text, best in cells %}<td{% if best %} class="best"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
<p>{{ note }}</p>

{% if measures %}
<h2>What was measured of the trained models</h2>
{% for table in measures %}
{% if table.title %}<h3>{{ table.title }}</h3>{% endif %}
<div class="wide"><table class="measures">
<thead><tr>{% for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for values in table.rows %}
<tr>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
<p>Mean and sample standard deviation over seeds; of the evaluated model.</p>
{% endif %}

{% if taus %}
<h2>Does it go with the generalisation gap?</h2>
<div class="wide"><table id="taus">
<thead><tr><th>data set</th><th>measure</th><th>gap of the</th><th>Kendall's tau</th></tr></thead>
<tbody>
{% for line in taus %}
<tr>{% for value in line %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
<p>{{ tau_note }}</p>
{% endif %}

{% for heading, panels in sections %}
<h2>{{ heading }}</h2>
<div class="panels">
{% for name, title in panels.items() %}
<div>{% if title %}<h3>{{ title }}</h3>{% endif %}<div class="plot" id="{{ name }}" style="height: {{ plots[name].height }}px"></div></div>
{% endfor %}
</div>
{% endfor %}

<h2>Partition: images by client and class</h2>
<p>Of each column's first seed; at most {{ shown }} clients are shown.</p>
{% for name, title in splits.items() %}
{% if title %}<h3>{{ title }}</h3>{% endif %}<div class="plot" id="{{ name }}"></div>
{% endfor %}

{% if pictures %}
<h2>Pictures of the runs</h2>
{% if left_out %}<p>{{ left_out }} more are in the folders of the runs.</p>{% endif %}
<div class="panels">
{% for picture in pictures %}
<figure><img src="{{ picture.data }}" alt="{{ picture.text }}" loading="lazy"><figcaption>{{ picture.text }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}

<h2>Runs, and in what their configs differ</h2>
<div class="wide"><table class="runs" id="runs">
<thead><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for line in lines %}
<tr>{% for value in line %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>

<details>
<summary>What all runs share</summary>
<div class="wide"><table id="shared"><tbody>
{% for key, value in shared.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
{% for key, value in versions.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
</details>

<script>{{ plotly | safe }}</script>
<script type="application/json" id="plots">{{ plots | tojson }}</script>
<script>
const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const tools = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
const touch = matchMedia("(pointer: coarse)").matches;  // there a drag scrolls, and the chart's tools zoom

function colors() {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map(name => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return { text, line, axis };
}
function draw() {
  const { text, line, axis } = colors();
  for (const [name, { data, layout }] of Object.entries(plots)) {
    Plotly.react(name, data, {
      ...layout,
      xaxis: { ...axis, ...layout.xaxis, automargin: true },
      yaxis: { ...axis, ...layout.yaxis, automargin: true },
      margin: { l: 50, r: 10, t: 28, b: 40 },
      legend: { orientation: "h", y: -0.25 },
      dragmode: touch ? false : "zoom",
      font: { color: text, family: "system-ui, sans-serif" },
      hoverlabel: { bgcolor: line, font: { color: text } },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      uirevision: "keep",
    }, { responsive: true, displaylogo: false, displayModeBar: touch || "hover", modeBarButtons: tools });
  }
}
draw();
dark.addEventListener("change", draw);
</script>
</body>
</html>
"""
