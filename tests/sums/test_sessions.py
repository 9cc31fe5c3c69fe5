"""Places in secure sums: each is taken once, whoever takes it, and none is left from before a restart."""

import os
import threading
from pathlib import Path

import pytest

import fedinfer.sums.sessions
from fedinfer.errors import ProtocolViolation
from fedinfer.sums.sessions import FolderSessions, MemorySessions, Sessions


@pytest.fixture(params=["memory", "folder"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Sessions:
    return MemorySessions() if request.param == "memory" else FolderSessions(tmp_path / "places")


def test_a_place_is_taken_once(places: Sessions) -> None:
    with pytest.raises(ProtocolViolation, match="no place"):
        places.take("run")
    places.put("run", b"secret")
    places.put("other", b"another")
    assert places.take("run") == b"secret"
    with pytest.raises(ProtocolViolation, match="no place"):
        places.take("run")
    assert places.take("other") == b"another"


def test_a_place_that_was_taken_is_over_once_another_was_begun(places: Sessions) -> None:
    places.put("run", b"first")
    held = places.take("run")
    places.put_back("run", held + b", a step later")
    assert places.take("run") == b"first, a step later"
    places.put("run", b"second")
    places.put_back("run", b"first, another step later")
    assert places.take("run") == b"second"


def test_only_the_latest_places_are_kept(places: Sessions) -> None:
    for number in range(fedinfer.sums.sessions.MOST_PLACES + 1):
        places.put(f"run {number}", b"")
    with pytest.raises(ProtocolViolation, match="no place"):
        places.take("run 0")
    assert places.take("run 1") == b""


def test_set_ups_are_bounded(places: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedinfer.sums.sessions, "MOST_SET_UPS", 2)
    places.count_set_up()
    places.count_set_up()
    with pytest.raises(ProtocolViolation, match="set-ups: got 2"):
        places.count_set_up()


def test_the_count_of_set_ups_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedinfer.sums.sessions, "MOST_SET_UPS", 1)
    FolderSessions(tmp_path).count_set_up()
    with pytest.raises(ProtocolViolation, match="set-ups: got 1"):
        FolderSessions(tmp_path).count_set_up()


def test_of_many_that_take_one_place_at_once_one_gets_it(tmp_path: Path) -> None:
    FolderSessions(tmp_path).put("run", b"secret")
    taken: list[bytes] = []
    refused: list[ProtocolViolation] = []

    def take() -> None:
        try:
            taken.append(FolderSessions(tmp_path).take("run"))
        except ProtocolViolation as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (taken, len(refused)) == ([b"secret"], 7)


def test_a_place_from_before_a_restart_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = tmp_path / "boot"
    boot.write_bytes(b"one")
    monkeypatch.setattr(fedinfer.sums.sessions, "BOOT_ID", boot)
    FolderSessions(tmp_path / "places").put("run", b"secret")
    boot.write_bytes(b"two")
    with pytest.raises(ProtocolViolation, match="no place"):
        FolderSessions(tmp_path / "places").take("run")


def test_a_place_is_for_its_owner_alone(tmp_path: Path) -> None:
    FolderSessions(tmp_path / "places").put("run", b"secret")
    (place,) = (tmp_path / "places").glob("*.place")
    assert place.stat().st_mode & 0o077 == 0
    assert os.stat(tmp_path / "places").st_mode & 0o077 == 0
