"""Documents -> chunks: pieces that fit an encoder, cut at the best place in the text, each with its place.

A chunk never spans a heading. Within a section, paragraphs and code are joined up to the limit; one that is too long by
itself is cut into sentences (code into lines), a sentence into words, a word only if it is too long alone; text without
spaces is cut at its commas and full stops. The next chunk of a section repeats the last sentences of the previous one,
as far as they fit into the overlap. The same document and settings give the same chunks.

A table is cut between rows, and each chunk of it begins with its header. Where pages, slides or chapters are counted, a
chunk continues from one to the next only in the middle of a sentence.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from openchatkit.errors import UserError
from openchatkit.retrieval.reading.document import Block, Document, place
from openchatkit.retrieval.tokenization import MARKS, count_unspaced

Count = Callable[[Sequence[str]], Sequence[int]]

DEFAULT_TOKENS = 200
DEFAULT_OVERLAP = 30
# Encoders make one unknown token of a word that is too long for them: every 16 characters count as at least one token,
# and so does each character in scripts without spaces.
_CHARACTERS = 16
_AT_ONCE = 256  # blocks whose tokens are counted in one call
_SEPARATE = ("page", "slide", "chapter")  # units that a passage does not span
_TITLE_SHARE = 4  # a title takes at most a quarter of a chunk
# After the end of a sentence and its closing quotes; Chinese and Japanese have no space there.
_SENTENCE = re.compile(
    r"(?<=[.!?…।॥؟۔።။។])[\"'”’)\]]*(\s+)(?=[\w\"'“‘(\[`*])|(?<=[。！？｡])[」』”）]*()"  # noqa: RUF001
)
_CLAUSE = re.compile(r"(?<=[、，；：])()")  # noqa: RUF001
_WORD = re.compile(r"(?<=\S)(\s+)(?=\S)")
_LINE = re.compile(r"(\n)")
_TEXT_CUTS = (_SENTENCE, _CLAUSE, _WORD)


@dataclass(frozen=True)
class Chunk:
    """A piece of a document; `title` is the document's and the headings above it, joined by ` > `."""

    text: str
    title: str
    place: str


@dataclass(frozen=True)
class Chunking:
    """The longest chunk, and the overlap with the previous one, in tokens of the encoder without special ones."""

    tokens: int = DEFAULT_TOKENS
    overlap: int = DEFAULT_OVERLAP

    def check(self, limit: int) -> None:
        """Raise UserError if an encoder of `limit` tokens would not see whole chunks, or if chunks overlap too much."""
        if not 0 <= self.overlap <= self.tokens // 2:
            raise UserError(f"--overlap {self.overlap}: expected at most half of --chunk-tokens, {self.tokens // 2}")
        if self.tokens > limit:
            raise UserError(f"--chunk-tokens {self.tokens}: the encoder sees {limit} tokens, pass at most {limit}")


@dataclass(frozen=True)
class _Atom:
    """A piece that is not cut further: characters of a block, their separator from what precedes, their tokens."""

    block: Block
    start: int
    end: int
    before: str
    weight: int

    @property
    def text(self) -> str:
        return self.block.text[self.start : self.end]

    @property
    def head(self) -> str:
        """The table header that a chunk beginning with this atom repeats, unless the atom contains it."""
        held = self.start == 0 and self.block.text.startswith(self.block.head)
        return "" if held else self.block.head


def text_to_embed(title: str, text: str) -> str:
    """Return the text of a passage that the encoder is given."""
    return f"{title}\n{text}" if title else text


def chunk_document(document: Document, chunking: Chunking, count: Count) -> Iterator[Chunk]:
    """Yield the chunks of a document; `count` returns the number of tokens of each text."""
    headings: list[Block] = []
    before: Block | None = None
    packer = _Packer(document, chunking, count)
    while blocks := list(itertools.islice(document.blocks, _AT_ONCE)):
        for block, weight in zip(blocks, packer.weigh([block.text for block in blocks]), strict=True):
            if not block.level:
                if document.unit in _SEPARATE and before is not None and not _continues(before, block):
                    yield from packer.end()
                yield from packer.add(block, weight)
                before = block
                continue
            yield from packer.end()
            headings = [*(each for each in headings if each.level < block.level), block]
            packer.begin_section([heading.text for heading in headings])
    yield from packer.end()


