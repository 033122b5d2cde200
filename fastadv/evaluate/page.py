"""The report of one network as a page: a single HTML file without scripts or other files."""

from .figures import class_bars, heat_map, interval_bar, reliability
from .markup import Markup, element, join, table

MAPPED = 100  # classes up to which there is a heat map, and a row for each class
SHOWN = 20  # classes that are shown of more
FREQUENT = 10  # confusions
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5b6875; --line: #d8dee5; --blue: #1f5fa8;
  --pale: #a9c6e8; --red: #b8432f; --paper: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, dl { margin: .5rem 0; max-width: 46rem; } .soft { color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.figure { background: var(--paper); border-radius: .5rem; padding: .75rem 1.25rem; }
.figure b { display: block; font-size: 1.7rem; line-height: 1.2; }
.warnings { border-left: .3rem solid var(--red); background: #fbeeeb; padding: .5rem 1rem;
  margin: 1rem 0; } .warnings ul { margin: .25rem 0; padding-left: 1.25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; } th:first-child { text-align: left; } thead th { color: var(--soft); }
tbody th { font-weight: 500; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; vertical-align: middle; font: 11px system-ui, sans-serif;
  fill: var(--ink); } svg .title { font-size: 13px; font-weight: 600; } .small { font-size: 10px; }
