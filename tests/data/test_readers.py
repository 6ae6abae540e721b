"""Every kind of input file: what it holds, and what is said when it is damaged."""

import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nemohybrid.data.corpus import Corpus
from nemohybrid.data.prepare import PrepareOptions, prepare
from nemohybrid.data.readers import Reading, ZstdFile, read_unit
from nemohybrid.data.text import Document
from nemohybrid.data.tokenizer import ByteTokenizer
from nemohybrid.data.units import cut_into_units
from nemohybrid.errors import DataError

TEXTS = [f"document {number}: caf\u00e9 \U0001f600\n" * (number % 5 + 1) for number in range(60)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zst(content: bytes, frames: int = 1) -> bytes:
    size = -(-len(content) // frames)
    cut = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(zstandard.ZstdCompressor().compress(piece) for piece in cut)


def parquet(path, texts=TEXTS, rows=7, kind=None) -> None:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, type=kind)})
    pq.write_table(table, path, row_group_size=rows)


def documents_of(path, unit_bytes=10**9, reading=None) -> list[str]:
    units = cut_into_units(path, "text", unit_bytes)
    found = [document for unit in units for document in read_unit(unit, reading or Reading())]
    assert all(isinstance(document, Document) for document in found), found
    return [document.text for document in found]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("a.ndjson.gz", gzip.compress(JSONL[:1000]) + gzip.compress(JSONL[1000:])),
        ("a.jsonl.zst", zst(JSONL)),
        ("a.jsonl.zst", zst(JSONL, frames=5)),
        ("a.jsonl.zst", zst(JSONL[:99]) + b"\x50\x2a\x4d\x18\x03\0\0\0pad" + zst(JSONL[99:])),
    ],
    ids=["plain", "gzip", "gzip in two members", "zst", "zst in five frames", "zst with a skippable frame"],
)
@pytest.mark.parametrize("unit_bytes", [1, 100, 10**9])
def test_the_same_documents_come_out_of_every_form(name, content, unit_bytes, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert documents_of(tmp_path / name, unit_bytes) == TEXTS


@pytest.mark.parametrize(
    "kind", [None, pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
@pytest.mark.parametrize("unit_bytes", [1, 400, 10**9])
def test_parquet_gives_its_documents_in_order(kind, unit_bytes, tmp_path):
    texts = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
    parquet(tmp_path / "a.parquet", texts, kind=kind)
    assert documents_of(tmp_path / "a.parquet", unit_bytes) == TEXTS


@pytest.mark.parametrize("compress, name", [(gzip.compress, "a.txt.gz"), (zst, "a.txt.zst")], ids=["gz", "zst"])
def test_compressed_text_is_split_like_plain_text(compress, name, tmp_path):
    (tmp_path / name).write_bytes(compress(b"one\n\ntwo\r\n"))
    assert documents_of(tmp_path / name) == ["one\n\ntwo\r\n"]
    assert documents_of(tmp_path / name, reading=Reading(separator="")) == ["one\n", "two\r\n"]


def test_a_window_beyond_the_default_of_zstd_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(JSONL))
    assert documents_of(tmp_path / "a.jsonl.zst") == TEXTS


def test_zstd_is_read_in_pieces():
    content = zst(bytes(10_000_000))
    file = io.BytesIO(content + zst(b"end"))
    reader = io.BufferedReader(ZstdFile(file))
    assert reader.read(5) == bytes(5)
    assert len(reader.read()) == 10_000_000 - 5 + 3


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl.zst", zst(JSONL)[:-9], "truncated or damaged after line .*, at byte .* breaks off"),
        ("a.jsonl.zst", zst(JSONL) + b"junk junk", "damaged after line 60, at byte"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-9], "damaged after line .*, at byte .*end-of-stream"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-8] + bytes(8), "damaged after line .*, at byte .*CRC"),
        ("a.jsonl.gz", JSONL, "damaged after line 0, at byte .*[Nn]ot a gzipped file"),
        ("a.jsonl.zst", b"", "damaged after line 0, at byte 0 of 0"),
        ("a.parquet", b"PAR1 and nothing more", "damaged or not parquet"),
    ],
    ids=["zst truncated", "zst with junk", "gz truncated", "gz checksum", "no gz", "empty", "no parquet"],
)
def test_a_damaged_container_is_named_with_its_position(name, content, message, on_error, tmp_path):
    (tmp_path / name).write_bytes(content)
    options = PrepareOptions(skip_damaged=on_error == "skip")
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        prepare([tmp_path / name], tmp_path / "c", ByteTokenizer(), options)
    assert [path.name for path in tmp_path.iterdir()] == [name], "something was left behind"


