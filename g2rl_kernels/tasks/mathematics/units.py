"""Units, money and number words beside a quantity. Imports no sympy."""

from __future__ import annotations

import re
from fractions import Fraction

from .notation import TEXT, words_of

# dimension, factor to its own unit, names
_TABLE = """
length 1 m meter meters metre metres
length 1/100 cm centimeter centimeters centimetre centimetres
length 1/1000 mm millimeter millimeters millimetre millimetres
length 1000 km kilometer kilometers kilometre kilometres
length 381/1250 ft foot feet
length 127/5000 in inch inches
length 1143/1250 yd yard yards
length 201168/125 mi mile miles
mass 1 kg kilogram kilograms kilo kilos
mass 1/1000 g gram grams
mass 1/1000000 mg milligram milligrams
mass 45359237/100000000 lb lbs pound pounds
mass 45359237/1600000000 oz ounce ounces
time 1 s sec secs second seconds
time 60 min mins minute minutes
time 3600 h hr hrs hour hours
time 86400 day days
time 604800 week weeks
month 1 month months
year 1 year years yr yrs
length^3 1/1000 L l liter liters litre litres
length^3 1/1000000 mL ml milliliter milliliters millilitre millilitres
money 1 dollar dollars usd bucks
money 1/100 cent cents ¢
euro 1 euro euros eur €
sterling 1 gbp £
yen 1 yen jpy ¥
rupee 1 rupee rupees rs ₹
angle 1 degree degrees deg
radian 1 radian radians rad
celsius 1 celsius
fahrenheit 1 fahrenheit
length*time^-1 1 mps
length*time^-1 5/18 kmh kph
length*time^-1 1397/3125 mph
forenoon 1 am a.m
afternoon 1 pm p.m
newton 1 N newton newtons
joule 1 J joule joules
watt 1 W watt watts
volt 1 V volt volts
ampere 1 A ampere amperes amps
kelvin 1 K kelvin
hertz 1 Hz hz hertz
pascal 1 Pa pascal pascals
mole 1 mol mole moles
"""
_UNITS = {
    name: (line.split()[0], Fraction(line.split()[1]))
    for line in _TABLE.strip().splitlines()
    for name in line.split()[2:]
}
# Units that may follow a number without a space; shorter ones could be products of variables
ATTACHED = {"cm", "mm", "km", "kg", "ft", "lb", "lbs", "oz", "min", "mins", "hr", "hrs", "am", "pm", "mph"}
ATTACHED |= {name for name in _UNITS if len(name) > 4}
_MULTIPLES = {"dozen": 12, "hundred": 100}
_MULTIPLES |= {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
_TEENS = "sixteen seventeen eighteen nineteen twenty"
_TENS = "thirty forty fifty sixty seventy eighty ninety hundred"
_NUMBER_WORDS = {word: number for number, word in enumerate(f"{_ONES} {_TEENS}".split())}
_NUMBER_WORDS |= {word: number for number, word in zip(range(30, 110, 10), _TENS.split())}
_CURRENCY = re.compile(r"^(-?)\s*(?:US|USD|AU|CA|HK|NZ)?\s*(\\?\$|€|£|¥|₹|Rs\.?)\s*(?=[-\d.(\\])")
_WORD = r"[a-zA-Z][a-zA-Z.'/]*"
_UPRIGHT = r"\\(?:text[a-z]*|mathrm|[mh]box|operatorname)\*?"
_POWER = r"\s*\^\s*\{?\s*[-+]?\d\s*\}?"
_PLACE = r"(?:(?<=[\d)}%\]])|(?<=\s)|(?<=\\pi))\s*"
_LABEL = re.compile(
    rf"{_PLACE}(?P<label>(?:{_UPRIGHT}\{{(?P<text>[^{{}}]*)\}}"
    rf"|\^\\circ\s*(?:{TEXT}\{{[CF]\}}|[CF](?![a-z]))?|(?P<bare>{_WORD}(?:[\s-]+{_WORD}){{0,3}})"
    rf"|(?P<sign>€|£|¥|₹|¢|\\?\$))(?P<power>{_POWER})?)\s*\.?$"
)
_PART = rf"(?:{_UPRIGHT}\{{[^{{}}]*\}}|[a-zA-Z]+)(?:{_POWER})?"
_BY = r"\s*(?:/|·|\*|\\cdot|\bper\b)\s*"
_COMPOUND = re.compile(
    rf"{_PLACE}(?:\\frac\s*\{{\s*(?P<top>{_PART})\s*\}}\s*\{{\s*(?P<bottom>{_PART})\s*\}}"
    rf"|(?P<parts>{_PART}(?:{_BY}{_PART}){{1,3}}))\s*\.?$"
)
_SQUARE = r"(?:square|sq\.?|cubic|cu\.?)\s+"
_SPOKEN = re.compile(
    rf"\s*(?:{_SQUARE})?(?P<name>[ap]\.m\b\.?|[a-zA-Z]+(?![^\W\d_]))(?P<power>\s?\^\s?\{{?[-−+]?\d\}}?)?"
)
_SPOKEN_BY = re.compile(rf"(?P<over>\s*/\s*|\s+per\s+)|{_BY}")
_WORDS_TOO = {"in", "am"}  # units that are words as well, as are single letters


def is_unit(name: str) -> bool:
    """Whether a word names a unit in the table."""
    return name in _UNITS or name.lower() in _UNITS


def unit_at(text: str, place: int) -> tuple[str, int] | None:
    """The unit of a quantity that ends at a place in prose, and where it ends: cm, km/h, square metres.

    None without one, and where "/", "per" or a power follows that cannot be read. What is a word or a
    variable as well ("in", "m") is a unit only before punctuation, an operator or the end.
    """
    found = _SPOKEN.match(text, place)
    if not found or not is_unit(found["name"].rstrip(".")):
        return None
    attached = found.start("name") == place and not text[place - 1 : place].isspace()
    end, parts = found.end(), 1
    while by := _SPOKEN_BY.match(text, end):
        following = _SPOKEN.match(text, by.end())
        if following and is_unit(following["name"].rstrip(".")):
            end, parts = following.end(), parts + 1
        elif by["over"] and re.match(r"[^\W\d_]", text[by.end() : by.end() + 1]):
            return None
        else:
            break
    name, rest = found["name"], text[end:].lstrip(" ")
    if rest.startswith("^") or (attached and name not in ATTACHED and not (parts > 1 and name == "m")):
        return None
    spare = (len(name) == 1 or name.lower() in _WORDS_TOO) and parts == 1 and not found["power"]
    if (
        spare
        and rest
        and not re.match(r"[.,;:!?)\]*=<>+×·/−|\\\n-]|(?:long|wide|high|tall|deep|thick|across)\b", rest)
    ):
        return None
    return text[place:end].strip(), end


def without(text: str) -> str:
    """A text without the units beside its numbers: 5 cm * 3 cm as 5 * 3."""
    text = re.sub(rf"\s*{_UPRIGHT}\{{[^{{}}]*\}}(?:{_POWER})?", " ", text)
    pieces, place = [], 0
    for number in re.finditer(r"\d(?![\d.])", text):
        unit = unit_at(text, number.end()) if number.end() >= place else None
        if unit:
            pieces.append(text[place : number.end()])
            place = unit[1]
    return "".join(pieces) + text[place:]


def unit_of(label: str) -> tuple[str, Fraction]:
    """The (dimension, factor) of a unit's name; an unknown name is a dimension of its own."""
    powers: dict[str, int] = {}
    factor = Fraction(1)
    parts = re.split(r"\s*(/|·|\*|\bper\b)\s*", re.sub(r"\s+", " ", label.strip(" .-")))
    for place in range(0, len(parts), 2):
        sign = -1 if place and parts[place - 1] in ("/", "per") else 1
        dimensions, size = _simple(parts[place])
        factor *= size**sign
        for name, power in dimensions.items():
            powers[name] = powers.get(name, 0) + sign * power
    texts = [name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()) if power]
    return "*".join(texts), factor


