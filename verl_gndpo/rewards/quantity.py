# SPDX-License-Identifier: Apache-2.0
"""Real numbers with units: read from LaTeX or plain text without computer algebra, in microseconds, and compared."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

# Between numbers of which one is a decimal: an answer rounded to four significant digits agrees with the exact value.
RELATIVE_TOLERANCE = 1e-3
# A truth printed with few decimals also accepts what rounds to it (9.2736 for 9.3), unless that is a wide range (0.5).
ROUNDING_RANGE = 0.02
MAX_DIGITS = 400
MAX_DEPTH = 20
_MAX_BITS = 4096

_UNIT_NAMES = {
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "dm": "dm decimeter decimeters decimetre decimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "L": "L l liter liters litre litres",
    "ms": "millisecond milliseconds",
    "s": "s sec second seconds",
    "min": "min minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years",
    "°": "° degree degrees deg",
    "rad": "rad radian radians",
    "%": "% percent",
    "mph": "mph",
    "N": "N newton newtons",
    "J": "J joule joules",
    "W": "W watt watts",
    "V": "V volt volts",
    "A": "A amp amps ampere amperes",
    "Ω": "Ω ohm ohms",
    "Hz": "Hz hertz",
    "Pa": "Pa pascal pascals",
    "K": "K kelvin",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
_UNIT_TOKEN = re.compile(r"\s*(?:\^\s*\{?\s*(?P<power>-?[1-3])\s*\}?|(?P<word>[^\W\d_]+|[°%])\.?|(?P<per>/))")
_CURRENCY = dict.fromkeys(map(ord, "£€¥"))
_SCALE_OR_COMPASS = re.compile(r"°\s*[CFTNSEW](?![a-zA-Z])")

_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|\.(?!\d))?(?:[eE][+-]?\d{1,3}(?![\d.]))?")
_MIXED = re.compile(
    r"(\d{1,20})(?:\s+(\d{1,20})\s*/\s*(\d{1,20})|\s*\\frac\s*\{?\s*(\d{1,20})\s*\}?\s*\{?\s*(\d{1,20})\s*\}?)"
)
_PLAIN = re.compile(r"[+-]?\d[\d,]*(?:\.(\d+))?")
_NAME = re.compile(r"(?:[^\W\d]|[\\ '{}|()]|(?<=[\w}{ ])\d)*")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")
_SEPARATOR = re.compile(r"[,;\n]|\b(?:and|or)\b")


@dataclass(frozen=True)
class Quantity:
    """A real number; whether it is exact (no decimal point); how many decimals it is printed with; its unit or ""."""

    value: Fraction | float
    exact: bool
    decimals: int | None = None
    unit: str = ""


def split_name(cleaned: str) -> tuple[str, str]:
    """`("x", "5")` for `x = 5`; `("", text)` where nothing that could be a name stands before an equals sign."""
    name, equals, value = cleaned.partition("=")
    name = name.strip()
    if not equals or len(name) > 40 or not _NAME.fullmatch(name) or _RELATION.search(value):
        return "", cleaned
    if "=" in value and _SEPARATOR.search(value):
        # x = 3 or x = 5
        return "", cleaned
    # x = 3 + 4 = 7
    return name, value.rpartition("=")[2].strip()


def quantity(cleaned: str, glued_units: bool = False) -> Quantity | None:
    """The real number, with its unit, that a text stands for; None if it stands for anything else.

    Args:
        cleaned: from `latex.clean`. A name and an equals sign before the number are passed over.
        glued_units: a letter that touches the number is a unit too (`5m`), not a variable.
    """
    text = split_name(cleaned)[1].translate(_CURRENCY)
    if sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    if text.count(":") == 1:
        terms = [quantity(term) for term in text.split(":")]
        if any(term is None or term.unit for term in terms) or terms[1].value == 0:
            return None
        return Quantity(terms[0].value / terms[1].value, all(term.exact for term in terms))
    reader = _Reader(text)
    try:
        value = reader.sum()
        finite = math.isfinite(value)
    except (_NotANumber, ArithmeticError, ValueError):
        return None
    rest = _SCALE_OR_COMPASS.sub("°", text[reader.at :])
    unit = _unit(rest, glued_units)
    if unit is None or not finite:
        return None
    number = text[: reader.at].strip()
    plain = _PLAIN.fullmatch(number)
    decimals = len(plain[1] or "") if plain else None
    return Quantity(value, not re.search(r"\.\d|\d[eE]", number), decimals, unit)


def agree(answer: Quantity, truth: Quantity, tolerance: float = 0.0) -> bool:
    """Whether an answer is the truth, as far as the truth is known.

    Units are not converted: if both name one, it must be the same; if one names none, it counts for nothing. A per
    cent sign that only one of them has may stand for a hundredth.

    Args:
        tolerance: absolute, if positive. Without: exact numbers and whole ones must be equal; otherwise within
            `RELATIVE_TOLERANCE`, or within half a unit of the truth's last decimal (see `ROUNDING_RANGE`).
    """
    if answer.unit and truth.unit and answer.unit != truth.unit:
        return False
    values = [answer.value]
    if (answer.unit == "%") != (truth.unit == "%") and not (answer.unit and truth.unit):
        values.append(answer.value / 100 if answer.unit else answer.value * 100)
    return any(_close(value, answer.exact, truth, tolerance) for value in values)


def _close(value: Fraction | float, exact: bool, truth: Quantity, tolerance: float) -> bool:
    difference, size = abs(value - truth.value), abs(truth.value)
    if tolerance > 0:
        return difference <= tolerance * (1 + 1e-9)
    if isinstance(difference, Fraction) and ((exact and truth.exact) or value % 1 == 0 == truth.value % 1):
        return difference == 0
    if truth.exact and (exact or truth.value % 1 == 0):
        return difference <= 1e-9 * max(size, 1e-3)
    allowed = RELATIVE_TOLERANCE * size
    if truth.decimals:
        half_unit = 0.5 * 10.0**-truth.decimals
        if half_unit <= ROUNDING_RANGE * size:
            allowed = max(allowed, half_unit)
    return difference <= allowed * (1 + 1e-9)


def _unit(rest: str, glued: bool) -> str | None:
    """The unit that a text after a number names, "" for none or for a thing counted, None if it is something else."""
    if len(rest) > 40:
        return None
    rest = rest.replace("{", " ").replace("}", " ")
    apart, at, words, power = glued or rest[:1].isspace(), 0, [], ""
    rest = rest.strip()
    while at < len(rest):
        token = _UNIT_TOKEN.match(rest, at)
        if token is None:
            return None
        at = token.end()
        word = token["word"]
        if token["power"]:
            if token["power"].startswith("-"):
                words.insert(-1, "/")
            power += token["power"].lstrip("-").replace("1", "")
        elif token["per"] or word == "per":
            words.append("/")
        elif word.lower() in _POWERS:
            power += _POWERS[word.lower()]
        elif word in _UNITS or (word.lower() in _UNITS and len(word) > 1):
            if len(word) == 1 and word.isalpha() and not apart:
                return None
            words.append(_UNITS.get(word) or _UNITS[word.lower()])
        elif len(word) < 3 or not apart:
            return None
    return "".join(words) + power if words else ""


class _NotANumber(Exception):
    pass


class _Reader:
    """Recursive descent over a constant expression. Stops before what it can't read, which may be a unit."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def peek(self, pattern: str) -> re.Match | None:
        return re.compile(r"\s*(?:" + pattern + ")").match(self.text, self.at)

    def take(self, pattern: str) -> re.Match | None:
        found = self.peek(pattern)
        if found:
            self.at = found.end()
        return found

    def sum(self) -> Fraction | float:
        total = self.product()
        while sign := self.take(r"[+-]"):
            term = self.product()
            total = total + term if sign[0].strip() == "+" else total - term
        return total

    def product(self) -> Fraction | float:
        negative = False
        while sign := self.take(r"[+-]"):
            negative ^= sign[0].strip() == "-"
        result = self.power()
        while True:
            if self.take(r"\*|\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])"):
                result *= self.signed()
            elif self.peek(r"/\s*[\d.({\\-]|\\div(?![a-zA-Z])"):
                self.take(r"/|\\div")
                result /= self.signed()
            elif self.peek(r"[({]|\\frac|\\sqrt|\\pi(?![a-zA-Z])"):
                result *= self.power()
            else:
                return -result if negative else result

    def signed(self) -> Fraction | float:
        return -self.power() if self.take("-") else self.power()

    def power(self) -> Fraction | float:
        base = self.atom()
        if self.take(r"\^"):
            exponent = self.signed() if self.peek("-") else self.atom()
            if isinstance(base, Fraction) and exponent == int(exponent):
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits * abs(exponent) <= _MAX_BITS:
                    return base ** int(exponent)
            return _power(float(base), float(exponent))
        return base

    def atom(self) -> Fraction | float:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotANumber
        value = self.operand()
        self.depth -= 1
        return value

    def operand(self) -> Fraction | float:
        mixed = self.take(_MIXED.pattern)
        if mixed:
            whole, a, b, c, d = mixed.groups()
            return int(whole) + Fraction(int(a or c), int(b or d))
        number = self.peek(_NUMBER.pattern)
        if number and any(map(str.isdigit, number[0])):
            self.at = number.end()
            return Fraction(number[0].strip().rstrip(".").replace(",", ""))
        if self.take(r"\\pi(?![a-zA-Z])"):
            return math.pi
        if self.take(r"\\frac"):
            numerator = self.argument()
            return numerator / self.argument()
        if self.take(r"\\sqrt"):
            degree = self.group("[", "]") if self.peek(r"\[") else 2
            return _root(self.atom(), degree)
        if self.peek(r"\("):
            return self.group("(", ")")
        if self.peek(r"\{"):
            return self.group("{", "}")
        raise _NotANumber

    def argument(self) -> Fraction | float:
        if self.peek(r"[{(]"):
            return self.atom()
        digit = self.take(r"\d")
        return Fraction(digit[0].strip()) if digit else self.atom()

    def group(self, opening: str, closing: str) -> Fraction | float:
        self.take(re.escape(opening))
        value = self.sum()
        if not self.take(re.escape(closing)):
            raise _NotANumber
        return value


def _root(value: Fraction | float, degree: Fraction | float) -> Fraction | float:
    if degree == 2 and isinstance(value, Fraction) and value >= 0:
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root * root == value:
            return root
    return _power(float(value), 1 / float(degree))


def _power(base: float, exponent: float) -> float:
    if base < 0 and exponent % 1:
        raise _NotANumber
    return base**exponent
