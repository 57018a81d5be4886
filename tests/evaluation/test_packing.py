"""Packing: layout by hand, and the invariants that make it exact."""

import numpy as np
import pytest

from ntkjax.errors import UserError
from ntkjax.evaluation.packing import collate, common_prefix_length, cut_prompt, pack


def test_layout_by_hand():
    # prompt 1 2 3 | response 4 then 5 6, or 4 then 7
    packed = pack([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]], [3, 3], max_length=10)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert packed.segments.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 4]
    # The shared token 4 is predicted at 2; both branches start from the last shared token, at 3.
    assert packed.predictor.tolist() == [2, 3, 4, 3]
    assert packed.target.tolist() == [4, 5, 6, 7]
    assert packed.branch.tolist() == [0, 1, 1, 2]
    assert packed.counts().tolist() == [3, 2]
    assert packed.sums(np.array([1.0, 10.0, 100.0, 1000.0])).tolist() == [111.0, 1001.0]
    assert packed.dropped == 0


def test_without_the_shared_tokens():
    packed = pack([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]], [3, 3], max_length=10, score_shared=False)
    assert packed.counts().tolist() == [2, 1]
    assert packed.target.tolist() == [5, 6, 7]


def test_one_choice_a_prefix_of_the_other():
    packed = pack([[1, 2, 5], [1, 2, 5, 6]], [1, 1], max_length=10)
    # The shorter choice still owns its last token.
    assert packed.tokens.tolist() == [1, 2, 5, 5, 6]
    assert packed.segments.tolist() == [0, 0, 1, 2, 2]
    assert packed.counts().tolist() == [2, 3]


def test_equal_choices_and_a_single_one():
    assert pack([[1, 2, 3], [1, 2, 3]], [1, 1], max_length=10).counts().tolist() == [2, 2]
    assert pack([[1, 2, 3]], [1], max_length=10).counts().tolist() == [2]


def test_responses_that_start_at_different_places():
    # The first sequence's response starts at 2, the second's at 3, though their tokens agree up to 3.
    packed = pack([[1, 2, 3, 4], [1, 2, 3, 5]], [2, 3], max_length=10)
    assert packed.counts().tolist() == [2, 1]
    assert packed.segments.tolist()[:3] == [0, 0, 1]


def test_every_branch_reads_back_as_its_sequence():
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompt = rng.integers(5, 9, rng.integers(1, 6)).tolist()
        choices = [rng.integers(5, 7, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 5))]
        sequences = [prompt + c for c in choices]
        packed = pack(sequences, [len(prompt)] * len(choices), max_length=20)
        for c, sequence in enumerate(sequences, 1):
            mine = (packed.segments == 0) | (packed.segments == c)
            order = np.argsort(packed.positions[mine])
            assert packed.tokens[mine][order].tolist() == sequence
            assert np.sort(packed.positions[mine]).tolist() == list(range(len(sequence)))
            scored = (packed.branch == 0) | (packed.branch == c)
            assert packed.target[scored].tolist() == choices[c - 1]
            # A predictor sits one position before its target and in a segment that the target may see.
            assert np.isin(packed.segments[packed.predictor[scored]], [0, c]).all()
            before = packed.positions[packed.predictor[scored]]
            assert before.tolist() == list(range(len(prompt) - 1, len(sequence) - 1))


def test_cut_from_the_left_alike_for_all_choices():
    packed = pack([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]], [4, 4], max_length=4)
    assert packed.dropped == 2
    assert packed.tokens.tolist() == [3, 4, 5, 6, 7]
    kept = pack([[9, 2, 3, 4, 5, 6], [9, 2, 3, 4, 7]], [4, 4], max_length=4, bos=9)
    assert kept.tokens.tolist() == [9, 4, 5, 6, 7]
    assert cut_prompt([9, 1, 2], 1, bos=9) == [2]
    assert cut_prompt([9, 1, 2], 3, bos=9) == [9, 1, 2]


def test_the_cut_equals_that_of_the_data(tokenizer):
    from ntkjax.data.encode import truncate
    from ntkjax.data.prompts import Rendered

    for room in range(3, 9):
        tokens = [9, 1, 2, 3, 4, 5, 6]
        cut = truncate(Rendered(tokens, 5), room, 9)
        packed = pack([tokens], [5], max_length=room, bos=9)
        assert packed.tokens.tolist() == cut.tokens
        assert packed.dropped == cut.prompt_lost


def test_a_response_without_room_is_refused():
    with pytest.raises(UserError, match=r"example 'x'.*3 tokens.*max_length is 3.*raise max_length"):
        pack([[1, 2, 3, 4], [1, 2]], [1, 1], max_length=3, name="example 'x'")


def test_collate_pads_and_marks_filler():
    packed = [pack([[1, 2, 3], [1, 2, 4]], [1, 1], max_length=9), pack([[5, 6]], [1], max_length=9)]
    b = collate(packed, np.array([1]), 3, 8, 4)
    assert b.batch.tokens.shape == (3, 8) and b.predictor.shape == (3, 4)
    assert b.batch.index.tolist() == [1, -1, -1]
    assert b.batch.lengths.tolist() == [2, 1, 1]
    assert not np.any(b.batch.response_mask)
    assert b.rows.tolist() == [1]


def test_common_prefix_length():
    assert common_prefix_length([[1, 2, 3], [1, 2]]) == 2
    assert common_prefix_length([[1], [2]]) == 0
