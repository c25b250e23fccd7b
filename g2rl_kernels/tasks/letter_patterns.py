"""The patterns of letters.py. Every repetition is bounded, so that a search is linear in the text.

Statements end where the letter, or the option's text, is expected.
"""

from __future__ import annotations

import re
import unicodedata


def _plain_characters() -> dict[int, str]:
    """Full-width, bold and circled letters, and other punctuation, as ASCII."""
    ranges = ((0xFF01, 0xFF5F), (0x24B6, 0x24EA), (0x1F110, 0x1F12A), (0x1D400, 0x1D800))
    codes = [code for start, stop in ranges for code in range(start, stop)]
    table = {code: unicodedata.normalize("NFKC", chr(code)) for code in codes}
    same = {
        '"': "“”„«»「」『』",
        "'": "‘’",
        "[": "【《",
        "]": "】》",
        "-": "–—−",
        ",": "，、",
        " ": "\u3000\xa0",
    }
    for one, others in same.items():
        table |= dict.fromkeys(map(ord, others), one)
    return table | {ord("；"): ";", ord("。"): ". ", ord("→"): "->", ord("⇒"): "=>"}


_CHARACTERS = _plain_characters()
_FONTS = (
    "text|mathrm|mathbf|mathsf|mathit|boldsymbol|textbf|textit|textrm|textsf|emph|underline|bf|rm|left|right"
)
_MARKUP = re.compile(rf"\\(?:{_FONTS})(?![A-Za-z])\s?|\\(?=[%$&#])|[$`]|</?(?:b|strong|i|em|u)>")
_SPACE = re.compile(r"\\(?:[()\[\],;:! ]|(?:quad|qquad|displaystyle)(?![A-Za-z]))|<br ?/?>|~")
_EMPHASIS = re.compile(  # stars and underscores, but for those between letters or spaces
    r"\*\*+|__+|(?<=\S)\*(?!\S)|(?<!\S)\*(?=\S)|(?<=[\W_])\*(?=\w)|(?<=\w)\*(?=[^\w\s])|(?<!\w)_(?=\w)|"
    r"(?<=[^\W_])_(?!\w)"
)
_DEGREES = re.compile(r"(?<=\d)(°[CFK])")


def plain(text: str) -> str:
    """The text without emphasis, fonts and mathematical delimiters."""
    text = _MARKUP.sub("", text.translate(_CHARACTERS))
    return _DEGREES.sub(r" \1", _EMPHASIS.sub("", _SPACE.sub(" ", text)))


# --- what stands around a letter ---------------------------------------------------------------------------

OPEN = re.compile(r"[\s\"'(\[{]{0,12}(?:\\(?:boxed|fbox)\s?\{[\s\"'(\[{]{0,6})?")
LETTER = re.compile(r"([A-Za-z])(?![A-Za-z0-9_]|'[A-Za-z])")
CLOSE = re.compile(r"[\"')\]}]{0,8}")
OVER = re.compile(r"\s{0,3}(?:[.;!\n]|,? it is\b|$)")  # the sentence is over
PAUSE = re.compile(  # the letter is over: A and I are English words before others
    r"\s{0,3}(?:[;!\n:<]|\.(?!\d)|,(?!\d)|\(|$|- |(?:because|since|as|and|or|but|which|with|by|for|due|so|"
    r"not|hence|thus|therefore|if|when|where|while|whereas|rather|instead|over|from|according|here|too|also|is|was|in|"
    r"based)\b)"
)
AND = re.compile(r"\s{0,3}(?:and|or|&|/)")
QUESTION = re.compile(r"\s?\?")
WORD = re.compile(r"\s{0,3}\w")
OPERATOR = re.compile(  # the letter is a variable
    r" {0,3}(?:[=+<>^*/×·÷≤≥≠|](?!/)|\\[a-zA-Z]|\d|-\s?(?:[A-Za-z]?\d|[A-Za-z]\b))|_|\([A-Za-z0-9,. ]{1,4}\)"
)
CLOSED_OPERATOR = re.compile(r" {0,3}[=+<>^*×·÷≤≥≠](?!/)")  # the same after a letter in brackets
MARKS = re.compile(r"[\s,:=]{0,4}")
SEPARATOR = re.compile(r"\s?[.):,-]{1,2}\s?|\s(?=\()")  # between a letter and its option's text
BETWEEN = re.compile(r"[\s.):,=({-]{1,6}")
NEXT = re.compile(  # before another letter
    r" {0,3}(?:(?:,|/|&|and|or|und|oder|y|et|ou) {0,3}){1,2}(?:(?:option|choice|possibly|maybe|perhaps) )?"
    r"[\"'(\[]{0,2}"
)
BUT = re.compile(r"[\s,;.]{1,3}(?:but|rather|instead|it's|it is)\s(?:rather |instead |option )?")
BUT_MAYBE = re.compile(r"\b(?:but|or|although|though)\s$")  # before a hedged option beside another
SEVERAL = re.compile(r"[A-Z]{2,8}")
KIND = re.compile(r"(?:the )?(?:(?:option|choice|answer|letter|alternative)[\s:]{1,3})?[\s\"'(\[]{0,6}", re.I)