td svg { max-width: none; } .track { fill: #e9edf1; } .pale { fill: var(--pale); }
.bar, .right { fill: var(--blue); }
.wrong { fill: var(--red); } .frame { fill: none; stroke: var(--line); } .light { fill: #fff; }
.whisker { stroke: var(--ink); stroke-width: 2; }
.diagonal { stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 5 4; }
"""


def page(report):
    """The HTML of a report, the content of a report.json. Whatever it says is escaped."""
    title = f"{report.get('checkpoint', report.get('architecture', 'Network'))}"
    sections = join(section(report) for section in SECTIONS)
    head = element(
        "head",
        Markup('<meta charset="utf-8"/>'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1"/>'),
        element("title", f"{title}: robustness"),
        element("style", Markup(STYLE)),
    )
    body = element("body", element("main", element("h1", title), sections))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _summary(report):
    chosen = report.get("chosen", f"{report['images']} images")
    words = [report[name] for name in ("architecture", "dataset", "split") if name in report]
    line = f"{', '.join(words)}: {chosen}, {report['norm']} eps {report['eps']}"
    shown = [_figure("clean accuracy", report["clean_acc"])]
    if "robust_acc" in report:
        low, high = report["by_class"]["worst case"]["interval"]
        text = f"worst case, 95 % interval {low} to {high}"
        shown.append(_figure(text, report["robust_acc"]))
    if "autoattack_acc" in report:
        shown.append(_figure("AutoAttack", report["autoattack_acc"]))
    if corrupted := report.get("corruptions"):
        shown.append(_figure("mean error under corruptions", corrupted["mean_error"]))
        if "mce" in corrupted:
            shown.append(_figure("mCE, of AlexNet's error", corrupted["mce"]))
    return [element("p", line, class_="soft"), element("div", shown, class_="figures")]


def _figure(text, percent):
    return element("div", element("b", f"{percent} %"), text, class_="figure")


def _warnings(report):
    if not report["warnings"]:
        return None
    items = element("ul", [element("li", warning) for warning in report["warnings"]])
    lead = element("strong", "These make the numbers doubtful:")
    return element("div", lead, items, class_="warnings", role="note")


def _attacks(report):
    columns = (
        "attack",
        "accuracy, %",
        "95 % interval",
        "",
        "images",
        "seconds",
        "forward",
        "backward",
    )
    rows = []
    for name, found in report["attacks"].items():
        low, high = found["interval"]
        bar = interval_bar(*map(float, (found["accuracy"], low, high)))
        cost = found["images"], f"{found['seconds']:.1f}", found["forwards"], found["backwards"]
        rows.append([name, found["accuracy"], f"{low} to {high}", bar, *cost])
    caption = (
        "Accuracy under each attack (after a suite's earlier ones), and what it cost: images "
        "attacked, seconds, images passed forward and backward."
    )
    cost = report["cost"]
    total = (
        f"In all {cost['seconds']:.1f} seconds, {cost['forwards']} images forward and "
        f"{cost['backwards']} backward."
    )
    text = element("p", total, class_="soft")
    return [element("h2", "Attacks"), table(caption, columns, rows), text]


def _corruptions(report):
    if not (found := report.get("corruptions")):
        return None
    rows = []
    for name, accuracy in found["accuracy"].items():
        values = [float(value) for value in accuracy]
        mean = f"{sum(values) / len(values):.2f}"
        rows.append([name.replace("_", " "), *map(_shaded, values), mean])
    columns = "corruption", *(f"severity {i}" for i in range(1, 6)), "mean"
    caption = f"Accuracy, %, on corrupted images: {found['source']}."
    return [element("h2", "Corruptions"), table(caption, columns, rows)]


def _shaded(value):
    """A cell that is the redder the lower its accuracy, in percent."""
    return element(
        "td", f"{value:.2f}", style=f"background: rgb(184 67 47 / {0.45 - 0.0045 * value:.2f})"
    )


def _names(report):
    """The names of all classes that the report has, by number."""
    confusion = report.get("confusion", {}).values()
    numbers = [int(label) for label in report["by_class"]["clean"]["accuracy"]]
    numbers += [int(n) for rows in confusion for true, row in rows.items() for n in (true, *row)]
    given = report.get("classes") or ()
    return [given[i] if i < len(given) else str(i) for i in range(max(numbers) + 1)]


def _classes(report):
    clean, worst = (report["by_class"][name]["accuracy"] for name in ("clean", "worst case"))
    names = _names(report)
    order = sorted(worst, key=lambda label: float(worst[label]))
    some = len(order) > MAPPED
    caption = f"The {SHOWN} worst of {len(order)} classes." if some else "The worst class first."
    rows = [
        [names[int(n)], clean[n], worst[n], class_bars(float(clean[n]), float(worst[n]))]
        for n in order[: SHOWN if some else None]
    ]
    columns = "class", "clean, %", "worst case, %", ""
    return [element("h2", "Classes"), table(caption, columns, rows)]


def _confusion(report):
    if "confusion" not in report:
        return None
    names, maps, found = _names(report), [], {}
    for title, rows in report["confusion"].items():
        counts = {int(n): {int(k): v for k, v in row.items()} for n, row in rows.items()}
        found[title] = counts
        if len(names) <= MAPPED:
            maps.append(heat_map(title, counts, names))
    pairs = [
        (count, true, guess)
        for true, row in found["worst case"].items()
        for guess, count in row.items()
        if guess != true
    ]
    pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:FREQUENT]
    rows = [[names[true], names[guess], count] for count, true, guess in pairs]
    text = (
        "What images are taken for. In the worst case an image counts by the first example that is "
        "misclassified, and if none is, by the one that the network is least sure of."
    )
    frequent = table(
        "The most frequent confusions in the worst case.", ("class", "taken for", "images"), rows
    )
    parts = element("p", text, class_="soft"), element("div", maps, class_="figures")
    return [element("h2", "Confusion"), *parts, frequent if rows else None]


def _calibration(report):
    if "calibration" not in report:
        return None
    text = (
        "Accuracy over confidence, in 15 bins of equal width. The bars of a calibrated network end "
        "at the dashed line; ECE is the mean distance from it."
    )
    drawn = [reliability(name, v["ece"], v["bins"]) for name, v in report["calibration"].items()]
    parts = element("p", text, class_="soft"), element("div", drawn, class_="figures")
    return [element("h2", "Calibration"), *parts]


def _settings(report):
    """All that is a single value."""
    rows = [
        [element("dt", name.replace("_", " ")), element("dd", value)]
        for name, value in report.items()
        if isinstance(value, (str, int, float)) and not name.endswith("_acc")
    ]
    return [element("h2", "Settings"), element("dl", rows)]


SECTIONS = (
    _summary,
    _warnings,
    _attacks,
    _corruptions,
    _classes,
    _confusion,
    _calibration,
    _settings,
)
