"""Blocks and sequences of a pool's replicas, while replicas come and go."""

import random

import pytest

from prefillshare.router.admission.decode_room import DecodeRoom, ReplicaCapacity


class Pool:
    def __init__(self, **replicas):
        self.set(**replicas)

    def set(self, **replicas):
        self.now = {name: ReplicaCapacity(*has) for name, has in replicas.items()}

    def __call__(self):
        return self.now


def room_of(pool) -> DecodeRoom:
    room = DecodeRoom(pool)
    room.refresh()
    return room


def test_the_emptiest_replica_is_found_first():
    room = room_of(Pool(a=(100, 4), b=(120, 4)))
    assert room.find(100) == "b"
    room.change("b", 50, 1)
    assert (room.find(100), room.find(101)) == ("a", None)
    assert room.find(70, but_the_emptiest=True) == "b"
    assert room.find(71, but_the_emptiest=True) is None
    assert (dict(room.free), room.free_blocks, room.free_sequences) == ({"a": 100, "b": 70}, 170, 7)


def test_a_replica_without_a_free_sequence_has_no_room():
    room = room_of(Pool(a=(100, 1)))
    room.change("a", 10, 1)
    assert (dict(room.free), room.find(1), room.fits("a", 1)) == ({}, None, False)
    room.change("a", -10, -1)
    assert room.find(100) == "a"


def test_reservations_of_a_vanished_replica_do_not_count_until_it_is_back():
    pool = Pool(a=(100, 4), b=(100, 4))
    room = room_of(pool)
    room.change("a", 60, 1)
    pool.set(b=(100, 4))
    assert room.refresh()
    assert (dict(room.free), room.free_blocks, room.largest, "a" in room) == ({"b": 100}, 100, 100, False)
    pool.set(a=(100, 4), b=(100, 4))
    room.refresh()
    assert (dict(room.free), room.free_blocks) == ({"a": 40, "b": 100}, 140)
    pool.set(b=(100, 4))
    room.refresh()
    room.change("a", -60, -1)  # its turn ended elsewhere
    assert (dict(room.held), room.free_blocks) == ({}, 100)


def test_an_unchanged_mapping_is_not_looked_at_again():
    room = room_of(Pool(a=(100, 4)))
    assert not room.refresh()


def test_growth_past_what_there_is_shows_as_less_than_nothing():
    room = room_of(Pool(a=(100, 4)))
    room.change("a", 100, 1)
    room.change("a", 5, 0)
    assert (room.free["a"], room.find(0)) == (-5, None)


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_leave_sums_right(seed):
    rng, pool = random.Random(seed), Pool(r0=(50, 3))
    room, held = room_of(pool), []
    for _ in range(3000):
        what = rng.random()
        if what < 0.1:
            pool.set(**{f"r{n}": (rng.choice([50, 80]), 3) for n in range(5) if rng.random() < 0.7})
            room.refresh()
        elif what < 0.6 and (replica := room.find(blocks := rng.randrange(1, 30))):
            room.change(replica, blocks, 1)
            held.append((replica, blocks))
        elif held:
            replica, blocks = held.pop(rng.randrange(len(held)))
            room.change(replica, -blocks, -1)
        used = {name: [blocks for at, blocks in held if at == name] for name in pool.now}
        assert room.free_blocks == sum(has.blocks - sum(used[name]) for name, has in pool.now.items())
        assert room.free_sequences == sum(has.sequences - len(used[name]) for name, has in pool.now.items())
        expected = {name: has.blocks - sum(used[name]) for name, has in pool.now.items() if len(used[name]) < has.sequences}
        assert dict(room.free) == expected
        if expected:
            assert room.free[room.find(-1000)] == max(expected.values())
    for replica, blocks in held:
        room.change(replica, -blocks, -1)
    assert dict(room.held) == {}
