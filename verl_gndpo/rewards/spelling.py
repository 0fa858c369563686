# SPDX-License-Identifier: Apache-2.0
"""Bring LaTeX, Unicode and plain text to one spelling. Nothing here looks at the meaning."""

import functools
import html
import itertools
import re
import unicodedata
from collections.abc import Callable

_Rewrite = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
"""A pattern and its replacement."""


def _script(mark: str, characters: str) -> _Rewrite:
    plain = str.maketrans(characters, "0123456789-")
    return re.compile(f"[{characters}]+"), lambda m: f"{mark}{{{m[0].translate(plain)}}}"


_SCRIPTS = [_script("^", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"), _script("_", "₀₁₂₃₄₅₆₇₈₉₋")]
_VULGAR_FRACTION = re.compile("([\u00bc-\u00be\u2150-\u215e])")
_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "⁄": "/",
        "×": r"\times ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "∙": r"\cdot ",
        "÷": r"\div ",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "⩽": r"\le ",
        "≥": r"\ge ",
        "⩾": r"\ge ",
        "≈": "=",
        "′": "'",
        "∥": r"\parallel ",
        "⊥": r"\perp ",
        "≅": r"\cong ",
        "≌": r"\cong ",
        "∽": r"\sim ",
        "∼": r"\sim ",
        "或": " or ",
        "且": " and ",
        "和": " and ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∠": r"\angle ",
        "∴": " ",
        "△": r"\triangle ",
        "∶": ":",
        "、": ",",
        "。": ".",
        "\0": " ",
        "∅": r"\emptyset ",
        "`": "",
    }
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")
)
# The numbers of the right statements. Some sets write 1.3.4 for ①③④.
_DOTTED_ITEMS = re.compile(r"\s*\d{1,2}(?:\s*\.\s*\d{1,2}){2,}\s*\.?\s*")
_CIRCLED_LABEL = re.compile(r"([①-⑳])(?=\s*[^\s,;.，、；。①-⑳])(?!\s*(?:and|or|和|或)(?![a-z]))")
_FORMULA = re.compile(r"(?P<dollars>\$\$?)(?P<content>[^$]+)(?P=dollars)")
_BETWEEN_FORMULAS = re.compile(r"\s*(?:(?:[cdmk]?m|k?g|s|h|°)\s*)?")
_VALUE_START = re.compile(r"\s*(?:[-+]?\s*\d|[-+]?\s*\\[dt]?frac|[-+]?\s*\\sqrt|\(|[a-zA-Z]\w*\s*=)")
# A formula that goes on with the one before it, and one that ends in an operator or the like.
_GOES_ON = re.compile(
    r"\s*(?:[-+*/^_=<>°,%:](?!\s*$)|[-+*/^_=°,%:]"
    r"|\\(?:text|mathrm|rm|times|cdot|div|[lg]e|[lg]eq|ne|neq|in|cup|cap|parallel|perp|circ|degree|%)(?![a-z])|[cdmk]?m\b)"
)
_ENDS_OPEN = re.compile(
    r"(?:\S\s*[-+*/=<>]|[-+*/=]|\\(?:angle|triangle|times|cdot|div|[lg]eq?|odot|left|text)(?![a-z]))\s*$"
)
_PRODUCT_ITEMS = re.compile(r"\s*(?:\(\d{1,2}\)\s*){2,}")
# Unicode's normal form would make a letter and an accent of these.
_DEGREE_SIGNS = str.maketrans("º˚ᵒ", "°°°")
CIRCLED = re.compile(r"[①-⑳](?:[\s,;，、；]*[①-⑳])*")
# Simultaneous equations, one per line. A matrix is a system only after a brace.
_SYSTEM = re.compile(
    r"\s*(?:\\left)?(?P<brace>\\\{)?\s*\\begin\{(?P<env>cases|array|aligned|(?(brace)matrix|cases))\}"
    r"(?:\{[lcr*\d{}]{0,20}\}(?=[^}]))?(?P<lines>[^&]*)\\end\{(?P=env)\}\s*(?:\\right\s*\.)?\s*"
)
_REPEATING = re.compile(
    r"(?P<whole>\d{1,15})\.(?P<fixed>\d{0,15})\\(?:overline|bar|dot)\s*(?:\{\s*(?P<group>\d{1,15})\s*\}|(?P<digit>\d))"
    r"(?:(?P<between>\d{0,15})\\dot\s*(?:(?P<braced>\{)\s*)?(?P<last>\d)(?(braced)\s*\}))?"
)
_REWRITES: list[_Rewrite] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"&(?:[a-zA-Z]{2,8}|#\d{1,7});", lambda m: html.unescape(m[0])),
        # A word between two formulas, and the dollars of a price.
        (r"(?<=\$)\s*(and|or)\s*(?=\$)", r" \1 "),
        (r"\\\$\s*(\d[\d,]*(?:\.\d+)?)(?=[^$\d]*$)|^\s*\$\s*(\d[\d,]*(?:\.\d+)?)(?=[^$]*$)", r"\1\2 dollars "),
        (r"\\\$|\$", ""),
        (r"^\s*(?i:(?:final\s+)?ans(?:wer)?|答案?)\s*[:：]\s*(?=\S)", ""),
        (r"^\s*(?:\\therefore(?![a-zA-Z])|∴)\s*", ""),
        (r"\s*\((?:the\s+)?answers?\b[^()]*\b(?:unique|vary|varies)\)|\(?答案不唯一\)?", ""),
        # LaTeX that was escaped for JSON, or that lost its backslash.
        (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|[lg]eq?|times|cdot|pi|text|mathrm|circ|left|right|pm)(?![a-z]))", r"\\"),
        (r"\\?textdegree(?:\{\})?|(?<=\d)\s*\\deg(?![a-zA-Z])", "°"),
        (r"(?<![\\a-zA-Z])(?=[dtc]?frac\s*\{)", r"\\"),
        # Conversion tools write \\text{ } as a space, {{x}^{2}} for x^2 and {{\\log}_{2}} for \\log_2.
        (r"\\(?:text|mathrm|rm|[hv]?phantom)\s*\{\s*\}", " "),
        (r"\\(?:text|mathrm)\s*\{\s*([cdkm23])\s*\}(?=\s*[{}])", r"\1"),
        (r"\{\s*\}", ""),
        (r"\{\s*\{\s*(\\[a-z]{2,3})\s*\}\s*([_^])\s*(\{[^{}]*\}|\w)\s*\}", r"\1\2\3"),
        (r"\\overset\s*\{\s*\\(?:long)?(?:to|rightarrow|rightharpoonup)\s*\}\s*(?=\{)", r"\\vec"),
        (r"\\(?:ensuremath|mathop)\s*\{([^{}]*)\}", r"\1"),
        (r"\\big(cup|cap)(?![a-z])", r"\\\1 "),
        (r"\\varnothing(?![a-z])", r"\\emptyset"),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\lg(?![a-z])", r"\\log_{10}"),
        (r"\{\s*([^{}\\]{1,20})\\choose(?![a-z])\s*([^{}\\]{1,20}?)\s*\}", r"\\binom{\1}{\2}"),
        (r"\\binom\s*(\w)\s*(\w)", r"\\binom{\1}{\2}"),
        (r"\\textcolor\s*\{\w*\}", r"\\text"),
        (r"\\color\s*\{\w*\}", " "),
        (r"\{\s*\\(?:rm|bf|it|sf)(?![a-zA-Z])", r"\\text{"),
        (r"\\(?:rm|bf|it|sf)(?![a-zA-Z])", " "),
        (r"\^\s*(?P<group>\{\s*)?((?:\\prime(?![a-zA-Z])\s*)+)(?(group)\})", lambda m: "'" * m[2].count("p")),
        # Two backslashes end a row of a matrix.
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\s*\.?", ""),
        # Thin spaces and {,} group the digits of a number.
        (r"(?<=\d)(?:,?\\[,!]|\{,\})\s*(?=\d{3})", ""),
        (r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac(?:\s*(\d)|\s+([a-zA-Z]))\s*([a-zA-Z\d])", r"\\frac{\1\2}{\3}"),
        (r"\\frac\s*(\{[^{}]*\})\s*([a-zA-Z\d])", r"\\frac\1{\2}"),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
        (r"\\(?:approx|simeq|thickapprox)(?![a-zA-Z])", "="),
        (r"^\W*(?:approximately|approx\.?|about|around|roughly|exactly)\s+(?=[-\d\\.])", ""),
        (r"[\s,]*(?<=[\d}),\s])(?:or\s+)?(?:approximately|approx\.?|about|roughly)\s+(?=[-\d.])", "="),
        (r"\(\s*(?:or\s+)?(?:(?:approximately|approx\.?|about|roughly)\s+(?=[-\d.])|=)\s*([^()]*)\)$", r"=\1"),
        (
            r"\^\s*(?:\{\s*\^?\s*(?:\\?circ|[°o]|\\(?:text|mathrm)\s*\{\s*[°o]\s*\})\s*\}|\\circ(?!led)|circ(?![a-zA-Z])|°"
            r"|o(?![a-zA-Z])|\\(?:text|mathrm)\s*\{\s*[°o]\s*\})|\\degree(?![a-zA-Z])",
            "°",
        ),
        # 30^0 is an angle, unlike 2^0, 10^0 and the power in 5\\cdot 20^0.
        (
            r"(?<![\w.*/^}])(?<!\\cdot )(?<!\\times )(?<!\{)(?P<angle>\{*\s*(?!100?\D)[1-9]\d{1,2}\s*\}?)"
            r"\s*\^\s*(?:\{\s*0\s*\}|0(?!\d))",
            r"\g<angle>°",
        ),
        (r"(?<=[\sa-zA-Z'{])//(?=[\s}]*[a-zA-Z\\])", r"\\parallel "),
        (r"\\%", "%"),
        (r"(?<=[\d)}°%'])\s*(and|or)\s*(?=[\d(\\A-Z-])", r" \1 "),
        # Braces round an angle, unless they hold an argument.
        (r"(?<![\\a-zA-Z^_}\]])\{\s*(?:\{\s*(\d+(?:\.\d+)?)\s*\}|([^{}]*))°\s*\}", r"\1\2°"),
        (r"(?<=\{)\{\s*(\d+(?:\.\d+)?)\s*\}\s*°", r"\1°"),
        (
            r"(?<![\d.])(\d{1,3})°\s*\{?\s*([0-5]?\d)\s*\}?\s*'(?!')(?:\s*\{?\s*([0-5]?\d)\s*\}?\s*(?:''|\"))?",
            lambda m: rf"\frac{{{int(m[1]) * 3600 + int(m[2]) * 60 + int(m[3] or 0)}}}{{3600}}°",
        ),
        # cm^2 as c{{m}^{2}}.
        (r"(?<=[\d\s}])([cdk]?)\s*\{\s*\{\s*m\s*\}\s*\^\s*\{\s*([23])\s*\}\s*\}", r" \1m^{\2}"),
        (r"\*\*(?=\S)(?<=\S\*\*)", "^"),
        (r"^\*+(?=[^*])|(?<=[^*])\*+$", ""),
        (r"(?<![\\a-zA-Z])sqrt(?![a-zA-Z])", r"\\sqrt"),
        (r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|cot|csc|ln|log|exp(?=\s*\())(?![a-zA-Z])", r"\\\1"),
        (r"\\exp\s*\(([^()]*)\)", r"e^{\1}"),
        (r"\\sqrt\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))", r"\\sqrt{\1\2}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    )
]
_UPRIGHT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|bm|boldsymbol|operatorname|mbox|number|boxed|fbox"
    r"|underline)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
# The set of all x with a condition.
_CONDITION = re.compile(r"^\\\{\s*([a-z])\s*(?:\||:|\\mid(?![a-z]))\s*((?=[^{}|]*\1)[^{}|,;]*)\\\}$")
_BRACED_LIST = re.compile(r"\{[^{}]*,[^{}]*\}")
_UNITARY_GROUP = re.compile(r"\{([^\\{}])\}")
_SPACE_BETWEEN_DIGITS = re.compile(r"(?<=\d)\s+(?=\d)")
_PUNCTUATION = re.compile(r"[\"'“”‘’()\[\]{}!?;:*\\]|[.,](?!\d)|(?<!\d)[.,]|(?<=[^\W\d])-(?=[^\W\d])")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b(?=\s+\S)")


# A truth comes back with each response to its prompt, and a grader cleans a text more than once.
@functools.lru_cache(maxsize=8192)
def clean(text: str) -> str:
    """Return a text in one spelling, without dollars, spacing commands, text wrappers and the final full stop.

    Degrees become `°`, `**` between operands becomes `^`, and an approximation sign becomes `=`.
    """
    system = _SYSTEM.fullmatch(text.replace("$", ""))
    if system:
        text = system["lines"].strip().removesuffix(r"\\").replace(r"\\", ", ")
    text = _separate(text)
    text = _CIRCLED_LABEL.sub(lambda m: f"({unicodedata.normalize('NFKC', m[1])}) ", text)
    text = CIRCLED.sub(lambda m: ", ".join(re.findall(r"[①-⑳]", m[0])), text)
    for pattern, replacement in _SCRIPTS:
        text = pattern.sub(replacement, text)
    text = _VULGAR_FRACTION.sub(r" \1", text).translate(_DEGREE_SIGNS)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    if _DOTTED_ITEMS.fullmatch(text.replace("$", "")):
        text = ", ".join(re.findall(r"\d+", text))
    text = _REPEATING.sub(_fraction, text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    unwrapped = None
    while unwrapped != text:
        # Innermost first. The spaces keep the unit in `3\mathrm{m}` from becoming a variable.
        unwrapped, text = text, _UPRIGHT.sub(r" \1 ", text)
    text = _CONDITION.sub(r"\2", text.strip().rstrip(".,; \n"))
    return text[1:-1].strip() if _BRACED_LIST.fullmatch(text) else text


def lists_items(text: str) -> bool:
    """Return True if a ground truth lists numbered statements, such as ①③④, (1)(3)(4) or 1.3.4."""
    bare = text.replace("$", "")
    return bool(CIRCLED.search(text) or _DOTTED_ITEMS.fullmatch(bare) or _PRODUCT_ITEMS.fullmatch(bare))


def _separate(text: str) -> str:
    """Write a semicolon between formulas that follow each other without a word, as in `$$7$$ $$10$$`."""
    formulas = list(_FORMULA.finditer(text))
    for first, second in reversed(list(itertools.pairwise(formulas))):
        if second["dollars"] == "$$":
            negative = re.match(r"\s*-\s*\S", second["content"])
            apart = (negative or not _GOES_ON.match(second["content"])) and not _ENDS_OPEN.search(first["content"])
        else:
            # $2$ $\sqrt{3}$ may be a product.
            values = _VALUE_START.match(first["content"]) and _VALUE_START.match(second["content"])
            apart = bool(values) and not re.match(r"\s*[-+]?\s*[\\(]", second["content"])
        if apart and _BETWEEN_FORMULAS.fullmatch(text[first.end() : second.start()]):
            text = f"{text[: second.start()]};{text[second.start() :]}"
    return text


def _fraction(repeating: re.Match[str]) -> str:
    before = repeating["whole"] + repeating["fixed"]
    period = (repeating["group"] or repeating["digit"]) + (repeating["between"] or "") + (repeating["last"] or "")
    denominator = 10 ** len(repeating["fixed"]) * (10 ** len(period) - 1)
    return rf"\frac{{{int(before + period) - int(before)}}}{{{denominator}}}"


def canonical(cleaned: str) -> str:
    """Remove the spaces that have no meaning, and braces round one character, from a cleaned text.

    Returns:
        a key that different spellings of one expression share.
    """
    text = _SPACE_BETWEEN_DIGITS.sub("\0", cleaned)
    text = _UNITARY_GROUP.sub(r"\1", re.sub(r"\s+", "", text))
    return text.replace("\0", " ")


def same_words(answer: str, truth: str) -> bool:
    """Return True if two cleaned texts differ only in case, spacing, punctuation and articles."""
    words, words_truth = _words(answer), _words(truth)
    return words == words_truth if words_truth else canonical(answer) == canonical(truth)


def _words(cleaned: str) -> str:
    words = " ".join(_PUNCTUATION.sub(" ", cleaned.casefold()).split())
    return _ARTICLE.sub("", words).replace("  ", " ").strip()
