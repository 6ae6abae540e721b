"""The pattern grammar: Megatron's table, the published models, and our additions (repetition, whitespace, checks)."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemohybrid.errors import ConfigError
from nemohybrid.pattern import (
    DEFAULT_SYMBOLS,
    MAX_SYMBOLS,
    Pattern,
    PatternError,
    Segment,
    check_symbol,
    parse,
)

DENSE_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
# As published in Megatron-Bridge's recipes and Megatron-LM's model configurations, with the number of M, *, - and E.
PUBLISHED = {
    "nemotron_h_8b": (DENSE_52, (24, 4, 24, 0)),
    "nemotron_h_47b": (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        (45, 5, 48, 0),
    ),
    "nemotron_h_56b": (
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
        "-M-M-M-M-M-",
        (54, 10, 54, 0),
    ),
    "nano_v2_12b": ("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", (28, 6, 28, 0)),
    "nano_v2_9b": ("M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", (27, 4, 25, 0)),
    "nano_3_4b": ("M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", (21, 4, 17, 0)),
    "nano_3_30b": ("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", (23, 6, 0, 23)),
    "super_120b": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        (40, 8, 0, 40),
    ),
    "ultra_550b": (
        "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        (48, 12, 0, 48),
    ),
}


def caret_column(error: PatternError) -> tuple[str, int]:
    """The line of text that the message shows, and the column in it that its caret points at."""
    _, shown, pointer = str(error).split("\n")
    return shown[4:], pointer.index("^") - 4


def pattern_or_error(text: str) -> Pattern | PatternError:
    try:
        return parse(text)
    except PatternError as error:
        return error


# What Megatron's parser answers


@pytest.mark.parametrize("text", ["M*M*", "M*M*/MM/MM", "M*/", "M*//", "M||M", "M|", "|M", "M-M-|M-M*-/MM/MM"])
def test_megatron_reads_our_canonical_form_as_written(text):
    assert parse(text).canonical == text.rstrip("/"), "only an empty MTP part may vanish"


@pytest.mark.parametrize(
    "text, main, segments, mtp, depth",
    [
        ("M*M*", "M*M*", ("M*M*",), "", 0),
        ("M*M*/MM/MM", "M*M*", ("M*M*",), "MM", 2),
        ("M*/", "M*", ("M*",), "", 0),
        ("M||M", "MM", ("M", "", "M"), "", 0),
        ("M|", "M", ("M", ""), "", 0),
        ("|M", "M", ("", "M"), "", 0),
    ],
)
def test_megatrons_table_of_accepted_patterns(text, main, segments, mtp, depth):
    pattern = parse(text)
    assert (pattern.main, pattern.segments, pattern.mtp, pattern.mtp_depth) == (main, segments, mtp, depth)
    assert pattern.num_layers == len(main), "MTP layers and boundaries are not layers of the model"


def test_counts_with_mtp_equal_megatrons():
    pattern = parse("M-M-|M-M*-/MM/MM")
    assert pattern.counts + pattern.mtp_counts == {"M": 8, "-": 4, "*": 1}
    assert pattern.counts["E"] == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_have_the_published_layers(name):
    text, counts = PUBLISHED[name]
    pattern = parse(text)
    assert tuple(pattern.counts[symbol] for symbol in "M*-E") == counts
    assert pattern.num_layers == sum(counts)
    assert parse(f"{text}/*E/*E") == Pattern(pattern.segments, "*E", 2), "the same model with two MTP blocks"


# What we add


@pytest.mark.parametrize(
    "text, canonical",
    [
        (" M *\n\t- ", "M*-"),
        ("(M-)x4", "M-M-M-M-"),
        ("((M-)x2 *-)x2", "M-M-*-M-M-*-"),
        ("(M)x1", "M"),
        ("(M)x03", "MMM"),
        ("(M-) x 2", "M-M-"),
        ("(M|)x2M", "M|M|M"),
        ("M/(*E)x2/*E*E", "M/*E*E/*E*E"),
        ("(M-M-M-M*-)x1 (M-M-M-M-M*-)x3 (M-)x5", DENSE_52),
    ],
)
def test_whitespace_and_repetition_are_only_ways_of_writing(text, canonical):
    assert parse(text).canonical == canonical


def test_depth_of_nesting_has_no_limit():
    depth = 5_000  # beyond Python's recursion limit
    assert parse("(" * depth + "M" + ")x1" * depth).main == "M"


def test_a_new_symbol_is_legal_where_it_is_given():
    assert parse("MG", {**DEFAULT_SYMBOLS, "G": "Gated DeltaNet"}).main == "MG"
    with pytest.raises(PatternError, match="unknown symbol 'G'"):
        parse("MG")


@pytest.mark.parametrize("symbol", ["|", "/", "(", ")", "x", "7", " ", "\n", "\0", "", "MM"])
def test_a_symbol_that_the_grammar_needs_is_refused(symbol):
    with pytest.raises(ConfigError, match="cannot be a layer symbol"):
        check_symbol(symbol)
    with pytest.raises(ConfigError, match="cannot be a layer symbol"):
        parse("M", {**DEFAULT_SYMBOLS, symbol: "taken"})


# What we refuse

FAULTS = [
    # text, position, what the message must say
    ("M-Q*", 2, "unknown symbol 'Q' at position 2"),
    ("m*", 0, "did you mean M?"),
    ("MeM", 1, "did you mean E?"),
    ("M*D", 2, "unknown symbol 'D'"),
    ("M*+", 2, "unknown symbol '+'"),
    ("M*/D", 3, "unknown symbol 'D'"),
    ("(ME)2", 3, "group that is not repeated"),
    ("(M-", 0, "'(' that is not closed"),
    ("M((-)x2", 1, "'(' that is not closed"),
    ("(M/M)x2", 0, "'(' that is not closed in its part"),
    ("M-)", 2, "')' without '('"),
    ("(M-)x", 4, "'x' without a number"),
    ("(M-)xM", 4, "'x' without a number"),
    ("(M-)x-3", 4, "'x' without a number"),
    ("(M-)x0", 5, "repetition 0 times"),
    ("(M-)X4", 3, "group that is not repeated"),
    ("()x3", 0, "repetition of nothing"),
    ("Mx4", 1, "a repetition is written (M-)x4"),
    ("M4", 1, "a repetition is written (M-)x4"),
    ("(M)x1 0", 6, "'0' outside a repetition"),
    ("(M)x²", 3, "'x' without a number"),
    ("(M)x99999", 4, "the largest legal number is 10000"),
    ("(M)x" + "9" * 5_000, 4, "the largest legal number is 10000"),
    ("M((M)x9999)x9999", 1, "more than 10000 symbols"),
    ("(M)x10000 M", 10, "more than 10000 symbols"),
    ("", 0, "no layers"),
    ("  ", 0, "no layers"),
    ("|", 0, "no layers"),
    ("/MM", 0, "no layers"),
    ("M*/MM/", 5, "part 1 is 'MM' and part 2 is ''"),
    ("M*//MM", 4, "part 1 is '' and part 2 is 'MM'"),
    ("M*/MM/M-/MM", 6, "part 1 is 'MM' and part 2 is 'M-'"),
    ("M|M*/M|M", 6, "'|' in an MTP part"),
    ("M/(M|)x2", 4, "'|' in an MTP part"),
]


@pytest.mark.parametrize("text, position, says", FAULTS, ids=[f"{text[:20]!r}" for text, _, _ in FAULTS])
def test_every_fault_gives_reason_position_and_caret(text, position, says):
    with pytest.raises(PatternError) as caught:
        parse(text)
    error = caught.value
    assert isinstance(error, ConfigError)
    assert says in str(error)
    assert (error.position, error.text) == (position, text)
    shown, column = caret_column(error)
    assert shown[column : column + 1] == text[position : position + 1].replace("\n", " "), "the caret points elsewhere"


def test_a_caret_under_a_long_or_broken_text_stays_on_its_line():
    for text in ("M-" * 200 + "Q" + "M-" * 200, "M-\n\tM-\rQ"):
        with pytest.raises(PatternError) as caught:
            parse(text)
        shown, column = caret_column(caught.value)
        assert shown[column] == "Q"
        assert len(shown) < 130


# Pipeline stages


def test_stages_take_segments_in_turn_as_megatrons_virtual_pipeline():
    stages = parse("M-M|*-|MM|E").stage_layers(2)
    assert stages == ((Segment(0, "M-M"), Segment(5, "MM")), (Segment(3, "*-"), Segment(7, "E")))


def test_empty_segments_are_stages_without_layers():
    assert parse("|M-|").stage_layers(3) == ((Segment(0, ""),), (Segment(0, "M-"),), (Segment(2, ""),))


@pytest.mark.parametrize("text", ["M-M*-", "M-|M*|-", "|M-M*-|"])
def test_one_stage_builds_every_layer(text):
    (stage,) = parse(text).stage_layers(1)
    assert "".join(segment.symbols for segment in stage) == "M-M*-"


def test_a_pattern_without_cuts_has_one_stage_until_it_is_cut():
    pattern = parse("M-M*-M/*E")
    with pytest.raises(PatternError, match=r"not cut yet into 3 pipeline stages\. Legal: 1; or cut it first"):
        pattern.stage_layers(3)
    assert pattern.legal_stage_counts == (1, 2, 3, 4, 5, 6)
    cut = pattern.cut_at([1, 3, 2])
    assert cut == parse("M|-M*|-M/*E")
    assert cut.stage_layers(3) == ((Segment(0, "M"),), (Segment(1, "-M*"),), (Segment(4, "-M"),))
    assert cut.legal_stage_counts == (1, 3)


def test_a_cut_replaces_older_ones_and_may_be_empty():
    assert parse("M-|M*").cut_at([0, 4]) == parse("|M-M*")


@pytest.mark.parametrize("lengths", [[3], [2, 3], [], [5, -1]])
def test_a_cut_that_is_not_the_whole_model_is_refused(lengths):
    with pytest.raises(PatternError, match="num_layers=4"):
        parse("M-M*").cut_at(lengths)


@pytest.mark.parametrize(
    "text, stages, legal",
    [
        ("M-M*-M", 7, "Legal numbers of stages: 1 to 6; or place empty segments by hand"),
        ("M", 2, "Legal numbers of stages: 1 to 1;"),
        ("M", 0, "Legal numbers of stages: 1 to 1;"),
        ("M|M|M", 2, "Legal numbers of stages: 1, 3; or cut the pattern into a multiple of 2 segments"),
        ("M|M", 4, "Legal numbers of stages: 1, 2; or cut the pattern into a multiple of 4 segments"),
    ],
)
def test_stages_that_do_not_divide_are_refused_with_the_legal_numbers(text, stages, legal):
    for refuse in (parse(text).stage_layers, parse(text).check_stages):
        with pytest.raises(PatternError) as caught:
            refuse(stages)
        assert legal in str(caught.value)


# Properties

layers = st.text("M*-E", min_size=1, max_size=6)
pieces = st.recursive(
    layers | st.just("|"),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)),
    max_leaves=8,
)
blanks = st.sampled_from(["", " ", "\n"])


@st.composite
def written_two_ways(draw):
    """The same pattern with repetitions and blanks, and written out."""

    def short(piece) -> str:
        if isinstance(piece, str):
            return draw(blanks).join(piece)
        return f"({''.join(map(short, piece[0]))}){draw(blanks)}x{draw(blanks)}{piece[1]}"

    def long(piece) -> str:
        return piece if isinstance(piece, str) else "".join(map(long, piece[0])) * piece[1]

    main = [draw(layers), *draw(st.lists(pieces, min_size=1, max_size=4))]
    mtp = ("/" + draw(layers)) * draw(st.integers(0, 3))
    return draw(blanks).join(map(short, main)) + mtp, "".join(map(long, main)) + mtp


@given(written_two_ways())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_repetition_equals_writing_out_and_the_canonical_form_round_trips(both):
    short, long = both
    pattern = parse(short)
    assert pattern == parse(long)
    assert pattern.canonical == long
    assert parse(pattern.canonical) == pattern


@given(written_two_ways())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_legal_split_holds_every_layer_once_in_order(both):
    pattern = parse(both[0])
    for num_stages in pattern.legal_stage_counts:
        pattern.check_stages(num_stages)
        needs_cuts = len(pattern.segments) == 1 < num_stages
        cut = pattern.cut_at([pattern.num_layers - num_stages + 1] + [1] * (num_stages - 1)) if needs_cuts else pattern
        stages = cut.stage_layers(num_stages)
        assert len(stages) == num_stages
        in_order = [segment for chunk in zip(*stages, strict=True) for segment in chunk]
        assert "".join(segment.symbols for segment in in_order) == pattern.main
        for segment in in_order:
            assert pattern.main[segment.first_layer :].startswith(segment.symbols)


@given(st.text("M*-E|/()x0123 qé\n", max_size=40) | st.text(max_size=20))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_garbage_is_read_or_refused_with_a_caret_inside_it(text):
    result = pattern_or_error(text)
    if isinstance(result, Pattern):
        assert parse(result.canonical) == result
        assert 1 <= result.num_layers <= MAX_SYMBOLS
    else:
        assert result.position in range(max(1, len(text)))
        shown, column = caret_column(result)
        assert column in range(max(1, len(shown))), "the caret stands beyond the text"


# The page about patterns

PAGE = (Path(__file__).parents[1] / "docs/pattern.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```text\n(.*?)\n```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("line", [line for block in EXAMPLES if "=>" in block for line in block.splitlines()])
def test_the_page_tells_how_a_pattern_is_read(line):
    written, canonical = line.split("=>")
    assert parse(written).canonical == canonical.strip()


@pytest.mark.parametrize("block", [block for block in EXAMPLES if "^" in block])
def test_the_page_shows_the_errors_that_are_raised(block):
    text = block.splitlines()[1].strip()
    assert str(pattern_or_error(text)) == block
