"""judge.py: who is at fault, from what rank 0 hears and at which time. No sockets, no clock."""

import pytest

from openchatkit.distributed.activity import Position
from openchatkit.distributed.judge import Judge, RunVerdict

NAMES = [f"rank {rank} on host-{rank // 2}" for rank in range(4)]
FORWARD = Position("forward", step=17, micro_batch=3, stage=1, since=90.0)
WAITS = Position("sum gradients", step=17, waits=True, since=95.0)


@pytest.fixture
def judge() -> Judge:
    """Four ranks, all heard at second 100."""
    judge = Judge(NAMES, silence=8, started=0)
    for rank in range(4):
        judge.hear(rank, FORWARD if rank == 2 else WAITS, now=100)
    return judge


def test_nobody_is_at_fault_while_all_are_heard(judge):
    assert judge.decide(108) is None


def test_a_silent_rank_is_named_with_where_it_was(judge):
    for rank in (0, 1, 3):
        judge.hear(rank, WAITS, now=105)
    assert judge.decide(109) == RunVerdict(
        "rank 2 on host-1 gave no sign of life for 8 s after step 17 (forward, stage 1, micro-batch 3): "
        "it is frozen, or its network is down",
        75,
    )


def test_of_a_host_that_is_cut_off_one_rank_is_named_and_the_others_counted(judge):
    for rank in (0, 1):
        judge.hear(rank, WAITS, now=105)
    verdict = judge.decide(109)
    assert verdict is not None
    assert verdict.message.startswith("rank 2 on host-1 gave no sign of life for 8 s after step 17")
    assert "(nor did 1 other)" in verdict.message


def test_a_time_in_which_rank_0_heard_nobody_does_not_count(judge):
    judge.forgive(500)
    assert judge.decide(607) is None
    assert judge.decide(609) is not None


def test_a_connection_that_ends_without_a_word_is_a_death(judge):
    judge.note_disconnection(2)
    words = "rank 2 on host-1 died in step 17 (forward, stage 1, micro-batch 3): it was killed (likely out of memory)"
    assert judge.decide(101) == RunVerdict(f"{words}, or it crashed", 75)


def test_the_first_verdict_stays(judge):
    judge.note_disconnection(2)
    first = judge.decide(101)
    judge.note_disconnection(3)
    assert judge.decide(200) == first


def test_a_rank_that_left_in_good_order_is_neither_dead_nor_silent(judge):
    for rank in range(4):
        judge.note_leaving(rank)
    judge.note_disconnection(2)
    assert judge.decide(1000) is None
    assert judge.all_left


def test_a_failure_ends_all_with_its_words_and_status_once_its_rank_has_ended(judge):
    judge.note_failure(3, "data.jsonl:3 is no object", 2, now=100)
    judge.note_loss(1, "Connection closed by peer", now=100, timed_out=False)
    assert judge.decide(101.5) is None
    judge.note_disconnection(3)
    assert judge.decide(101.6) == RunVerdict("rank 3 on host-1: data.jsonl:3 is no object", 2)


def test_a_rank_that_fails_and_does_not_end_is_not_waited_for(judge):
    judge.note_failure(3, "wrong", 1, now=100)
    assert judge.decide(102) == RunVerdict("rank 3 on host-1: wrong", 1)


def test_a_failure_of_rank_0_is_passed_on_before_it_ends(judge):
    judge.note_failure(0, "wrong", 2, now=100)
    assert judge.decide(100) == RunVerdict("rank 0 on host-0: wrong", 2)


def test_a_lost_connection_is_explained_by_a_death_that_is_noticed_later(judge):
    judge.note_loss(1, "Connection closed by peer", now=100, timed_out=False)
    assert judge.decide(100.5) is None
    judge.note_disconnection(2)
    verdict = judge.decide(100.9)
    assert verdict is not None
    assert verdict.message.startswith("rank 2 on host-1 died")


def test_a_lost_connection_without_a_cause_names_who_lost_it(judge):
    judge.note_loss(1, "Connection reset by peer", now=100, timed_out=False)
    assert judge.decide(101) == RunVerdict(
        "rank 1 on host-0 lost a peer (Connection reset by peer) in step 17 (sum gradients, waiting for others)", 75
    )


def test_waiting_in_vain_names_the_rank_that_others_wait_for(judge):
    judge.note_loss(1, "Timed out waiting 8000ms", now=104, timed_out=True)
    assert judge.decide(105) == RunVerdict(
        "others waited too long (Timed out waiting 8000ms) for rank 2 on host-1, for 15 s in "
        "step 17 (forward, stage 1, micro-batch 3)",
        75,
    )


def test_where_all_wait_the_one_in_the_earliest_step_is_named(judge):
    judge.hear(2, Position("sum gradients", step=16, waits=True, since=90.0), now=104)
    judge.note_loss(1, "Timed out", now=104, timed_out=True)
    verdict = judge.decide(105)
    assert verdict is not None
    assert verdict.message.endswith("for rank 2 on host-1, for 15 s in step 16 (sum gradients, waiting for others)")


def test_positions_keep_their_age_between_clocks():
    sent = FORWARD.to_json(now=100.0)
    assert Position.from_json(sent, now=1000.0) == Position("forward", 17, 3, 1, since=990.0)


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (Position("start"), "start"),
        (Position("step", step=3), "step 3"),
        (Position("saving", step=3), "step 3 (saving)"),
        (WAITS, "step 17 (sum gradients, waiting for others)"),
        (FORWARD, "step 17 (forward, stage 1, micro-batch 3)"),
    ],
)
def test_a_position_in_words(position, words):
    assert position.describe() == words
