"""The report as a page: whole, escaped, and on its own."""

import json
import re
from xml.etree import ElementTree

import pytest

from fastadv.evaluate.__main__ import main
from fastadv.evaluate.figures import heat_map, reliability
from fastadv.evaluate.markup import Markup, element, table
from fastadv.evaluate.page import page

EVIL = "</title><script>alert('1')</script><img src=x onerror=\"alert(1)\">&amp;"


def report(classes=3, **changed):
    """A report.json, with numbers that are easily found again."""
    numbers = [str(i) for i in range(classes)]
    whole = {
        "architecture": "resnet18",
        "dataset": "cifar10",
        "checkpoint": "runs/at",
        "split": "test",
        "images": 1000,
        "norm": "linf",
        "eps": "8/255",
        "clean_acc": "84.12",
        "robust_acc": "51.34",
        "warnings": [],
        "attacks": {
            "clean": attack("84.12", ["81.1", "87.2"]),
            "fgsm": attack("57.77", ["54.4", "60.1"]),
        },
        "by_class": {
            name: {"interval": ["48.1", "54.6"], "accuracy": dict.fromkeys(numbers, "61.5")}
            for name in ("clean", "worst case")
        },
        "confusion": {
            name: {n: {n: 321, str((int(n) + 1) % classes): 123} for n in numbers}
            for name in ("clean", "worst case")
        },
        "calibration": {
            name: {"ece": "7.89", "bins": [{"images": 0}, bin_of("71.2", "65.4")]}
            for name in ("clean", "worst case")
        },
        "cost": {"seconds": 12.34, "forwards": 98765, "backwards": 43210},
    }
    return whole | changed


def attack(accuracy, interval):
    cost = {"images": 1000, "seconds": 6.1, "forwards": 2000, "backwards": 1000}
    return {"accuracy": accuracy, "interval": interval, **cost}


def bin_of(confidence, accuracy):
    return {"images": 77, "confidence": confidence, "accuracy": accuracy}


