# SPDX-License-Identifier: Apache-2.0
"""Find the answer that a response states in words, and join the formulas of one statement.

A statement counts only if it reads as one: a question, a doubt or a negated sentence states no answer.
"""

import re
from collections.abc import Sequence

PHRASE_CHARS = 4_000
# A response up to this length may be the bare answer, and a statement isn't longer.
SHORT_CHARS = 100
STATEMENT_CHARS = 200

_LABEL = r"(?:\((?:[A-J])\)|\[(?:[A-J])\]|[A-J](?![a-zA-Z'’0-9]))"
_OPTION = r"(?:options?|choices?|选项)"
_IS = (
    r"(?:\s+(?:is|are|was|would\s+be|must\s+be|should\s+be|will\s+be)\b(?:\s+(?:therefore|thus|then|hence|clearly|simply"
    r"|indeed|most\s+likely|likely|given\s+by|as\s+follows)\b,?)?|\s?[:=：]|\s+[-–—](?=\s))"
)
_PHRASE = re.compile(
    rf"(?:\banswers?\b[\w ]{{0,40}}?|\b(?:option|choice)\b|\b(?:correct|right|best)\s+(?:one|{_OPTION}|statements?"
    rf"|figure)\b[\w ]{{0,40}}?){_IS}[:：\s]{{0,5}}"
    # A formula right after the word, or a heading.
    r"|\bAnswers?\s*(?=\$|\\[(\[])|<conclusion>\s*"
    r"|^[#>\s]*(?:the\s+)?(?:final\s+)?answers?\s*[:：]?\s*\n+"
    r"|(?:答案|结果|正确的?选项)\s*】?\s*(?:应?该?[是为]|选)?\s*(?:选项)?\s*[:：]?\s*"
    r"|(?:故|应|因此|所以|综上)?(?:本题)?(?:应)?(?<![不没])选择?\s*[:：]?\s*(?=[(（]?[A-J](?![a-zA-Z]))",
    re.I | re.M,
)
# Each pattern has the label in its only group.
_CHOOSES = [
    re.compile(pattern)
    for pattern in (
        rf"\b{_OPTION}\s+({_LABEL})\s*(?:is|seems|must\s+be|would\s+be)\s+(?:indeed\s+|clearly\s+|therefore\s+|the\s+)*"
        r"(?:correct|right|best|answer|one)\b",
        rf"(?:^|[,;:]|\b(?i:only|so|that|hence|thus|therefore))\s*({_LABEL})\s+(?:is|must\s+be|would\s+be)\s+"
        rf"(?:indeed\s+|clearly\s+|therefore\s+)*(?:the\s+(?:correct|right|best|closest)(?:\s+(?:answer|one|{_OPTION}))?"
        r"|(?:the|our|my)\s+(?:final\s+)?answer|(?:correct|right))(?=\s*[.,;]|\s*$|\s+(?:because|since|as|here)\b)",
        rf"\b(?i:choose|select|pick|go\s+with|opt\s+for)\s+(?:the\s+)?(?:{_OPTION}|answer)?\s*({_LABEL})(?!\s+(?!(?:because|since|over)\b)[a-z])",
        rf"\bmak(?:es|ing)\s+(?:{_OPTION}\s+)?({_LABEL})\s+the\s+(?:correct|right|best)\b",
        rf"\b(?:correspond(?:s|ing)?\s+to|match(?:es|ing)?|is|as|with|by|in)\s+(?:the\s+)?{_OPTION}\s+({_LABEL})",
        rf"\bshould\s+be\s+(?:{_OPTION}\s+)?({_LABEL})(?=\s*(?:[.,;:]|$))",
        rf"\b(?i:so|thus|therefore|hence)\b,?\s+(?:it\s+is\s+|it's\s+)?(?:{_OPTION}\s+)?({_LABEL})(?=\s*(?:[.,;:]|$))",
        rf"({_LABEL})\s*(?:选项)?(?:是)?正确",
        rf"^(?i:i\s+(?:think|believe|guess|say)\s+(?:that\s+)?)(?:it\s+is|it's)\s+({_LABEL})(?=\s*(?:[.,;]|$))",
    )
]
_LABEL_ALONE = re.compile(_LABEL)
_ANY_LABEL = re.compile(rf"\b(?i:{_OPTION})\s+({_LABEL})|(?<![\w)}}\\])(\((?:[A-J])\))")
_ONLY_LABEL = re.compile(rf"(?![AI]\s+[a-z])(?:{_OPTION}\s+)?({_LABEL})[.:)]?(?:\s+\S.{{0,60}})?")
_DOUBT = re.compile(
    r"\b(?:not|n't|cannot|unlikely|doubtful|tempting|neither"
    r"|nor|unable|impossible|incorrect|wrong|false|unclear|let'?s|let us|suppose|assume"
    r"|if|whether|check|wait|maybe|perhaps|might|try|(?:answer|option|choice|it)\s+could|but|however|except)\b|n't\b|[?？]|不|[\u274c\u2716-\u2718]",
    re.I,
)
_CROSSED = re.compile("[\u274c\u2716-\u2718]")
_REASON = re.compile(
    r"\s*(?:[,;–—]|\s-)?\s+(?:because|since|as|which|where|due\s+to|based\s+on|given\s+that|so\s+that|according\s+to)\b.*"
    r"|\s*,\s*(?:not|rather\s+than|instead\s+of|with|while|whereas|although|though|but|so|and\s+(?:the|it|this|therefore))\b.*|,?\s*\bi\.e\..*|\s+and\s+not\b.*|，?因为.*|(?<=[A-J])\s*(?:选项|项)(?![^。]*[不错]).*",
    re.I | re.S,
)
# What a sentence adds to its conclusion: "12, not 13" and "-4, reached at x = 2".
_CONTRAST = re.compile(
    r"(?:(?:\s*,\s*|\s+and\s+)(?:not|rather\s+than|instead\s+of)"
    r"|\s*,\s*(?:reached|attained|achieved|obtained|found|occurring|when|where|with|at|for))\b[^,]*?(?=\.?\s*$)"
)
_NAMED_IN_REASON = re.compile(
    rf"\b(?:which|this|so\s+it)\s+(?:is|matches|corresponds\s+to|is\s+given\s+by|makes)\s+(?:the\s+)?(?:{_OPTION}\s+)?({_LABEL})(?!\s+[a-z])"
)
_SENTENCE_END = re.compile(r"(?<!approx)(?<!i\.e)(?<!e\.g)\.(?=\s|$)|\n|。")
_MATH = re.compile(
    r"(?P<dollars>\$\$?)(?P<a>[^$]+?)(?P=dollars)|\\\[(?P<b>.+?)\\\]|\\\((?P<c>.+?)\\\)|(?P<d>\\begin\{([a-z]*matrix)\}.*?\\end\{\6\})",
    re.S,
)
_VERDICT = re.compile(r"(yes|no|true|false)\s*(?:[,，;]|\.\s+(?=[A-Z]))", re.I)
_QUOTED = re.compile(r"[\"'“‘]([^\"'“”‘’]+)[\"'”’]")
# "increases by 100%", but not "is divided by 3".
_CHANGES = (
    r"\b(?:(?:increas|decreas|ris|chang|reduc)[a-z]{0,3}|grows?|shrinks?|falls?|drops?|goes\s+(?:up|down))"
    r"\s+(?:by|to)\b"
)
_VERB = re.compile(
    r".*(?:\b(?:is|are|was|be|equals|equal\s+to|it's|that's|get|have|obtain|gives|yields"
    rf"|costs|weighs|measures|amounts\s+to)\b|=|[:：]|[为是]|等于|{_CHANGES})\s*",
    re.I | re.S,
)
# A verb with a value after it. An equals sign after a number goes on with the same value.
_GIVES = re.compile(
    rf"(?:{_CHANGES}|\b(?:is|are|was|equals|equal\s+to|it's|get|have|obtain|gives|yields|costs|weighs|measures)\b|(?<!\d)(?<!\d\s)=|[:：])\s*(?=[-(√]*\d)",
    re.I,
)
# "45 (since 135 is too large)" and "45°, i.e. half of a right angle".
_ASIDE = re.compile(
    r"\s*\((?:since|because|as|given|where|note)\b[^()\n]{0,100}\)|(?<=[\d°%]),?\s+i\.e\.[^\n\d]{0,100}$", re.I
)
# "started 3 hours ago", without another number.
_TIME = re.compile(r"\D*?(?P<time>\d[\d.]*\s+[a-z]+)\s+(?:ago|later|earlier)\s*\.?")
# "not 10 but 12", "isn't 10; it is 12".
_CORRECTED = re.compile(
    r"(?:\bnot|n't)\s(?!(?:\S{1,20}\s){0,2}?(?:if|whether|sure|certain|clear|known|think|believe|guess|say)\b)"
    r"(?:\S{1,20}\s){0,2}?\S{1,20}?[,;]?\s(?:but(?:\s+rather)?|(?:rather\s+)?(?:it's|it\s+is))\s+"
    r"(?=[-$\\(]*\d|\$|\\[(\[]|\(?[A-J]\b)"
)
_THEREFORE = re.compile(r"\b(?:so|thus|therefore|hence)\b,?\s*", re.I)
_PREMISE = re.compile(r"(?:since|because|as|when|with|given|for|using|from|by)\b", re.I)
_RELATIVE = re.compile(r"(?<=\w)\s+(?:that|in\s+total|altogether)\b.*")
_STARTS_WITH_LABEL = re.compile(rf"\s*{_LABEL}(?!\s+[a-z])")
_COMPLETE = re.compile(r"[.。!$)\]}°%\d*]\s*$")
_FINAL = re.compile(
    r"\bfinal\s+answer\s?(?:is|=|:)[\s:*]{0,8}(?:\$\$?([^$\n]{1,100})\$\$?|\\[(\[]([^\n]{1,100}?)\\[)\]]"
    r"|([-+]?\d[\d.,/]{0,30}?(?:\s?(?:%|°|[a-z]{1,12}))?))(?=[ .*]{0,4}(?:$|\n)|\.\*{0,2}\s)",
    re.I,
)
_CLOSING = re.compile(
    r"\s+(?:I\s+hope|Hope\s+(?:this|it|that)|Let\s+me\s+know|Feel\s+free|If\s+you\s+have)\b[^\n]{0,200}\s*$"
)
# Marks that praise a line, unlike a cross.
_FENCE = re.compile(
    r"^\s*(?:[-=]>|[→⇒])|```\w*\n?|`|\*\*|__|[\u2705\u27a1\u2714\u2611\u2b50\ufe0f\U0001f3af\U0001f4a1\U0001f4cc\U0001f449\U0001f539]"
)
_IS_THE_ANSWER = re.compile(
    rf"(?:both\s+|options?\s+|statements?\s+)?({_LABEL}(?:\s*,\s*{_LABEL})*,?\s+and\s+{_LABEL})"
    r"\s+are\s+(?:all\s+)?(?:correct|right|true)\.?"
    r"|(.{1,60}?)\s+is\s+(?:the|our|my)\s+(?:final\s+|correct\s+|right\s+)?answer\.?",
    re.I,
)

