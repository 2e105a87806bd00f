"""Pictures that are drawn, with questions whose answers the drawing itself decides: charts, tables, signs, pages.

All are our own, in Pillow with its own font, or in matplotlib.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont

mpl.use("Agg")
from matplotlib import pyplot

SIDE = 336
INK, PAPER = "#1c1c1c", "#fbfaf5"


class Drawn(NamedTuple):
    """A picture with questions and answers."""

    image: Image.Image
    questions: list[tuple[str, str]]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def page(width: int = SIDE, height: int = SIDE, colour: str = PAPER) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def plot(draw: Callable[[pyplot.Axes], None], height: int = 252) -> Image.Image:
    """Let matplotlib draw into a picture of SIDE x `height` pixels."""
    mpl.rcParams["font.size"] = 8
    figure, axes = pyplot.subplots(figsize=(SIDE / 100, height / 100), dpi=100, layout="constrained")
    draw(axes)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    pyplot.close(figure)
    return Image.open(target).convert("RGB")


def bar_chart() -> Drawn:
    sold = {"Mon": 12, "Tue": 30, "Wed": 18, "Thu": 7, "Fri": 24}

    def draw(axes: pyplot.Axes) -> None:
        axes.bar(list(sold), list(sold.values()), color="#3b78b5")
        axes.bar_label(axes.containers[0])
        axes.set(title="Apples sold", ylabel="pieces", ylim=(0, 35))

    return Drawn(plot(draw), [
        ("On which day were the most apples sold?", "Tue"),
        ("How many apples were sold on Friday?", "24"),
        ("Describe the chart.",
         "A bar chart titled 'Apples sold' with one blue bar for each day from Monday to Friday: "
         "12, 30, 18, 7 and 24 pieces. Tuesday has the highest bar and Thursday the lowest."),
    ])  # fmt: skip


def line_chart() -> Drawn:
    months = ["Jan", "Mar", "May", "Jul", "Sep", "Nov"]

    def draw(axes: pyplot.Axes) -> None:
        axes.plot(months, [-2, 4, 13, 19, 13, 3], "o-", color="#c0392b", label="Northby")
        axes.plot(months, [10, 13, 18, 26, 22, 14], "s--", color="#2e7d32", label="Southam")
        axes.set(title="Temperature", ylabel="°C")
        axes.legend()
        axes.grid(alpha=0.3)

    return Drawn(plot(draw), [
        ("Which town is warmer, Northby or Southam?", "Southam"),
        ("In which month are both lines at their highest?", "Jul"),
        ("Describe the chart.",
         "A line chart of temperature in degrees Celsius from January to November for two towns. "
         "Southam, a dashed green line, is always above Northby, a solid red line. Both peak in July."),
    ])  # fmt: skip


def pie_chart() -> Drawn:
    shares = {"rent": 45, "food": 25, "travel": 20, "other": 10}

    def draw(axes: pyplot.Axes) -> None:
        colours = ["#4c72b0", "#dd8452", "#55a868", "#8c8c8c"]
        axes.pie(list(shares.values()), labels=list(shares), autopct="%d%%", colors=colours)
        axes.set_title("Spending")

    return Drawn(plot(draw, SIDE), [
        ("What is the largest part of the spending?", "rent"),
        ("What percentage goes to travel?", "20%"),
        ("Describe the chart.",
         "A pie chart titled 'Spending' with four parts: rent 45%, food 25%, travel 20% and other "
         "10%."),
    ])  # fmt: skip


def receipt() -> Drawn:
    image, draw = page(224, SIDE)
    lines = [("2 x Bread roll", "1.40"), ("Milk 1 l", "1.19"), ("Cheese", "4.75"), ("Tomatoes", "2.30")]
    draw.text((112, 26), "CORNER SHOP", INK, font(22), anchor="mm")
    draw.text((112, 50), "14 March 2024   17:42", INK, font(13), anchor="mm")
    draw.line((16, 66, 208, 66), INK)
    for row, (what, price) in enumerate(lines):
        draw.text((18, 80 + 30 * row), what, INK, font(16))
        draw.text((206, 80 + 30 * row), price, INK, font(16), anchor="ra")
    draw.line((16, 208, 208, 208), INK)
    draw.text((18, 218), "TOTAL", INK, font(22))
    draw.text((206, 218), "9.64", INK, font(22), anchor="ra")
    draw.text((18, 252), "paid by card", INK, font(14))
    draw.text((112, 306), "Thank you!", INK, font(16), anchor="mm")
    return Drawn(image, [
        ("What is the total on the receipt?", "9.64"),
        ("How much does the cheese cost?", "4.75"),
        ("Describe the picture.",
         "A receipt of 'Corner Shop' of 14 March 2024 for bread rolls, milk, cheese and "
         "tomatoes. The total is 9.64, paid by card."),
    ])  # fmt: skip


def timetable() -> Drawn:
    image, draw = page(SIDE, 224, "#ffffff")
    rows = [("Time", "To", "Track"), ("08:05", "Harbour", "3"), ("08:20", "Airport", "1"), ("08:40", "Old Town", "4"),
            ("09:15", "Harbour", "2")]  # fmt: skip
    draw.text((168, 24), "Departures", INK, font(24), anchor="mm")
    for number, row in enumerate(rows):
        top = 46 + 34 * number
        draw.rectangle((14, top, 322, top + 34), outline=INK, fill="#d9e4f2" if number == 0 else "#ffffff")
        for x, text in zip((24, 110, 262), row, strict=True):
            draw.text((x, top + 17), text, INK, font(18), anchor="lm")
    for x in (100, 250):
        draw.line((x, 46, x, 216), INK)
    return Drawn(image, [
        ("From which track does the train to the airport leave?", "1"),
        ("When does the train to Old Town leave?", "08:40"),
        ("Describe the picture.",
         "A table titled 'Departures' with columns Time, To and Track. Four trains leave between "
         "08:05 and 09:15: two to Harbour, one to Airport and one to Old Town."),
    ])  # fmt: skip


def street_sign() -> Drawn:
    image, draw = page(colour="#bcd7ee")
    draw.rectangle((0, 270, SIDE, SIDE), "#7f9a6a")
    draw.rectangle((160, 120, 176, 320), "#6e6e6e")
    draw.rounded_rectangle((30, 60, 306, 140), 10, "#1f6b3a", "#ffffff", 4)
    draw.text((168, 100), "MILL LANE", "#ffffff", font(40), anchor="mm")
    return Drawn(image, [
        ("What does the sign say?", "MILL LANE"),
        ("What colour is the sign?", "green"),
        ("Describe the picture.",
         "A drawing of a green street sign on a gray post. White letters say 'MILL LANE'. Behind "
         "it are a light blue sky and green ground."),
    ])  # fmt: skip


def calendar() -> Drawn:
    image, draw = page()
    draw.rectangle((0, 0, SIDE, 54), "#b03a2e")
    draw.text((168, 27), "JUNE", "#ffffff", font(30), anchor="mm")
    for column, name in enumerate(("Mo", "Tu", "We", "Th", "Fr", "Sa", "Su")):
        draw.text((36 + 44 * column, 76), name, "#777777", font(16), anchor="mm")
    for day in range(1, 31):
        x, y = 36 + 44 * ((day + 4) % 7), 110 + 40 * ((day + 4) // 7)
        if day == 19:
            draw.ellipse((x - 18, y - 18, x + 18, y + 18), outline="#1f4fa3", width=3)
        draw.text((x, y), str(day), INK, font(18), anchor="mm")
    return Drawn(image, [
        ("Which day of the month is circled?", "19"),
        ("Which month is it?", "June"),
        ("Describe the picture.",
         "A calendar page for June with a red heading. The month begins on a Saturday, and the "
         "19th, a Wednesday, has a blue circle around it."),
    ])  # fmt: skip


def clock_face() -> Drawn:
    image, draw = page(colour="#e8e2d4")
    draw.ellipse((28, 28, 308, 308), "#ffffff", INK, 6)
    for hour in range(1, 13):
        angle = math.radians(30 * hour)
        draw.text((168 + 112 * math.sin(angle), 168 - 112 * math.cos(angle)), str(hour), INK, font(26), anchor="mm")
    for degrees, length, width in ((30 * (7 + 30 / 60), 64, 9), (180, 96, 5)):
        angle = math.radians(degrees)
        draw.line((168, 168, 168 + length * math.sin(angle), 168 - length * math.cos(angle)), INK, width)
    draw.ellipse((159, 159, 177, 177), "#b03a2e")
    return Drawn(image, [
        ("What time does the clock show?", "7:30"),
        ("Describe the picture.",
         "A drawing of a round clock with the numbers 1 to 12 on a white face. The hands show half "
         "past seven."),
    ])  # fmt: skip


def park_map() -> Drawn:
    image, draw = page(colour="#dcecc9")
    draw.ellipse((190, 40, 310, 130), "#8fc1e3")
    draw.line((0, 190, SIDE, 190), "#d8b98a", 16)
    draw.line((120, 0, 120, SIDE), "#d8b98a", 16)
    draw.rectangle((30, 230, 90, 290), "#c96f4a")
    for x, y in ((200, 250), (240, 280), (290, 240), (250, 230)):
        draw.ellipse((x - 16, y - 16, x + 16, y + 16), "#3f7d3a")
    for place, text in (((250, 86), "Lake"), ((60, 306), "Kiosk"), ((250, 312), "Wood"), ((60, 30), "Gate")):
        draw.text(place, text, INK, font(20), anchor="mm")
    return Drawn(image, [
        ("How many trees are drawn?", "4"),
        ("What is in the upper right corner of the map?", "a lake"),
        ("Describe the picture.",
         "A simple map of a park. Two paths cross; there is a lake at the upper right, a kiosk at "
         "the lower left, a wood of four trees at the lower right and a gate at the upper left."),
    ])  # fmt: skip


def code_window() -> Drawn:
    image, draw = page(SIDE, 224, "#20242c")
    draw.rectangle((0, 0, SIDE, 28), "#3a404c")
    for x, colour in ((16, "#e06c60"), (36, "#e5c07b"), (56, "#98c379")):
        draw.ellipse((x - 6, 8, x + 6, 20), colour)
    draw.text((168, 14), "area.py", "#d0d0d0", font(14), anchor="mm")
    for row, line in enumerate(("def area(width, height):", "    return width * height", "", "print(area(6, 7))")):
        draw.text((20 + 24 * (len(line) - len(line.lstrip())) // 4, 50 + 38 * row), line.strip(), "#d7e3c4", font(20))
    return Drawn(image, [
        ("What is the name of the function?", "area"),
        ("What number does this program print?", "42"),
        ("Describe the picture.",
         "A dark editor window with the file area.py. It defines a Python function 'area' that "
         "multiplies width and height, and prints its value for 6 and 7."),
    ])  # fmt: skip


def traffic_light() -> Drawn:
    image, draw = page(224, SIDE, "#c7d3dc")
    draw.rectangle((104, 260, 120, SIDE), "#555555")
    draw.rounded_rectangle((62, 24, 162, 264), 18, "#2b2b2b")
    for y, colour in ((66, "#4a1f1c"), (144, "#4a431c"), (222, "#2ecc55")):
        draw.ellipse((80, y - 32, 144, y + 32), colour)
    return Drawn(image, [
        ("Which light is on?", "green"),
        ("Describe the picture.",
         "A drawing of a traffic light on a gray background. The red and yellow lights are dark; "
         "the green light at the bottom is on."),
    ])  # fmt: skip


def shapes_on_a_board() -> Drawn:
    image, draw = page(colour="#f4f4f4")
    board = ["R.B.", ".B.R", "B..B", ".R.."]
    for row, line in enumerate(board):
        for column, piece in enumerate(line):
            x, y = 8 + 80 * column, 8 + 80 * row
            draw.rectangle((x, y, x + 80, y + 80), "#ffffff" if (row + column) % 2 else "#e3dccb", "#999999")
            if piece == "R":
                draw.ellipse((x + 16, y + 16, x + 64, y + 64), "#d03030")
            elif piece == "B":
                draw.rectangle((x + 18, y + 18, x + 62, y + 62), "#2f5fd0")
    return Drawn(image, [
        ("How many red circles are on the board?", "3"),
        ("How many blue squares are on the board?", "4"),
        ("Describe the picture.",
         "A board of four by four fields with three red circles and four blue squares on it. The "
         "other nine fields are empty."),
    ])  # fmt: skip


CALIBRATION = (bar_chart, pie_chart, receipt, street_sign, calendar, park_map, code_window, shapes_on_a_board)
HELD_OUT = (line_chart, timetable, clock_face, traffic_light)
