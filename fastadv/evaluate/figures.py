"""The drawings of the report's page, as inline SVG."""

from .markup import element, svg

SIDE = 300  # of a square drawing, in pixels
MARGIN = 46  # for the labels of its axes
NUMBERED = 12  # classes up to which a heat map has the number of images in each cell


def interval_bar(rate, low, high):
    """An accuracy as a bar with its interval as a line; all in percent."""
    return svg(
        120,
        14,
        f"{rate:g} %, between {low:g} and {high:g}",
        element("rect", x=0, y=2, width=120, height=10, class_="track"),
        element("rect", x=0, y=2, width=f"{1.2 * rate:.1f}", height=10, class_="bar"),
        element(
            "line", x1=f"{1.2 * low:.1f}", x2=f"{1.2 * high:.1f}", y1=7, y2=7, class_="whisker"
        ),
    )


def class_bars(clean, worst):
    """Clean and worst-case accuracy, in percent, one over the other."""
    return svg(
        200,
        14,
        f"clean {clean:g} %, worst case {worst:g} %",
        element("rect", x=0, y=2, width=200, height=10, class_="track"),
        element("rect", x=0, y=2, width=f"{2 * clean:.1f}", height=10, class_="pale"),
        element("rect", x=0, y=2, width=f"{2 * worst:.1f}", height=10, class_="bar"),
    )


def _axes(title, x_label, y_label):
    """The frame of a square drawing."""
    middle = MARGIN + SIDE / 2
    turned = f"rotate(-90 12 {MARGIN / 2 + SIDE / 2:g})"
    return [
        element("rect", x=MARGIN, y=MARGIN / 2, width=SIDE, height=SIDE, class_="frame"),
        element("text", title, x=middle, y=14, text_anchor="middle", class_="title"),
        element("text", x_label, x=middle, y=SIDE + MARGIN + 18, text_anchor="middle"),
        element(
            "text", y_label, x=12, y=MARGIN / 2 + SIDE / 2, text_anchor="middle", transform=turned
        ),
    ]


def reliability(title, ece, bins):
    """Accuracy over confidence in bins of equal width, beside the diagonal of a calibrated network.
    The darker a bar, the more images it has."""
    width, foot = SIDE / len(bins), MARGIN / 2 + SIDE
    most = max(row["images"] for row in bins)
    parts = []
    for i, row in enumerate(bins):
        if not row["images"]:
            continue
        sure, rate = row["confidence"], row["accuracy"]
        height = SIDE * float(rate) / 100
        text = f"{row['images']} images: confidence {sure} %, accuracy {rate} %"
        parts.append(
            element(
                "rect",
                element("title", text),
                x=f"{MARGIN + i * width:.1f}",
                y=f"{foot - height:.1f}",
                width=f"{width - 1:.1f}",
                height=f"{height:.1f}",
                class_="bar",
                fill_opacity=f"{0.3 + 0.7 * (row['images'] / most) ** 0.5:.2f}",
            )
        )
    ticks = []
    for share in (0, 50, 100):
        place = SIDE * share / 100
        ticks += [
            element("text", share, x=f"{MARGIN + place:g}", y=foot + 14, text_anchor="middle"),
            element("text", share, x=MARGIN - 5, y=f"{foot - place + 4:g}", text_anchor="end"),
        ]
    line = element("line", x1=MARGIN, y1=foot, x2=MARGIN + SIDE, y2=foot - SIDE, class_="diagonal")
    label = f"Reliability, {title}: expected calibration error {ece} %"
    heading = f"{title}: ECE {ece} %"
    axes = _axes(heading, "confidence, %", "accuracy, %")
    return svg(SIDE + MARGIN + 20, SIDE + MARGIN + 26, label, axes, parts, line, ticks)


def heat_map(title, counts, names):
    """What the images of each class are taken for. counts: {class: {predicted: images}} by number;
    names: of all classes. A cell is as dark as its share of the row's images, on a square root."""
    cell, classes = SIDE / len(names), range(len(names))
    parts = []
    for true, row in counts.items():
        total = sum(row.values())
        for guess, count in row.items():
            left, top = MARGIN + guess * cell, MARGIN / 2 + true * cell
            share = count / total
            text = f"{names[true]} taken for {names[guess]}: {count} of {total}"
            parts.append(
                element(
                    "rect",
                    element("title", text),
                    x=f"{left:.2f}",
                    y=f"{top:.2f}",
                    width=f"{cell:.2f}",
                    height=f"{cell:.2f}",
                    class_="right" if guess == true else "wrong",
                    fill_opacity=f"{share**0.5:.3f}",
                )
            )
            if len(names) <= NUMBERED:
                place = {"x": f"{left + cell / 2:.1f}", "y": f"{top + cell / 2 + 4:.1f}"}
                tone = "light" if share > 0.5 else "count"
                parts.append(element("text", count, **place, text_anchor="middle", class_=tone))
    labels = []
    for i in classes if len(names) <= NUMBERED else (0, len(names) - 1):
        text = names[i] if len(names) <= NUMBERED else str(i)
        short = text if len(text) <= 6 else f"{text[:5]}…"
        middle = (i + 0.5) * cell
        place = {"x": f"{MARGIN + middle:.1f}", "y": MARGIN / 2 + SIDE + 13}
        labels.append(element("text", short, **place, text_anchor="middle", class_="small"))
        place = {"x": MARGIN - 4, "y": f"{MARGIN / 2 + middle + 4:.1f}"}
        labels.append(element("text", short, **place, text_anchor="end", class_="small"))
    wrong = sum(n for true, row in counts.items() for guess, n in row.items() if guess != true)
    label = f"Confusion, {title}: {wrong} images are taken for another class"
    axes = _axes(title, "predicted class", "class")
    return svg(SIDE + MARGIN + 20, SIDE + MARGIN + 26, label, parts, axes, labels)