# Between two boxes or formulas of one statement.
_NAME = r"(?:[a-zA-Z]|\\[a-z]+|\\?angle\s*)[\w\\{}'^ ]{0,20}?\s*=\s*"
_PART = r"\(\s*(?:\d{1,2}|[a-h]|i{1,3}|iv|v)\s*\)|[①-⑨]|\b(?:[2-9]|[b-h])\)"
_NEXT_PART = r"(?:part\s+(?:[2-9]|[b-h])\b|(?:the\s+)?(?:second|third|fourth)\s+part\b)"
_UNWRAP = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_DRESS = re.compile(r"\$|\\[()\[\],;! ]|\\q?quad(?![a-z])|\\\\|\*\*|~|&")
_JOINT = re.compile(
    rf"\s*(?:°|%|\^\{{?\\circ\}}?|[cmk]?m(?:\^?[23²³])?|units?|degrees)?\s*"
    rf"(?:for\s+part\s+\(?\w\)?)?\s*[,;，；、]?\s*(?P<word>and|or|和|或|以及)?\s*"
    rf"(?P<part>(?:part\s*)?(?:{_PART})|{_NEXT_PART})?\s*[:.]?\s*(?P<name>{_NAME})?",
    re.I,
)
_PART_IN_PROSE = re.compile(
    rf"[^\n]{{0,40}}?[.;,]?\s*\n\s*[-*#]*\s*(?P<part>(?:part\s*)?(?:{_PART}|[2-9]\.)|{_NEXT_PART}:?)(?=\s)[^\n]{{0,120}}",
    re.I,
)
_SAME_SENTENCE = re.compile(r"(?!.*[.!?]\s)(?=.*(?:\band\b|[,;和]))[^\n。]{1,100}")
_NAME_BEFORE = re.compile(rf"(?<![\w\\])(?P<name>{_NAME})$")


