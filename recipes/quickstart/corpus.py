"""Build the quickstart corpus: plain English prose from permissively licensed Debian documentation packages.

    python recipes/quickstart/corpus.py            # needs apt-get and dpkg-deb (Debian 12), and the network
    python recipes/quickstart/corpus.py --held-out --recovery 21000000 --out .corpus   # a longer recovery.txt

The packages of `SOURCES` are downloaded (never installed), unpacked, and turned into paragraphs of plain
text. Navigation, tables of symbols and long listings are dropped; a paragraph is kept if it reads like
English, and kept once in the whole corpus. Documents are split by the SHA-256 of `package/path`, so the
split does not depend on the machine or on the order of the files. Whole documents of the `held_out`
packages are set aside first, and no paragraph of theirs remains in the training text.

Writes `.corpus/train.txt` (documents separated by a form feed; git ignores the folder), and beside this file
`calibration.txt` and `evaluation.txt`, with the paths of their pages in `documents.txt`, and `recovery.txt`,
for recipes that train what is left of a pruned model: training documents of the `held_out` packages.
`--held-out` reads these packages alone, which changes `train.txt` only: it is not written then.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parents[1] / ".corpus"


@dataclass(frozen=True)
class Source:
    """One Debian package: which pages below /usr/share are read, and under which licence."""

    package: str
    version: str
    licence: str
    pages: str  # regular expression, searched in the path inside the package
    held_out: bool = False  # may supply calibration and evaluation documents


RUST_BOOKS = (
    r"/html/(book|reference|nomicon|rust-by-example|cargo|rustc|rustdoc|edition-guide|embedded-book|std)"
    r"/(?!first-edition|second-edition|2018-edition|print\.html|arch/|os/)"
)
SOURCES = (
    Source("python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0", r"/html/(?!_sources|genindex)", True),
    Source("postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL", r"/html/", True),
    Source("apache2-doc", "2.4.71-1~deb12u1", "Apache-2.0", r"/manual/en/", True),
    Source("sqlite3-doc", "3.40.1-2+deb12u2", "public domain", r"/sqlite3/", True),
    Source("rust-doc", "1.63.0+dfsg1-2", "MIT OR Apache-2.0", RUST_BOOKS, True),
    Source("python-django-doc", "3:3.2.25-0+deb12u7", "BSD-3-Clause", r"/html/(?!genindex|_modules)", True),
    Source("llvm-14-doc", "1:14.0.6-12", "Apache-2.0 WITH LLVM-exception", r"/html/"),
    Source("clang-14-doc", "1:14.0.6-12", "Apache-2.0 WITH LLVM-exception", r"/html/"),
    Source("python-scipy-doc", "1.10.1-2", "BSD-3-Clause", r"/html/"),
    Source("python-sklearn-doc", "1.2.1+dfsg-1", "BSD-3-Clause", r"/html/(?!auto_examples|_modules)"),
    Source("python-sqlalchemy-doc", "1.4.46+ds1-1", "MIT", r"/html/(core|orm|changelog|dialects|[^/]*$)"),
    Source("twisted-doc", "22.4.0-4+deb12u1", "MIT", r"/html/(?!api/(classIndex|nameIndex|undocced))"),
    Source("sphinx-doc", "5.3.0-4", "BSD-2-Clause", r"/html/"),
    Source("cmake-doc", "3.25.1-1", "BSD-3-Clause", r"/html/"),
    Source("erlang-doc", "1:25.2.3+dfsg-1+deb12u4", "Apache-2.0", r"/doc/(?!.*/wx)"),
    Source(
        "ghc-doc", "9.0.2-4", "BSD-3-Clause", r"/(users_guide|libraries/(base|containers|text|bytestring))"
    ),
    Source("libboost1.74-doc", "1.74.0+ds1-21", "BSL-1.0", r"/doc/"),
    Source("nodejs-doc", "18.20.4+dfsg-1~deb12u3", "MIT", r"/api/(?!all\.html)"),
    Source("nim-doc", "1.6.10-2", "MIT", r"/html/"),
    Source("ant-doc", "1.10.13-1", "Apache-2.0", r"/ant/"),
)

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SKIP_TAGS = {"script", "style", "head", "nav", "header", "footer", "svg", "form", "button", "select", "math"}
SKIP_CLASSES = re.compile(
    r"\b(nav\w*|sidebar\w*|sphinxsidebar\w*|related|toc\w*|contents|index\w*|footer\w*|header(link)?|src(link)?"
    r"|breadcrumb\w*|linenos?|bottomlang|toplang|docutils-toc|menu\w*|item-decl|out-of-band|notices|subnav"
    r"|impl-items-toggle|search\w*|viewcode-link|version\w*|copyright|LEGALNOTICE|hd)\b"
)
BLOCK_TAGS = (
    "p li dd dt td th tr div section h1 h2 h3 h4 h5 h6 pre table ul ol dl blockquote body main article br hr "
    "summary details"
)
BLOCKS = frozenset(BLOCK_TAGS.split())
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6", "dt"}
COMMON = (
    "the of to and a in is it that for on with as are be this by an or from at which not have has was will "
    "can if when you may must should but all one any its into than then there these they we do does used "
    "using use only such also no more other each how what your"
)
STOPWORDS = frozenset(COMMON.split())
PRE_LINES = 8  # longest listing that is kept
SIZES = (3_000, 16_000)  # characters of a document that may be held out: varied, and none dominates
RUN = 13  # words; recovery documents that share so many in a row with the evaluation text are left out


class Page(HTMLParser):
    """Collects `(kind, text)` blocks of one page; kind is "head", "pre" or "text"."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        self.buffer: list[str] = []
        self.stack: list[tuple[str, bool, str]] = []  # open tags: name, skipped from here on, block kind

    @property
    def state(self) -> tuple[bool, str]:
        """Whether the innermost open tag is skipped, and its block kind."""
        return self.stack[-1][1:] if self.stack else (False, "text")

    def flush(self, kind: str) -> None:
        """End the current block."""
        raw, self.buffer = "".join(self.buffer), []
        text = raw.strip("\n").rstrip() if kind == "pre" else " ".join(raw.split())
        if text.strip():
            self.blocks.append((kind, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag."""
        skipped, kind = self.state
        if tag in BLOCKS and kind != "pre":
            self.flush(kind)
            kind = "head" if tag in HEADINGS else "pre" if tag == "pre" else "text"
        if tag in VOID:
            return
        names = {name: value or "" for name, value in attrs}
        named = SKIP_CLASSES.search(f"{names.get('class')} {names.get('role')}")
        named = named or SKIP_CLASSES.fullmatch(names.get("id", ""))
        self.stack.append((tag, skipped or tag in SKIP_TAGS or bool(named), kind))

    def handle_endtag(self, tag: str) -> None:
        """Close a tag, and those left open inside it."""
        if tag in VOID or not any(entry[0] == tag for entry in self.stack):
            return
        if tag in BLOCKS and (self.state[1] != "pre" or tag == "pre"):
            self.flush(self.state[1])
        while self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Take text that is not skipped."""
        if not self.state[0]:
            self.buffer.append(data)


def is_prose(text: str) -> bool:
    """Whether a paragraph reads like English sentences rather than a list of names."""
    words = text.split()
    if len(text) < 50 or len(words) < 9:
        return False
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    common = sum(word.strip(".,;:()").lower() in STOPWORDS for word in words) / len(words)
    plain = sum(ord(c) < 128 for c in text) / len(text)
    return letters > 0.82 and common > 0.22 and plain > 0.97 and max(map(len, words)) < 60


def paragraphs(html: str) -> list[str]:
    """Prose of one page, with the headings and short listings that stand next to kept prose."""
    page = Page()
    page.feed(html)
    page.close()
    page.flush("text")
    kept: list[str] = []
    heads: list[str] = []
    last, follows_prose = "", False
    for kind, text in page.blocks:
        text = text.replace("¶", "").replace("\u00a0", " ").replace("\u2019", "'").strip("\n")
        if kind == "head":
            heads, follows_prose = [*heads[-1:], text] if len(text) < 120 else [], False
        elif kind == "pre":
            if follows_prose and text.count("\n") < PRE_LINES and len(text) < 600:
                kept.append("\n".join(line.rstrip() for line in text.split("\n")))
            follows_prose = False
        elif is_prose(text):
            kept.extend(head for head in heads if head != last)
            last = heads[-1] if heads else last
            kept.append(text)
            heads, follows_prose = [], True
        else:
            follows_prose = follows_prose and len(text) < 40
    return kept


def download(source: Source) -> Path:
    """Fetch and unpack one package below `.corpus/`; returns its root. Says when the version has moved on."""
    root = CORPUS / "root" / source.package
    if not root.exists():
        debs = CORPUS / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        root.parent.mkdir(exist_ok=True)
        pinned = subprocess.run(["apt-get", "download", "-q", f"{source.package}={source.version}"], cwd=debs)
        if pinned.returncode:
            print(f"{source.package}: {source.version} is gone from the mirror, taking the current version")
            subprocess.run(["apt-get", "download", "-q", source.package], cwd=debs, check=True)
        (deb,) = debs.glob(f"{source.package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return root


def documents(source: Source) -> list[tuple[str, str, list[str]]]:
    """`(hash, name, paragraphs)` of every page of one package, sorted by hash."""
    root = download(source)
    wanted = re.compile(source.pages)
    out = []
    for path in sorted(root.rglob("*.htm*")):
        inside = "/" + path.relative_to(root).as_posix()
        if path.is_file() and not path.is_symlink() and wanted.search(inside):
            text = paragraphs(path.read_text(encoding="utf-8", errors="replace"))
            if text:
                out.append((hashlib.sha256((source.package + inside).encode()).hexdigest(), inside, text))
    return sorted(out)


def once(text: list[str], seen: set[bytes]) -> list[str]:
    """Paragraphs not met before (case, digits and spacing aside); short ones, the headings, may repeat."""
    kept = []
    for paragraph in text:
        key = hashlib.blake2b(re.sub(r"[\W\d]+", " ", paragraph.lower()).encode(), digest_size=8).digest()
        if len(paragraph) < 50 or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return kept


def hold_out(
    pools: list[list[tuple[str, str, list[str]]]], size: int, seen: set[bytes]
) -> Iterator[tuple[str, str]]:
    """Take `(path, text)` of about `size` characters in all out of the pools, one package after another."""
    total, turn = 0, 0
    while total < size:
        pool, turn = pools[turn % len(pools)], turn + 1
        index = next(i for i, (_, _, text) in enumerate(pool) if SIZES[0] < sum(map(len, text)) < SIZES[1])
        _, path, text = pool.pop(index)
        document = "\n\n".join(once(text, seen))
        if len(document) > SIZES[0]:
            total += len(document) + 2
            yield path, document


def runs(text: str) -> set[tuple[str, ...]]:
    """Every `RUN` words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def recovery(train: list[tuple[bytes, str, str]], evaluation: str, size: int) -> list[str]:
    """About `size` characters of training documents of the held-out packages, in the order of `train.txt`."""
    packages = {source.package for source in SOURCES if source.held_out}
    evaluated, chosen, total = runs(evaluation), [], 0
    for _, document, package in sorted(train):
        if total < size and package in packages and not evaluated & runs(document):
            chosen.append(document)
            total += len(document) + 2
    return chosen


def main() -> None:
    """Write the training, calibration, evaluation and recovery text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibration", type=int, default=400_000, help="characters of calibration text")
    parser.add_argument("--evaluation", type=int, default=180_000, help="characters of evaluation text")
    parser.add_argument("--recovery", type=int, default=3_000_000, help="characters of recovery text")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of these three texts")
    parser.add_argument("--held-out", action="store_true", help="only what these three need: no train.txt")
    parser.add_argument("--jobs", type=int, default=2, help="processes that parse HTML")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    sources = [source for source in SOURCES if source.held_out or not args.held_out]
    with ProcessPoolExecutor(args.jobs) as executor:
        pages = dict(zip((s.package for s in sources), executor.map(documents, sources), strict=True))
    pools = [pages[s.package] for s in SOURCES if s.held_out]
    seen: set[bytes] = set()
    held = {
        "evaluation": list(hold_out(pools, args.evaluation, seen)),
        "calibration": list(hold_out(pools, args.calibration, seen)),
    }
    listing = [f"{name} {path}\n" for name, texts in held.items() for path, _ in texts]
    (args.out / "documents.txt").write_text("".join(listing), encoding="utf-8", newline="\n")
    texts = {name: [text for _, text in documents] for name, documents in held.items()}
    train, sizes = [], Counter()
    for package, pool in pages.items():
        for _, _, text in pool:
            document = "\n\n".join(once(text, seen))
            if len(document) > 200:
                train.append((hashlib.sha256(document.encode()).digest(), document, package))
                sizes[package] += len(document)
    texts["recovery"] = recovery(train, "\n\n".join(texts["evaluation"]), args.recovery)
    for name, chosen in texts.items():
        body = "\n\n".join(chosen) + "\n"
        (args.out / f"{name}.txt").write_text(body, encoding="utf-8", newline="\n")
        print(f"{name}: {len(chosen)} documents, {len(body):,} characters")
    if args.held_out:
        return
    body = "\n\f\n".join(document for _, document, _ in sorted(train)) + "\n"
    (CORPUS / "train.txt").write_text(body, encoding="utf-8", newline="\n")
    digest = hashlib.sha256(body.encode()).hexdigest()
    print(f"train: {len(train)} documents, {len(body):,} characters, sha256 {digest}")
    for package, size in sizes.most_common():
        print(f"  {package:24} {size:>12,}")


if __name__ == "__main__":
    main()