def _simple(label: str) -> tuple[dict[str, int], Fraction]:
    """The powers of dimensions of one factor of a unit, and its size."""
    worded = re.match(rf"({_SQUARE})(.*)", label)
    raised = re.match(r"(.*?)\s*\^\s*\{?\s*([-+]?\d)\s*\}?$", label)
    if worded or raised:
        name = worded[2] if worded else raised[1]  # type: ignore[index]
        exponent = (2 if worded[1].startswith("sq") else 3) if worded else int(raised[2])  # type: ignore[index]
        dimensions, factor = _simple(name)
        return {dimension: power * exponent for dimension, power in dimensions.items()}, factor**exponent
    known = _UNITS.get(label) or _UNITS.get(label.lower())
    if known:
        named = (part.partition("^") for part in known[0].split("*"))
        return {name: int(power or 1) for name, _, power in named}, known[1]
    label = label.lower()
    return {label[:-1] if label.endswith("s") and len(label) > 3 else label: 1}, Fraction(1)


def same_noun(first: str, second: str) -> bool:
    """Whether one of two labels that are no units says more than the other: apples, red apples."""
    nouns = [{unit_of(word)[0] for word in label.split()} for label in (first, second)]
    unknown = not any(is_unit(word) for label in (first, second) for word in label.split())
    return unknown and (nouns[0] <= nouns[1] or nouns[1] <= nouns[0])