def stated(text: str) -> list[str]:
    """Return the answer that a response without a box or tags states, in all readings; empty if it states none.

    The first reading is the whole statement. Others leave out what comes before its verb, or its reason.
    Searches in this order:

    1. what follows the last "answer is", "answer:", "option is", "答案", a heading "Final Answer", ...;
    2. the label in "Option C is correct", "I choose (C)", "which corresponds to option C", ...;
    3. the whole text, if it is short, and the last sentence: its label, its last formulas, or what follows its last
       verb, unless it expresses a doubt.
    """
    tail = _ASIDE.sub("", _CLOSING.sub("", _FENCE.sub("", text[-PHRASE_CHARS:])))
    tail = _CORRECTED.sub(" is ", tail)
    for phrase in reversed(list(_PHRASE.finditer(tail))):
        statement = _statement(tail[phrase.end() :])
        if statement and len(statement) <= STATEMENT_CHARS:
            return readings(statement)
    sentences = [sentence for sentence in re.split(r"(?<=[.!?。])\s+|\n", tail.strip()) if sentence.strip()]
    for sentence in reversed(sentences):
        # Most sentences hold no label, and searching for one is cheaper than for the rest.
        if _LABEL_ALONE.search(sentence) and not _DOUBT.search(sentence):
            labels = [label for pattern in _CHOOSES for label in pattern.findall(sentence)]
            if labels:
                return labels[:1] if len(set(map(_bare, labels))) == 1 else []
    if not sentences:
        return []
    short = [tail.strip()] if len(tail.strip()) <= SHORT_CHARS else []
    if short and (verdict := _VERDICT.match(short[0])):
        return [*short, verdict[1]]
    return short + [reading for reading in _from_last_line(tail.strip(), sentences[-1].strip()) if reading not in short]