class _Packer:
    """Joins atoms into chunks."""

    def __init__(self, document: Document, chunking: Chunking, count: Count) -> None:
        self._document, self._chunking, self._count = document, chunking, count
        self._atoms: list[_Atom] = []
        self._weight = 0  # of the atoms
        self._has_new = False  # whether one of them was not in the previous chunk
        self.begin_section([])

    def begin_section(self, headings: list[str]) -> None:
        """Begin a section under these headings. A heading equal to the title of the document is not repeated."""
        title = " > ".join(dict.fromkeys(name for name in (self._document.title, *headings) if name))
        most = self._chunking.tokens // _TITLE_SHARE
        while title and (weight := self.weigh([title])[0]) > most:
            title = title[: len(title) * most // weight].rstrip()
        self._title = title
        self._room = max(self._chunking.tokens - (self.weigh([title])[0] if title else 0), 1)

    def weigh(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text, at least one for every 16 characters."""
        counts = self._count(texts) if texts else ()
        return [max(tokens, _min_tokens(text)) for text, tokens in zip(texts, counts, strict=True)]

    def add(self, block: Block, weight: int) -> Iterator[Chunk]:
        """Add a block; yield the chunks that are full."""
        head = self._weigh_head(block)
        cuts = (_LINE, _WORD) if block.code or block.head else _TEXT_CUTS
        if 2 * head > self._room:
            block, head = dataclasses.replace(block, head=""), 0
        whole = _Atom(block, 0, len(block.text.rstrip()), "\n\n", weight)
        for atom in self._split_table(whole, head) if block.head else self._fit(whole, self._room, cuts):
            if self._atoms and self._weight + atom.weight > self._room:
                yield from self._cut(atom.weight + head)
            if not self._atoms:
                self._weight = self._weigh_head(block) if atom.head else 0
            self._atoms.append(atom)
            self._weight += atom.weight
            self._has_new = True

    def end(self) -> Iterator[Chunk]:
        """Yield the rest, at the end of a section."""
        if self._has_new:
            yield self._join()
        self._atoms, self._weight, self._has_new = [], 0, False

    def _join(self) -> Chunk:
        first, last = self._atoms[0], self._atoms[-1]
        text = first.text + "".join(atom.before + atom.text for atom in self._atoms[1:])
        text = f"{first.head}\n{text}" if first.head else text
        begin, end = first.block.lines(first.start, first.end)[0], last.block.lines(last.start, last.end)[1]
        return Chunk(text, self._title, place(self._document.unit, begin, end))

    def _cut(self, needed: int) -> Iterator[Chunk]:
        """End a chunk, and begin the next with the overlap, if that leaves room for `needed` tokens."""
        repeated = self._take_overlap(self._atoms, min(self._chunking.overlap, self._room - needed))
        yield from self.end()
        weight = sum(atom.weight for atom in repeated)
        if repeated and repeated[0].head:
            weight += self._weigh_head(repeated[0].block)
        # The overlap may be from another table, whose header does not fit.
        self._atoms, self._weight = (repeated, weight) if weight + needed <= self._room else ([], 0)

    def _weigh_head(self, block: Block) -> int:
        return self.weigh([block.head])[0] if block.head else 0

    def _split_table(self, whole: _Atom, head: int) -> Iterator[_Atom]:
        """Yield a table that fits; or its header, if included, and its rows, each with room for the header."""
        if whole.weight + (head if whole.head else 0) <= self._room:
            yield whole
            return
        block, start = whole.block, 0
        if not whole.head:
            yield _Atom(block, 0, len(block.head), whole.before, head)
            start = len(block.head) + 1
        for row in self._split(_Atom(block, start, whole.end, "\n" if start else whole.before, whole.weight), _LINE):
            yield from self._fit(row, self._room - head, [_WORD])

    def _take_overlap(self, atoms: list[_Atom], most: int) -> list[_Atom]:
        """Return the last atoms, or sentences of the last atom, of at most `most` tokens; never all of them."""
        if len(atoms) == 1 or atoms[-1].weight > most:
            last = atoms[-1]
            atoms = [] if last.block.code else list(self._split(last, _SENTENCE))
        found: list[_Atom] = []
        for atom in reversed(atoms[1:]):
            most -= atom.weight
            if most < 0:
                break
            found.insert(0, atom)
        return found

    def _fit(self, atom: _Atom, room: int, cuts: Sequence[re.Pattern[str]]) -> Iterator[_Atom]:
        """Yield an atom, or its pieces by the first of the cuts; pieces that are still too long are cut by the next."""
        if atom.weight <= room:
            yield atom
        elif cuts:
            for part in self._split(atom, cuts[0]):
                yield from self._fit(part, room, cuts[1:])
        else:
            yield from self._split_word(atom, room)

    def _split(self, atom: _Atom, cut: re.Pattern[str]) -> Iterator[_Atom]:
        """Yield the pieces between the matches of a cut, whose group is their separator."""
        spans, start, before = [], atom.start, atom.before
        for match in cut.finditer(atom.block.text, atom.start, atom.end):
            group = match.lastindex or 1
            spans.append((start, match.start(group), before))
            start, before = match.end(group), match[group]
        spans.append((start, atom.end, before))
        weights = self.weigh([atom.block.text[start:end] for start, end, _ in spans])
        for (start, end, before), weight in zip(spans, weights, strict=True):
            if not atom.block.text[start:end].isspace() and start < end:
                yield _Atom(atom.block, start, end, before, weight)

    def _split_word(self, atom: _Atom, room: int) -> Iterator[_Atom]:
        """Yield the pieces of a word that is too long for a chunk; a letter keeps its marks."""
        text, start, before = atom.block.text, atom.start, atom.before
        size = max((atom.end - atom.start) * room // atom.weight, 1)
        while start < atom.end:
            end = min(start + size, atom.end)
            while (weight := self.weigh([text[start:end]])[0]) > room and end - start > 1:
                end = start + max(min((end - start) * room // weight, end - start - 1), 1)
            while end < atom.end and end - start > 1 and text[end] in MARKS:
                end -= 1
            if not text[start:end].isspace():
                yield _Atom(atom.block, start, end, before, weight)
            start, before = end, ""


def _continues(before: Block, after: Block) -> bool:
    """Whether two blocks are on one page, or a sentence continues from one page to the next."""
    if before.last == after.first:
        return True
    text, following = before.text.rstrip(), after.text.lstrip()
    return bool(text and following) and not before.code and following[0].islower() and text[-1] not in ".!?…。:"


def _min_tokens(text: str) -> int:
    """Return the least number of tokens that a text counts as."""
    alone = count_unspaced(text)
    return alone - (-(len(text) - alone) // _CHARACTERS)