_VERBS = (
    r"(?:(?:is|are|was|were|can|could|must|should|would|has|have|does|do|did|will|seems?|looks?|be|been|both|"
    r"all|also|therefore|thus|then|[a-z]{2,12}ly)\s?)"
)
WRONG = re.compile(  # after an option, on its line
    r"[)\]\"' ]{0,3}(?:\([^()\n]{2,60}\) ?)?[:-]? {0,2}"
    rf"(?:{_VERBS}{{1,5}}(?:not\b|n't)|{_VERBS}{{0,5}}(?:cannot|can't|incorrect|wrong|false|eliminated|"
    r"ruled out|excluded|out\b|impossible|invalid|inconsistent|discarded|rejected|too\b|fails?\b|"
    r"a distractor)|是?错误|不正确|不对)",
    re.I,
)
UNLIKE = re.compile(  # before an option, and before a list of options that ends with it
    r"\b(?:not|never|neither|nor|cannot|rul(?:e|es|ed|ing) out|eliminat\w{1,5}|exclud\w{1,4}|discard\w{0,4}|"
    r"reject\w{0,4}|unlike|instead of|rather than|over|than|except|against|without|wrong(?:ly)?|"
    r"incorrect(?:ly)?)[\s,:]{1,3}(?:(?:both|options?|choices?|answers?)\s{1,2})?"
    r"(?:(?:options?\s)?\(?[A-Z]\)?[\s,]{1,3}(?:(?:and|or|nor)\s)?){0,8}[\s(\"']{0,3}$",
    re.I,
)
_THEY = r"(?:one|you|people|students?|others|many|they|beginners|readers)"
OTHERS = re.compile(  # before another person's choice, or a hypothetical one
    rf"\b(?:(?:{_THEY}|some(?:one)?|most)(?: \w{{1,12}}){{0,3}}? (?:think|thinks|say|says|believe|assume|"
    r"guess|suspect|expect|suppose|argue|tempted|conclude|mistakenly|might|may|could|pick|choose|select|answer)|"
    rf"{_THEY}|thought|if|whether|suppose|assume|assuming|can't|cannot|don't|didn't|won't|wouldn't|never|not|"
    r"neither|nor)(?: (?!(?:so|but|then|hence|thus|should|must)\b)[\w']{1,14}){0,3}\s{0,2}$",
    re.I,
)
NOT_THIS = re.compile(  # before "answer"
    r"\b(?:wrong|incorrect|false|other|another|no|one|an|any|each|every|whose|possible|tempting|common|first|second|"
    r"third|fourth|last|next|missing)"
    r"(?: [a-z]{1,12})?\s{1,2}$",
    re.I,
)
UNREAL = re.compile(r"\b(?:if|were|had|unless|otherwise)\b", re.I)
LISTED = re.compile(  # before the last letter of a list
    r"(?<![A-Za-z])[A-Z][)\]]?\s?(?:,|/|&|\b(?:and|or|nor))\s{0,2}(?:and |or |option |choice )?\(?$"
)

# --- statements --------------------------------------------------------------------------------------------

