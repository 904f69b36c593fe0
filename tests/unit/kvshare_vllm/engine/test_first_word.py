from prefillshare.kvshare_vllm.engine.first_word import FirstWord


def test_the_first_of_two_words_holds():
    words = FirstWord()
    assert words.holds("r", "begun")
    assert words.holds("r", "begun")
    assert not words.holds("r", "given up")
    assert words.holds("s", "given up")
    assert not words.holds("s", "begun")


def test_so_many_are_remembered_the_latest_ones():
    words = FirstWord(most=2)
    for request in ("a", "b", "c"):
        assert words.holds(request, "begun")
    assert not words.holds("b", "given up")
    assert words.holds("a", "given up")
    assert not words.holds("c", "given up")