def readings(statement: str) -> list[str]:
    """Return a statement, what it says without its reason, and what comes after the verb of that.

    A label that the reason names is the only reading, as in "5, which is option C", unless a label comes first.
    """
    kept = _REASON.sub("", statement, count=1)
    named = _NAMED_IN_REASON.search(statement, len(kept))
    if named and not _ONLY_LABEL.fullmatch(kept.strip()):
        return [named[1]]
    found = [statement, kept]
    if quoted := _QUOTED.fullmatch(kept.strip()):
        found.append(quoted[1])
    if not _DOUBT.search(kept):
        found.append(_after_verb(kept))
    return [reading for reading in dict.fromkeys(map(str.strip, found)) if reading]


def join_formulas(text: str, spans: Sequence[tuple[int, int, int, int]]) -> str:
    """Return the content of the last formula, with those before it that belong to the same statement.

    Args:
        text: the response.
        spans: start, start of the content, end of the content and end of each formula, in order.

    Returns:
        the contents, each after its name if it has one ("x="), joined by semicolons; equal ones once.
    """
    first = len(spans) - 1
    names = [""] * len(spans)
    while first > 0:
        between = text[spans[first - 1][3] : spans[first][0]]
        if len(between) > 300:
            break
        joint = _JOINT.fullmatch(_DRESS.sub(" ", _UNWRAP.sub(r" \1 ", between)).strip(" "))
        if joint is None or ("\n" in between.strip("\n $") and not (joint["part"] or joint["name"] or joint["word"])):
            if not _PART_IN_PROSE.fullmatch(between):
                break
            joint = None
        elif not between.strip() and "\n" in between:
            break
        names[first] = (joint["name"] or "") if joint else ""
        first -= 1
    if first < len(spans) - 1:
        name = _NAME_BEFORE.search(_DRESS.sub(" ", text[max(0, spans[first][0] - 40) : spans[first][0]]).rstrip())
        names[first] = name["name"] if name else ""
    pieces = [names[index] + text[spans[index][1] : spans[index][2]].strip() for index in range(first, len(spans))]
    return "; ".join(dict.fromkeys(pieces))