_WORD = r"(?<![A-Za-z0-9])"  # a word begins: \b does not know one after a Chinese character
_END = r"(?![A-Za-z])"
_MARKS = r"(?:[\s,:=]|-(?=\s)){0,4}"  # no minus sign of a number
_FILLER = (
    r"(?P<filler>(?:[\s,:>=-]{0,4}(?:[a-z]{2,12}ly|most|likely|therefore|thus|then|hence|indeed|just|still|"
    r"in fact|of course|only|either|both|(?:I|we) (?:think|believe|guess)|I'?(?: woul)?d say|"
    r"(?:the )?(?:correct |right |final |best )?(?:option|choice|answer|letter|alternative)"
    rf"(?!\s(?:is|was|must|should|would))){_END}){{0,3}}{_MARKS})"
)
_BE = (
    r"(?: is|'s| was| remains| becomes| (?:would|should|must|will|ought to|has to|have to|seems to|"
    r"appears to) be)"
)
_MAY = r" (?:might|may|could|can) be"
_NOUN = (
    r"(?:answer|ans|choice|option|solution|pick|selection|guess|verdict|decision|letter|respuesta|réponse|"
    r"antwort|resposta|risposta|ответ|"
    r"(?:correct|right|best) (?!angle|triangle|side|hand|way|time|half|foot|arm|line|view)[a-z]{3,12})"
)
STATED = re.compile(  # the answer is B; Answer: B
    rf"{_WORD}{_NOUN}{_END}(?:(?P<gap>(?:,?\s(?!answer|option|choice)(?-i:[Ia-z][a-z]{{0,13}})){{0,6}}?),?"
    rf"(?:(?P<be>{_BE}| es| est| ist| [eé]| è)|(?P<may>{_MAY}))(?P<negated>n't| not| never)?{_END}"
    r"|(?: choice| option| letter| is)?[\s\"']{0,3}(?::|=>?|-{1,2}>?(?!\d)|>|\n)(?:[\s:=>]|-(?=[\s>-])){0,6}"
    rf"){_FILLER}",
    re.I,
)
CHINESE = re.compile(
    r"(?:答案(?:应该|应)?[是为為选選]?|(?<!不)[选選][择擇]?)[:\s]{0,3}(?:(?:选项|[Oo]ption|[Cc]hoice)\s?)?"
)
PICKED = re.compile(  # I'd go with B
    rf"{_WORD}(?:(?:go|going|went|stick|sticking|left) with|choose|chose|choosing|pick|picked|picking|select|"
    rf"selected|selecting|opt for|settle (?:on|for)|vote for|(?:lean|leaning) towards?|(?<=d )say){_END}"
    rf"{_FILLER}",
    re.I,
)
CONCLUDED = re.compile(  # it must be B; Hence (B); a line "Answer B"
    rf"{_WORD}(?:(?P<it>it|this|that)(?:{_BE}|(?P<may>{_MAY}))|so|thus|hence|therefore|consequently|"
    rf"only|(?:(?<=\n)|^)(?:(?:the |my )?(?:final |correct |best )?answer|correct)){_END}{_FILLER}",
    re.I | re.M,
)
WHICH = re.compile(
    rf"{_WORD}(?P<may>which (?:is|means|gives|matches)){_END}{_FILLER}", re.I
)  # 13, which is C
CALLED = re.compile(  # B is correct; B. Paris - correct
    rf"{_WORD}\(?([A-Z])(?i:(?:[)\"']{{0,2}}(?:{_BE}|\s?[:-])|[.:)]\s[^\n.:-]{{1,60}}[:-])"
    r"(?:\s(?:[a-z]{2,12}ly|therefore|thus|indeed|the|our|my|a)){0,3}"
    r"\s(?:only )?(?:correct|right|best|answer|solution|(?P<may>true|accurate))"
    r"(?![a-z])(?! (?:if|when|only|for|but|in|about|unless)))"
)
CORRECTED = re.compile(  # Wait, no: C. Sorry, C.
    rf"{_WORD}(?:(?:wait|sorry|oops|hmm|correction|scratch that|I mean|I meant|actually|make that)"
    rf"(?:[\s,:;.!-]{{1,4}}(?:wait|no|sorry|actually|it's|it is)(?![A-Za-z])){{0,3}}[\s,:.!-]{{1,4}}"
    rf"|no(?:, | ?[:-] ))(?P<filler>(?:it's |it is |the answer is )?(?:option |choice )?)",
    re.I,
)
REPLY = re.compile(r"(?:^|(?<=\n)|(?<=[?.!] ))A ?:(?P<filler>\s)")  # Q: ...? A: ...
ASKED = re.compile(r"\?|\bQ ?:|\bQuestion\b")  # before a reply
TICK = "✅✔☑"
TICKS = re.compile(f"[{TICK}]")
TICKED = re.compile(rf"{_WORD}([A-Z])(?:[)\]]?[.:)]\s[^\n❌✗✘{TICK}]{{1,60}}|[)\].:]{{0,2}})\s?$")
CONTAINER = re.compile(r"\\(?:boxed|fbox|framebox)\s?\{|\\.|[{}]|<(/?)(?:final_?)?answer>", re.I | re.S)

