# SPDX-License-Identifier: Apache-2.0
"""Read real numbers with units from LaTeX or plain text, and compare them. Takes microseconds, no computer algebra."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

# If at least one number is a decimal. An answer rounded to four significant digits agrees with the exact value.
RELATIVE_TOLERANCE = 1e-3
# A truth with few decimals also accepts numbers that round to it (9.2736 for 9.3), unless half a unit of its last
# decimal is more than this share of it (0.54 for 0.5).
ROUNDING_RANGE = 0.02
MAX_DIGITS = 400
MAX_DEPTH = 20
# Larger powers are computed in floating point.
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
    "%": "% percent pct percentage",
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
_CHINESE_UNITS = {"毫米": "mm", "厘米": "cm", "分米": "dm", "米": "m", "千米": "km", "公里": "km", "度": "°"} | {
    "克": "g",
    "千克": "kg",
    "公斤": "kg",
    "升": "L",
    "毫升": "ml",
    "秒": "s",
    "分钟": "min",
    "小时": "h",
    "天": "day",
}
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()} | _CHINESE_UNITS
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3", "平方": "2", "立方": "3"}
_SCALES: dict[str, Fraction | int] = {
    "quarter": Fraction(1, 4),
    "third": Fraction(1, 3),
    "half": Fraction(1, 2),
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "万": 10**4,
    "亿": 10**8,
}
_SCALES |= {name + "s": scale for name, scale in _SCALES.items() if name.isascii()} | {"halves": Fraction(1, 2)}
# Words that show that the answer is not just a number.
_NO_UNIT = re.compile(r"(?:not?|nor|never|none|wrong|incorrect|false|except|without|plus|minus|over|than)$|.*[不非错]")
# Any answer may have these.
_ANY_UNIT = re.compile(r"units?$")
_PLURAL = re.compile(r"(?:ies|es|s|e|y)+$")
_UNIT_TOKEN = re.compile(
    r"\s*(?:\^\s*\{?\s*(?P<power>-?[1-3])\s*\}?|(?P<word>平方|立方|[万亿]|[^\W\d_]+|[°%])\.?|(?P<per>/))"
)
_BRACKETED_UNIT = re.compile(r"(?<=\d)\s*\(\s*([a-zA-Z]{2,})\s*\)$")
_CURRENCY = dict.fromkeys(map(ord, "£€¥"))
# A temperature scale or a direction.
_AFTER_DEGREES = re.compile(r"[CFTNSEW]")

_NUMBER = re.compile(
    r"(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?! ?\d)|\d+)?(?:\.\d+|\.(?!\d))?(?:[eE][+-]?\d{1,3}(?![\d.]))?"
)
_MIXED = re.compile(
    r"(\d{1,20})(?:\s+(\d{1,20})\s*/\s*(\d{1,20})|\s*\\frac\s*\{?\s*(\d{1,20})\s*\}?\s*\{?\s*(\d{1,20})\s*\}?)"
)
_PLAIN = re.compile(r"[+-]?\d[\d, ]*(?:\.(\d+))?")
_NAME = re.compile(
    r"(?:[^\W\d]|[\\ '{}|():]|(?<=[\w}{ ])\d|(?<=[a-zA-Z])\.|(?<=[\w}\)]),(?=[^()]*\))|(?<=[a-zA-Z]\()\d)*"
)
# AB/CD = 2 and S_1/S_2 = 4.
_RATIO_NAME = re.compile(r"\s*(?:[A-Z]'*_?\{?\s*(?:\d|[A-Z]'*){1,4}\}?\s*(?:/|\\div|$)\s*){2}")
_INVERSE = re.compile(r"\s*[a-z]\s*\^\s*\{?\s*-\s*1\s*\}?\s*\(\s*[a-z]\s*\)\s*")
_NUMERIC_NAME = re.compile(r"(?:\\(?:frac|sqrt|pi)(?![a-zA-Z])|[\W\d_])+")
_OPERATION = re.compile(r"\\(?:cup|cap|times|cdot|div|pm|perp|parallel)(?![a-zA-Z])")
# xy = 12, |x| = 3 and \\sqrt{x} = 3 are equations, while AB, |AB| and |z| are names of what is asked for.
_EQUATED = re.compile(
    r"\s*(?:[a-z]\s*/\s*[a-z]|\\frac\s*\{?\s*[a-z]\s*\}?\s*\{?\s*[a-z]\s*\}?|(?:[a-z](?:_\{?\w\}?)?\s*){2}|(?:[xyz]\s*){2,}|\\sqrt\s*\{?\s*[a-z]\s*\}?|\|\s*[t-y]\s*\|)\s*"
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")
# Not inside the braces of a sum's limits.
EQUALS = re.compile(r"=(?![^{}]*\})")
_SEPARATOR = re.compile(r"[,;\n]|\b(?:and|or)\b")


@dataclass(frozen=True)
class Quantity:
    """A real number with its words.

    Attributes:
        value: the number, multiplied by words such as "million" and "half".
        exact: True if it was written without a decimal point.
        decimals: number of decimals if it was written as a plain decimal number, else None.
        units: its unit, what it counts, a direction.
    """

    value: Fraction | float
    exact: bool
    decimals: int | None = None
    units: frozenset[str] = frozenset()


def split_name(cleaned: str) -> tuple[str, str]:
    """Split `x = 5` into `("x", "5")`. Return `("", cleaned)` if no name and equals sign come first."""
    name, equals, value = cleaned.partition("=")
    name = name.strip()
    if name.count("{") != name.count("}"):
        # The lower limit of a sum.
        return "", cleaned
    if (
        not equals
        or len(name) > 40
        or not any(pattern.fullmatch(name) for pattern in (_NAME, _RATIO_NAME, _INVERSE))
        or _NUMERIC_NAME.fullmatch(name)
        or (_OPERATION.search(name) and not _RATIO_NAME.fullmatch(name))
        or _EQUATED.fullmatch(name)
        or _RELATION.search(value)
    ):
        return "", cleaned
    if "=" in value and _SEPARATOR.search(value):
        # x = 3 or x = 5
        return "", cleaned
    # x = 3 + 4 = 7. In x = 2√3 = 3.46, the last one is rounded.
    sides = [side.strip() for side in EQUALS.split(value)]
    if len(sides) > 1:
        exact, rounded = (quantity(side) for side in sides[-2:])
        if exact and rounded and exact.exact and not rounded.exact and agree(exact, rounded):
            return name, sides[-2]
    return name, sides[-1]


def quantity(cleaned: str, glued_units: bool = False) -> Quantity | None:
    """Return the real number, with its unit, that a text is; None if it is anything else.

    Args:
        cleaned: from `spelling.clean`. A name and an equals sign before the number are skipped.
        glued_units: read a letter that touches the number as a unit (`5m`), not as a variable.
    """
    text = _BRACKETED_UNIT.sub(r" \1", split_name(cleaned)[1].translate(_CURRENCY))
    if sum(map(str.isdigit, text)) > MAX_DIGITS:
        return None
    if text.count("=") == 1:
        # 2 + 3 = 5 and 2√5 ≈ 4.47, if they are true.
        first, second = (quantity(side, glued_units) for side in text.split("="))
        return first if first and second and agree(first, second) else None
    if text.count(":") == 1:
        first, second = (quantity(term) for term in text.split(":"))
        if first is None or second is None or first.units or second.units or second.value == 0:
            return None
        return Quantity(first.value / second.value, first.exact and second.exact)
    reader = _Reader(text)
    try:
        value = reader.sum()
        finite = math.isfinite(value)
    except (_NotANumber, ArithmeticError, ValueError):
        return None
    scaled = _units(text[reader.at :], glued_units)
    if scaled is None or not finite:
        return None
    scale, units = scaled
    number = text[: reader.at].strip()
    plain = _PLAIN.fullmatch(number)
    decimals = len(plain[1] or "") if plain and scale == 1 else None
    return Quantity(value * scale, not re.search(r"\.\d|\d[eE]", number), decimals, units)


def agree(answer: Quantity, truth: Quantity, tolerance: float = 0.0) -> bool:
    """Return True if an answer equals the ground truth within the precision to which the ground truth is known.

    Units are not converted. If both numbers have a unit, it must be the same; if only one has, the unit is ignored. The
    same holds for things counted and for directions. If only one has a per cent sign, it may stand for a hundredth.

    Args:
        tolerance: largest absolute error, if positive. If 0, exact numbers and whole numbers must be equal; others may
            differ by `RELATIVE_TOLERANCE`, or by half a unit of the truth's last decimal (see `ROUNDING_RANGE`).
    """
    if not (answer.units <= truth.units or answer.units >= truth.units):
        return False
    values = [answer.value]
    if ("%" in answer.units) != ("%" in truth.units) and not (answer.units and truth.units):
        values.append(answer.value / 100 if answer.units else answer.value * 100)
    return any(_close(value, answer.exact, truth, tolerance) for value in values)


def _close(value: Fraction | float, exact: bool, truth: Quantity, tolerance: float) -> bool:
    difference, size = _absolute(value - truth.value), _absolute(truth.value)
    if tolerance > 0:
        return difference <= tolerance * (1 + 1e-9)
    if isinstance(difference, Fraction) and ((exact and truth.exact) or value % 1 == 0 == truth.value % 1):
        return difference == 0
    if truth.exact and (exact or truth.value % 1 == 0):
        return difference <= 1e-9 * max(size, 1e-3)
    allowed: Fraction | float = RELATIVE_TOLERANCE * size
    if truth.decimals:
        half_unit = 0.5 * 10.0**-truth.decimals
        if half_unit <= ROUNDING_RANGE * size:
            allowed = max(allowed, half_unit)
    return difference <= allowed * (1 + 1e-9)


def _absolute(value: Fraction | float) -> Fraction | float:
    return -value if value < 0 else value


def _units(rest: str, glued: bool) -> tuple[Fraction | int, frozenset[str]] | None:
    """Read the words after a number.

    Args:
        glued: as `glued_units` of `quantity`.

    Returns:
        the factor by which they multiply the number, and its unit and other words; None if they are anything else.
    """
    if len(rest) > 40:
        return None
    rest = rest.replace("{", " ").replace("}", " ")
    separate = glued or rest[:1].isspace()
    scale: Fraction | int = 1
    words: list[str] = []
    things: set[str] = set()
    power = ""
    at, rest = 0, rest.strip()
    while at < len(rest):
        token = _UNIT_TOKEN.match(rest, at)
        if token is None:
            return None
        at = token.end()
        word = token["word"]
        chinese = bool(word) and word >= "\u4e00"
        if token["power"]:
            if token["power"].startswith("-"):
                words.insert(-1, "/")
            power += token["power"].lstrip("-").replace("1", "")
        elif token["per"] or word == "per":
            words.append("/")
        elif word.lower() in _POWERS:
            power += _POWERS[word.lower()]
        elif word.lower() in _SCALES and (separate or chinese):
            scale *= _SCALES[word.lower()]
        elif words == ["°"] and _AFTER_DEGREES.fullmatch(word):
            things.add(word)
        elif word in _UNITS or (word.lower() in _UNITS and len(word) > 1):
            # A letter that touches the number is a variable, except m, which is more often metres.
            if len(word) == 1 and word.isascii() and word.isalpha() and word != "m" and not separate:
                return None
            words.append(_UNITS.get(word) or _UNITS[word.lower()])
        elif ((len(word) < 3 or not separate) and not chinese) or _NO_UNIT.match(word.lower()):
            return None
        else:
            things.add("" if _ANY_UNIT.match(word.lower()) else _PLURAL.sub("", word.lower()))
    if power and not words and not things:
        return None
    if words:
        things.add("".join(words) + power)
    return scale, frozenset(things - {""})


class _NotANumber(Exception):
    """The text is not a constant expression that `_Reader` can evaluate."""


class _Reader:
    """Evaluate a constant expression by recursive descent. Stops before what it can't read, which may be a unit.

    Its methods raise `_NotANumber`, or ArithmeticError and ValueError as arithmetic does.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def peek(self, pattern: str) -> re.Match[str] | None:
        return re.compile(r"\s*(?:" + pattern + ")").match(self.text, self.at)

    def take(self, pattern: str) -> re.Match[str] | None:
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
                if bits * abs(int(exponent)) <= _MAX_BITS:
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
            return Fraction(number[0].strip().rstrip(".").replace(",", "").replace(" ", ""))
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