def split_label(text: str) -> tuple[str, str, Fraction]:
    """(the quantity, its unit or noun, the multiple that words such as million stand for).

    A label is \\text{...} or up to four words after the quantity, a degree sign, or a sign of money on either
    side. A single letter is a unit only in \\text{...} or after a space; in 5m it is a variable.
    """
    alone = text, "", Fraction(1)
    money = _CURRENCY.match(text)
    if money:
        rest, label, multiple = split_label(money[1] + text[money.end() :])
        return rest, label or _sign(money[2]), multiple
    compound = _compound(text)
    if compound:
        return compound
    found = _LABEL.search(text)
    if not found or not found.start():
        return alone
    before, bare = text[: found.start()].strip(), (found["bare"] or "").strip()
    if bare:
        spaced = text[found.start()].isspace()
        if not re.search(r"(?:[\d)}\]%]|\\pi)$", before) or not (spaced or bare in ATTACHED):
            return alone
        rest = re.sub(r"\\(?:times|cdot)(?![a-zA-Z])", "", before)
        if "\\" in rest if len(bare) == 1 else not (is_unit(bare) or words_of(bare)):
            return alone  # variables, as in 2 xy
    if "\\circ" in found["label"]:
        kind = re.search(r"[CF]", found["label"])
        return before, {"C": "celsius", "F": "fahrenheit"}[kind[0]] if kind else "degree", Fraction(1)
    if found["sign"]:
        return before, _sign(found["sign"]), Fraction(1)
    words, multiple = (bare or found["text"]).split(), Fraction(1)
    while words and words[0].lower() in _MULTIPLES:
        multiple *= _MULTIPLES[words.pop(0).lower()]
    words = words[1:] if words[:1] == ["of"] else words
    if words and words[-1].lower() in ("unit", "units"):  # square units: of any kind
        return before, "", multiple
    return before, " ".join(words) + re.sub(r"[\s{}+]", "", found["power"] or ""), multiple


def _compound(text: str) -> tuple[str, str, Fraction] | None:
    """The quantity and the unit of km/h, \\frac{\\text{km}}{\\text{h}}; None unless all parts are units."""
    start = max(len(text) - 120, 0)
    found = _COMPOUND.search(text, start)
    if not found or not found.start() or not re.search(r"(?:[\d)}\]%]|\\pi)$", text[: found.start()].strip()):
        return None
    label = f"{found['top']}/{found['bottom']}" if found["top"] else found["parts"]
    label = re.sub(rf"{_UPRIGHT}\{{\s*([^{{}}]*?)\s*\}}", r"\1", label)
    label = re.sub(r"\s*(?:\\cdot|\*|·)\s*", "*", re.sub(r"\s*(?:/|\bper\b)\s*", "/", label))
    label = re.sub(r"[\s{}+]", "", label)
    names = [re.sub(r"\^-?\d$", "", name) for name in re.split("[/*]", label)]
    attached = re.match(r"[a-zA-Z]", text[found.start() :]) and names[0] not in (ATTACHED | {"m"})
    if attached or not all(map(is_unit, names)):
        return None
    return text[: found.start()].strip(), label, Fraction(1)


def _sign(sign: str) -> str:
    return "dollar" if sign.endswith("$") else sign.lower().rstrip(".")


_PARTS = "half halve third quarter fourth fifth sixth seventh eighth ninth tenth"
_PART_SIZES = dict(zip(_PARTS.split(), (2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10)))


def number_word(words: str) -> Fraction | None:
    """The number that words such as "five", "minus twenty one", "two thirds" name; None for others."""
    minus = re.match(r"(?:minus|negative) (.*)", words)
    if minus:
        positive = number_word(minus[1])
        return None if positive is None else -positive
    if words in _NUMBER_WORDS:
        return Fraction(_NUMBER_WORDS[words])
    first, _, second = words.partition(" ")
    if first in ("a", "one") and second == "hundred":
        return Fraction(100)
    if first.endswith("ty") and first in _NUMBER_WORDS and 0 < _NUMBER_WORDS.get(second, 0) < 10:
        return Fraction(_NUMBER_WORDS[first] + _NUMBER_WORDS[second])
    size = _PART_SIZES.get(second if first in ("a", "one") else second.removesuffix("s"))
    count = 1 if first in ("a", "one") else _NUMBER_WORDS.get(first, 0)
    if size and 0 < count < 20 and (count == 1 or second.endswith("s")):
        return Fraction(count, size)
    return None