# --- the last sentence and line ----------------------------------------------------------------------------

SENTENCES = re.compile(r"(?<=[.!?;])(?<!i\.e\.)(?<!e\.g\.)\s")
MARKED = re.compile(
    r"(?<![A-Za-z0-9\\])[(\[]\s?(?P<inside>[A-Z])\s?[)\]]"
    r"|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Aa]lternative)\s[(\"'\[]?(?P<after>[A-Z])(?![A-Za-z0-9_])[)\"'\]]?"
)
CONCLUDES = re.compile(
    r"\b(?:leav(?:es|ing)|match(?:es)?|corresponds? to|gives|is|so|thus|hence|therefore|only|clearly|"
    r"obviously|namely|get)[\s,:]{1,3}(?:with |us |only |the |just )?$",
    re.I,
)
BULLET = re.compile(r"[\s#>=*•✅✔☑-]{0,12}(?:\d{1,3}\.\s)?(?:(?:[Oo]ption|[Cc]hoice)\s)?")
LABEL = re.compile(r"[\s#>*•-]{0,12}[(\[]?([A-Z])(?:[)\]]|[.:](?!\d))")
# Between two containers that are both named: \boxed{A} or \boxed{B}
JOINED = re.compile(
    r"(?=.{0,80}$)(?=.*(?:[,;|&]|(?<!<)/|\b(?:and|or)\b))(?:[\s${}\\()*_,;/|&]|boxed|fbox|</?answer>|text|quad"
    r"|\b(?:and|or|maybe|perhaps|possibly|else|also)\b)*",
    re.I | re.S,
)
BRACKETED = re.compile(r"(?:\([A-Z]\)[\s,;/]{0,3}){2,26}")
ANYTHING = re.compile(r".{0,400}", re.S)
TRAILING = " .,:!✅✔☑"  # behind a letter, at the end of a line
REASONED = re.compile(r",?\s(?:because|since)\b|,\s(?:as|for|given|due to)\b")  # C, because
DENIED_LATER = re.compile(  # A. Green is not a colour
    r"(?!\s?(?:because|since|as|and|but|not|while|rather)\b)[^,.;:\n]{0,80}?"
    r"(?:\b(?:not|never|cannot|wrong|incorrect|false)\b|n't\b)",
    re.I,
)
TAKEN_BACK = re.compile(
    r"\b(?:answer|option|choice|it|that|this)(?:\s\w{1,12})?\s(?:(?:is|was)\s)?(?:not\b|wrong|incorrect|false)"
    r"|\b(?:isn't|wasn't)\b",
    re.I,
)

# --- options' texts ----------------------------------------------------------------------------------------

