"""Processes tell each other the units that they met."""

import numpy as np
from tokenizer_families import english, family, hostile_texts

from packing.text.encode import FastEncoder, Texts, open_encoder
from packing.text.learned import Learned, News
from packing.text.tokenizer import text_tokenizer

WORDS = News(*(np.array(each) for each in ([], [2, 1], [5, 6, 7], [1, 2])))._replace(
    data=np.frombuffer(b"weI", np.uint8)
)


def opened(folder, name: str) -> FastEncoder:
    encoder = open_encoder(family(name), "fast", folder)
    assert isinstance(encoder, FastEncoder)
    return encoder


def test_what_one_has_learned_another_knows(tmp_path):
    for name in ("BERT", "RoBERTa", "XLM-R"):
        folder = tmp_path / name
        folder.mkdir()
        texts = [Texts.of_strings(english()[:50])]
        first, second = (opened(folder, name) for _ in range(2))
        expected = first.encode(texts)
        rows = second.encode(texts)
        assert second.new_bytes == 0 < first.new_bytes
        assert np.array_equal(rows.ids, expected.ids) and np.array_equal(rows.offsets, expected.offsets)


def test_ids_stay_whoever_learned_them(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.text.encode.MOST_NEW", 2)
    encoders = [opened(tmp_path, "BERT") for _ in range(3)]
    tokenizer = text_tokenizer(family("BERT"))
    texts = hostile_texts(600) + english()[:30] + ["word " * 5 + "x" * 70, "WORD xy"]
    for number in range(0, len(texts), 50):
        part = texts[number : number + 50]
        rows = encoders[number // 50 % 3].encode([Texts.of_strings(part)])
        expected = tokenizer.encode_batch(part)
        assert [rows.row(row).tolist() for row in range(len(part))] == [each.ids for each in expected]


def test_half_a_message_waits_for_the_rest(tmp_path):
    one, two = Learned(tmp_path), Learned(tmp_path)
    one.tell(WORDS)
    one.tell(WORDS)
    two.meet()
    (file,) = (file for file in two._others.values() if file is not None)
    whole = (tmp_path / file.name).read_bytes()
    cut = len(whole) - 5
    (tmp_path / file.name).write_bytes(whole[:cut])
    (news,) = two.hear()
    assert bytes(news.data) == b"weI" and news.lengths.tolist() == [2, 1]
    assert news.ids.tolist() == [5, 6, 7] and news.counts.tolist() == [1, 2]
    assert list(two.hear()) == []
    with (tmp_path / file.name).open("ab") as rest:
        rest.write(whole[cut:])
    assert len(list(two.hear())) == 1 and list(two.hear()) == []


def test_nobody_hears_itself(tmp_path):
    one = Learned(tmp_path)
    one.tell(WORDS)
    one.meet()
    assert list(one.hear()) == []


def test_a_full_disk_silences(tmp_path):
    one, two = Learned(tmp_path), Learned(tmp_path)

    class FullDisk:
        def write(self, message):
            raise OSError("No space left on device")

        def close(self):
            pass

    one._own.close()
    one._own = FullDisk()
    one.tell(WORDS)
    one.tell(WORDS)
    two.meet()
    assert list(two.hear()) == []