def test_a_damaged_page_of_parquet_is_named_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=20, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content, middle = bytearray(path.read_bytes()), column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: damaged after row 40"):
        documents_of(path)


def test_parquet_without_the_column_or_without_text_in_it_is_refused(tmp_path):
    parquet(tmp_path / "a.parquet")
    for field, message in {
        "test": "no column 'test'. Columns: 'id', 'text'. Did you",
        "id": "not text but int64",
    }.items():
        with pytest.raises(DataError, match=message):
            cut_into_units(tmp_path / "a.parquet", field)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'nemohybrid\[parquet\]'"):
        cut_into_units(tmp_path / "a.parquet", "text")


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "half": (b'{"text": "half', "not a JSON object"),
    "list": (b'["text"]', "not a JSON object but list"),
    "field": (b'{"Text": "x"}', "no field 'text'. Fields of this line: 'Text'. Did you mean 'Text'"),
    "null": (b'{"text": null}', "field 'text' is not text but NoneType"),
    "latin-1": (b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8"),
    "surrogate": (b'{"text": "ok \\ud83d"}', ".*half a surrogate pair"),
    "deep": (b"[" * 100_000, "not a JSON object"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_jsonl_line_stops_and_leaves_nothing(line, message, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=f"in.jsonl, line 3: {message}"):
        prepare([source], tmp_path / "c", ByteTokenizer())
    assert list(tmp_path.iterdir()) == [source], "half a corpus was left behind"


@pytest.mark.parametrize("unit_bytes", [10, 10**9])
@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_jsonl_line_can_be_skipped_and_is_counted(line, message, unit_bytes, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"\n" + line[:1000] + b"\n" + GOOD)
    options = PrepareOptions(skip_damaged=True, unit_bytes=unit_bytes)
    prepared = prepare([tmp_path / "in.jsonl"], tmp_path / "c", ByteTokenizer(), options)
    assert (prepared.info.documents, prepared.info.damaged_documents_skipped) == (2, 1)
    (place,) = prepared.damages
    assert place.startswith(f"{tmp_path}/in.jsonl, line 3: "), place
    assert Corpus(tmp_path / "c").info == prepared.info


@pytest.mark.parametrize("separator", [None, ""])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_byte_that_is_not_utf8_is_named_with_its_line(separator, on_error, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"fine\n\nfine\nbad \xff\nfine\n\nfine\n")
    (tmp_path / "good.txt").write_bytes(b"x")
    options = PrepareOptions(Reading(separator=separator), skip_damaged=on_error == "skip")
    inputs, message = [tmp_path / "in.txt", tmp_path / "good.txt"], "in.txt, line 4: byte 0xff is not UTF-8"
    if on_error == "stop":
        with pytest.raises(DataError, match=message):
            prepare(inputs, tmp_path / "c", ByteTokenizer(), options)
        return
    prepared = prepare(inputs, tmp_path / "c", ByteTokenizer(), options)
    assert message in prepared.damages[0]
    assert prepared.info.documents == (1 if separator is None else 3), "more was left out than the damaged document"


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_a_bad_row_of_parquet_stops_or_is_skipped(unit_bytes, tmp_path):
    table = pa.table({"text": pa.array([b"one", None, b"caf\xe9", b"two"], type=pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'text' is not text but null"):
        prepare([tmp_path / "a.parquet"], tmp_path / "c", ByteTokenizer(), PrepareOptions(unit_bytes=unit_bytes))
    options = PrepareOptions(skip_damaged=True, unit_bytes=unit_bytes)
    prepared = prepare([tmp_path / "a.parquet"], tmp_path / "c", ByteTokenizer(), options)
    assert prepared.info.documents == 2
    assert [place.partition(", ")[2][:14] for place in prepared.damages] == ["row 2: column ", "row 3: byte 0x"]


def test_only_the_first_damages_are_listed_in_the_order_of_the_inputs(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(GOOD + b"bad\n" * 4)
    options = PrepareOptions(skip_damaged=True, unit_bytes=10, workers=2)
    prepared = prepare([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], tmp_path / "c", ByteTokenizer(), options)
    assert prepared.info.damaged_documents_skipped == 8
    places = [place.partition(":")[0].rpartition("/")[2] for place in prepared.damages]
    assert places == [f"b.jsonl, line {line}" for line in (2, 3, 4, 5)] + ["a.jsonl, line 2"]


@pytest.mark.parametrize("name, content", [("a.jsonl", '{"text": "hello"}\n'), ("a.txt", "hello")])
def test_a_byte_order_mark_is_no_part_of_the_text(name, content, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    (unit,) = cut_into_units(tmp_path / name, "text")
    assert [document.text for document in read_unit(unit, Reading())] == ["hello"]
