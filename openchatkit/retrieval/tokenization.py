"""Words for BM25, the same in an index and in a question, and which of them say what a text is about.

Text is normalized to NFKC, split at everything but letters and digits, and case-folded. A word in camel case counts
whole and in its parts, so that `getObject` is found by "get object" and `GitHub` by "github". Plurals count as their
singular, except within a name such as `json.dumps`, where an ending tells one thing from another. In scripts without
spaces between words, such as Chinese, Japanese and Thai, and in Korean, whose particles are attached to words, pairs of
characters count, a letter with its marks as one. The points of Arabic and Hebrew, which few write, are ignored, and
English function words are dropped.

Stop words stay in the index, but a passage is not found by them alone: the commonest words of English and its small
talk, greetings in other languages and, where terms are pairs of characters, pairs with a character of grammar.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator

from openchatkit.texts import normalize

# Thai and Lao, Myanmar, Khmer, kana, Chinese characters; as classes of a regular expression, without brackets.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Korean separates words, but attaches particles and endings to them.
_HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3"
_PAIRED = _UNSPACED + _HANGUL
# Vowels and tones on a letter, from Hebrew to Khmer: not letters to `re`, but parts of words.
MARKS = "".join(chr(code) for code in range(0x300, 0x1800) if unicodedata.category(chr(code)).startswith("M"))
_TOKENS = re.compile(rf"[{_PAIRED}]|[^\W{_PAIRED}]+|[^\w\s]")
_UNSPACED_CHARACTER = re.compile(f"[{_PAIRED}]")
_LETTERS = 3  # of scripts other than Latin, that make about one token
LONGEST = 64  # characters; anything longer is not a word but, say, an encoded file
# Letters and digits; the first group is part of a name: joined to others by a dot, a colon or an underscore.
# One mark a round: with several, a letter under n marks could be read in 2^n ways, and all would be tried.
_RUN = rf"[^\W_]+(?:[{MARKS}][^\W_]*)*"
_RUNS = re.compile(rf"((?<=[\w.:][._:]){_RUN}|{_RUN}(?=[._:]+[^\W_]))|{_RUN}")
_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_PAIRED_RUN = re.compile(f"([{_PAIRED}][{_PAIRED}{MARKS}]*)")
_LETTER = re.compile(f".[{MARKS}]*")
_SYLLABLES = re.compile(f"[{_HANGUL}]{{2}}")
_POINTS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670]")
_FUNCTION_WORDS = """
a about am an and are as at be been but by can could d did do does for from had has have he her his how i if in into is
it its ll m me my no not of on or our re s she should so such t than that the their them then there these they this to
too us ve very was we were what when where which who why will with would you your
"""
_DROPPED = frozenset(_FUNCTION_WORDS.split())
_ENGLISH = """
ability able above accept accord account across act action active actual actually add afraid after afternoon again
against age ago agree ahead ain air alive all allow almost alone along already alright also although always amazing
among amount angry animal another answer any anybody anyhow anymore anyone anything anyway anywhere apart appear apply
april area aren around arrive art aside ask asleep ate attention august available average avoid awake away awesome
awful baby back bad ball bank base basic beautiful because become bed been before began begin behind believe below
beside best better between beyond big birthday bit black bless blue board body book bored boring born bot both bottom
bought box boy break breakfast brief bright bring bro broke broken brother brought brown buddy build built business
busy buy bye call calm came capital car card care carry case catch cause certain certainly chance change chat check
cheer child children chill choice choose city class clean clear clearly clever close cold color colour come comfortable
comment common company compare complete completely computer concern confuse confused congrats congratulation consider
contain continue control conversation cook cool copy correct cost couldn country couple course cover crazy create cry
cup current cut cute cya daily damn dark date daughter day dead deal dear death december decide deep definitely deliver
describe detail didn die differ difference different difficult dinner direct direction discover discuss distance doctor
doesn dog doing don done door double doubt down draw drawn dream dress drew drink drive driven drop drove dry dude
during each early earth easily easy eat eaten edge effect eight either eleven else empty end enjoy enough enter entire
especially even evening ever every everybody everyone everything everywhere exact exactly example excellent except
excite excited excuse exist expect expensive experience explain eye face fact fail fair fall false family famous
fantastic far farewell fast father favor favorite favourite fear february feel feeling fell fella felt few field fight
figure fill final finally find fine finish fire first fish five fix flat floor flower fly folk follow food foot force
forever forget form forward fought found four free fresh friday friend friendly front fruit full fully fun funny
further future game garden general get girl give given glad go goal god goes going gold gone gonna good goodbye
goodnight got gotta great green greet greeting grew ground group grow grown guess guy hadn haha hahaha hair half hand
handle happen happy hard hardly hasn hate haven having head health hear heard heart heat heavy held hello help helpful
hence here hey heya hi hidden high him himself hit hiya hmm hold holiday home honest honestly hope horrible hot hour
house howdy however huge huh human hundred hungry hurry hurt husband idea ill imagine immediately important impossible
include indeed inform information inside instead intend interest interested interesting involve isn issue item january
job join joke july june just keep kept kid kill kind kitchen knew know knowledge known lady laid land language large
last late later latest laugh law lazy lead learn least leave led left leg lent less let letter level lie life light
like likely line list listen lit little live local lol lonely long longer look lose lost lot loud love lovely low luck
lucky lunch machine mad made main mainly make man manage many march mark market marry matter maybe meal mean meaning
meant measure meet meeting member men mention message method middle might mind minute miss mistake modern moment monday
money month mood moon more morning most mostly mother move movie much mum music must mustn myself name nation nature
near nearly necessary need neither never new news next nice night nine nobody noise none nope normal normally note
nothing notice november now nowhere number obvious obviously occur october offer office often oh ok okay old once one
only onto oops open opinion option orange order ordinary original other otherwise ought ourselves outside over own page
paid pain paint pair pal paper pardon parent part particular particularly partly party pass past pay peace people per
perfect perhaps period person personal phone photo pick picture piece place plan plant play please pleasure pls plz
point poor popular position possible possibly post power practice prefer prepare present president pretty prevent
previous price private probably problem process produce promise proper properly protect proud prove provide public pull
purpose push put quality question quick quickly quiet quite race rain raise ran random rang rather reach read ready
real really reason receive recent recently recommend red regard regular relate remain remember remind remove repeat
reply report require reset respond response rest result return rich ride right ring rise river road robot rode role
room rose round rule run sad safe said same sang sat saturday save saw say school science sea season second secret see
seem seen sell send sense sent sentence separate september serious seriously serve set seven several shall shape share
shop short shot shouldn show shown shut sick side sign silly similar simple simply since sing single sir sister sit
site six size skip sky sleep sleepy slept slow slowly small smart smell smile so soft sold solution solve some somebody
somehow someone something sometimes somewhat somewhere son song soon sorry sort sought sound speak special specific
speech speed spell spend spent spoke spoken spring stand star start state stay step stick still stole stood stop store
story straight strange street strong stuck study stuff stupid subject such suddenly suggest suggestion summer sun
sunday sup super suppose sure surprise swam sweet swim system table take taken talk tall taste taught teach teacher
tell ten tend term terrible test text thank thanks then there therefore thing think third thirsty tho thought thousand
three threw throw thrown thursday thus thx tie till time tiny tip tire tired title today together told tomorrow tonight
tool top topic tore torn total touch toward town travel treat tree trip trouble true truly trust truth try tuesday turn
twelve twenty twice two type typical uh um uncle understand understood unfortunately unless until up upon upset ur use
used useful user usual usually value various version via view visit voice wait wake walk wall wanna want warm wash wasn
waste watch water way weak wear weather wednesday week weekend weird welcome well went weren wet whatever whenever
wherever whether while white whoa whole whose wide wife win wind window winter wise wish within without woke woman
women won wonder wonderful word wore work worker world worn worried worry worse worst worth wouldn wow write writer
written wrong wrote yay yeah year yellow yep yes yesterday yet yo young yours yourself yup zero
"""
_GREETINGS = """
aber adios alles allo arigato au auf avec bien bist bitte bonjour bonsoir buenas bueno buenos buongiorno ca ciao comme
comment como con da danke das dass de dein dem den der des dia dias die dir du ein eine einen el ella en er es est
estas et eu geht gracias grazie gut gute guten guter hallo heisst heißt hola ich ihr il ist ja je kann kein la las le
les los ma mais mal mas me merci mi mir moi mon morgen muy nach nein nicht noch noche noches non nous nuit obrigado ola
olá oui para pas per pero por pour prego puis que quel quelle qui quien quoi qué salut salve se sehr sein si sie sind
soir son sont sta stai su sur sí tag tarde tardes toi tous tout très tschüss tu un una und une vielen vous warum was
wer wie wiedersehen wieso wir wo y да для до если есть здравствуйте или как кто меня мне можно мы на не нет но он она
они от по пожалуйста почему привет спасибо так там тебя ты у утро что это я
감사합니다 고마워요 고맙습니다 괜찮아요 누구세요 뭐해요 미안해요 반가워요 반갑습니다 안녕하세요 어때요
어디에 있어요 죄송합니다 지내세요
ขอบคุณ ขอโทษ ครับ คือ ค่ะ ทำไม ที่ไหน มี สบายดีไหม สวัสดี หรือ อย่างไร อะไร เป็น เมื่อไหร่ ใคร ไม่ ได้
"""  # noqa: RUF001
# A pair with one of these is mostly grammar: particles, pronouns, questions, greetings. Pairs of hiragana are as well.
_GRAMMAR = re.compile(
    "[的了是我你您他她它们們在有不这這那吗嗎呢吧啊呀么麼什甚怎哪谁誰为為好谢謝请請今明昨天几幾多少和与與及或就都也很要会會能可以把被给給从從到对對]"
    "|[\u3041-\u3096ー]{2}|(何|今日|明日|昨日|元気|お.|ご.)"
    "|[은는을를]$|어디|무엇|뭐|안녕|감사|누구|언제|어떻|떻게|있나|나요|니다|습니|합니|입니|니까|하세|세요|해요|하는|에요|예요|이에|인가|가요"
    "|는지|인지|무슨|오늘|내일|그리|그런|이것|저것|우리|당신|얼마|마나|왜|까지|에서|으로|에게|부터"
)
_NUMBER = re.compile(r"\d{1,2}|(1[5-9]|20)\d\d")  # a count, a day or a year
_ENDING = re.compile(r"(.{3,}?)(ing|ed|ly)")


def tokenize(text: str) -> list[str]:
    """Return the words of a text in order, with repetitions."""
    return [word for word, _ in _terms(text)]


def _terms(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the words of a text in order, each with whether it is part of a name such as `json.dumps`."""
    for match in _RUNS.finditer(_normalize(text)):
        run, in_name = match[0], match[1] is not None
        for word in _split_ascii(run, in_name) if run.isascii() else _split_other(run):
            yield word, in_name