ENDED = re.compile(r"\s{0,3}(?:[.;!\n)\]}]|$)")  # nothing follows an option's text
BOUND = re.compile(r"(?![\w])(?!'\w)(?![.,]\d)(?!\s?[+*/×÷^=%°])")
ASIDE = re.compile(r"\s{0,3}(?:[.,;!\n)\]}](?!\d)|$|\(|- |(?:because|since|as)\b)")
ACTUAL = re.compile(r"\bactual(?:ly)?\b", re.I)
LABELLED = re.compile(r"(?<![A-Za-z0-9])([A-Z])(?:[.):]| -)[ \t]{0,2}$")
SENTENCE_ENDS = re.compile(r"(?<!\b[A-Z])[.!?](?=\s)|\n")
DENIED = re.compile(  # before an option
    r"(?:\b(?:not|never|neither|nor|cannot)|n't)\b(?: (?!but\b|only\b)[\w'-]{1,14}){0,5}\s{1,2}[\"'(]{0,2}$"
    r"|\b(?:no|without|unlike|instead of|than|except|against|over|besides|opposite of|least|most|"
    r"below|above|under|near|like|compared (?:to|with)|opposed to|from|"
    r"(?:rul(?:e|es|ed|ing) out|eliminat\w{1,5}|exclud\w{1,4}|"
    r"discard\w{0,4}|reject\w{0,4}))\s(?:(?:the|an?|in|of|is|just|even)\s){0,3}[\"'(]{0,2}$",
    re.I,
)
SUPPOSED = re.compile(  # before an option
    r"\b(?:if|unless|suppose|supposing|assume|assuming|whether|might|could|maybe|perhaps|options|choices|"
    r"alternatives|candidates)\b",
    re.I,
)
BESIDE = re.compile(
    r"\b(?:although|though|whereas|while|despite)\b[^,;]{0,60}$", re.I
)  # a clause before an option
BUT_OTHER = re.compile(r"[,;] (?:but|however)\b", re.I)
PEOPLE = re.compile(
    r"\b(?:people|students?|some(?:one|body)?|others|many|most|one|you|they|beginners|readers)"
    r"(?: \w{1,12}){0,3}? (?:thinks?|says?|believes?|assumes?|guess(?:es)?|suspects?|expects?|argues?|"
    r"mistakenly|confuses?|mistakes?|picks?|chooses?|answers?|names?|tempted|may|could)\b[^.;]{0,40}$",
    re.I,
)
ITS_LETTER = re.compile(  # behind an option's text
    r"[\"']?\s?(?:[,-]\s?)?(?:which is |that is |i\.e\.,? )?"
    r"(?:\(?(?:option|choice|answer)\s\(?|\()([A-Z])(?![A-Za-z0-9])"
)
CONCLUSION = re.compile(r"\b(?:so|thus|hence|therefore|answer|correct|overall|conclusion|only)\b", re.I)
NEVER = re.compile(r"(?!)")
CROSSED = re.compile(r"[^\n]{0,40}[❌✗✘]")
COMPUTED = re.compile(r"\s?[+*/×÷^=<>·≤≥≠]|\s?-\s?\d")  # after the number of a computation
OPERATOR_BEFORE = re.compile(
    r"(?:\d\s|\b(?:from|between)\s(?:[^,;]{1,30}\s(?:to|and|until)\s)?|[+*/×÷^·<>≤≥≠]|[\w)]\s?-)\s?$"
)
NUMBERED = re.compile(r"\b(?:steps?|cases?|options?|parts?|lines?|examples?|choices?|questions?)\s$", re.I)
COMMON = {  # options that sentences say for other reasons
    "true",
    "false",
    "yes",
    "no",
    "correct",
    "incorrect",
    "all",
    "none",
    "both",
    "i only",
    "neither",
    "one",
}
COMMON_BEFORE = re.compile(r"(?:\b(?:is|was|are|be|so|thus|hence|therefore),?|:)\s$|^\s*$", re.I)
COUNTED = re.compile(  # a number of something else
    r" (?:reasons|ways|steps|cases|options|choices|things|types|kinds|factors|points|possibilities)\b", re.I
)
IS = re.compile(r"(?:\s(?:is|was|are|equals|gives|makes)|\s=)\s", re.I)
FIRST_WORD = re.compile(r"[,.;:!]|$")
SO = re.compile(r"\b(?:so|thus|hence|therefore)\b", re.I)
PARTICLES = {"da", "de", "di", "van", "von", "der", "la", "le", "of", "the"}  # in names
KINDS = {"ocean", "sea", "river", "mountain", "mountains", "city", "island", "islands", "desert", "lake"}