def join_sentence(text: str, spans: Sequence[tuple[int, int, int, int]]) -> str:
    """Return the contents of all formulas in the sentence of the last one, as for two questions asked at once.

    Args:
        text, spans: as for `join_formulas`.
    """
    first = len(spans) - 1
    while first > 0 and _SAME_SENTENCE.fullmatch(text[spans[first - 1][3] : spans[first][0]]):
        first -= 1
    return "; ".join(text[start:end].strip() for _, start, end, _ in spans[first:])


def final_value(text: str) -> str | None:
    """Return the formula or number after the last "the final answer is" of a text, None if there is none."""
    found = None
    for found in _FINAL.finditer(text[-PHRASE_CHARS:]):  # noqa: B007
        pass
    return next(filter(None, found.groups()), None) if found else None


def _statement(rest: str) -> str:
    """Return the sentence at the start of `rest`. A formula at its start may span lines."""
    rest = re.sub(r"^[–—-]\s+", "", rest.lstrip())
    formula = _MATH.match(rest)
    start = formula.end() if formula else 0
    return rest[:start] + _SENTENCE_END.split(rest[start:], maxsplit=1)[0]


def _from_last_line(text: str, sentence: str) -> list[str]:
    line = text.rpartition("\n")[2].strip()
    if _ONLY_LABEL.fullmatch(line) and not _CROSSED.search(line):
        return [line]
    sentence = _CONTRAST.sub("", sentence)
    clause = _clause(sentence)
    # Without full stops, the sentence may be the whole derivation.
    doubtful = _DOUBT.search(sentence if len(sentence) <= STATEMENT_CHARS else clause)
    if doubtful or not (_COMPLETE.search(sentence) or len(text) <= SHORT_CHARS):
        return []
    labels = {_bare(next(filter(None, match))) for match in _ANY_LABEL.findall(sentence)}
    if labels:
        return list(labels) if len(labels) == 1 else []
    text = _CONTRAST.sub("", text)
    formulas = [_span(match) for match in _MATH.finditer(text)]
    if formulas and formulas[-1][3] > len(text) - len(clause):
        return [] if _gives_several(_clause(_MATH.sub("0", sentence))) else [join_formulas(text, formulas)]
    return [_after_verb(sentence)] if len(clause) <= STATEMENT_CHARS else []


def _clause(sentence: str) -> str:
    """Return the conclusion of a sentence such as "Since a is 3, b is 5"."""
    conclusion = _THEREFORE.split(sentence)[-1].strip() or sentence
    return conclusion.rpartition(", ")[2] if _PREMISE.match(conclusion) else conclusion


def _gives_several(clause: str) -> bool:
    """Return True for "the length is 3 and the width is 5"."""
    return len(_GIVES.findall(clause)) > 1


def _after_verb(sentence: str) -> str:
    """Return what follows the verb of a sentence, or the sentence if it starts with a label or gives several values."""
    sentence = _UNWRAP.sub(r" \1 ", sentence)
    clause = _clause(sentence)
    if subject := _IS_THE_ANSWER.fullmatch(clause):
        return subject[1] or subject[2]
    if time := _TIME.fullmatch(clause):
        return time["time"]
    verb = _VERB.match(clause)
    if verb is None and not _STARTS_WITH_LABEL.match(sentence):
        return clause
    if verb is None or _STARTS_WITH_LABEL.match(sentence) or _gives_several(_MATH.sub("0", clause)):
        return sentence
    after = _RELATIVE.sub("", clause[verb.end() :])
    # The name in x = 3 belongs to the answer.
    named = verb[0].rstrip().endswith("=") and len(verb[0].split()) < 5
    return after if after and not named else clause


def _span(formula: re.Match[str]) -> tuple[int, int, int, int]:
    group = next(name for name in "abcd" if formula[name])
    return formula.start(), formula.start(group), formula.end(group), formula.end()


def _bare(label: str) -> str:
    return label.strip("()[] ")