def strip_plural(word: str) -> str:
    """Strip the ending of an English plural from a lower-case word.

    This is the S stemmer of Harman, How effective is suffixing? (JASIS 42, 1991). Words of
    up to three letters stay, since many are abbreviations.
    """
    if len(word) <= 3 or not word.endswith("s") or word.endswith(("us", "ss")):
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return f"{word[:-3]}y"
    return word[:-1]


def is_named_in(title: str, question: str) -> bool:
    """Whether a question contains the whole title, in its own case and not as part of a longer name."""
    return bool(title) and re.search(rf"(?<![\w.]){re.escape(title)}(?!\.?\w)", question) is not None


def count_unspaced(text: str) -> int:
    """Count the characters of a text that belong to scripts without spaces between words."""
    return 0 if text.isascii() else len(_UNSPACED_CHARACTER.findall(text))


def estimate_tokens(text: str) -> int:
    """Estimate the tokens of a text: one for an English word, a mark or a Chinese character."""
    found = _TOKENS.findall(text)
    return len(found) if text.isascii() else sum(1 if run.isascii() else -(-len(run) // _LETTERS) for run in found)


def content_words(text: str) -> list[str]:
    """Return the words that say what a text is about, each once; all of a name such as `json.load`."""
    return list(dict.fromkeys(word for word, in_name in _terms(text) if in_name or not _is_stop_word(word)))


def _is_stop_word(term: str) -> bool:
    """Whether a term of `tokenize` says too little for a passage to be found by it alone."""
    if not term.isascii():
        return term in _stop_words() or _GRAMMAR.search(term) is not None
    if len(term) < 2 or term in _stop_words() or _NUMBER.fullmatch(term):
        return True
    ending = _ENDING.fullmatch(term)
    return ending is not None and not _stop_words().isdisjoint(
        (stem := ending[1], f"{stem}e", stem[:-1], f"{stem[:-1]}y")
    )


def _split_ascii(run: str, in_name: bool) -> list[str]:
    word = run.lower()
    if word in _DROPPED or len(word) > LONGEST:
        return []
    parts = [] if word == run or run[1:] == word[1:] or run.isupper() else _HUMPS.split(run)
    if len(parts) > 1:
        return [word, *(strip_plural(part.lower()) for part in parts)]
    return [word if in_name else strip_plural(word)]


def _split_other(run: str) -> list[str]:
    found = []
    for piece in _PAIRED_RUN.split(run):
        if _PAIRED_RUN.fullmatch(piece):
            letters = _LETTER.findall(piece)
            found += ["".join(letters[at : at + 2]) for at in range(max(1, len(letters) - 1))]
            if _SYLLABLES.fullmatch(piece):
                found.append(piece[0])  # a word of one syllable, and its particle
        elif piece and len(piece) <= LONGEST:
            found.append(piece.casefold())
    return [word for word in found if word not in _DROPPED]


def _normalize(text: str) -> str:
    return text if text.isascii() else _POINTS.sub("", normalize(text))


@functools.cache
def _stop_words() -> frozenset[str]:
    return frozenset(tokenize(f"{_ENGLISH} {_GREETINGS}"))