def tree(text):
    """The page as XML, which a tag that is left open or text that is not escaped would break."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(root, tag):
    return ["".join(e.itertext()) for e in root.iter(tag)]


def test_a_page_says_what_the_report_does():
    text = page(report() | {"classes": ["ant", "bee", "cow"]})
    root = tree(text)
    assert words(root, "h1") == ["runs/at"]
    assert words(root, "h2") == ["Attacks", "Classes", "Confusion", "Calibration", "Settings"]
    assert words(root, "b") == ["84.12 %", "51.34 %"]
    cells = words(root, "td")
    for value in ("57.77", "54.4 to 60.1", "61.5", "123"):
        assert value in cells
    assert {"ant", "bee", "cow", "fgsm"} <= {*words(root, "th")}
    titles = words(root, "title")
    assert "ant taken for bee: 123 of 444" in titles
    assert "77 images: confidence 71.2 %, accuracy 65.4 %" in titles
    assert "98765 images forward" in text
    assert "clean: ECE 7.89 %" in text
    assert "These make the numbers doubtful" not in text


def test_whatever_it_says_is_escaped():
    evil = report(checkpoint=EVIL, dataset=EVIL, warnings=[EVIL], architecture=EVIL, chosen=EVIL)
    evil |= {"classes": [EVIL, "b", "c"], EVIL: EVIL, "eps": EVIL, "norm": EVIL}
    evil["attacks"] = {EVIL: attack("1", ["0", "2"]), "clean": attack("3", ["1", "4"])}
    evil["corruptions"] = {
        "source": EVIL,
        "mean_error": EVIL,
        "mce": EVIL,
        "accuracy": {EVIL: ["1"] * 5},
    }
    root = tree(page(evil))
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "img", "iframe", "link", "object"}
    assert not [k for e in root.iter() for k in e.attrib if k.startswith("on")]
    assert words(root, "h1") == [EVIL]
    assert EVIL in words(root, "li")
    for tag in ("th", "dd", "dt"):
        assert any(EVIL.replace("_", " ") in text for text in words(root, tag)), tag
    assert any(EVIL in label for label in words(root, "title")[1:])


def test_it_needs_no_other_file_and_no_script():
    text = page(report())
    assert not re.search(r"src=|href=|url\(|@import|https?:|<script", text)
    assert "default-src 'none'" in text
    root = tree(text)
    assert root.attrib["lang"] == "en"
    drawings = [*root.iter("svg")]
    assert len(drawings) == 2 + 3 + 2 + 2  # attacks, classes, maps, reliability
    for drawing in drawings:
        assert drawing.attrib["role"] == "img"
        assert drawing.attrib["aria-label"] == drawing.find("title").text
    assert all("scope" in head.attrib for head in root.iter("th"))


def test_parts_that_a_report_has_not_are_left_out():
    bare = {
        k: v for k, v in report().items() if k not in ("confusion", "calibration", "robust_acc")
    }
    root = tree(page(bare))
    assert words(root, "h2") == ["Attacks", "Classes", "Settings"]
    assert words(root, "b") == ["84.12 %"]
    warned = tree(page(report(warnings=["the gradients are masked"])))
    assert words(warned, "li") == ["the gradients are masked"]
    (note,) = (e for e in warned.iter("div") if e.attrib.get("role") == "note")
    assert "doubtful" in "".join(note.itertext())
    accuracy = {"fog": ["90.00", "80.00", "70.00", "60.00", "50.00"]}
    found = {"source": "generated", "mean_error": "30.00", "mce": "44.44", "accuracy": accuracy}
    corrupted = tree(page(report(corruptions=found)))
    assert "Corruptions" in words(corrupted, "h2")
    assert [c for c in words(corrupted, "td") if c.endswith("0.00")][:6] == [
        *accuracy["fog"],
        "70.00",
    ]
    assert words(corrupted, "b")[2:] == ["30.00 %", "44.44 %"]


def test_of_many_classes_the_worst_are_shown():
    many = report(classes=101)
    many["by_class"]["worst case"]["accuracy"]["77"] = "0.00"
    root = tree(page(many))
    assert not [svg for svg in root.iter("svg") if svg.attrib["aria-label"].startswith("Confusion")]
    heads = words(root, "th")
    assert "77" in heads
    assert "The 20 worst of 101 classes." in words(root, "caption")
    assert len([s for s in root.iter("svg") if s.attrib["aria-label"].startswith("clean")]) == 20
    assert len(tree(page(report(classes=100))).findall(".//rect[@class='wrong']")) == 200


def rects(drawing, kind):
    found = ElementTree.fromstring(drawing).findall(f".//rect[@class='{kind}']")
    return [{k: v for k, v in rect.attrib.items() if k != "class"} for rect in found]


def test_cells_lie_in_the_row_of_their_class():
    """Rows are true classes, from the top; columns what they are taken for."""
    drawing = heat_map("clean", {0: {1: 1, 0: 3}, 1: {1: 5}}, ["a", "b"])
    (wrong,) = rects(drawing, "wrong")
    right = rects(drawing, "right")
    assert float(wrong["x"]) > float(right[0]["x"])
    assert wrong["y"] == right[0]["y"]
    assert float(right[1]["y"]) > float(wrong["y"])
    assert right[1]["x"] == wrong["x"]
    assert float(wrong["fill-opacity"]) == 0.5
    assert float(right[1]["fill-opacity"]) == 1


def test_bars_are_as_high_as_the_accuracy():
    drawing = reliability("clean", "1", [{"images": 0}, bin_of("71.2", "25"), bin_of("90", "100")])
    low, high = rects(drawing, "bar")
    assert float(low["height"]) == 75
    assert float(high["height"]) == 300
    assert float(low["y"]) + float(low["height"]) == float(high["y"]) + float(high["height"])
    assert float(high["x"]) - float(low["x"]) == pytest.approx(100)


def test_text_is_escaped_once_and_markup_never():
    assert element("p", "a<b", Markup("<i>x</i>"), ["&", None], 3, data_x='"') == (
        '<p data-x="&quot;">a&lt;b<i>x</i>&amp;3</p>'
    )
    cell = element("td", "5", style="color: red")
    found = table("c", ["a", "b"], [["<", cell], ["r", "<td"]])
    assert '<th scope="row">&lt;</th><td style="color: red">5</td>' in found
    assert "<td>&lt;td</td>" in found


def test_the_command_writes_it(teacher, tmp_path, capsys):
    main(f"--checkpoint {teacher} --attacks fgsm --limit 20 --out {tmp_path}".split())
    (path,) = tmp_path.glob("*/report.html")
    found = json.loads(path.with_name("report.json").read_text())
    root = tree(path.read_text())
    assert words(root, "h1") == [str(teacher)]
    assert words(root, "b") == [f"{found[name]} %" for name in ("clean_acc", "robust_acc")]
    assert set(found["calibration"]) == set(found["confusion"]) == {"clean", "worst case"}
    diagonal = sum(row.get(label, 0) for label, row in found["confusion"]["worst case"].items())
    assert f"{100 * diagonal / 20:.2f}" == found["robust_acc"]
    assert sum(row["images"] for row in found["calibration"]["worst case"]["bins"]) == 20
    passes = [attack["forwards"] for attack in found["attacks"].values()]
    assert found["cost"]["forwards"] == sum(passes) > 0
    assert "report.html" in capsys.readouterr().out
